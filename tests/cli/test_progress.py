"""What a person sees of a run's events, on a terminal and in a pipe."""

import io
from dataclasses import replace

import pytest

from lora_core.cli import terminal
from lora_core.cli.terminal import EventPrinter
from lora_core.runs import events
from lora_core.settings.config import RunConfig

STARTED = events.Started(steps=100, pid=1, device="cpu", threads=2, versions={})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(terminal, "time", clock)
    return clock


def step(number: int, seconds: float = 0.1) -> events.StepDone:
    return events.StepDone(step=number, loss=1.0 / number, lr=1e-3, seconds=seconds)


@pytest.mark.parametrize("seconds", [0.01, 0.1, 0.3, 0.7])
def test_a_pipe_gets_a_line_a_second_and_no_flood(clock: Clock, seconds: float) -> None:
    out = io.StringIO()
    printer = EventPrinter(out)
    printer.show(STARTED)
    times = []
    for number in range(1, 101):
        clock.now += seconds
        before = out.getvalue()
        printer.show(step(number, seconds))
        if out.getvalue() != before:
            times.append(clock.now)
    gaps = [b - a for a, b in zip([0.0, *times[:-2]], times[:-1], strict=True)]
    assert max(gaps) <= 1.0
    assert min(gaps) >= 0.5
    assert "\r" not in out.getvalue()
    assert "step 100 of 100" in out.getvalue().splitlines()[-1]


def test_what_happens_once_is_always_said(clock: Clock) -> None:
    out = io.StringIO()
    printer = EventPrinter(out)
    once = [
        STARTED,
        events.Resumed(step=5, steps=100),
        step(6),
        events.Warned(step=6, message="The disk is nearly full."),
        events.Validated(step=6, gain=0.5, standard_error=0.1, base_loss=1.0, adapted_loss=0.5, best=True),
        events.CheckpointDone(step=6, path="checkpoints/step-000006"),
        events.PreviewDone(step=6, files=["previews/step-000006-0.png"], prompts=["a cat"]),
        events.Paused(step=6),
        events.Stopped(step=6, export="export/a.safetensors"),
        events.Finished(step=100, export="export/a.safetensors"),
    ]
    for event in once:
        printer.show(event)
    lines = out.getvalue().splitlines()
    words = ["cpu with 2 threads", "from step 5", "disk is nearly full", "gain on held-out images +0.5000",
             "saved checkpoints/step-000006", "previews/step-000006-0.png", "Paused at step 6",
             "Stopped at step 6", "Done, 100 steps"]  # fmt: skip
    assert all(any(word in line for line in lines) for word in words), lines
    assert len(lines) == len(words)


def test_each_phase_of_the_preparation_is_said(clock: Clock) -> None:
    """Also those that follow each other at once: the slow one should not go by the name of the one before."""
    out = io.StringIO()
    printer = EventPrinter(out)
    printer.show(STARTED)
    for phase in ("Reading the images", "Opening the base model", "Encoding images"):
        printer.show(events.Preparing(phase=phase, done=0, total=1))
    for phase in ("Reading the images", "Opening the base model", "Encoding images"):
        assert phase in out.getvalue()


def test_a_terminal_has_one_bar(clock: Clock) -> None:
    out = Terminal()
    printer = EventPrinter(out)
    printer.show(STARTED)
    for number in range(1, 51):
        clock.now += 1.0
        printer.show(step(number))
    printer.show(events.CheckpointDone(step=50, path="checkpoints/step-000050"))
    printer.show(events.Paused(step=50))
    printer.close()
    text = out.getvalue()
    assert text.count("\r") == 50
    assert "[###############...............]  50%" in text
    assert len(text.splitlines()) == len(text.split("\n")[:-1]) + 50
    assert text.endswith("continue with `resume`\n")
    assert "\nstep 50  saved" in text


def test_the_bar_fits_the_terminal(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    out = Terminal()
    printer = EventPrinter(out)
    printer.show(STARTED)
    clock.now = 1.0
    printer.show(step(1))
    bar = out.getvalue().rpartition("\x1b[2K")[2]
    assert bar.startswith("[")
    assert len(bar) == 49


def test_a_loss_that_is_no_number_is_shown(clock: Clock) -> None:
    out = io.StringIO()
    printer = EventPrinter(out)
    printer.show(STARTED)
    clock.now = 5.0
    printer.show(events.StepDone(step=1, loss=float("nan"), lr=0.0, seconds=0.0))
    assert "step 1 of 100" in out.getvalue()


def test_the_time_left_counts_samples_that_are_still_to_come(clock: Clock) -> None:
    out = io.StringIO()
    printer = EventPrinter(out, RunConfig().changed({"sample.every": 50, "validation.every": 0}))
    printer.show(replace(STARTED, time=80.0))
    printer.show(events.PreviewDone(files=[], prompts=[], time=100.0))
    for number in (1, 2):
        clock.now += 1
        printer.show(replace(step(number, 1.0), time=100.0 + number))
    # 98 steps of a second, and two rounds of samples that take 20.
    assert "2:18 left" in out.getvalue()
