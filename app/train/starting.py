"""Start, Add to queue, the same as a command, and settings taken from a LoRA file."""

import functools
from pathlib import Path
from typing import Any

import gradio as gr

from app.bindings import QUIET, Bindings, html_block
from app.formatting import pluralize, safe
from app.templates import problem_html
from app.state import Snapshot, take_snapshot
from app.train.facts import blockers, facts, start_problems
from app.train.form import FORM, command_line, keep_changed_values, to_widget_value, widget_values
from app.train.train_form import TrainForm
from lora_core.errors import LoraError
from lora_core.model_files.detect import EMBEDDED
from lora_core.model_files.starting_settings import LoraSettings, settings_from_lora
from lora_core.settings.config import RunConfig, label_of

MOST_LISTED = 8


def build_start(bindings: Bindings, form: TrainForm) -> None:
    """What will happen, the buttons that make it happen, and the command that does the same."""
    name = gr.Textbox(
        label="Name of the run", placeholder="date and dataset", elem_id="run-name", lines=1, max_lines=1
    )
    bindings.follow(html_block(elem_id="facts"), facts)
    with gr.Row(elem_classes="start-row"):
        start = gr.Button(
            "Start training", variant="primary", interactive=False, elem_id="start", elem_classes="big"
        )
        queue = gr.Button("Add to queue", interactive=False, elem_id="add-to-queue", elem_classes="big")
    bindings.follow(start, lambda snap: gr.update(interactive=not blockers(snap)))
    bindings.follow(queue, lambda snap: gr.update(interactive=not start_problems(snap)))
    note = html_block(elem_id="start-note")
    bindings.follow(html_block(elem_id="command"), command)
    inputs = [name, bindings.trigger, form.seen, *form.fields]
    for button, do in ((start, "start"), (queue, "queue")):
        act = functools.partial(_pressed, bindings, do)
        bindings.refresh_after(button.click(act, inputs, [name, note], **QUIET))


def _pressed(
    bindings: Bindings, do: str, run_name: str, trigger: str, seen: list[Any] | None, *values: Any
) -> tuple[Any, str]:
    app_state = bindings.app_state
    # The press of the button takes all with it: what was typed last may still be on its way to the draft.
    keep_changed_values(app_state.project, seen, list(values))
    app_state.project.update_draft(trigger=(trigger or "").strip())
    try:
        config = ready_config(bindings, (run_name or "").strip(), do)
        if do == "queue":
            run = app_state.queue.add(config)
            return "", f'<p class="small" role="status">{safe(run.name)} waits in the queue.</p>'
        # A run needs the memory more than a picture does; the worker loads again when it is asked.
        app_state.worker.release()
        app_state.jobs.start(config)
    except LoraError as error:
        return gr.skip(), problem_html(error)
    return "", ""


def ready_config(bindings: Bindings, name: str, do: str = "start") -> RunConfig:
    """The settings of the form, once all of it was checked.

    Args:
        parts: of the page.
        name: of the run, "" for date and dataset.
        do: "start", which takes that no run is going on, or "queue".

    Raises:
        LoraError: something is in the way; all of it in one message.
    """
    app_state = bindings.app_state
    snapshot = take_snapshot(app_state)
    config = snapshot.plan.config.changed({"name": name})
    found = list(snapshot.plan.problems) or [
        one.sentence for one in app_state.checks.now(config, app_state.project.dataset()) if one.blocking
    ]
    stops = blockers(snapshot) if do == "start" else start_problems(snapshot)
    sentences = list(dict.fromkeys([*found, *stops]))
    if sentences:
        raise LoraError(" ".join(sentences))
    return config


def command(snapshot: Snapshot) -> str:
    """The same as a command, to copy."""
    plan = snapshot.plan
    line = safe(command_line(plan.config, plan.goal, plan.level, plan.base.family))
    return (
        f'<details id="as-command"><summary>As a command</summary><pre class="log" tabindex="0">{line}</pre>'
        f'<button type="button" class="own" data-copy="{line}">Copy</button></details>'
    )


def build_like(bindings: Bindings, form: TrainForm) -> None:
    """Train like a file: drop it or give its path, and its settings come into the form."""
    app_state = bindings.app_state
    with gr.Column(elem_classes="group"), gr.Accordion("Train like a LoRA file", open=False):
        html_block(
            '<div id="like-drop" class="empty like"><p class="small">Drop any LoRA here, or <label'
            ' class="link">choose one<input type="file" id="like-file" accept=".safetensors"'
            ' aria-label="Choose a LoRA file whose settings are taken"></label>. Its settings come into'
            " the form; only its header is read.</p></div>"
        )
        with gr.Row(elem_id="like-row"):
            path = gr.Textbox(
                label="Path of a LoRA file",
                placeholder="or its path",
                elem_id="like-path",
                lines=1,
                max_lines=1,
            )
            take = gr.Button("Take its settings", elem_id="like-take", min_width=0, scale=0)
        note = html_block(elem_id="like-note")

    def from_path(text: str) -> list[Any]:
        name = (text or "").strip().strip('"')
        if not name:
            return [problem_html("Choose a file, or type its path first."), *(gr.skip() for _ in outputs[1:])]
        try:
            said = take_settings(
                app_state.project, settings_from_lora(Path(name).expanduser()), Path(name).name
            )
        except (LoraError, OSError, ValueError) as error:
            return [problem_html(str(error)), *(gr.skip() for _ in outputs[1:])]
        return [said, *_refilled()]

    def from_drop() -> list[Any]:
        return [app_state.like_said, *_refilled()]

    def _refilled() -> list[Any]:
        values = widget_values(app_state.project)
        return [app_state.project.draft().get("trigger") or "", values, *values]

    outputs = [note, bindings.trigger, form.seen, *form.fields]
    bindings.refresh_after(gr.on([take.click, path.submit], from_path, path, outputs, **QUIET))
    dropped = gr.Button("Settings of the dropped file", elem_id="like-taken", visible="hidden")
    bindings.refresh_after(dropped.click(from_drop, None, outputs, **QUIET))


def take_settings(project: Any, like: LoraSettings, name: str) -> str:
    """Put a file's settings into the draft; returns what was taken and what was not, as HTML."""
    standing = dict(zip(FORM, widget_values(project), strict=True))
    taken = {name: value for name, value in like.values.items() if name in FORM}
    changed = [name for name, value in taken.items() if standing[name] != to_widget_value(name, value)]
    values = standing | {name: to_widget_value(name, value) for name, value in taken.items()}
    keep: dict[str, Any] = {"values": values}
    if like.values.get("dataset.trigger"):
        keep["trigger"] = str(like.values["dataset.trigger"])
    said = like_words(like, name, taken, changed)
    project.update_draft(**keep)
    return said


def like_words(like: LoraSettings, name: str, taken: dict[str, Any], changed: list[str]) -> str:
    """What was taken from a file and what was not."""
    count = pluralize(len(taken), "setting")
    rows = [f"From {name}: {like.source}. {count} taken, {len(changed)} of them new here."]
    told = [f"{label_of(n)} {to_widget_value(n, taken[n])}" for n in changed[:MOST_LISTED]]
    more = f" and {len(changed) - MOST_LISTED} more" if len(changed) > MOST_LISTED else ""
    if told:
        rows.append(f"{'; '.join(' '.join(text.split()) for text in told)}{more}.")
    if like.base:
        base = "the embedded base" if like.base == EMBEDDED else like.base
        rows.append(f"It was trained on {base}; the base is yours to choose.")
    left = "".join(f"<li>{safe(text)}</li>" for text in [*rows, *like.left])
    return f'<ul class="sentences small" id="like-said" role="status">{left}</ul>'
