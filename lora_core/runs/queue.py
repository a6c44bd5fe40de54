"""The queue of a workspace: which runs are trained one after the other, on disk in `queue.json`.

Anybody may change it (window, command line, owner); each change holds a short lock and replaces the whole
file, so that no change is lost and no reader sees half of one. The owner, `runs/runner.py`, holds another
lock
for as long as it lives, so that a job cannot be started twice. What the file keeps is the order and what the
owner saw; whether a run is going on is asked of the run's own folder, which is never wrong.
"""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from lora_core.errors import RunError
from lora_core.runs.folder import RunFolder, runs_folder
from lora_core.system.paths import write_atomically
from lora_core.system.processes import live_process
from lora_core.system.untrusted import checked_fields, parsed_json

WAITING, RUNNING, PAUSED, DONE, STOPPED, FAILED = "waiting", "running", "paused", "done", "stopped", "failed"
ENDED = (DONE, STOPPED, FAILED)
ENDED_KEPT = 50
"""So many ended jobs stay listed; older ones are dropped when a job is added."""
PATIENCE = 10.0
"""Seconds to wait for somebody else's change, which takes milliseconds."""


@dataclass(frozen=True)
class Job:
    """One run in the queue.

    Attributes:
        run: the run's name.
        state: waiting, running, paused, done, stopped or failed.
        reason: why it failed, in a sentence.
        restarts: how often the owner started it again after its process died.
        seen: bytes of the run's events when this was written; more means that the run went on since.
    """

    run: str
    state: str = WAITING
    reason: str = ""
    restarts: int = 0
    seen: int = 0

    @property
    def left(self) -> bool:
        """Whether the queue has still to do with it: it waits, runs or is paused."""
        return self.state not in ENDED


class Queue:
    """The queue of one workspace."""

    def __init__(self, workspace: Path) -> None:
        """The queue of `workspace`; nothing is written before the first change."""
        self.workspace = workspace
        self.file = workspace / "queue.json"
        self.lock_file = workspace / "queue.lock"
        self.process_file = workspace / "queue.process.json"
        self.log_file = workspace / "queue.log"

    def run(self, name: str) -> RunFolder:
        """The folder of a run in this workspace."""
        return RunFolder(runs_folder(self.workspace) / name)

    def owner(self) -> psutil.Process | None:
        """The process that works through the queue, if one does."""
        return live_process(self.process_file)

    def written(self) -> list[Job]:
        """The jobs in order as they were last written down.

        Raises:
            RunError: the file was edited into something that is no queue.
        """
        return self._read()[0]

    def jobs(self) -> list[Job]:
        """The jobs in order, each as it stands now: what a run did without the queue counts too.

        Raises:
            RunError: as `written`.
        """
        owned = self.owner() is not None
        return [self._now(job, owned) for job in self.written()]

    def _now(self, job: Job, owned: bool) -> Job:
        run = self.run(job.run)
        if run.live_process() is not None:
            return dataclasses.replace(job, state=RUNNING, reason="")
        if job.state == RUNNING:
            return job if owned else dataclasses.replace(job, state=WAITING)
        if job.state == WAITING or events_size(run) <= job.seen:
            return job
        progress = run.progress()
        status = run.status(progress)
        known = status in (DONE, STOPPED, PAUSED, FAILED)
        return dataclasses.replace(job, state=status, reason=progress.reason) if known else job

    def rows(self) -> list[dict[str, Any]]:
        """The rows of `queue list --json`.

        Raises:
            RunError: as `written`.
        """
        rows: list[dict[str, Any]] = []
        position = 0
        for job in self.jobs():
            run = self.run(job.run)
            progress = run.progress()
            position += job.state == WAITING
            rows.append(
                {
                    "position": position if job.state == WAITING else None,
                    "name": job.run,
                    "path": str(run.path),
                    "state": job.state,
                    "step": progress.step,
                    "steps": progress.steps or None,
                    "reason": job.reason,
                }
            )
        return rows

    def add(self, run: RunFolder) -> Job:
        """Put a run at the end; one that is paused or ended in the queue waits again.

        Raises:
            RunError: it is no run of this workspace, waits or is trained already, or is done.
        """
        if run.path.resolve() != self.run(run.name).path.resolve():
            raise RunError(f"The run {run.path} is not one of the workspace {self.workspace}.")
        if run.live_process() is not None:
            raise RunError(f"The run {run.name} is being trained already, so it cannot wait in the queue.")
        if run.status() == DONE:
            raise RunError(
                f"The run {run.name} is done; train it further with `resume {run.path} --steps N`."
            )
        job = Job(run.name, seen=events_size(run))
        with self.changing() as jobs:
            if any(other.run == run.name and other.state in (WAITING, RUNNING) for other in jobs):
                raise RunError(f"The run {run.name} is in the queue already.")
            jobs[:] = [other for other in jobs if other.run != run.name]
            ended = [other for other in jobs if not other.left]
            dropped = ended[: max(0, len(ended) - ENDED_KEPT)]
            jobs[:] = [other for other in jobs if other not in dropped] + [job]
        return job

    def move(self, name: str, position: int) -> None:
        """Give a waiting run another place among those that wait; 1 is the next to start.

        Raises:
            RunError: it does not wait in the queue, or there is no such place.
        """
        with self.changing() as jobs:
            job = _waiting(jobs, name)
            places = [index for index, other in enumerate(jobs) if other.state == WAITING]
            if not 1 <= position <= len(places):
                raise RunError(
                    f"The position {position} is not one of the queue's; {len(places)} jobs wait, so it goes"
                    f" from 1 to {len(places)}."
                )
            order = [jobs[index] for index in places if jobs[index] != job]
            order.insert(position - 1, job)
            for index, other in zip(places, order, strict=True):
                jobs[index] = other

    def remove(self, name: str) -> None:
        """Take a run out of the queue; the run itself stays as it is.

        Raises:
            RunError: it is not in the queue, or is going on.
        """
        with self.changing() as jobs:
            job = next((other for other in jobs if other.run == name), None)
            if job is None:
                raise RunError(f"The run {name} is not in the queue.")
            if job.state == RUNNING and (self.owner() is not None or self.run(name).live_process()):
                raise RunError(f"The run {name} is going on; stop or pause it first.")
            jobs.remove(job)

    def take(self) -> Job | None:
        """The next job as it was, now marked as running: one that an owner left behind, else the first that
        waits."""
        with self.changing() as jobs:
            job = next((j for j in jobs if j.state == RUNNING), None) or next(
                (j for j in jobs if j.state == WAITING), None
            )
            if job is not None:
                jobs[jobs.index(job)] = dataclasses.replace(job, state=RUNNING)
            else:
                # Within the lock: who adds a job now finds no owner, and starts one.
                self.process_file.unlink(missing_ok=True)
            return job

    def note(self, name: str, **changes: Any) -> None:
        """Write down what became of a job, if nobody has taken it out."""
        changes["seen"] = events_size(self.run(name))
        with self.changing() as jobs:
            jobs[:] = [dataclasses.replace(j, **changes) if j.run == name else j for j in jobs]

    def going(self) -> bool:
        """Whether somebody set the queue going and it was neither worked off nor told to end."""
        return self._read()[1]

    def set_going(self, going: bool) -> None:
        """Remember whether the queue is to be worked through, also after the machine was off."""
        with self._locked():
            self._write(self._read()[0], going)

    @contextmanager
    def changing(self) -> Iterator[list[Job]]:
        """The jobs as they are written down, to be changed in place; written when the context ends well.

        Raises:
            RunError: the file cannot be read or written.
        """
        with self._locked():
            jobs, going = self._read()
            yield jobs
            self._write(jobs, going)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            with FileLock(self.workspace / "queue.change.lock", timeout=PATIENCE):
                yield
        except Timeout as error:
            raise RunError(f"The queue {self.file} is being changed by a process that hangs.") from error
        except OSError as error:
            raise RunError(
                f"The queue {self.file} cannot be written: {error.strerror or error}; make room or give the"
                " right to write there."
            ) from error

    def _read(self) -> tuple[list[Job], bool]:
        try:
            document = parsed_json(self.file.read_bytes())
            names = {field.name for field in dataclasses.fields(Job)}
            rows = [{k: v for k, v in row.items() if k in names} for row in document["jobs"]]
            return [checked_fields(Job, row) for row in rows], bool(document.get("going"))
        except FileNotFoundError:
            return [], False
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(
                f"The queue {self.file} cannot be read; mend it, or remove it to begin with an empty one."
            ) from error

    def _write(self, jobs: list[Job], going: bool) -> None:
        document = {"going": going, "jobs": [dataclasses.asdict(job) for job in jobs]}
        write_atomically(self.file, json.dumps(document, ensure_ascii=False, indent=1).encode())


def events_size(run: RunFolder) -> int:
    """Bytes of a run's events; 0 where there are none."""
    try:
        return run.events_file.stat().st_size
    except OSError:
        return 0


def _waiting(jobs: list[Job], name: str) -> Job:
    for job in jobs:
        if job.run == name and job.state == WAITING:
            return job
        if job.run == name:
            raise RunError(f"The run {name} is {job.state}; only jobs that wait can be moved.")
    raise RunError(f"The run {name} is not in the queue.")
