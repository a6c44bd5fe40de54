"""What validation decides in whole runs: the best step, when it is enough, and how often it is done."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_core.errors import ConfigError, RunError
from lora_core.formats.io import load_adapter
from lora_core.model_files.header import read_header
from lora_core.report.report import collect_data, summary
from lora_core.runs import events
from lora_core.runs.folder import RunFolder
from lora_core.runs.preflight import preflight
from lora_core.settings.config import RunConfig
from lora_core.train import validation
from lora_core.train.export import export_checkpoint
from lora_core.train.setup import RuntimePlan, prepare
from lora_core.verbs import runs as verbs
from tests.faults import corrupt
from tests.train.runs import Toy, asked_at, broken_at, result, tensors, trained

HOT = {
    "validation__every": 1, "validation__pictures": 1, "validation__draws_per_image": 4,
    "validation__patience": 3,
    "validation__forgetting": 1, "optimizer__lr": 5.0, "train__steps": 16, "save__every": 4,
}  # fmt: skip


def all_events(run: RunFolder) -> list[events.Event]:
    return events.read_events(run.events_file)[0]


@pytest.fixture
def hot(unbroken: Callable[..., RunFolder]) -> RunFolder:
    """A run at a rate at which it soon gets worse, and ends itself."""
    return unbroken(**HOT)


def test_it_stops_when_nothing_is_gained_and_says_why(hot: RunFolder) -> None:
    ending = all_events(hot)[-1]
    assert hot.status() == "stopped"
    assert isinstance(ending, events.Stopped)
    assert ending.step < 16
    best = hot.progress().best_step
    assert f"after step {best}" in ending.reason
    assert hot.progress().reason == ending.reason
    assert ending.step in hot.checkpoint_steps()


def test_the_best_is_kept_and_exported(hot: RunFolder) -> None:
    progress = hot.progress()
    assert progress.best_step in hot.checkpoint_steps()
    last = progress.validations[-1]
    assert last.against_best < -last.against_best_error
    best = load_adapter(hot.checkpoint(progress.best_step) / "adapter.safetensors").layers
    exported = load_adapter(hot.path / progress.export).layers
    assert all(torch.equal(exported[key].up, layer.up.half().float()) for key, layer in best.items())
    assert any("that of step" in warning for warning in progress.warnings)


def test_a_best_that_is_not_whole_is_not_exported(own_toy: Toy, hot: RunFolder) -> None:
    """The last one is, and who asks for the broken one is told."""
    run, told = own_toy.run("spoiled", **HOT), hot.progress()

    def on_event(event: events.Event) -> None:
        if isinstance(event, events.Validated) and event.step == told.step:
            corrupt(run.checkpoint(told.best_step) / "adapter.safetensors")

    assert trained(run, on_event).status == "stopped"
    last = load_adapter(run.checkpoint(told.step) / "adapter.safetensors").layers
    exported = load_adapter(run.path / run.progress().export).layers
    assert all(torch.equal(exported[key].up, layer.up.half().float()) for key, layer in last.items())
    with pytest.raises(RunError, match=r"is broken: adapter\.safetensors has changed since it was written"):
        export_checkpoint(run, "best", "mine", ("kohya", "fp16"))


def test_each_best_beat_the_one_before_by_more_than_the_error(hot: RunFolder) -> None:
    seen = hot.progress().validations
    assert seen[0].best
    for event in seen[1:]:
        assert event.best == (event.against_best > event.against_best_error)


def test_gauge_and_prior_are_what_they_say(hot: RunFolder) -> None:
    for event in hot.progress().validations:
        assert event.gauge == pytest.approx(event.train_gain - event.gain)
        assert event.gauge_error > event.standard_error
        assert math.isfinite(event.prior)
        assert sum(row["to"] - row["from"] for row in event.bands) == 1000


def test_a_person_who_resumes_it_gets_all_steps(own_toy: Toy) -> None:
    run = own_toy.run("on", **{**HOT, "optimizer__lr": 1.0})
    assert trained(run).status == "stopped"
    assert trained(run).status == "done"
    assert run.progress().step == 16


def test_a_kill_changes_nothing_of_the_decision(own_toy: Toy, hot: RunFolder) -> None:
    """Broken off after the last validation, before its reason could be told, and in the middle."""
    last = hot.progress().step
    for number, step in enumerate((last, 3)):
        run = own_toy.run(f"killed{number}", **HOT)
        broken_at(run, events.Validated, step)
        assert trained(run).status == "stopped"
        assert run.progress().reason == hot.progress().reason
        assert tensors(run.path / run.progress().export) == tensors(hot.path / hot.progress().export)


AUTO = {
    "adapter__rank": "auto", "validation__every": 6, "validation__pictures": 1, "optimizer__lr": 3e-2,
    "optimizer__schedule": "constant",
}  # fmt: skip


def test_the_file_of_auto_rank_is_cut_and_its_checkpoint_is_not(
    unbroken: Callable[..., RunFolder], own_toy: Toy
) -> None:
    run = unbroken(**AUTO)
    told, path = run.progress().ranks, run.path / run.progress().export
    assert told is not None
    full, cut = load_adapter(run.checkpoint(12) / "adapter.safetensors"), load_adapter(path)
    assert {layer.rank for layer in full.layers.values()} == {16}
    numbers = [sum(x.up.numel() + x.down.numel() for x in one.layers.values()) for one in (cut, full)]
    assert numbers[0] < numbers[1] / 2
    assert told.parameters == pytest.approx(numbers[0] / numbers[1])
    assert told.rank == cut.highest_rank < told.trained == 16
    assert told.kept >= 0.99
    assert "of the gain on held-out images" in told.sentence
    record = json.loads(read_header(path).metadata["lora_easel.shrunk"])
    assert (record["sentence"], record["kept"]) == (told.sentence, told.kept)
    assert told.sentence in summary(collect_data(run, False, lambda words, done, total: None))
    # Again the same, another step by its energy, and all of it on request.
    again = export_checkpoint(run, "12", "again", ("kohya", "fp16"))
    assert tensors(again["file"]) == tensors(path)
    assert again["works_in"]["ok"]
    earlier = export_checkpoint(run, "8", "earlier", ("kohya", "fp16"))["cut"]
    assert "99% of the energy" in earlier["sentence"]
    assert "kept" not in earlier
    whole = export_checkpoint(run, "12", "whole", ("kohya", "fp16"), full_rank=True)
    assert whole["cut"] == {}
    assert load_adapter(Path(whole["file"])).highest_rank == 16
    # A kill while it is written changes nothing, and a run that is stopped does not measure.
    killed = own_toy.run("killed", **AUTO)
    broken_at(killed, events.RanksChosen, 12)
    trained(killed)
    assert result(killed) == result(run)
    stopped = own_toy.run("stopped", **AUTO)
    assert asked_at(stopped, "stop", 7).status == "stopped"
    assert "the run was asked to end" in stopped.progress().ranks.sentence


def test_an_export_is_cut_to_the_rank_that_a_report_measured(own_toy: Toy) -> None:
    run = own_toy.run("measured", **{**AUTO, "adapter__rank": 8})
    trained(run)
    with pytest.raises(RunError, match=r"needs was not measured; make its report first"):
        verbs.export(run.path, measured_rank=True)
    verbs.report(run.path, measure=True)
    found = run.analysis(run.step_of("best"))
    assert found is not None
    assert found.rank < 8
    assert found.times_smaller > 1.2
    assert found.strength is not None
    whole, small = verbs.export(run.path), verbs.export(run.path, name="small", measured_rank=True)
    assert small["cut"]["sentence"] == found.sentence
    assert small["works_in"]["ok"]
    ranks = {key: layer.rank for key, layer in load_adapter(Path(small["file"])).layers.items()}
    assert ranks == {(one.part, one.module): one.rank for one in found.ranks if one.rank}
    assert whole["bytes"] / small["bytes"] == pytest.approx(found.times_smaller, rel=0.3)
    with pytest.raises(ConfigError, match="give one of the two"):
        verbs.export(run.path, full_rank=True, measured_rank=True)
    # What was measured is not of a checkpoint that was written later, nor what a stranger's file makes up.
    text, later = run.analysis_file.read_text(), run.analysis_file.stat().st_mtime_ns + 10**9
    run.analysis_file.write_text(text.replace('"rank":', '"rank":"x",', 1))
    assert run.analysis(found.step) is None
    run.analysis_file.write_text(text)
    os.utime(run.checkpoint(found.step) / "adapter.safetensors", ns=(later + 10**9, later + 10**9))
    assert run.analysis(found.step) is None
    # A drive that takes no such file has the report all the same.
    run.analysis_file.unlink()
    run.analysis_file.mkdir()
    assert verbs.report(run.path, measure=True)
    assert run.analysis(found.step) is None


def test_auto_rank_keeps_the_scale_and_says_where_it_cannot_measure(own_toy: Toy) -> None:
    config = RunConfig().changed({"adapter.rank": 4, "adapter.alpha": 2.0}).changed({"adapter.rank": "auto"})
    assert (config.adapter.auto_rank, config.adapter.rank, config.adapter.alpha) == (True, 16, 8.0)
    assert RunConfig.from_dict(config.to_dict()) == config
    assert not config.changed({"adapter.rank": 8}).adapter.auto_rank
    assert RunConfig().changed({"adapter.rank": 32, "adapter.auto_rank": True}).adapter.rank == 32
    run = own_toy.run("blind", **{**AUTO, "validation__every": 0})
    notes = [p.sentence for p in preflight(run.config(), own_toy.home, card=lambda: None)]
    assert any("adapter.rank = auto has no held-out images" in note for note in notes)
    trained(run)
    assert "no images are held out" in run.progress().ranks.sentence


@pytest.mark.parametrize("share", [0.0, 1e-9], ids=["no limit", "hardly any"])
def test_validation_keeps_to_its_share_of_the_time(own_toy: Toy, share: float) -> None:
    run = own_toy.run(
        "budget",
        validation__pictures=1,
        validation__every=2,
        validation__max_time_share=share,
        validation__patience=0,
    )
    trained(run)
    steps = [event.step for event in run.progress().validations]
    chosen = json.loads(run.plan_file.read_text())["validate_every"]
    if share:
        # The first one has to be done to know what it costs, and the last one is always done.
        assert (steps, chosen > 12) == ([2, 12], True)
        assert any(f"every {chosen:,} steps rather than every 2" in text for text in run.progress().warnings)
    else:
        assert (steps, chosen) == ([2, 4, 6, 8, 10, 12], 2)


def test_the_share_is_of_the_time_that_steps_take(own_toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A validation of 0.35 s against steps of 0.1 s: with a fifth of the time it may be done every 18 steps,
    which is every 18 where 2 are wished for."""
    from lora_core.train.callbacks import StepTimer

    run = own_toy.run("share", validation__pictures=1, validation__every=2, validation__max_time_share=0.2)
    monkeypatch.setattr(StepTimer, "median", 0.1)
    measured: Callable[..., events.Validated] = validation.Validator.validate

    def slow(self: validation.Validator, *args: object) -> events.Validated:
        event = measured(self, *args)
        self.seconds = 0.35
        return event

    monkeypatch.setattr(validation.Validator, "validate", slow)
    trained(run)
    assert json.loads(run.plan_file.read_text())["validate_every"] == 18


def test_too_few_pictures_are_measured_with_each_others_captions(own_toy: Toy) -> None:
    """A tenth of four pictures is none."""
    run = own_toy.run("few", validation__pictures=0.1, validation__every=6)
    seen = trained(run)
    assert seen.status == "done"
    progress = run.progress()
    assert [event.step for event in progress.validations] == [6, 12]
    assert validation.CROSSED in progress.warnings
    # Their own captions help more than those of others.
    assert progress.validations[-1].gauge != 0.0


def test_validating_changes_nothing_of_the_training(own_toy: Toy) -> None:
    wanted = own_toy.run("without")
    trained(wanted)
    run = own_toy.run("with", validation__pictures=0.1, validation__every=3, validation__patience=0)
    trained(run)
    assert result(run)["adapter.safetensors"] == result(wanted)["adapter.safetensors"]


def test_images_of_the_base_are_sampled_again_after_a_failure(own_toy: Toy) -> None:
    run = own_toy.run("own", validation__pictures=1, validation__every=6, validation__forgetting=2)
    config = run.config()
    session = prepare(run, config, RuntimePlan.of(run, config), lambda *_: None)
    own = session.validation_sets.forgetting
    assert own is not None
    calls: list[int] = []

    def fail_in_the_second(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) > total + 2:
            raise MemoryError

    with pytest.raises(MemoryError):
        own.images(2, 0, fail_in_the_second)
    assert len(own.images(2, 0, lambda *_: None)) == 2
