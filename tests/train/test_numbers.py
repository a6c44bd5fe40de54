"""Numbers that are not finite, and losses that run away: passed over, gone back from, ended with a
diagnosis."""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from lora_core.errors import ConfigError
from lora_core.runs import events
from lora_core.runs.events import read_events
from lora_core.runs.folder import RunFolder
from lora_core.train import callbacks, loop
from lora_core.train.callbacks import DivergenceGuard, StepTimer, describe_slow_step
from lora_core.train.checkpoint import load_checkpoint
from tests.faults import Fault, armed
from tests.train.runs import (
    Toy,
    asked_at,
    broken_at,
    check_story,
    check_whole,
    notes,
    result,
    trained,
    trouble,
)


@contextmanager
def spoiled(steps: set[int], above: float = 0.0, by: float = math.nan) -> Iterator[None]:
    """The losses of these steps are `by` times as large, wherever the factor of the rates is over `above`."""
    real = loop.backward_micro_batch

    def micro_batch(state, batches, text, plan, number):
        losses = real(state, batches, text, plan, number)
        spoils = (
            number // plan.config.train.gradient_accumulation_steps + 1 in steps and plan.lr_scale > above
        )
        return losses * by if spoils else losses

    with mock.patch.object(loop, "backward_micro_batch", micro_batch):
        yield


def all_finite(run: RunFolder) -> bool:
    files = [*run.checkpoints.rglob("*.safetensors"), *run.exports.glob("*.safetensors")]
    return all(bool(t.isfinite().all()) for file in files for t in load_file(file).values())


def test_one_bad_step_is_passed_over_and_named(own_toy: Toy) -> None:
    run = own_toy.run("one")
    with spoiled({6}):
        trained(run)
    (note,) = notes(run)
    assert note.startswith("Step 6 skipped: the loss is not finite (")
    assert ".png at timestep " in note
    losses = [event.loss for event in run.progress().losses]
    assert [math.isnan(loss) for loss in losses] == [step == 6 for step in range(1, 13)]
    check_story(run)
    assert run.status() == "done"
    assert all_finite(run)
    assert math.isfinite(run.progress().smoothed_loss())


@pytest.mark.parametrize(
    "moment", ["before", "warned", "returned", "after", "paused before", "paused after", "saved"]
)
def test_three_in_a_row_go_back_and_a_broken_run_does_the_same(
    own_toy: Toy, unbroken: Callable[..., RunFolder], moment: str
) -> None:
    """Steps 6 to 8 fail at the full rate: back to 4, and past them at half of it."""
    with spoiled({6, 7, 8}, above=0.5):
        whole = unbroken("spoiled at 6, 7, 8")
        run = own_toy.run("broken")
        if moment == "before":
            broken_at(run, events.StepDone, 7)
        elif moment == "warned":
            broken_at(run, events.Warned, 4)
        elif moment == "returned":
            broken_at(run, events.Resumed, 4)
        elif moment == "after":
            broken_at_second_pass(run, 6)
        elif moment == "paused before":
            assert asked_at(run, "pause", 7).status == "paused"
        elif moment == "paused after":
            paused_at_second_pass(run, 6)
        else:
            asked_at(run, "save", 5)
        if moment != "saved":
            check_whole(run)
            trained(run)
    assert result(run) == result(whole)
    check_story(run)
    for one in (run, whole):
        assert all_finite(one)
        told = [note for note in notes(one) if "halved (1 of at most 3 times)" in note]
        assert told
        assert "continues from step 4, the last good state" in told[-1]
    rates = {event.step: event.lr for event in whole.progress().losses}
    plain = unbroken()
    normal = {event.step: event.lr for event in plain.progress().losses}
    assert all(rates[step] == normal[step] for step in (1, 4))
    assert all(rates[step] == pytest.approx(normal[step] / 2) for step in (5, 9, 12))
    if moment == "saved":
        # A person asked for it, so it is not thrown away, but nothing goes on from it either.
        aside = run.checkpoints / "step-000005-set-aside"
        assert load_checkpoint(aside)[1].step == 5


def test_where_it_goes_back_to_does_not_depend_on_a_pause(
    own_toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paused in the midst of the validation before the checkpoint of step 8 is due: it is the same
    checkpoint."""
    monkeypatch.setattr(callbacks, "SECONDS_BETWEEN_REPORTS", -1.0)
    how = {"validation__pictures": 1, "validation__every": 8}
    asked = []

    def on_event(event: events.Event) -> None:
        if isinstance(event, events.Working) and event.step == 8 and not asked:
            asked.append(run.request("pause"))

    with spoiled({9, 10, 11}, above=0.5):
        whole, run = own_toy.run("whole", **how), own_toy.run("paused", **how)
        trained(whole)
        assert trained(run, on_event).status == "paused"
        trained(run)
    assert [note for note in notes(run) if "continues from step 8" in note]
    assert result(run) == result(whole)
    states = [load_checkpoint(one.checkpoint(8))[1] for one in (run, whole)]
    assert states[0].best == states[1].best
    assert states[0].best["step"] == 8
    check_story(run)


@pytest.mark.parametrize(("on", "times"), [("write", 1), ("rename", 1), ("fsync", 0)])
def test_a_drive_that_is_full_when_a_return_is_noted(
    own_toy: Toy, unbroken: Callable[..., RunFolder], on: str, times: int
) -> None:
    """The halved rates are written into the checkpoint of step 4; the run comes to the same return again."""
    with spoiled({6, 7, 8}, above=0.5):
        whole, run = unbroken("spoiled at 6, 7, 8"), own_toy.run("full")
        with armed(Fault(on, r"checkpoints/step-000004/\.?state\.json", times=times)):
            assert "No space left on device" in trouble(run)
        assert run.status() == "paused"
        check_whole(run)
        trained(run)
    assert result(run) == result(whole)
    check_story(run)


def broken_at_second_pass(run: RunFolder, step: int) -> None:
    from tests.train.runs import Broken

    seen = []

    def on_event(event: events.Event) -> None:
        if isinstance(event, events.StepDone) and event.step == step:
            seen.append(1)
            if len(seen) == 2:
                raise Broken

    with pytest.raises(Broken):
        trained(run, on_event)


def paused_at_second_pass(run: RunFolder, step: int) -> None:
    seen = []

    def on_event(event: events.Event) -> None:
        if isinstance(event, events.StepDone) and event.step == step:
            seen.append(1)
            if len(seen) == 2:
                run.request("pause")

    assert trained(run, on_event).status == "paused"


def test_before_the_first_checkpoint_it_goes_back_to_the_start(own_toy: Toy) -> None:
    with spoiled({1, 2, 3}, above=0.25):
        whole = own_toy.run("whole", save__every=0, save__ema=0.9)
        trained(whole)
        run = own_toy.run("paused", save__every=0, save__ema=0.9)
        assert asked_at(run, "pause", 2).status == "paused"
        trained(run)
    assert result(run) == result(whole)
    check_story(whole)
    assert "continues from step 0" in notes(whole)[3]
    assert any("(2 of at most 3 times)" in note for note in notes(whole)[4:])


def test_after_three_returns_it_ends_with_a_diagnosis(own_toy: Toy) -> None:
    run = own_toy.run("hopeless", optimizer__lr=2e-3)
    with spoiled({7, 8, 9}):
        sentence = trouble(run)
        assert "Training diverged at step 9" in sentence
        assert "halving the learning rate 3 times, to 0.00025" in sentence
        assert ".png at timestep" in sentence
        assert (run.status(), run.progress().cause) == ("failed", "diverged")
        assert run.progress().reason == sentence
        # Step 8 was passed over as well, so its checkpoint has the adapter of step 6.
        assert run.checkpoint_steps() == [4, 8]
        check_whole(run)
        # Again in vain, at once: what was tried is in the checkpoint.
        assert "Training diverged at step 9" in trouble(run)
        assert sum("halved" in note for note in notes(run)) == 3
    # Whoever changes something may try anew.
    run.config_file.write_text(run.config_file.read_text().replace("lr = 0.002", "lr = 0.001"))
    trained(run, accept_changes=True)
    assert run.status() == "done"
    assert all_finite(run)


def test_a_rate_beyond_reason_ends_in_a_sentence_and_in_no_file_that_is_not_finite(own_toy: Toy) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.lr"):
        own_toy.run("infinite", optimizer__lr=math.inf)
    wild = {
        "optimizer__lr": 10.0,
        "optimizer__max_grad_norm": 0.0,
        "optimizer__warmup": 0.0,
        "optimizer__name": "sgd",
    }
    run = own_toy.run("wild", train__steps=40, adapter__alpha=1e6, **wild)
    assert "Training diverged" in trouble(run)
    assert run.status() == "failed"
    assert all_finite(run)
    check_whole(run)


def test_nan_in_the_gradient_of_one_layer_names_it(own_toy: Toy) -> None:
    run = own_toy.run("layer")
    real, calls = loop.optimizer_step, []

    def spoil(state, clip, parts, step):
        if step == 5:
            key, layer = list(state.injected.layers.items())[3]
            layer.up.grad[0, 0] = math.nan
            calls.append(" ".join(key))
        return real(state, clip, parts, step)

    with mock.patch.object(loop, "optimizer_step", spoil):
        trained(run)
    (name,) = calls
    (note,) = notes(run)
    assert f"Step 5 skipped: the gradient of {name} is not finite" in note
    assert run.status() == "done"


def test_a_loss_that_runs_away_goes_back(own_toy: Toy) -> None:
    how = {"train__steps": 44, "save__every": 10, "save__keep_last": 5}
    with spoiled(set(range(24, 45)), above=0.5, by=50.0):
        run = own_toy.run("away", **how)
        trained(run)
        paused = own_toy.run("paused", **how)
        assert asked_at(paused, "pause", 26).status == "paused"
        trained(paused)
    told = [note for note in notes(run) if "the loss has risen from" in note]
    assert len(told) == 1
    assert "continues from step 20" in told[0]
    check_story(run)
    assert run.status() == "done"
    assert result(paused) == result(run)


def test_an_adapter_that_is_not_finite_is_never_saved(own_toy: Toy) -> None:
    """The step itself was finite, and what it made is not, just when a checkpoint is due."""
    run = own_toy.run("spoiled")
    real = loop.optimizer_step

    def spoil(state, clip, parts, step):
        found = real(state, clip, parts, step)
        if step == 8 and state.optimizer.param_groups[0]["lr"] > 3e-4:
            state.injected.parameters()[0].data[0, 0] = math.inf
        return found

    with mock.patch.object(loop, "optimizer_step", spoil):
        trained(run)
    assert any("the adapter itself is no longer finite" in note for note in notes(run))
    assert all_finite(run)
    check_story(run)


def test_what_counts_as_running_away() -> None:
    """Log-normal losses as single pictures give them, spread over two decades, never count; a rise does."""
    draw = random.Random(0)
    health = DivergenceGuard()
    for _ in range(20_000):
        assert health.update(0.1 * math.exp(draw.gauss(-0.7, 1.2)), "") == ""
    risen = (health.update(2.0 * math.exp(draw.gauss(-0.7, 1.2)), "") for _ in range(50))
    assert 3 <= next(number for number, found in enumerate(risen, start=1) if found) <= 20
    # From the first step on, where there is no level yet: five times what predicting nothing costs.
    wild = DivergenceGuard()
    found = [wild.update(100.0 * step, "") for step in range(1, 11)]
    assert found[:-1] == [""] * 9
    assert "risen from 1 to" in found[-1]
    # A slider's losses are as large as the change that its prompts ask for.
    slider = DivergenceGuard(nothing=math.inf)
    assert [slider.update(8.0, "") for _ in range(20)] == [""] * 20
    assert [bool(slider.update(80.0, "")) for _ in range(6)] == [False] * 4 + [True] * 2


def test_health_comes_back_from_its_record_and_is_calm_only_when_well() -> None:
    health = DivergenceGuard()
    for step in range(40):
        health.update(0.1 + 0.001 * step, "")
    assert health.stable
    restored = DivergenceGuard()
    restored.restore(health.record())
    assert restored == health
    health.update(math.nan, "the loss is not finite")
    assert not health.stable
    health.roll_back_to(DivergenceGuard(losses=[0.5]).record())
    assert health == DivergenceGuard(0.5, 1, 0, [0.5])
    for _ in range(10):
        health.update(3.0, "")
    assert not health.stable


def test_a_pace_that_breaks_is_told_once() -> None:
    pace = StepTimer()
    assert pace.update(99.0) is None  # the first step may take its time
    told = [pace.update(seconds) for seconds in [0.1] * 20 + [0.8, 0.1, 0.6]]
    assert told == [None] * 23  # single slow steps happen
    pace.skip_next()
    assert pace.update(5.0) is None
    assert [pace.update(s) for s in (0.9, 0.9, 0.9)] == [pytest.approx(9.0), None, None]
    assert "Windows does without an error" in describe_slow_step(7, 0.9, 9.0, "cuda")
    assert "9 times" in describe_slow_step(7, 0.9, 9.0, "cpu")


def test_a_slow_stretch_is_noted_in_the_run(own_toy: Toy) -> None:
    run = own_toy.run("slow", train__steps=30, save__every=0)
    clock = [0.0]

    def perf_counter() -> float:
        # Asked twice a step; steps take a second, from the 25th on twenty.
        asked = clock.append(0) or (len(clock) - 2)
        clock[0] += (1.0 if asked // 2 < 24 else 20.0) if asked % 2 else 0.0
        return clock[0]

    with mock.patch.object(loop, "time", SimpleNamespace(perf_counter=perf_counter)):
        trained(run)
    (note,) = notes(run)
    assert note.startswith("Step 26 took 20.0 s, 20 times as long")


def test_events_of_bad_steps_are_json(own_toy: Toy) -> None:
    run = own_toy.run("json")
    with spoiled({2}, by=math.inf):
        trained(run)
    lines = [line for line in run.events_file.read_text().splitlines() if '"StepDone"' in line]
    assert '"loss": null' in lines[1]
    steps = [event for event in read_events(run.events_file)[0] if isinstance(event, events.StepDone)]
    assert math.isnan(steps[1].loss)
    assert torch.isfinite(torch.tensor(run.progress().smoothed_loss()))
