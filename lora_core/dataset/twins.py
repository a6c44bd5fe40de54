"""Pictures that look the same: the same file twice, or another size, format or quality of it.

The fingerprint is the sign pattern of a picture's lowest frequencies (Zauner 2010, "Implementation and
benchmarking of perceptual image hash functions"), which survives resizing and compression, next to a
thumbnail of 4 x 4 colours, which keeps apart two drawings of one shape in different colours.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lora_core.dataset.pictures import small_rgb
from lora_core.spec.errors import DatasetError

_SIDE, _KEPT = 32, 8
# Of 63 bits; unrelated pictures differ in about half of them.
_BITS_APART = 6
# Mean difference of the colour thumbnails, of 255.
_COLOUR_APART = 12.0
_THREADS = 4


@dataclass(frozen=True)
class Fingerprint:
    """`bits` is the sign pattern (63 bits), `colours` are 4 x 4 RGB values of one byte."""

    bits: int
    colours: bytes


def fingerprint(image: Image.Image) -> Fingerprint:
    """What is compared of an RGB picture."""
    grey = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    waves = _cosines()
    spectrum = waves @ np.asarray(grey, dtype=np.float64) @ waves.T
    low = spectrum.flatten()[1:]
    bits = int("".join("1" if above else "0" for above in low > np.median(low)), 2)
    return Fingerprint(bits, image.resize((4, 4), Image.Resampling.BOX).tobytes())


def alike(one: Fingerprint, other: Fingerprint) -> bool:
    """Whether two pictures look the same."""
    if (one.bits ^ other.bits).bit_count() > _BITS_APART:
        return False
    a, b = (np.frombuffer(each.colours, dtype=np.uint8).astype(np.int16) for each in (one, other))
    return bool(np.abs(a - b).mean() <= _COLOUR_APART)


def twin_groups(prints: list[Fingerprint | None]) -> list[int]:
    """For each picture the index of the first one of its group; its own where nothing looks like it.

    Twins of twins are one group. None, a picture that could not be read, is alone.
    """
    group = list(range(len(prints)))
    bits = np.array([one.bits if one else 0 for one in prints], dtype=np.uint64)
    for index, one in enumerate(prints):
        if one is None or index == 0:
            continue
        near = np.flatnonzero(np.bitwise_count(bits[:index] ^ bits[index]) <= _BITS_APART)
        for earlier in near.tolist():
            other = prints[earlier]
            if other is not None and alike(one, other):
                first, last = sorted((group[earlier], group[index]))
                group = [first if each == last else each for each in group]
    return group


def fingerprints(paths: Iterable[Path]) -> list[Fingerprint | None]:
    """The fingerprint of each picture; None for one that cannot be read."""
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(_fingerprint_or_none, paths))


def _fingerprint_or_none(path: Path) -> Fingerprint | None:
    try:
        return fingerprint(small_rgb(path, 2 * _SIDE))
    except DatasetError:
        return None


def _cosines() -> np.ndarray:
    """The lowest rows of the cosine transform (DCT-II), (8, 32)."""
    k, x = np.arange(_KEPT)[:, None], np.arange(_SIDE)[None, :]
    return np.cos(np.pi * k * (2 * x + 1) / (2 * _SIDE))
