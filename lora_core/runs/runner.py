"""The owner of a queue: the one process that starts its jobs, one after the other, each as a child of its
own.

It outlives the window, and its children outlive it: an owner that is killed leaves a trainer that goes on,
and the next owner waits for that one before it starts another. A job whose process died without a word
(killed, or the machine went down) is started again from its last checkpoint, once; one that failed in a
sentence is not, since it would fail again.
"""

import contextlib
import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from lora_core.errors import RunError
from lora_core.runs.diagnosis import Watched, crash_reason, last_sentence
from lora_core.runs.folder import RunFolder, all_runs
from lora_core.runs.notifications import tell_end
from lora_core.runs.queue import DONE, FAILED, PAUSED, RUNNING, STOPPED, WAITING, Job, Queue, events_size
from lora_core.system.processes import INTERRUPTED, TRAINER, noted_process, signals_taken, started

DIED = "died"
RESTARTS = 1
"""How often a job whose process died is started again."""
TICK = 0.25
"""Seconds between two looks at a child."""
LOOK = 2.0
"""Seconds between two looks at its memory."""
HANDOVER = 5.0
"""Seconds that an owner which is about to end gets to do so."""

_children: dict[Path, "subprocess.Popen[bytes]"] = {}
"""Owners that this process started, by workspace; kept so that they are reaped when they end."""


def ensure_owner(workspace: Path) -> bool:
    """Start a detached owner if jobs wait and nobody works through them; whether one was started.

    Raises:
        RunError: the queue cannot be read.
    """
    for place, child in list(_children.items()):
        if child.poll() is not None:
            del _children[place]
    queue = Queue(workspace)
    waiting = any(job.state in (WAITING, RUNNING) for job in queue.written())
    # One that was started a moment ago has yet to say that it is there.
    if workspace in _children or not waiting or queue.owner() is not None:
        return False
    command = [sys.executable, "-m", "lora_core", "queue", "run", "--workspace", str(workspace)]
    _children[workspace] = started(command, queue.log_file, workspace)
    return True


def pause_queue(workspace: Path) -> None:
    """Stop working through a queue: the run in hand is paused and waits again.

    Raises:
        RunError: the queue cannot be written.
    """
    queue = Queue(workspace)
    owner = queue.owner()
    queue.set_going(False)
    if owner is not None:
        with contextlib.suppress(psutil.Error):
            owner.terminate()


def take_up(workspace: Path) -> bool:
    """Go on with a queue that was being worked through when the machine or its owner went down; whether it
    was.

    Raises:
        RunError: the queue cannot be read.
    """
    return Queue(workspace).going() and ensure_owner(workspace)


def work_through(
    workspace: Path, say: Callable[[str], None], trainer: tuple[str, ...] = TRAINER
) -> tuple[list[Job], bool]:
    """Work through a queue until no job waits.

    Args:
        workspace: whose queue.
        say: told in a line what happens.
        trainer: the command that a run's path is appended to.

    Returns:
        The jobs that ended, in order, and whether a signal ended the work before its time.

    Raises:
        RunError: another process does it already, or the queue cannot be read or written.
    """
    queue = Queue(workspace)
    with _owned(queue):
        owner = _Owner(queue, say, trainer)
        with signals_taken(owner.asked_to_end):
            owner.work()
        return owner.ended, owner.ending


@contextmanager
def _owned(queue: Queue) -> Iterator[None]:
    other = queue.owner()
    lock = FileLock(queue.lock_file)
    try:
        if other is not None:
            raise Timeout(str(queue.lock_file))
        lock.acquire(timeout=HANDOVER)
    except Timeout as error:
        named = f" ({other.pid})" if other else ""
        raise RunError(
            f"The queue of {queue.workspace} is being worked through by another process{named} already."
        ) from error
    except OSError as error:
        raise RunError(f"{queue.lock_file} cannot be written: {error.strerror or error}.") from error
    try:
        with noted_process(queue.process_file):
            yield
    finally:
        lock.release()


class _Owner:
    """One owner's work."""

    def __init__(self, queue: Queue, say: Callable[[str], None], trainer: tuple[str, ...]) -> None:
        self.ending = False
        self.ended: list[Job] = []
        self._queue = queue
        self._say = say
        self._trainer = trainer

    def asked_to_end(self, number: int) -> None:
        """Take signals as a wish to end: the job in hand is paused and waits again. A second one leaves at
        once."""

        if self.ending:
            raise KeyboardInterrupt
        self.ending = True

    def work(self) -> None:
        """Job after job."""
        self._queue.set_going(True)
        while not self.ending:
            self._wait_for_others()
            if self.ending:
                break
            job = self._queue.take()
            if job is None:
                self._queue.set_going(False)
                return
            self._conduct(job)

    def _wait_for_others(self) -> None:
        """A run that somebody started by hand has the machine for itself."""
        said = False
        while not self.ending:
            jobs = self._queue.written()
            own = {job.run for job in jobs if job.state == RUNNING}
            live = [run for run in all_runs(self._queue.workspace) if run.live_process() is not None]
            others = [run.name for run in live if run.name not in own]
            if own or not others or not any(job.state == WAITING for job in jobs):
                return
            if not said:
                self._say(f"Waiting for the run {others[0]}, which is going on.")
            said = True
            time.sleep(TICK * 2)

    def _conduct(self, job: Job) -> None:
        run = self._queue.run(job.run)
        if not run.config_file.is_file():
            self._end(job, FAILED, "Its folder is gone.")
            return
        if not self._left_alone(run):
            return
        ended = self._by_others(job, run)
        if ended is not None:
            self._end(job, *ended)
            return
        while True:
            state, reason = self._trained(run)
            if self.ending and state in (DIED, PAUSED, STOPPED):
                self._queue.note(job.run, state=WAITING, reason="", restarts=job.restarts)
                self._say(f"{job.run}: waits for the next `queue run`")
                return
            if state != DIED or job.restarts >= RESTARTS:
                break
            job = dataclasses.replace(job, restarts=job.restarts + 1)
            self._queue.note(job.run, restarts=job.restarts)
            self._say(f"{job.run}: {reason} It is started again.")
        if state == DIED:
            note = tell_end(run, self._queue.workspace, reason)
            if note:
                self._say(note)
        self._end(job, FAILED if state == DIED else state, reason)

    def _left_alone(self, run: RunFolder) -> bool:
        """Wait while somebody else's process trains the run; false where this owner is to end before that."""
        while run.live_process() is not None:
            if self.ending:
                return False
            time.sleep(TICK * 2)
        return True

    def _by_others(self, job: Job, run: RunFolder) -> tuple[str, str] | None:
        """How a run ended that went on since the job was written down, or None where there is more to do."""
        if events_size(run) <= job.seen:
            return None
        progress = run.progress()
        status = run.status(progress)
        asked = any(request["do"] == "stop" for request in run.requests())
        # A stop that nobody asked for is a signal's: the machine was shut down.
        if status in (DONE, PAUSED, FAILED) or (status == STOPPED and asked):
            return status, progress.reason
        return None

    def _end(self, job: Job, state: str, reason: str) -> None:
        self._queue.note(job.run, state=state, reason=reason)
        self.ended.append(dataclasses.replace(job, state=state, reason=reason))
        self._say(f"{job.run}: {state}" + (f": {reason}" if reason else ""))

    def _trained(self, run: RunFolder) -> tuple[str, str]:
        """Train a run in a child; returns what became of it, and why."""
        self._say(f"{run.name}: started")
        before = events_size(run)
        watched = Watched(run)
        child = started([*self._trainer, str(run.path)], run.log_file, self._queue.workspace)
        code, looked = None, 0.0
        while code is None:
            if time.monotonic() - looked > LOOK:
                looked = time.monotonic()
                watched.look(child.pid)
            if self.ending:
                _ask_to_pause(run)
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = child.wait(TICK)
        watched.ended(code)
        if code == INTERRUPTED and not self.ending:
            time.sleep(TICK * 4)  # a shutdown sends its signal to all, one after the other
        return self._verdict(run, code, before)

    def _verdict(self, run: RunFolder, code: int, before: int) -> tuple[str, str]:
        if run.live_process() is not None:
            # Somebody else was quicker by a moment, and the child refused.
            return self._after_others(run)
        progress = run.progress()
        status = run.status(progress)
        if code == 0 and status in (DONE, PAUSED, STOPPED):
            return status, ""
        if events_size(run) > before and status in (DONE, PAUSED, STOPPED, FAILED):
            return status, progress.reason or (last_sentence(run) if code == 1 else "")
        return (FAILED if code == 1 else DIED), crash_reason(run)

    def _after_others(self, run: RunFolder) -> tuple[str, str]:
        if not self._left_alone(run):
            return DIED, ""
        return self._by_others(Job(run.name), run) or (DIED, crash_reason(run))


def _ask_to_pause(run: RunFolder) -> None:
    """Ask until it is written down: the trainer's first act is to void what was asked of it before."""
    if not any(request["do"] == "pause" for request in run.requests()):
        with contextlib.suppress(RunError):
            run.request("pause")
