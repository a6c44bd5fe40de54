"""What was measured on this machine is kept by what decides a cost; memory is counted from footprints."""

import json
import types
from pathlib import Path

import pytest

from lora_core.data.images import Concept, ImageRecord
from lora_core.model_files.detect import base_of, lookup_base, read_base_facts
from lora_core.model_files.families import FAMILIES
from lora_core.model_files.sizes import FALLBACKS, count_base_parameters, fit_on_card
from lora_core.runs import costs
from lora_core.runs.costs import (
    StepCost,
    Trial,
    compare_trials,
    cost_key,
    costs_file,
    forecast_run,
    keep_cost,
    memory_needed,
    read_costs,
)
from lora_core.runs.events import (
    EventWriter,
    Finished,
    RanksChosen,
    StepDone,
    Validated,
)
from lora_core.runs.folder import RunFolder
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
    [
        ("train.steps", 7),
        ("train.epochs", 3),
        ("seed", 3),
        ("optimizer.lr", 3e-4),
        ("dataset.trigger", "sks"),
        ("name", "x"),
    ],
)
def test_what_costs_none_has_the_same(name: str, value: object) -> None:
    assert cost_key(RunConfig()) == cost_key(RunConfig().changed({name: value}))


def test_the_base_s_own_size_is_the_same_as_its_number() -> None:
    own = lookup_base("demo").resolution
    assert cost_key(RunConfig()) == cost_key(RunConfig().changed({"train.resolution": own}))


def test_a_merge_whose_prediction_is_set_by_hand_has_the_size_that_goes_with_it(tmp_path: Path) -> None:
    """A file of SD 2.x that says nothing is taken for one that predicts velocity at 768 px."""
    silent = RunConfig().changed({"model.base": str(checkpoint(tmp_path / "merge.safetensors", "sd2"))})
    for prediction, side in (("auto", 768), ("epsilon", 512), ("v_prediction", 768)):
        config = silent.changed({"model.prediction": prediction})
        assert cost_key(config) == cost_key(config.changed({"train.resolution": side}))
    zero = silent.changed({"model.prediction": "v_prediction", "model.zero_terminal_snr": "on"})
    assert base_of(zero.model).zero_terminal_snr
    wrong = silent.changed({"model.prediction": "epsilon", "model.zero_terminal_snr": "on"})
    assert "predicts noise" in base_of(wrong.model).problem


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


@pytest.mark.parametrize("free", [24.0, None])
def test_a_forecast_counts_the_largest_resolution_of_a_concept(
    tmp_path: Path, free: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: types.SimpleNamespace(available=8 * 2**30))
    base = checkpoint(tmp_path / "sd15.safetensors", "sd15", 2_132_000_000)
    usual = {**FAMILIES["sd15"].settings, "model.base": str(base), "train.resolution": 512}
    config, facts = RunConfig().changed(usual), read_base_facts(str(base))
    gpu = Gpu(int(free * 1e9)) if free else None

    def memory(own: RunConfig, *resolutions: int) -> float:
        concepts = [Concept(f"c{side}", rules=(("resolutions", (side,)),)) for side in resolutions]
        records = [ImageRecord(Path("a.png"), 2048, 2048, "", concept=one) for one in (None, *concepts)]
        return forecast_run(own, facts, records, [], {}, gpu).memory_bytes or 0

    usually, large = memory(config), memory(config.changed({"train.resolution": 1024}))
    assert memory(config, 768, 1024) == large > 1.2 * usually
    assert memory(config, 256) == usually
    assert memory(config.changed({"dataset.resolutions": [256, 1024]}), 768) == large


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


BASE_LOSSES = [[1.0, 2.0], [3.0, 1.5], [0.5, 0.7]]
"""Of three held-out images with two draws each: far apart, so that only pairs can tell a small gain."""


def tried(
    home: Path, rank: int, gains: list[float], seed: int = 0, size: int = 1000, **more: object
) -> Trial:
    """A finished run, whose best step gains so much on each image."""
    name = f"rank-{rank}-seed-{seed}"
    changes = {"name": name, "adapter.rank": rank, "seed": seed, **more}
    run = RunFolder.create(home / name, RunConfig().changed(changes))
    (run.exports / "a.safetensors").write_bytes(bytes(size))
    folder = run.checkpoint(4)
    folder.mkdir(parents=True)
    (folder / "adapter.safetensors").touch()
    losses = [[loss - g for loss in row] for row, g in zip(BASE_LOSSES, gains, strict=True)]
    gain = sum(gains) / len(gains)
    (folder / "state.json").write_text(json.dumps({"best": {"step": 4, "gain": gain, "losses": losses}}))
    writer = EventWriter(run.events_file)
    writer.write(StepDone(step=4, loss=1.0, lr=1.0, seconds=2.0 * rank))
    writer.write(
        Validated(
            step=4, gain=gain, standard_error=0.5, base_loss=1.45, adapted_loss=1.45 - gain, best=True,
            prior=-0.1, prior_error=0.05,
        )
    )  # fmt: skip
    writer.write(Finished(step=4, export="export/a.safetensors"))
    writer.close()
    return Trial(run, run.config(), run.progress())


def test_what_is_better_is_told_from_pairs_on_the_same_draws(tmp_path: Path) -> None:
    """Each gain has an error of 0.5, and rank 4 gains 0.1 +- 0.01 less on each image than rank 8 does."""
    trials = [
        tried(tmp_path, 8, [0.30, 0.31, 0.29], size=2000),
        tried(tmp_path, 4, [0.19, 0.21, 0.20]),
        tried(tmp_path, 2, [0.28, 0.33, 0.26], size=500),
    ]
    found = compare_trials(trials)
    assert found["settings"] == ["adapter.rank"]
    assert [row["settings"]["adapter.rank"] for row in found["rows"]] == [8, 2, 4]
    best, small, worse = found["rows"]
    assert best["gain"] == pytest.approx(0.3)
    assert best["against"] is None
    assert (best["seconds"], best["bytes"], best["forgetting"]) == (16.0, 2000, pytest.approx(0.1))
    assert worse["against"] == pytest.approx(-0.1)
    # Deviation of (0.11, 0.10, 0.09) over the root of 3.
    assert worse["against_error"] == pytest.approx(0.01 / 3**0.5)
    assert worse["paired"]
    assert found["sentence"] == (
        "rank 8 gains most, +0.3000; it is better beyond two standard errors than rank 4 by 0.1000 ± 0.0058;"
        " within the error rank 2 gained as much; of these rank 2 makes the smallest file and is"
        " fastest (on the same held-out images and noise)."
    )
    assert abs(small["against"]) < 2 * small["against_error"]
    trials[0].progress.export = ""  # not known yet, so nothing is the smallest
    assert "of these rank 2 is fastest (" in compare_trials(trials)["sentence"]
    # Headers differ by some bytes, and clocks by some percent.
    alike = [tried(tmp_path / "alike", rank, [0.3, 0.3, 0.3], size=1000 + rank) for rank in (20, 21)]
    assert "of these" not in compare_trials(alike)["sentence"]
    json.dumps(found, allow_nan=False)


def test_seeds_are_rows_together_and_other_images_are_no_pairs(tmp_path: Path) -> None:
    trials = [tried(tmp_path, 8, [0.3, 0.3, 0.3], seed) for seed in (0, 1)]
    trials += [tried(tmp_path, 4, [0.3 - d] * 3, seed) for seed, d in ((0, 0.1), (1, 0.2))]
    best, other = compare_trials(trials)["rows"]
    assert (best["runs"], best["done"]) == (["rank-8-seed-0", "rank-8-seed-1"], 2)
    assert other["gain"] == pytest.approx(0.15)
    # The seeds' means, 0.1 and 0.2, are further apart than the images of either.
    assert (other["against"], other["against_error"]) == (pytest.approx(-0.15), pytest.approx(0.05))
    # Two errors of 0.5, as independent; the spread of the seeds is less.
    assert other["standard_error"] == pytest.approx(0.5 / 2**0.5)
    # Other noise, other parts of the images.
    for rank, changed in ((3, {"loss.unmasked_weight": 0.5}), (2, {"validation.draws_per_image": 2})):
        unpaired = compare_trials([trials[0], tried(tmp_path, rank, [0.2] * 3, **changed)])["rows"][1]
        assert not unpaired["paired"]
    assert unpaired["against_error"] == pytest.approx(0.5 * 2**0.5)


def test_images_held_out_in_each_seed_count_once(tmp_path: Path) -> None:
    trials = [tried(tmp_path, rank, [0.3 - rank * n / 40 for n in (1, 2, 3)], seed)
              for rank in (4, 8) for seed in (0, 1)]  # fmt: skip
    for trial in trials:
        trial.run.held_out_file.write_text(json.dumps({"files": ["a", "b", "c"]}))
    other = compare_trials(trials)["rows"][1]
    # 0.1, 0.2 and 0.3 less: their deviation over the root of 3 images, not of 6.
    assert other["against"] == pytest.approx(-0.2)
    assert other["against_error"] == pytest.approx(0.1 / 3**0.5)


def test_a_cut_file_counts_with_what_it_keeps_and_nothing_is_compared_without_gains(tmp_path: Path) -> None:
    full = tried(tmp_path, 8, [0.3, 0.3, 0.3])
    cut = tried(tmp_path, 16, [0.3, 0.3, 0.3])
    cut.progress.ranks = RanksChosen(step=4, sentence="", trained=16, rank=2, parameters=0.1, kept=0.9)
    row = compare_trials([full, cut])["rows"][1]
    assert (row["gain"], row["against"]) == (pytest.approx(0.27), pytest.approx(-0.03))
    for trial in (full, cut):
        trial.progress.validations.clear()
    found = compare_trials([full, cut])
    assert "nothing to compare yet" in found["sentence"]
    assert {row["gain"] for row in found["rows"]} == {None}
