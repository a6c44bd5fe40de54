"""Bulk edits of captions in the open project: previewed, applied, and undone."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lora_core.data.bulk_edit import Edit, apply_edit, diff_captions
from lora_core.data.scan import ImageRecord
from lora_core.data.sidecars import write_caption, write_without_sync
from lora_core.errors import DatasetError
from lora_core.projects.project import Project, read_json, relative_name
from lora_core.system.files import sync_folder, write_atomically

SHOWN_ROWS = 8
MOST_KEPT = 20
_FILE = "undo.json"

_Change = tuple[str, ImageRecord, str]


def preview(project: Project, edit: Edit, only: Collection[str] | None) -> dict[str, Any]:
    """What an edit would do: how many captions it changes, and the first of them as pieces.

    Args:
        project: the open one.
        edit: to apply.
        only: the names of the images to edit, None for all.

    Raises:
        DatasetError: as `apply_edit`.
    """
    changes, asked = _changes(project, edit, only)
    rows = [
        {"picture": name, "pieces": diff_captions(record.caption, after)}
        for name, record, after in changes[:SHOWN_ROWS]
    ]
    return {"changed": len(changes), "asked": asked, "rows": rows}


def apply(project: Project, edit: Edit, only: Collection[str] | None) -> int:
    """Apply an edit and keep the captions from before; returns how many changed.

    Raises:
        DatasetError: as `apply_edit`; or the demo is chosen, or the disk refuses.
    """
    project.refuse_demo()
    changes, _ = _changes(project, edit, only)
    with project.lock():
        # A pattern may take a while: what has moved or changed since stays as it is.
        project.invalidate()
        now = {
            relative_name(record.path, project.image_folder): record for record in project.dataset().records
        }
        changes = [one for one in changes if now.get(one[0]) == one[1]]
        if changes:
            _write(project, edit, changes)
    return len(changes)


def _write(project: Project, edit: Edit, changes: list[_Change]) -> None:
    before = {name: _bytes(record.path.with_suffix(".txt")) for name, record, _ in changes}
    kept = {
        "what": describe_edit(edit),
        "before": before,
        "after": {name: after for name, _, after in changes},
    }
    _keep(project, [*_steps(project), kept])
    for _, record, after in changes:
        write_caption(record.path, after, wait=False)
    sync_folder(project.image_folder)
    project.invalidate()


def last_change(project: Project) -> str:
    """The last edit that can be undone, in words, or ""."""
    steps = [] if project.uses_demo else _steps(project)
    return str(steps[-1]["what"]) if steps else ""


def undo(project: Project) -> tuple[int, int]:
    """Undo the last edit, except where a caption was changed since; returns how many are as before and how
    many are not.

    Raises:
        DatasetError: there is nothing to undo, or the disk refuses.
    """
    project.refuse_demo()
    with project.lock():
        return _undo(project)


def _undo(project: Project) -> tuple[int, int]:
    project.invalidate()
    steps = _steps(project)
    if not steps:
        raise DatasetError("There is no change of many captions left to take back.")
    last = steps.pop()
    by_name = {relative_name(r.path, project.image_folder): r for r in project.dataset().records}
    done = 0
    for name, old in last["before"].items():
        record = by_name.get(name)
        if record is None or record.caption != last["after"].get(name, "").strip():
            continue
        _put(record.path.with_suffix(".txt"), old)
        done += 1
    _keep(project, steps)
    project.invalidate()
    return done, len(last["before"]) - done


def describe_edit(edit: Edit) -> str:
    """An edit in words."""
    return {
        "replace": f"“{edit.find}” replaced by “{edit.put}”",
        "prepend": f"“{edit.put}” put in front",
        "append": f"“{edit.put}” put at the end",
        "rename tag": f"tag “{edit.find}” renamed to “{edit.put}”",
        "delete tag": f"tag “{edit.find}” deleted",
        "trigger": f"trigger word “{edit.put}” added",
    }[edit.do]


def _changes(project: Project, edit: Edit, only: Collection[str] | None) -> tuple[list[_Change], int]:
    """The captions that change, and how many were considered."""
    folder = project.dataset_folder
    named = [(relative_name(record.path, folder), record) for record in project.dataset().records]
    wanted = [(name, record) for name, record in named if only is None or name in only]
    after = apply_edit([record.caption for _, record in wanted], edit)
    pairs = zip(wanted, after, strict=True)
    return [(name, record, new) for (name, record), new in pairs if new != record.caption], len(wanted)


def _steps(project: Project) -> list[dict[str, Any]]:
    steps = read_json(project.path / _FILE).get("steps")
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


def _keep(project: Project, steps: list[dict[str, Any]]) -> None:
    try:
        project.path.mkdir(exist_ok=True)
        write_atomically(project.path / _FILE, json.dumps({"steps": steps[-MOST_KEPT:]}).encode())
    except OSError as error:
        raise DatasetError(
            f"What the captions were before cannot be kept ({error.strerror}), so nothing was changed; free"
            " some disk space."
        ) from error


def _bytes(file: Path) -> str | None:
    """A caption file byte for byte, as text that JSON can hold; None where there is none."""
    return file.read_bytes().decode("utf-8", "surrogateescape") if file.is_file() else None


def _put(file: Path, old: str | None) -> None:
    try:
        if old is None:
            file.unlink(missing_ok=True)
        else:
            write_without_sync(file, old.encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise DatasetError(f"The caption {file.name} cannot be written ({error.strerror}).") from error
