"""Names of settings from earlier versions: files that hold them open, and are read as the names of today."""

import json
import logging
from pathlib import Path

import pytest

from app.templates import with_labels
from app.train.form import Plan, current_values
from lora_core.errors import ConfigError
from lora_core.model_files.starting_settings import settings_from_lora
from lora_core.projects.project import Project
from lora_core.runs import events
from lora_core.runs.folder import RunFolder
from lora_core.settings import config as settings
from lora_core.settings.config import FIELDS, OLD_NAMES, RunConfig, flattened, load_toml, parsed_assignment
from tests.app.bases import write_header
from tests.train.conftest import one_thread
from tests.train.runs import broken_at, check_whole, result, toy, trained

OLD_CONFIG = """
name = "{name}"
seed = 3

[model]
base = "{base}"
vae = ""
prediction = "auto"
zero_terminal_snr = "auto"

[adapter]
kind = "lora"
rank = 2
alpha = 2.0
rslora = false
targets = "attention"
init = "default"
dropout = 0.2
rank_dropout = 0.0
module_dropout = 0.0

[adapter.block_ranks]

[adapter.block_alphas]

[dataset]
path = "{pictures}"
trigger = ""
flip = true
caption_dropout = 0.05
tag_dropout = 0.0
shuffle_tags = true
keep_tags = 0

[train]
steps = 8
batch_size = 1
accumulate = 2
resolution = 32
device = "auto"
precision = "fp32"
checkpointing = true
quantise = "none"
offload = false
deterministic = false
clip_skip = 1
tokens = 150

[optim]
name = "nadam"
lr = 0.002
range_test = false
text_encoder_lr = 0.0005
text_encoder_2_lr = 0.0
text_encoder_until = 0.75
lora_plus = 2.0
schedule = "linear"
warmup = 0.25
clip = 0.5

[optim.block_lr]
mid_block = 0.001

[loss]
kind = "huber"
huber_delta = 0.1
huber_schedule = "snr"
min_snr = 4.0
noise_offset = 0.0

[validation]
every = 4
pictures = 1.0
triples = 2
budget = 0.0
gauge = false
prior = 1
patience = 0

[preview]
every = 4
prompts = ["a dot"]
seed = 7
steps = 1
cfg = 3.0
cfg_rescale = "auto"
sampler = "euler"

[save]
every = 2
keep_last = 3
keep_best = true
ema = 0.0
tensorboard = false
"""
"""`config.toml` as it was written before the settings were renamed; this text stays as it is."""
TODAY = {
    "train.gradient_accumulation_steps": 2, "train.gradient_checkpointing": True,
    "train.max_token_length": 150,
    "train.quantize_base": "none", "optimizer.name": "nadam", "optimizer.lr": 0.002,
    "optimizer.text_encoder_lr": 0.0005, "optimizer.stop_text_encoder_at": 0.75, "optimizer.lora_plus": 2.0,
    "optimizer.schedule": "linear", "optimizer.warmup": 0.25, "optimizer.max_grad_norm": 0.5,
    "optimizer.block_lr": {"mid_block": 0.001}, "loss.type": "huber", "loss.min_snr": 4.0,
    "validation.draws_per_image": 2, "validation.max_time_share": 0.0, "validation.memorization": False,
    "validation.forgetting": 1, "sample.every": 4, "sample.prompts": ["a dot"], "sample.seed": 7,
    "sample.steps": 1, "sample.cfg": 3.0, "sample.sampler": "euler",
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_said_yet() -> None:
    settings._TOLD.clear()


def old_run(path: Path, base: Path, pictures: Path) -> RunFolder:
    run = RunFolder.create(path, RunConfig())
    run.config_file.write_text(OLD_CONFIG.format(name=path.name, base=base, pictures=pictures))
    return run


def test_every_old_name_leads_to_a_setting() -> None:
    assert set(OLD_NAMES.values()) <= set(FIELDS)
    assert not set(OLD_NAMES) & set(FIELDS)


def test_an_old_run_resumes_to_the_same_bits_and_exports(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = toy(tmp_path)
    run = old_run(tmp_path / "home" / "runs" / "old", own.base, own.pictures)
    written = run.config_file.read_bytes()
    assert {name: run.config().get(name) for name in TODAY} == TODAY
    with one_thread():
        broken_at(run, events.StepDone, 5)
        trained(run)
        check_whole(run)
        changes = {name.replace(".", "__"): run.config().get(name) for name in FIELDS if name != "name"}
        unbroken = own.run("new", **changes)
        trained(unbroken)
    assert result(run) == result(unbroken)
    assert run.config_file.read_bytes() == written, "the fingerprint of a run is that of its file"
    assert [record for record in caplog.records if "is now" in record.message] == []
    like = settings_from_lora(run.exports / "old.safetensors")
    assert {name: like.values[name] for name in TODAY} == TODAY


def test_what_a_user_writes_is_read_and_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(OLD_CONFIG.format(name="x", base="demo", pictures="demo"))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            config = RunConfig.from_dict(load_toml(file))
            assert parsed_assignment("optim.lr=1e-3") == ("optimizer.lr", 1e-3)
            assert config.changed({"preview.seed": 9, "optim.lr": "auto"}).sample.seed == 9
    assert {name: config.get(name) for name in TODAY} == TODAY
    assert config.get("optim.clip") == 0.5
    said = [record.message for record in caplog.records]
    assert len(said) == 1
    assert said[0].startswith("Old names of settings still work: ")
    assert all(said[0].count(f"{name} is now") == 1 for name in ("optim.lr", "preview.seed", "loss.kind"))


def test_an_old_and_a_new_name_together_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"optim\.lr is the old name of optimizer\.lr.*remove optim\.lr"):
        flattened({"optim": {"lr": 1e-3}, "optimizer": {"lr": 1e-4}})


def test_an_old_draft_of_a_project_opens(tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    project.update_draft(
        values={"optim.lr": 3e-4, "train.checkpointing": True, "preview.cfg": 2.5, "adapter.kind": "lora"}
    )
    plan = Plan(project)
    assert plan.problems == plan.notes == []
    assert (plan.config.optimizer.lr, plan.config.train.gradient_checkpointing) == (3e-4, True)
    assert current_values(project)["sample.cfg"] == 2.5


def test_an_old_header_is_read(tmp_path: Path) -> None:
    layers = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": [2, 8]}
    text = OLD_CONFIG.format(name="x", base="demo", pictures="demo")
    like = settings_from_lora(write_header(tmp_path / "a.safetensors", layers, {"lora_easel.config": text}))
    assert {name: like.values[name] for name in TODAY} == TODAY
    assert like.left == []


def test_sentences_of_old_events_call_settings_as_the_form_does() -> None:
    assert with_labels(json.loads('"raise train.tokens or lower optim.lr."')) == (
        "raise Caption tokens or lower Learning rate."
    )
