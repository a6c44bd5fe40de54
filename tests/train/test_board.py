"""What a run shows beside its own folder: TensorBoard, Weights & Biases."""

import importlib
import importlib.util
import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lora_core.runs import events
from lora_core.system.processes import StopRequest
from lora_core.train.callbacks import RunContext, TensorBoardWriter, WandbWriter
from tests.train.runs import Toy, broken_at, trained, trouble

SHOWN = {"save__tensorboard": True, "validation__pictures": 1, "validation__every": 6, "sample__every": 6}


def test_tensorboard_reads_what_the_events_say(own_toy: Toy) -> None:
    run = own_toy.run("board", **SHOWN)
    broken_at(run, events.StepDone, 7)
    trained(run)
    seen = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    seen.Reload()
    progress = run.progress()
    losses = [(row.step, row.value) for row in seen.Scalars("train/loss")]
    assert losses == [(e.step, pytest.approx(e.loss)) for e in progress.losses]
    gains = [(row.step, row.value) for row in seen.Scalars("validation/gain")]
    assert gains == [(e.step, pytest.approx(e.gain)) for e in progress.validations]
    assert [row.step for row in seen.Images("samples/0")] == [0, 6, 12]


def test_without_the_package_it_is_said_before_anything_is_done(
    own_toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "tensorboard" else found(name, *more)
    )
    run = own_toy.run("none", **SHOWN)
    assert "pip install" in trouble(run)
    assert run.status() == "failed"


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stand-in for the package, which the tests do not install: what it is asked, in order."""
    asked: list[Any] = []

    class Error(Exception):
        pass

    def init(**how: Any) -> SimpleNamespace:
        if how["mode"] == "online":
            raise Error("api_key not configured (no-tty)")
        asked.append(how)
        return SimpleNamespace(
            log=asked.append, define_metric=lambda *_, **__: None, finish=lambda: asked.append("end")
        )

    made = SimpleNamespace(init=init, Error=Error, Settings=dict, Image=str, __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "wandb", made)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    # Set first, so that what a run sets is taken back.
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "")
    monkeypatch.delenv("WANDB_ERROR_REPORTING")
    return asked


SENT = {**SHOWN, "save__tensorboard": False, "save__wandb": True}


def test_weights_and_biases_gets_what_the_events_say(own_toy: Toy, wandb: list[Any]) -> None:
    run = own_toy.run("sent", **SENT)
    trained(run)
    began, *rows, end = wandb
    assert (began["mode"], began["dir"], began["name"], end) == ("offline", str(run.path), "sent", "end")
    assert began["config"]["adapter.rank"] == 2
    assert str(own_toy.home.parent) not in str(began["config"])
    progress = run.progress()
    losses = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert losses == [(e.step, e.loss) for e in progress.losses]
    gains = [row["validation/gain"] for row in rows if "validation/gain" in row]
    assert gains == [e.gain for e in progress.validations]
    assert [row["step"] for row in rows if "samples" in row] == [0, 6, 12]


def test_weights_and_biases_that_refuses_is_a_sentence(
    own_toy: Toy, wandb: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    run = own_toy.run("online", **SENT)
    assert "did not start: api_key not configured (no-tty). Set WANDB_MODE to offline" in trouble(run)
    assert run.status() == "failed"


@pytest.mark.parametrize(("own", "seen"), [("", "false"), ("true", "true")])
def test_weights_and_biases_sends_no_reports_of_itself_unasked(
    own_toy: Toy, wandb: list[Any], monkeypatch: pytest.MonkeyPatch, own: str, seen: str
) -> None:
    if own:
        monkeypatch.setenv("WANDB_ERROR_REPORTING", own)
    found, at_import = importlib.import_module, []

    def note(name: str, package: str | None = None) -> Any:
        at_import.extend([os.environ.get("WANDB_ERROR_REPORTING")] * (name == "wandb"))
        return found(name, package)

    monkeypatch.setattr(importlib, "import_module", note)
    WandbWriter(own_toy.run("quiet", **SENT), 0)
    assert at_import == [seen]


def test_a_board_that_fails_does_not_end_the_run(own_toy: Toy, wandb: list[Any]) -> None:
    def log(row: dict[str, Any]) -> None:
        wandb.append(row)
        if len(wandb) >= 4:
            raise Exception("the service is gone.")

    found = sys.modules["wandb"].init
    sys.modules["wandb"].init = lambda **how: SimpleNamespace(**{**vars(found(**how)), "log": log})
    run = own_toy.run("gone", **{**SENT, "save__tensorboard": True})
    assert trained(run).status == "done"
    said = [text for text in run.progress().warnings if "Weights & Biases" in text]
    assert said == ["Weights & Biases ended: the service is gone. The run continues without it."]
    assert wandb[4:] == ["end"]
    seen = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0})
    seen.Reload()
    assert len(seen.Scalars("train/loss")) == 12


def test_a_board_that_cannot_be_closed_keeps_no_other_open(
    own_toy: Toy, wandb: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def close(board: TensorBoardWriter) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorBoardWriter, "close", close)
    run = own_toy.run("full", **{**SENT, "save__tensorboard": True})
    context = RunContext(run, 12, run.progress(), lambda event: None, StopRequest(), None)
    context.open_boards(run.config())
    context.close()
    assert wandb[-1] == "end"
    (said,) = run.progress().warnings
    assert "TensorBoard ended: [Errno 28] No space left on device. The end of the run may be" in said


def test_the_package_itself_writes_into_the_run_and_sends_nothing(own_toy: Toy) -> None:
    """With the extra `wandb` installed."""
    pytest.importorskip("wandb")
    run = own_toy.run("real", **SENT)
    broken_at(run, events.StepDone, 7)
    trained(run)
    written = list((run.path / "wandb").glob("offline-run-*/*.wandb"))
    # Of two processes, which are one run there.
    assert (len(written), len({file.name for file in written})) == (2, 1)
    for file in written:
        assert b"train/loss" in file.read_bytes()
        assert str(own_toy.home.parent).encode() not in file.read_bytes()
