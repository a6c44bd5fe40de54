"""The LoRA files on this computer: of runs, added to the project, and in the folders of other tools."""

import os
import shutil
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from app.jobs import RunView
from app.preview.history import file_time
from app.state import Snapshot
from app.templates import _
from lora_core.errors import DatasetError
from lora_core.model_files.header import read_header
from lora_core.projects.project import Project
from lora_core.system.files import safe_name, unused_path

MOST_OF_A_TOOL, MOST_DEPTH = 300, 4
LOOK_AGAIN = 20
"""Seconds after which another tool's folder is read again."""
ADDED = "loras"
"""The folder of a project for LoRA files that were dropped on the page."""

Group = tuple[str, list[tuple[str, str]]]
"""A heading, and (title, path) of each file below it."""


@dataclass(frozen=True)
class FoundLora:
    """One adapter file of a run."""

    title: str
    file: Path
    run_view: RunView


def find_loras(snapshot: Snapshot) -> list[FoundLora]:
    """Adapter files of all runs, newest run first."""
    return [found for run_view, _ in snapshot.runs for found in list_run_loras(run_view)]


def list_run_loras(run_view: RunView) -> list[FoundLora]:
    """A run's export, its other exports, then its checkpoints from the last back."""
    found, run = [], run_view.run
    files = sorted(run.exports.glob("*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True)
    named = run_view.progress.export
    main = run.path / named if named else None
    files.sort(key=lambda file: file != main)
    for file in files:
        title = run.name if file.stem == run.name else f"{run.name}, {file.stem}"
        found.append(FoundLora(title, file, run_view))
    for step in reversed(run.checkpoint_steps()):
        best = _(", best") if step == run_view.progress.best_step else ""
        file = run.checkpoint(step) / "adapter.safetensors"
        found.append(FoundLora(_("{}, step {:,}{}", run.name, step, best), file, run_view))
    return found


def lora_groups(snapshot: Snapshot) -> list[Group]:
    """All LoRAs on offer, grouped by location."""
    own = snapshot.app_state.jobs.own
    found = [(own(one.run_view), (one.title, str(one.file))) for one in find_loras(snapshot)]
    groups: list[Group] = [(_("Runs"), [file for is_own, file in found if is_own])]
    period = int(time.monotonic() / LOOK_AGAIN)
    added = snapshot.app_state.project.path / ADDED
    groups.append((_("Added here"), _in_folder(added, file_time(added), 0)))
    for tool, folder in snapshot.app_state.tools.lora_folders():
        groups.append((tool, _in_folder(folder, 0, period)))
    groups.append((_("Runs of other projects"), [file for is_own, file in found if not is_own]))
    return [(heading, files) for heading, files in groups if files]


@lru_cache(maxsize=32)
def _in_folder(folder: Path, changed: int, period: int) -> list[tuple[str, str]]:
    """LoRA files below a folder; `changed` and `period` invalidate the cache."""
    found: list[tuple[str, str]] = []
    for place, folders, files in os.walk(folder):
        depth = len(Path(place).relative_to(folder).parts)
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if depth < MOST_DEPTH else []
        for name in sorted(files):
            if name.lower().endswith(".safetensors") and not name.startswith("."):
                path = Path(place) / name
                found.append((path.relative_to(folder).with_suffix("").as_posix(), str(path)))
        if len(found) >= MOST_OF_A_TOOL:
            break
    return found[:MOST_OF_A_TOOL]


def find_owner(snapshot: Snapshot, file: str) -> RunView | None:
    """The run that a file belongs to."""
    return next(
        (run_view for run_view, _ in snapshot.runs if Path(file).is_relative_to(run_view.run.path)), None
    )


def checkpoint_choices(run_view: RunView) -> list[tuple[str, str]]:
    """Checkpoints to export: best and last first, then each step on disk."""
    steps = run_view.run.checkpoint_steps()
    best = run_view.progress.best_step
    choices = []
    if best in steps:
        choices.append((_("Best, step {step:,}", step=best), "best"))
    if steps:
        choices.append((_("Last, step {step:,}", step=steps[-1]), "last"))
    return choices + [(_("Step {step:,}", step=step), str(step)) for step in reversed(steps)]


def add_lora(project: Project, file: Path) -> Path:
    """Move a LoRA file that was sent by a page into the project; returns its new path.

    Raises:
        LoraError: it is no safetensors file, or the disk refuses.
    """
    read_header(file)
    return keep_file(file, project.path / ADDED)


def keep_file(file: Path, folder: Path) -> Path:
    """Move a file that was sent by a page to a folder of the project; returns its new path.

    Raises:
        DatasetError: the disk refuses.
    """
    target = unused_path(folder, Path(safe_name(file.name).name).stem, file.suffix.lower())
    try:
        target.parent.mkdir(exist_ok=True)
        shutil.move(file, target)
    except OSError as error:
        raise DatasetError(_("{} cannot be kept: {}.", file.name, error.strerror or error)) from error
    return target
