"""The Preview tab's routes: how far a picture is and a look at it, the LoRA rows, the strip, what is opened
with the tab."""

import asyncio
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, Response

from app.preview.compare_view import working_words
from app.preview.page_state import Grid, sheet_info
from app.preview.render_queue import Kept
from app.preview.request_form import checked_rows, keep_rows, keep_shot, run_shot, strip_values
from app.routes import Answer, Refused, sent_json
from app.snapshot import moment_of
from app.state import Desk
from lora_core.errors import LoraError, RunError
from lora_core.generate.request import make_axis

FRESH = {"Cache-Control": "no-store"}


def add_preview_routes(app: FastAPI, desk: Desk) -> None:
    """Add the tab's routes to `app`."""
    studio = desk.studio

    @app.get("/easel/preview/now")
    async def now() -> Response:
        view = await asyncio.to_thread(studio.view)
        main = view.shot is not None and view.drawing == view.shot.acting()
        return Answer(
            {
                "state": view.state,
                "busy": view.working,
                "words": working_words(view) if view.state == "working" else "",
                "looks": view.looks if main else 0,
                "at": f"{view.wanted_at:.3f}",
                "pictures": len(view.pictures),
            },
            headers=FRESH,
        )

    @app.get("/easel/preview/look")
    async def look() -> Response:
        data = studio.look()
        if not data:
            return Response(status_code=204, headers=FRESH)
        return Response(data, media_type="image/jpeg", headers=FRESH)

    @app.post("/easel/preview/rows")
    async def rows(request: Request) -> Response:
        sent = await sent_json(request)
        return Answer(await asyncio.to_thread(_rows, desk, sent), headers=FRESH)

    @app.post("/easel/preview/open")
    async def opened(request: Request) -> Response:
        await sent_json(request)
        return Answer(await asyncio.to_thread(open_tab, desk), headers=FRESH)

    @app.post("/easel/preview/cancel")
    async def cancel(request: Request) -> Response:
        await sent_json(request)
        studio.cancel()
        return Answer({"done": True})

    @app.post("/easel/preview/forget")
    async def forget(request: Request) -> Response:
        sent = await sent_json(request)
        name = str(sent.get("file", ""))
        await asyncio.to_thread(studio.history.remove, name, desk.workspace)
        return Answer({"done": True})

    @app.get("/easel/preview/strip.png")
    async def strip() -> Response:
        file = await asyncio.to_thread(strip_sheet, desk)
        return FileResponse(file, filename=file.name, media_type="image/png", headers=FRESH)


def _rows(desk: Desk, sent: dict[str, Any]) -> dict[str, Any]:
    """Keep the LoRA rows; where strengths moved and a picture is looked at, draw it at them."""
    listed = sent.get("rows")
    if not isinstance(listed, list):
        raise Refused("no rows")
    rows = checked_rows(listed)
    rev = keep_rows(desk.project, rows, bool(sent.get("apart")))
    view = desk.studio.view()
    drawn = False
    if sent.get("moved") and view.shot is not None:
        # Only the strengths: another file waits for Generate, as it may need another base.
        files = [lora.file for lora in view.shot.loras]
        if rows and files == [row.file for row in rows]:
            shot = view.shot.__class__(**{**vars(view.shot), "loras": tuple(rows)})
            drawn = desk.studio.look_at(shot)
    return {"rev": rev, "drawn": drawn}


def open_tab(desk: Desk) -> dict[str, Any]:
    """What opening the tab sets off: once, the strip of the run that the draft names."""
    name = str(desk.project.draft().get("preview_strip") or "")
    if not name:
        return {"fill": False, "drawn": desk.studio.view().shot is not None}
    moment = moment_of(desk)
    try:
        shot = run_shot(moment, name)
    except LoraError as error:
        if any(watch.run.name == name and state in ("running", "preparing") for watch, state in moment.runs):
            # It will have a file when it is done; the wish is kept until then.
            return {"fill": False, "drawn": True, "problem": ""}
        desk.project.keep(preview_strip="")
        desk.studio.refuse(str(error))
        return {"fill": False, "drawn": True}
    desk.project.keep(preview_strip="")
    keep_shot(desk.project, shot)
    desk.studio.want(shot, strip_values(desk.project))
    return {"fill": True, "drawn": True}


def strip_sheet(desk: Desk) -> Path:
    """The strip as one PNG, put together from the pictures that are there.

    Raises:
        RunError: it is not whole.
    """
    studio = desk.studio
    view = studio.view()
    shots = view.strip_shots()
    if view.shot is None or not shots or any(shot not in view.pictures for shot in shots):
        raise RunError("The strip is not drawn yet; draw it first.")
    columns = make_axis("strength", list(view.strip))
    grid = Grid(view.shot, None, columns, [shots])
    stem = view.pictures[shots[0]]
    out = stem.with_name(f"{stem.stem}-strip.png")
    cells = [[str(view.pictures[shot]) for shot in shots]]
    labels = [f"{value:g}" for value in view.strip]
    reply = desk.worker.ask(
        {"do": "sheet", "cells": cells, "columns": labels, "parameters": sheet_info(grid), "out": str(out)}
    )
    if reply.state == "error":
        raise RunError(reply.message)
    studio.history.add(Kept(out, view.shot, None, columns))
    return out
