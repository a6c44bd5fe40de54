"""The project picker: a button in the header, the dialog behind it and its routes.

`assets/projects.js` fills the dialog's list when it opens.
"""

import asyncio
import dataclasses
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from app.formatting import format_bytes
from app.routes import Answer, BadRequest, read_sent_json
from app.state import AppState, Snapshot
from app.templates import render
from lora_core.errors import RunError
from lora_core.projects.project import DEMO_TITLE
from lora_core.runs.storage import clean_caches, empty_trash, list_trash, restore, trash_folder
from lora_core.system.files import folder_bytes


def project_button(snapshot: Snapshot) -> str:
    """The open project's name; opens the dialog."""
    project = snapshot.app_state.project
    return render(
        "project_button.html", title=project.title, demo=project.uses_demo and project.title != DEMO_TITLE
    )


def add_project_routes(app: FastAPI, app_state: AppState) -> None:
    """Add the picker's routes to `app`."""

    @app.get("/easel/projects")
    async def listed() -> Response:
        return await _answer_in_thread(lambda: _shelves(app_state))

    @app.post("/easel/projects")
    async def change(request: Request) -> Response:
        sent = await read_sent_json(request)
        do, key, title = (str(sent.get(name, "")) for name in ("do", "project", "title"))
        return await _answer_in_thread(lambda: _changed(app_state, do, key, title))


def _changed(app_state: AppState, do: str, key: str, title: str) -> dict[str, Any]:
    """Apply an action of the picker; the page reloads if another project is open afterwards."""
    if app_state.importer.working:
        raise RunError("Images are being imported; wait until that is done.")
    before, projects = app_state.project.path, app_state.projects
    said = ""
    match do:
        case "new":
            projects.new(title)
        case "open":
            projects.open(key)
        case "rename":
            projects.rename(key, title)
        case "delete":
            projects.delete(key)
        case "clean":
            said = f"{format_bytes(clean_caches(app_state.workspace))} freed."
        case "empty":
            size = folder_bytes(trash_folder(app_state.workspace))
            empty_trash(app_state.workspace)
            said = f"{format_bytes(size)} freed."
        case "restore":
            said = _restored(app_state, key)
        case _:
            raise BadRequest("no such action")
    switched = app_state.project.path != before
    if switched:
        app_state.reset_project_view()
    return {**_shelves(app_state), "switched": switched, "said": said}


def _restored(app_state: AppState, place: str) -> str:
    """Restore an item from the trash and say under which name.

    Raises:
        RunError: it is not in the trash any more, or the disk refuses.
    """
    one = next((one for one in list_trash(app_state.workspace) if one.place.name == place), None)
    if one is None:
        raise RunError("It is no longer in the trash.")
    path = restore(one, app_state.workspace)
    if path.name == one.name:
        return f"{one.name} is restored."
    return f"{one.name} is restored as {path.name}, because its name is taken."


def _shelves(app_state: AppState) -> dict[str, Any]:
    shelved = [
        dataclasses.asdict(one) | {"size": format_bytes(one.size)}
        for one in app_state.projects.list_projects()
    ]
    caches, trash = (
        folder_bytes(app_state.workspace / "cache"),
        folder_bytes(trash_folder(app_state.workspace)),
    )
    runs = folder_bytes(app_state.workspace / "runs")
    return {
        "projects": shelved,
        "caches": format_bytes(caches) if caches else "",
        "trash": format_bytes(trash) if trash else "",
        "trashed": [
            one.row() | {"size": format_bytes(folder_bytes(one.place))}
            for one in list_trash(app_state.workspace)
        ],
        "runs": format_bytes(runs) if runs else "",
    }


async def _answer_in_thread(work: Any) -> Response:
    return Answer(await asyncio.to_thread(work), headers={"Cache-Control": "no-store"})
