"""A second set of pictures, in a style and of things that the demo has not, and that no setting was tuned on:
what the embedded base draws, laid in glazed tiles."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lora_core.generate.pipeline import Pipeline
from lora_core.generate.request import GenerationRequest
from lora_core.models.load import load_base

TILE = 8
GROUND = ("white", "sky blue", "pink", "yellow")
TRAIN = (
    "giraffe", "hedgehog", "pumpkin", "balloon", "drum", "umbrella", "key", "soccer ball", "palm tree",
    "cake", "light bulb", "whale", "snail", "banana", "lemon", "carrot", "rose", "tulip", "bee", "duck",
    "elephant", "tiger",
)  # fmt: skip
HELD_OUT = ("horse", "pig", "cow", "chicken", "grapes", "pizza", "airplane", "star", "bell", "gift")


def drawn_set(folder: Path) -> Path:
    """Draw both halves, `train/` and `held_out/`, with captions beside the pictures; returns the folder."""
    pipeline = Pipeline(load_base("demo", torch.device("cpu"), torch.float32), lambda weights, rank: weights)
    number = 0
    for name, things in (("train", TRAIN), ("held_out", HELD_OUT)):
        (folder / name).mkdir(parents=True)
        for thing in things:
            ground = f"on a {GROUND[number % len(GROUND)]} background"
            shot = GenerationRequest(prompt=f"{thing}, twemoji style, {ground}", seed=9000 + number, cfg=3.0)
            stem = folder / name / thing.replace(" ", "-")
            in_tiles(pipeline(shot), number).save(stem.with_suffix(".png"))
            stem.with_suffix(".txt").write_text(f"{thing}, glazewall style, {ground}\n", encoding="utf-8")
            number += 1
    return folder


def in_tiles(picture: Image.Image, seed: int) -> Image.Image:
    """Tiles of one colour each, red and blue exchanged, with bright joints and a little unevenness."""
    width, height = picture.size
    small = picture.resize((width // TILE, height // TILE), Image.Resampling.BOX)
    colours = np.asarray(small, dtype=float)[..., ::-1]
    colours = colours + 10 * np.random.default_rng(seed).standard_normal(colours.shape[:2])[..., None]
    tiles = colours.repeat(TILE, 0).repeat(TILE, 1)
    tiles[::TILE] = tiles[:, ::TILE] = 235
    return Image.fromarray(tiles.clip(0, 255).round().astype(np.uint8))
