"""The training generator: exact resume with everything random switched on, and that it learns."""

import dataclasses
import re
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from lora_core.data.dataset import scan
from lora_core.errors import ConfigError
from lora_core.evaluate.validator import encode_eval_images, eval_losses
from lora_core.lora.inject import EMA, adapter_weights
from lora_core.runs.folder import RunFolder
from lora_core.settings.config import RunConfig
from lora_core.settings.schema import optimizer_row
from lora_core.train import loop
from lora_core.train.callbacks import describe_nonfinite, draw_samples
from lora_core.train.loop import StepSettings, training_steps
from lora_core.train.setup import RuntimePlan, prepare

STEPS = 4
RANDOM = {
    "dataset.flip": True, "dataset.shuffle_tags": True, "dataset.caption_dropout": 0.3, "dataset.tag_dropout":
    0.2, "adapter.dropout": 0.2, "adapter.rank_dropout": 0.2, "adapter.module_dropout": 0.1,
    "train.gradient_accumulation_steps": 2, "train.batch_size": 2, "loss.noise_offset": 0.05,
}  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(5):
        image = Image.new("RGB", (64, 64), ("red", "blue", "green", "white", "black")[number])
        ImageDraw.Draw(image).ellipse((10, 10, 30 + number, 50), fill="orange")
        image.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"dot, number {number}, on a plain background")
    return folder


@pytest.fixture
def config(pictures):
    return RunConfig().changed({
        "dataset.path": str(pictures), "adapter.rank": 2, "adapter.alpha": 2.0, "train.steps": STEPS,
        "train.precision": "fp32", "optimizer.lr": 1e-3, "validation.pictures": 0.0, "loss.min_snr": 0.0,
        "sample.prompts": ["dot"],
    })  # fmt: skip


def _session(tmp_path, config, name="run"):
    path = tmp_path / "ws" / "runs" / name
    run = RunFolder(path) if path.exists() else RunFolder.create(path, config)
    return prepare(run, config, RuntimePlan.of(run, config), lambda *_: None)


def _trained(session, config, done, until):
    """Step from `done` to `until`; returns the adapter and the optimizer's state."""
    steps = training_steps(session.state, session.batches, session.text, StepSettings(config, STEPS), done)
    for _ in range(until - done):
        next(steps)
    return adapter_weights(session.state.injected), session.state.optimizer.state_dict()


def _equal(first, second):
    return all(
        torch.equal(first.layers[k].down, second.layers[k].down) and torch.equal(first.layers[k].up,
        second.layers[k].up) for k in first.layers
    )  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {},
        RANDOM,
        {**RANDOM, "optimizer.text_encoder_lr": 0.0, "train.gradient_checkpointing": True},
        {"optimizer.name": "lion", "optimizer.schedule": "cosine_restarts"},
        {"train.precision": "bf16"},
    ],
    ids=["plain", "all random", "frozen text, checkpointing", "lion, restarts", "bf16"],
)
def test_a_resume_equals_an_unbroken_run_bit_for_bit(tmp_path, config, changes, shared_toy):
    config = config.changed({"model.base": str(shared_toy.base), "train.resolution": 16, **changes})
    whole, _ = _trained(_session(tmp_path, config), config, 0, STEPS)
    half, optimizer = _trained(_session(tmp_path, config), config, 0, 2)
    session = _session(tmp_path, config)
    for key, layer in session.state.injected.layers.items():
        layer.from_layer_weights(half.layers[key])
    session.state.optimizer.load_state_dict(optimizer)
    rest, _ = _trained(session, config, 2, STEPS)
    assert _equal(rest, whole)
    assert not _equal(half, whole)


def test_checkpointing_changes_no_gradient_and_keeps_less(tmp_path, config):
    adapters, kept = [], []
    for on in (False, True):
        changed = config.changed({**RANDOM, "train.gradient_checkpointing": on})
        session = _session(tmp_path, changed)
        sizes = Counter()

        def pack(tensor, sizes=sizes):
            sizes["bytes"] += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            adapters.append(_trained(session, changed, 0, 1)[0])
        kept.append(sizes["bytes"])
    for key in adapters[0].layers:
        torch.testing.assert_close(
            adapters[0].layers[key].up, adapters[1].layers[key].up, rtol=1e-4, atol=1e-7
        )
    assert kept[1] < 0.5 * kept[0]


def test_accumulating_equals_a_larger_batch(tmp_path, config):
    """Two micro-batches of one weigh as one of two: the same draws are fed in by hand."""
    session = _session(tmp_path, config.changed({"train.gradient_accumulation_steps": 2}))
    plan = StepSettings(
        config.changed({"train.gradient_accumulation_steps": 2, "optimizer.max_grad_norm": 0.0}), STEPS
    )
    step = next(training_steps(session.state, session.batches, session.text, plan, 0))
    both = [p.grad.clone() for p in session.state.injected.parameters()]
    alone = []
    losses = []
    for number in range(2):
        other = _session(tmp_path, config)
        shifted = StepSettings(plan.config.changed({"train.gradient_accumulation_steps": 1}), STEPS)
        original = other.batches.batch
        other.batches.batch = lambda n, original=original, number=number: original(number)
        generator_shift = _noise_of(number)
        with generator_shift:
            losses.append(next(training_steps(other.state, other.batches, other.text, shifted, 0)).loss)
        alone.append([p.grad.clone() for p in other.state.injected.parameters()])
    assert step.loss == pytest.approx(sum(losses) / 2, rel=1e-5)
    for together, first, second in zip(both, *alone, strict=True):
        torch.testing.assert_close(together, (first + second) / 2, rtol=1e-3, atol=1e-8)


def _noise_of(number):
    """Make micro-batch 0 draw the noise of micro-batch `number`."""
    original = loop.noise_seed
    return mock.patch.object(loop, "noise_seed", lambda seed, _: original(seed, number))


def test_it_learns(tmp_path, config):
    """Measured on fixed triples of the training pictures, since the loss of single steps is mostly noise."""
    config = config.changed(
        {
            "optimizer.lr": 3e-3,
            "optimizer.warmup": 0.0,
            "optimizer.schedule": "constant",
            "train.batch_size": 4,
        }
    )
    session = _session(tmp_path, config)
    base, text = session.state.base, session.text
    pictures = encode_eval_images(base, scan(Path(config.dataset.path)).records, 8, 0)
    before = eval_losses(base, pictures, text.embed)
    list(training_steps(session.state, session.batches, text, StepSettings(config, 30), 0))
    after = eval_losses(base, pictures, text.embed)
    # Five pictures differ too much for a small standard error: each of them has to be learned instead.
    assert (before - after).mean(1).min() > 0
    assert after.mean() < 0.9 * before.mean()


@pytest.mark.parametrize("clip", [1.0, 0.0])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_counted_and_changes_nothing(tmp_path, config, where, clip):
    config = config.changed({"optimizer.max_grad_norm": clip, "save.ema": 0.9})
    session = _session(tmp_path, config)
    state = session.state
    key, layer = next(iter(state.injected.layers.items()))
    if where == "loss":
        session.batches.batch = lambda n, original=session.batches.batch: (
            dataclasses.replace(original(n), latents=torch.full((1, 4, 8, 8), float("nan")))
            if n == 1
            else original(n)
        )
    else:
        calls = []
        layer.param_view = None  # the plain way, where autograd calls hooks
        layer.up.register_hook(
            lambda grad: grad * float("nan") if calls.append(1) or len(calls) == 2 else grad
        )
    steps = training_steps(state, session.batches, session.text, StepSettings(config, STEPS), 0)
    assert next(steps).nonfinite is None
    before = adapter_weights(state.injected), state.average.weights()
    moments = [v.clone() for moments in state.optimizer.state.values() for v in moments.values()]
    bad = next(steps)
    assert bad.number == 2
    assert _equal(adapter_weights(state.injected), before[0])
    assert _equal(state.average.weights(), before[1])
    after = [v for moments in state.optimizer.state.values() for v in moments.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))
    name = session.batches.batch(1).names[0]
    what = "the loss is" if where == "loss" else f"the gradient of {' '.join(key)} is"
    told = describe_nonfinite(session, StepSettings(config, STEPS), bad)
    assert re.fullmatch(rf"{re.escape(what)} not finite \({name} at timestep \d+\)", told)
    assert next(steps).nonfinite is None
    assert not _equal(adapter_weights(state.injected), before[0])


def test_a_scaler_that_searches_its_scale_is_no_trouble(tmp_path, config):
    """In fp16 the first scale, 65,536, is halved until nothing overflows; such steps are passed over in
    silence."""
    session = _session(tmp_path, config)
    state = session.state
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    state.average = EMA(state.injected, state.flat_params, 0.5)
    state.flat_params.data.data.add_(1.0)
    averages = state.average.weights()
    steps = list(training_steps(state, session.batches, session.text, StepSettings(config, 3), 0))
    assert [step.nonfinite for step in steps] == [None, None, None]
    assert state.scaler.get_scale() < 2.0**127
    assert _equal(state.average.weights(), averages), "a step that was passed over is none to average"
    state.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    layer = next(iter(state.injected.layers.values()))
    layer.param_view = None  # the plain way, where autograd calls hooks
    layer.up.register_hook(lambda grad: grad * float("inf"))
    settings = StepSettings(config, 2)
    for step in training_steps(state, session.batches, session.text, settings, 0):
        assert describe_nonfinite(session, settings, step).startswith("the gradient")


def test_the_rate_follows_the_schedule_for_each_part(tmp_path, config):
    config = config.changed(
        {"optimizer.text_encoder_lr": 5e-4, "optimizer.warmup": 0.0, "optimizer.schedule": "linear"}
    )
    session = _session(tmp_path, config)
    steps = training_steps(session.state, session.batches, session.text, StepSettings(config, STEPS), 0)
    rates = []
    for step in steps:
        rates.append((step.lr, session.state.optimizer.param_groups[1]["lr"]))
    assert [r[0] for r in rates] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert [r[1] for r in rates] == pytest.approx([5e-4, 3.75e-4, 2.5e-4, 1.25e-4])


@pytest.mark.parametrize("name", ["adamw", "prodigy", "dadapt_adam", "adamw_schedule_free", "adafactor"])
def test_the_text_encoder_stops_early_on_request(tmp_path, config, shared_toy, name):
    """Some optimizers take no rate of 0 to mean that: they move by another group's rate, or average."""
    changes = {
        "model.base": str(shared_toy.base), "train.resolution": 16, "optimizer.name": name,
        "optimizer.schedule": "constant", "optimizer.warmup": 0.0, "optimizer.stop_text_encoder_at": 0.5,
    }  # fmt: skip
    if optimizer_row(name).one_rate:
        changes |= dict.fromkeys(("optimizer.lr", "optimizer.text_encoder_lr"), 1.0)
        changes |= {"optimizer.args": {"d0": 1e-3}}
    session = _session(tmp_path, config := config.changed(changes))
    state, seen, norms = session.state, [], []
    take_step = state.flat_params.step

    def record(optimizer):
        norms.append(float(optimizer.param_groups[1]["params"][0].grad.norm()))
        take_step(optimizer)

    state.flat_params.step = record
    for _ in training_steps(state, session.batches, session.text, StepSettings(config, STEPS), 0):
        with state.average.in_place() if state.average else nullcontext():
            text = adapter_weights(state.injected).layers
        seen.append({key: layer.down for key, layer in text.items() if key[0] == "text_encoder"})
    assert all(torch.equal(seen[1][key], seen[3][key]) for key in seen[0])
    assert not all(torch.equal(seen[0][key], seen[1][key]) for key in seen[0])
    # What is stopped has no part in the norm that the other gradients are clipped to.
    assert norms[1] > 0 == norms[2] == norms[3]


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_frozen_text_encoder_leaves_memory_once_no_caption_can_be_new(tmp_path, config, shuffle):
    config = config.changed({"optimizer.text_encoder_lr": 0.0, "dataset.shuffle_tags": shuffle})
    session = _session(tmp_path, config)
    assert bool(session.state.base.text_encoders) == shuffle
    _trained(session, config, 0, 1)
    assert draw_samples(session, tmp_path / "sample", "x", lambda *_: None)[0].is_file()


@pytest.mark.parametrize("rate", [0.0, 1e-3], ids=["frozen text encoder", "trained text encoder"])
def test_each_sample_is_drawn_as_its_line_says(tmp_path, config, rate):
    lines = ["dot --n (red:1.3) --w 32 --h 64 --d 9 --l 3 --s 2", "(a: BREAK dot", "dot"]
    changes = {"sample.prompts": lines, "sample.negative_prompt": "blue", "sample.steps": 2}
    session = _session(
        tmp_path, config.changed({**changes, "optimizer.text_encoder_lr": rate, "dataset.trigger": "tri"})
    )
    files = draw_samples(session, tmp_path / "sample", "x", lambda *_: None)
    opened = [Image.open(file) for file in files]
    assert [image.size for image in opened] == [(32, 64), (128, 128), (128, 128)]
    texts = [image.text["parameters"] for image in opened]
    assert texts[0].startswith("tri, dot <lora:x:1>\nNegative prompt: (red:1.3)\nSteps: 2, ")
    assert "CFG scale: 3, Seed: 9, Size: 32x64" in texts[0]
    assert texts[2].startswith("tri, dot <lora:x:1>\nNegative prompt: blue\nSteps: ")
    assert session.prompts[0] == "tri, dot --n (red:1.3) --w 32 --h 64 --d 9 --l 3 --s 2"
    # Each as if it were the only one.
    for number, sample in enumerate(list(session.samples)):
        session.samples[:] = [sample]
        (alone,) = draw_samples(session, tmp_path / "alone", "x", lambda *_: None)
        assert np.array_equal(np.asarray(Image.open(alone)), np.asarray(opened[number]))


def test_settings_that_cannot_work_together_are_told(tmp_path, config):
    with pytest.raises(ConfigError, match="Nothing would be trained"):
        _session(tmp_path, config.changed({"optimizer.lr": 0.0, "optimizer.text_encoder_lr": 0.0}))
    with pytest.raises(ConfigError, match="one learning rate"):
        _session(tmp_path, config.changed({"optimizer.name": "prodigy", "optimizer.lr": 1.0}), "other")


def test_only_the_parts_with_a_rate_are_trained(tmp_path, config):
    session = _session(tmp_path, config.changed({"optimizer.text_encoder_lr": 0.0}))
    assert session.state.injected.parts() == ["unet"]
    session = _session(tmp_path, config.changed({"optimizer.lr": 0.0}), "other")
    assert session.state.injected.parts() == ["text_encoder"]
