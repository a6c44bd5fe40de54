"""Routes of the Preview tab. Every change of the form arrives here, is stored, and draws what it asks for."""

import asyncio
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, Response

from app.preview.history import GridState, HistoryEntry
from app.preview.infotext import open_file, use_infotext
from app.preview.request_form import (
    axis_data,
    base_for,
    build_request,
    build_run_request,
    form_data,
    grid_axes,
    save_request,
    strip_is_on,
    take_sent_axes,
)
from app.preview.sent_form import parse_strengths, strip_values, take_rows, take_sent_form
from app.preview.view import working_words
from app.routes import FRESH, Answer, add_actions, receive_file
from app.state import AppState, take_snapshot
from lora_core.errors import LoraError, RunError
from lora_core.generate.grid import make_axis


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

    add_actions(app, "preview", {name: functools.partial(act, app_state) for name, act in ACTIONS.items()})

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


def generate(app_state: AppState, sent: dict[str, Any]) -> dict[str, Any]:
    """Store the form and draw its image, its strip or its grid, as `what` says.

    Raises:
        LoraError: the grid cannot be drawn; a problem of image and strip is shown with them.
    """
    rows, rev = take_sent_form(app_state.project, sent)
    snapshot, what = take_snapshot(app_state), sent.get("what")
    fields = sent.get("fields") if isinstance(sent.get("fields"), dict) else {}
    try:
        shot = build_request(snapshot, fields or {}, rows)
        if what == "grid":
            app_state.render_queue.draw_grid(GridState.of(shot, *take_sent_axes(app_state.project, sent)))
            return {"rev": rev}
        on = what == "strip" or strip_is_on(app_state.project, base_for(snapshot, rows))
        strip = strip_values(app_state.project) if on else ()
        if what == "strip":
            typed = sent.get("strip")
            strip = parse_strengths(typed.get("values") if isinstance(typed, dict) else "")
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
        state = next((state for run_view, state in snapshot.runs if run_view.run.name == name), "")
        if state not in ("running", "preparing"):
            # A live run has a file once it is done; the request is kept until then.
            app_state.project.update_draft(preview_strip="")
            app_state.render_queue.refuse(str(error))
        return {"fill": False, "drawn": True}
    app_state.project.update_draft(preview_strip="")
    save_request(app_state.project, shot)
    app_state.render_queue.want(shot, strip_values(app_state.project))
    return {"fill": True, "drawn": True}


def put_back(app_state: AppState, sent: dict[str, Any]) -> dict[str, Any]:
    """Put the settings of an image of the history into the form, which is returned, and show it.

    Raises:
        RunError: there is no such image any more.
    """
    kept = app_state.render_queue.history.named(sent.get("file"))
    save_request(app_state.project, kept.shot)
    if not kept.is_sheet:
        app_state.render_queue.want(kept.shot, ())
    return {"form": form_data(take_snapshot(app_state))}


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
    first = view.images[shots[0]]
    out = first.with_name(f"{first.stem}-strip.png")
    request = GridState(view.shot, None, columns, [shots]).sheet_request(view.images, out)
    reply = app_state.worker.ask(request | {"columns": [f"{value:g}" for value in view.strip]})
    if reply.state == "error":
        raise RunError(reply.message)
    render_queue.history.add(HistoryEntry(out, view.shot, None, columns))
    return out


ACTIONS: dict[str, Callable[[AppState, dict[str, Any]], Any]] = {
    "rows": take_rows,
    "generate": generate,
    "open": open_tab,
    "put-back": put_back,
    "forget": lambda app_state, sent: {
        "place": app_state.render_queue.forget(sent.get("file"), app_state.workspace)
    },
    "bring-back": lambda app_state, sent: app_state.render_queue.history.bring_back(
        sent.get("place"), app_state.workspace
    ),
    "cancel": lambda app_state, sent: app_state.render_queue.cancel(),
    "infotext": use_infotext,
}
"""What a page may post below /easel/preview/."""
