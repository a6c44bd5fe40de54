"""The Train tab: form, notifications, Start, and the run.

Notifications at the end of a run go to a command or a web address, kept in the workspace; unlike the bell in
the header they need no open page.
"""

import os
from typing import Any

import gradio as gr

from app.bindings import QUIET, Bindings, html_block
from app.guard import is_loopback
from app.templates import note_html, problem_html, render
from app.train import rail, run_cards
from app.train.start import build_action_bar, build_like, build_start
from app.train.train_form import TrainForm
from lora_core.errors import ConfigError, LoraError
from lora_core.runs.notifications import VARIABLE, WEB, read_recipient, send_test, write_recipient

ONLY_HERE = (
    "A command can be set on the computer itself alone, as it runs there; from elsewhere give a web address."
)
ENVIRONMENT = f"The environment variable {VARIABLE} is set and overrides this field; unset it to choose here."


def build_notifications(bindings: Bindings) -> None:
    """Lay out the field with its Save and Try buttons."""
    workspace = bindings.app_state.workspace
    with gr.Column(elem_classes="group"), gr.Accordion("Notifications", open=False, elem_id="telling"):
        html_block(render("train/form.html", part="notifications"))
        whom = gr.Textbox(
            label="Command or web address",
            placeholder="https://ntfy.sh/my-own-topic, or a command",
            elem_id="tell-whom",
            lines=1,
            max_lines=1,
            interactive=VARIABLE not in os.environ,
        )
        with gr.Row(elem_classes="tell-row"):
            keep = gr.Button("Save", elem_id="tell-save", min_width=0, scale=0)
            attempt = gr.Button("Try it", elem_id="tell-try", min_width=0, scale=0)
        note = html_block(elem_id="tell-note")
    bindings.fill_on_load(whom, lambda: chosen(bindings)[0])
    bindings.fill_on_load(note, lambda: chosen(bindings)[1])

    def saved(text: str, request: gr.Request) -> str:
        try:
            checked(text, request)
            write_recipient(workspace, text or "")
        except (LoraError, OSError) as error:
            return problem_html(error)
        return note_html("Saved." if (text or "").strip() else "Saved: no notifications.")

    def tried(text: str, request: gr.Request) -> str:
        try:
            checked(text, request)
        except LoraError as error:
            return problem_html(error)
        said = send_test(text or "")
        return problem_html(said) if said else note_html("A message was sent: look whether it arrived.")

    for event, act in ((keep.click, saved), (whom.submit, saved), (attempt.click, tried)):
        event(act, whom, note, **QUIET)


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
            bindings.follow(html_block(elem_id="running"), rail.running)
            bindings.follow(html_block(elem_id="queue"), rail.queue_card)
            bindings.follow(html_block(elem_id="earlier"), rail.earlier)
        with gr.Column(elem_classes="side card"):
            form = TrainForm(bindings)
            name = build_start(bindings)
            build_like(bindings)
            build_notifications(bindings)
        with gr.Column(elem_classes="main"):
            for place, shows in (
                ("run-card", run_cards.run_card),
                ("verdicts", run_cards.verdicts_card),
                ("samples", run_cards.samples_card),
                ("charts", run_cards.charts),
                ("beside", rail.compare_card),
                ("run-log", run_cards.log_card),
            ):
                bindings.follow(html_block(elem_id=place), shows)
    build_action_bar(bindings, form, name)
