"""Signals and requests: a stop that keeps the work, whenever it comes; a second Ctrl-C that leaves at
once."""

import os
import signal
import sys
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from lora_core.model_files.header import read_header
from lora_core.runs import events
from lora_core.runs.folder import RunFolder
from lora_core.system import processes
from tests.faults import corrupt
from tests.train.runs import Broken, Toy, broken_at, check_story, check_whole, notes, result, trained

ON_UNIX = pytest.mark.skipif(sys.platform == "win32", reason="Windows has other signals")
STORY = {"sample__every": 6, "sample__steps": 3, "validation__pictures": 2, "validation__every": 6}


def always_note(patch: pytest.MonkeyPatch) -> None:
    """Long work says at every turn how far it is, so that a test can ask for something in its midst."""
    from lora_core.train import callbacks

    patch.setattr(callbacks, "SECONDS_BETWEEN_REPORTS", -1.0)


@ON_UNIX
@pytest.mark.parametrize(
    ("name", "moment"),
    [("SIGINT", "Preparing"), ("SIGINT", "StepDone"), ("SIGTERM", "StepDone"), ("SIGHUP", "Working")],
)
def test_a_signal_is_a_stop_that_keeps_the_work(
    own_toy: Toy, unbroken: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch, name: str, moment: str
) -> None:
    always_note(monkeypatch)
    run = own_toy.run("signalled", **STORY)
    sent = []

    def on_event(event: events.Event) -> None:
        at = event.step == 6 or isinstance(event, events.Preparing)
        if type(event).__name__ == moment and at and not sent:
            sent.append(event)
            os.kill(os.getpid(), getattr(signal, name))
            if name != "SIGINT":
                # The shell and the system both hang up; a supervisor may ask twice.
                os.kill(os.getpid(), getattr(signal, name))

    outcome = trained(run, on_event)
    assert outcome.signalled
    assert (outcome.status, run.status()) == ("stopped", "stopped")
    check_whole(run)
    if moment == "Preparing":
        assert run.checkpoint_steps() == []
    else:
        assert run.checkpoint_steps()[-1] == 6
        assert outcome.export is not None
        assert outcome.export.is_file()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    trained(run)
    assert result(run) == result(unbroken(**STORY))
    check_story(run)


@ON_UNIX
def test_a_second_ctrl_c_leaves_at_once_with_the_last_checkpoint_whole(own_toy: Toy) -> None:
    run = own_toy.run("twice")

    def on_event(event: events.Event) -> None:
        if isinstance(event, events.StepDone) and event.step == 6:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    codes = []

    def leave(code: int) -> None:
        codes.append(code)
        raise Broken

    with mock.patch.object(processes.os, "_exit", leave), pytest.raises(Broken):
        trained(run, on_event)
    assert codes == [130]
    assert run.checkpoint_steps() == [4]
    check_whole(run)
    trained(run)
    check_story(run)


@pytest.mark.parametrize("phase", ["Validating", "Sampling"])
def test_a_pause_is_acted_on_in_the_midst_of_other_work(
    own_toy: Toy, unbroken: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    always_note(monkeypatch)
    run = own_toy.run("paused", **STORY)
    asked, after = [], []

    def on_event(event: events.Event) -> None:
        if isinstance(event, events.Working) and event.phase == phase and event.step == 6:
            if not asked:
                run.request("pause")
            asked.append(event)
        elif asked:
            after.append(event.kind)

    assert trained(run, on_event).status == "paused"
    assert len(asked) == 1  # nothing more of it was done
    assert after in (["CheckpointDone", "Handled", "Paused"], ["Handled", "Paused"])
    assert run.checkpoint_steps()[-1] == 6
    trained(run)
    assert result(run) == result(unbroken(**STORY))
    assert [event.step for event in run.progress().previews] == [0, 6, 12]
    assert [event.step for event in run.progress().validations] == [6, 12]
    check_story(run)


@pytest.mark.parametrize("phase", ["Encoding images", "Encoding captions"])
def test_a_pause_is_acted_on_while_pictures_and_captions_are_encoded(
    own_toy: Toy, unbroken: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    always_note(monkeypatch)
    run = own_toy.run("early", **STORY)
    seen = []

    def on_event(event: events.Event) -> None:
        if isinstance(event, events.Preparing) and event.phase == phase:
            if event.done == 1:
                run.request("pause")
            seen.append(event.done)

    assert trained(run, on_event).status == "paused"
    assert seen == [0, 1]
    assert (run.status(), run.progress().step) == ("paused", 0)
    trained(run)
    assert result(run) == result(unbroken(**STORY))
    check_story(run)


def test_a_stop_before_the_first_step_takes_the_newest_whole_checkpoint(own_toy: Toy) -> None:
    run = own_toy.run("early", save__every=3)
    broken_at(run, events.StepDone, 8)
    assert run.checkpoint_steps() == [3, 6]
    corrupt(run.checkpoint(6) / "adapter.safetensors", "cut")

    def on_event(event: events.Event) -> None:
        if isinstance(event, events.Preparing):
            run.request("stop")

    outcome = trained(run, on_event)
    assert (outcome.status, run.status()) == ("stopped", "stopped")
    assert any("step-000006 is broken" in note and "one before it is used" in note for note in notes(run))
    assert outcome.export is not None
    kept = load_file(run.checkpoint(3) / "adapter.safetensors")
    exported = load_file(outcome.export)
    assert all(torch.equal(tensor, kept[name].half()) for name, tensor in exported.items() if "up" in name)
    assert read_header(outcome.export).metadata["ss_steps"] == "3"
