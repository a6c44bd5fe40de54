"""A run's settings for somebody else: what differs from the defaults first, and no places of a computer."""

from typing import Any

from lora_core.report.story import Story
from lora_core.spec.config import settings
from lora_core.spec.heat import table_html
from lora_core.spec.rank_plots import folded, paragraph

HIDDEN = ("name",)
PLACES = ("model.base", "model.vae", "dataset.path", "adapter.init")


def settings_html(story: Story) -> str:
    """The changed ones, then the rest folded."""
    changed: list[tuple[str, ...]] = []
    usual: list[tuple[str, ...]] = []
    for name, info, default in settings():
        if name in HIDDEN:
            continue
        value = story.config.get(name)
        row = (info.metadata["title"], shown(name, value), shown(name, default), name)
        (changed if value != default else usual).append(row)
    heads = ("Setting", "Value", "Default", "Name")
    first = (
        table_html(heads, changed, "Changed from the defaults", numbers=False)
        if changed
        else paragraph("All settings are the defaults.")
    )
    rest = table_html(("Setting", "Value", "Name"), [(a, b, d) for a, b, _, d in usual], "As usual", False)
    return first + folded(f"The other {len(usual)} settings", rest)


def shown(name: str, value: Any) -> str:
    """A value as text; of a path, its last part."""
    if name in PLACES:
        return base_name(str(value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{pattern} = {number:g}" for pattern, number in value.items()) or "none"
    if isinstance(value, list):
        return " | ".join(map(str, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) or "none"


def base_name(text: str) -> str:
    """The last part of a path or of a hub id."""
    return text.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] or "none"
