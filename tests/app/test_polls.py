"""What a page shows of a run from its start over a pause, a kill, a stop and its end: in hundreds of looks no
state flickers and no bar falls back."""

import itertools
import sys
import time
from collections.abc import Iterator

from app.state import AppState, Snapshot, take_snapshot
from app.train.run_cards import stages
from lora_core.settings.config import RunConfig
from tests.waiting import PATIENCE

STEPS = 1000
TRAINER = f"""
import sys, time
from pathlib import Path
from lora_core.runs import events
from lora_core.runs.folder import RunFolder

run = RunFolder(Path(sys.argv[1]))
with run.hold():
    before = run.progress()
    run.request("resume")
    writer = events.EventWriter(run.events_file)
    writer.write(events.Started(steps={STEPS}, pid=1, device="cpu", threads=1, versions={{}}))
    looked = run.path / "prepares"
    looked.unlink(missing_ok=True)
    # Memory ran out once, so that it began anew.
    for phase in 2 * ("Opening the base model", "Encoding images") + ("Encoding captions",):
        for done in range(6):
            writer.write(events.Preparing(phase=phase, done=done, total=5))
            time.sleep(0.01)
    # It trains once somebody has seen that it prepares.
    while not looked.exists():
        time.sleep(0.01)
    step = before.step
    if before.started:
        writer.write(events.Resumed(step=step, steps={STEPS}))
    went_back = False
    while True:
        if not went_back and step > before.step + 20:
            # It diverged, and goes on from an earlier step.
            went_back, step = True, before.step
            writer.write(events.Resumed(step=step, steps={STEPS}))
        step += 1
        writer.write(events.StepDone(step=step, loss=0.1, lr=1e-4, seconds=0.01))
        if step % 20 == 0:
            for done in range(11):
                writer.write(events.Working(step=step, phase="Validating", done=done, total=10))
                time.sleep(0.005)
        time.sleep(0.01)
        if (run.path / "ends").exists():
            writer.write(events.Finished(step=step, export=""))
            break
        for request in run.requests():
            if request["id"] in before.handled:
                continue
            writer.write(events.Handled(step=step, request=request["id"]))
            # It saves and exports until somebody has seen that, then says that it has ended and lives on.
            seen = run.path / "seen"
            seen.unlink(missing_ok=True)
            while not seen.exists():
                time.sleep(0.01)
            pausing = request["action"] == "pause"
            writer.write(events.Paused(step=step) if pausing else events.Stopped(step=step, export=""))
            time.sleep(0.2)
            sys.exit()
# It has left its folder, and takes a moment to end.
time.sleep(0.2)
"""


def looks(app_state: AppState) -> Iterator[Snapshot]:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        yield take_snapshot(app_state)
        time.sleep(0.005)
    raise AssertionError("it never came")


def test_no_state_flickers_and_no_bar_falls_back(app_state: AppState) -> None:
    app_state.jobs.trainer = (sys.executable, "-c", TRAINER)
    seen: list[tuple[str, list[int]]] = []

    def watch(until: str, step: int = 0, least: int = 0) -> None:
        for snapshot in looks(app_state):
            bars = [stage["percent"] for stage in stages(snapshot.shown)]
            seen.append((snapshot.shown.state, [*bars, snapshot.shown.percent]))
            if snapshot.shown.state in ("pausing", "stopping"):
                (run.path / "seen").touch()
            if snapshot.shown.state == "preparing":
                (run.path / "prepares").touch()
            if snapshot.shown.state == until and snapshot.shown.progress.step >= step and len(seen) >= least:
                return

    run = app_state.jobs.start(RunConfig().changed({"name": "watched"}))
    watch("running", 50)
    app_state.jobs.request("pause")
    watch("paused")
    paused_at = take_snapshot(app_state).shown.progress.step
    app_state.jobs.resume("watched")
    watch("running", paused_at + 40)
    child = app_state.jobs.run_view(app_state.jobs.all()[0].run).child
    assert child is not None
    child.kill()
    watch("interrupted")
    app_state.jobs.resume("watched")
    watch("running", take_snapshot(app_state).shown.progress.step + 40, least=501)
    app_state.jobs.request("stop")
    watch("stopped")
    app_state.jobs.resume("watched")
    watch("running", take_snapshot(app_state).shown.progress.step + 40)
    (run.path / "ends").touch()
    watch("done")

    states = [state for state, _ in itertools.groupby(state for state, _ in seen)]
    assert states == [
        "preparing", "running", "pausing", "paused",
        "preparing", "running", "interrupted",
        "preparing", "running", "stopping", "stopped",
        "preparing", "running", "done",
    ]  # fmt: skip
    assert len(seen) > 500
    for (before, old), (after, new) in itertools.pairwise(seen):
        if after != "preparing" or before == after:
            assert all(one <= other for one, other in zip(old, new, strict=True)), (before, old, after, new)
