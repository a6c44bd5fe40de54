"""Bringing files from outside into a dataset folder, safely."""

from dataclasses import dataclass
from pathlib import Path

from lora_core.dataset.folder import Problem


@dataclass(frozen=True)
class Imported:
    """What was added, and what was not and why."""

    added: list[Path]
    skipped: list[Problem]


def unpack(zip_path: Path, into: Path) -> Imported:
    """Unpack a zip into a new folder."""
    raise NotImplementedError


def import_files(files: list[Path], into: Path, names: list[str] | None = None) -> Imported:
    """Copy files into a dataset folder."""
    raise NotImplementedError


def import_folder(folder: Path, into: Path) -> Imported:
    """Copy a folder's dataset into a dataset folder."""
    raise NotImplementedError
