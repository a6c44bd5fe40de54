"""Whether validation decides rightly, on the demo: trained four times too long at a high rate it stops and
keeps the best; trained well it does not stop while it still gains. Judged by looks of its own."""

import sys
import warnings
from pathlib import Path

import pytest

from lora_core.model_files.starting_settings import starting_settings
from lora_core.runs import events
from lora_core.runs.folder import RunFolder
from lora_core.settings.config import RunConfig
from lora_core.train.trainer import train
from tests.evaluator import Evaluator, mean_and_error

ASSETS = Path(__file__).resolve().parents[2] / "assets"
WATCHED: dict[str, object] = {"validation.pictures": 4.0, "validation.draws_per_image": 4, "sample.every": 0}
STEPS = 480
TOO_LONG = WATCHED | {
    "train.steps": STEPS, "optimizer.lr": 6e-3, "optimizer.text_encoder_lr": 6e-3,
    "optimizer.schedule": "constant",
    "dataset.caption_dropout": 0.0, "validation.every": 20, "save.every": 80,
}  # fmt: skip
WELL = WATCHED | {"validation.every": 10, "save.every": 40}

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("single_thread")]


@pytest.fixture(scope="module")
def judge() -> Evaluator:
    return Evaluator(ASSETS / "base", ASSETS / "demo" / "held_out")


def finished(home: Path, seed: int, changes: dict[str, object]) -> RunFolder:
    settings = {**starting_settings("demo", None), **changes, "name": "run", "seed": seed}
    run = RunFolder.create(home / "runs" / "run", RunConfig().changed(settings))
    go_on(run)
    return run


def go_on(run: RunFolder) -> None:
    with run.hold(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(run, None, lambda event: None)


def told(what: str, seed: int, steps: str, value: float, error: float) -> None:
    sys.stdout.write(f"\nseed {seed}, {steps}: {what} {value:.4f}, standard error {error:.4f}\n")


@pytest.mark.parametrize("seed", range(5))
def test_too_long_is_noticed_and_the_best_is_kept(tmp_path: Path, judge: Evaluator, seed: int) -> None:
    run = finished(tmp_path, seed, TOO_LONG)
    progress = run.progress()
    seen = progress.validations
    assert isinstance(events.read_events(run.events_file)[0][-1], events.Stopped)
    assert progress.step < STEPS // 2, progress.reason
    # The gauge rises from the best step on.
    assert seen[-1].gauge > next(e.gauge for e in seen if e.step == progress.best_step) > seen[0].gauge
    assert progress.export, progress.reason
    best = judge.losses(run.path / progress.export)
    last = judge.losses(run.checkpoint(progress.step) / "adapter.safetensors")
    told("the best less the last", seed, f"stopped at {progress.step}", *mean_and_error(last - best))
    # Told to go on, it trains the whole of what is too long, and still gives out the best.
    go_on(run)
    progress = run.progress()
    assert run.status() == "done"
    best = judge.losses(run.path / progress.export)
    last = judge.losses(run.checkpoint(STEPS) / "adapter.safetensors")
    kept, error = mean_and_error(last - best)
    told("the best less the last", seed, f"best {progress.best_step}, gone on to the end", kept, error)
    assert kept >= 2 * error


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_is_left_alone_while_it_gains(tmp_path: Path, judge: Evaluator, seed: int) -> None:
    run = finished(tmp_path, seed, WELL)
    progress = run.progress()
    told(
        "gain at the end",
        seed,
        run.status(),
        progress.validations[-1].gain,
        progress.validations[-1].standard_error,
    )
    if run.status() == "done":
        return
    # It may only have ended where going on gained nothing that can be measured.
    more = finished(tmp_path / "on", seed, WELL | {"validation.patience": 0})
    stopped = judge.losses(run.checkpoint(progress.step) / "adapter.safetensors")
    gained, error = mean_and_error(stopped - judge.losses(more.path / more.progress().export))
    assert gained <= 2 * error, (gained, error)
