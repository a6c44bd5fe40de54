"""Routes of the Dataset tab. The page gets the images as data: saving a caption costs a few hundred bytes,
not the grid."""

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from app.dataset.findings import BY_ITSELF
from app.dataset.gallery import gallery_data
from app.routes import Answer, BadRequest, read_sent_json
from app.state import AppState
from app.train.form import Plan
from lora_core.data.captions import count_tags
from lora_core.errors import DatasetError
from lora_core.projects import caption_edits as bulk
from lora_core.projects.caption_edits import Edit
from lora_core.projects.project import leave_out, take_back

MOST_NAMES = 50_000


def add_dataset_routes(app: FastAPI, app_state: AppState) -> None:
    """Add the tab's routes to `app`."""
    _add_images(app, app_state)
    _add_import(app, app_state)
    _add_bulk(app, app_state)
    _add_check(app, app_state)
    _add_insights(app, app_state)


def _add_images(app: FastAPI, app_state: AppState) -> None:
    project = app_state.project

    @app.get("/easel/dataset")
    async def dataset() -> Response:
        shown = await asyncio.to_thread(lambda: gallery_data(project, Plan(project)))
        return Answer(shown, headers={"Cache-Control": "no-store"})

    @app.post("/easel/leave-out")
    async def out(request: Request) -> Response:
        names = _names(await read_sent_json(request))
        return await _done(lambda: {"left_out": leave_out(project, names)})

    @app.post("/easel/take-back")
    async def back(request: Request) -> Response:
        names = _names(await read_sent_json(request))
        return await _done(lambda: {"taken_back": take_back(project, names)})

    @app.post("/easel/hold-out")
    async def hold(request: Request) -> Response:
        sent = await read_sent_json(request)
        names, on = _names(sent), bool(sent.get("on"))
        return await _done(lambda: project.hold_out(names, on), lambda: {"revision": project.revision})


def _add_import(app: FastAPI, app_state: AppState) -> None:
    importer = app_state.importer
    app_state.live.feeds["import"] = importer.state

    @app.post("/easel/import")
    async def from_path(request: Request) -> Response:
        sent = await read_sent_json(request)
        path, link = str(sent.get("path", "")), bool(sent.get("link"))
        return await _done(lambda: importer.from_path(path, link), importer.state)

    @app.post("/easel/upload")
    async def begin() -> Response:
        return await _done(lambda: {"batch": importer.begin()})

    @app.put("/easel/upload/{batch}")
    async def receive(batch: str, request: Request) -> Response:
        return Answer({"received": await importer.receive(batch, request.stream())})

    @app.post("/easel/upload/{batch}")
    async def finish(batch: str, request: Request) -> Response:
        if (await read_sent_json(request)).get("give_up"):
            return await _done(lambda: importer.give_up(batch), lambda: {"given_up": True})
        return await _done(lambda: importer.finish(batch), importer.state)


def _add_bulk(app: FastAPI, app_state: AppState) -> None:
    project = app_state.project

    @app.get("/easel/tags")
    async def tags() -> Response:
        def counted() -> dict[str, Any]:
            found = count_tags(record.caption for record in project.dataset().records)
            return {"tags": list(found.items()), "undo": bulk.last_change(project)}

        return await _done(counted)

    @app.post("/easel/bulk")
    async def change(request: Request) -> Response:
        sent = await read_sent_json(request)
        only = set(_names(sent)) if "pictures" in sent else None
        edit = _edit(sent, Plan(project).trigger)
        if not sent.get("apply"):
            return await _done(lambda: bulk.preview(project, edit, only))
        return await _done(
            lambda: {"changed": bulk.apply(project, edit, only), "undo": bulk.last_change(project)}
        )

    @app.post("/easel/bulk/undo")
    async def undo() -> Response:
        def undone() -> dict[str, Any]:
            done, kept = bulk.undo(project)
            return {"undone": done, "kept": kept, "undo": bulk.last_change(project)}

        return await _done(undone)


def _add_check(app: FastAPI, app_state: AppState) -> None:
    checker = app_state.checker
    app_state.live.feeds["check"] = checker.progress

    @app.get("/easel/check")
    async def state() -> Response:
        return await _done(checker.state)

    @app.post("/easel/check")
    async def start(request: Request) -> Response:
        by_itself = bool((await read_sent_json(request)).get("by_itself"))

        def started() -> dict[str, Any]:
            if not by_itself or len(app_state.project.dataset().records) <= BY_ITSELF:
                checker.start()
            return checker.state()

        return await _done(started)


def _add_insights(app: FastAPI, app_state: AppState) -> None:
    insights = app_state.insights
    app_state.live.feeds["insights"] = insights.progress

    @app.get("/easel/insights")
    async def state() -> Response:
        return await _done(insights.state)

    @app.post("/easel/insights")
    async def ask(request: Request) -> Response:
        sent = await read_sent_json(request)
        act = insights.cancel if sent.get("do") == "cancel" else insights.begin
        return await _done(lambda: act(str(sent.get("what", ""))), insights.state)


async def _done(work: Callable[[], Any], said: Callable[[], Any] | None = None) -> Response:
    """Run `work` in a thread and answer with its result, or with `said()`."""
    found = await asyncio.to_thread(work)
    return Answer(said() if said else found, headers={"Cache-Control": "no-store"})


def _names(sent: dict[str, Any]) -> list[str]:
    names = sent.get("pictures")
    if not isinstance(names, list) or len(names) > MOST_NAMES:
        raise BadRequest("no list of images")
    return [str(name) for name in names]


def _edit(sent: dict[str, Any], trigger: str) -> Edit:
    do = str(sent.get("do", ""))
    put = str(sent.get("put", "")).strip() or trigger if do == "trigger" else str(sent.get("put", ""))
    if do == "trigger" and not put:
        raise DatasetError("No trigger word yet; type one first.")
    return Edit(do, str(sent.get("find", "")), put, bool(sent.get("regex")), bool(sent.get("any_case")))
