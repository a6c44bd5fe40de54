"""Pictures that were left out: moved aside into the project, with captions and masks, and taken back."""

import os
from pathlib import Path

from lora_core.dataset.folder import ImageRecord, scan
from lora_core.dataset.moves import Move, move_together
from lora_core.dataset.names import folded, free_stem
from lora_core.dataset.pictures import SUFFIXES
from lora_core.dataset.project import Project, relative_name
from lora_core.dataset.sidecars import CAPTION_SUFFIXES
from lora_core.dataset.walk import MASK_ENDINGS
from lora_core.spec.errors import DatasetError


def leave_out(project: Project, names: list[str]) -> int:
    """Move pictures aside; also files that were found to be no pictures. Returns how many.

    Raises:
        DatasetError: the demo is chosen, or there is no such picture, or the disk refuses.
    """
    project.refuse_demo()
    with project.changing():
        dataset = project.dataset()
        there = {relative_name(r.path, project.pictures): r.path for r in dataset.records}
        there |= {
            relative_name(p.path, project.pictures): p.path
            for p in dataset.problems
            if p.path.suffix.casefold() in SUFFIXES
        }
        return _move(project, {name: there.get(name) for name in names}, project.pictures, project.aside)


def take_back(project: Project, names: list[str]) -> int:
    """Move pictures that were left out back to where they were. Returns how many.

    Raises:
        DatasetError: there is no such picture, or the disk refuses.
    """
    project.refuse_demo()
    with project.changing():
        there = {relative_name(path, project.aside): path for path in _pictures(project.aside)}
        return _move(project, {name: there.get(name) for name in names}, project.aside, project.pictures)


def left_out(project: Project) -> list[ImageRecord]:
    """The pictures that lie aside; damaged ones among them are not shown."""
    if project.uses_demo or not project.aside.is_dir():
        return []
    return scan(project.aside, project.sizes).records


def _pictures(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix.casefold() in SUFFIXES]


def _move(project: Project, paths: dict[str, Path | None], source: Path, into: Path) -> int:
    """Move pictures by their names, with captions and masks, all in one step.

    Raises:
        DatasetError: one is not there, or the disk refuses; then none has moved.
    """
    project.forget()
    moves: list[Move] = []
    taken: dict[Path, set[str]] = {}
    leaving = set(paths.values())
    for name, path in paths.items():
        if path is None or not path.is_file():
            raise DatasetError(f"There is no picture named {name!r} here any more.")
        folder = into / path.parent.relative_to(source)
        files = _set_of(path)
        if folder not in taken:
            there = folder.iterdir() if folder.is_dir() else ()
            taken[folder] = {folded(one.stem) for one in there if one.suffix.casefold() in SUFFIXES}
        # A picture of that name may have come or been left out meanwhile, or a caption for it.
        stem = free_stem(path.stem, taken[folder])
        while any(os.path.lexists(folder / (stem + file.name[len(path.stem) :])) for file in files):
            taken[folder].add(folded(stem))
            stem = free_stem(path.stem, taken[folder])
        taken[folder].add(folded(stem))
        shared = any(other not in leaving for other in _of_same_stem(path))
        for file in files:
            target = folder / (stem + file.name[len(path.stem) :])
            moves.append(Move(file, target, copy=shared and file != path))
    try:
        move_together(moves, project.root)
    except OSError as error:
        what = Path(error.filename).name if error.filename else "The pictures"
        raise DatasetError(f"{what} cannot be moved ({error.strerror}); close what uses it.") from error
    for move in moves:
        project.sizes.carry(move.source, move.target)
    return len(paths)


def _of_same_stem(picture: Path) -> list[Path]:
    """Other pictures that share the captions of one."""
    beside = (other for other in picture.parent.iterdir() if other.suffix.casefold() in SUFFIXES)
    return [other for other in beside if folded(other.stem) == folded(picture.stem) and other != picture]


def _set_of(picture: Path) -> list[Path]:
    """A picture, its captions and its masks."""
    captions = [picture.with_suffix(suffix) for suffix in CAPTION_SUFFIXES]
    masks = [
        picture.with_name(f"{picture.stem}{ending}{suffix}")
        for ending in MASK_ENDINGS
        for suffix in sorted(SUFFIXES)
    ]
    return [file for file in (picture, *captions, *masks) if file.is_file()]
