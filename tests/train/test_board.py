import importlib.util

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lora_core.runs import events
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
