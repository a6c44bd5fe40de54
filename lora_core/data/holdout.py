"""Splits a dataset into training and validation images; near-duplicates stay on one side.

The user's own list decides where there is one. Otherwise each image is ranked by a hash of seed and name, so
adding images hardly changes the split. A validation image that is a copy of a training image (the same file,
another size, format or quality) would reward memorization.

A fingerprint holds an image's lowest frequencies, as perceptual hashes do (Zauner 2010, "Implementation and
benchmarking of perceptual image hash functions"), but their values instead of their signs: in flat, symmetric
drawings half of them are near zero and their sign is chance. A 4 x 4 colour thumbnail separates drawings of
one shape in different colours.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lora_core.data.images import open_rgb
from lora_core.data.scan import ImageRecord, fold_name
from lora_core.errors import DatasetError

_SIDE, _KEPT = 32, 8
# Measured: copies at half the size, at JPEG quality 30 or 10% darker are at 0.999 or more; drawings of
# different things in one style and colour rarely reach 0.98.
_SAME_SHAPE = 0.98
# Mean difference of the colour thumbnails, of 255.
_COLOUR_APART = 12.0
# Takes the place of the lowest frequency, so that images without any shape are alike.
_FLAT = 10.0
_THREADS = 4
_FEWEST_TO_TRAIN_ON = 2


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """`shape` are weighted low frequencies of unit length, (64,); `colours` are 4 x 4 RGB values of 0 to 255,
    (48,)."""

    shape: np.ndarray
    colours: np.ndarray


def compute_fingerprint(image: Image.Image) -> Fingerprint:
    """What is compared of an RGB image."""
    grey = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    waves, k = _cosines(), np.arange(_KEPT)
    # Low frequencies are the largest in nearly all images; the weight lets the others count as much.
    shape = (waves @ np.asarray(grey, dtype=np.float64) @ waves.T) * np.hypot(k[:, None], k)
    shape[0, 0] = _FLAT
    colours = np.asarray(image.resize((4, 4), Image.Resampling.BOX), dtype=np.float64)
    return Fingerprint(shape.ravel() / np.linalg.norm(shape), colours.ravel())


def are_near_duplicates(one: Fingerprint, other: Fingerprint) -> bool:
    """Whether two images look the same."""
    near = float(one.shape @ other.shape) >= _SAME_SHAPE
    return near and float(np.abs(one.colours - other.colours).mean()) <= _COLOUR_APART


def group_near_duplicates(prints: Sequence[Fingerprint | None]) -> list[int]:
    """For each image the index of the first one of its group; its own where nothing looks like it.

    Near-duplicates of near-duplicates are one group. None, an unreadable image, is alone.
    """
    group = list(range(len(prints)))
    nothing = np.zeros(_KEPT * _KEPT)
    shapes = np.array([one.shape if one else nothing for one in prints]).reshape(-1, nothing.size)
    for index, one in enumerate(prints):
        if one is None:
            continue
        for earlier in np.flatnonzero(shapes[:index] @ one.shape >= _SAME_SHAPE).tolist():
            other = prints[earlier]
            if other is not None and are_near_duplicates(one, other):
                first, last = sorted((group[earlier], group[index]))
                group = [first if each == last else each for each in group]
    return group


def compute_fingerprints(paths: Iterable[Path]) -> list[Fingerprint | None]:
    """The fingerprint of each image; None for one that cannot be read."""
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(_fingerprint_or_none, paths))


def _fingerprint_or_none(path: Path) -> Fingerprint | None:
    try:
        return compute_fingerprint(open_rgb(path, 2 * _SIDE))
    except DatasetError:
        return None


def _cosines() -> np.ndarray:
    """The lowest rows of the cosine transform (DCT-II), (8, 32)."""
    k, x = np.arange(_KEPT)[:, None], np.arange(_SIDE)[None, :]
    return np.cos(np.pi * k * (2 * x + 1) / (2 * _SIDE))


def split_holdout(
    records: list[ImageRecord], pictures: float, seed: int
) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """The records to train on, and those to measure on, each in their old order.

    Args:
        records: all records.
        pictures: a share if below 1, else a number of images. Where near-duplicates would have to be
        separated, it is fewer. Ignored where the user listed images.
        seed: of the choice.

    Raises:
        DatasetError: fewer than two images would be left to train on.
    """
    by_hand = any(record.held_out for record in records)
    wished = 0 if by_hand else num_holdout(len(records), pictures)
    if not by_hand and not wished:
        return list(records), []
    groups = _groups(records)
    if by_hand:
        # Near-duplicates of the user's choice would otherwise be trained on.
        chosen = {group for group, record in zip(groups, records, strict=True) if record.held_out}
    else:
        chosen, sizes = set(), Counter(groups)
        for first in sorted(sizes, key=lambda first: (_rank(records[first], seed), first)):
            if sizes[first] <= wished:
                chosen.add(first)
                wished -= sizes[first]
    train = [record for group, record in zip(groups, records, strict=True) if group not in chosen]
    held = [record for group, record in zip(groups, records, strict=True) if group in chosen]
    if by_hand and len(train) < _FEWEST_TO_TRAIN_ON:
        raise DatasetError(
            f"Holding out {len(held)} of {len(records)} images, those that look the same included, leaves"
            f" fewer than {_FEWEST_TO_TRAIN_ON} to train on; choose fewer of them by hand."
        )
    return train, held


def num_holdout(count: int, pictures: float) -> int:
    """How many of `count` images are to be held out, 0 for none.

    Args:
        count: all there are.
        pictures: a share if below 1, else a number of images.

    Raises:
        DatasetError: fewer than two would be left to train on.
    """
    wished = round(pictures * count) if pictures < 1 else int(pictures)
    if wished <= 0:
        return 0
    most = count - _FEWEST_TO_TRAIN_ON
    if wished > most:
        raise DatasetError(
            f"Holding out {wished} of {count} images leaves fewer than {_FEWEST_TO_TRAIN_ON} to train on;"
            f" set validation.pictures to at most {max(0, most)}."
        )
    return wished


def _groups(records: list[ImageRecord]) -> list[int]:
    """For each record the index of the first one of its group: the same file, or one that looks the same."""
    by_look = group_near_duplicates(compute_fingerprints(record.path for record in records))
    first: dict[str, int] = {}
    return [by_look[first.setdefault(str(record.path), index)] for index, record in enumerate(records)]


def _rank(record: ImageRecord, seed: int) -> str:
    name = fold_name(record.path.name)
    return hashlib.sha256(f"{seed}\n{name}".encode("utf-8", "surrogatepass")).hexdigest()
