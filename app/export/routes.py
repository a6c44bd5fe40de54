"""Routes of the Export tab: writing, copying, and the report."""

import functools
from typing import Any

from fastapi import FastAPI
from fastapi.responses import FileResponse, Response

from app.export.view import REPORT, choose, copy, export
from app.jobs import RunView
from app.routes import FRESH, BadRequest, add_actions, below
from app.state import AppState
from app.templates import note_html
from app.toolbox.tools import check_memory_is_free
from app.worker_task import BackgroundTask, add_task
from lora_core.report.plots import content_policy
from lora_core.runs.folder import check_run_name, runs_folder


def add_export_routes(app: FastAPI, app_state: AppState) -> None:
    """Add the tab's routes to `app`."""
    report = BackgroundTask(app_state.worker)
    add_task(app, app_state.live, "report", report)

    actions = {"choose": choose, "write": export, "copy": copy}
    add_actions(app, "export", {name: functools.partial(act, app_state) for name, act in actions.items()})
    add_actions(app, "report", {"start": functools.partial(begin_report_task, app_state, report)})

    @app.get("/easel/report/of/{run}")
    async def page(run: str, download: int = 0) -> Response:
        whole = below(runs_folder(app_state.workspace), f"{check_run_name(run)}/{REPORT}", {".html"})
        name = f"{run}.html" if download else None
        # A report is made of what people and files say: its scripts, which draw the charts, are kept from the
        # window by an origin of their own, and no others run.
        headers = {"Content-Security-Policy": f"{content_policy()}; sandbox allow-scripts", **FRESH}
        return FileResponse(whole, filename=name, media_type="text/html", headers=headers)


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
    job.start("Report", request, lambda result: note_html(f"The report of {name} is made."))
