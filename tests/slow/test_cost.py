"""What the watch over a run costs: events, requests, checks and pace, against a step of the demo run."""

import io
import statistics
import time
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from lora_core.cli.terminal import EventPrinter
from lora_core.model_files.starting_settings import starting_settings
from lora_core.runs.folder import RunFolder
from lora_core.settings.config import RunConfig
from lora_core.train import loop, trainer
from lora_core.train.trainer import train


@pytest.mark.slow
def test_the_watch_costs_under_a_hundredth_of_a_step(tmp_path: Path) -> None:
    never = {"sample.every": 0, "validation.every": 0, "save.every": 0}
    config = RunConfig().changed({**starting_settings("demo", None), "name": "d", "train.steps": 40, **never})
    run = RunFolder.create(tmp_path / "runs" / "d", config)
    watch: list[float] = []
    check: list[float] = []
    steps: list[float] = []
    after, apply = trainer.Trainer._after_step, loop.optimizer_step

    def timed(self, step):
        began = time.perf_counter()
        after(self, step)
        watch.append(time.perf_counter() - began)
        steps.append(step.seconds)

    def checked(state, clip, parts, step):
        """The check alone, once more: the norm too, which clipping needs in any case."""
        began = time.perf_counter()
        norm = nn.utils.get_total_norm([p.grad for p in state.injected.parameters() if p.grad is not None])
        torch.stack([torch.stack([losses.mean() for losses in parts]).mean(), norm]).tolist()
        check.append(time.perf_counter() - began)
        return apply(state, clip, parts, step)

    with (
        mock.patch.object(trainer.Trainer, "_after_step", timed),
        mock.patch.object(loop, "optimizer_step", checked),
        run.hold(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        train(run, None, EventPrinter(io.StringIO()).show)
    # The first steps warm up, and the last one saves.
    cost = statistics.median(watch[5:-1]) + statistics.median(check[5:])
    assert cost < 0.01 * statistics.median(steps[5:]), (cost, statistics.median(steps[5:]))
