"""Which LoRAs there are to look at: the exports and checkpoints of all runs, files that were added, and those
in the folders of other tools."""

import os
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from app.jobs import RunView
from app.snapshot import Snapshot

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
    """Newest run first; in a run its export, then its checkpoints from the last back."""
    return [found for run_view, _ in snapshot.runs for found in list_run_loras(run_view)]


def list_run_loras(run_view: RunView) -> list[FoundLora]:
    """A run's export, its other exported files, then its checkpoints from the last back."""
    found, run = [], run_view.run
    files = sorted(run.exports.glob("*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True)
    named = run_view.progress.export
    main = run.path / named if named else None
    files.sort(key=lambda file: file != main)
    for file in files:
        title = run.name if file.stem == run.name else f"{run.name}, {file.stem}"
        found.append(FoundLora(title, file, run_view))
    for step in reversed(run.checkpoint_steps()):
        best = ", best" if step == run_view.progress.best_step else ""
        file = run.checkpoint(step) / "adapter.safetensors"
        found.append(FoundLora(f"{run.name}, step {step:,}{best}", file, run_view))
    return found


def lora_groups(snapshot: Snapshot) -> list[Group]:
    """All LoRAs to choose from, by where they are."""
    groups: list[Group] = [("Runs", [(one.title, str(one.file)) for one in find_loras(snapshot)])]
    period = int(time.monotonic() / LOOK_AGAIN)
    added = snapshot.app_state.project.path / ADDED
    groups.append(("Added here", _in_folder(added, _changed(added), 0)))
    for tool, folder in snapshot.app_state.tools.lora_folders():
        groups.append((tool, _in_folder(folder, 0, period)))
    return [(heading, files) for heading, files in groups if files]


def _changed(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return 0


@lru_cache(maxsize=32)
def _in_folder(folder: Path, changed: int, period: int) -> list[tuple[str, str]]:
    """The files below a folder by their names; `changed` and `period` say when to read it again."""
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
    """What can be exported of a run: best and last first, then each step that is on disk."""
    steps = run_view.run.checkpoint_steps()
    best = run_view.progress.best_step
    choices = []
    if best in steps:
        choices.append((f"Best, step {best:,}", "best"))
    if steps:
        choices.append((f"Last, step {steps[-1]:,}", "last"))
    return choices + [(f"Step {step:,}", str(step)) for step in reversed(steps)]
