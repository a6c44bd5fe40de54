"""The form takes the settings of a LoRA file."""

import time
from pathlib import Path

from app.train.form import Plan, current_values
from app.train.start import take_settings
from lora_core.model_files.sizes import export_bytes
from lora_core.model_files.starting_settings import settings_from_lora
from lora_core.projects.project import Project
from tests.model_files.test_starting_settings import KOHYA, lora


def test_the_form_takes_them_and_the_page_says_what_was_taken(tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    project.update_draft(values=current_values(project) | {"sample.cfg": 7.5})
    hostile = {
        **KOHYA,
        "ss_sd_model_name": "<img src=x onerror=alert(1)>",
        "modelspec.trigger_phrase": "zwx dog",
    }
    said = take_settings(project, settings_from_lora(lora(tmp_path, hostile)), "<b>.safetensors")
    values = current_values(project)
    assert (values["adapter.rank"], values["train.steps"], values["sample.cfg"]) == (32, 2000, 7.5)
    assert values["adapter.conv_rank"] == 8
    assert project.draft()["trigger"] == "zwx dog"
    assert "36 settings taken" in said
    assert "<img" not in said
    assert "<b>" not in said


def test_a_file_cannot_freeze_the_window_with_a_pattern(tmp_path: Path) -> None:
    """`re` would look for this one in a layer's name for longer than anybody lives."""
    hostile = {"lora_easel.config": "[adapter]\nrank = 4\n[adapter.block_ranks]\n'([a-z0-9_.]+)+!' = 4"}
    project = Project(tmp_path / "project")
    project.update_draft(values=current_values(project))
    take_settings(project, settings_from_lora(lora(tmp_path, hostile)), "x.safetensors")
    plan = Plan(project)
    begun = time.process_time()
    assert plan.base.facts is not None
    assert export_bytes(plan.base.facts, plan.config)
    assert time.process_time() - begun < 2.0
