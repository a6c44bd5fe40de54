"""The Preview tab: the values of its templates. The form belongs to `assets/preview.js`, so that no answer
replaces a control that is in use; images, strip, grid and history follow the render queue."""

import json
import zlib
from pathlib import Path
from typing import Any

import gradio as gr

from app.bindings import Bindings, html_block
from app.preview.history import GridState, HistoryEntry
from app.preview.render_queue import PreviewState
from app.preview.request_form import GRID_KINDS, base_for, form_data, lora_rows
from app.routes import image_url
from app.state import Snapshot
from app.templates import render
from app.train.train_form import base_choices
from lora_core.generate.request import GenerationRequest, sampler_title
from lora_core.settings.choices import SAMPLERS


def build_preview(bindings: Bindings) -> None:
    """Lay out the tab."""
    with gr.Row(elem_classes="page page-preview"):
        with gr.Column(elem_classes="side card"):
            samplers = {key: row.title for key, row in SAMPLERS.items()}
            html_block(render("preview/form.html", samplers=samplers))
            bindings.follow(html_block(), state_line)
            html_block(render("preview/file.html"))
            bindings.follow(html_block(), form_note)
        with gr.Column(elem_classes="main card"):
            html_block(render("preview/views.html"))
            bindings.follow(html_block(elem_id="stage", elem_classes="view-stage"), comparison)
            html_block(render("preview/strip_form.html"), elem_classes="view-strip")
            bindings.follow(html_block(elem_id="strength-strip", elem_classes="view-strip"), strength_strip)
            html_block(render("preview/grid_form.html", kinds=GRID_KINDS), elem_classes="view-grid")
            bindings.follow(html_block(elem_id="grid", elem_classes="view-grid"), grid_result)
            bindings.follow(html_block(), history)


def form_note(snapshot: Snapshot) -> str:
    """The form as data for the page's script, and the base that is used."""
    base = base_for(snapshot, lora_rows(snapshot)[0])
    titles = {value: words for words, value in base_choices(snapshot.app_state)}
    name = titles.get(base.name) or Path(base.name).name or "Embedded base (tiny)"
    data = json.dumps(form_data(snapshot))
    return render("preview/note.html", base=base, name=name, data=data, mark=zlib.crc32(data.encode()))


def state_line(snapshot: Snapshot) -> str:
    """What the worker is doing; scripts read `#preview-state`."""
    view = snapshot.view
    words = {"error": view.message, "idle": _idle(view), "working": working_words(view)}[view.state]
    return render("preview/state.html", view=view, words=words)


def _idle(view: PreviewState) -> str:
    if view.message or view.shot is None:
        return view.message
    return f"Seed {view.shot.seed}. {view.note}".strip()


def working_words(view: PreviewState) -> str:
    """Progress of the current image, or why it has not started."""
    if view.message:
        return view.message
    return f"Generating, step {view.done} of {view.total}" if view.total else "Generating"


def comparison(snapshot: Snapshot) -> str:
    """Base and LoRA under one slider or side by side, and their difference."""
    view = snapshot.view
    shot = view.shot
    if shot is None:
        return render("preview/stage.html", shot=None)
    base, drawn = view.image(shot.alone()), view.image(shot) if shot.loras else None
    stale = shot.loras and drawn is None and (drawn := _nearest(view, shot)) is not None
    file = base if stale else drawn or base
    return render(
        "preview/stage.html",
        shot=shot,
        base=_url(snapshot, base),
        drawn=_url(snapshot, drawn),
        stale=stale,
        strength=strength_label(shot),
        ratio=_ratio(shot),
        sampler=sampler_title(shot.sampler),
        file=file and {"url": _url(snapshot, file), "name": file.name},
    )


def _url(snapshot: Snapshot, path: Path | None, size: str = "picture") -> str:
    return image_url("generated", snapshot.app_state.generated, path, size) if path is not None else ""


def strength_label(shot: GenerationRequest) -> str:
    """The strength of a single LoRA, or how many LoRAs there are."""
    if len(shot.loras) != 1:
        return f"{len(shot.loras)} LoRAs" if shot.loras else "base"
    lora = shot.loras[0]
    text = "" if lora.text_strength in (None, lora.strength) else f" / {lora.text_strength:.2f}"
    return f"{lora.strength:.2f}{text}"


def _ratio(shot: GenerationRequest) -> float:
    return shot.width / shot.height if shot.width and shot.height else 1.0


def _nearest(view: PreviewState, shot: GenerationRequest) -> Path | None:
    """The strip image nearest to the wanted strength, shown until that is ready."""
    if len(shot.loras) != 1:
        return None
    there = [one for one in view.strip_shots() if one.loras and one in view.images]
    wanted = shot.loras[0].strength
    nearest = min(there, key=lambda one: abs(one.loras[0].strength - wanted), default=None)
    return view.images[nearest] if nearest is not None else None


def history(snapshot: Snapshot) -> str:
    """The images generated in this project, newest first."""
    entries = [_entry(snapshot, one) for one in snapshot.app_state.render_queue.history.newest()]
    return render("preview/history.html", entries=entries)


def _entry(snapshot: Snapshot, one: HistoryEntry) -> dict[str, Any]:
    shot = one.shot
    words = (
        f"Grid: {shot.prompt}" if one.is_sheet else f"{shot.prompt}, {strength_label(shot)}, seed {shot.seed}"
    )
    return {
        "name": one.file.name,
        "words": words[:300],
        "sheet": one.is_sheet,
        "url": _url(snapshot, one.file),
        "thumb": _url(snapshot, one.file, "thumb"),
    }


def strength_strip(snapshot: Snapshot) -> str:
    """The same seed at several strengths."""
    view = snapshot.view
    shots = view.strip_shots()
    cells = [
        {
            "strength": value,
            "url": _url(snapshot, view.images.get(shot)),
            "drawing": shot not in view.images and view.drawing == shot,
        }
        for value, shot in zip(view.strip, shots, strict=False)
    ]
    return render(
        "preview/strip.html", shot=view.shot, cells=cells, ratio=_ratio(view.shot) if view.shot else 1
    )


def grid_result(snapshot: Snapshot) -> str:
    """The grid while it fills, then the finished sheet."""
    view = snapshot.view
    grid = view.grid
    if grid is None:
        return render("preview/grid.html", grid=None)
    sheet = grid.sheet if grid.sheet is not None and grid.sheet.is_file() else None
    return render(
        "preview/grid.html",
        grid=grid,
        sheet=sheet and {"url": _url(snapshot, sheet), "name": sheet.name},
        done=sum(shot in view.images for shot in grid.shots),
        words=_grid_words(grid),
        columns=[label[:120] for label in grid.columns.labels()] if grid.columns else [],
        rows=[label[:120] for label in grid.rows.labels()] if grid.rows else [],
        cells=[[_url(snapshot, view.images.get(shot)) for shot in row] for row in grid.cells],
    )


def _grid_words(grid: GridState) -> str:
    axes = [("Rows", grid.rows), ("Columns", grid.columns)]
    return ". ".join(f"{name}: {', '.join(axis.labels())}" for name, axis in axes if axis)[:1000]
