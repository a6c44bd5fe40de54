"""Reading a picture file of any kind as plain RGB."""

from pathlib import Path

from PIL import Image


def open_rgb(path: Path) -> Image.Image:
    """The picture as 8-bit RGB, upright."""
    raise NotImplementedError


def thumbnail(path: Path, side: int = 256) -> bytes:
    """A small WebP of a picture."""
    raise NotImplementedError


def content_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    raise NotImplementedError
