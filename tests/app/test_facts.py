"""Forecasts before Start: from a run of the same cost, else another one of the same base."""

from pathlib import Path

import pytest

from app.state import AppState, take_snapshot
from app.train.form import preset_config
from app.train.start import facts, forecast
from lora_core.runs import events
from lora_core.runs.costs import MEASURED, SCALED
from lora_core.runs.events import Progress
from lora_core.settings.config import RunConfig
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
