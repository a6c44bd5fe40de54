"""The verb that takes a few steps to say what a step takes, in this very process."""

import gc
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from app.state import AppState, take_snapshot
from app.train.start import forecast
from lora_core.model_files.starting_settings import starting_settings
from lora_core.models.load import BaseModel
from lora_core.projects.project import DEMO
from lora_core.runs.costs import PROBED, StepCost, keep_cost
from lora_core.runs.folder import RunFolder, runs_folder
from lora_core.settings.config import RunConfig
from lora_core.train import autotune
from lora_core.train.loop import TrainState
from lora_core.worker import Worker

ROOT = Path(__file__).resolve().parents[2]


def asked(changes: dict[str, Any], meanwhile: Any = lambda worker, line: None) -> list[dict[str, Any]]:
    """All answers; `meanwhile` is called with each."""
    answers: list[dict[str, Any]] = []

    def answer(line: dict[str, Any]) -> None:
        answers.append(line)
        meanwhile(worker, line)

    worker = Worker(answer)
    config = RunConfig().changed({"train.resolution": 64, **changes}).to_dict()
    worker.handle({"id": "1", "do": "probe", "config": config})
    return answers


def states_and_bases() -> list[object]:
    gc.collect()
    return [one for one in gc.get_objects() if isinstance(one, BaseModel | TrainState)]


@pytest.fixture
def left_over() -> Callable[[], list[object]]:
    """What has come into being since the test began: other tests' shared bases do not count."""
    before = states_and_bases()
    return lambda: [one for one in states_and_bases() if not any(one is old for old in before)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer.text_encoder_lr": 0.0},
        {
            "optimizer.text_encoder_lr": 1e-5,
            "train.batch_size": 2,
            "save.ema": 0.9,
            "train.gradient_accumulation_steps": 2,
        },
    ],
)
def test_it_takes_steps_and_lets_go_of_all(
    changes: dict[str, Any], left_over: Callable[[], list[object]]
) -> None:
    began = time.perf_counter()
    answers = asked(changes)
    took = time.perf_counter() - began
    done = answers[-1]
    assert done["event"] == "done", done
    assert [line["done"] for line in answers[:-1]] == list(range(1, autotune.TIMED_STEPS + 1))
    # The steps that counted were really taken, within the time that it all took.
    assert 0 < done["step"] * done["steps"] < took
    assert 0 < done["draw"] < took
    assert (done["steps"], done["device"]) == (autotune.TIMED_STEPS - 1, "cpu")
    assert left_over() == []


def test_more_work_takes_longer() -> None:
    one, many = (asked({"train.batch_size": size})[-1]["step"] for size in (1, 32))
    assert many > 1.5 * one


def test_it_ends_between_two_steps_where_it_is_cancelled(left_over: Callable[[], list[object]]) -> None:
    def cancel(worker: Worker, line: dict[str, Any]) -> None:
        if line["event"] == "progress":
            worker.cancelled.add("1")

    answers = asked({}, cancel)
    assert [line["event"] for line in answers] == ["progress", "error"]
    assert answers[-1]["message"] == "Cancelled."
    assert left_over() == []


def test_too_little_memory_is_a_sentence_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, left_over: Callable[[], list[object]]
) -> None:
    def full(*anything: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(autotune, "training_steps", full)
    answer = asked({})[-1]
    assert answer["event"] == "error"
    assert "lower train.batch_size" in answer["message"]
    assert left_over() == []


def test_what_cannot_be_trained_says_why() -> None:
    assert "no-such-file" in asked({"model.base": "/no-such-file.safetensors"})[-1]["message"]


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["demo", "style-quick"])
def test_the_forecast_is_what_the_run_takes(tmp_path: Path, preset: str) -> None:
    app_state = AppState(tmp_path, worker_command=["no-such-program"])
    app_state.project.update_draft(dataset=DEMO)
    config = RunConfig().changed(
        {
            **starting_settings(preset, None), "dataset.path": DEMO, "train.steps": 40,
            "sample.every": 10, "validation.every": 10, "save.every": 20, "name": "real",
        }
    )  # fmt: skip
    answers: list[dict[str, Any]] = []
    Worker(answers.append).handle({"id": "1", "do": "probe", "config": config.to_dict()})
    told = answers[-1]
    one = StepCost(told["step"], told["draw"], told["peak"], config.model.base, app_state.hardware.device)
    keep_cost(tmp_path, config, one)
    expected = forecast(take_snapshot(app_state), config)
    assert expected.seconds_a_step is not None
    assert expected.source == PROBED
    run = RunFolder.create(runs_folder(tmp_path) / "real", config)
    # In a process of its own, as in life.
    trainer = [sys.executable, "-m", "lora_core", "resume", str(run.path)]
    done = subprocess.run(trainer, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    taken = app_state.jobs.all()[0].run.progress().wall_pace()
    assert taken is not None
    assert taken / 1.5 < expected.seconds_a_step < taken * 1.5, (expected.seconds_a_step, taken)
