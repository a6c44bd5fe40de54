"""A dataset on disk: which pictures it holds, with which captions, and what is wrong with it."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ImageRecord:
    """One usable picture; width and height in pixels, after EXIF rotation."""

    path: Path
    width: int
    height: int
    caption: str
    mask_path: Path | None = None
    repeats: int = 1


@dataclass(frozen=True)
class Problem:
    """A file that cannot be used: `kind` for programs, `sentence` for people."""

    path: Path
    kind: str
    sentence: str


@dataclass(frozen=True)
class Dataset:
    """The usable pictures in order of path, and what is wrong with the others."""

    records: list[ImageRecord]
    problems: list[Problem]


def scan(folder: Path) -> Dataset:
    """Every picture below a folder."""
    raise NotImplementedError


def open_dataset(where: str | Path, unpack_into: Path) -> Dataset:
    """The dataset that a person named: `demo`, a folder or a zip."""
    raise NotImplementedError


def require_clean(dataset: Dataset) -> None:
    """Refuse a dataset with problems."""
    raise NotImplementedError


def write_caption(picture: Path, text: str) -> None:
    """Write the caption beside a picture."""
    raise NotImplementedError
