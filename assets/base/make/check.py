"""Draws the base's check images: 48 captioned images that `validate --shuffle-captions` measures it on.

They are made by the base itself, so nothing of the icon sets is stored. Each shows another thing, and styles
and backgrounds take turns, so that a caption of another image is wrong in every part.

    python assets/base/make/check.py --base assets/base
"""

import argparse
import random
from pathlib import Path

from catalog import BACKGROUNDS, STYLES, THINGS, caption
from painter import load_base, paint

COUNT = 48
SEED = 48  # of the choice of things and of the images


def main(base: Path) -> None:
    """Writes `check/NN-thing.png` with a caption in `check/NN-thing.txt` beside each."""
    chance, styles, grounds = random.Random(SEED), list(STYLES), list(BACKGROUNDS)
    things = chance.sample(list(THINGS), COUNT)
    captions = [
        caption(thing, styles[n // len(grounds) % len(styles)], grounds[n % len(grounds)])
        for n, thing in enumerate(things)
    ]
    folder = base / "check"
    folder.mkdir(exist_ok=True)
    for old in (*folder.glob("*.png"), *folder.glob("*.txt")):
        old.unlink()
    pictures = paint(load_base(base), captions, SEED)
    for n, (thing, text, picture) in enumerate(zip(things, captions, pictures, strict=True), start=1):
        stem = f"{n:02d}-{thing.replace(' ', '-')}"
        picture.save(folder / f"{stem}.png", optimize=True)
        (folder / f"{stem}.txt").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="the base's folder")
    main(parser.parse_args().base)
