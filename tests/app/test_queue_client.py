"""The queue as the window steers it, with trainers that only say that they were there."""

import sys
from pathlib import Path

import pytest

from app.jobs import Jobs, QueueClient
from app.state import AppState, take_snapshot
from lora_core.errors import RunError
from lora_core.runs import events, queue
from lora_core.runs.queue import Queue, QueuedRun
from lora_core.settings.config import RunConfig
from tests.app.runs import come_alive, make_run, started, step


@pytest.fixture
def line(app_state: AppState, monkeypatch: pytest.MonkeyPatch) -> QueueClient:
    """A queue that nobody works through."""
    monkeypatch.setattr("app.jobs.ensure_runner", lambda workspace: False)
    return app_state.queue


def ended(line: QueueClient) -> list[str]:
    return [job.state for job in line.queue.jobs() if job.has_ended]


def names(line: QueueClient) -> list[str]:
    return [job.run for job in line.jobs()]


def test_order_and_removal(app_state: AppState, line: QueueClient) -> None:
    for name in ("a", "b", "c"):
        line.add(RunConfig().changed({"name": name}))
    line.act("up", "c")
    assert names(line) == ["a", "c", "b"]
    line.act("down", "a")
    assert names(line) == ["c", "a", "b"]
    with pytest.raises(RunError):
        line.act("up", "c")
    line.act("move", "b", 1)
    assert names(line) == ["b", "c", "a"]
    line.act("move", "b", 3)
    for place in (0, 4):
        with pytest.raises(RunError, match="it goes from 1 to 3"):
            line.act("move", "b", place)
    assert names(line) == ["c", "a", "b"]
    with pytest.raises(RunError, match="no such action"):
        line.act("burn", "c")
    line.act("remove", "a")
    assert names(line) == ["c", "b"]
    # A run that never began goes with its place in the queue, into the trash.
    assert not (app_state.workspace / "runs" / "a").exists()
    assert list((app_state.workspace / ".trash").glob("*/content/config.toml"))
    # Another window, or this one after a restart, reads the same.
    assert names(QueueClient(app_state.workspace, Jobs(app_state.workspace))) == ["c", "b"]


def test_a_run_that_began_stays_when_it_is_taken_out(app_state: AppState, line: QueueClient) -> None:
    run = make_run(app_state, "a", started(), step(3))
    line.queue.add(run)
    line.act("remove", "a")
    assert run.events_file.exists()
    assert names(line) == []


@pytest.mark.parametrize("name", ["../x", "", "a/b"])
def test_names_that_are_no_folder_s_are_refused(line: QueueClient, name: str) -> None:
    with pytest.raises(RunError):
        line.act("remove", name)


def test_behind_a_live_run_the_queue_is_set_enabled(
    app_state: AppState, line: QueueClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    going: list[Path] = []
    monkeypatch.setattr("app.jobs.ensure_runner", going.append)
    line.add(RunConfig().changed({"name": "alone"}))
    assert going == []
    come_alive(make_run(app_state, "live", started(), step(1)))
    line.add(RunConfig().changed({"name": "behind"}))
    assert going == [app_state.workspace]


def test_the_next_one_starts_after_a_failure_and_the_window_follows(
    app_state: AppState, line: QueueClient
) -> None:
    for name in ("bad", "good"):
        line.add(RunConfig().changed({"name": name}))
    code = (
        "import sys, pathlib; run = pathlib.Path(sys.argv[1]); from lora_core.runs import events;"
        "from lora_core.runs.events import EventWriter; w = EventWriter(run / 'events.jsonl');"
        "w.write(events.Started(steps=3, pid=1, device='cpu', threads=1, versions={}));"
        "w.write(events.Failed(reason='No image can be read.') if run.name == 'bad' else"
        " events.Finished(step=3, export=''));"
        "sys.exit(run.name == 'bad')"
    )
    queue.run_queue(app_state.workspace, lambda text: None, (sys.executable, "-c", code))
    assert [(job.run, job.state) for job in line.queue.jobs()] == [("bad", "failed"), ("good", "done")]
    assert Queue(app_state.workspace).is_enabled() is False
    snapshot = take_snapshot(app_state)
    assert snapshot.shown.view is not None
    # The one that did something last is shown, although the other has been made later or earlier.
    assert (snapshot.shown.view.run.name, snapshot.shown.state) == ("good", "done")
    from app.train.run_cards import earlier

    assert "No image can be read." in earlier(snapshot)


def test_a_job_that_failed_and_was_gone_on_with_is_listed_once(
    app_state: AppState, line: QueueClient
) -> None:
    run = make_run(app_state, "a", started(), events.Failed(reason="No."))
    line.queue.add(run)
    line.queue.update(QueuedRun("a", "failed", "No."))
    assert ended(line) == ["failed"]
    come_alive(run)
    assert ([job.state for job in line.jobs()], ended(line)) == (["running"], [])
    run.process_file.unlink()
    with open(run.events_file, "a", encoding="utf-8") as file:
        file.write(events.to_line(started()) + events.to_line(events.Finished(step=100, export="")))
    assert (line.jobs(), ended(line)) == ([], ["done"])
