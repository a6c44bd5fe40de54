"""The queue as the window steers it, with trainers that only say that they were there."""

import sys
from pathlib import Path

import pytest

from app.jobs import Jobs
from app.state import AppState, take_snapshot
from lora_core.runs import events, queue
from lora_core.runs.queue import Queue, QueuedRun
from lora_core.settings.config import RunConfig
from tests.app.conftest import Say
from tests.app.runs import come_alive, make_run, started, step


@pytest.fixture
def jobs(app_state: AppState, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    """With a queue that nobody works through."""
    monkeypatch.setattr("app.jobs.ensure_runner", lambda workspace: False)
    return app_state.jobs


def states(jobs: Jobs) -> list[str]:
    return [job.state for job in jobs.queue.jobs()]


def names(jobs: Jobs) -> list[str]:
    return [job.run for job in jobs.queue.jobs()]


def test_order_and_removal(app_state: AppState, jobs: Jobs, say: Say) -> None:
    for name in ("a", "b", "c"):
        jobs.add_to_queue(RunConfig().changed({"name": name}))
    say("queue", do="up", run="c")
    assert names(jobs) == ["a", "c", "b"]
    say("queue", do="down", run="a")
    assert names(jobs) == ["c", "a", "b"]
    assert "it goes from 1 to 3" in say("queue", do="up", run="c")["problem"]
    say("queue", do="move", run="b", place=1)
    assert names(jobs) == ["b", "c", "a"]
    say("queue", do="move", run="b", place=3)
    for place in (0, 4, "1"):
        assert "it goes from 1 to 3" in say("queue", do="move", run="b", place=place)["problem"]
    assert names(jobs) == ["c", "a", "b"]
    assert "no such action" in say("queue", do="burn", run="c")["problem"]
    say("queue", do="remove", run="a")
    assert names(jobs) == ["c", "b"]
    # A run that never began goes with its place in the queue, into the trash.
    assert not (app_state.workspace / "runs" / "a").exists()
    assert list((app_state.workspace / ".trash").glob("*/content/config.toml"))
    # Another window, or this one after a restart, reads the same.
    assert names(Jobs(app_state.workspace)) == ["c", "b"]


def test_a_run_that_began_stays_when_it_is_taken_out(app_state: AppState, jobs: Jobs, say: Say) -> None:
    run = make_run(app_state, "a", started(), step(3))
    jobs.queue.add(run)
    say("queue", do="remove", run="a")
    assert run.events_file.exists()
    assert names(jobs) == []


@pytest.mark.parametrize("name", ["../x", "", "a/b"])
def test_names_that_are_no_folder_s_are_refused(jobs: Jobs, say: Say, name: str) -> None:
    assert "problem" in say("queue", do="remove", run=name)


def test_behind_a_live_run_the_queue_is_set_enabled(
    app_state: AppState, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    going: list[Path] = []
    monkeypatch.setattr("app.jobs.ensure_runner", going.append)
    jobs.add_to_queue(RunConfig().changed({"name": "alone"}))
    assert going == []
    come_alive(make_run(app_state, "live", started(), step(1)))
    jobs.add_to_queue(RunConfig().changed({"name": "behind"}))
    assert going == [app_state.workspace]


def test_the_next_one_starts_after_a_failure_and_the_window_follows(app_state: AppState, jobs: Jobs) -> None:
    for name in ("bad", "good"):
        jobs.add_to_queue(RunConfig().changed({"name": name}))
    code = (
        "import sys, pathlib; run = pathlib.Path(sys.argv[1]); from lora_core.runs import events;"
        "from lora_core.runs.events import EventWriter; w = EventWriter(run / 'events.jsonl');"
        "w.write(events.Started(steps=3, pid=1, device='cpu', threads=1, versions={}));"
        "w.write(events.Failed(reason='No image can be read.') if run.name == 'bad' else"
        " events.Finished(step=3, export=''));"
        "sys.exit(run.name == 'bad')"
    )
    queue.run_queue(app_state.workspace, lambda text: None, (sys.executable, "-c", code))
    assert [(job.run, job.state) for job in jobs.queue.jobs()] == [("bad", "failed"), ("good", "done")]
    assert Queue(app_state.workspace).is_enabled() is False
    snapshot = take_snapshot(app_state)
    assert snapshot.shown.view is not None
    # The one that did something last is shown, although the other has been made later or earlier.
    assert (snapshot.shown.view.run.name, snapshot.shown.state) == ("good", "done")
    from app.train.run_cards import earlier

    assert "No image can be read." in earlier(snapshot)


def test_a_job_that_failed_and_was_gone_on_with_is_listed_once(app_state: AppState, jobs: Jobs) -> None:
    run = make_run(app_state, "a", started(), events.Failed(reason="No."))
    jobs.queue.add(run)
    jobs.queue.update(QueuedRun("a", "failed", "No."))
    assert states(jobs) == ["failed"]
    come_alive(run)
    assert states(jobs) == ["running"]
    run.process_file.unlink()
    with open(run.events_file, "a", encoding="utf-8") as file:
        file.write(events.to_line(started()) + events.to_line(events.Finished(step=100, export="")))
    assert states(jobs) == ["done"]
