"""The Export tab: the values of its templates, its routes, and what its buttons do: write a checkpoint as a
file for other tools, copy it to one of them, upload it, and make the report of a run."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
from fastapi import FastAPI
from fastapi.responses import FileResponse, Response

from app.jobs import RunView
from app.preview.request_form import checkpoint_choices
from app.routes import FRESH, BadRequest, add_actions, below, run_url
from app.state import AppState, Bindings, Snapshot, take_snapshot
from app.templates import _, html_block, note_html, render
from app.toolbox.view import (
    CHECKPOINT,
    BackgroundTask,
    add_task,
    check_memory_is_free,
    compatibility_card,
    keep_best_strength,
)
from lora_core.errors import LoraError, RunError
from lora_core.model_files.detect import lookup_base
from lora_core.model_files.hub import files_to_upload
from lora_core.model_files.hub import upload as upload_files
from lora_core.report.plots import content_policy, with_own_scripts
from lora_core.runs.folder import check_run_name, runs_folder
from lora_core.settings.schema import FORMATS
from lora_core.system.files import expand_home, file_bytes
from lora_core.system.other_tools import CopiedFile, copy_export

PRECISIONS = {"fp16": "fp16, half the size", "bf16": "bf16", "fp32": "fp32, exact"}
REPORT = "report.html"


def build_export(bindings: Bindings) -> None:
    """Lay out the tab."""
    formats = {key: row.title for key, row in FORMATS.items()}
    with gr.Row(elem_classes="page page-export"):
        with gr.Column(elem_classes="main card"):
            bindings.follow(html_block(), checkpoint_cards)
            html_block(lambda: render("export/form.html", formats=formats, precisions=PRECISIONS))
            bindings.follow(html_block(), copy_folders)
            html_block(lambda: render("export/written.html"))
        with gr.Column(elem_classes="main"):
            html_block(lambda: compatibility_card(None), elem_id="works-in")
            with gr.Column(elem_classes="card"):
                bindings.follow(html_block(), report_card)
                html_block(lambda: render("export/report_state.html"))
            with gr.Column(elem_classes="card"):
                html_block(lambda: render("export/upload.html"))
    bindings.follow(html_block(elem_classes="foot"), export_buttons)


def runs_with_checkpoints(snapshot: Snapshot) -> list[RunView]:
    """Runs that can be exported, those of the open project first."""
    there = [run_view for run_view, _ in snapshot.runs if run_view.run.checkpoint_steps()]
    return sorted(there, key=lambda run_view: not snapshot.app_state.jobs.own(run_view))


def chosen_run(snapshot: Snapshot) -> RunView | None:
    """The run that the user chose, else the newest of the project."""
    there = runs_with_checkpoints(snapshot)
    kept, own = snapshot.app_state.project.draft().get("export_run"), snapshot.app_state.jobs.own
    return next((w for w in there if w.run.name == kept), next(filter(own, there), None))


def chosen_checkpoint(snapshot: Snapshot, run_view: RunView) -> str:
    """The checkpoint that the user chose, else the best."""
    keys = [key for _, key in checkpoint_choices(run_view)]
    kept = str(snapshot.app_state.project.draft().get("export_checkpoint") or "")
    return kept if kept in keys else keys[0] if keys else ""


def chosen_analysis(snapshot: Snapshot, run_view: RunView) -> Any:
    """What a report measured of the chosen checkpoint, where a lower rank pays; else None."""
    chosen, steps = chosen_checkpoint(snapshot, run_view), run_view.run.checkpoint_steps()
    # Not `step_of`, which reads all events.
    named: dict[str, Any] = {"best": run_view.progress.best_step, "last": max(steps, default=0), "": 0}
    found = run_view.run.analysis(int(named.get(chosen, chosen)))
    return found if found and found.cut_pays else None


def checkpoint_cards(snapshot: Snapshot) -> str:
    """The run and its checkpoints; best and last as cards, each with its latest sample and improvement."""
    app_state, run_view = snapshot.app_state, chosen_run(snapshot)
    runs = [(w.run.name, app_state.jobs.own(w)) for w in runs_with_checkpoints(snapshot)]
    if run_view is None:
        return render("export/cards.html", run=None, runs=runs)
    steps, chosen = run_view.run.checkpoint_steps(), chosen_checkpoint(snapshot, run_view)
    best, last = run_view.progress.best_step, steps[-1]
    cards = [(_("Best and last") if best == last else _("Best"), "best", best)] if best in steps else []
    if last != best:
        cards.append((_("Last"), "last", last))
    if chosen in map(str, steps):
        cards.append((_("Step"), chosen, int(chosen)))
    return render(
        "export/cards.html",
        run=run_view.run,
        progress=run_view.progress,
        runs=runs,
        cards=cards,
        chosen="best" if chosen == "last" and last == best else chosen,
        choices=checkpoint_choices(run_view),
        analysis=chosen_analysis(snapshot, run_view),
        size=app_state.project.draft().get("export_size"),
        portable=_portable(run_view),
        url=run_url(app_state),
    )


def export_buttons(snapshot: Snapshot) -> str:
    """The foot: the buttons, and the size of the file to come."""
    view = chosen_run(snapshot)
    if view is None:
        return render("export/buttons.html", why=_("No checkpoint yet. Train a run first."), size=0)
    size: float = file_bytes(view.run.checkpoint(max(view.run.checkpoint_steps(), default=0)) / CHECKPOINT)
    found = chosen_analysis(snapshot, view)
    if found and snapshot.app_state.project.draft().get("export_size") == "measured":
        size /= found.times_smaller
    elif (ranks := view.progress.ranks) and 0 < ranks.parameters < 1:
        size *= ranks.parameters
    return render("export/buttons.html", why="", size=size)


def copy_folders(snapshot: Snapshot) -> str:
    """The folders to copy to."""
    app_state, choices = snapshot.app_state, folder_choices(snapshot.app_state)
    wanted = [str(app_state.project.draft().get("copy_to") or ""), *app_state.places.read("lora_folders")]
    there = [folder for _, folder in choices]
    usual = next((f for f in wanted if f in there or (f and Path(f).is_dir())), there[0] if there else "")
    names = [
        tool.name
        for tool, _ in app_state.tools.shelves()
        if tool.loras is None and tool.root not in tool.models
    ]
    return render(
        "export/folders.html",
        apps=app_state.tools.lora_folders(),
        short=_short,
        choices=choices,
        usual=usual,
        own_lists=list(dict.fromkeys(names)),
    )


def choose(app_state: AppState, sent: dict[str, Any]) -> None:
    """Store the chosen run, checkpoint and size, or the folder to copy to."""
    known = {
        "run": "export_run", "checkpoint": "export_checkpoint", "size": "export_size", "folder": "copy_to",
    }  # fmt: skip
    # What was measured of one run says nothing of another.
    sent = {"size": "", **sent} if "run" in sent else sent
    app_state.project.update_draft(**{known[key]: str(sent[key]) for key in known if key in sent})


def export(app_state: AppState, sent: dict[str, Any]) -> dict[str, Any]:
    """Write the file; returns HTML for the foot, of what can be done with the file and of the tools that read
    it, and the download link.

    Raises:
        LoraError: it could not be written.
    """
    run_view, result = write_export(app_state, sent)
    file = Path(str(result["file"]))
    link = f"/easel/download/{quote(run_view.run.name)}/{quote(file.name)}"
    places = [app_state.files.place(file, _("Saved to"))]
    if result.get("raw"):
        words = _("It holds the EMA weights; the raw ones are at")
        places.append(app_state.files.place(Path(result["raw"]), words))
    return {
        **written_file(result, str(sent.get("precision")), link, places),
        "works_in": compatibility_card(result),
        "link": link,
    }


def written_file(result: Mapping[str, Any], precision: str, link: str, places: list[str]) -> dict[str, str]:
    """What the file is, for the foot (`will`), and what to do with it: a download link, its location."""
    values = {"result": result, "name": Path(str(result["file"])).name, "precision": precision}
    more = {"link": link, "places": places}
    parts = ("will", "written")
    return {part: render("export/written_file.html", part=part, **values, **more) for part in parts}


def copy(app_state: AppState, sent: dict[str, Any]) -> dict[str, Any]:
    """Write the file and copy it to a folder of another tool.

    Raises:
        LoraError: no such folder, or the file could not be written.
    """
    target = check_folder(str(sent.get("folder") or ""))
    _, result = write_export(app_state, sent)
    done = copy_export(Path(str(result["file"])), target)
    app_state.places.keep("lora_folders", str(target))
    return {"copied": copied_line(app_state, done), "works_in": compatibility_card(result)}


def upload(app_state: AppState, sent: dict[str, Any]) -> dict[str, Any]:
    """Write the file and upload it with its model card to a private repository of the hub.

    Raises:
        LoraError: the file could not be written, nobody is logged in, or the hub refuses.
    """
    repo, license = (str(sent.get(key) or "").strip() for key in ("repo", "license"))
    if not repo:
        raise RunError(_("Type the repository to upload to, as owner/name."))
    _run, result = write_export(app_state, sent)
    file = Path(str(result["file"]))
    files = files_to_upload(file, file.with_suffix(".md").read_text("utf-8"), license)
    url, written = upload_files(repo, files)
    note = render("export/uploaded.html", url=url, kept="README.md" not in written, license=license)
    return {"copied": note, "works_in": compatibility_card(result)}


def write_export(app_state: AppState, sent: dict[str, Any]) -> tuple[RunView, dict[str, Any]]:
    """Have the worker write the file; returns the run and the worker's answer.

    Raises:
        LoraError: no such run, the name is not a file's, or the worker could not write it.
    """
    names = ("run", "checkpoint", "name", "format", "precision")
    run, checkpoint, name, form, precision = (str(sent.get(key) or "") for key in names)
    run_view = next((w for w, _ in take_snapshot(app_state).runs if w.run.name == run), None)
    if run_view is None:
        raise LoraError(_("Choose a run first; none has a checkpoint yet."))
    stem = check_run_name(name.strip().removesuffix(".safetensors") or run_view.run.name)
    request = {
        "do": "export", "run": str(run_view.run.path), "checkpoint": checkpoint or "last", "name": stem,
        "format": form, "precision": precision, "measured_rank": sent.get("size") == "measured",
    }  # fmt: skip
    reply = app_state.worker.ask(request)
    if reply.state == "error":
        raise LoraError(reply.message)
    return run_view, reply.result


def _portable(run_view: RunView) -> bool:
    """Whether other tools have the base that a run was trained on."""
    config = run_view.config()
    family = lookup_base(config.model.base).family if config else None
    return family is None or family.portable


def folder_choices(app_state: AppState) -> list[tuple[str, str]]:
    """Folders a LoRA can be copied to, as (label, path): tools' folders first, then earlier ones."""
    found = [(f"{name}: {_short(folder)}", str(folder)) for name, folder in app_state.tools.lora_folders()]
    known = {Path(folder).resolve() for _, folder in found}
    before = [folder for folder in map(Path, app_state.places.read("lora_folders")) if folder.is_dir()]
    return found + [(_short(folder), str(folder)) for folder in before if folder.resolve() not in known]


def _short(folder: Path) -> str:
    """A path with ~ for the home folder."""
    home = Path.home()
    return f"~/{folder.relative_to(home).as_posix()}" if folder.is_relative_to(home) else str(folder)


def check_folder(text: str | None) -> Path:
    """Check the folder that was chosen or typed.

    Raises:
        RunError: nothing was, or it is not a folder.
    """
    name = (text or "").strip().strip('"')
    if not name:
        raise RunError(_("Choose a folder to copy to, or type its path."))
    folder = expand_home(name)
    if not folder.is_dir():
        raise RunError(_("There is no folder at {folder}; make it first, or choose another.", folder=folder))
    return folder.absolute()


def copied_line(app_state: AppState, done: CopiedFile) -> str:
    """The copied files and their location."""
    tools = [name for name, f in app_state.tools.lora_folders() if f.resolve() == done.file.parent.resolve()]
    kept = [file.name for file in done.kept]
    place = app_state.files.place(done.file, _("Saved to"))
    return render("export/copied.html", done=done, tool=tools[0] if tools else "", kept=kept, place=place)


# The report of a run.


def report_card(snapshot: Snapshot) -> str:
    """The button that makes the chosen run's report, and the report if it exists."""
    view = chosen_run(snapshot)
    size = file_bytes(view.run.path / REPORT) if view else 0
    return render("export/report.html", snap=snapshot, run=view.run.name if view else "", size=size)


def add_export_routes(app: FastAPI, app_state: AppState) -> None:
    """Add the tab's routes to `app`."""
    report = BackgroundTask(app_state.worker)
    add_task(app, app_state.live, "report", report)

    actions = {"export/choose": choose, "export/write": export, "export/copy": copy}
    add_actions(app, {path: functools.partial(act, app_state) for path, act in actions.items()})
    add_actions(app, {"report/start": functools.partial(begin_report_task, app_state, report)})

    add_actions(
        app,
        {"export/upload": functools.partial(upload, app_state)},
        lambda: _("An upload uses the token of the computer that runs this window: start it there."),
    )

    @app.get("/easel/report/of/{run}")
    def page(run: str, download: int = 0) -> Response:
        path = below(runs_folder(app_state.workspace), f"{check_run_name(run)}/{REPORT}", {".html"})
        # A report contains untrusted text: its scripts, which draw the charts, are kept from the window by an
        # origin of their own, and no others run.
        headers = {"Content-Security-Policy": f"{content_policy()}; sandbox allow-scripts", **FRESH}
        if download:
            return FileResponse(path, filename=f"{run}.html", media_type="text/html", headers=headers)
        text = with_own_scripts(path.read_text(encoding="utf-8", errors="replace"))
        return Response(text, media_type="text/html", headers=headers)


def begin_report_task(app_state: AppState, job: BackgroundTask, sent: dict[str, Any]) -> None:
    """Start making the report of a run.

    Raises:
        RunError: a report is being made, or it would measure while a run is active.
        BadRequest: no run has this name.
    """
    name = str(sent.get("run", ""))
    run_view: RunView | None = next((w for w in app_state.jobs.all() if w.run.name == name), None)
    if run_view is None:
        raise BadRequest(name)
    run, measure = run_view.run, bool(sent.get("measure"))
    if measure:
        check_memory_is_free(app_state)

    def shows(result: dict[str, Any]) -> str:
        if measure and run.checkpoint_steps():
            step = run.step_of("best")
            found = run.analysis(step)
            if found and found.strength is not None:
                file = run.checkpoint(step) / CHECKPOINT
                keep_best_strength(app_state.project, str(file), found.strength)
        return note_html(_("The report of {name} is made.", name=name))

    job.start("Report", {"do": "report", "run": str(run.path), "measure": measure}, shows)
