"""Starting configs by goal: TOML files in `assets/presets` that hold settings and nothing else."""

from typing import Any

from lora_core.spec.config import flattened, load_toml
from lora_core.spec.errors import ConfigError
from lora_core.spec.families import Family
from lora_core.spec.paths import PRESETS

GOALS = {"character": "Character", "style": "Style", "object": "Object"}
LEVELS = {"quick": "Quick", "balanced": "Balanced", "high": "High"}


def preset_names() -> list[str]:
    """All presets: `demo`, and each goal with each level ("style-balanced")."""
    return ["demo", *(f"{goal}-{level}" for goal in GOALS for level in LEVELS)]


def preset(name: str) -> dict[str, Any]:
    """The settings of a preset, dotted name to value. A level alone ("quick") means it for a character.

    Raises:
        ConfigError: there is no such preset.
    """
    wanted = f"character-{name}" if name in LEVELS else name
    if wanted not in preset_names():
        raise ConfigError(f"The preset {name!r} does not exist; choose one of {', '.join(preset_names())}.")
    return flattened(load_toml(PRESETS / f"{wanted}.toml"))


def starting_settings(name: str, family: Family | None) -> dict[str, Any]:
    """What a run starts from before a person changes anything, dotted name to value.

    Args:
        name: of a preset, or "" for the general defaults.
        family: of the base, whose own settings count more than the preset's; None where it is not known.

    Raises:
        ConfigError: there is no such preset.
    """
    return (preset(name) if name else {}) | dict(family.settings if family else {})
