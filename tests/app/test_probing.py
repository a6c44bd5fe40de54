"""When a step is measured before a first run, when it is not, and who goes first; against a small program in
place of the worker."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.snapshot import moment_of
from app.state import Desk
from app.train import probing
from app.train.facts import facts, time_of
from app.train.routes import steer
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
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.setattr(probing, "STILL_FOR", 0.05)
    monkeypatch.setattr(probing, "LOOK_EVERY", 0.02)
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    workspace = tmp_path / "work space é"
    workspace.mkdir()
    made = Desk(workspace, worker_command=[sys.executable, str(script), str(tmp_path)])
    made.hardware.known = True
    yield made
    made.close()


def asked(tmp_path: Path) -> list[dict[str, Any]]:
    file = tmp_path / "asked"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def state(desk: Desk) -> str:
    return facts(moment_of(desk)).split('data-measuring="')[1].split('"')[0]


def awake(desk: Desk) -> None:
    desk.worker.warm()
    wait_for(lambda: desk.worker.ready and not desk.worker.in_hand)


def test_a_still_form_is_measured_and_says_so(desk: Desk, pictures: list[Path], tmp_path: Path) -> None:
    assert state(desk) == "offered"  # the worker does not run yet
    awake(desk)
    assert state(desk) == "soon"
    wait_for(lambda: state(desk) == "known")
    plan = moment_of(desk).plan
    assert [line["config"] for line in asked(tmp_path)] == [plan.config.to_dict()]
    kept = json.loads(costs_file(desk.workspace).read_text())["measured"]
    assert [(row["step"], row["base"]) for row in kept.values()] == [(2.0, plan.config.model.base)]
    found = time_of(moment_of(desk), plan.config)
    assert found is not None
    # 2 s a step, and of 3 pictures 2 are drawn at each round with 20 steps of 0.5 s.
    rounds = plan.config.train.steps / plan.config.preview.every + 1
    drawn = rounds * 2 * plan.config.preview.steps * 0.5 / plan.config.train.steps
    assert found.source == PROBED
    # Validation takes 5% of the time at the most.
    assert 2 + drawn <= found.seconds <= 2 * 1.05 + drawn + 1e-6
    shown = facts(moment_of(desk))
    assert "<small>measured</small>" in shown
    assert '<b class="num">3.0 GB</b>' in shown
    # It is not asked for again.
    time.sleep(0.3)
    assert len(asked(tmp_path)) == 1


def test_another_rank_is_measured_anew_and_reckoned_meanwhile(desk: Desk, pictures: list[Path]) -> None:
    config = moment_of(desk).plan.config
    awake(desk)
    assert state(desk) == "soon"
    wait_for(lambda: state(desk) == "known")
    more = config.changed({"train.batch_size": 3 * config.train.batch_size})
    found = time_of(moment_of(desk), more)
    assert found is not None
    assert found.source == SCALED
    assert found.seconds > 3 * 2.0


def test_nothing_is_measured_without_pictures(desk: Desk, tmp_path: Path) -> None:
    awake(desk)
    assert state(desk) == "offered"
    time.sleep(0.3)
    assert asked(tmp_path) == []


def test_a_large_base_on_a_processor_only_on_a_click(
    desk: Desk, pictures: list[Path], tmp_path: Path
) -> None:
    base = checkpoint(tmp_path / "large.safetensors", "sd15", 2_130_000_000)
    desk.project.keep(values={"model.base": str(base)})
    awake(desk)
    assert state(desk) == "offered"
    assert "takes some minutes" in facts(moment_of(desk))
    time.sleep(0.3)
    assert asked(tmp_path) == []
    steer(desk, "measure", "")
    wait_for(lambda: state(desk) == "known")


def test_a_form_that_changes_drops_what_is_measured(desk: Desk, pictures: list[Path], tmp_path: Path) -> None:
    awake(desk)
    (tmp_path / "slow").touch()
    assert state(desk) == "soon"
    wait_for(lambda: state(desk) == "working")
    wait_for(lambda: "1 of 4" in facts(moment_of(desk)))
    desk.project.keep(values={"train.batch_size": 5})
    facts(moment_of(desk))
    wait_for(lambda: state(desk) and len(asked(tmp_path)) > 1)
    (tmp_path / "slow").unlink()
    wait_for(lambda: state(desk) == "known")
    assert asked(tmp_path)[-1]["config"]["train"]["batch_size"] == 5
    assert len(desk.prober.costs()) == 1


def test_a_run_and_a_picture_go_first(desk: Desk, pictures: list[Path], tmp_path: Path) -> None:
    awake(desk)
    (tmp_path / "slow").touch()
    config = moment_of(desk).plan.config
    desk.prober.begin(config)
    wait_for(lambda: desk.worker.in_hand is not None)
    assert desk.worker.ask({"do": "generate"}, PATIENCE).state == "done"
    wait_for(lambda: not desk.prober.active)

    desk.worker.holds_memory = False
    desk.prober.begin(config)
    wait_for(lambda: desk.worker.in_hand is not None)
    run = make_run(desk, "live", started(), step(1), train__batch_size=9)
    come_alive(run)
    wait_for(lambda: not desk.prober.active)
    assert desk.prober.costs() == {}
    with pytest.raises(RunError, match="live is going on"):
        desk.prober.begin(config)
    assert state(desk) == "offered"


def test_what_fails_is_said_and_not_tried_again_by_itself(
    desk: Desk, pictures: list[Path], tmp_path: Path
) -> None:
    awake(desk)
    (tmp_path / "full").touch()
    assert state(desk) == "soon"
    wait_for(lambda: "It did not fit." in facts(moment_of(desk)))
    assert state(desk) == "offered"
    time.sleep(0.3)
    assert len(asked(tmp_path)) == 1
    (tmp_path / "full").unlink()
    steer(desk, "measure", "")
    wait_for(lambda: state(desk) == "known")


def test_stopped_by_hand_it_stays_stopped(desk: Desk, pictures: list[Path], tmp_path: Path) -> None:
    awake(desk)
    (tmp_path / "slow").touch()
    assert state(desk) == "soon"
    wait_for(lambda: state(desk) == "working" and asked(tmp_path))
    steer(desk, "unmeasure", "")
    wait_for(lambda: state(desk) == "offered")
    time.sleep(0.3)
    assert len(asked(tmp_path)) == 1


def test_what_another_device_took_is_no_answer(desk: Desk, pictures: list[Path]) -> None:
    config = moment_of(desk).plan.config
    keep_cost(desk.workspace, config, StepCost(1.0, 0.1, 0, "demo", "Some Card"))
    assert desk.prober.known(config) is None
    keep_cost(desk.workspace, config, StepCost(1.0, 0.1, 0, "demo", desk.hardware.device))
    found = desk.prober.known(config)
    assert found is not None
    assert found.step == 1.0
