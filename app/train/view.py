"""The Train tab: form, notifications, Start, and the run.

Notifications at the end of a run go to a command or a web address, kept in the workspace; unlike the bell in
the header they need no open page.
"""

import asyncio
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI, Request
from fastapi.responses import Response

from app.guard import is_loopback, read_body
from app.jobs import Jobs
from app.routes import Answer, BadRequest, add_actions
from app.state import AppState, Bindings
from app.templates import QUIET, _, html_block, note_html, problem_html, render, text_field
from app.train import run_cards, start
from app.train.form import Plan
from app.train.run_cards import charts_data
from app.train.train_form import TrainForm, reset_settings, swap_rates
from lora_core.errors import ConfigError, LoraError, RunError
from lora_core.model_files.header import MAX_HEADER
from lora_core.model_files.starting_settings import CONFIG_SUFFIXES, settings_from_lora
from lora_core.runs.diagnosis import VARIABLE, WEB, debug_zip, read_recipient, send_test, write_recipient
from lora_core.runs.folder import RunFolder, check_run_name, runs_folder

QUIT_AFTER = 0.3
"""Seconds: the answer is to be out before the server ends."""
LARGEST_FILE = 2**40
ONLY_HERE = (
    "A command can be set on the computer itself alone, as it runs there; from elsewhere give a web address."
)
ENVIRONMENT = f"The environment variable {VARIABLE} is set and overrides this field; unset it to choose here."


def build_notifications(bindings: Bindings) -> None:
    """Lay out the field with its Save and Try buttons."""
    workspace = bindings.app_state.workspace
    with gr.Column(elem_classes="group"), gr.Accordion("Notifications", open=False, elem_id="telling"):
        html_block(lambda: render("train/form.html", part="notifications"))
        words, is_free = "https://ntfy.sh/my-own-topic, or a command", VARIABLE not in os.environ
        whom = text_field("Command or web address", "tell-whom", words, interactive=is_free)
        with gr.Row(elem_classes="tell-row"):
            keep = gr.Button("Save", elem_id="tell-save", min_width=0, scale=0)
            test = gr.Button("Try it", elem_id="tell-try", min_width=0, scale=0)
        note = html_block(elem_id="tell-note")
    bindings.fill_on_load(whom, lambda: chosen(bindings)[0])
    bindings.fill_on_load(note, lambda: chosen(bindings)[1])

    def act(tries: bool, text: str, request: gr.Request) -> str:
        try:
            checked(text, request)
            if not tries:
                write_recipient(workspace, text or "")
                return note_html(_("Saved.") if (text or "").strip() else _("Saved: no notifications."))
        except (LoraError, OSError) as error:
            return problem_html(error)
        problem = send_test(text or "")
        return (
            problem_html(problem) if problem else note_html(_("A message was sent: look whether it arrived."))
        )

    def save(text: str, request: gr.Request) -> str:
        return act(False, text, request)

    def attempt(text: str, request: gr.Request) -> str:
        return act(True, text, request)

    for event, does in ((keep.click, save), (whom.submit, save), (test.click, attempt)):
        event(does, whom, note, **QUIET)


def chosen(bindings: Bindings) -> tuple[str, str]:
    """The stored target, and a note if it is overridden or unreadable."""
    try:
        whom = read_recipient(bindings.app_state.workspace)
    except ConfigError as error:
        return "", problem_html(error)
    return whom, note_html(ENVIRONMENT) if VARIABLE in os.environ else ""


def checked(text: str, request: Any) -> None:
    """Allow commands only from this computer; the window's password does not entitle to run them.

    Raises:
        ConfigError: it comes from elsewhere.
    """
    whom = (text or "").strip().lower()
    client = getattr(getattr(request, "client", None), "host", "") or ""
    if whom and not whom.startswith(WEB) and not is_loopback(client):
        raise ConfigError(ONLY_HERE)


def build_train(bindings: Bindings) -> None:
    """Lay out the tab and wire it."""
    with gr.Row(elem_classes="page page-train"):
        with gr.Column(elem_classes="rail"):
            bindings.follow(html_block(elem_id="running"), run_cards.running)
            bindings.follow(html_block(elem_id="queue"), run_cards.queue_card)
            bindings.follow(html_block(elem_id="earlier"), run_cards.earlier)
        with gr.Column(elem_classes="side card"):
            form = TrainForm(bindings, start.details)
            with form.more:
                name = text_field("Name of the run", "run-name", "project and number")
                bindings.follow(html_block(elem_id="command"), start.command)
                with gr.Column(elem_classes="group"), gr.Accordion("Import settings from a file", open=False):
                    html_block(lambda: render("train/like.html"))
                    bindings.follow(html_block(elem_id="like-note"), lambda snap: snap.app_state.like_note)
                build_notifications(bindings)
        with gr.Column(elem_classes="main"):
            for place, shows in (
                ("run-card", run_cards.run_card),
                ("beside", run_cards.compare_card),
                ("verdicts", run_cards.verdicts_card),
                ("samples", run_cards.samples_card),
                ("charts", run_cards.charts),
                ("sweep-results", run_cards.sweep_card),
                ("run-log", run_cards.log_card),
            ):
                bindings.follow(html_block(elem_id=place), shows)
    start.build_action_bar(bindings, form, name)


def add_run_routes(app: FastAPI, app_state: AppState) -> None:
    """Add the tab's routes to `app`."""

    def sweep(sent: dict[str, Any]) -> dict[str, str]:
        setting, values, name, by, more = (
            str(sent.get(key, "")) for key in ("setting", "values", "name", "by", "by_values")
        )
        seeds = str(sent.get("seeds") or 1)
        return {"names": start.queue_sweep(app_state, [(setting, values), (by, more)], name, seeds)}

    def restore(sent: dict[str, Any]) -> None:
        values, trigger = sent.get("values"), sent.get("trigger")
        if not isinstance(values, dict | None) or not isinstance(trigger, str | None):
            raise BadRequest("no draft")
        app_state.project.update_draft(values=values, trigger=trigger)

    def leave(sent: dict[str, Any]) -> dict[str, Any]:
        live = app_state.jobs.live()
        # Runs and queue are processes of their own and continue.
        threading.Timer(QUIT_AFTER, app_state.on_quit).start()
        return {"run": live.run.name if live else "", "queue": app_state.queue.runner() is not None}

    actions: dict[str, Callable[[dict[str, Any]], Any]] = {
        "run": lambda sent: do_run_action(app_state, str(sent.get("do")), str(sent.get("run", ""))),
        "queue": lambda sent: do_queue_action(app_state.jobs, sent),
        "quit": leave,
        "settings/sweep": sweep,
        "settings/take": lambda sent: start.take_run_settings(app_state, str(sent.get("run", ""))),
        "settings/import": lambda sent: start.import_settings(app_state, str(sent.get("path", ""))),
        "settings/restore": restore,
    }
    add_actions(app, actions)

    @app.get("/easel/curves/{name}")
    def curves(name: str, compare: str = "") -> Response:
        views = [app_state.jobs.run_view(_existing_run(app_state, one)) for one in (name, compare) if one]
        for view in views:
            # Reads what its events say since.
            app_state.jobs.state(view)
        return Answer(charts_data(views))

    @app.get("/easel/debug/{name}")
    def debug(name: str) -> Response:
        found, card = _existing_run(app_state, name), app_state.hardware.card()
        data = debug_zip(found, app_state.workspace, card.name if card else "")
        headers = {"Content-Disposition": 'attachment; filename="lora-easel-debug.zip"'}
        return Response(data, media_type="application/zip", headers=headers)

    @app.post("/easel/like")
    async def like(request: Request, size: str = "", name: str = "the file") -> Response:
        header = await read_body(request, MAX_HEADER + 8)
        if header is None:
            raise BadRequest("too long")
        await asyncio.to_thread(_take_header, app_state, header, size, name[:200])
        return Answer({"taken": True})


def _existing_run(app_state: AppState, name: str) -> RunFolder:
    found = RunFolder(runs_folder(app_state.workspace) / check_run_name(name))
    if not found.config_file.is_file():
        raise BadRequest(name)
    return found


def do_queue_action(jobs: Jobs, sent: dict[str, Any]) -> None:
    """Do what the list of the queue asks for.

    Raises:
        RunError: it cannot be done now.
    """
    name, place = str(sent.get("run", "")), sent.get("place")
    acts: dict[str, Callable[[], None]] = {
        "up": lambda: jobs.move_in_queue(name, -1),
        "down": lambda: jobs.move_in_queue(name, 1),
        "move": lambda: jobs.queue.move(name, place if isinstance(place, int) else 0),
        "remove": lambda: jobs.take_from_queue(name),
        "start": jobs.start_queue,
        "pause": lambda: jobs.queue.set_enabled(False),
    }
    if str(sent.get("do")) not in acts:
        raise RunError("The queue knows no such action.")
    acts[str(sent["do"])]()


def do_run_action(app_state: AppState, do: str, name: str) -> dict[str, str] | None:
    """Do what a run's button asks for; of one that is deleted, returns its name in the trash.

    Raises:
        RunError: it cannot be done now.
        BadRequest: no such action.
    """
    jobs, downloads, project = app_state.jobs, app_state.downloads, app_state.project
    acts: dict[str, Callable[[str], Any]] = {
        **{request: lambda run: jobs.request(do) for request in ("pause", "stop", "save", "preview")},
        "measure": lambda run: app_state.prober.begin(Plan(project).config),
        "unmeasure": lambda run: app_state.prober.cancel(),
        "download": lambda run: downloads.start(Plan(project).base.name),
        "download-cancel": lambda run: downloads.cancel(),
        "download-ask": lambda run: downloads.offer(Plan(project).base.name, again=True),
        # The Preview tab generates this run's strip when it opens.
        "see": lambda run: project.update_draft(preview_strip=check_run_name(run)),
        "resume": jobs.resume,
        "accept": lambda run: jobs.resume(run, accept_changes=True),
        "retry": jobs.retry,
        "reset": lambda group: reset_settings(project, group),
        "rates": lambda run: swap_rates(project),
        "show": jobs.show,
        "delete": jobs.delete,
    }
    if do not in acts:
        raise BadRequest("no such action")
    current = jobs.current()
    if do in ("resume", "accept", "retry"):
        # A run has priority for memory.
        app_state.worker.release()
    done = acts[do](name or (current.run.name if current else ""))
    return done if isinstance(done, dict) else None


def _take_header(app_state: AppState, header: bytes, size: str, name: str) -> None:
    """Read settings from a LoRA file's header, or a configuration; the LoRA's tensors stay in the browser.

    A sparse file of the same length takes its place, so that all checks of a file apply; on most drives it
    takes no space.
    """
    if not re.fullmatch("[0-9]{1,13}", size) or not len(header) <= int(size) <= LARGEST_FILE:
        raise RunError(_("The size of the dropped file does not fit its header."))
    folder = app_state.workspace / "tmp"
    folder.mkdir(parents=True, exist_ok=True)
    suffix = Path(name).suffix.casefold()
    ending = suffix if suffix in CONFIG_SUFFIXES else ".safetensors"
    file = folder / f"like-{threading.get_ident()}{ending}"
    try:
        with open(file, "wb") as made:
            made.write(header)
            made.truncate(int(size))
        found = settings_from_lora(file)
    except OSError as error:
        raise RunError(_("The dropped file could not be read: {}.", error.strerror or error)) from error
    except LoraError as error:
        raise type(error)(str(error).replace(str(file), name).replace(file.name, name)) from error
    finally:
        file.unlink(missing_ok=True)
    app_state.like_note = start.take_settings(app_state.project, found, name)
