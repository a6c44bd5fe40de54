"""Forecasts before Start: from a run of the same cost, else another one, else the machine."""

import types
from pathlib import Path

import pytest

from app.state import AppState, take_snapshot
from app.train.facts import facts, forecast
from app.train.form import preset_config
from lora_core.model_files.detect import read_base_facts
from lora_core.model_files.families import FAMILIES
from lora_core.model_files.sizes import count_base_parameters
from lora_core.runs import events
from lora_core.runs.costs import MEASURED, SCALED, memory_needed
from lora_core.runs.progress import Progress
from lora_core.settings.config import RunConfig
from lora_core.system.hardware import Card, find_amd_card, parse_apps, parse_card
from tests.app.bases import checkpoint
from tests.app.runs import make_run, started, step


def progress_of(*lines: events.Event) -> Progress:
    progress = Progress()
    progress.update([started(100), *lines])
    return progress


def test_what_comes_between_steps_counts_and_a_night_s_pause_does_not() -> None:
    # Nine gaps of 1 s, one of 11 s for samples, and eight hours between two sessions.
    times = [*range(10), 20, 20 + 8 * 3600, *(20 + 8 * 3600 + n for n in range(1, 5))]
    progress = progress_of(*(step(n, float(t), 0.5) for n, t in enumerate(times, 1)))
    gaps = 9 * 1 + 11 + 4 * 1
    assert progress.wall_pace() == pytest.approx(gaps / 14, rel=1e-6)
    assert progress.seconds_left() == pytest.approx((100 - 16) * gaps / 14, rel=1e-6)
    assert progress_of().wall_pace() is None


def test_a_run_of_the_same_cost_counts_first(app_state: AppState) -> None:
    same = {"train__steps": 7, "train__batch_size": 2}
    make_run(app_state, "same", started(), *(step(n, 100.0 + 2 * n) for n in range(1, 9)), **same)
    make_run(
        app_state, "other", started(), *(step(n, 100.0 + 9 * n) for n in range(1, 9)), train__batch_size=1
    )
    snapshot = take_snapshot(app_state)
    config = RunConfig().changed({"train.batch_size": 2})
    found = forecast(snapshot, config)
    assert (found.source, found.seconds_a_step) == (MEASURED, pytest.approx(2.0))
    # Four pictures a step cost four times as much as one; the newest run is the one with one.
    scaled = forecast(snapshot, config.changed({"train.batch_size": 4}))
    assert scaled.source == SCALED
    assert scaled.seconds_a_step in (pytest.approx(36.0), pytest.approx(4.0))


def test_with_no_run_at_all_the_time_is_not_known_and_that_is_said(
    app_state: AppState, pictures: list[Path]
) -> None:
    app_state.hardware.known = True
    assert forecast(take_snapshot(app_state), preset_config("style", "demo")).seconds is None
    assert "time, known after some steps" in facts(take_snapshot(app_state))


def test_a_run_of_another_base_tells_nothing(app_state: AppState) -> None:
    make_run(app_state, "other", started(), *(step(n, 100.0 + n) for n in range(1, 9)), model__base="other")
    assert forecast(take_snapshot(app_state), RunConfig()).seconds is None


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
        found = memory_needed(RunConfig().changed(settings), known, True)
        assert found is not None
        return found / 1e9

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
    [
        ("sd15", 4.04, {}),
        ("sd15", 4.29, {"adapter.targets": "locon", "train.resolution": 768,
        "train.gradient_checkpointing": True}),
        ("sd15", 3.33, {"adapter.targets": "kohya", "train.quantize_base": "int8"}),
        ("sd15", 2.42, {"train.offload": True, "train.gradient_checkpointing": True}),
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
    """Peaks in GB of runs from launch to export at true shapes, with 0.8 GB added.

    The base here is a stub, whose adapter has few layers.
    """
    size = {"sd15": 2_132_000_000, "sdxl": 6_938_000_000}[family]
    base = checkpoint(tmp_path / f"{family}.safetensors", family, size)
    settings = {**FAMILIES[family].settings, "model.base": str(base), **changes}
    found = memory_needed(RunConfig().changed(settings), read_base_facts(str(base)), True)
    assert found is not None
    assert found / 1e9 == pytest.approx(simulated, rel=0.25)


def test_a_processor_s_run_takes_more_memory_where_there_is_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = checkpoint(tmp_path / "sd.safetensors", "sd15", 2_100_000_000)
    config = RunConfig().changed({"model.base": str(base), "train.precision": "fp32"})
    found = []
    for available in (8, 16, 24):
        memory = types.SimpleNamespace(available=available * 2**30)
        monkeypatch.setattr("psutil.virtual_memory", lambda memory=memory: memory)
        found.append(memory_needed(config, read_base_facts(str(base)), False))
    weights = 4 * count_base_parameters(read_base_facts(str(base)))
    assert found[1] - found[0] == pytest.approx(2 * weights)
    assert found[2] - found[0] == pytest.approx(3 * weights)
    assert (
        memory_needed(config.changed({"train.quantize_base": "int8"}), read_base_facts(str(base)), False)
        == found[0]
    )


def test_what_nvidia_s_tool_says_is_read() -> None:
    found = parse_card("NVIDIA GeForce RTX 3060, rev, 5222, 12288, 580.65, 170.00, 8.6")
    assert found == Card(
        "NVIDIA GeForce RTX 3060, rev", 5222 * 2**20, 12288 * 2**20, 170.0, 8.6, driver="580.65"
    )
    assert parse_card("Card, 1, 2, 580.65, [N/A], 9.0").watts == 0.0
    assert parse_apps("12, 100\n13, [N/A]\n\n") == {12: 100 * 2**20}
    with pytest.raises(ValueError, match="unpack"):
        parse_card("no devices were found")


def test_amd_s_files_are_read(tmp_path: Path) -> None:
    device = tmp_path / "card0" / "device"
    device.mkdir(parents=True)
    (device / "mem_info_vram_total").write_text("8589934592\n")
    (device / "mem_info_vram_used").write_text("1000\n")
    assert find_amd_card(tmp_path) == Card("AMD graphics card", 1000, 8 * 2**30, maker="AMD")
    assert find_amd_card(tmp_path / "none") is None
