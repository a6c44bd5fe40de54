"""The runner of a queue: the one process that starts its jobs, one after another, as children.

It outlives the window, and its children outlive it: a killed runner leaves its trainer running, and
the next runner waits for that one before it starts another. A job whose process died without an event
(killed, or the machine went down) is started again from its last checkpoint, once; one that failed with a
reason is not, since it would fail again.
"""

import contextlib
import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lora_core.errors import RunError
from lora_core.runs.diagnosis import ExitRecorder, crash_reason, last_log_sentence
from lora_core.runs.folder import RunFolder, all_runs
from lora_core.runs.notifications import notify_end
from lora_core.runs.queue import (
    DONE,
    FAILED,
    PAUSED,
    RUNNING,
    STOPPED,
    WAITING,
    Queue,
    QueuedRun,
)
from lora_core.system.files import file_bytes
from lora_core.system.processes import INTERRUPTED, TRAINER, catch_signals, pid_file, start_detached

DIED = "died"
RESTARTS = 1
"""How often a job whose process died is started again."""
TICK = 0.25
"""Seconds between two polls of a child."""
LOOK = 1.0
"""Seconds between two samples of its memory, and checks whether the queue was paused."""
HANDOVER = 5.0
"""Seconds that a runner which is about to end gets to do so."""

_children: dict[Path, "subprocess.Popen[bytes]"] = {}
"""Runners that this process started, by workspace; kept so that they are reaped when they end."""


def ensure_runner(workspace: Path) -> bool:
    """Start a detached runner if jobs wait and there is none; whether one was started.

    Raises:
        RunError: the queue cannot be read.
    """
    for place, child in list(_children.items()):
        if child.poll() is not None:
            del _children[place]
    queue = Queue(workspace)
    has_work = any(job.state in (WAITING, RUNNING) for job in queue.stored_jobs())
    # One that was started a moment ago has not written its process file yet.
    if workspace in _children or not has_work or queue.runner() is not None:
        return False
    command = [sys.executable, "-m", "lora_core", "queue", "run", "--workspace", str(workspace)]
    _children[workspace] = start_detached(command, queue.log_file, workspace)
    return True


def pause_queue(workspace: Path) -> None:
    """End the runner of a queue: it pauses its run, which waits again.

    Raises:
        RunError: the queue cannot be written.
    """
    Queue(workspace).set_enabled(False)


def resume_queue(workspace: Path) -> bool:
    """Go on with a queue that ran when the machine or its runner went down; whether it did.

    Raises:
        RunError: the queue cannot be read.
    """
    return Queue(workspace).is_enabled() and ensure_runner(workspace)


def run_queue(
    workspace: Path, say: Callable[[str], None], trainer: tuple[str, ...] = TRAINER
) -> tuple[list[QueuedRun], bool]:
    """Train the jobs of a queue until none waits.

    Args:
        workspace: whose queue.
        say: called with a line for each start and end.
        trainer: the command that a run's path is appended to.

    Returns:
        The jobs that ended, in order, and whether a signal or `pause_queue` ended the work before its time.

    Raises:
        RunError: another process runs it already, or the queue cannot be read or written.
    """
    queue = Queue(workspace)
    with _claimed(queue):
        runner = _Runner(queue, say, trainer)
        with catch_signals(runner.on_signal):
            runner.work()
        return runner.ended, runner.must_end


@contextmanager
def _claimed(queue: Queue) -> Iterator[None]:
    other = queue.runner()
    lock = FileLock(queue.lock_file)
    try:
        if other is not None:
            raise Timeout(str(queue.lock_file))
        lock.acquire(timeout=HANDOVER)
    except Timeout as error:
        pid = f" ({other.pid})" if other else ""
        raise RunError(
            f"The queue of {queue.workspace} is being worked through by another process{pid} already."
        ) from error
    except OSError as error:
        raise RunError(f"{queue.lock_file} cannot be written: {error.strerror or error}.") from error
    try:
        with pid_file(queue.process_file):
            yield
    finally:
        lock.release()


class _Runner:
    """The work of one runner."""

    def __init__(self, queue: Queue, say: Callable[[str], None], trainer: tuple[str, ...]) -> None:
        self.must_end = False
        self.ended: list[QueuedRun] = []
        self._queue = queue
        self._say = say
        self._trainer = trainer

    def on_signal(self, number: int) -> None:
        """Pause the current job, which waits again, and end. A second signal ends at once."""
        if self.must_end:
            raise KeyboardInterrupt
        self.must_end = True

    def work(self) -> None:
        """Train job after job."""
        self._queue.set_enabled(True)
        while self._wait_for_others():
            job = self._queue.take_next()
            if job is None:
                self._queue.set_enabled(False)
                return
            self._run_job(job)

    def _check_paused(self) -> None:
        """Note whether the queue was paused; a file that cannot be read now may be readable later."""
        with contextlib.suppress(RunError):
            self.must_end = self.must_end or not self._queue.is_enabled()

    def _wait_for_others(self) -> bool:
        """Leave the machine to a run that was started by hand; false where this runner must end."""
        said = False
        while not self.must_end:
            self._check_paused()
            jobs = self._queue.stored_jobs()
            own = {job.run for job in jobs if job.state == RUNNING}
            live = [run for run in all_runs(self._queue.workspace) if run.live_process() is not None]
            others = [run.name for run in live if run.name not in own]
            if own or not others or not any(job.state == WAITING for job in jobs):
                break
            if not said:
                self._say(f"Waiting for the run {others[0]}, which is going on.")
            said = True
            time.sleep(TICK * 2)
        return not self.must_end

    def _run_job(self, job: QueuedRun) -> None:
        run = self._queue.run(job.run)
        if not run.config_file.is_file():
            self._end(job, FAILED, "Its folder is gone.")
            return
        if not self._wait_for_run(run):
            return
        outcome = self._outcome_elsewhere(run, job.events_bytes)
        if outcome is not None:
            self._end(job, *outcome)
            return
        while True:
            state, reason = self._train(run)
            if self.must_end and state in (DIED, PAUSED, STOPPED):
                self._queue.update(dataclasses.replace(job, state=WAITING, reason=""))
                self._say(f"{job.run}: waits for the next `queue run`")
                return
            if state != DIED or job.restarts >= RESTARTS:
                break
            job = dataclasses.replace(job, state=RUNNING, restarts=job.restarts + 1)
            self._queue.update(job)
            self._say(f"{job.run}: {reason} It is started again.")
        if state == DIED:
            note = notify_end(run, self._queue.workspace, reason)
            if note:
                self._say(note)
        self._end(job, FAILED if state == DIED else state, reason)

    def _wait_for_run(self, run: RunFolder) -> bool:
        """Wait while another process trains the run; false where this runner must end before that."""
        while run.live_process() is not None:
            self._check_paused()
            if self.must_end:
                return False
            time.sleep(TICK * 2)
        return True

    def _outcome_elsewhere(self, run: RunFolder, events_bytes: int) -> tuple[str, str] | None:
        """How a run ended that went on outside the queue, or None where there is more to do."""
        if file_bytes(run.events_file) <= events_bytes:
            return None
        progress = run.progress()
        status = run.status(progress)
        asked = any(request["action"] == "stop" for request in run.requests())
        # A stop without a request is a signal's: the machine was shut down.
        if status in (DONE, PAUSED, FAILED) or (status == STOPPED and asked):
            return status, progress.reason
        return None

    def _end(self, job: QueuedRun, state: str, reason: str) -> None:
        ended = dataclasses.replace(job, state=state, reason=reason)
        self._queue.update(ended)
        self.ended.append(ended)
        self._say(f"{job.run}: {state}" + (f": {reason}" if reason else ""))

    def _train(self, run: RunFolder) -> tuple[str, str]:
        """Train a run in a child; returns its state then, and the reason."""
        self._say(f"{run.name}: started")
        before = file_bytes(run.events_file)
        recorder = ExitRecorder(run)
        child = start_detached([*self._trainer, str(run.path)], run.log_file, self._queue.workspace)
        code, looked = None, 0.0
        while code is None:
            if time.monotonic() - looked > LOOK:
                looked = time.monotonic()
                recorder.sample_memory(child.pid)
                self._check_paused()
            if self.must_end:
                _ask_to_pause(run)
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = child.wait(TICK)
        recorder.record(code)
        if code == INTERRUPTED and not self.must_end:
            time.sleep(TICK * 4)  # a shutdown sends its signal to all, one after the other
        return self._outcome(run, code, before)

    def _outcome(self, run: RunFolder, code: int, events_before: int) -> tuple[str, str]:
        if run.live_process() is not None:
            # Another process was quicker by a moment, and the child refused.
            if not self._wait_for_run(run):
                return DIED, ""
            return self._outcome_elsewhere(run, 0) or (DIED, crash_reason(run))
        progress = run.progress()
        status = run.status(progress)
        if code == 0 and status in (DONE, PAUSED, STOPPED):
            return status, ""
        if file_bytes(run.events_file) > events_before and status in (DONE, PAUSED, STOPPED, FAILED):
            return status, progress.reason or (last_log_sentence(run) if code == 1 else "")
        return (FAILED if code == 1 else DIED), crash_reason(run)


def _ask_to_pause(run: RunFolder) -> None:
    """Ask until it is written down: the trainer's first act is to void what was asked of it before."""
    if not any(request["action"] == "pause" for request in run.requests()):
        with contextlib.suppress(RunError):
            run.request("pause")
