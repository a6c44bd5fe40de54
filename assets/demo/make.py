"""Makes the demo dataset: images that the base draws, printed in dusk tones that the base does not know.

`train/` is what `lora-easel train demo` learns from; `held_out/` shows other things in the same style, so
that what carries over can be measured and not only what was memorised. The style is one of tone and palette:
brightness alone decides the ink, from indigo over coral to gold, with a little paper grain. The shapes stay
those of the base, which a small LoRA could not redraw from two dozen images.

    python assets/demo/make.py
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
BASE = HERE.parent / "base"
sys.path.insert(0, str(BASE / "make"))

from catalog import caption  # noqa: E402
from painter import load_base, paint  # noqa: E402

TRIGGER = "duskprint"
DRAWN_AS = "noto"  # the style of the base whose shapes the demo has
SEED = 500

INKS = ((30, 20, 78), (116, 34, 112), (224, 74, 88), (255, 142, 92), (255, 212, 150))
"""From the darkest tone to the brightest, evenly spaced: indigo, plum, coral, orange, gold."""
GRAIN = 3.0  # standard deviation of the paper grain, of 255
BRIGHTNESS = (0.299, 0.587, 0.114)  # weights of red, green and blue (Rec. 601)
DARKEST, BRIGHTEST = 0.05, 0.95  # brightnesses that get the first and the last ink

TRAIN = {
    "fox": "white",
    "lion": "navy",
    "panda": "white",
    "rabbit": "purple",
    "apple": "white",
    "owl": "white",
    "penguin": "sky blue",
    "parrot": "white",
    "frog": "navy",
    "snail": "white",
    "butterfly": "white",
    "ladybug": "sky blue",
    "mushroom": "black",
    "sunflower": "white",
    "strawberry": "white",
    "pineapple": "white",
    "french fries": "navy",
    "hamburger": "purple",
    "doughnut": "white",
    "rocket": "white",
    "car": "sky blue",
    "castle": "white",
    "guitar": "black",
    "crown": "white",
}
HELD_OUT = {
    "koala": "white",
    "monkey": "sky blue",
    "turtle": "white",
    "octopus": "navy",
    "cactus": "white",
    "cherry": "white",
    "ice cream": "purple",
    "sailboat": "white",
    "house": "sky blue",
    "robot": "black",
}


def dusk_print(picture: Image.Image, grain: np.random.Generator) -> Image.Image:
    """Returns the image printed in INKS: each pixel's brightness picks its colour."""
    brightness = np.asarray(picture, dtype=np.float32) @ np.array(BRIGHTNESS, dtype=np.float32) / 255
    position = (brightness - DARKEST) / (BRIGHTEST - DARKEST) * (len(INKS) - 1)
    steps = range(len(INKS))
    inked = np.stack([np.interp(position, steps, channel) for channel in zip(*INKS, strict=True)], axis=-1)
    inked += GRAIN * grain.standard_normal(brightness.shape)[..., None]
    return Image.fromarray(inked.clip(0, 255).round().astype(np.uint8))


def write(folder: Path, things: dict[str, str], seed: int) -> None:
    """Replaces the folder's images and captions by those of these things on these backgrounds."""
    folder.mkdir(exist_ok=True)
    for old in (*folder.glob("*.png"), *folder.glob("*.txt")):
        old.unlink()
    prompts = [caption(thing, DRAWN_AS, ground) for thing, ground in things.items()]
    grain = np.random.default_rng(seed)
    for (thing, ground), picture in zip(things.items(), paint(load_base(BASE), prompts, seed), strict=True):
        stem = folder / thing.replace(" ", "-")
        dusk_print(picture, grain).save(stem.with_suffix(".png"), optimize=True)
        stem.with_suffix(".txt").write_text(caption(thing, TRIGGER, ground) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(HERE / "train", TRAIN, SEED)
    write(HERE / "held_out", HELD_OUT, SEED + len(TRAIN))
