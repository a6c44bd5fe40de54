"""Draws images with a packed base, always alike: DDIM, 20 steps, guidance 3, a seed for each image."""

from pathlib import Path

import torch
from catalog import SIDE
from diffusers import StableDiffusionPipeline
from PIL import Image

STEPS = 20
GUIDANCE = 3.0
TOGETHER = 12  # images drawn in one batch


def load_base(folder: Path) -> StableDiffusionPipeline:
    """Returns the base's pipeline, quiet."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def paint(pipeline: StableDiffusionPipeline, prompts: list[str], seed: int) -> list[Image.Image]:
    """Returns an image for each prompt; the n-th starts from the noise of `seed + n`."""
    pictures = []
    for start in range(0, len(prompts), TOGETHER):
        part = prompts[start : start + TOGETHER]
        noise = [torch.Generator().manual_seed(seed + start + n) for n in range(len(part))]
        output = pipeline(
            part, height=SIDE, width=SIDE, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=noise
        )
        pictures.extend(output.images)
    return pictures


def grid(pictures: list[Image.Image], columns: int, gap: int = 6) -> Image.Image:
    """Returns the images in rows on white, `gap` pixels apart."""
    rows = -(-len(pictures) // columns)
    cell = SIDE + gap
    sheet = Image.new("RGB", (columns * cell + gap, rows * cell + gap), "white")
    for n, picture in enumerate(pictures):
        sheet.paste(picture, (gap + n % columns * cell, gap + n // columns * cell))
    return sheet
