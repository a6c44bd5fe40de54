"""The form: from metadata to widgets, from what was typed to settings."""

import shlex

import pytest

from app.train.form import (
    FORM,
    GROUPS,
    Plan,
    build_config,
    command_line,
    current_values,
    form_values,
    from_widget_value,
    group_fields,
    preset_config,
    summary,
    widget,
)
from lora_core.errors import ConfigError
from lora_core.model_files.starting_settings import GOALS, LEVELS
from lora_core.projects.project import Project
from lora_core.settings.config import FIELDS, RunConfig, help_of, label_of, parsed_assignment


def test_every_setting_has_a_place() -> None:
    placed = {name for group in GROUPS for name in group_fields(group)}
    elsewhere = {"name", "dataset.path", "dataset.trigger", "model.base", "train.steps", "train.epochs"}
    elsewhere.add("train.resolution")
    assert placed | elsewhere == set(FIELDS)


@pytest.mark.parametrize("name", FORM)
def test_a_widget_takes_its_words_from_the_setting(name: str) -> None:
    made = widget(name)
    assert (made.label, made.info) == (label_of(name), help_of(name))


def test_what_the_form_shows_reads_back_as_the_same_settings() -> None:
    config = RunConfig().changed({
        "sample.prompts": ["a cat", "a dog"], "optimizer.lr": 5e-5,
        "adapter.block_ranks": {r"unet\.mid_block": 4, "attn2": 0}, "optimizer.block_lr": {"mid_block": 1e-5},
    })  # fmt: skip
    again, problems = build_config(form_values(config), RunConfig())
    assert (again, problems) == (config, {})


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("train.steps", 0, "Steps"),
        ("train.steps", None, "Steps is empty."),
        ("train.resolution", "large", "Resolution = 'large' should be an integer"),
        ("adapter.rank", 5000, "Rank (size)"),
        ("optimizer.lr", -1, "Learning rate"),
        ("adapter.block_ranks", "mid_block", "Ranks by block has the line 'mid_block'"),
        ("optimizer.block_lr", "mid_block = 11", "Rates by block 'mid_block' = 11"),
    ],
)
def test_what_is_not_legal_is_a_sentence_with_the_field_s_own_name(
    name: str, value: object, sentence: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        from_widget_value(name, value)
    assert str(caught.value).startswith(sentence)


def test_a_resolution_may_be_typed() -> None:
    assert from_widget_value("train.resolution", "640") == 640


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("level", [*LEVELS, "demo"])
def test_the_command_line_means_the_same_settings(goal: str, level: str) -> None:
    base = preset_config(goal, level)
    config = base.changed(
        {
            "dataset.path": "/a b/é",
            "optimizer.lr": 3e-4,
            "dataset.flip": True,
            "sample.prompts": ["it's"],
            "adapter.block_ranks": {r"unet\.mid_block": 4, "a b'": 0},
        }
    )
    words = shlex.split(command_line(config, goal, level))
    assert words[:3] == ["lora-easel", "train", "/a b/é"]
    sets = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    again = base.changed(dict(parsed_assignment(one) for one in sets)).changed({"dataset.path": words[2]})
    assert again == config


def test_a_group_says_what_was_changed() -> None:
    base = RunConfig()
    assert summary("Adapter", base, base) == "rank 16, alpha 16"
    assert summary("Adapter", base.changed({"adapter.rank": 4}), base) == "1 changed from preset"


def test_a_draft_survives_and_may_hold_what_is_not_legal(tmp_path) -> None:
    values = form_values(RunConfig()) | {
        "train.steps": None,
        "optimizer.lr": 2e-4,
    }
    Project(tmp_path).update_draft(values=values, goal="object", level="quick", trigger="zwx")
    again = Project(tmp_path)
    plan = Plan(again)
    assert plan.problems == ["Steps is empty."]
    assert (plan.config.optimizer.lr, plan.config.dataset.trigger, plan.goal) == (2e-4, "zwx", "object")
    assert current_values(again)["train.steps"] is None
