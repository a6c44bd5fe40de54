"""Routes of the Dataset tab. The page gets the images as data: saving a caption costs a few hundred bytes,
not the grid."""

import functools
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from app.dataset.findings import BY_ITSELF
from app.dataset.gallery import gallery_data
from app.routes import Answer, BadRequest, Sent, add_actions, add_reads
from app.state import AppState
from app.train.form import Plan
from lora_core.data.captions import count_tags
from lora_core.errors import DatasetError
from lora_core.projects import caption_edits as bulk
from lora_core.projects.project import Project, leave_out, take_back

MOST_NAMES = 50_000


def add_dataset_routes(app: FastAPI, app_state: AppState) -> None:
    """Add the tab's routes to `app`."""
    project, importer = app_state.project, app_state.importer
    checker, insights = app_state.checker, app_state.insights
    app_state.live.feeds |= {
        "import": importer.state, "check": checker.progress, "insights": insights.progress,
    }  # fmt: skip

    def hold_out(sent: dict[str, Any]) -> dict[str, Any]:
        project.hold_out(_names(sent), bool(sent.get("on")))
        return {"revision": project.revision}

    def import_path(sent: dict[str, Any]) -> dict[str, Any]:
        importer.from_path(str(sent.get("path", "")), bool(sent.get("link")))
        return importer.state()

    def check(sent: dict[str, Any]) -> dict[str, Any]:
        if not sent.get("by_itself") or len(project.dataset().records) <= BY_ITSELF:
            checker.start()
        return checker.state()

    def measure(sent: dict[str, Any]) -> dict[str, Any]:
        act = insights.cancel if sent.get("do") == "cancel" else insights.begin
        act(str(sent.get("what", "")))
        return insights.state()

    def count_all_tags() -> dict[str, Any]:
        found = count_tags(record.caption for record in project.dataset().records)
        return {"tags": list(found.items()), "undo": bulk.last_change(project)}

    add_reads(
        app,
        {
            "dataset": lambda: gallery_data(project, Plan(project)),
            "tags": count_all_tags,
            "check": checker.state,
            "insights": insights.state,
        },
    )
    add_actions(
        app,
        {
            "leave-out": lambda sent: {"left_out": leave_out(project, _names(sent))},
            "take-back": lambda sent: {"taken_back": take_back(project, _names(sent))},
            "hold-out": hold_out,
            "import": import_path,
            "upload": lambda sent: {"batch": importer.begin()},
            "bulk": functools.partial(_edit_captions, project),
            "bulk/undo": lambda sent: _undo_edit(project),
            "check": check,
            "insights": measure,
        },
    )

    @app.put("/easel/upload/{batch}")
    async def receive(batch: str, request: Request) -> Response:
        return Answer({"received": await importer.receive(batch, request.stream())})

    @app.post("/easel/upload/{batch}")
    def finish(batch: str, sent: Sent) -> Response:
        if sent.get("give_up"):
            importer.give_up(batch)
            return Answer({"given_up": True})
        importer.finish(batch)
        return Answer(importer.state())


def _edit_captions(project: Project, sent: dict[str, Any]) -> dict[str, Any]:
    only = set(_names(sent)) if "pictures" in sent else None
    do, put = str(sent.get("do", "")), str(sent.get("put", ""))
    if do == "trigger":
        put = put.strip() or Plan(project).trigger
        if not put:
            raise DatasetError("No trigger word yet; type one first.")
    edit = bulk.Edit(do, str(sent.get("find", "")), put, bool(sent.get("regex")), bool(sent.get("any_case")))
    if not sent.get("apply"):
        return bulk.preview(project, edit, only)
    return {"changed": bulk.apply(project, edit, only), "undo": bulk.last_change(project)}


def _undo_edit(project: Project) -> dict[str, Any]:
    done, kept = bulk.undo(project)
    return {"undone": done, "kept": kept, "undo": bulk.last_change(project)}


def _names(sent: dict[str, Any]) -> list[str]:
    names = sent.get("pictures")
    if not isinstance(names, list) or len(names) > MOST_NAMES:
        raise BadRequest("no list of images")
    return [str(name) for name in names]
