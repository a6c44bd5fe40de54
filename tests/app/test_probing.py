"""When a step is measured before a first run, when it is not, and who goes first; against a small program in
place of the worker."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app import worker_client
from app.state import AppState, take_snapshot
from app.train import background
from app.train.start import facts, forecast
from app.train.view import do_run_action
from lora_core.errors import RunError
from lora_core.runs.costs import PROBED, SCALED, StepCost, costs_file, keep_cost
from tests.app.bases import checkpoint
from tests.app.runs import come_alive, make_run, started, step
from tests.waiting import PATIENCE, wait_for

FAKE = """
import json, pathlib, queue, sys, threading
print(json.dumps({"event": "ready"}), flush=True)
dropped, asks, here = set(), queue.Queue(), pathlib.Path(sys.argv[1])
def read():
    for line in sys.stdin:
        asked = json.loads(line)
        dropped.add(asked["target"]) if asked["do"] == "cancel" else asks.put(asked)
threading.Thread(target=read, daemon=True).start()
while True:
    asked = asks.get()
    say = lambda **more: print(json.dumps({"id": asked["id"], **more}), flush=True)
    with open(here / "asked", "a") as file:
        file.write(json.dumps(asked) + "\\n")
    say(event="progress", done=1, total=4)
    while asked["do"] == "probe" and (here / "slow").exists() and asked["id"] not in dropped:
        threading.Event().wait(0.01)
    if asked["id"] in dropped:
        say(event="error", message="Cancelled.")
    elif (here / "full").exists():
        say(event="error", message="It did not fit.")
    else:
        say(event="done", step=2.0, draw=0.5, peak=3_000_000_000, files=[])
"""


@pytest.fixture
def app_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AppState]:
    monkeypatch.setattr(background, "STILL_FOR", 0.05)
    monkeypatch.setattr(worker_client, "LOOK_EVERY", 0.02)
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    workspace = tmp_path / "work space é"
    workspace.mkdir()
    made = AppState(workspace, worker_command=[sys.executable, str(script), str(tmp_path)])
    made.hardware.known = True
    yield made
    made.close()


def asked(tmp_path: Path) -> list[dict[str, Any]]:
    """What the worker was asked; a line that it is still writing does not count."""
    file = tmp_path / "asked"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def state(app_state: AppState) -> str:
    return facts(take_snapshot(app_state)).split('data-measuring="')[1].split('"')[0]


def awake(app_state: AppState) -> None:
    app_state.worker.warm()
    wait_for(lambda: app_state.worker.ready and not app_state.worker.in_hand)


def test_a_still_form_is_measured_and_says_so(
    app_state: AppState, pictures: list[Path], tmp_path: Path
) -> None:
    assert state(app_state) == "offered"  # the worker does not run yet
    awake(app_state)
    assert state(app_state) == "soon"
    wait_for(lambda: state(app_state) == "known")
    plan = take_snapshot(app_state).plan
    assert [line["config"] for line in asked(tmp_path)] == [plan.config.to_dict()]
    kept = json.loads(costs_file(app_state.workspace).read_text())["measured"]
    assert [(row["step"], row["base"]) for row in kept.values()] == [(2.0, plan.config.model.base)]
    found = forecast(take_snapshot(app_state), plan.config)
    assert found.seconds_a_step is not None
    # 2 s a step, and of 3 pictures 2 are drawn at each round with 20 steps of 0.5 s.
    rounds = plan.config.train.steps / plan.config.sample.every + 1
    drawn = rounds * 2 * plan.config.sample.steps * 0.5 / plan.config.train.steps
    assert found.source == PROBED
    # Validation takes 5% of the time at the most.
    assert 2 + drawn <= found.seconds_a_step <= 2 * 1.05 + drawn + 1e-6
    shown = facts(take_snapshot(app_state))
    assert "<small>from trial steps</small>" in shown
    assert '<b class="num">3.0 GB</b>' in shown
    # It is not asked for again.
    time.sleep(0.3)
    assert len(asked(tmp_path)) == 1


def test_another_rank_is_measured_anew_and_reckoned_meanwhile(
    app_state: AppState, pictures: list[Path]
) -> None:
    config = take_snapshot(app_state).plan.config
    awake(app_state)
    assert state(app_state) == "soon"
    wait_for(lambda: state(app_state) == "known")
    more = config.changed({"train.batch_size": 3 * config.train.batch_size})
    found = forecast(take_snapshot(app_state), more)
    assert found.seconds_a_step is not None
    assert found.source == SCALED
    assert found.seconds_a_step > 3 * 2.0


def test_nothing_is_measured_without_pictures(app_state: AppState, tmp_path: Path) -> None:
    awake(app_state)
    assert state(app_state) == "offered"
    time.sleep(0.3)
    assert asked(tmp_path) == []


def test_a_large_base_on_a_processor_only_on_a_click(
    app_state: AppState, pictures: list[Path], tmp_path: Path
) -> None:
    base = checkpoint(tmp_path / "large.safetensors", "sd15", 2_130_000_000)
    app_state.project.update_draft(values={"model.base": str(base)})
    awake(app_state)
    assert state(app_state) == "offered"
    assert "takes some minutes" in facts(take_snapshot(app_state))
    time.sleep(0.3)
    assert asked(tmp_path) == []
    do_run_action(app_state, "measure", "")
    wait_for(lambda: state(app_state) == "known")


def test_a_form_that_changes_drops_what_is_measured(
    app_state: AppState, pictures: list[Path], tmp_path: Path
) -> None:
    awake(app_state)
    (tmp_path / "slow").touch()
    assert state(app_state) == "soon"
    wait_for(lambda: state(app_state) == "working")
    wait_for(lambda: "1 of 4" in facts(take_snapshot(app_state)))
    app_state.project.update_draft(values={"train.batch_size": 5})
    facts(take_snapshot(app_state))
    wait_for(lambda: state(app_state) and len(asked(tmp_path)) > 1)
    (tmp_path / "slow").unlink()
    wait_for(lambda: state(app_state) == "known")
    assert asked(tmp_path)[-1]["config"]["train"]["batch_size"] == 5
    assert len(app_state.prober.costs()) == 1


def test_a_run_and_a_picture_go_first(app_state: AppState, pictures: list[Path], tmp_path: Path) -> None:
    awake(app_state)
    (tmp_path / "slow").touch()
    config = take_snapshot(app_state).plan.config
    app_state.prober.begin(config)
    wait_for(lambda: app_state.worker.in_hand is not None)
    assert app_state.worker.ask({"do": "generate"}, PATIENCE).state == "done"
    wait_for(lambda: not app_state.prober.active)

    app_state.worker.holds_memory = False
    app_state.prober.begin(config)
    wait_for(lambda: app_state.worker.in_hand is not None)
    run = make_run(app_state, "live", started(), step(1), train__batch_size=9)
    come_alive(run)
    wait_for(lambda: not app_state.prober.active)
    assert app_state.prober.costs() == {}
    with pytest.raises(RunError, match="live is still running"):
        app_state.prober.begin(config)
    assert state(app_state) == "offered"


def test_what_fails_is_said_and_not_tried_again_by_itself(
    app_state: AppState, pictures: list[Path], tmp_path: Path
) -> None:
    awake(app_state)
    (tmp_path / "full").touch()
    assert state(app_state) == "soon"
    wait_for(lambda: "It did not fit." in facts(take_snapshot(app_state)))
    assert state(app_state) == "offered"
    time.sleep(0.3)
    assert len(asked(tmp_path)) == 1
    (tmp_path / "full").unlink()
    do_run_action(app_state, "measure", "")
    wait_for(lambda: state(app_state) == "known")


def test_stopped_by_hand_it_stays_stopped(app_state: AppState, pictures: list[Path], tmp_path: Path) -> None:
    awake(app_state)
    (tmp_path / "slow").touch()
    assert state(app_state) == "soon"
    wait_for(lambda: state(app_state) == "working" and asked(tmp_path))
    do_run_action(app_state, "unmeasure", "")
    wait_for(lambda: state(app_state) == "offered")
    time.sleep(0.3)
    assert len(asked(tmp_path)) == 1


def test_what_another_device_took_is_no_answer(app_state: AppState, pictures: list[Path]) -> None:
    config = take_snapshot(app_state).plan.config
    keep_cost(app_state.workspace, config, StepCost(1.0, 0.1, 0, "demo", "Some Card"))
    assert app_state.prober.known(config) is None
    keep_cost(app_state.workspace, config, StepCost(1.0, 0.1, 0, "demo", app_state.hardware.device))
    found = app_state.prober.known(config)
    assert found is not None
    assert found.step == 1.0
