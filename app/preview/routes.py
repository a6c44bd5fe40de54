"""Routes of the Preview tab: progress, image in progress, LoRA rows, strip, opening the tab."""

import asyncio
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, Response

from app.preview.compare_view import working_words
from app.preview.render_queue import GridState, HistoryEntry, sheet_info
from app.preview.request_form import build_run_request, parse_rows, save_request, save_rows, strip_values
from app.routes import Answer, BadRequest, read_sent_json
from app.state import AppState, take_snapshot
from lora_core.errors import LoraError, RunError
from lora_core.generate.request import make_axis

FRESH = {"Cache-Control": "no-store"}


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

    @app.post("/easel/preview/rows")
    async def rows(request: Request) -> Response:
        sent = await read_sent_json(request)
        return Answer(await asyncio.to_thread(_rows, app_state, sent), headers=FRESH)

    @app.post("/easel/preview/open")
    async def opened(request: Request) -> Response:
        await read_sent_json(request)
        return Answer(await asyncio.to_thread(open_tab, app_state), headers=FRESH)

    @app.post("/easel/preview/cancel")
    async def cancel(request: Request) -> Response:
        await read_sent_json(request)
        render_queue.cancel()
        return Answer({"done": True})

    @app.post("/easel/preview/forget")
    async def forget(request: Request) -> Response:
        sent = await read_sent_json(request)
        name = str(sent.get("file", ""))
        await asyncio.to_thread(render_queue.history.remove, name, app_state.workspace)
        return Answer({"done": True})

    @app.get("/easel/preview/strip.png")
    async def strip() -> Response:
        file = await asyncio.to_thread(strip_sheet, app_state)
        return FileResponse(file, filename=file.name, media_type="image/png", headers=FRESH)


def _rows(app_state: AppState, sent: dict[str, Any]) -> dict[str, Any]:
    """Store the LoRA rows; if only strengths changed, regenerate the shown image."""
    listed = sent.get("rows")
    if not isinstance(listed, list):
        raise BadRequest("no rows")
    rows = parse_rows(listed)
    rev = save_rows(app_state.project, rows, bool(sent.get("apart")))
    view = app_state.render_queue.view()
    drawn = False
    if sent.get("moved") and view.shot is not None:
        # Only strengths: another file waits for Generate, because it may need another base.
        files = [lora.file for lora in view.shot.loras]
        if rows and files == [row.file for row in rows]:
            shot = view.shot.__class__(**{**vars(view.shot), "loras": tuple(rows)})
            drawn = app_state.render_queue.look_at(shot)
    return {"rev": rev, "drawn": drawn}


def open_tab(app_state: AppState) -> dict[str, Any]:
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
            return {"fill": False, "drawn": True, "problem": ""}
        app_state.project.update_draft(preview_strip="")
        app_state.render_queue.refuse(str(error))
        return {"fill": False, "drawn": True}
    app_state.project.update_draft(preview_strip="")
    save_request(app_state.project, shot)
    app_state.render_queue.want(shot, strip_values(app_state.project))
    return {"fill": True, "drawn": True}


def strip_sheet(app_state: AppState) -> Path:
    """The strip as one PNG, assembled from its images.

    Raises:
        RunError: it is not whole.
    """
    render_queue = app_state.render_queue
    view = render_queue.view()
    shots = view.strip_shots()
    if view.shot is None or not shots or any(shot not in view.images for shot in shots):
        raise RunError("The strip is not drawn yet; draw it first.")
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
