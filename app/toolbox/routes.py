"""Routes of the Toolbox: its tools, and the files they make."""

import functools
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, Response

from app.preview.loras import ADDED
from app.routes import FRESH, Answer, add_actions, below, receive_file
from app.state import AppState
from app.toolbox.tools import TOOLS, build_worker_request, free_path, list_choices
from app.toolbox.view import result_html, written_html
from app.worker_task import BackgroundTask, add_task
from lora_core.errors import AdapterFileError, RunError
from lora_core.runs.folder import runs_folder


def add_toolbox_routes(app: FastAPI, app_state: AppState) -> None:
    """Add the tab's routes to `app`."""
    toolbox = Toolbox(app_state)
    add_task(app, app_state.live, "toolbox", toolbox.task)

    app.get("/easel/toolbox/choices")(lambda: Answer(list_choices(app_state), headers=FRESH))
    go_on = functools.partial(train_on, app_state)
    add_actions(app, "toolbox", {"start": toolbox.start, "act": toolbox.act, "go-on": go_on})

    @app.post("/easel/toolbox/file")
    async def file(request: Request, name: str) -> Response:
        path = await receive_file(request, app_state.workspace / "tmp" / "dropped", name)
        return Answer({"file": str(path)}, headers=FRESH)

    @app.get("/easel/toolbox/numbers.json")
    async def numbers(tool: str = "") -> Response:
        found = {key: value for key, value in toolbox.found(tool).items() if key not in ("id", "event")}
        text = json.dumps(found, indent=1)
        headers = {"Content-Disposition": 'attachment; filename="numbers.json"', **FRESH}
        return Response(text, media_type="application/json", headers=headers)

    @app.get("/easel/made/{file}")
    async def made(file: str) -> Response:
        whole = below(app_state.project.path / ADDED, file, {".safetensors"})
        return FileResponse(whole, filename=whole.name, media_type="application/octet-stream")


class Toolbox:
    """Runs the tools, one at a time, and keeps the last result of each for follow-up actions."""

    def __init__(self, app_state: AppState) -> None:
        """Start without a result."""
        self.task = BackgroundTask(app_state.worker)
        self._app_state = app_state
        self._results: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {}

    def found(self, tool: str) -> dict[str, Any]:
        """The last result of a tool; a page shows those of several."""
        return self._results[tool][1] if tool in self._results else {}

    def start(self, sent: dict[str, Any]) -> None:
        """Start what a page asks for.

        Raises:
            LoraError: something is missing.
        """
        tool = str(sent.get("tool"))
        request = build_worker_request(self._app_state, tool, sent)

        def shows(result: dict[str, Any]) -> str:
            if TOOLS[tool].makes == "base":
                self._app_state.places.keep("bases", str(result["file"]))
            if tool == "strength":
                self._keep_best(str(request["file"]), result["strength"]["strengths"])
            html = result_html(tool, request, self._linked(result))
            self._results[tool] = request, result, html
            return html

        self.task.start(TOOLS[tool].title, request, shows, tool)

    def act(self, sent: dict[str, Any]) -> None:
        """Make the file that a measurement proposed.

        Raises:
            RunError: nothing was measured that it could be made of.
        """
        do = str(sent.get("do"))
        tool = {"shrink": "intrinsic", "bake": "strength"}.get(do, "")
        if tool not in self._results:
            raise RunError("Measure first; there is no result to make a file from.")
        asked, result, before = self._results[tool]
        found = result[tool]
        if do == "shrink":
            more, suffix = {"ranks": found["ranks"]}, f"rank{found['rank']}"
        else:
            more, suffix = {"strengths": found["strengths"]}, "baked"
        out = free_path(self._app_state, asked["file"], suffix)
        request = {"do": do, "file": asked["file"], "out": str(out), **more}
        self.task.start(
            "Writing the file",
            request,
            lambda result: f"{written_html(self._linked(result))}{before}",
            tool,
        )

    def _keep_best(self, file: str, strengths: list[float]) -> None:
        """Keep a measured strength of the whole adapter, which the Preview tab marks at its slider."""
        if len(strengths) == 1:
            known = dict(self._app_state.project.draft().get("best_strengths") or {})
            best = known | {file: round(float(strengths[0]), 2)}
            self._app_state.project.update_draft(best_strengths=best)

    def _linked(self, result: dict[str, Any]) -> dict[str, Any]:
        """Add the URL and the location of a file that was made."""
        if "file" not in result:
            return result
        file, runs = Path(str(result["file"])), runs_folder(self._app_state.workspace)
        link = f"/easel/made/{quote(file.name)}" if file.parent.name == ADDED else ""
        if file.is_relative_to(runs):
            link = f"/easel/download/{quote(file.relative_to(runs).parts[0])}/{quote(file.name)}"
        return {**result, "link": link, "place": self._app_state.files.place(file, "Saved to")}


def train_on(app_state: AppState, sent: dict[str, Any]) -> None:
    """Make the Train form start from a LoRA file.

    Raises:
        AdapterFileError: it is gone.
    """
    file = Path(str(sent.get("file", "")))
    if not file.is_file():
        raise AdapterFileError(f"There is no file at {file}; choose another.")
    values = dict(app_state.project.draft().get("values") or {})
    app_state.project.update_draft(values={**values, "adapter.init": str(file)})
