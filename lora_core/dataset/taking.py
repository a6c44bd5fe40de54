"""How one file from outside gets its place in a dataset folder: copied, linked, or moved; whole or not at
all."""

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lora_core.dataset.known_sizes import Sizes
from lora_core.dataset.pictures import SUFFIXES


def _quiet(phase: str, done: int, total: int) -> None:
    """Where nobody wants to hear how far it is."""


@dataclass(frozen=True)
class Way:
    """How files are taken over.

    Attributes:
        how: "copy"; "link", where pictures share the originals' place on the disk and captions are copied all
        the same, as the window writes them; or "move", for files that were made for the import only.
        said: called with (phase, done, all) as it goes on.
        sizes: where the sizes of the pictures that were decoded are remembered.
    """

    how: str = "copy"
    said: Callable[[str, int, int], None] = _quiet
    sizes: Sizes = field(default_factory=Sizes)


def take(source: Path, target: Path, way: Way) -> None:
    """Take over one file.

    Raises:
        OSError: it cannot be read, or its place not be written; nothing is left there then.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if way.how == "move":
            shutil.move(source, temporary)
        elif way.how == "link" and target.suffix.casefold() in SUFFIXES:
            _link(source, temporary)
        else:
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    way.sizes.carry(source, target)


def _link(source: Path, target: Path) -> None:
    """A hard link, which stays when the original is moved or removed; to another disk a symbolic one."""
    target.unlink(missing_ok=True)
    try:
        os.link(os.path.realpath(source), target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.ENOTSUP):
            raise
        os.symlink(os.path.realpath(source), target)
