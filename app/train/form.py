"""The training form without its layout: from settings to widgets, from widgets to the draft on disk, and from
the draft to the settings of the run to come.

Widgets follow from the declarations in `settings/schema.py`, so label, help, range and choices are written
once; `train_form.py` places them.
"""

import contextlib
import json
import re
import shlex
import typing
from typing import Any, Literal

import gradio as gr

from app.templates import _, help_of, label_of
from lora_core.errors import ConfigError
from lora_core.model_files.detect import EMBEDDED, BaseFacts, lookup_base
from lora_core.model_files.families import Family
from lora_core.model_files.starting_settings import starting_settings
from lora_core.projects.project import DEMO, Project
from lora_core.settings.config import (
    FIELDS,
    OLD_NAMES,
    OLD_SWITCHES,
    RunConfig,
    arguments_of_lines,
    checked_value,
    choices_of,
    is_pattern_table,
    is_table,
    item_type,
    pattern_lines,
    patterns_of_lines,
    retired,
    takes_auto,
    takes_class,
)

GROUPS = {
    "Base model": ("model",),
    "Slider": ("slider",),
    "Adapter": ("adapter",),
    "Learning": ("optimizer", "loss"),
    "Data": ("dataset",),
    "Memory and speed": ("train",),
    "Samples and saving": ("sample", "save", "validation", ""),
}
"""The sections in each folded group, without the settings that are placed elsewhere."""
BASIC = ("model.base", "train.steps", "train.resolution")
ELSEWHERE = ("name", "dataset.path", "dataset.trigger")
FORM = tuple(name for name in FIELDS if name not in ELSEWHERE)


class Plan:
    """The settings of the run to come, and sentences on values of the draft that are illegal or obsolete."""

    def __init__(self, project: Project) -> None:
        draft = project.draft()
        self.goal, self.level = chosen_preset(draft)
        kept = draft_values(draft)
        values = {name: v for name, v in kept.items() if name in FORM}
        # Shown until the form is changed, which rewrites the draft without them.
        self.notes = retired(kept.items())
        self.rates: dict[str, Any] = draft.get("rates") or {}
        self.base = base_of(values)
        self.preset = preset_config(self.goal, self.level, self.base.family)
        config, self.invalid = build_config(values, self.preset)
        self.problems = list(self.invalid.values())
        path = DEMO if project.uses_demo else str(project.image_folder)
        self.is_slider = self.goal == "slider" or config.slider.on
        self.trigger = "" if self.is_slider else str(draft.get("trigger") or "")
        self.config: RunConfig = config.changed({"dataset.path": path, "dataset.trigger": self.trigger})

    @property
    def takes_usual_rates(self) -> bool:
        """Whether the usual rates of the optimizer chosen last are in the form."""
        return all(self.config.get(name) == value for name, value in self.rates["to"].items())


def draft_values(draft: dict[str, Any]) -> dict[str, Any]:
    """What a draft holds of the form, by the names that the settings have today."""
    found: dict[str, Any] = {}
    for name, value in (draft.get("values") or {}).items():
        old = OLD_SWITCHES.get(name) if value is True else None
        found |= old or {OLD_NAMES.get(name, name): value}
    return found


def chosen_preset(draft: dict[str, Any]) -> tuple[str, str]:
    """The goal and the preset of a draft; the demo's images bring their own preset."""
    level = draft.get("level") or (DEMO if draft.get("dataset") == DEMO else "balanced")
    return str(draft.get("goal") or "style"), str(level)


def base_of(values: dict[str, Any]) -> BaseFacts:
    """The base that the form's values choose."""
    name = values.get("model.base") or EMBEDDED
    by_hand = (str(values.get(key) or "auto") for key in ("model.prediction", "model.zero_terminal_snr"))
    return lookup_base(str(name), *by_hand)


def current_values(project: Project) -> dict[str, Any]:
    """What the widgets show, by the settings' names: the draft as typed, else the preset."""
    draft = project.draft()
    typed = draft_values(draft)
    standard = form_values(preset_config(*chosen_preset(draft), base_of(typed).family))
    return {name: typed.get(name, value) for name, value in standard.items()}


def keep_changed_values(project: Project, seen: dict[str, Any] | None, values: dict[str, Any]) -> None:
    """Put the typed values of a page into the draft, but not those merely displayed.

    Args:
        project: whose draft.
        seen: what the page was filled with; None if unknown.
        values: what its fields hold now.
    """
    with project.editing():
        if seen is not None:
            typed = {name: value for name, value in values.items() if value != seen[name]}
            values = current_values(project) | typed
        project.update_draft(values=values)


def group_fields(group: str) -> list[str]:
    """The settings of a folded group, in the order of declaration."""
    sections = GROUPS[group]
    return [n for n in FORM if n not in BASIC and n.rpartition(".")[0] in sections]


def widget(name: str, **options: Any) -> Any:
    """The widget of a setting, by its type and metadata."""
    kind = FIELDS[name].annotation
    common = {"label": label_of(name), "info": help_of(name), "interactive": True, **options}
    table = choices_of(name)
    if table is not None:
        rows = [(row.title, key) for key, row in table.items()]
        return gr.Dropdown(choices=rows, allow_custom_value=takes_class(name), **common)
    if kind is bool:
        return gr.Checkbox(**common)
    if kind is int or typing.get_origin(kind) is Literal:
        return gr.Number(precision=0, **common)
    if kind is float:
        # No step: learning rates are typed, and a browser would call 5e-5 invalid for a step of 1.
        return gr.Number(step=0.00001, **common)
    if kind is str or takes_auto(name):
        return gr.Textbox(lines=1, max_lines=1, **common)
    return gr.Textbox(lines=3, max_lines=8, **common)


def to_widget_value(name: str, value: Any) -> Any:
    """A setting's value as its widget shows it; a list or a table of patterns has one entry a line."""
    if isinstance(value, dict):
        return pattern_lines(value)
    if takes_auto(name):
        return str(value) if isinstance(value, str) else f"{value:g}"
    return "\n".join(map(str, value)) if isinstance(value, list) else value


def from_widget_value(name: str, value: Any) -> Any:
    """What a widget holds, as the setting's type.

    Raises:
        ConfigError: it is empty, or not legal for this setting.
    """
    kind, title = FIELDS[name].annotation, label_of(name)
    if value is None:
        raise ConfigError(_("{title} is empty.", title=title))
    if is_pattern_table(name):
        value = patterns_of_lines(title, str(value))
    elif is_table(name):
        value = arguments_of_lines(title, str(value))
    elif item_type(name) is int:
        words = re.split(r"[\s,;]+", str(value).strip())
        value = [int(word) if word.isdecimal() else word for word in words if word]
    elif item_type(name):
        value = [line.strip() for line in str(value).splitlines() if line.strip()]
    elif isinstance(value, str) and (kind in (int, float) or takes_auto(name)):
        with contextlib.suppress(ValueError):
            value = float(value.replace(",", "."))
    return checked_value(name, value, title)


def preset_name(goal: str, level: str) -> str:
    """The preset that the two choices name; the demo has one of its own."""
    return "demo" if level == "demo" and goal != "slider" else f"{goal}-{level}"


def preset_config(goal: str, level: str, family: Family | None = None) -> RunConfig:
    """The settings that a preset means for a base of `family`, all others at their defaults."""
    return RunConfig().changed(starting_settings(preset_name(goal, level), family))


def family_differences(plan: Plan) -> list[str]:
    """What the preset changes for the base's family, as "label value" each."""
    usual, own = preset_config(plan.goal, plan.level), plan.preset
    return [f"{label_of(n)} {own.get(n):g}" for n in FORM if own.get(n) != usual.get(n)]


def form_values(config: RunConfig) -> dict[str, Any]:
    """The values of all widgets of the form, by the settings' names."""
    return {name: to_widget_value(name, config.get(name)) for name in FORM}


def build_config(values: dict[str, Any], base: RunConfig) -> tuple[RunConfig, dict[str, str]]:
    """The settings that the widgets hold, and a sentence by name for each value that is not legal.

    Args:
        values: dotted name to what the widget holds.
        base: the settings of the preset, used where a value is not legal.
    """
    legal: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for name, value in values.items():
        try:
            legal[name] = from_widget_value(name, value)
        except ConfigError as error:
            problems[name] = str(error)
    return base.changed(legal), problems


def changed_names(config: RunConfig, base: RunConfig, names: list[str]) -> list[str]:
    """Which of `names` differ from the preset."""
    return [name for name in names if config.get(name) != base.get(name)]


def summary(group: str, config: RunConfig, base: RunConfig) -> str:
    """One line on a folded group: how many settings were changed, else its most important values."""
    changed = len(changed_names(config, base, group_fields(group)))
    if changed:
        return _("{count} changed from preset", count=changed)
    adapter = config.adapter
    rate = _("rate found by a test") if config.optimizer.range_test else f"{config.optimizer.lr:g}"
    rank = _("auto") if adapter.auto_rank else adapter.rank
    telling = {
        "Adapter": _("rank {rank}, alpha {alpha:g}", rank=rank, alpha=adapter.alpha),
        "Learning": f"{row_title('optimizer.name', config)}, {rate}",
        "Data": _("mirrored") if config.dataset.flip else "",
        "Memory and speed": _("batch {size}", size=config.train.batch_size),
        "Samples and saving": _("every {count} steps", count=config.save.every) if config.save.every else "",
    }
    return telling[group]


def row_title(name: str, config: RunConfig) -> str:
    """The title of the row that a setting names."""
    table = choices_of(name)
    value = config.get(name)
    return str(table[value].title) if table and value in table else str(value)


def command_line(config: RunConfig, goal: str, level: str, family: Family | None = None) -> str:
    """The command that does what Start does: the preset, and each setting that differs from it.

    Args:
        config: the settings.
        goal: of the preset.
        level: of the preset.
        family: of the base, whose starting values the command takes too.
    """
    base = preset_config(goal, level, family)
    dataset = [] if config.slider.on else [config.dataset.path]
    parts = ["lora-easel", "train", *dataset, "--preset", preset_name(goal, level)]
    if config.name:
        parts += ["--name", config.name]
    if config.model.base != base.model.base:
        parts += ["--base", config.model.base]
    for name in FIELDS:
        # Without a rate, another optimizer would bring its own.
        needed = name == "optimizer.lr" and config.optimizer.name != base.optimizer.name
        changed = needed or config.get(name) != base.get(name)
        if changed and name not in ("name", "model.base", "dataset.path"):
            parts += ["--set", f"{name}={_toml(config.get(name))}"]
    return shlex.join(parts)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        rows = (f"{json.dumps(name, ensure_ascii=False)} = {json.dumps(one)}" for name, one in value.items())
        return f"{{{', '.join(rows)}}}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
