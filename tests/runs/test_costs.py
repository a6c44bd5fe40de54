"""What was measured on this machine is kept by what decides a cost; memory is counted from footprints."""

import json
import types
from pathlib import Path

import pytest

from lora_core.data.images import ImageRecord
from lora_core.model_files.detect import lookup_base, read_base_facts
from lora_core.model_files.families import FAMILIES
from lora_core.model_files.sizes import FALLBACKS, count_base_parameters, fit_on_card
from lora_core.runs import costs
from lora_core.runs.costs import (
    StepCost,
    cost_key,
    costs_file,
    forecast_run,
    keep_cost,
    memory_needed,
    read_costs,
)
from lora_core.settings.config import RunConfig
from lora_core.system.hardware import Gpu
from lora_core.train import autotune
from tests.app.bases import checkpoint
from tests.simulated.whole import base_file


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


def test_memory_on_a_card_follows_what_it_takes(tmp_path: Path) -> None:
    """Gigabytes, with 0.8 for context and workspaces; 5.0 is the UNet of SDXL in bf16, 1.7 that of SD 1.5."""
    base = checkpoint(tmp_path / "xl.safetensors", "sdxl", 6_900_000_000)
    known = read_base_facts(str(base))

    def gigabytes(**changes: object) -> float:
        own = {key.replace("__", "."): value for key, value in changes.items()}
        settings = {
            "model.base": str(base),
            "train.resolution": 1024,
            "optimizer.text_encoder_lr": 0.0,
            **own,
        }
        found = fit_on_card(RunConfig().changed(settings), known)
        assert found is not None
        return found[0] / 1e9

    plain = gigabytes()
    assert 11 < plain < 14
    # Less than without, by what the decoding of a sample leaves of it.
    assert 9 < gigabytes(train__gradient_checkpointing=True) < 11
    assert gigabytes(train__batch_size=2) - plain == pytest.approx(345_977 * 128**2 / 1e9, rel=0.01)
    assert gigabytes(train__quantize_base="int8") < plain - 2.3
    assert gigabytes(train__offload=True) < plain - 4.5
    assert gigabytes(train__precision="fp32") > 2 * plain - 2
    assert gigabytes(optimizer__text_encoder_lr=1e-4) - plain == pytest.approx(1.63, abs=0.1)


@pytest.mark.parametrize(
    ("family", "simulated", "changes"),
    # As `python -m tests.simulated.whole FAMILY --set ...` found them.
    [
        ("sd15", 4.04, {}),
        ("sd15", 4.29, {"adapter.targets": "locon", "train.resolution": 768,
        "train.gradient_checkpointing": True}),
        ("sd15", 3.33, {"adapter.targets": "kohya", "train.quantize_base": "int8"}),
        ("sd15", 2.42, {"train.offload": True, "train.gradient_checkpointing": True}),
        ("sd15", 6.58, {"adapter.targets": "style", "train.batch_size": 4}),
        ("sd2", 4.5, {}),
        ("sd2", 4.83, {"adapter.targets": "locon", "train.batch_size": 2,
        "train.gradient_checkpointing": True}),
        ("sd2_v", 5.49, {}),
        ("sd2_v", 5.85, {"adapter.targets": "kohya", "adapter.rank": 64, "train.quantize_base": "int8"}),
        ("sd2_v", 3.94, {"train.offload": True, "train.gradient_checkpointing": True}),
        ("sdxl", 13.94, {"adapter.targets": "kohya"}),
        ("sdxl", 11.35, {"adapter.rank": 64, "train.gradient_checkpointing": True}),
        (
            "sdxl", 10.34,
            {
                "adapter.targets": "kohya", "train.batch_size": 2, "train.gradient_checkpointing": True,
                "train.resolution": 768,
            },
        ),
        ("sdxl", 11.65, {"adapter.targets": "locon", "train.quantize_base": "int8"}),
        ("sdxl", 5.06, {"adapter.targets": "kohya", "train.offload": True,
        "train.gradient_checkpointing": True}),
    ],
)  # fmt: skip
def test_memory_is_within_a_quarter_of_the_simulated_card_s(
    family: str, simulated: float, changes: dict[str, object], tmp_path: Path
) -> None:
    """Peaks in GB of runs from launch to export at true shapes, with 0.8 GB added."""
    base = base_file(tmp_path / f"{family}.safetensors", family)
    row = FAMILIES[family]
    settings = {**row.settings, "model.base": str(base), "model.prediction": row.prediction, **changes}
    found = fit_on_card(RunConfig().changed(settings), read_base_facts(str(base), row.prediction))
    assert found is not None
    assert found[0] / 1e9 == pytest.approx(simulated, rel=0.25)


@pytest.mark.parametrize(
    ("family", "free", "changes", "fallbacks"),
    [
        ("sdxl", 24.0, {}, []),
        ("sdxl", 8.3, {}, ["vae aside", "checkpointing"]),
        ("sdxl", 8.3, {"dataset.shuffle_tags": True}, ["vae aside", "text encoders aside", "checkpointing"]),
        ("sdxl", 6.2, {}, ["int8", "vae aside", "checkpointing"]),
        (
            "sdxl",
            5.35,
            {"dataset.shuffle_tags": True},
            ["int8", "vae aside", "text encoders aside", "checkpointing"],
        ),
        ("sdxl", 6.2, {"train.quantize_base": "int8"}, ["vae aside", "checkpointing"]),
        ("sd15", 4.0, {"train.batch_size": 4}, ["vae aside", "checkpointing", "half"]),
    ],
)
def test_a_forecast_names_what_will_be_done_to_fit(
    family: str, free: float, changes: dict[str, object], fallbacks: list[str], tmp_path: Path
) -> None:
    size = {"sd15": 2_132_000_000, "sdxl": 6_938_000_000}[family]
    base = checkpoint(tmp_path / f"{family}.safetensors", family, size)
    settings = {**FAMILIES[family].settings, "adapter.targets": "kohya", "model.base": str(base), **changes}
    records = [ImageRecord(Path("a.png"), 64, 64, "a, b")]
    config, facts = RunConfig().changed(settings), read_base_facts(str(base))
    found = forecast_run(config, facts, records, [], {}, Gpu(int(free * 1e9)))
    assert found.fallbacks == fallbacks
    assert found.memory_bytes is not None
    assert found.memory_as_set is not None
    assert found.memory_bytes <= free * 1e9
    assert (found.memory_as_set > free * 1e9) == bool(fallbacks)


def test_a_forecast_counts_auto_as_what_it_means_on_the_card(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "sd15.safetensors", "sd15", 2_132_000_000)
    config = RunConfig().changed({**FAMILIES["sd15"].settings, "model.base": str(base)})
    facts = read_base_facts(str(base))

    def gigabytes(precision: str, auto_is_fp32: bool) -> float:
        own = config.changed({"train.precision": precision})
        found = forecast_run(own, facts, [], [], {}, Gpu(auto_is_fp32=auto_is_fp32))
        assert found.memory_bytes
        return found.memory_bytes / 1e9

    assert gigabytes("auto", True) == gigabytes("fp32", False) > 1.5 * gigabytes("auto", False)
    assert gigabytes("bf16", True) == gigabytes("auto", False)


def test_a_forecast_knows_all_fallbacks_in_the_order_of_the_trainer() -> None:
    assert list(FALLBACKS) == [each.name for each in autotune.FALLBACKS]


def test_a_processor_s_run_takes_more_memory_where_there_is_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = checkpoint(tmp_path / "sd.safetensors", "sd15", 2_100_000_000)
    config = RunConfig().changed({"model.base": str(base), "train.precision": "fp32"})
    found = []
    for available in (8, 16, 24):
        memory = types.SimpleNamespace(available=available * 2**30)
        monkeypatch.setattr("psutil.virtual_memory", lambda memory=memory: memory)
        found.append(memory_needed(config, read_base_facts(str(base))))
    weights = 4 * count_base_parameters(read_base_facts(str(base)))
    assert found[1] - found[0] == pytest.approx(2 * weights)
    assert found[2] - found[0] == pytest.approx(3 * weights)
    assert (
        memory_needed(config.changed({"train.quantize_base": "int8"}), read_base_facts(str(base))) == found[0]
    )
