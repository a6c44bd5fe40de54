"""The training form: widgets made from the settings' metadata, so that label, tooltip, range and choices are
said once.

Tabs place the widgets by hand; this module only supplies words, ranges and the way from widgets to settings.
"""

import json
import shlex
from typing import Any

import gradio as gr

from lora_core.spec.config import (
    FIELDS,
    RunConfig,
    checked_value,
    is_pattern_table,
    pattern_lines,
    patterns_of_lines,
)
from lora_core.spec.errors import ConfigError
from lora_core.spec.families import Family
from lora_core.spec.presets import starting_settings
from lora_core.spec.setting import AUTO, NumberOrAuto

# Which sections make up a folded group. What stands in the basic form or follows from elsewhere is left out
# below.
GROUPS = {
    "Base model": ("model",),
    "Adapter": ("adapter",),
    "Learning": ("optim", "loss"),
    "Data": ("dataset",),
    "Memory and speed": ("train",),
    "Samples and saving": ("preview", "save", "validation", ""),
}
BASIC = ("model.base", "train.steps", "train.resolution")
ELSEWHERE = ("name", "dataset.path", "dataset.trigger")
FORM = tuple(name for name in FIELDS if name not in ELSEWHERE)


def group_fields(group: str) -> list[str]:
    """The settings of a folded group, in the order of declaration."""
    sections = GROUPS[group]
    return [n for n in FORM if n not in BASIC and n.rpartition(".")[0] in sections]


def widget(name: str, **options: Any) -> Any:
    """The widget of a setting, by its type and metadata."""
    info = FIELDS[name]
    common = {"label": info.metadata["title"], "info": info.metadata["help"], "interactive": True, **options}
    table = info.metadata["table"]
    if table is not None:
        return gr.Dropdown(choices=[(row.title, key) for key, row in table.items()], **common)
    if info.type is bool:
        return gr.Checkbox(**common)
    if info.type is int:
        return gr.Number(precision=0, **common)
    if info.type is float:
        # No step: learning rates are typed, and a browser would call 5e-5 invalid for a step of 1.
        return gr.Number(step=0.00001, **common)
    if info.type in (str, NumberOrAuto):
        return gr.Textbox(lines=1, max_lines=1, **common)
    return gr.Textbox(lines=3, max_lines=8, **common)


def shown(name: str, value: Any) -> Any:
    """A setting's value as its widget shows it: a list of texts, or a table of patterns, is one a line."""
    if isinstance(value, dict):
        return pattern_lines(value)
    if FIELDS[name].type == NumberOrAuto:
        return str(value) if isinstance(value, str) else f"{value:g}"
    return "\n".join(value) if isinstance(value, list) else value


def typed(name: str, value: Any) -> Any:
    """What a widget holds, as the setting's type.

    Raises:
        ConfigError: it is empty, or not legal for this setting.
    """
    info = FIELDS[name]
    title = info.metadata["title"]
    word = info.type == NumberOrAuto and str(value).strip().lower() == AUTO
    if info.type in (int, float, NumberOrAuto) and isinstance(value, str) and not word:
        try:
            value = float(value.replace(",", "."))
        except ValueError as error:
            numbers = f"a number or {AUTO}" if info.type == NumberOrAuto else "a number"
            raise ConfigError(f"{title} should be {numbers}, not {value!r}.") from error
    if value is None:
        raise ConfigError(f"{title} is empty.")
    if info.type not in (int, float, bool, str, NumberOrAuto) and not is_pattern_table(info):
        value = [line.strip() for line in str(value).splitlines() if line.strip()]
    try:
        if is_pattern_table(info):
            value = patterns_of_lines(name, str(value))
        return checked_value(name, info, value)
    except ConfigError as error:
        raise ConfigError(str(error).replace(name, title, 1)) from error


def preset_name(goal: str, level: str) -> str:
    """The preset that the two choices name; the demo's own stands for itself."""
    return "demo" if level == "demo" else f"{goal}-{level}"


def preset_config(goal: str, level: str, family: Family | None = None) -> RunConfig:
    """The settings that a preset means for a base of `family`, all others at their defaults."""
    return RunConfig().changed(starting_settings(preset_name(goal, level), family))


def for_family(goal: str, level: str, family: Family | None) -> list[str]:
    """What the preset is for this family and not for others, as "title value" each."""
    usual, own = preset_config(goal, level), preset_config(goal, level, family)
    return [f"{FIELDS[n].metadata['title']} {own.get(n):g}" for n in FORM if own.get(n) != usual.get(n)]


def carried_over(values: dict[str, Any], before: RunConfig, after: RunConfig) -> dict[str, Any]:
    """The form's values once another base has other starting values: what was left at the start goes along.

    Args:
        values: dotted name to what the widget holds.
        before: the starting values that the form was filled with.
        after: those of the new base.
    """
    return {
        name: shown(name, after.get(name)) if value == shown(name, before.get(name)) else value
        for name, value in values.items()
    }


def form_values(config: RunConfig) -> list[Any]:
    """The values of all widgets of the form, in the order of `FORM`."""
    return [shown(name, config.get(name)) for name in FORM]


def config_of(values: dict[str, Any], base: RunConfig) -> tuple[RunConfig, list[str]]:
    """The settings that the form stands for, and a sentence for each value that is not legal.

    Args:
        values: dotted name to what the widget holds.
        base: the settings of the preset, which stand in where a value is not legal.
    """
    legal: dict[str, Any] = {}
    problems = []
    for name, value in values.items():
        try:
            legal[name] = typed(name, value)
        except ConfigError as error:
            problems.append(str(error))
    return base.changed(legal), problems


def changed_names(config: RunConfig, base: RunConfig, names: list[str]) -> list[str]:
    """Which of `names` differ from the preset."""
    return [name for name in names if config.get(name) != base.get(name)]


def summary(group: str, config: RunConfig, base: RunConfig) -> str:
    """What a folded group says about itself: what was changed, else its most telling values."""
    changed = len(changed_names(config, base, group_fields(group)))
    if changed:
        return f"{changed} changed from preset"
    rate = "rate found by a test" if config.optim.range_test else f"{config.optim.lr:g}"
    telling = {
        "Base model": "",
        "Adapter": f"rank {config.adapter.rank}, alpha {config.adapter.alpha:g}",
        "Learning": f"{title_of('optim.name', config)}, {rate}",
        "Data": "mirrored" if config.dataset.flip else "",
        "Memory and speed": f"batch {config.train.batch_size}",
        "Samples and saving": f"every {config.save.every} steps" if config.save.every else "",
    }
    return telling[group]


def title_of(name: str, config: RunConfig) -> str:
    """The title of the row that a setting names."""
    table = FIELDS[name].metadata["table"]
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
    parts = ["lora-easel", "train", config.dataset.path, "--preset", preset_name(goal, level)]
    if config.name:
        parts += ["--name", config.name]
    if config.model.base != base.model.base:
        parts += ["--base", config.model.base]
    for name in FIELDS:
        if name not in ("name", "model.base", "dataset.path") and config.get(name) != base.get(name):
            parts += ["--set", f"{name}={_toml(config.get(name))}"]
    return shlex.join(parts)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        rows = (f"{json.dumps(pattern, ensure_ascii=False)} = {number}" for pattern, number in value.items())
        return f"{{{', '.join(rows)}}}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
