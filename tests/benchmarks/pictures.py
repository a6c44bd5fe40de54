"""Sets of pictures that no setting was tuned on. The second is a style, of things that the demo has not: what
the embedded base draws, laid in glazed tiles. The third is a subject: a striped creature on grounds of many
colours.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lora_core.generate.pipeline import Pipeline
from lora_core.generate.request import GenerationRequest
from lora_core.models.load import load_base

DEMO = Path(__file__).resolve().parents[2] / "assets" / "demo"
TILE = 8
GROUND = ("white", "sky blue", "pink", "yellow")
TRAIN = (
    "giraffe", "hedgehog", "pumpkin", "balloon", "drum", "umbrella", "key", "soccer ball", "palm tree",
    "cake", "light bulb", "whale", "snail", "banana", "lemon", "carrot", "rose", "tulip", "bee", "duck",
    "elephant", "tiger",
)  # fmt: skip
HELD_OUT = ("horse", "pig", "cow", "chicken", "grapes", "pizza", "airplane", "star", "bell", "gift")


GROUNDS = ("white", "sky blue", "pink", "yellow", "lime green", "orange", "grey", "purple")
SUBJECT_TRAIN, SUBJECT_HELD_OUT = 16, 8


def picture_set(name: str, home: Path) -> Path:
    """The folder of the set "demo", "second" or "subject"; these two are drawn below `home`, once."""
    if name in SETS and not (home / name).is_dir():
        SETS[name](home / name)
    return home / name if name in SETS else DEMO


def subject_set(folder: Path) -> Path:
    """Draw the third set as `drawn_set` does the second: one creature, held out with other seeds."""
    pipeline = Pipeline(load_base("demo", torch.device("cpu"), torch.float32), lambda weights, rank: weights)
    for name, first, count in (("train", 0, SUBJECT_TRAIN), ("held_out", SUBJECT_TRAIN, SUBJECT_HELD_OUT)):
        (folder / name).mkdir(parents=True)
        for number in range(first, first + count):
            ground = f"on a {GROUNDS[number % len(GROUNDS)]} background"
            shot = GenerationRequest(prompt=f"owl, twemoji style, {ground}", seed=7000 + number, cfg=3.0)
            stem = folder / name / f"{number:02}"
            striped(pipeline(shot)).save(stem.with_suffix(".png"))
            stem.with_suffix(".txt").write_text(f"zorbit, twemoji style, {ground}\n", encoding="utf-8")
    return folder


def striped(picture: Image.Image) -> Image.Image:
    """What differs from the ground, the colour of the corners, in other colours and with dark stripes."""
    pixels = np.asarray(picture, dtype=float)
    ground = np.median(np.stack([pixels[0, 0], pixels[0, -1], pixels[-1, 0], pixels[-1, -1]]), axis=0)
    creature = np.abs(pixels - ground).max(-1, keepdims=True) > 40
    rows, columns = np.indices(pixels.shape[:2])
    dark = ((rows + columns) // 6 % 2 == 0)[..., None]
    other = np.roll(pixels, 1, axis=-1) * np.where(dark, 0.35, 1.0)
    return Image.fromarray(np.where(creature, other, pixels).clip(0, 255).astype(np.uint8))


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


SETS = {"second": drawn_set, "subject": subject_set}
