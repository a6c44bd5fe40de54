"""The project picker: a button in the header, the dialog behind it and its routes.

`assets/projects.js` fills the dialog's list when it opens.
"""

import dataclasses
from typing import Any

from fastapi import FastAPI

from app.formatting import format_bytes
from app.routes import BadRequest, add_actions, add_reads
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
    add_reads(app, {"projects": lambda: _shelves(app_state)})
    add_actions(app, {"projects": lambda sent: _change(app_state, sent)})


def _change(app_state: AppState, sent: dict[str, Any]) -> dict[str, Any]:
    """Apply an action of the picker; the page reloads if another project is open afterwards."""
    do, key, title = (str(sent.get(name, "")) for name in ("do", "project", "title"))
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
    projects, workspace = app_state.projects.list_projects(), app_state.workspace
    folders = {"caches": workspace / "cache", "trash": trash_folder(workspace), "runs": workspace / "runs"}
    sizes = {name: folder_bytes(folder) for name, folder in folders.items()}
    trashed = [(one, format_bytes(folder_bytes(one.place))) for one in list_trash(workspace)]
    return {
        "projects": [dataclasses.asdict(one) | {"size": format_bytes(one.size)} for one in projects],
        "trashed": [one.row() | {"size": size} for one, size in trashed],
        **{name: format_bytes(size) if size else "" for name, size in sizes.items()},
    }
