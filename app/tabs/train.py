"""The Train tab: five settings, the rest folded; what will happen; Start; and the run as it goes."""

import functools
from typing import Any

import gradio as gr

from app import cards
from app.base_picker import HIDDEN_INFO, build_picker, wire_picker
from app.bases import EMBEDDED, chosen_base
from app.facts import blockers, facts
from app.form import FORM, GROUPS, command_line, form_values, group_fields, preset_config, summary, widget
from app.moment import Moment, moment_of
from app.parts import QUIET, TYPING, Parts, edited, piece
from app.plan import choice, widget_values
from app.words import safe
from lora_core.spec.errors import LoraError
from lora_core.spec.presets import GOALS, LEVELS

TITLE = "Train"
RESOLUTIONS = (128, 256, 512, 768, 1024)
FOLDED = [group for group in GROUPS if group != "Base model"]


def build(parts: Parts) -> None:
    """Lay out the tab and wire it."""
    with gr.Row(elem_classes="page page-train"):
        with gr.Column(elem_classes="side card"):
            widgets, goal, level, added = _form(parts)
            _start(parts, widgets)
        with gr.Column(elem_classes="main"):
            with gr.Column(elem_classes="run-block"):
                parts.live(piece(elem_id="run-card"), cards.run_card)
                with gr.Row(elem_classes="run-actions"):
                    _requests(parts)
            parts.live(piece(elem_id="charts"), cards.charts)
            parts.live(piece(elem_id="samples"), cards.samples)
            parts.live(piece(elem_id="earlier"), cards.earlier)
    _wire_form(parts, widgets, goal, level)
    wire_picker(parts, widgets, level, added)


def _form(parts: Parts) -> tuple[dict[str, Any], Any, Any, Any]:
    project = parts.desk.project
    made, added = build_picker(parts)
    with gr.Row(elem_classes="pair"):
        goal = gr.Dropdown([(title, key) for key, title in GOALS.items()], label="Goal", elem_id="goal")
        levels = [*((title, key) for key, title in LEVELS.items()), ("Demo", "demo")]
        level = gr.Dropdown(levels, label="Preset", elem_id="preset")
    with gr.Row(elem_classes="pair"):
        made["train.steps"] = widget("train.steps", elem_id="steps", elem_classes=HIDDEN_INFO)
        made["train.resolution"] = gr.Dropdown(
            _resolutions(0),
            label="Resolution",
            allow_custom_value=True,
            elem_id="resolution",
            elem_classes=HIDDEN_INFO,
        )
    parts.live(made["train.resolution"], lambda m: gr.update(choices=_resolutions(_own_size(m))))
    for group in FOLDED:
        with gr.Column(elem_classes="group"):
            note = piece(elem_classes="group-note")
            parts.live(note, functools.partial(_group_note, group))
            with gr.Accordion(group, open=False):
                for name in group_fields(group):
                    made[name] = widget(name, elem_id=name.replace(".", "-").replace("_", "-"))
    ordered = {name: made[name] for name in FORM}
    for index, name in enumerate(FORM):
        parts.fill(ordered[name], functools.partial(_widget_value, parts, index))
    parts.fill(goal, lambda: choice(project.draft())[0])
    parts.fill(level, lambda: choice(project.draft())[1])
    return ordered, goal, level, added


def _own_size(moment: Moment) -> int:
    base = moment.plan.base
    return base.resolution if base.family else 0


def _resolutions(own: int) -> list[tuple[str, int]]:
    """The sizes to choose from; 0 stands for what the base was trained at."""
    words = f"{own} (the base)" if own else "As the base"
    return [(words, 0), *((str(side), side) for side in RESOLUTIONS if side != own)]


def _group_note(group: str, moment: Moment) -> str:
    return f"<span>{safe(summary(group, moment.plan.config, moment.plan.preset))}</span>"


def _widget_value(parts: Parts, index: int) -> Any:
    return widget_values(parts.desk.project)[index]


def _wire_form(parts: Parts, widgets: dict[str, Any], goal: Any, level: Any) -> None:
    project = parts.desk.project
    fields = list(widgets.values())

    def typed(*values: Any) -> None:
        project.keep(values=dict(zip(FORM, values, strict=True)))

    def preset_chosen(base: str, goal_key: str, level_key: str) -> list[Any]:
        family = chosen_base(str(base or EMBEDDED)).family
        values = dict(zip(FORM, form_values(preset_config(goal_key, level_key, family)), strict=True))
        values["model.base"] = base
        project.keep(goal=goal_key, level=level_key, values=values)
        return list(values.values())

    kept = [field for name, field in widgets.items() if name != "model.base"]
    parts.action(gr.on([event for field in kept for event in edited(field)], typed, fields, None, **TYPING))
    for chosen in (goal, level):
        parts.action(chosen.input(preset_chosen, [widgets["model.base"], goal, level], fields, **QUIET))
    reset = gr.Button("Back to the preset", elem_id="reset", visible="hidden")
    parts.action(reset.click(preset_chosen, [widgets["model.base"], goal, level], fields, **QUIET))


def _start(parts: Parts, widgets: dict[str, Any]) -> None:
    desk = parts.desk
    parts.live(piece(elem_id="changed"), _changed)
    name = gr.Textbox(
        label="Name of the run", placeholder="date and dataset", elem_id="run-name", lines=1, max_lines=1
    )
    parts.live(piece(elem_id="facts"), facts)
    start = gr.Button(
        "Start training", variant="primary", interactive=False, elem_id="start", elem_classes="big"
    )
    parts.live(start, lambda m: gr.update(interactive=not blockers(m)))
    note = piece(elem_id="start-note")
    parts.live(piece(elem_id="command"), _command)

    def started(run_name: str, trigger: str, *values: Any) -> tuple[Any, str]:
        # The press of the button takes all with it: what was typed last may still be on its way to the draft.
        desk.project.keep(values=dict(zip(FORM, values, strict=True)), trigger=trigger.strip())
        moment = moment_of(desk)
        problems = blockers(moment)
        try:
            if problems:
                raise LoraError(problems[0])
            desk.jobs.start(moment.plan.config.changed({"name": run_name.strip()}))
        except LoraError as error:
            return gr.skip(), f'<p class="problem" role="alert">{safe(error)}</p>'
        # A run needs the memory more than a picture does; the worker loads again when it is asked.
        desk.worker.release()
        return "", ""

    parts.action(start.click(started, [name, parts.trigger, *widgets.values()], [name, note], **QUIET))


def _changed(moment: Moment) -> str:
    """How much differs from the preset, with the way back."""
    names = [name for name in FORM if name not in ("model.base",)]
    changed = [n for n in names if moment.plan.config.get(n) != moment.plan.preset.get(n)]
    if not changed:
        return ""
    listed = safe(", ".join(changed))
    return (
        f'<div class="row apart"><span class="small" title="{listed}">{len(changed)} changed from the'
        ' preset</span><button type="button" class="own quiet" data-press="reset">Reset</button></div>'
    )


def _command(moment: Moment) -> str:
    plan = moment.plan
    line = safe(command_line(plan.config, plan.goal, plan.level, plan.base.family))
    return (
        f'<details><summary>As a command</summary><pre class="log" tabindex="0">{line}</pre>'
        f'<button type="button" class="own" data-copy="{line}">Copy</button></details>'
    )


def _requests(parts: Parts) -> None:
    """Sample now and Save now: lines in the run folder, as the command line writes them."""
    for label, do in (("Sample now", "preview"), ("Save now", "save")):
        button = gr.Button(
            label, elem_id="sample-now" if do == "preview" else "save-now", min_width=0, scale=0
        )
        parts.live(
            button, lambda m: gr.update(visible=True if m.state in ("running", "preparing") else "hidden")
        )
        parts.action(button.click(functools.partial(asked, parts, do), None, None, **QUIET))


def asked(parts: Parts, do: str) -> None:
    """Pass a request on to the live run; where none is left, the next look at the page shows that."""
    try:
        parts.desk.jobs.request(do)
    except LoraError:
        return
