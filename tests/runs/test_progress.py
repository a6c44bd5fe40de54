"""Events folded into the state of a run."""

import math
from dataclasses import replace
from typing import Any

import pytest

from lora_core.runs import events
from lora_core.runs.events import Validated
from lora_core.runs.progress import Progress, best_of, smooth, verdict
from lora_core.settings.config import RunConfig


def started(steps: int = 100) -> events.Started:
    return events.Started(steps=steps, pid=1, device="cpu", threads=2, versions={})


def step(number: int, loss: float = 1.0, seconds: float = 0.5) -> events.StepDone:
    return events.StepDone(step=number, loss=loss, lr=1e-4, seconds=seconds)


def validated(number: int, best: bool) -> events.Validated:
    return events.Validated(
        step=number, gain=0.1, standard_error=0.01, base_loss=1.0, adapted_loss=0.9, best=best
    )


def folded(*new: events.Event) -> Progress:
    progress = Progress()
    progress.update(new)
    return progress


def test_nothing_has_happened_yet() -> None:
    progress = folded()
    assert (progress.started, progress.step, progress.ending) == (False, 0, "")
    assert progress.smoothed_loss() is None
    assert progress.seconds_left() is None


def test_resumed_drops_what_came_after_its_step() -> None:
    samples = [events.PreviewDone(step=n, files=[f"{n}.png"], prompts=["a"]) for n in (0, 50, 80)]
    progress = folded(
        started(),
        samples[0],
        *(step(n) for n in range(1, 51)),
        validated(50, best=True),
        samples[1],
        *(step(n) for n in range(51, 81)),
        validated(80, best=True),
        samples[2],
        started(200),
        events.Resumed(step=50, steps=200),
    )
    assert (progress.step, progress.steps, progress.best_step) == (50, 200, 50)
    assert [e.step for e in progress.losses] == list(range(1, 51))
    assert [e.step for e in progress.validations] == [50]
    assert [e.step for e in progress.previews] == [0, 50]
    progress.update([step(51, loss=3.0)])
    assert [e.step for e in progress.losses][-2:] == [50, 51]


def test_resumed_from_nothing_forgets_all() -> None:
    progress = folded(started(), step(1), validated(1, best=True), events.Resumed(step=0, steps=100))
    assert (progress.step, progress.losses, progress.best_step) == (0, [], None)


def test_fed_piece_by_piece_is_the_same() -> None:
    story = [started(), step(1), step(2), events.Resumed(step=1, steps=9), step(2), events.Paused(step=2)]
    whole, pieces = folded(*story), Progress()
    for event in story:
        pieces.update([event])
    assert whole == pieces


@pytest.mark.parametrize(
    ("event", "ending"),
    [
        (events.Paused(step=1), "paused"),
        (events.Stopped(step=1, export="export/a"), "stopped"),
        (events.Finished(step=1, export="export/a"), "done"),
        (events.Failed(reason="Out of memory."), "failed"),
    ],
)
def test_an_ending_is_taken_back_by_the_next_start(event: events.Event, ending: str) -> None:
    progress = folded(started(), step(1), event)
    assert progress.ending == ending
    progress.update([started()])
    assert (progress.ending, progress.reason, progress.stepping) == ("", "", False)


def test_what_a_failure_asks_about_goes_with_it() -> None:
    progress = folded(started(), step(1), events.Failed(step=1, reason="No.", changed=["the picture a.png"]))
    assert progress.changed == ["the picture a.png"]
    progress.update([events.Failed(step=1, reason="Out of memory.")])
    assert progress.changed == []
    progress.update([events.Failed(step=1, reason="No.", changed=["config.toml"]), started()])
    assert progress.changed == []


def test_phases_come_and_go() -> None:
    progress = folded(started(), events.Preparing(phase="Reading images", done=2, total=5))
    assert (progress.stepping, progress.phase, progress.phase_done, progress.phase_total) == (
        False,
        "Reading images",
        2,
        5,
    )
    progress.update([step(1), events.Working(phase="Drawing samples", done=0, total=4)])
    assert (progress.stepping, progress.phase) == (True, "Drawing samples")
    progress.update([step(2)])
    assert progress.phase == ""


def test_requests_and_warnings_are_kept() -> None:
    progress = folded(events.Handled(request="a"), events.Warned(message="Slow."))
    assert progress.handled == {"a"}
    assert progress.warnings == ["Slow."]


def test_time_left_is_the_median_pace_times_the_steps_left() -> None:
    progress = folded(started(100), *(step(n, seconds=0.5) for n in range(1, 40)), step(40, seconds=60.0))
    assert progress.seconds_a_step() == 0.5
    assert progress.seconds_left() == 30.0


def test_samples_and_validations_to_come_are_planned() -> None:
    """Steps of 1 s, samples every 20 that take 10 s, a validation every 50 that takes 15 s."""
    config = RunConfig().changed(
        {"sample.every": 20, "validation.every": 50, "validation.max_time_share": 0.0}
    )

    def at(number: int, time: float) -> events.StepDone:
        return events.StepDone(step=number, loss=1.0, lr=1e-4, seconds=1.0, time=time)

    progress = folded(
        events.Preparing(phase="Opening the base model", done=1, total=1, time=90.0),
        events.PreviewDone(files=[], prompts=[], time=100.0),
        *(at(number, 100.0 + number) for number in range(1, 11)),
    )
    progress.steps = 100
    assert progress.seconds_left(config) == pytest.approx(90 * 1 + 5 * 10)
    # Until one was made, validations are taken to need their share of the time.
    limited = config.changed({"validation.max_time_share": 0.1})
    assert progress.seconds_left(limited) == pytest.approx(90 * 1.1 + 5 * 10)
    progress.update([at(50, 150.0), replace(validated(50, True), time=165.0), at(51, 166.0)])
    assert progress.seconds_left(config) == pytest.approx(49 * 1 + 3 * 10 + 15)
    assert progress.seconds_left(limited) == pytest.approx(49 * 1.1 + 3 * 10)
    assert folded(started()).seconds_left(config) is None


def test_smoothing_starts_without_a_bias() -> None:
    """By hand, memory 1: decay e^-1; second value (e^-1 * 1 + 3) / (e^-1 + 1) = 2.4621..."""
    assert smooth([1.0, 3.0], memory=1.0) == pytest.approx([1.0, (math.exp(-1) + 3) / (math.exp(-1) + 1)])
    assert smooth([2.0] * 200) == pytest.approx([2.0] * 200)


def test_smoothing_passes_over_what_is_not_finite() -> None:
    curve = smooth([math.nan, 1.0, math.inf, 1.0])
    assert math.isnan(curve[0])
    assert curve[1:] == pytest.approx([1.0, 1.0, 1.0])


# The verdict on a run's validations; each number is set by hand to one side of its error bar.


def at(step: int, gain: float, best: bool = False, **more: Any) -> Validated:
    return Validated(
        **{"step": step, "gain": gain, "standard_error": 0.001, "base_loss": 0.2, "adapted_loss": 0.2 - gain}
        | {"best": best}
        | more
    )


FIRST = at(100, 0.010, True)
LATER = at(200, 0.014, True, against_best=0.004, against_best_error=0.001)


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ([], ""),
        ([at(100, math.nan)], ""),
        ([at(100, 0.0015, True)], "No significant gain up to step 100."),
        ([at(1100, -0.004, True)], "At step 1,100 it predicts held-out images worse than the base does."),
        ([FIRST], "It gains on held-out images: +0.0100."),
        ([FIRST, LATER], "Still gaining."),
        # Within its error of the best, though higher: the best one stays.
        (
            [FIRST, at(200, 0.0103, against_best=0.0003, against_best_error=0.001)],
            "No further gain since step 100.",
        ),
        (
            [FIRST, LATER, at(300, 0.012, against_best=-0.0019, against_best_error=0.001)],
            "No further gain since step 200.",
        ),
        (
            [FIRST, LATER, at(300, 0.011, against_best=-0.0021, against_best_error=0.001)],
            "It has become worse since step 200; the file of that step is better.",
        ),
        ([FIRST, at(200, 0.009, against_best=math.nan)], "No further gain since step 100."),
    ],
)
def test_gain(events: list[Validated], said: str) -> None:
    assert verdict(events) == said


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"train_gain": 0.02, "gauge": 0.006, "gauge_error": 0.004}, ""),  # 1.5 errors
        ({"train_gain": 0.05, "gauge": 0.010, "gauge_error": 0.001}, ""),  # a fifth of the gain
        (
            {"train_gain": 0.02, "gauge": 0.012, "gauge_error": 0.004},
            "Memorization: 60% of its gain on training images does not carry over to others.",
        ),
        (
            {"train_gain": 0.02, "gauge": 0.03, "gauge_error": 0.004},
            "Memorization: its gain on training images does not carry over to others at all.",
        ),
        ({"prior": -0.001, "prior_error": 0.0006}, ""),
        (
            {"prior": -0.001, "prior_error": 0.0004},
            "Forgetting: it gets slightly worse on the base's own images.",
        ),
        (
            {"prior": -0.007, "prior_error": 0.001},
            "Forgetting: it loses 50% as much on the base's own images as it gains on new ones.",
        ),
        (
            {"prior": -0.02, "prior_error": 0.001},
            "Forgetting: it loses more on the base's own images than it gains on new ones.",
        ),
        ({"prior": 0.01, "prior_error": 0.001}, ""),
    ],
)
def test_memorization_and_forgetting(numbers: dict[str, float], said: str) -> None:
    last = at(200, 0.014, True, against_best=0.004, against_best_error=0.001, **numbers)
    assert verdict([FIRST, last]) == f"Still gaining. {said}".strip()


def test_the_newest_that_was_called_best_is_the_best() -> None:
    # The gains alone would name step 300, whose difference is within its error.
    third = at(300, 0.0143, against_best=0.0003, against_best_error=0.001)
    assert best_of([FIRST, LATER, third]) is LATER
    assert best_of([at(100, 0.01)]) is None


@pytest.mark.parametrize(
    ("against", "said"),
    [
        (-0.002, "The averaged adapter gains more than the raw one, by 0.0020 (standard error 0.0005)"),
        (0.002, "The raw adapter gains more than its average, by 0.0020 (standard error 0.0005)"),
        (0.0005, "gain the same within the error"),
    ],
)
def test_the_average_beside_the_raw_adapter(against: float, said: str) -> None:
    last = at(100, 0.01, True, raw_gain=0.01 + against, raw_against=against, raw_against_error=0.0005)
    assert said in verdict([last])
    assert "raw" not in verdict([at(100, 0.01, True)])
