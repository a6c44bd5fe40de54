"""Two text encoders, pooled text and size conditioning: training, validation and samples on a narrow base of
SDXL's layout."""

import dataclasses
import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image

from lora_core.lora.inject import adapter_weights
from lora_core.model_files.detect import read_base_facts
from lora_core.model_files.starting_settings import starting_settings
from lora_core.models.encode import encode_prompt
from lora_core.models.load import BaseModel
from lora_core.runs.folder import RunFolder
from lora_core.settings.config import RunConfig
from lora_core.system.files import DEMO_BASE
from lora_core.train.callbacks import draw_samples
from lora_core.train.data import PromptCache
from lora_core.train.loop import StepSettings, training_steps
from lora_core.train.setup import RuntimePlan, prepare
from lora_core.train.validation import Validator
from tests.checkpoints import write_folder

BOTH = {"optimizer.text_encoder_lr": 5e-4, "optimizer.text_encoder_2_lr": 2e-4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With the words of the embedded base: its vocabulary is a tenth of CLIP's."""
    made = write_folder(tmp_path_factory.mktemp("base") / "large", "sdxl", torch.bfloat16, "wordless")
    for name, padding in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        shutil.rmtree(made / name)
        shutil.copytree(DEMO_BASE / "tokenizer", made / name)
        config = made / name / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token": padding}))
        (made / name / "special_tokens_map.json").unlink()
    return made


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    place = tmp_path_factory.mktemp("pictures")
    for name, size in (("a", (200, 80)), ("b", (64, 64)), ("c", (64, 64))):
        Image.effect_noise(size, 60).convert("RGB").save(place / f"{name}.png")
        (place / f"{name}.txt").write_text(f"thing {name}")
    return place


@pytest.fixture
def config(folder, pictures):
    return RunConfig().changed({
        "dataset.path": str(pictures), "model.base": str(folder), "adapter.rank": 2, "adapter.alpha": 2.0,
        "train.steps": 4, "train.precision": "fp32", "train.resolution": 64, "optimizer.lr": 1e-3,
        "optimizer.text_encoder_lr": 0.0, "validation.pictures": 1, "validation.draws_per_image": 2,
        "validation.forgetting": 1, "optimizer.warmup": 0.0, "optimizer.schedule": "constant",
        "loss.min_snr": 0.0,
        "sample.prompts": ["thing"], "sample.steps": 1,
    })  # fmt: skip


def _session(place: Path, config: RunConfig):
    run = RunFolder(place / "runs" / "r")
    if not run.path.exists():
        run = RunFolder.create(run.path, config)
    return prepare(run, config, RuntimePlan.of(run, config), lambda *_: None)


def _steps(session, config, count):
    steps = training_steps(session.state, session.batches, session.text, StepSettings(config, 4), 0)
    for _ in range(count):
        next(steps)
        yield adapter_weights(session.state.injected).layers


def test_the_family_starts_with_frozen_text_encoders(folder):
    config = RunConfig().changed(starting_settings("character-quick", read_base_facts(str(folder)).family))
    assert (config.optimizer.text_encoder_lr, config.optimizer.text_encoder_2_lr) == (0.0, 0.0)
    assert config.optimizer.lr == 1e-4


def test_frozen_encoders_are_cached_with_their_pooled_text_and_leave_memory(tmp_path, config):
    session = _session(tmp_path, config)
    base = session.state.base
    assert base.text_encoders == {}
    assert {part for part, _ in session.state.injected.layers} == {"unet"}
    fresh = _session(tmp_path / "other", config.changed(BOTH)).state.base
    with torch.no_grad():
        expected = encode_prompt(fresh, ["thing a", ""])
    found = session.text.embed_batch(["thing a", ""])
    torch.testing.assert_close(found.context, expected.context, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.pooled, expected.pooled, rtol=1e-4, atol=1e-5)
    assert found.pooled.shape == (2, 1280)
    # This family was trained with zeros in place of an empty negative prompt.
    assert not session.text.embed_negative().context.any()
    assert not session.text.embed_negative().pooled.any()


def test_conditions_come_back_from_disk_and_have_their_own_key(tmp_path, config):
    base = _session(tmp_path, config.changed(BOTH)).state.base
    first = PromptCache(base, tmp_path / "text", False, 1, 75).embed("thing")
    with mock.patch("lora_core.train.data.encode_prompt") as encode:
        again = PromptCache(base, tmp_path / "text", False, 1, 75).embed("thing")
        encode.assert_not_called()
    assert torch.equal(again.context, first.context)
    assert torch.equal(again.pooled, first.pooled)
    assert len(list((tmp_path / "text").iterdir())) == 1
    longer = PromptCache(base, tmp_path / "text", False, 1, 150).embed("thing")
    assert longer.context.shape[1] == 2 * first.context.shape[1]
    # The padding of the second tokenizer is part of the key.
    base.tokenizers["text_encoder_2"].pad_token = "<|endoftext|>"
    PromptCache(base, tmp_path / "text", False, 1, 75).embed("thing")
    assert len(list((tmp_path / "text").iterdir())) == 3


def test_the_unet_is_told_the_true_size_and_crop(tmp_path, config):
    session = _session(tmp_path, config.changed({"validation.pictures": 0}))
    told = []
    original = BaseModel.predict_noise

    def noting(base, noisy, timesteps, text, sizes):
        told.extend(tuple(row.tolist()) for row in sizes)
        return original(base, noisy, timesteps, text, sizes)

    with mock.patch.object(BaseModel, "predict_noise", noting):
        for _ in _steps(session, config, 3):
            pass
    # 200 x 80 is a bucket of 96 x 32: scaled by 0.48 it would be 96 x 38.4, of which 3.2 px go off at the
    # top.
    assert set(told) == {(80.0, 200.0, 3.0, 0.0, 32.0, 96.0), (64.0, 64.0, 0.0, 0.0, 64.0, 64.0)}


def test_each_text_encoder_learns_at_its_own_rate(tmp_path, config):
    config = config.changed({**BOTH, "optimizer.stop_text_encoder_at": 0.5})
    session = _session(tmp_path, config)
    assert [(g["lr"], g["until"]) for g in session.state.optimizer.param_groups] == [
        (1e-3, 1.0), (5e-4, 0.5), (2e-4, 0.5)
    ]  # fmt: skip
    assert session.state.injected.parts() == ["unet", "text_encoder", "text_encoder_2"]
    seen = list(_steps(session, config, 4))
    for part in ("text_encoder", "text_encoder_2"):
        # A layer's first step with Adam moves each number of up by the rate itself.
        moved = max(float(layer.up.abs().max()) for key, layer in seen[0].items() if key[0] == part)
        assert moved == pytest.approx({"text_encoder": 5e-4, "text_encoder_2": 2e-4}[part], rel=0.02)
        ups = [[layer.up for key, layer in layers.items() if key[0] == part] for layers in seen]
        assert all(torch.equal(a, b) for a, b in zip(ups[1], ups[3], strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(ups[0], ups[1], strict=True))


def test_one_text_encoder_may_be_trained_alone(tmp_path, config):
    session = _session(tmp_path, config.changed({"optimizer.lr": 0.0, "optimizer.text_encoder_2_lr": 1e-4}))
    assert session.state.injected.parts() == ["text_encoder_2"]
    assert set(session.state.base.text_encoders) == {"text_encoder", "text_encoder_2"}
    list(_steps(session, config, 1))


@pytest.mark.parametrize("rates", [{}, BOTH], ids=["frozen", "trained"])
def test_validation_and_samples(tmp_path, config, rates):
    config = config.changed(rates)
    session = _session(tmp_path, config)
    base = session.state.base
    base.facts = dataclasses.replace(base.facts, resolution=64)
    validator = Validator(session.state, session.text, session.validation_sets)
    first = validator.validate(1, lambda *_: None)
    assert (first.gain, first.train_gain, first.gauge, first.prior) == (0.0, 0.0, 0.0, 0.0)
    list(_steps(session, config, 2))
    gain = validator.validate(2, lambda *_: None)
    assert 0.0 not in (gain.gain, gain.train_gain, gain.prior)
    assert gain.against_best == pytest.approx(gain.gain)
    assert gain.base_loss == pytest.approx(gain.adapted_loss + gain.gain)
    (file,) = draw_samples(session, tmp_path / "sample", "x", lambda *_: None)
    with Image.open(file) as image:
        assert image.size == (64, 64)
