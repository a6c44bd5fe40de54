"""The projects of a workspace: which there are, which is open, and which runs belong to one."""

import difflib
import json
import re
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

from lora_core.data.images import IMAGE_SUFFIXES
from lora_core.data.scan import fold_name, safe_name, unused_stem
from lora_core.errors import DatasetError, RunError
from lora_core.projects.project import DEMO, LABEL, LONGEST_TITLE, Project, read_json, read_title
from lora_core.runs.folder import RunFolder, all_runs
from lora_core.runs.storage import move_to_trash
from lora_core.settings.config import RunConfig
from lora_core.system.files import clean_text, expand_home, folder_bytes, write_atomically

DEFAULT = "default"
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
        last = str(read_json(self.folder / _OPEN).get("open") or DEFAULT)
        self.current = Project(self.folder / (last if self._is_there(last) else DEFAULT))

    def list_projects(self) -> list[ProjectRow]:
        """All projects, the open one first, then by title."""
        runs = [(run, run.config_or_none()) for run in all_runs(self.workspace)]
        found = []
        for path in self.folder.iterdir():
            if path.is_dir() and not path.name.startswith("."):
                pictures = sum(1 for file in (path / "pictures").rglob("*") if _is_image(file))
                own = sum(belongs_to(run, config, path) for run, config in runs)
                is_open = path == self.current.path
                found.append(
                    ProjectRow(path.name, read_title(path), is_open, pictures, own, folder_bytes(path))
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
            write_atomically(self.folder / _OPEN, json.dumps({"open": path.name}).encode())

    def new(self, title: str) -> str:
        """Make a project and open it; returns the name of its folder.

        Raises:
            RunError: the title is empty or taken, or the disk refuses.
        """
        title = self._checked(title, "")
        words = "-".join(re.findall(r"\w+", title)).lower()[:60]
        stem = safe_name(words or "project").name
        with self._lock:
            key = unused_stem(stem, {fold_name(path.name) for path in self.folder.iterdir()})
            try:
                (self.folder / key / "pictures").mkdir(parents=True)
                self._label(self.folder / key, title)
            except OSError as error:
                shutil.rmtree(self.folder / key, ignore_errors=True)
                raise RunError(f"The project {title} cannot be made ({error.strerror}).") from error
            self.open(key)
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
            RunError: there is no such project, or the title is empty or taken.
        """
        path = self._path(key)
        self._label(path, self._checked(title, key))
        if path == self.current.path:
            self.current.title = read_title(path)

    def delete(self, key: str) -> Path:
        """Move a project into the trash, and return where it is; if it was open, another is opened.

        Raises:
            RunError: there is no such project, it is the only one, a run uses it, or the disk refuses.
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
        write_atomically(path / LABEL, json.dumps({"title": title}, ensure_ascii=False).encode())

    def _checked(self, title: str, key: str) -> str:
        title = " ".join(clean_text(title).split())
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


def open_images(name: str, workspace: Path) -> Project:
    """A folder of images, or the project of that name; a folder comes first.

    Images left out of a plain folder, and its former captions, are kept in its hidden `.lora-easel`.

    Raises:
        DatasetError: it is the demo, which stays as it is.
        RunError: there is neither.
    """
    if name == DEMO:
        raise DatasetError("The demo's images and captions stay as they are; copy them to work on them.")
    folder = expand_home(name).absolute()
    if folder.parent == workspace / "projects" and folder.is_dir():
        return Project(folder)
    if folder.is_dir():
        return Project(folder / ".lora-easel", folder)
    projects = Projects(workspace)
    return Project(projects.folder / projects.find_key(name))


def mark_project(run: RunFolder, project: Path) -> None:
    """Note in a run's folder which project started it."""
    write_atomically(run.path / _MARK, json.dumps({"project": project.name}).encode())


def belongs_to(run: RunFolder, config: RunConfig | None, project: Path) -> bool:
    """Whether a run is one of a project's."""
    projects = project.parent
    marked = str(read_json(run.path / _MARK).get("project") or "")
    dataset = Path(config.dataset.path) if config is not None else Path()
    if not marked and dataset.is_relative_to(projects):
        marked = dataset.relative_to(projects).parts[0] if dataset != projects else ""
    there = bool(marked) and (projects / marked).is_dir()
    return project.name == (marked if there else DEFAULT)


def _is_image(file: Path) -> bool:
    return file.suffix.casefold() in IMAGE_SUFFIXES and not file.name.startswith(".")
