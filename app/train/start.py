"""Before a run: forecast, problems, Start and Add to queue, the same as a command, and settings imported from
a LoRA file."""

import contextlib
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_origin

import gradio as gr

from app.state import AppState, Bindings, Snapshot, take_snapshot
from app.templates import (
    QUIET,
    _,
    format_speed,
    html_block,
    label_of,
    note_html,
    problem_html,
    render,
    with_labels,
)
from app.train.form import (
    BASIC,
    FORM,
    GROUPS,
    Plan,
    command_line,
    current_values,
    form_values,
    group_fields,
    to_widget_value,
)
from app.train.train_form import TrainForm, slug
from lora_core.data.dataset import with_epochs
from lora_core.data.images import ImageRecord
from lora_core.errors import ConfigError, LoraError
from lora_core.model_files.sizes import FALLBACKS, trains_text_encoder
from lora_core.model_files.starting_settings import LoraSettings, settings_from_lora
from lora_core.projects.project import Project
from lora_core.runs.costs import MEASURED, PROBED, SCALED, RunForecast, forecast_run
from lora_core.runs.folder import RunFolder, check_run_name, runs_folder
from lora_core.runs.preflight import caption_bytes, in_full
from lora_core.runs.queue import sweep_configs
from lora_core.settings.config import FIELDS, RunConfig, in_short, is_table
from lora_core.settings.schema import AUTO
from lora_core.system.files import expand_home
from lora_core.system.hardware import card_problem

MOST_LISTED = 8
RESUMED_FIRST = ("paused", "interrupted", "failed")
"""States from which Resume is the primary act, rather than a new run."""
SOURCES = {MEASURED: "measured", PROBED: "from trial steps", SCALED: "estimated"}
NO_IMAGES = "There are no images yet: drop some on the Dataset tab, or try the demo there."
NO_PROMPTS = "A slider needs two opposite prompts: write them above, without images."


def build_action_bar(bindings: Bindings, form: TrainForm, name: Any) -> None:
    """Lay out the sticky bar: problems, Start and Add to queue."""
    with gr.Row(elem_id="action-bar", elem_classes="foot foot-row"):
        bindings.follow(html_block(elem_id="facts", elem_classes="will"), facts)
        with gr.Row(elem_classes="acts"):
            note = html_block(elem_id="start-note")
            html_block(lambda: render("train/sweep.html", groups=_sweepable()))
            queue = gr.Button("Add to queue", interactive=False, elem_id="add-to-queue", elem_classes="big")
            start = gr.Button(
                "Start training", variant="primary", interactive=False, elem_id="start", elem_classes="big"
            )
    bindings.follow(start, start_button)
    bindings.follow(queue, lambda snap: gr.update(interactive=True))

    def pressed(do: str, sent: dict[Any, Any]) -> dict[Any, Any]:
        app_state = bindings.app_state
        # The click carries the form: the last edits may not have reached the draft yet.
        form.keep(sent)
        app_state.project.update_draft(trigger=(sent[bindings.trigger] or "").strip())
        try:
            config = ready_config(app_state, (sent[name] or "").strip(), do)
            if do == "queue":
                (run,) = app_state.jobs.add_to_queue(config)
                return {name: "", note: note_html(_("{name} waits in the queue.", name=run.name))}
            # A run needs the memory more than an image does; the worker loads again when it is asked.
            app_state.worker.release()
            app_state.jobs.start(config)
        except NotReady as error:
            snapshot = take_snapshot(app_state)
            wrong = [g for g in form.folds if not snapshot.plan.invalid.keys().isdisjoint(group_fields(g))]
            # What the foot lists is shown where it is mended (`lookAtProblem` in `assets/train.js`).
            opened = {form.folds[group]: gr.update(open=True) for group in wrong}
            listed = set(start_problems(snapshot))
            return {note: "" if listed.issuperset(error.sentences) else problem_html(error), **opened}
        except LoraError as error:
            return {note: problem_html(error)}
        return {name: "", note: ""}

    for button, do in ((start, "start"), (queue, "queue")):
        act = functools.partial(pressed, do)
        button.click(act, {name, bindings.trigger, *form.fields}, [name, note, *form.folds.values()], **QUIET)


def _sweepable() -> list[tuple[str, list[tuple[str, str]]]]:
    """The settings that have one value, by group, as (name, label)."""
    lists = [name for name in FORM if is_table(name) or get_origin(FIELDS[name].annotation) is list]
    groups = [("Basic", [name for name in BASIC if name != "model.base"])]
    groups += [(group, group_fields(group)) for group in GROUPS]
    return [(group, [(n, label_of(n)) for n in names if n not in lists]) for group, names in groups]


def start_button(snapshot: Snapshot) -> Any:
    """Start is the primary act, unless the run shown can be resumed. Once the fields that it sends are
    filled it can be pressed, whatever is in the way, and shows that."""
    second = can_resume(snapshot)
    return gr.update(
        value=_("Start a new run") if second else _("Start training"),
        variant="secondary" if second else "primary",
        interactive=True,
    )


def can_resume(snapshot: Snapshot) -> bool:
    """Whether the run shown was broken off or paused, and nothing is asked about it."""
    run = snapshot.shown
    if run.view is None or run.asks or snapshot.active.live or run.state not in RESUMED_FIRST:
        return False
    return run.view.resume_info().step > 0


class NotReady(LoraError):
    """What is in the way of a run, all of it in one message and in `sentences`."""

    def __init__(self, sentences: list[str]) -> None:
        super().__init__(" ".join(sentences))
        self.sentences = sentences


def ready_config(
    app_state: AppState, name: str, do: str = "start", config: RunConfig | None = None
) -> RunConfig:
    """The settings of the form, or `config` made of them, once all of it was checked.

    Args:
        app_state: of the window.
        name: of the run, "" for the project's title and a number.
        do: "start", if no run is active, or "queue".
        config: the settings, where they differ from the form's.

    Raises:
        NotReady: something is in the way.
    """
    snapshot = take_snapshot(app_state)
    config = config or snapshot.plan.config.changed({"name": name})
    found = list(snapshot.plan.problems) or [
        one.sentence for one in app_state.checks.now(config, app_state.project.dataset()) if one.blocking
    ]
    stops = blockers(snapshot) if do == "start" else start_problems(snapshot)
    sentences = list(dict.fromkeys([*found, *stops]))
    if sentences:
        raise NotReady(sentences)
    return config


def queue_sweep(app_state: AppState, axes: Sequence[tuple[str, str]], name: str, seeds: str | int = 1) -> str:
    """Queue a run of the form's settings for each combination of values, or none; returns their names.

    Args:
        axes: settings, and their values as typed; after the first, those without values do not count.
        name: begins the names.
        seeds: number of runs of each combination.

    Raises:
        LoraError: a value is not legal, or something else is in the way.
    """
    base = Plan(app_state.project).config.changed({"name": name.strip()})
    (setting, values), *by = [(one, re.split("[,;\n]", text)) for one, text in axes]
    by = [(one, texts) for one, texts in by if any(map(str.strip, texts))]
    if not re.fullmatch("[1-9][0-9]{0,2}", str(seeds).strip()):
        raise ConfigError(_("Seeds is {}, which should be an integer, such as 1 or 3.", in_short(seeds)))
    try:
        configs = sweep_configs(base, setting, values, runs_folder(app_state.workspace), by, int(seeds))
    except ConfigError as error:
        raise ConfigError(with_labels(str(error))) from error
    ready = [ready_config(app_state, "", "queue", config) for config in configs]
    return ", ".join(run.name for run in app_state.jobs.add_to_queue(*ready))


def take_run_settings(app_state: AppState, name: str) -> dict[str, Any]:
    """Put the settings of a run into the form; returns what the draft held `before`, and how many are `new`.

    Raises:
        LoraError: no such run, or its settings cannot be read.
    """
    project = app_state.project
    config = RunFolder.open(runs_folder(app_state.workspace) / check_run_name(name)).config()
    taken = form_values(config)
    with project.editing():
        draft, standing = project.draft(), current_values(project)
        project.update_draft(values=taken, trigger=config.dataset.trigger)
    new = sum(standing[name] != value for name, value in taken.items())
    return {"new": new, "before": {key: draft.get(key) for key in ("values", "trigger")}}


def blockers(snapshot: Snapshot) -> list[str]:
    """What keeps a run from starting now, each with what to do."""
    found = start_problems(snapshot)
    if snapshot.active.live:
        name = snapshot.active.name
        found.append(_("{} is training; pause or stop it first, or add this one to the queue.", name))
    return found


def start_problems(snapshot: Snapshot) -> list[str]:
    """What must be fixed before this run can be started or queued."""
    plan, dataset = snapshot.plan, snapshot.app_state.project.dataset()
    found = list(plan.problems)
    if plan.is_slider and not plan.config.slider.on:
        found.append(NO_PROMPTS)
    elif not plan.is_slider and not dataset.records and not dataset.problems:
        found.append(NO_IMAGES)
    if plan.base.remote:
        found.append(_("The base model is not on this computer yet; download it, below its name."))
    elif plan.base.problem:
        found.append(plan.base.problem)
    known = snapshot.app_state.checks.known(plan.config, dataset)
    bad_base = bool(plan.base.problem)
    found += [one.sentence for one in known if one.blocking and not (bad_base and one.kind == "base")]
    return list(dict.fromkeys(found))


def images_of(snapshot: Snapshot) -> list[ImageRecord]:
    """The images that the run to come trains on; a slider has none."""
    return [] if snapshot.plan.is_slider else snapshot.app_state.project.dataset().records


def notes(snapshot: Snapshot) -> list[str]:
    """What a user should know before Start, but may disregard."""
    plan, dataset = snapshot.plan, snapshot.app_state.project.dataset()
    known = [one for one in snapshot.app_state.checks.known(plan.config, dataset) if not one.blocking]
    # Not repeated: it is shown below the base's name.
    found = [one.sentence for one in known if not (one.setting or (plan.base.remote and one.kind == "base"))]
    found += plan.notes
    hardware = snapshot.app_state.hardware
    card, worker = hardware.card(hidden=True), snapshot.app_state.worker
    if card is not None and worker.device == "cpu" and plan.config.train.device == AUTO:
        found.insert(0, card_problem(card, worker.found) + _(" Until then training runs on the CPU."))
    elif hardware.known and not hardware.has_gpu and not plan.base.embedded and plan.base.facts:
        slow = _("With a base of this size it takes hours; the embedded base takes minutes.")
        chosen = plan.config.train.device == "cpu"
        why = _("Training on the CPU, as chosen.") if chosen else _("No GPU found: training on the CPU.")
        found.insert(0, f"{why} {slow}")
    return found


def facts(snapshot: Snapshot) -> str:
    """The bar: time, memory and size of the run to come, problems, and Resume if due."""
    plan = snapshot.plan
    expected, stops = forecast(snapshot, plan.config), start_problems(snapshot)
    known = snapshot.app_state.checks.known(plan.config, snapshot.app_state.project.dataset())
    repairs = {
        text: (name, to_widget_value(name, plan.preset.get(name))) for name, text in plan.invalid.items()
    }
    repairs |= {one.sentence: (one.setting, in_full(one.value)) for one in known if one.setting}
    return render(
        "train/action_bar.html",
        snap=snapshot,
        expected=expected,
        sources=SOURCES,
        can_resume=can_resume(snapshot),
        measuring=_measuring(snapshot, expected),
        stops=stops,
        watch=[one.sentence for one in known if one.setting and not plan.invalid],
        repairs=repairs | {NO_IMAGES: ("no-images", ""), plan.base.problem: ("model.base", "")},
        groups={name: slug(group) for group in GROUPS for name in group_fields(group)},
        empty=stops == [NO_IMAGES],
    )


def forecast(snapshot: Snapshot, config: RunConfig) -> RunForecast:
    """What a run will take, from all that this window knows."""
    app_state, base = snapshot.app_state, snapshot.plan.base
    runs = [(run_view.progress, run_view.config()) for run_view, _ in snapshot.runs]
    records, costs = images_of(snapshot), app_state.prober.costs()
    gpu = app_state.hardware.gpu(app_state.free_on_card())
    with contextlib.suppress(LoraError):  # the list of problems says so
        config = with_epochs(config, app_state.project.dataset())
    return forecast_run(config, base.facts, records, runs, costs, gpu)


def _measuring(snapshot: Snapshot, expected: RunForecast) -> tuple[str, str]:
    """Whether steps are tried to know the time, and a sentence on it in each case, so that nothing jumps."""
    config, prober = snapshot.plan.config, snapshot.app_state.prober
    if prober.working(config):
        done, total = prober.steps_done()
        at = _(", {:,} of {:,}", done, total) if total else ""
        return "working", _("Trying some steps{at}.", at=at)
    tried = prober.known(config)
    if tried and expected.source == PROBED:
        return "known", _("Some steps were tried on this computer: {speed}.", speed=format_speed(tried.step))
    if expected.source == MEASURED:
        return "known", _("A run like it took {}, samples included.", format_speed(expected.seconds_a_step))
    if not snapshot.plan.base.facts or snapshot.plan.problems:
        return "off", _("The time is measured once the settings can be used.")
    ready = config.slider.on or images_of(snapshot)
    if ready and not snapshot.active.live and prober.schedule(config):
        return "soon", _("The time is measured in a moment.")
    unknown = _("The time is an estimate.") if expected.seconds else _("The time is not known yet.")
    return "offered", prober.problem(config) or unknown


def details(snapshot: Snapshot) -> str:
    """What the run to come does, in sentences, and what a user should know of it."""
    plan, records = snapshot.plan, images_of(snapshot)
    expected, base = forecast(snapshot, plan.config), plan.base.facts
    return render(
        "train/details.html",
        snap=snapshot,
        expected=expected,
        records=records,
        drawn=caption_bytes(records, plan.config, base)[1] if base else 0,
        trains_text=trains_text_encoder(plan.config),
        fallbacks=list(dict.fromkeys(FALLBACKS[name] for name in expected.fallbacks)),
        notes=notes(snapshot),
    )


def command(snapshot: Snapshot) -> str:
    """The same as a command, to copy."""
    plan = snapshot.plan
    line = command_line(plan.config, plan.goal, plan.level, plan.base.family)
    return render("train/command.html", line=line)


def import_settings(app_state: AppState, path: str) -> None:
    """Put the settings of the LoRA file at `path` into the form, or report its problem."""
    name = path.strip().strip('"')
    try:
        if not name:
            raise ConfigError(_("Choose a file, or type its path first."))
        found = settings_from_lora(expand_home(name))
        app_state.like_note = take_settings(app_state.project, found, Path(name).name)
    except (LoraError, OSError, ValueError) as error:
        app_state.like_note = problem_html(error)


def take_settings(project: Project, like: LoraSettings, name: str) -> str:
    """Put a file's settings into the draft; returns those used and those not, as HTML."""
    taken = {name: to_widget_value(name, value) for name, value in like.values.items() if name in FORM}
    trigger = like.values.get("dataset.trigger")
    with project.editing():
        standing = current_values(project)
        values = standing | taken
        project.update_draft(values=values, **({"trigger": str(trigger)} if trigger else {}))
    changed = [name for name, value in taken.items() if standing[name] != value]
    listed = [f"{label_of(n)} {values[n]}" for n in changed[:MOST_LISTED]]
    shown = {"name": name, "like": like, "count": len(taken), "changed": len(changed)}
    return render("train/like_note.html", listed=[" ".join(text.split()) for text in listed], **shown)
