"""Copying an export into another tool's folder: whole files or none, and nobody's file is ever replaced by
another."""

import contextlib
import filecmp
import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

from lora_core.spec.errors import RunError
from lora_core.spec.paths import sync_folder

SIDE_FILES = (".json", ".preview.png")
"""What other tools read beside `<stem>.safetensors`: words and strength, and a picture."""
MOST_NUMBERS = 1000


@dataclass(frozen=True)
class Copied:
    """What was copied.

    Attributes:
        file: where the adapter lies now.
        beside: side files that went with it.
        kept: side files that were there and differ, which stayed as they were.
        renamed: whether its name was taken by another file.
    """

    file: Path
    beside: tuple[Path, ...]
    kept: tuple[Path, ...]
    renamed: bool


def copied(file: Path, folder: Path) -> Copied:
    """Copy an adapter and its side files into `folder`, under a name that is free there.

    Raises:
        RunError: there is no such folder, or it cannot be written.
    """
    if not folder.is_dir():
        raise RunError(f"There is no folder at {folder}; make it first, or choose another.")
    stem = _free_stem(file, folder)
    beside, kept = [], []
    try:
        for suffix in SIDE_FILES:
            source, target = file.with_name(f"{file.stem}{suffix}"), folder / f"{stem}{suffix}"
            if not source.is_file() or _same(source, target):
                continue
            if target.exists():
                # The tool, or the person in it, wrote this one.
                kept.append(target)
                continue
            _copy(source, target)
            beside.append(target)
        # The adapter comes last: a tool that sees it finds what belongs to it.
        target = folder / f"{stem}{file.suffix}"
        if not _same(file, target):
            _copy(file, target)
    except OSError as error:
        raise RunError(
            f"{folder} cannot be written ({error.strerror or error}); nothing was replaced."
        ) from error
    return Copied(target, tuple(beside), tuple(kept), stem != file.stem)


def _free_stem(file: Path, folder: Path) -> str:
    for number in range(1, MOST_NUMBERS):
        stem = file.stem if number == 1 else f"{file.stem}-{number}"
        target = folder / f"{stem}{file.suffix}"
        if not os.path.lexists(target) or _same(file, target):
            return stem
    raise RunError(f"{folder} holds {MOST_NUMBERS} files called like {file.stem}; choose another name.")


def _same(one: Path, other: Path) -> bool:
    try:
        return other.is_file() and filecmp.cmp(one, other, shallow=False)
    except OSError:
        return False


def _copy(source: Path, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        shutil.copyfile(source, temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        # What went wrong above matters; that there is nothing to clean up does not.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync_folder(target.parent)
