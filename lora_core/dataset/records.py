"""What a dataset is in memory: usable pictures, and what is wrong with the others."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ImageRecord:
    """One usable picture.

    Width and height are in pixels after EXIF rotation. The caption holds one alternative a line. `repeats` is
    how often the picture is shown in an epoch. `held_out` says that a person chose to measure on it.
    """

    path: Path
    width: int
    height: int
    caption: str
    mask_path: Path | None = None
    repeats: int = 1
    held_out: bool = False


@dataclass(frozen=True)
class Problem:
    """A file that cannot be used as it is: `kind` for programs, `sentence` for people."""

    path: Path
    kind: str
    sentence: str


@dataclass(frozen=True)
class Dataset:
    """The usable pictures in order of path, and what is wrong with the rest."""

    records: list[ImageRecord]
    problems: list[Problem]
