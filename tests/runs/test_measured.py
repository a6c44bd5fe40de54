"""What was measured on this machine is kept, and what decides a cost decides the key."""

from pathlib import Path

import pytest

from lora_core.runs import costs
from lora_core.runs.costs import Measured, at_device, cost_key, keep_measured, measured_file, read_measured
from lora_core.settings.config import RunConfig


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train.resolution", 256),
        ("train.batch_size", 3),
        ("train.checkpointing", True),
        ("train.precision", "bf16"),
        ("adapter.rank", 7),
        ("optim.text_encoder_lr", 0.0),
        ("optim.name", "sgd"),
        ("model.base", "other"),
    ],
)
def test_what_costs_time_has_another_key(name: str, value: object) -> None:
    assert cost_key(RunConfig(), 512) != cost_key(RunConfig().changed({name: value}), 512)


@pytest.mark.parametrize(
    ("name", "value"),
    [("train.steps", 7), ("seed", 3), ("optim.lr", 3e-4), ("dataset.trigger", "sks"), ("name", "x")],
)
def test_what_costs_none_has_the_same(name: str, value: object) -> None:
    assert cost_key(RunConfig(), 512) == cost_key(RunConfig().changed({name: value}), 512)


def test_the_base_s_own_size_is_the_same_as_its_number() -> None:
    assert cost_key(RunConfig(), 512) == cost_key(RunConfig().changed({"train.resolution": 512}), 512)


def test_it_is_kept_by_device_and_the_newest_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "MOST_KEPT", 2)
    for number, device in enumerate(("a", "b", "c")):
        keep_measured(tmp_path, "key", Measured(1.0 + number, 0.1, 5, "demo", device, time=float(number)))
    found = read_measured(tmp_path)
    assert set(found) == {at_device("key", "b"), at_device("key", "c")}
    assert found[at_device("key", "c")] == Measured(3.0, 0.1, 5, "demo", "c", time=2.0)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", '{"measured": 3}', '{"measured": {"a": 3, "b": {"step": -1}}}',
        '{"measured": {"a": {"step": 0, "draw": 0, "peak": 0, "base": "", "device": "a"}}}',
    ],
)  # fmt: skip
def test_a_broken_file_counts_as_empty(tmp_path: Path, text: str) -> None:
    measured_file(tmp_path).write_text(text)
    assert read_measured(tmp_path) == {}
    keep_measured(tmp_path, "key", Measured(1.0, 0.1, 0, "demo", "a"))
    assert len(read_measured(tmp_path)) == 1
