"""The projects of a workspace, which of its runs belong to one, its trash and its caches.

Deleted runs, projects and generated images move into the workspace's own `.trash`, from which they can be
restored. The system's trash is not used: on Windows it deletes large files and those on network drives at
once, and on other drives it may copy gigabytes. A rename within the workspace is instant, atomic, and needs
no desktop.
"""

import difflib
import json
import os
import re
import shutil
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lora_core.data.images import IMAGE_SUFFIXES
from lora_core.errors import DatasetError, LoraError, RunError, wrap_os_errors
from lora_core.projects.project import DEMO, LABEL, LONGEST_TITLE, Project, read_title
from lora_core.runs.folder import RunFolder, all_runs
from lora_core.runs.queue import Queue
from lora_core.settings.config import RunConfig
from lora_core.system import files

DEFAULT = "default"
KINDS = {"runs": "run", "projects": "project"}
_LABEL, _CONTENT = "label.json", "content"
_GENERATED = "generated"
"""The folder of a project's generated images."""
_GOING = ".going"
_IN_USE = "; close what uses it and try again."
_OPEN = "open.json"
_MARK = "project.json"
"""In a run's folder: the project that started it."""


@dataclass(frozen=True)
class ProjectRow:
    """A project as the picker lists it."""

    key: str
    title: str
    is_open: bool
    pictures: int
    runs: int
    size: int


class Projects:
    """The folder of projects, one of which is open."""

    def __init__(self, workspace: Path) -> None:
        """Open the project that was open last, else the default one."""
        self.workspace = workspace
        self.folder = workspace / "projects"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        last = str(files.read_json(self.folder / _OPEN).get("open") or DEFAULT)
        self.current = Project(self.folder / (last if self._is_there(last) else DEFAULT))

    def list_projects(self) -> list[ProjectRow]:
        """All projects, the open one first, then by title."""
        runs = Counter(_project_of(run, run.config_or_none, self.folder) for run in all_runs(self.workspace))
        found = []
        for path in self.folder.iterdir():
            if path.is_dir() and not path.name.startswith("."):
                is_demo = files.read_json(path / "draft.json").get("dataset") == DEMO
                shown = files.DEMO_TRAIN if is_demo else path / "pictures"
                pictures = sum(1 for file in shown.rglob("*") if _is_image(file))
                is_open = path == self.current.path
                size = files.folder_bytes(path)
                found.append(
                    ProjectRow(path.name, read_title(path), is_open, pictures, runs[path.name], size)
                )
        return sorted(found, key=lambda one: (not one.is_open, one.title.casefold(), one.key))

    def open(self, key: str) -> None:
        """Open another project.

        Raises:
            RunError: there is none of that name.
        """
        path = self._path(key)
        with self._lock:
            self.current.open(path)
            files.write_atomically(self.folder / _OPEN, json.dumps({"open": path.name}).encode())

    def new(self, title: str) -> str:
        """Make a project and open it; returns the name of its folder.

        Raises:
            RunError: the title is empty or taken, or the disk refuses.
        """
        title = self._checked(title, "")
        words = "-".join(re.findall(r"\w+", title)).lower()[:60]
        stem = files.safe_name(words or "project").name
        with self._lock:
            key = files.unused_stem(stem, {files.fold_name(path.name) for path in self.folder.iterdir()})
            try:
                with wrap_os_errors(RunError, f"The project {title} cannot be made"):
                    (self.folder / key / "pictures").mkdir(parents=True)
                    self._label(self.folder / key, title)
                self.open(key)
            except LoraError:
                shutil.rmtree(self.folder / key, ignore_errors=True)
                raise
        return key

    def open_titled(self, title: str) -> None:
        """Open the project of this title, made if there is none.

        Raises:
            RunError: the disk refuses.
        """
        titles = {read_title(path): path.name for path in self.folder.iterdir() if path.is_dir()}
        if title in titles:
            self.open(titles[title])
        else:
            self.new(title)

    def rename(self, key: str, title: str) -> None:
        """Give a project another title; its folder keeps its name, as runs know it by that.

        Raises:
            RunError: no such project, or the title is empty or taken.
        """
        path = self._path(key)
        self._label(path, self._checked(title, key))
        if path == self.current.path:
            self.current.title = read_title(path)

    def delete(self, key: str) -> Path:
        """Move a project into the trash, and return where it is; if it was open, another is opened.

        Raises:
            RunError: no such project, it is the only one, a run uses it, or the disk refuses.
        """
        path = self._path(key)
        with self._lock:
            others = [one.key for one in self.list_projects() if one.key != key]
            if not others:
                raise RunError("This is the only project; make another before you delete it.")
            if path == self.current.path:
                self.open(DEFAULT if DEFAULT in others else others[0])
            return move_to_trash(path, self.workspace)

    def _label(self, path: Path, title: str) -> None:
        files.write_atomically(path / LABEL, json.dumps({"title": title}, ensure_ascii=False).encode())

    def _checked(self, title: str, key: str) -> str:
        title = " ".join(files.clean_text(title).split())
        if not title:
            raise RunError("Type a name for the project first.")
        if len(title) > LONGEST_TITLE:
            raise RunError(f"The name is longer than {LONGEST_TITLE} letters; make it shorter.")
        others = (path for path in self.folder.iterdir() if path.is_dir() and path.name != key)
        if title.casefold() in (read_title(path).casefold() for path in others):
            raise RunError(f"There is a project named {title} already; choose another name.")
        return title

    def _is_there(self, key: str) -> bool:
        return bool(key) and Path(key).name == key and key != ".." and (self.folder / key).is_dir()

    def _path(self, key: str) -> Path:
        if not self._is_there(key):
            raise RunError(f"The project {key!r} no longer exists.")
        return self.folder / key

    def find_key(self, name: str) -> str:
        """The folder's name of the project with this title, or of this name.

        Raises:
            RunError: there is none, or several have that title.
        """
        if self._is_there(name):
            return name
        titles = {path.name: read_title(path) for path in self.folder.iterdir() if path.is_dir()}
        found = [key for key, title in titles.items() if title.casefold() == name.strip().casefold()]
        if len(found) == 1:
            return found[0]
        if found:
            raise RunError(f"{len(found)} projects are called {name}; give a folder: {', '.join(found)}.")
        known = {text.casefold(): text for text in (*titles, *titles.values())}
        near = [known[one] for one in difflib.get_close_matches(name.casefold(), known, n=2)]
        hint = f"did you mean {' or '.join(near)}?" if near else "`lora-easel projects list` lists all."
        raise RunError(f"There is no project {name} in {self.folder}; {hint}")


def find_dataset(name: str, workspace: Path) -> str:
    """The dataset of that name: a folder, a zip or `demo`, else the images of a project."""
    known = name in ("", DEMO) or Path(name).name != name or files.expand_home(name).exists()
    if known or not (workspace / "projects").is_dir():
        return name
    with suppress(RunError):
        projects = Projects(workspace)
        project = Project(projects.folder / projects.find_key(name))
        return DEMO if project.uses_demo else str(project.image_folder)
    return name  # `open_dataset` says that it is missing


def open_images(name: str, workspace: Path) -> Project:
    """A folder of images, or the project of that name; a folder comes first.

    Images left out of a plain folder, and its former captions, are kept in its hidden `.lora-easel`.

    Raises:
        DatasetError: it is the demo, which cannot be changed.
        RunError: there is neither.
    """
    if name == DEMO:
        raise DatasetError("The demo's images and captions stay as they are; copy them to work on them.")
    folder = files.expand_home(name).absolute()
    if folder.parent == workspace / "projects" and folder.is_dir():
        return Project(folder)
    if folder.is_dir():
        return Project(folder / ".lora-easel", folder)
    projects = Projects(workspace)
    return Project(projects.folder / projects.find_key(name))


def mark_project(run: RunFolder, project: Path) -> None:
    """Note in a run's folder which project started it."""
    files.write_atomically(run.path / _MARK, json.dumps({"project": project.name}).encode())


def belongs_to(run: RunFolder, config: Callable[[], RunConfig | None], project: Path) -> bool:
    """Whether a run is one of a project's; `config`, which is slow, is asked of a run without a note."""
    return project.name == _project_of(run, config, project.parent)


def _project_of(run: RunFolder, config: Callable[[], RunConfig | None], projects: Path) -> str:
    marked = str(files.read_json(run.path / _MARK).get("project") or "")
    if not marked and (found := config()) is not None and Path(found.dataset.path).is_relative_to(projects):
        marked = next(iter(Path(found.dataset.path).relative_to(projects).parts), "")
    return marked if marked and (projects / marked).is_dir() else DEFAULT


def _is_image(file: Path) -> bool:
    return file.suffix.casefold() in IMAGE_SUFFIXES and not file.name.startswith(".")


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
        """A deleted run, project or image."""
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
    """Where a workspace keeps deleted things."""
    return workspace / ".trash"


def move_to_trash(path: Path, workspace: Path) -> Path:
    """Move a run, a project or a generated image of a workspace into its trash; returns where it is now.

    A run is taken out of the queue too.

    Raises:
        RunError: it is none of these, a live run uses it, or the disk refuses.
    """
    path, kind = _allowed(path, workspace)
    out_of_queue: AbstractContextManager[None] = nullcontext()
    if kind == "run":
        _refuse_live_run(RunFolder(path))
        queue = Queue(workspace)
        if any(job.run == path.name for job in queue.stored_jobs()):
            out_of_queue = queue.removing(path.name)
    elif kind == "project":
        _refuse_used_project(path, workspace)
    place = trash_folder(workspace) / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}"
    came_from = path.relative_to(workspace.absolute()).as_posix()
    label = {"name": path.name, "came_from": came_from, "time": time.time()}
    with wrap_os_errors(RunError, f"The {kind} {path.name} cannot be moved to the trash", _IN_USE):
        try:
            place.mkdir(parents=True)
            files.write_atomically(place / _LABEL, json.dumps(label).encode())
            with out_of_queue:
                os.rename(path, place / _CONTENT)
        except (OSError, RunError):
            if (place / _CONTENT).exists():
                # The queue could not be written.
                os.rename(place / _CONTENT, path)
            shutil.rmtree(place, ignore_errors=True)
            raise
    return place / _CONTENT


def list_trash(workspace: Path) -> list[TrashItem]:
    """The contents of the trash, newest first."""
    found = []
    for label in trash_folder(workspace).glob(f"*/{_LABEL}"):
        try:
            row = files.parse_json(label.read_bytes())
            came_from = workspace.absolute() / str(row["came_from"])
            one = TrashItem(label.parent, str(row["name"]), came_from, float(row["time"]))
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
    path = files.unused_path(wanted.parent, wanted.stem, wanted.suffix)
    with wrap_os_errors(RunError, f"The {kind} {one.name} cannot be put back"):
        path.parent.mkdir(parents=True, exist_ok=True)
        os.rename(one.content, path)
        shutil.rmtree(one.place, ignore_errors=True)
    return path


def empty_trash(workspace: Path) -> int:
    """Delete the contents of the trash permanently; returns the bytes.

    Raises:
        RunError: the disk refuses.
    """
    folder = trash_folder(workspace)
    size = files.folder_bytes(folder)
    with _removing(folder):
        if folder.is_dir():
            shutil.rmtree(folder)
    return size


@contextmanager
def _removing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = error.filename or folder
        raise RunError(f"{what} cannot be removed: {error.strerror or error}{_IN_USE}") from error


def _allowed(path: Path, workspace: Path) -> tuple[Path, str]:
    """The full path and its kind: only runs, projects and generated images of this workspace are moved.

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
    with wrap_os_errors(RunError, f"The run {run.name} cannot be deleted"):
        try:
            # A trainer that has only just started holds the lock before it writes its process file.
            lock.acquire(timeout=0)
            lock.release()
        except Timeout as error:
            raise RunError(f"The run {run.name} is still running; stop it before it is deleted.") from error


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
        path.name: files.folder_bytes(path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.is_dir() and not path.is_symlink() and not path.name.startswith(".")
    }
    return dict(sorted(sizes.items(), key=lambda one: (-one[1], one[0])))


def clean_caches(workspace: Path) -> int:
    """Remove everything that a run can recreate (encoded images and captions, unpacked zips); returns the
    bytes.

    Caches are renamed first, so that a run that starts meanwhile finds an empty cache and not half of one.

    Raises:
        RunError: a run is active, or the disk refuses.
    """
    live = [run.name for run in all_runs(workspace) if run.live_process() is not None]
    if live:
        raise RunError(
            f"The run {live[0]} is still running and uses the caches; clean them when it has ended or is"
            " paused."
        )
    cache = workspace / "cache"
    freed = files.folder_bytes(cache)
    with _removing(cache):
        for path in list(cache.iterdir()) if cache.is_dir() else []:
            aside = path if path.name.endswith(_GOING) else cache / f".{path.name}.{uuid.uuid4().hex}{_GOING}"
            if aside != path:
                path.rename(aside)
            if aside.is_dir() and not aside.is_symlink():
                shutil.rmtree(aside)
            else:
                aside.unlink()
    return freed - files.folder_bytes(cache)
