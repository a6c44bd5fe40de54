"""The Preview tab: the values of its templates. The form belongs to `assets/preview.js`, so that no answer
replaces a control that is in use; images, strip, grid and history follow the render queue."""

import functools
import json
import zlib
from pathlib import Path
from typing import Any

import gradio as gr

from app.bindings import Bindings, html_block
from app.preview.render_queue import PreviewState, strip_shots
from app.preview.request_form import GRID_KINDS, base_for, form_data, lora_rows
from app.routes import image_url
from app.state import Snapshot
from app.templates import _, render
from app.train.train_form import base_choices
from lora_core.generate.request import GenerationRequest, sampler_title
from lora_core.settings.schema import SAMPLERS


def build_preview(bindings: Bindings) -> None:
    """Lay out the tab."""
    with gr.Row(elem_classes="page page-preview"):
        with gr.Column(elem_classes="side card"):
            samplers = {key: row.title for key, row in SAMPLERS.items()}
            html_block(lambda: render("preview/form.html", samplers=samplers))
            bindings.follow(html_block(), state_line)
            html_block(lambda: render("preview/file.html"))
            bindings.follow(html_block(), form_note)
        with gr.Column(elem_classes="main card"):
            html_block(lambda: render("preview/views.html"))
            bindings.follow(html_block(elem_id="stage", elem_classes="view-stage"), comparison)
            html_block(lambda: render("preview/strip_form.html"), elem_classes="view-strip")
            bindings.follow(html_block(elem_id="strength-strip", elem_classes="view-strip"), strength_strip)
            html_block(lambda: render("preview/grid_form.html", kinds=GRID_KINDS), elem_classes="view-grid")
            bindings.follow(html_block(elem_id="grid", elem_classes="view-grid"), grid_result)
            bindings.follow(html_block(), history)


def form_note(snapshot: Snapshot) -> str:
    """The form as data for the page's script, and the base that is used."""
    base = base_for(snapshot, lora_rows(snapshot)[0])
    titles = {value: words for words, value in base_choices(snapshot.app_state)}
    name = titles.get(base.name) or Path(base.name).name or _("Embedded base (tiny)")
    data = json.dumps(form_data(snapshot))
    return render("preview/note.html", base=base, name=name, data=data, mark=zlib.crc32(data.encode()))


def state_line(snapshot: Snapshot) -> str:
    """What the worker is doing; scripts read `#preview-state`."""
    return render("preview/state.html", view=snapshot.view, working=working_words(snapshot.view))


def working_words(view: PreviewState) -> str:
    """Progress of the current image, or why it has not started."""
    if view.message:
        return view.message
    return _("Generating, step {} of {}", view.done, view.total) if view.total else _("Generating")


def _render(snapshot: Snapshot, template: str, **values: Any) -> str:
    url = functools.partial(image_url, "generated", snapshot.app_state.generated)
    shot = snapshot.view.shot
    ratio = shot.width / shot.height if shot and shot.width and shot.height else 1.0
    shown = {"view": snapshot.view, "shot": shot, "ratio": ratio, "strength": strength_label}
    return render(f"preview/{template}.html", url=url, **shown, **values)


def comparison(snapshot: Snapshot) -> str:
    """Base and LoRA under one slider or side by side, and their difference."""
    view, shot = snapshot.view, snapshot.view.shot
    if shot is None:
        return _render(snapshot, "stage")
    base, drawn = view.image(shot.alone()), view.image(shot) if shot.loras else None
    stale = shot.loras and drawn is None and (drawn := _nearest(view, shot)) is not None
    file = base if stale else drawn or base
    return _render(
        snapshot, "stage", base=base, drawn=drawn, stale=stale, file=file, sampler=sampler_title(shot.sampler)
    )


def strength_label(shot: GenerationRequest) -> str:
    """The strength of a single LoRA, or how many LoRAs there are."""
    if len(shot.loras) != 1:
        return _("{count} LoRAs", count=len(shot.loras)) if shot.loras else _("base")
    lora = shot.loras[0]
    text = "" if lora.text_strength in (None, lora.strength) else f" / {lora.text_strength:.2f}"
    return f"{lora.strength:.2f}{text}"


def _nearest(view: PreviewState, shot: GenerationRequest) -> Path | None:
    """The strip image nearest to the wanted strength, shown until that is ready."""
    if len(shot.loras) != 1:
        return None
    there = [one for one in strip_shots(view.shot, view.strip) if one.loras and one in view.images]
    wanted = shot.loras[0].strength
    nearest = min(there, key=lambda one: abs(one.loras[0].strength - wanted), default=None)
    return view.images[nearest] if nearest is not None else None


def history(snapshot: Snapshot) -> str:
    """The images generated in this project, newest first."""
    return _render(snapshot, "history", entries=snapshot.app_state.render_queue.history.newest())


def strength_strip(snapshot: Snapshot) -> str:
    """The same seed at several strengths."""
    view = snapshot.view
    shots = strip_shots(view.shot, view.strip)
    return _render(snapshot, "strip", cells=list(zip(view.strip, shots, strict=False)))


def grid_result(snapshot: Snapshot) -> str:
    """The grid while it fills, then the finished sheet."""
    grid = snapshot.view.grid
    sheet = grid.sheet if grid and grid.sheet is not None and grid.sheet.is_file() else None
    return _render(snapshot, "grid", grid=grid, sheet=sheet)
