"""The queue on disk and its runner, with real processes: a stand-in for the trainer that does what its run is
called after."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from lora_core.errors import RunError
from lora_core.runs import events
from lora_core.runs.events import EventWriter, read_events
from lora_core.runs.folder import RunFolder, runs_folder
from lora_core.runs.queue import (
    ENDED_KEPT,
    Queue,
    QueuedRun,
    ensure_runner,
    run_queue,
)
from lora_core.settings.config import RunConfig
from tests.waiting import PATIENCE, wait_for
from tests.warm import program

ROOT = Path(__file__).resolve().parents[2]


def resume_queue(home: Path) -> bool:
    """As the window does when it opens."""
    return Queue(home).is_enabled() and ensure_runner(home)


TRAINER = """
import os, signal, sys, time
from pathlib import Path
from lora_core.runs import events
from lora_core.runs.events import EventWriter
from lora_core.runs.folder import RunFolder

run = RunFolder(Path(sys.argv[1]))
kind = run.name.split("-")[0]
before = run.progress()
with run.hold():
    run.request("resume")
    if kind == "refuses":
        sys.exit("The settings of this run are no good.")
    writer = EventWriter(run.events_file)
    writer.write(events.Started(steps=2, pid=os.getpid(), device="cpu", threads=1, versions={}))
    if before.started:
        writer.write(events.Resumed(step=before.step, steps=2))
    if kind == "fails":
        writer.write(events.Failed(step=0, reason="The image cat.png is cut short."))
        sys.exit(1)
    writer.write(events.StepDone(step=1, loss=1.0, lr=1.0, seconds=0.01))
    if kind == "dies" and not (before.started and "always" not in run.name):
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "full":
        writer.write(events.Paused(step=1))
        sys.exit("The disk is full; make room and resume.")
    asked = set()
    while kind == "waits" and not asked and not (run.path / "go").exists():
        time.sleep(0.02)
        asked = {r["action"] for r in run.requests()} & {"stop", "pause"}
    if "pause" in asked:
        writer.write(events.Paused(step=1))
    elif "stop" in asked:
        writer.write(events.Stopped(step=1, export="export/a.safetensors"))
    else:
        writer.write(events.StepDone(step=2, loss=1.0, lr=1.0, seconds=0.01))
        writer.write(events.Finished(step=2, export="export/a.safetensors"))
"""
# The runner as a process of its own, with the stand-in for its trainer.
RUNNER = """
import sys
from pathlib import Path
from lora_core.runs.queue import run_queue
ended, interrupted = run_queue(Path(sys.argv[1]), print, tuple(sys.argv[2:]))
sys.exit(130 if interrupted else 0)
"""


@pytest.fixture
def trainer() -> tuple[str, ...]:
    return (program("engine"), "-c", TRAINER)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    place = tmp_path / "home ü"
    place.mkdir()
    return place


def queued(home: Path, *names: str) -> Queue:
    queue = Queue(home)
    for name in names:
        queue.add(RunFolder.create(runs_folder(home) / name, RunConfig()))
    return queue


def states(queue: Queue) -> dict[str, str]:
    return {job.run: job.state for job in queue.jobs()}


@contextlib.contextmanager
def runner(home: Path, trainer: tuple[str, ...]) -> Iterator[subprocess.Popen[str]]:
    command = [program("engine"), "-c", RUNNER, str(home), *trainer]
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def kill_runner(queue: Queue) -> None:
    process = queue.runner()
    assert process is not None
    process.kill()


def left_behind(home: Path) -> list[list[str]]:
    """Processes that have anything to do with a workspace."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if any(str(home) in word for word in words) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(words)
    return found


def test_order_is_kept_and_can_be_changed(home: Path) -> None:
    queue = queued(home, "a", "b", "c", "d")
    assert [job.run for job in queue.jobs()] == ["a", "b", "c", "d"]
    queue.move("d", 1)
    queue.move("a", 3)
    assert [job.run for job in Queue(home).jobs()] == ["d", "b", "a", "c"]
    queue.remove("b")
    assert [row["position"] for row in queue.rows()] == [1, 2, 3]
    assert RunFolder.open(runs_folder(home) / "b").status() == "queued"
    for position in (0, 4):
        with pytest.raises(RunError, match=f"position {position} .*from 1 to 3"):
            queue.move("a", position)
    for change in (lambda: queue.move("b", 1), lambda: queue.remove("b")):
        with pytest.raises(RunError, match="b is not in the queue"):
            change()


def test_what_cannot_wait(home: Path, tmp_path: Path) -> None:
    queue = queued(home, "a")
    with pytest.raises(RunError, match="a is in the queue already"):
        queue.add(queue.run("a"))
    with pytest.raises(RunError, match="not one of the workspace"):
        queue.add(RunFolder.create(tmp_path / "elsewhere" / "runs" / "a", RunConfig()))
    other = RunFolder.create(runs_folder(home) / "b", RunConfig())
    with other.hold(), pytest.raises(RunError, match="b is being trained already"):
        queue.add(other)
    writer = EventWriter(other.events_file)
    writer.write(events.Finished(step=2, export=""))
    writer.close()
    with pytest.raises(RunError, match="b is done"):
        queue.add(other)
    # Several are all taken or none.
    fine = RunFolder.create(runs_folder(home) / "c", RunConfig())
    with pytest.raises(RunError, match="a is in the queue already"):
        queue.add(fine, queue.run("a"))
    assert [job.run for job in queue.jobs()] == ["a"]


def test_a_broken_queue_is_named_and_kept(home: Path) -> None:
    queue = queued(home, "a")
    for text in (b"no database " * 400, b"SQLite format 3\0" + b"\xff" * 5000):
        queue.file.write_bytes(text)
        with pytest.raises(RunError, match=r"queue\.db cannot be read"):
            queue.jobs()
        with pytest.raises(RunError, match=r"queue\.db cannot be read"):
            queue.remove("a")
        assert queue.file.read_bytes() == text


def test_a_broken_queue_of_the_old_version_is_named_and_kept(home: Path) -> None:
    queue = queued(home, "a")
    old = home / "queue.json"
    for text in ("{", '{"jobs": 3}', '{"jobs": [3]}', '{"jobs": [{"state": "waiting"}]}', "[]"):
        old.write_text(text)
        with pytest.raises(RunError, match=r"queue\.json cannot be read"):
            queue.jobs()
        with pytest.raises(RunError, match=r"queue\.json cannot be read"):
            queue.remove("a")
        assert old.read_text() == text
    old.unlink()
    assert states(queue) == {"a": "waiting"}


def test_the_queue_of_the_old_version_is_taken_over_once(home: Path) -> None:
    for name in ("a", "b", "c"):
        RunFolder.create(runs_folder(home) / name, RunConfig())
    rows = [
        {"run": "a", "state": "failed", "reason": "No.", "restarts": 1, "seen": 7},
        {"run": "c", "state": "waiting", "reason": "", "restarts": 0, "seen": 0, "new": "ignored"},
        {"run": "b", "state": "waiting"},
    ]
    (home / "queue.json").write_text(json.dumps({"going": True, "jobs": rows}))
    queue = Queue(home)
    assert queue.is_enabled()
    assert queue.jobs() == [QueuedRun("a", "failed", "No.", 1, 7), QueuedRun("c"), QueuedRun("b")]
    queue.remove("c")
    assert [job.run for job in Queue(home).jobs()] == ["a", "b"]
    assert not (home / "queue.json").exists()


def test_a_queue_in_wal_mode_of_the_old_version_is_used(home: Path) -> None:
    queue = queued(home, "a", "b")
    with contextlib.closing(sqlite3.connect(queue.file)) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        db.execute("PRAGMA journal_mode = WAL")
        queue.move("b", 1)
        assert [job.run for job in queue.jobs()] == ["b", "a"]
    assert len(queue.jobs()) == 2
    with contextlib.closing(sqlite3.connect(queue.file)) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("delete",)


def test_a_killed_change_leaves_the_queue_as_it_was(home: Path) -> None:
    queue = queued(home, "a", "b")
    code = (
        "import os, sqlite3, sys; db = sqlite3.connect(sys.argv[1], isolation_level=None);"
        "db.execute('BEGIN IMMEDIATE'); db.execute('DELETE FROM jobs'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(queue.file)], check=False)
    queue.move("b", 1)
    assert [job.run for job in queue.jobs()] == ["b", "a"]


def test_no_change_is_lost_when_many_change_at_once(home: Path) -> None:
    names = [f"run-{number}" for number in range(16)]
    runs = [RunFolder.create(runs_folder(home) / name, RunConfig()) for name in names]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda run: Queue(home).add(run), runs))
    assert sorted(job.run for job in Queue(home).jobs()) == sorted(names)


def test_old_ends_are_dropped(home: Path) -> None:
    queue = Queue(home)
    for number in range(ENDED_KEPT + 5):
        queue.add(RunFolder.create(runs_folder(home) / f"old-{number}", RunConfig()))
        queue.update(QueuedRun(f"old-{number}", "done"))
    queued(home, "new")
    assert [job.run for job in queue.jobs()] == [
        *(f"old-{n}" for n in range(5, ENDED_KEPT + 5)),
        "new",
    ]


def test_five_jobs_of_which_two_go_wrong(home: Path, trainer: tuple[str, ...]) -> None:
    names = ["ok-1", "fails-2", "dies-3", "dies-4-always", "refuses-5", "full-6", "ok-7"]
    queue = queued(home, *names)
    lines: list[str] = []
    ended, interrupted = run_queue(home, lines.append, trainer)
    assert not interrupted
    assert [job.run for job in ended] == names
    assert states(queue) == {
        "ok-1": "done",
        "fails-2": "failed",
        "dies-3": "done",
        "dies-4-always": "failed",
        "refuses-5": "failed",
        "full-6": "paused",
        "ok-7": "done",
    }
    reasons = {job.run: job.reason for job in queue.jobs()}
    assert reasons["fails-2"] == "The image cat.png is cut short."
    assert reasons["refuses-5"] == "The settings of this run are no good."
    assert reasons["full-6"] == "The disk is full; make room and resume."
    assert "killed at step 1" in reasons["dies-4-always"]
    starts = [line for line in lines if line.endswith(": started")]
    # The killed one goes on at its own place, once.
    assert starts == [
        f"{name}: started"
        for name in ("ok-1", "fails-2", "dies-3", "dies-3", "dies-4-always", "dies-4-always", *names[4:])
    ]
    assert not queue.process_file.exists()
    assert (queue.runner(), queue.is_enabled()) == (None, False)
    assert left_behind(home) == []
    # The status of the run agrees with the queue's.
    assert queue.run("full-6").status() == "paused"
    # Again, as a person would: it waits, at the end, and goes on.
    queue.add(queue.run("dies-4-always"))
    assert [job.run for job in queue.jobs()][-1] == "dies-4-always"
    assert queue.jobs()[-1] == QueuedRun(
        "dies-4-always", events_bytes=queue.run("dies-4-always").events_file.stat().st_size
    )


def test_a_pause_is_skipped_and_a_stop_is_an_end(home: Path, trainer: tuple[str, ...]) -> None:
    queue = queued(home, "waits-1", "waits-2", "ok-3")
    with runner(home, trainer) as process:
        wait_for(lambda: queue.run("waits-1").progress().step == 1)
        assert states(queue) == {"waits-1": "running", "waits-2": "waiting", "ok-3": "waiting"}
        assert queue.runner() is not None
        with pytest.raises(RunError, match="waits-1 is still running"):
            queue.remove("waits-1")
        with pytest.raises(RunError, match="waits-1 is running; only jobs that wait"):
            queue.move("waits-1", 1)
        queue.run("waits-1").request("pause")
        wait_for(lambda: queue.run("waits-2").progress().step == 1)
        queue.run("waits-2").request("stop")
        assert process.wait(PATIENCE) == 0
    assert states(queue) == {"waits-1": "paused", "waits-2": "stopped", "ok-3": "done"}
    # A paused job that somebody goes on with by hand is seen as what it then is.
    (queue.run("waits-1").path / "go").touch()
    subprocess.run([*trainer, str(queue.run("waits-1").path)], cwd=ROOT, check=True)
    assert states(queue)["waits-1"] == "done"


def test_two_runners_start_nothing_twice(home: Path, trainer: tuple[str, ...]) -> None:
    queue = queued(home, *(f"ok-{number}" for number in range(4)), "waits-5")
    with runner(home, trainer) as first, runner(home, trainer) as second:
        wait_for(lambda: queue.run("waits-5").progress().step == 1)
        # The window asks too, at every start.
        assert not ensure_runner(home)
        wait_for(lambda: None not in (first.poll(), second.poll()) or first.poll() or second.poll())
        (queue.run("waits-5").path / "go").touch()
        codes = sorted([first.wait(PATIENCE), second.wait(PATIENCE)])
    assert codes == [0, 1]
    for name in states(queue):
        told = read_events(queue.run(name).events_file)[0]
        assert [event.kind for event in told].count("Started") == 1
    assert set(states(queue).values()) == {"done"}


def test_a_killed_runner_is_followed_by_another(home: Path, trainer: tuple[str, ...]) -> None:
    queue = queued(home, "waits-1", "ok-2")
    with runner(home, trainer) as process:
        wait_for(lambda: queue.run("waits-1").progress().step == 1)
        kill_runner(queue)
        process.wait()
    child = queue.run("waits-1").live_process()
    assert child is not None
    assert queue.runner() is None
    assert queue.is_enabled()
    # The trainer lives on: it is waited for, not started again.
    with runner(home, trainer) as process:
        wait_for(lambda: queue.runner() is not None)
        time.sleep(1.0)
        assert states(queue) == {"waits-1": "running", "ok-2": "waiting"}
        (queue.run("waits-1").path / "go").touch()
        assert process.wait(PATIENCE) == 0
    assert states(queue) == {"waits-1": "done", "ok-2": "done"}
    told = read_events(queue.run("waits-1").events_file)[0]
    assert [event.kind for event in told].count("Started") == 1


def test_after_the_machine_was_off(home: Path, trainer: tuple[str, ...]) -> None:
    """Runner and trainer gone at once, with and without a word of the trainer's."""
    queue = queued(home, "waits-1", "waits-2", "ok-3")
    queue.move("waits-2", 1)
    with runner(home, trainer) as process:
        wait_for(lambda: queue.run("waits-2").progress().step == 1)
        child = queue.run("waits-2").live_process()
        assert child is not None
        kill_runner(queue)
        child.kill()
        process.wait()
        wait_for(lambda: queue.run("waits-2").live_process() is None)
    assert states(queue) == {"waits-2": "waiting", "waits-1": "waiting", "ok-3": "waiting"}
    assert queue.is_enabled()
    # As a shutdown does: the trainer took SIGTERM for a stop, and nobody was left to note it.
    queue.update(QueuedRun("waits-1", "running"))
    queue.update(QueuedRun("waits-2", "waiting"))
    writer = EventWriter(queue.run("waits-1").events_file)
    writer.write(events.Started(steps=2, pid=1, device="cpu", threads=1, versions={}))
    writer.write(events.Stopped(step=1, export=""))
    writer.close()
    for name in ("waits-1", "waits-2"):
        (queue.run(name).path / "go").touch()
    ended, _ = run_queue(home, lambda line: None, trainer)
    assert [(job.run, job.state) for job in ended] == [
        ("waits-1", "done"),
        ("waits-2", "done"),
        ("ok-3", "done"),
    ]


def test_a_runner_that_is_told_to_end_keeps_the_work(home: Path, trainer: tuple[str, ...]) -> None:
    queue = queued(home, "waits-1", "ok-2")
    with runner(home, trainer) as process:
        wait_for(lambda: queue.run("waits-1").progress().step == 1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 130
    assert queue.run("waits-1").status() == "paused"
    assert states(queue) == {"waits-1": "waiting", "ok-2": "waiting"}
    assert left_behind(home) == []
    (queue.run("waits-1").path / "go").touch()
    ended, _ = run_queue(home, lambda line: None, trainer)
    assert [(job.run, job.state) for job in ended] == [("waits-1", "done"), ("ok-2", "done")]


def test_a_paused_queue_keeps_the_work_and_is_not_resumed(home: Path, trainer: tuple[str, ...]) -> None:
    queue = queued(home, "waits-1", "ok-2")
    with runner(home, trainer) as process:
        wait_for(lambda: queue.run("waits-1").progress().step == 1)
        Queue(home).set_enabled(False)
        assert process.wait(PATIENCE) == 130
    assert queue.run("waits-1").status() == "paused"
    assert states(queue) == {"waits-1": "waiting", "ok-2": "waiting"}
    assert left_behind(home) == []
    assert not resume_queue(home)


def test_a_run_started_by_hand_has_the_machine_for_itself(home: Path, trainer: tuple[str, ...]) -> None:
    queue = queued(home, "ok-1")
    alone = RunFolder.create(runs_folder(home) / "alone", RunConfig())
    lines: list[str] = []
    with alone.hold():
        thread = threading.Thread(target=run_queue, args=(home, lines.append, trainer))
        thread.start()
        wait_for(lambda: lines)
        time.sleep(1.2)
        assert lines == ["Waiting for the run alone, which is still running."]
    thread.join(PATIENCE)
    assert states(queue) == {"ok-1": "done"}


def test_jobs_that_ended_or_vanished_meanwhile(home: Path, trainer: tuple[str, ...]) -> None:
    queue = queued(home, "ok-by-hand", "waits-by-hand", "ok-gone", "ok-4")
    subprocess.run([*trainer, str(queue.run("ok-by-hand").path)], cwd=ROOT, check=True)
    process = subprocess.Popen([*trainer, str(queue.run("waits-by-hand").path)], cwd=ROOT)
    wait_for(lambda: queue.run("waits-by-hand").progress().step == 1)
    queue.run("waits-by-hand").request("stop")
    process.wait(PATIENCE)
    before = len(read_events(queue.run("ok-by-hand").events_file)[0])
    queue.run("ok-gone").path.rename(home / "elsewhere")
    run_queue(home, lambda line: None, trainer)
    assert states(queue) == {
        "ok-by-hand": "done",
        "waits-by-hand": "stopped",
        "ok-gone": "failed",
        "ok-4": "done",
    }
    assert {job.run: job.reason for job in queue.jobs()}["ok-gone"] == "Its folder is gone."
    assert len(read_events(queue.run("ok-by-hand").events_file)[0]) == before


def test_what_the_window_starts(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A detached runner, of a queue whose one job cannot work: the real command line, but no torch."""
    queue = Queue(home)
    assert not ensure_runner(home)  # nothing waits
    queued(home, "broken")
    (queue.run("broken").path / "config.toml").write_text("[adapter]\nrank = 0\n")
    assert not resume_queue(home)  # nobody set it going
    assert ensure_runner(home)
    assert not ensure_runner(home)  # it has been started, whether or not it is up already
    wait_for(lambda: states(queue)["broken"] == "failed" and queue.runner() is None)
    assert "adapter.rank = 0" in queue.jobs()[0].reason
    # The runner's process says so after it has let go of the queue.
    wait_for(lambda: "1 of 1 jobs failed: broken" in queue.log_file.read_text())
    assert queue.is_enabled() is False
    queue.add(queue.run("broken"))
    queue.set_enabled(True)
    wait_for(lambda: resume_queue(home))
    wait_for(lambda: states(queue)["broken"] == "failed" and queue.runner() is None)
