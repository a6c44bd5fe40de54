"""Routes of the Preview tab. Every change of the form arrives here, is stored, and draws what it asks for."""

import asyncio
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, Response
from PIL import Image, UnidentifiedImageError

from app.preview.history import HistoryEntry
from app.preview.loras import add_lora
from app.preview.render_queue import GridState, sheet_info
from app.preview.request_form import (
    apply_infotext,
    axis_data,
    base_for,
    build_request,
    build_run_request,
    grid_axes,
    lora_rows,
    parse_strengths,
    save_form,
    save_request,
    sent_axes,
    strip_is_on,
    strip_values,
    take_sent_form,
)
from app.preview.view import infotext_table, working_words
from app.routes import FRESH, Answer, BadRequest, read_sent_json, receive_file
from app.state import AppState, take_snapshot
from app.templates import note_html
from lora_core.errors import DatasetError, LoraError, RunError
from lora_core.generate.request import Infotext, WeightedLora, make_axis, parse_infotext


def add_preview_routes(app: FastAPI, app_state: AppState) -> None:
    """Add the tab's routes to `app`."""
    render_queue = app_state.render_queue

    @app.get("/easel/preview/now")
    async def now() -> Response:
        view = await asyncio.to_thread(render_queue.view)
        main = view.shot is not None and view.drawing == view.shot.acting()
        return Answer(
            {
                "state": view.state,
                "busy": view.working,
                "words": working_words(view) if view.state == "working" else "",
                "looks": view.looks if main else 0,
                "at": f"{view.wanted_at:.3f}",
                "pictures": len(view.images),
            },
            headers=FRESH,
        )

    @app.get("/easel/preview/look")
    async def look() -> Response:
        data = render_queue.look()
        if not data:
            return Response(status_code=204, headers=FRESH)
        return Response(data, media_type="image/jpeg", headers=FRESH)

    for name, act in ACTIONS.items():
        _add_action(app, app_state, name, act)

    @app.get("/easel/preview/axes")
    async def axes(kind: str = "") -> Response:
        snapshot = await asyncio.to_thread(take_snapshot, app_state)
        return Answer(axis_data(snapshot, kind) if kind else grid_axes(snapshot), headers=FRESH)

    @app.post("/easel/preview/file")
    async def file(request: Request, name: str) -> Response:
        path = await receive_file(request, app_state.workspace / "tmp" / "opened", name)
        return Answer(await asyncio.to_thread(open_file, app_state, path), headers=FRESH)

    @app.get("/easel/preview/strip.png")
    async def strip() -> Response:
        path = await asyncio.to_thread(strip_sheet, app_state)
        return FileResponse(path, filename=path.name, media_type="image/png", headers=FRESH)


def _add_action(app: FastAPI, app_state: AppState, name: str, act: Any) -> None:
    @app.post(f"/easel/preview/{name}")
    async def answer(request: Request) -> Response:
        sent = await read_sent_json(request)
        return Answer(await asyncio.to_thread(act, app_state, sent) or {"done": True}, headers=FRESH)


def take_rows(app_state: AppState, sent: dict[str, Any]) -> dict[str, Any]:
    """Store the form; if only strengths changed, draw the shown image anew."""
    if not isinstance(sent.get("rows"), list):
        raise BadRequest("no rows")
    rows, rev = take_sent_form(app_state.project, sent)
    shot = app_state.render_queue.view().shot if sent.get("moved") and rows else None
    # Another file waits for Generate, because it may need another base.
    drawn = shot is not None and [lora.file for lora in shot.loras] == [row.file for row in rows]
    if shot is not None and drawn:
        app_state.render_queue.want(shot.__class__(**{**vars(shot), "loras": tuple(rows)}))
    return {"rev": rev, "drawn": drawn}


def generate(app_state: AppState, sent: dict[str, Any]) -> dict[str, Any]:
    """Store the form and draw its image, its strip or its grid, as `what` says.

    Raises:
        LoraError: the grid cannot be drawn; a problem of image and strip is shown with them.
    """
    if not isinstance(sent.get("rows"), list):
        raise BadRequest("no rows")
    rows, rev = take_sent_form(app_state.project, sent)
    snapshot, what = take_snapshot(app_state), sent.get("what")
    fields = sent.get("fields") if isinstance(sent.get("fields"), dict) else {}
    try:
        shot = build_request(snapshot, fields or {}, rows)
        if what == "grid":
            app_state.render_queue.draw_grid(GridState.of(shot, *sent_axes(sent)))
            return {"rev": rev}
        on = what == "strip" or strip_is_on(app_state.project, base_for(snapshot, rows))
        strip = strip_values(app_state.project) if on else ()
        if what == "strip":
            strip = parse_strengths((sent.get("strip") or {}).get("values"))
            shot.at("strength", 0.0)
    except LoraError as error:
        if what == "grid":
            raise
        app_state.render_queue.refuse(str(error))
    else:
        app_state.render_queue.want(shot, strip)
    return {"rev": rev}


def open_tab(app_state: AppState, sent: dict[str, Any] | None = None) -> dict[str, Any]:
    """When the tab opens: once, the strip of the run named in the draft."""
    name = str(app_state.project.draft().get("preview_strip") or "")
    if not name:
        return {"fill": False, "drawn": app_state.render_queue.view().shot is not None}
    snapshot = take_snapshot(app_state)
    try:
        shot = build_run_request(snapshot, name)
    except LoraError as error:
        if any(
            run_view.run.name == name and state in ("running", "preparing")
            for run_view, state in snapshot.runs
        ):
            # It has a file once it is done; the request is kept until then.
            return {"fill": False, "drawn": True}
        app_state.project.update_draft(preview_strip="")
        app_state.render_queue.refuse(str(error))
        return {"fill": False, "drawn": True}
    app_state.project.update_draft(preview_strip="")
    save_request(app_state.project, shot)
    app_state.render_queue.want(shot, strip_values(app_state.project))
    return {"fill": True, "drawn": True}


def put_back(app_state: AppState, sent: dict[str, Any]) -> None:
    """Put the settings of an image of the history into the form, and show it.

    Raises:
        RunError: there is no such image any more.
    """
    kept = app_state.render_queue.history.named(str(sent.get("file", "")))
    save_request(app_state.project, kept.shot)
    if not kept.is_sheet:
        app_state.render_queue.want(kept.shot, ())


def open_file(app_state: AppState, file: Path) -> dict[str, Any]:
    """Take a file that was sent to the tab: a LoRA is added, the settings in a PNG are shown.

    Raises:
        LoraError: it is neither.
    """
    try:
        if file.suffix.lower() != ".safetensors":
            text, info = read_infotext(file)
            return {"html": infotext_table(file.name, info), "text": text}
        added = add_lora(app_state.project, file)
    finally:
        file.unlink(missing_ok=True)
    rows, kept = lora_rows(take_snapshot(app_state))
    save_form(app_state.project, [*rows, WeightedLora(str(added))], bool(kept.get("apart")))
    return {"html": note_html(f"{added.stem} is added.")}


def read_infotext(file: Path) -> tuple[str, Infotext]:
    """A1111's infotext in a PNG, as text and parsed; nothing in it is trusted.

    Raises:
        DatasetError: it is no image, or holds no settings.
    """
    try:
        with Image.open(file) as opened:
            text: Any = opened.info.get("parameters")
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{file.name} is not a readable image.") from error
    if not isinstance(text, str) or not text.strip():
        raise DatasetError(
            f"{file.name} holds no settings; sites and chats strip them when they re-encode images."
        )
    return text, parse_infotext(text)


def use_infotext(app_state: AppState, sent: dict[str, Any]) -> dict[str, Any]:
    """Put an infotext into the form."""
    missing = apply_infotext(take_snapshot(app_state), parse_infotext(str(sent.get("text", ""))))
    lost = f" Not found: {', '.join(missing)}; drop the LoRA file to add it." if missing else ""
    return {"html": note_html(f"Its settings are in the form.{lost}")}


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


def _forget(app_state: AppState, sent: dict[str, Any]) -> None:
    app_state.render_queue.history.remove(str(sent.get("file", "")), app_state.workspace)


def _cancel(app_state: AppState, sent: dict[str, Any]) -> None:
    app_state.render_queue.cancel()


ACTIONS = {
    "rows": take_rows,
    "generate": generate,
    "open": open_tab,
    "put-back": put_back,
    "forget": _forget,
    "cancel": _cancel,
    "infotext": use_infotext,
}
"""What a page may post below /easel/preview/."""
