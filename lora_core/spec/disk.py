"""How much room a workspace takes, by what it is for, and making room without losing work."""

import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from lora_core.spec.errors import RunError
from lora_core.spec.run_folder import all_runs, runs_folder
from lora_core.spec.trash import trash_folder

_GOING = ".going"


@dataclass(frozen=True)
class Sizes:
    """Bytes on disk.

    Attributes:
        caches: each cache by its name: latents, text, datasets.
        runs: each run by its name.
        projects: each project by the name of its folder.
        trash: what can still be taken back.
    """

    caches: dict[str, int]
    runs: dict[str, int]
    projects: dict[str, int]
    trash: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(sum(part.values()) for part in (self.caches, self.runs, self.projects)) + self.trash


def folder_bytes(folder: Path) -> int:
    """The bytes of all files below a folder; links are not followed, and a file with two names counts once.

    What vanishes meanwhile, as when a run is going on, counts as nothing.
    """
    total = 0
    linked: set[tuple[int, int]] = set()
    waiting = [str(folder)]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                        continue
                    found = entry.stat(follow_symlinks=False)
                    if found.st_nlink > 1:
                        if (found.st_dev, found.st_ino) in linked:
                            continue
                        linked.add((found.st_dev, found.st_ino))
                    total += found.st_size
        except OSError:
            continue
    return total


def workspace_sizes(workspace: Path) -> Sizes:
    """What everything in a workspace takes."""
    return Sizes(
        _each(workspace / "cache"),
        _each(runs_folder(workspace)),
        _each(workspace / "projects"),
        folder_bytes(trash_folder(workspace)),
    )


def _each(folder: Path) -> dict[str, int]:
    """Each folder in a folder by its name, the largest first."""
    if not folder.is_dir():
        return {}
    found = {path.name: folder_bytes(path) for path in folder.iterdir() if _counted(path)}
    return dict(sorted(found.items(), key=lambda one: (-one[1], one[0])))


def _counted(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not path.name.startswith(".")


def clean_caches(workspace: Path) -> int:
    """Remove all that a run can make again: encoded pictures and captions, unpacked zips; returns the bytes.

    A run that starts meanwhile finds an empty cache, and not half of one: what goes is first moved aside.

    Raises:
        RunError: a run is going on, or the disk refuses.
    """
    live = [run.name for run in all_runs(workspace) if run.live_process() is not None]
    if live:
        raise RunError(
            f"The run {live[0]} is going on and uses the caches; clean them when it has ended or is paused."
        )
    cache = workspace / "cache"
    freed = folder_bytes(cache)
    try:
        for path in list(cache.iterdir()) if cache.is_dir() else []:
            aside = path if path.name.endswith(_GOING) else cache / f".{path.name}.{uuid.uuid4().hex}{_GOING}"
            if aside != path:
                path.rename(aside)
            if aside.is_dir() and not aside.is_symlink():
                shutil.rmtree(aside)
            else:
                aside.unlink()
    except OSError as error:
        raise RunError(
            f"{error.filename or cache} cannot be removed: {error.strerror or error}; close what uses it and"
            " try again."
        ) from error
    return freed - folder_bytes(cache)
