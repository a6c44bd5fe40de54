"""Sheets of images: the grid over two axes, with the axes in the form, and the strip as one PNG."""

from pathlib import Path
from typing import Any

from app.preview.history import GridState, HistoryEntry, sheet_info
from app.preview.loras import find_owner, list_run_loras, lora_groups
from app.preview.request_form import SEED, load_fields, lora_rows
from app.state import AppState, Snapshot
from lora_core.errors import RunError
from lora_core.generate.request import Axis, make_axis, split_values
from lora_core.projects.project import Project

GRID_SIDES = {"rows": "seed", "columns": "strength"}
"""Rows and columns, and what each varies at first."""
NOTHING = "none"
GRID_KINDS = {
    "strength": "LoRA strength", "checkpoint": "Checkpoint", "seed": "Seed", "prompt": "Prompt",
    "rank": "Rank", NOTHING: "Nothing",
}  # fmt: skip
MOST_CHECKPOINTS = 40


def _values_key(side: str) -> str:
    return f"{side.removesuffix('s')}_values"


def _sent_axis(sent: Any) -> tuple[str, list[str]]:
    sent = sent if isinstance(sent, dict) else {}
    values = sent.get("values")
    return str(sent.get("kind")), [str(value) for value in values] if isinstance(values, list) else []


def take_sent_axes(project: Project, sent: dict[str, Any]) -> list[Axis | None]:
    """Store rows and columns as a page sends them; returns them parsed.

    Raises:
        ConfigError: there is no value, or one is not legal.
    """
    grid = sent.get("grid")
    axes = {side: _sent_axis(grid.get(side) if isinstance(grid, dict) else None) for side in GRID_SIDES}
    kept = {
        key: value
        for side, axis in axes.items()
        for key, value in zip((side, _values_key(side)), axis, strict=True)
    }
    project.update_draft(preview_grid=kept)
    return [parse_axis(*axis) for axis in axes.values()]


def parse_axis(kind: str, values: list[str]) -> Axis | None:
    """Parse the chosen values of an axis; numbers typed together are split.

    Raises:
        ConfigError: there is no value, or one is not legal.
    """
    if kind == NOTHING:
        return None
    if kind in ("strength", "seed", "rank"):
        values = [part for value in values for part in split_values(value)]
    return make_axis(kind, values)


def grid_axes(snapshot: Snapshot) -> dict[str, Any]:
    """Rows and columns in the draft, each with its values and choices."""
    kept = snapshot.app_state.project.draft().get("preview_grid") or {}
    return {
        side: axis_data(snapshot, str(kept.get(side) or usual), kept.get(_values_key(side)))
        for side, usual in GRID_SIDES.items()
    }


def axis_data(snapshot: Snapshot, kind: str, values: Any = None) -> dict[str, Any]:
    """An axis as the page's script needs it; without values those that are usual."""
    choices, usual = list_axis_values(snapshot, kind)
    listed = [str(value) for value in values] if isinstance(values, list) and values else usual
    return {"kind": kind, "values": listed, "choices": choices}


def list_axis_values(snapshot: Snapshot, kind: str) -> tuple[list[tuple[str, str]], list[str]]:
    """Checkpoints on offer as (title, file), and the values selected by default."""
    fields = load_fields(snapshot)
    if kind == "checkpoint":
        return _list_checkpoints(snapshot)
    try:
        first = max(0, int(fields["seed"]))
    except ValueError:
        first = SEED
    usual = {
        "strength": ["0", "0.5", "1"],
        "rank": ["1", "4", "16"],
        "seed": [str(first + number) for number in range(3)],
        "prompt": [str(fields["prompt"])] if fields["prompt"] else [],
    }
    return [], usual.get(kind, [])


def _list_checkpoints(snapshot: Snapshot) -> tuple[list[tuple[str, str]], list[str]]:
    """All adapter files; those of the first LoRA's run are selected."""
    rows, _ = lora_rows(snapshot)
    run_view = find_owner(snapshot, rows[0].file) if rows else None
    own = [str(one.file) for one in list_run_loras(run_view)] if run_view else []
    choices = [
        (title if place == "Runs" else f"{place}: {title}", file)
        for place, files in lora_groups(snapshot)
        for title, file in files
    ]
    steps = [file for file in own if "/checkpoints/" in file.replace("\\", "/")]
    picked = (steps or own)[:3][::-1] or [file for _, file in choices[:2]]
    return choices[:MOST_CHECKPOINTS], picked


def strip_sheet(app_state: AppState) -> Path:
    """The strip as one PNG, assembled from its images.

    Raises:
        RunError: it is not whole.
    """
    render_queue = app_state.render_queue
    view = render_queue.view()
    shots = view.strip_shots()
    if view.shot is None or not shots or any(shot not in view.images for shot in shots):
        raise RunError("The strip is not generated yet; generate it first.")
    columns = make_axis("strength", list(view.strip))
    grid = GridState(view.shot, None, columns, [shots])
    stem = view.images[shots[0]]
    out = stem.with_name(f"{stem.stem}-strip.png")
    cells = [[str(view.images[shot]) for shot in shots]]
    labels = [f"{value:g}" for value in view.strip]
    reply = app_state.worker.ask(
        {"do": "sheet", "cells": cells, "columns": labels, "parameters": sheet_info(grid), "out": str(out)}
    )
    if reply.state == "error":
        raise RunError(reply.message)
    render_queue.history.add(HistoryEntry(out, view.shot, None, columns))
    return out
