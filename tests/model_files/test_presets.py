"""The shipped presets: each goal with each level, legal, and nothing but settings that a preset may hold."""

import pytest

from lora_core.errors import ConfigError
from lora_core.model_files.families import FAMILIES
from lora_core.model_files.starting_settings import GOALS, LEVELS, preset, preset_names, starting_settings
from lora_core.settings.config import RunConfig
from lora_core.system.paths import PRESETS

PERSONAL = ("name", "dataset.path", "dataset.trigger", "model.base", "model.vae")


def test_there_is_a_file_for_each_name_and_no_other() -> None:
    assert sorted(path.stem for path in PRESETS.glob("*.toml")) == sorted(preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_the_preset_is_legal(name: str) -> None:
    values = preset(name)
    assert values
    config = RunConfig().changed(values)
    for key, value in values.items():
        assert config.get(key) == value, f"{key} is not written as the config keeps it"


@pytest.mark.parametrize("name", [f"{goal}-{level}" for goal in GOALS for level in LEVELS])
def test_a_goal_leaves_a_persons_own_settings_alone(name: str) -> None:
    assert set(preset(name)).isdisjoint(PERSONAL)


def test_more_quality_takes_more_steps() -> None:
    for goal in GOALS:
        steps = [RunConfig().changed(preset(f"{goal}-{level}")).train.steps for level in LEVELS]
        assert steps == sorted(steps)


def test_a_level_alone_means_a_character() -> None:
    assert preset("quick") == preset("character-quick")


@pytest.mark.parametrize("family", [None, *FAMILIES.values()])
def test_what_a_family_needs_counts_more_than_the_preset(family) -> None:
    """Text encoders of the largest family are not trained unless a person asks for it."""
    for name in ("", *preset_names()):
        start = starting_settings(name, family)
        config = RunConfig().changed(start)
        own = dict(family.settings) if family else {}
        for key, value in ({**preset(name), **own} if name else own).items():
            assert config.get(key) == value
    assert starting_settings("character-high", FAMILIES["sdxl"])["optimizer.text_encoder_lr"] == 0.0
    assert starting_settings("character-high", FAMILIES["sd15"])["optimizer.text_encoder_lr"] == 5e-5


def test_an_unknown_preset_is_answered_with_all_names() -> None:
    with pytest.raises(ConfigError, match="demo, character-quick"):
        preset("best")
