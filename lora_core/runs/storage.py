"""The trash and the caches of a workspace.

Deleted runs, projects and generated images move into the workspace's own `.trash`, from which they can be
restored. The system's trash is not used: on Windows it deletes at once what is too large for it or on a
network drive, and on other drives it may copy gigabytes. A rename within the workspace is instant, atomic,
and needs no desktop.
"""

import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lora_core.errors import RunError
from lora_core.runs.folder import RunFolder, all_runs
from lora_core.runs.queue import Queue
from lora_core.system.files import folder_bytes, parse_json, unused_path, write_atomically

_LABEL = "label.json"
_CONTENT = "content"
KINDS = {"runs": "run", "projects": "project"}
_GENERATED = "generated"
"""The folder of a project's generated images."""
_GOING = ".going"


@dataclass(frozen=True)
class TrashItem:
    """Something in the trash: its folder there, its name, where it was, and when it was deleted, in seconds
    since the epoch."""

    place: Path
    name: str
    came_from: Path
    time: float

    @property
    def content(self) -> Path:
        """What was deleted, as it was."""
        return self.place / _CONTENT

    def row(self) -> dict[str, Any]:
        """The row of `trash list --json`."""
        return {
            "id": self.place.name,
            "name": self.name,
            "kind": KINDS.get(self.came_from.parent.name, "picture"),
            "came_from": str(self.came_from),
            "time": self.time,
        }


def trash_folder(workspace: Path) -> Path:
    """Where a workspace keeps what was deleted."""
    return workspace / ".trash"


def move_to_trash(path: Path, workspace: Path) -> Path:
    """Move a run, a project or a generated image of a workspace into its trash; returns where it is now.

    A run is taken out of the queue too.

    Raises:
        RunError: it is none of these, a live run uses it, or the disk refuses.
    """
    path, kind = _allowed(path, workspace)
    if kind == "run":
        _refuse_live_run(RunFolder(path))
        queue = Queue(workspace)
        if any(job.run == path.name for job in queue.stored_jobs()):
            queue.remove(path.name)
    elif kind == "project":
        _refuse_used_project(path, workspace)
    place = trash_folder(workspace) / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}"
    came_from = path.relative_to(workspace.absolute()).as_posix()
    label = {"name": path.name, "came_from": came_from, "time": time.time()}
    try:
        place.mkdir(parents=True)
        write_atomically(place / _LABEL, json.dumps(label).encode())
        os.rename(path, place / _CONTENT)
    except OSError as error:
        shutil.rmtree(place, ignore_errors=True)
        raise RunError(
            f"The {kind} {path.name} cannot be moved to the trash: {error.strerror or error}; close what uses"
            " it and try again."
        ) from error
    return place / _CONTENT


def list_trash(workspace: Path) -> list[TrashItem]:
    """What is in the trash, the newest first."""
    found = []
    for label in trash_folder(workspace).glob(f"*/{_LABEL}"):
        try:
            said = parse_json(label.read_bytes())
            came_from = workspace.absolute() / str(said["came_from"])
            one = TrashItem(label.parent, str(said["name"]), came_from, float(said["time"]))
        except (OSError, ValueError, OverflowError, KeyError, TypeError):
            continue
        if one.content.exists():
            found.append(one)
    return sorted(found, key=lambda one: (-one.time, one.place.name))


def restore(one: TrashItem, workspace: Path) -> Path:
    """Put something from the trash back where it was, with a number added to a name that is taken; returns
    that place.

    Raises:
        RunError: it is gone from the trash, or the disk refuses.
    """
    wanted, kind = _allowed(one.came_from, workspace)
    path = unused_path(wanted.parent, wanted.stem, wanted.suffix)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.rename(one.content, path)
        shutil.rmtree(one.place, ignore_errors=True)
    except OSError as error:
        raise RunError(f"The {kind} {one.name} cannot be put back: {error.strerror or error}.") from error
    return path


def empty_trash(workspace: Path) -> None:
    """Remove for good all that is in the trash.

    Raises:
        RunError: the disk refuses.
    """
    folder = trash_folder(workspace)
    with _removing(folder):
        if folder.is_dir():
            shutil.rmtree(folder)


@contextmanager
def _removing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{error.filename or folder} cannot be removed: {error.strerror or error}; close what uses it and"
            " try again."
        ) from error


def _allowed(path: Path, workspace: Path) -> tuple[Path, str]:
    """The full path and what it is: only runs, projects and generated images of this workspace are moved.

    Raises:
        RunError: it is something else.
    """
    full = Path(os.path.abspath(path))
    projects = workspace.absolute() / "projects"
    inside = full.relative_to(projects).parts if full.is_relative_to(projects) else ()
    if inside[1:2] == (_GENERATED,) and full.suffix == ".png":
        return full, "image"
    kind = KINDS.get(full.parent.name, "")
    if not kind or full.parent.parent != workspace.absolute() or full.name.startswith("."):
        raise RunError(f"{path} is neither a run nor a project of {workspace}, so it is not deleted.")
    return full, kind


def _refuse_live_run(run: RunFolder) -> None:
    if not run.path.is_dir():
        raise RunError(f"The run {run.name} no longer exists.")
    lock = FileLock(run.lock_file)
    try:
        # A trainer that has only just started holds the lock before it writes its process file.
        lock.acquire(timeout=0)
        lock.release()
    except Timeout as error:
        raise RunError(f"The run {run.name} is still running; stop it before it is deleted.") from error
    except OSError as error:
        raise RunError(f"The run {run.name} cannot be deleted: {error.strerror or error}.") from error


def _refuse_used_project(path: Path, workspace: Path) -> None:
    if not path.is_dir():
        raise RunError(f"The project {path.name} no longer exists.")
    for run in all_runs(workspace):
        if run.live_process() is not None and Path(run.config().dataset.path).is_relative_to(path):
            raise RunError(
                f"The run {run.name} is still training on the images of {path.name}; stop it before they are"
                " deleted."
            )


def cache_sizes(workspace: Path) -> dict[str, int]:
    """Bytes of each cache (latents, text, datasets), the largest first."""
    folder = workspace / "cache"
    sizes = {
        path.name: folder_bytes(path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.is_dir() and not path.is_symlink() and not path.name.startswith(".")
    }
    return dict(sorted(sizes.items(), key=lambda one: (-one[1], one[0])))


def clean_caches(workspace: Path) -> int:
    """Remove all that a run can make again (encoded images and captions, unpacked zips); returns the bytes.

    Caches are renamed first, so that a run that starts meanwhile finds an empty cache and not half of one.

    Raises:
        RunError: a run is going on, or the disk refuses.
    """
    live = [run.name for run in all_runs(workspace) if run.live_process() is not None]
    if live:
        raise RunError(
            f"The run {live[0]} is still running and uses the caches; clean them when it has ended or is"
            " paused."
        )
    cache = workspace / "cache"
    freed = folder_bytes(cache)
    with _removing(cache):
        for path in list(cache.iterdir()) if cache.is_dir() else []:
            aside = path if path.name.endswith(_GOING) else cache / f".{path.name}.{uuid.uuid4().hex}{_GOING}"
            if aside != path:
                path.rename(aside)
            if aside.is_dir() and not aside.is_symlink():
                shutil.rmtree(aside)
            else:
                aside.unlink()
    return freed - folder_bytes(cache)
