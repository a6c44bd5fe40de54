"""Which files of a folder count, in which order: the same on every system."""

import os
from collections.abc import Iterator
from pathlib import Path

from lora_core.dataset.records import Problem
from lora_core.dataset.sidecars import folded

_LEFT_BEHIND = frozenset({"__macosx", "thumbs.db", "desktop.ini"})


def is_junk(name: str) -> bool:
    """A hidden file or folder, or one that a system leaves behind."""
    return (name.startswith(".") and name.strip(".") != "") or folded(name) in _LEFT_BEHIND


def is_mask(path: Path) -> bool:
    """A mask of another picture (`cat-masklabel.png` of `cat.png`)."""
    return folded(path.stem).endswith("-masklabel")


def files_below(root: Path) -> Iterator[Path | Problem]:
    """All files below a folder that are not junk, sorted; a problem for each folder that cannot be listed.

    Links to folders are followed, but none that leads back to where it came from.
    """
    yield from _below(root, frozenset({os.path.realpath(root)}))


def _below(folder: Path, above: frozenset[str]) -> Iterator[Path | Problem]:
    try:
        names = [entry.name for entry in os.scandir(folder) if not is_junk(entry.name)]
    except OSError as error:
        sentence = f"The folder {folder} cannot be listed ({error.strerror}); check that it may be read."
        yield Problem(folder, "unreadable", sentence)
        return
    for name in sorted(names, key=lambda name: (folded(name), name)):
        path = folder / name
        if not path.is_dir():
            yield path
            continue
        real = os.path.realpath(path)
        if real not in above:
            yield from _below(path, above | {real})
