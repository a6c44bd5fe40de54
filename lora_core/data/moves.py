"""Moves files that belong together: an image with its caption and mask.

The moves are written to a journal first, so that the next start completes what a killed process began.
"""

import contextlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lora_core.data.dataset import HOLDOUT_LIST
from lora_core.data.images import IMAGE_SUFFIXES
from lora_core.data.scan import FileProblem, fold_name, is_mask, walk_files
from lora_core.data.sidecars import CAPTION_SUFFIXES
from lora_core.system.files import write_atomically

JOURNAL = "moving.json"


@dataclass(frozen=True)
class Move:
    """One file to be moved, or to be copied where another picture needs it too."""

    source: Path
    target: Path
    copy: bool = False


def move_files(moves: list[Move], root: Path) -> None:
    """Move files below `root`, all or none.

    Raises:
        OSError: a file cannot be moved; those before it are moved back.
    """
    if not moves:
        return
    finish_moves(root)
    rows = [
        [move.source.relative_to(root).as_posix(), move.target.relative_to(root).as_posix(), move.copy]
        for move in moves
    ]
    write_atomically(root / JOURNAL, json.dumps(rows).encode())
    done: list[Move] = []
    try:
        for move in moves:
            _apply(move)
            done.append(move)
    except OSError:
        for move in reversed(done):
            _revert(move)
        (root / JOURNAL).unlink()
        raise
    (root / JOURNAL).unlink()


def finish_moves(root: Path) -> bool:
    """Completes the moves of a killed process below `root`; returns whether there were any.

    Raises:
        OSError: a file cannot be moved.
    """
    try:
        rows = json.loads((root / JOURNAL).read_bytes())
        moves = [
            Move(_journal_path(root, source), _journal_path(root, target), bool(copy))
            for source, target, copy in rows
        ]
    except FileNotFoundError:
        return False
    except (ValueError, TypeError, RecursionError):  # not ours
        moves = []
    for move in moves:
        if os.path.lexists(move.source) and not os.path.lexists(move.target):
            _apply(move)
    (root / JOURNAL).unlink()
    return True


def rejoin_sidecars(pictures: Path, aside: Path) -> int:
    """Bring captions and masks back to pictures from which they were parted; returns how many.

    Before moves were written down, a kill left a caption in the other folder, or, after Take back, beside a
    picture with a number (`a.txt`, `a-2.png`).

    Raises:
        OSError: a file cannot be moved.
    """
    here, there = _Files(pictures), _Files(aside)
    moves = [*_separated(here, there), *_separated(there, here)]
    for companion, stem in here.companions.items():
        if stem in here.pictures or stem in there.pictures:
            continue
        numbered = re.compile(re.escape(stem) + r"-\d+")
        bare = [other for other in here.pictures if numbered.fullmatch(other) and not here.captioned(other)]
        if len(bare) == 1:
            picture = here.pictures[bare[0]]
            moves.append(Move(companion, picture.with_name(picture.stem + _name_after_stem(companion))))
    for move in moves:
        if not os.path.lexists(move.target):
            _apply(move)
    return len(moves)


class _Files:
    """The pictures below a folder by their stems, relative and folded, and their captions and masks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pictures: dict[str, Path] = {}
        self.companions: dict[Path, str] = {}
        for path in walk_files(folder, IMAGE_SUFFIXES):
            if isinstance(path, FileProblem) or path == folder / HOLDOUT_LIST:
                continue
            shown = path.relative_to(folder).as_posix()
            stem = fold_name(shown[: len(shown) - len(_name_after_stem(path))])
            if is_mask(path) or path.suffix.casefold() in CAPTION_SUFFIXES:
                self.companions[path] = stem
            elif path.suffix.casefold() in IMAGE_SUFFIXES:
                self.pictures[stem] = path

    def captioned(self, stem: str) -> bool:
        """Whether a picture has a caption here."""
        return any(stem == other and not is_mask(path) for path, other in self.companions.items())


def _name_after_stem(path: Path) -> str:
    """What follows a picture's stem in its name or in that of its caption or mask."""
    stem = path.stem[: -len("-masklabel")] if is_mask(path) else path.stem
    return path.name[len(stem) :]


def _separated(one: _Files, other: _Files) -> list[Move]:
    """Captions and masks in `one` whose picture is in `other`, which has no such file."""
    found = []
    for path, stem in one.companions.items():
        if stem in one.pictures or stem not in other.pictures:
            continue
        picture = other.pictures[stem]
        target = picture.with_name(picture.stem + _name_after_stem(path))
        if is_mask(path) or not other.captioned(stem):
            found.append(Move(path, target))
    return found


def _apply(move: Move) -> None:
    move.target.parent.mkdir(parents=True, exist_ok=True)
    if move.copy:
        temporary = move.target.with_name(f".{move.target.name}.tmp")
        shutil.copyfile(move.source, temporary)
        os.replace(temporary, move.target)
    else:
        os.replace(move.source, move.target)


def _revert(move: Move) -> None:
    # The first error is the one to report.
    with contextlib.suppress(OSError):
        if move.copy:
            move.target.unlink()
        else:
            os.replace(move.target, move.source)


def _journal_path(root: Path, name: str) -> Path:
    """A file of the journal; ValueError where it is not below `root`."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(name)
    return root / path
