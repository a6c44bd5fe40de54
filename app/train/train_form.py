"""Layout and wiring of the Train tab's form: five basic settings, the rest under Advanced in groups, with a
search and buttons that reset."""

import functools
import re
from typing import Any

import gradio as gr

from app.bindings import QUIET, TYPING, Bindings, edit_events, html_block
from app.state import Snapshot
from app.templates import render
from app.train.base_picker import HIDDEN_INFO, build_picker, wire_picker
from app.train.form import (
    FORM,
    GROUPS,
    Plan,
    changed_names,
    chosen_preset,
    current_values,
    form_values,
    group_fields,
    keep_changed_values,
    preset_config,
    summary,
    widget,
    widget_values,
)
from lora_core.model_files.detect import EMBEDDED, lookup_base
from lora_core.model_files.starting_settings import GOALS, LEVELS
from lora_core.settings.config import help_of, label_of

RESOLUTIONS = (128, 256, 512, 768, 1024)
FOLDED = [group for group in GROUPS if group != "Base model"]
UNMATCHED = "unmatched"


class TrainForm:
    """The widgets of the form, their groups and the search."""

    def __init__(self, bindings: Bindings) -> None:
        """Lay out the form and wire its events."""
        self.bindings = bindings
        self.folds: dict[str, Any] = {}
        made, added = build_picker(bindings)
        self._build_basic(made)
        search = self._build_advanced(made)
        self.widgets: dict[str, Any] = {name: made[name] for name in FORM}
        self.fields = list(self.widgets.values())
        # What this page was filled with: only what differs from it was typed here. Without it, a second page
        # would overwrite newer values of the first with its old ones.
        self.seen = gr.State(None)
        for index, name in enumerate(FORM):
            bindings.fill_on_load(self.widgets[name], functools.partial(_widget_value, bindings, index))
        bindings.fill_on_load(self.goal, lambda: chosen_preset(bindings.app_state.project.draft())[0])
        bindings.fill_on_load(self.level, lambda: chosen_preset(bindings.app_state.project.draft())[1])
        bindings.fill_on_load(self.seen, lambda: widget_values(bindings.app_state.project))
        self._wire(search)
        wire_picker(bindings, self.widgets, self.level, added, self.seen)

    def _build_basic(self, made: dict[str, Any]) -> None:
        with gr.Row(elem_classes="pair"):
            self.goal = gr.Dropdown(
                [(title, key) for key, title in GOALS.items()], label="Goal", elem_id="goal"
            )
            levels = [*((title, key) for key, title in LEVELS.items()), ("Demo", "demo")]
            self.level = gr.Dropdown(levels, label="Preset", elem_id="preset")
        with gr.Row(elem_classes="pair"):
            made["train.steps"] = widget("train.steps", elem_id="steps", elem_classes=HIDDEN_INFO)
            made["train.resolution"] = gr.Dropdown(
                _resolutions(0),
                label="Resolution",
                info=help_of("train.resolution"),
                allow_custom_value=True,
                elem_id="resolution",
                elem_classes=HIDDEN_INFO,
            )
        self.bindings.follow(
            made["train.resolution"], lambda snap: gr.update(choices=_resolutions(_own_size(snap)))
        )

    def _build_advanced(self, made: dict[str, Any]) -> Any:
        with gr.Column(elem_classes="group advanced"):
            self.bindings.follow(html_block(elem_id="changed"), _changed)
            search = gr.Textbox(
                label="Find a setting",
                placeholder="Find a setting: rank, clip skip, warm-up ...",
                elem_id="find-setting",
                lines=1,
                max_lines=1,
            )
            self.none = html_block(elem_id="find-none")
        for group in FOLDED:
            with gr.Column(elem_classes="group", elem_id=f"group-{_slug(group)}"):
                note = html_block(elem_classes="group-note")
                self.bindings.follow(note, functools.partial(_group_note, group))
                with gr.Accordion(group, open=False) as self.folds[group]:
                    for name in group_fields(group):
                        made[name] = widget(name, elem_id=_field_id(name), elem_classes=HIDDEN_INFO)
        return search

    def _wire(self, search: Any) -> None:
        project, bindings = self.bindings.app_state.project, self.bindings

        def keep(seen: list[Any] | None, *values: Any) -> list[Any]:
            keep_changed_values(project, seen, list(values))
            return list(values)

        def apply_preset(base: str, goal: str, level: str) -> list[Any]:
            family = lookup_base(str(base or EMBEDDED)).family
            values = dict(zip(FORM, form_values(preset_config(goal, level, family)), strict=True))
            values["model.base"] = base
            project.update_draft(goal=goal, level=level, values=values, fitted=None)
            return [list(values.values()), *values.values()]

        def apply_if_changed(base: str, goal: str, level: str) -> list[Any]:
            """A dropdown's event also fires on blur, which must not undo what was typed."""
            if (goal, level) == chosen_preset(project.draft()):
                return [gr.skip()] * len(filled)
            return apply_preset(base, goal, level)

        kept = [field for name, field in self.widgets.items() if name != "model.base"]
        # Unfolding a group renders its fields anew, so only events of the user count.
        events = [event for field in kept for event in edit_events(field)]
        bindings.refresh_after(gr.on(events, keep, [self.seen, *self.fields], self.seen, **TYPING))
        choices = [self.widgets["model.base"], self.goal, self.level]
        filled = [self.seen, *self.fields]
        for chosen in (self.goal, self.level):
            bindings.refresh_after(chosen.input(apply_if_changed, choices, filled, **TYPING))
        reset = gr.Button("Back to the preset", elem_id="reset", visible="hidden")
        bindings.refresh_after(reset.click(apply_preset, choices, filled, **QUIET))
        for group in FOLDED:
            back = gr.Button(f"Reset {group}", elem_id=f"reset-{_slug(group)}", visible="hidden")
            own = [self.widgets[name] for name in group_fields(group)]
            bindings.refresh_after(
                back.click(functools.partial(self._reset, group), None, [self.seen, *own], **QUIET)
            )
        matched = [name for group in FOLDED for name in group_fields(group)]
        outputs = [self.none, *self.folds.values(), *(self.widgets[name] for name in matched)]
        # Its input event swallows the first key; each change comes from the user, as nothing else fills it.
        search.change(search_settings, search, outputs, **TYPING)

    def _reset(self, group: str) -> list[Any]:
        """Reset the settings of a group to the preset."""
        project = self.bindings.app_state.project
        preset = Plan(project).preset
        standard = dict(zip(FORM, form_values(preset), strict=True))
        own = {name: standard[name] for name in group_fields(group)}
        values = current_values(project) | own
        project.update_draft(values=values)
        return [list(values.values()), *own.values()]


def search_settings(words: str) -> list[Any]:
    """Unfold the groups with a match and hide the fields without one.

    Args:
        words: what was typed; a setting matches by its name, its label, its help or its group.

    Returns:
        The note, then an update for each group and each field in it.
    """
    wanted = str(words or "").lower().split()
    folds, fields, hits = [], [], 0
    for group in FOLDED:
        names = group_fields(group)
        matching = [name for name in names if all(word in _searched(group, name) for word in wanted)]
        hits += len(matching)
        folds.append(gr.update(open=bool(wanted and matching)))
        hidden = [HIDDEN_INFO, UNMATCHED]
        fields += [gr.update(elem_classes=HIDDEN_INFO if name in matching else hidden) for name in names]
    note = "" if hits else render("train/form.html", part="none", words=words[:60])
    return [note, *folds, *fields]


def _searched(group: str, name: str) -> str:
    return f"{name} {name.replace('_', ' ')} {label_of(name)} {help_of(name)} {group}".lower()


def _slug(group: str) -> str:
    return re.sub(r"\W+", "-", group.lower())


def _field_id(name: str) -> str:
    return name.replace(".", "-").replace("_", "-")


def _own_size(snapshot: Snapshot) -> int:
    base = snapshot.plan.base
    return base.resolution if base.family else 0


def _resolutions(own: int) -> list[tuple[str, int]]:
    """The sizes to choose from; 0 is what the base was trained at."""
    words = f"{own} (the base)" if own else "As the base"
    return [(words, 0), *((str(side), side) for side in RESOLUTIONS if side != own)]


def _widget_value(bindings: Bindings, index: int) -> Any:
    return widget_values(bindings.app_state.project)[index]


def _group_note(group: str, snapshot: Snapshot) -> str:
    """The summary of a folded group, with a reset button if something was changed."""
    config, preset = snapshot.plan.config, snapshot.plan.preset
    changed = changed_names(config, preset, group_fields(group))
    text, reset = summary(group, config, preset), f"reset-{_slug(group)}" if changed else ""
    return render("train/form.html", part="group", group=group, text=text, reset=reset)


def _changed(snapshot: Snapshot) -> str:
    """How many settings differ from the preset, with a reset button."""
    names = [name for name in FORM if name != "model.base"]
    changed = changed_names(snapshot.plan.config, snapshot.plan.preset, names)
    return render("train/form.html", part="changed", names=[label_of(name) for name in changed])
