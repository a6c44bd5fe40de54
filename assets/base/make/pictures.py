"""Icon sets from npm -> one array of RGBA images on disk, and the ways they are laid on a background.

The images are only ever kept in the build folder: the project ships what the base learnt, not what it saw.

    python assets/base/make/pictures.py --build BUILD
"""

import argparse
import io
import json
import logging
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import resvg_py
import torch
from catalog import SIDE, THINGS
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

LABELS = "emojibase-data"
SETS = ("noto", "fluent-emoji", "fluent-emoji-flat", "twemoji")
GROUPS = {0: "smileys", 3: "animals and plants", 4: "food", 5: "places", 6: "activities", 7: "objects"}
"""Emojibase's groups that are drawn; people, symbols and flags are left out."""

FIT = 116  # longest side of a drawing before it is placed, in pixels
HELD_OUT_EVERY = 20  # each 20th concept that is not taught is kept from the VAE, to measure it on


@dataclass(frozen=True)
class Icons:
    """All rendered icons: `rgba` is (icons, SIDE, SIDE, 4) uint8; `labels` and `sets` say what each is."""

    rgba: np.ndarray
    labels: list[str]
    sets: list[str]

    def index(self, label: str, set_name: str) -> int:
        """Returns the row of the icon for this emojibase label in this set."""
        pairs = list(zip(self.labels, self.sets, strict=True))
        return pairs.index((label, set_name))

    def held_out(self) -> list[int]:
        """Returns the rows of the concepts that the VAE must not see."""
        taught = set(THINGS.values())
        others = sorted({label for label in self.labels if label not in taught})
        kept = set(others[::HELD_OUT_EVERY])
        return [row for row, label in enumerate(self.labels) if label in kept]


def package(build: Path, name: str, member: str) -> dict | list:
    """Returns a JSON file out of an npm package, which `npm pack` brings into `build` when it is absent."""
    stem = name.removeprefix("@").replace("/", "-")
    found = sorted(build.glob(f"{stem}-[0-9]*.tgz"))
    if not found:
        subprocess.run(["npm", "pack", name, "--silent"], cwd=build, check=True)
        found = sorted(build.glob(f"{stem}-[0-9]*.tgz"))
    with tarfile.open(found[-1]) as archive:
        return json.load(archive.extractfile(f"package/{member}"))


def english(build: Path) -> list[dict]:
    """Returns emojibase's English records: hexcode, label, tags, group."""
    return package(build, LABELS, "en/data.json")


def _code(hexcode: str) -> str:
    """Returns the code points without the variation selector, which the sets use unevenly."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def drawings(build: Path) -> Iterator[tuple[str, str, str]]:
    """Yields (label, set, svg) for every concept of GROUPS that stands in all four sets."""
    icons = {name: package(build, f"@iconify-json/{name}", "icons.json") for name in SETS}
    names = {name: package(build, f"@iconify-json/{name}", "chars.json") for name in SETS}
    names["fluent-emoji"] = names["fluent-emoji-flat"]  # one list of names for both, in one package
    names = {name: {_code(code): icon for code, icon in table.items()} for name, table in names.items()}
    for record in english(build):
        if record.get("group") not in GROUPS:
            continue
        found = {name: names[name].get(_code(record["hexcode"])) for name in SETS}
        if all(found[name] in icons[name]["icons"] for name in SETS):
            for name in SETS:
                body, side = icons[name]["icons"][found[name]]["body"], icons[name]["width"]
                head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                yield record["label"], name, f'{head}viewBox="0 0 {side} {side}">{body}</svg>'


def rendered(svg: str) -> np.ndarray:
    """Returns the drawing as (SIDE, SIDE, 4) uint8, cropped to what is visible, fitted and centred."""
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=2 * SIDE, height=2 * SIDE))
    whole = (
        Image.open(io.BytesIO(png)).convert("RGBA").convert("RGBa")
    )  # premultiplied, so that resizing makes no dark fringe
    visible = whole.crop(whole.getchannel("a").point(lambda a: 255 * (a > 8)).getbbox())
    scale = FIT / max(visible.size)
    size = (max(1, round(visible.width * scale)), max(1, round(visible.height * scale)))
    corner = ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2)
    canvas = Image.new("RGBa", (SIDE, SIDE))
    canvas.paste(visible.resize(size, Image.Resampling.LANCZOS), corner)
    return np.asarray(canvas).copy()


def load_icons(build: Path) -> Icons:
    """Returns all icons, rendering them into `build` on the first call (about a minute)."""
    array, index = build / "icons.npy", build / "icons.json"
    if not index.exists():
        build.mkdir(parents=True, exist_ok=True)
        every = list(drawings(build))
        with Pool(2) as pool:
            np.save(array, np.stack(pool.map(rendered, [svg for _, _, svg in every], chunksize=64)))
        index.write_text(json.dumps([(label, name) for label, name, _ in every]), encoding="utf-8")
    labels, sets = zip(*json.loads(index.read_text(encoding="utf-8")), strict=True)
    return Icons(np.load(array, mmap_mode="r"), list(labels), list(sets))


def placed(
    rgba: np.ndarray, generator: torch.Generator, smallest: float = 0.9, shift: float = 0.02
) -> Tensor:
    """Returns the drawings scaled and shifted at random, as premultiplied (n, 4, SIDE, SIDE) in 0..1."""
    count = len(rgba)
    drawing = torch.from_numpy(np.ascontiguousarray(rgba)).permute(0, 3, 1, 2).float() / 255
    scale = smallest + (1 - smallest) * torch.rand(count, generator=generator)
    offset = shift * (4 * torch.rand(count, 2, generator=generator) - 2)  # the grid runs from -1 to 1
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / scale
    theta[:, :, 2] = offset
    grid = F.affine_grid(theta, [count, 4, SIDE, SIDE], align_corners=False)
    return F.grid_sample(drawing, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def jittered(colours: list[tuple[int, int, int]], generator: torch.Generator, amount: int = 6) -> Tensor:
    """Returns the colours as (n, 3, 1, 1) in 0..1, each channel moved by up to `amount` of 255."""
    exact = torch.tensor(colours, dtype=torch.float32)
    moved = exact + amount * (2 * torch.rand(exact.shape, generator=generator) - 1)
    return (moved.clamp(0, 255) / 255)[:, :, None, None]


def laid_on(drawing: Tensor, ground: Tensor) -> Tensor:
    """Returns premultiplied drawings over their grounds, as (n, 3, SIDE, SIDE) in -1..1, the VAE's range."""
    return (drawing[:, :3] + (1 - drawing[:, 3:]) * ground) * 2 - 1


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=Path, required=True, help="folder for caches and checkpoints")
    logging.info("%d icons", len(load_icons(parser.parse_args().build).labels))
