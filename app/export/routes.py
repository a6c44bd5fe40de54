"""Routes of the Export tab: "Look inside", the report, and the files they make."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, Response

from app.export.lora_tools import (
    TOOLS,
    BackgroundTask,
    build_worker_request,
    check_memory_is_free,
    free_path,
    list_choices,
)
from app.export.lora_tools_results import POLICY, REPORT, report_done, result_html, written_html
from app.jobs import RunView
from app.preview.request_form import ADDED
from app.routes import Answer, BadRequest, below, read_sent_json
from app.state import AppState
from lora_core.errors import AdapterFileError, RunError
from lora_core.runs.folder import check_run_name, runs_folder

FRESH = {"Cache-Control": "no-store"}


def add_export_routes(app: FastAPI, app_state: AppState) -> None:
    """Add the tab's routes to `app`."""
    look = _Look(app_state)
    report = BackgroundTask(app_state.worker)

    async def answer(do: Callable[..., Any], *given: Any) -> Response:
        return Answer(await asyncio.to_thread(do, *given) or {"done": True}, headers=FRESH)

    app.get("/easel/inside/choices")(lambda: Answer(list_choices(app_state), headers=FRESH))

    @app.post("/easel/inside/start")
    async def start(request: Request) -> Response:
        return await answer(look.start, await read_sent_json(request))

    @app.post("/easel/inside/act")
    async def act(request: Request) -> Response:
        return await answer(look.act, await read_sent_json(request))

    @app.post("/easel/inside/go-on")
    async def go_on(request: Request) -> Response:
        return await answer(train_on, app_state, str((await read_sent_json(request)).get("file", "")))

    @app.get("/easel/inside/numbers.json")
    async def numbers() -> Response:
        text = json.dumps(look.numbers(), indent=1)
        headers = {"Content-Disposition": 'attachment; filename="numbers.json"', **FRESH}
        return Response(text, media_type="application/json", headers=headers)

    @app.get("/easel/made/{file}")
    async def made(file: str) -> Response:
        whole = below(app_state.project.path / ADDED, file, {".safetensors"})
        return FileResponse(whole, filename=whole.name, media_type="application/octet-stream")

    @app.post("/easel/report/start")
    async def start_report(request: Request) -> Response:
        return await answer(begin_report_task, app_state, report, await read_sent_json(request))

    for name, job in (("inside", look.job), ("report", report)):
        _follow(app, name, job)

    @app.get("/easel/report/of/{run}")
    async def page(run: str, download: int = 0) -> Response:
        whole = below(runs_folder(app_state.workspace), f"{check_run_name(run)}/{REPORT}", {".html"})
        name = f"{run}.html" if download else None
        headers = {"Content-Security-Policy": POLICY, **FRESH}
        return FileResponse(whole, filename=name, media_type="text/html", headers=headers)


def _follow(app: FastAPI, name: str, job: BackgroundTask) -> None:
    """Routes for a task's progress and cancellation."""

    @app.get(f"/easel/{name}/now")
    async def now(known: int = -1) -> Response:
        return Answer(await asyncio.to_thread(job.now, known), headers=FRESH)

    @app.post(f"/easel/{name}/cancel")
    async def cancel(request: Request) -> Response:
        await read_sent_json(request)
        job.cancel()
        return Answer({"done": True}, headers=FRESH)


class _Look:
    """Runs the tools, one at a time, and keeps the last result for follow-up actions."""

    def __init__(self, app_state: AppState) -> None:
        self.job = BackgroundTask(app_state.worker)
        self._desk = app_state
        self._asked: dict[str, Any] = {}
        self._found: dict[str, Any] = {}
        self._html = ""

    def start(self, sent: dict[str, Any]) -> None:
        """Start what a page asks for.

        Raises:
            LoraError: something is missing.
        """
        tool = str(sent.get("tool"))
        request = build_worker_request(self._desk, tool, sent)

        def shows(result: dict[str, Any]) -> str:
            self._asked, self._found = request, result
            if TOOLS[tool].makes == "base":
                self._desk.places.keep_base(str(result["file"]))
            self._html = result_html(tool, request, self._linked(result))
            return self._html

        self.job.start(TOOLS[tool].title, request, shows)

    def act(self, sent: dict[str, Any]) -> None:
        """Make the file that a measurement proposed.

        Raises:
            RunError: nothing was measured that it could be made of.
        """
        do, asked, found = str(sent.get("do")), self._asked, self._found
        if do == "shrink" and "intrinsic" in found:
            more, suffix = {"ranks": found["intrinsic"]["ranks"]}, f"rank{found['intrinsic']['rank']}"
        elif do == "bake" and "strength" in found:
            more, suffix = {"strengths": found["strength"]["strengths"]}, "baked"
        else:
            raise RunError("Measure first; there is no result to make a file from.")
        before = self._html
        out = free_path(self._desk, asked["file"], suffix)
        request = {"do": do, "file": asked["file"], "out": str(out), **more}
        self.job.start(
            "Writing the file", request, lambda result: f"{written_html(self._linked(result))}{before}"
        )

    def numbers(self) -> dict[str, Any]:
        """The last result."""
        return {key: value for key, value in self._found.items() if key not in ("id", "event")}

    def _linked(self, result: dict[str, Any]) -> dict[str, Any]:
        """Add the URL and the location of a file that was made."""
        if "file" not in result:
            return result
        file, runs = Path(str(result["file"])), runs_folder(self._desk.workspace)
        link = f"/easel/made/{quote(file.name)}" if file.parent.name == ADDED else ""
        if file.is_relative_to(runs):
            link = f"/easel/download/{quote(file.relative_to(runs).parts[0])}/{quote(file.name)}"
        return {**result, "link": link, "place": self._desk.files.place(file, "It is at")}


def train_on(app_state: AppState, name: str) -> None:
    """Make the Train form start from a LoRA file.

    Raises:
        AdapterFileError: it is gone.
    """
    file = Path(name)
    if not name or not file.is_file():
        raise AdapterFileError(f"There is no file at {name}; choose another.")
    values = dict(app_state.project.draft().get("values") or {})
    app_state.project.update_draft(values={**values, "adapter.init": str(file)})


def begin_report_task(app_state: AppState, job: BackgroundTask, sent: dict[str, Any]) -> None:
    """Start making the report of a run.

    Raises:
        RunError: a report is being made, or it would measure while a run is going on.
        BadRequest: there is no such run.
    """
    name = str(sent.get("run", ""))
    run_view: RunView | None = next((w for w in app_state.jobs.all() if w.run.name == name), None)
    if run_view is None:
        raise BadRequest(name)
    if sent.get("measure"):
        check_memory_is_free(app_state)
    request = {"do": "report", "run": str(run_view.run.path), "measure": bool(sent.get("measure"))}
    job.start("Report", request, lambda result: report_done(name, result))
