"""What was measured on this machine is kept, and what decides a cost decides the key."""

import json
from pathlib import Path

import pytest

from lora_core.model_files.detect import lookup_base
from lora_core.runs import costs
from lora_core.runs.costs import StepCost, cost_key, costs_file, keep_cost, read_costs
from lora_core.settings.config import RunConfig


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train.resolution", 256),
        ("train.batch_size", 3),
        ("train.gradient_checkpointing", True),
        ("train.precision", "bf16"),
        ("adapter.rank", 7),
        ("optimizer.text_encoder_lr", 0.0),
        ("optimizer.name", "sgd"),
        ("model.base", "other"),
    ],
)
def test_what_costs_time_has_another_key(name: str, value: object) -> None:
    assert cost_key(RunConfig()) != cost_key(RunConfig().changed({name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [("train.steps", 7), ("seed", 3), ("optimizer.lr", 3e-4), ("dataset.trigger", "sks"), ("name", "x")],
)
def test_what_costs_none_has_the_same(name: str, value: object) -> None:
    assert cost_key(RunConfig()) == cost_key(RunConfig().changed({name: value}))


def test_the_base_s_own_size_is_the_same_as_its_number() -> None:
    own = lookup_base("demo").resolution
    assert cost_key(RunConfig()) == cost_key(RunConfig().changed({"train.resolution": own}))


def test_it_is_kept_by_device_and_the_newest_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "MOST_KEPT", 2)
    for number, device in enumerate(("a", "b", "c")):
        cost = StepCost(1.0 + number, 0.1, 5, "demo", device, time=float(number))
        keep_cost(tmp_path, RunConfig(), cost)
    assert read_costs(tmp_path, "a") == {}
    assert len(read_costs(tmp_path, "b")) == 1
    key = cost_key(RunConfig())
    assert read_costs(tmp_path, "c") == {key: StepCost(3.0, 0.1, 5, "demo", "c", time=2.0)}


def test_what_an_earlier_version_measured_is_read(tmp_path: Path) -> None:
    row = {"step": 2.0, "draw": 0.5, "peak": 7, "base": "demo", "device": "cpu", "work": 1e12, "time": 3.0}
    costs_file(tmp_path).write_text(json.dumps({"measured": {f"cpu {cost_key(RunConfig())}": row}}))
    assert read_costs(tmp_path, "cpu") == {
        cost_key(RunConfig()): StepCost(2.0, 0.5, 7, "demo", "cpu", time=3.0)
    }


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", '{"measured": 3}', '{"measured": {"a": 3, "b": {"step": -1}}}',
        '{"measured": {"a": {"step": 0, "draw": 0, "peak": 0, "base": "", "device": "a"}}}',
    ],
)  # fmt: skip
def test_a_broken_file_counts_as_empty(tmp_path: Path, text: str) -> None:
    costs_file(tmp_path).write_text(text)
    assert read_costs(tmp_path, "a") == {}
    keep_cost(tmp_path, RunConfig(), StepCost(1.0, 0.1, 0, "demo", "a"))
    assert len(read_costs(tmp_path, "a")) == 1
