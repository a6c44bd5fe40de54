"""The header above every tab: the active run with its buttons (another may be shown), the project picker,
whose list `assets/projects.js` fills when it opens, the documents and the doctor."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
from fastapi import FastAPI
from fastapi.responses import FileResponse, Response

from app.routes import BadRequest, add_actions, add_reads, below
from app.state import AppState, ShownRun, Snapshot
from app.templates import STATES, WORDS, _, card, format_clock, format_duration, render
from lora_core.errors import RunError
from lora_core.projects.project import DEMO_TITLE
from lora_core.projects.workspace import clean_caches, empty_trash, list_trash, restore, trash_folder
from lora_core.runs.events import Progress
from lora_core.system.files import ASSETS, IS_CHECKOUT, PACKAGE, SITE, folder_bytes, format_bytes
from lora_core.system.hardware import resident_bytes
from lora_core.system.processes import LANGUAGE, child_environment, detached

TITLE = "LoRA Easel"
DOCUMENTS = re.compile(r"[A-Z]+(\.md)?|(docs|assets/base)/.+\.(md|png|webp)")
"""Files of a checkout that are documents."""
SITE_TYPES = {".html", ".css", ".js", ".json", ".png", ".webp", ".svg", ".ico", ".license"}
DIAGNOSIS_SECONDS = 120
FEW_STEPS = 10
"""Steps needed to estimate the time of the rest."""


run_actions = card("header.html", part="acts")
"""Pause and Stop for a live run, Resume for one that can be resumed."""


def describe_left(run: ShownRun) -> str:
    """The time left; a range as long as few steps were done."""
    left = run.progress.seconds_left(run.view.config() if run.view else None)
    if left is None or len(run.progress.losses) >= FEW_STEPS:
        return format_clock(left)
    low, unit = format_duration(left).split(" ")
    high = format_duration(2 * left)
    return (
        _("{low} to {high}", low=low, high=high)
        if high.endswith(f" {unit}")
        else _("{low} {unit} to {high}", low=low, unit=unit, high=high)
    )


def describe_phase(progress: Progress) -> str:
    """What the run does now, in a sentence."""
    if not progress.phase:
        return _("Training.") if progress.stepping else _("Starting.")
    return _("{}, {}%.", _(progress.phase), int(100 * progress.phases.get(progress.phase, 0.0)))


def describe_run(run: ShownRun) -> str:
    """A run in one line."""
    progress = run.progress
    match run.state:
        case "preparing":
            return _("Preparing: {phase}", phase=describe_phase(progress)[:-1])
        case "running" | "pausing" | "stopping":
            verb = "" if run.state == "running" else f"{_(STATES[run.state][0])}, "
            left = _(", {time} left", time=describe_left(run)) if run.state == "running" else ""
            return _("{}{}%, step {:,} of {:,}{}", verb, run.percent, progress.step, progress.steps, left)
        case "done":
            return _("{name}: done, {step:,} steps", name=run.name, step=progress.step)
        case _:
            at = _(" at step {:,} of {:,}", progress.step, progress.steps) if progress.steps else ""
            early = _(" early") if run.state == "stopped" and progress.stopped_early else ""
            return f"{run.name}: {_(STATES[run.state][0]).lower()}{early}{at}"


draft_note = card("header.html", part="draft")
"""A note that the draft was set aside, if it was."""


def page_title(snapshot: Snapshot) -> str:
    """Title of the browser's tab: percent and run."""
    run = snapshot.active
    if run.state in ("running", "pausing", "stopping"):
        return f"{run.percent}% \N{MIDDLE DOT} {run.name}"
    if run.state in ("preparing", "done", "failed", "interrupted"):
        return f"{_(STATES[run.state][0])} \N{MIDDLE DOT} {run.name}"
    return TITLE


run_bar = card("header.html", part="run", title=page_title, words=lambda snap: describe_run(snap.active))
"""Progress bar and text; the page's title and the tabs' badges are attached as data."""


def memory_usage(snapshot: Snapshot) -> str:
    """Memory in use, of the GPU if there is one, else by the run; rounded so that it does not flicker."""
    view = snapshot.active.view
    config, process = (view.config(), view.run.live_process()) if view else (None, None)
    card = snapshot.app_state.hardware.card(config.train.device if process and config else None)
    held, used = round((resident_bytes(process) or 0) / 1e8) / 10, psutil.virtual_memory()
    on_card = card.by_process.get(process.pid) if card and process else None
    return render("header.html", part="memory", card=card, held=held, used=used, on_card=on_card)


def brand() -> str:
    """The logo and the name."""
    icon = (ASSETS / "icon.svg").read_text(encoding="utf-8")
    return render("header.html", part="brand", icon=icon, name=TITLE)


project_button = card("project_button.html", demo_title=DEMO_TITLE)
"""The open project's name; opens the dialog."""


def add_project_routes(app: FastAPI, app_state: AppState) -> None:
    """Add the picker's routes to `app`."""
    add_reads(app, {"projects": lambda: _shelves(app_state), "doctor": lambda: _checks(app_state.workspace)})
    app.get("/easel/doctor.zip")(lambda: _bug_report(app_state.workspace))
    app.get("/easel/docs/{path:path}")(_document)
    add_actions(app, {"projects": lambda sent: _change(app_state, sent)})


def _diagnose(workspace: Path, *options: str, language: str = "en") -> dict[str, Any]:
    """What `lora-easel doctor` finds, in a process of its own: PyTorch, which it imports, may be broken.

    Raises:
        RunError: it does not answer.
    """
    command = [sys.executable, "-m", "lora_core", "doctor", "--json", "--workspace", str(workspace), *options]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", timeout=DIAGNOSIS_SECONDS, check=False,
            env=child_environment(workspace) | {LANGUAGE: language}, **detached(),
        )  # fmt: skip
        return dict(json.loads(done.stdout))
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        raise RunError(_("The doctor does not answer; run `lora-easel doctor` to see why.")) from error


def _checks(workspace: Path) -> dict[str, str]:
    """The doctor's dialog: problems first."""
    rows = sorted(_diagnose(workspace, language=WORDS.language)["checks"], key=lambda row: row["ok"])
    wrong = sum(not row["ok"] for row in rows)
    return {
        "html": render("header.html", part="doctor", checks=rows, wrong=wrong, has_documents=has_documents())
    }


def has_documents() -> bool:
    """Whether this installation has the documents."""
    return SITE.is_file() or IS_CHECKOUT


def _document(path: str) -> Response:
    """A file of the documents: of their site, or where that was not built, of its sources.

    Raises:
        BadRequest: no such document.
    """
    if SITE.is_file():
        return FileResponse(below(SITE.parent, path or SITE.name, SITE_TYPES))
    path = path or "README.md"
    if not IS_CHECKOUT or not DOCUMENTS.fullmatch(os.path.normpath(path).replace(os.sep, "/")):
        raise BadRequest(path)
    file = below(PACKAGE.parent, path, {".md", ".png", ".webp", ""})
    if file.suffix != ".md":
        return FileResponse(file)
    from markdown_it import MarkdownIt

    text = MarkdownIt("commonmark").enable("table").render(file.read_text("utf-8"))
    return Response(render("document.html", title=path, text=text), media_type="text/html")


def _bug_report(workspace: Path) -> Response:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "doctor.zip"
        _diagnose(workspace, "--zip", str(file))
        headers = {"Content-Disposition": 'attachment; filename="lora-easel-doctor.zip"'}
        return Response(file.read_bytes(), media_type="application/zip", headers=headers)


def _change(app_state: AppState, sent: dict[str, Any]) -> dict[str, Any]:
    """Apply an action of the picker; the page reloads if another project is open afterwards."""
    do, key, title = (str(sent.get(name, "")) for name in ("do", "project", "title"))
    if app_state.importer.working:
        raise RunError(_("Images are being imported; wait until that is done."))
    before, projects = app_state.project.path, app_state.projects
    note = place = ""
    match do:
        case "new":
            projects.new(title)
        case "open":
            projects.open(key)
        case "rename":
            projects.rename(key, title)
        case "delete":
            place = projects.delete(key).parent.name
            note = _("{name} is in the trash.", name=title or key)
        case "clean" | "empty":
            frees = clean_caches if do == "clean" else empty_trash
            note = _("{size} freed.", size=format_bytes(frees(app_state.workspace)))
        case "restore":
            note = _restored(app_state, key)
        case _:
            raise BadRequest("no such action")
    switched = app_state.project.path != before
    if switched:
        app_state.reset_project_view()
    return {**_shelves(app_state), "switched": switched, "done": note, "place": place}


def _restored(app_state: AppState, place: str) -> str:
    """Restore an item from the trash and say under which name.

    Raises:
        RunError: it is not in the trash any more, or the disk refuses.
    """
    one = next((one for one in list_trash(app_state.workspace) if one.place.name == place), None)
    if one is None:
        raise RunError(_("It is no longer in the trash."))
    path = restore(one, app_state.workspace)
    if path.name == one.name:
        return _("{name} is restored.", name=one.name)
    return _("{name} is restored as {other}, because its name is taken.", name=one.name, other=path.name)


def _shelves(app_state: AppState) -> dict[str, Any]:
    projects, workspace = app_state.projects.list_projects(), app_state.workspace
    folders = {"caches": workspace / "cache", "trash": trash_folder(workspace), "runs": workspace / "runs"}
    sizes = {name: folder_bytes(folder) for name, folder in folders.items()}
    shown = {
        "projects": [dataclasses.asdict(one) | {"size": format_bytes(one.size)} for one in projects],
        "trashed": [
            one.row() | {"size": format_bytes(folder_bytes(one.place))} for one in list_trash(workspace)
        ],
        **{name: format_bytes(size) if size else "" for name, size in sizes.items()},
    }
    return shown | {"html": render("projects.html", part="list", **shown)}
