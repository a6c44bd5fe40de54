"""Aspect-ratio buckets: which size a picture is trained at, and which part of it is seen."""

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Bucket:
    """A training size in pixels."""

    width: int
    height: int


def bucket_of(width: int, height: int, resolution: int, multiple: int) -> Bucket:
    """The size at which a picture of width x height pixels is trained."""
    raise NotImplementedError


def crop_box(width: int, height: int, bucket: Bucket) -> tuple[float, float, float, float]:
    """The centred part of a picture that has the bucket's aspect: left, top, right, bottom in its pixels."""
    raise NotImplementedError


def fit(image: Image.Image, bucket: Bucket) -> Image.Image:
    """The picture cropped and resized to the bucket."""
    raise NotImplementedError
