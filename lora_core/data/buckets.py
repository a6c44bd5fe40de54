"""Aspect-ratio buckets: the size an image is trained at, and the part of it that is seen.

An image is reduced to about the area that the base was trained at, keeping its aspect ratio, and never
enlarged. Sides are rounded to what the model accepts; of the roundings near the ideal size, the one that
crops least is taken.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Bucket:
    """A training size in pixels."""

    width: int
    height: int


def choose_bucket(width: int, height: int, resolution: int, multiple: int) -> Bucket:
    """The size at which an image is trained.

    Its area is at most resolution^2 and its sides are multiples of `multiple`. It fits into the image, so
    that nothing is enlarged, unless a side of the image is shorter than `multiple`.

    Args:
        width, height: of the image, in pixels.
        resolution: side in pixels of a square with the largest area.
        multiple: what the sides must be divisible by, in pixels.
    """
    aspect = width / height
    area = max(resolution, multiple) ** 2
    scale = min(1.0, math.sqrt(area / (width * height)))
    most_wide, most_high = max(width, multiple), max(height, multiple)
    best = (math.inf, 0, Bucket(multiple, multiple))
    for w, h in _roundings(width * scale, height * scale, multiple):
        if w > most_wide or h > most_high or w * h > area:
            continue
        # To nine places, so that two shapes that crop the same differ by their area and not by rounding.
        error = round(abs(math.log(w / h / aspect)), 9)
        best = min(best, (error, -w * h, Bucket(w, h)), key=lambda one: one[:2])
    return best[2]


def _roundings(width: float, height: float, multiple: int) -> Iterator[tuple[int, int]]:
    """Sizes near width x height: either side rounded down or up, the other as its shape then asks, down or
    up."""
    aspect = width / height
    for w in _down_and_up(width, multiple):
        for h in _down_and_up(w / aspect, multiple):
            yield w, h
    for h in _down_and_up(height, multiple):
        for w in _down_and_up(h * aspect, multiple):
            yield w, h


def _down_and_up(side: float, multiple: int) -> tuple[int, int]:
    down = max(1, math.floor(side / multiple + 1e-6)) * multiple
    return down, down + multiple


def crop_box(width: int, height: int, bucket: Bucket) -> tuple[float, float, float, float]:
    """The largest centred part of an image that has the bucket's shape.

    Args:
        width, height: of the image, in pixels.
        bucket: the size it is trained at.

    Returns:
        Left, top, right, bottom, in pixels of the image.
    """
    scale = max(bucket.width / width, bucket.height / height)
    wide, high = min(width, bucket.width / scale), min(height, bucket.height / scale)
    left, top = (width - wide) / 2, (height - high) / 2
    return left, top, left + wide, top + high


def size_conditioning(width: int, height: int, bucket: Bucket) -> tuple[int, int, int, int, int, int]:
    """SDXL's size conditioning of an image (Podell et al. 2023, section 2.2).

    The crop is the centred one of `crop_box`, so that a mirrored image has the same numbers.

    Args:
        width, height: of the image on disk, in pixels.
        bucket: the size it is trained at.

    Returns:
        Original height and width, in pixels of the image on disk; top and left of the crop, in pixels of
        the image as resized before cropping, rounded; height and width of what is left, the bucket.
    """
    left, top, right, bottom = crop_box(width, height, bucket)
    down, across = bucket.height / (bottom - top), bucket.width / (right - left)
    return height, width, round(top * down), round(left * across), bucket.height, bucket.width


def resize_and_crop(image: Image.Image, bucket: Bucket) -> Image.Image:
    """The image cropped by `crop_box` and resized to the bucket."""
    box = crop_box(*image.size, bucket)
    if image.size == (bucket.width, bucket.height):
        return image.copy()
    return image.resize((bucket.width, bucket.height), Image.Resampling.LANCZOS, box=box)
