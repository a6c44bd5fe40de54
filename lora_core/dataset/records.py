"""What a dataset is in memory: usable pictures, and what is wrong with the others."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class ImageRecord:
    """One usable picture.

    Width and height are in pixels after EXIF rotation. The caption holds one alternative a line. `repeats` is
    how often the picture is shown in an epoch. `held_out` says that it was chosen to measure on,
    `transparent` that parts of it are see-through, which are trained on as white.
    """

    path: Path
    width: int
    height: int
    caption: str
    repeats: int = 1
    held_out: bool = False
    transparent: bool = False


@dataclass(frozen=True)
class Problem:
    """A file that cannot be used as it is, or that is not used: `kind` for programs, `sentence` for people.

    `blocking` says that training refuses the dataset because of it.
    """

    path: Path
    kind: str
    sentence: str
    blocking: bool = True


@dataclass(frozen=True)
class Dataset:
    """The usable pictures in order of path, what is wrong with the rest, and which files are not used."""

    records: list[ImageRecord]
    problems: list[Problem]
    notes: list[Problem] = field(default_factory=list)
