"""Draws `strip.png`: things that are in no training image, at LoRA strengths 0, 0.5 and 1, from one noise
each.

python docs/strip.py ADAPTER.safetensors
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from lora_core.formats.io import load_adapter
from lora_core.generate.pipeline import generate_image
from lora_core.generate.request import GenerationRequest
from lora_core.lora.weights import LoadedLora, Merger
from lora_core.models.load import load_base
from lora_core.system.files import ASSETS

STRENGTHS = (0.0, 0.5, 1.0)
SHOWN, GAP, LABEL = 5, 8, 44
HOW = GenerationRequest(seed=1234, steps=20, cfg=3.0)


def main(adapter: Path) -> None:
    """One column a caption of the held-out images, one row a strength."""
    base = load_base("demo", torch.device("cpu"), torch.float32)
    weights = load_adapter(adapter, base.family)
    captions = [
        path.read_text(encoding="utf-8") for path in sorted((ASSETS / "demo" / "held_out").glob("*.txt"))
    ]
    merger = Merger(base.modules)
    side = base.resolution
    size = (LABEL + SHOWN * (side + GAP), len(STRENGTHS) * (side + GAP) - GAP)
    strip = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(strip)
    for row, strength in enumerate(STRENGTHS):
        merger.apply([LoadedLora(weights, strength)])
        top = row * (side + GAP)
        draw.text((4, top + side // 2 - 8), f"{strength:g}", fill="#6d665c", font=ImageFont.load_default(16))
        for column, caption in enumerate(captions[:SHOWN]):
            strip.paste(
                generate_image(base, replace(HOW, prompt=caption.strip())),
                (LABEL + column * (side + GAP), top),
            )
    strip.save(Path(__file__).with_name("strip.png"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
