"""The queue of a workspace: which runs are trained one after another, in the SQLite file `queue.db`.

Window, command line and runner change it from processes of their own. Each change is one transaction of a
connection of its own, so that no change is lost, a kill leaves the state before or after it, and threads
share nothing. The table keeps the order and what the runner saw; whether a run goes on is read from its run
folder. WAL lets readers and a writer work side by side but needs memory that all of them share, so a
workspace on a network drive uses SQLite's rollback journal.
"""

import contextlib
import dataclasses
import functools
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from lora_core.errors import RunError
from lora_core.runs.events import warn_on_stderr
from lora_core.runs.folder import RunFolder, runs_folder
from lora_core.system.files import check_fields, file_bytes, is_network_drive, parse_json
from lora_core.system.processes import live_process

WAITING, RUNNING, PAUSED, DONE, STOPPED, FAILED = "waiting", "running", "paused", "done", "stopped", "failed"
ENDED = (DONE, STOPPED, FAILED)
ENDED_KEPT = 50
"""How many ended jobs stay listed; older ones are dropped when a job is added."""
LOCK_TIMEOUT = 10.0
"""Seconds to wait for the transaction of another process, which takes milliseconds."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    run TEXT PRIMARY KEY,
    position INTEGER NOT NULL,
    state TEXT NOT NULL,
    reason TEXT NOT NULL,
    restarts INTEGER NOT NULL,
    events_bytes INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS runner (enabled INTEGER NOT NULL);
"""
VERSION = 1


@dataclass(frozen=True)
class QueuedRun:
    """One run in the queue.

    Attributes:
        run: its name.
        state: waiting, running, paused, done, stopped or failed.
        reason: why it failed, in a sentence.
        restarts: how often the runner started it again after its process died.
        events_bytes: size of the run's events when the state was written; a larger file means that the run
            went on since.
    """

    run: str
    state: str = WAITING
    reason: str = ""
    restarts: int = 0
    events_bytes: int = 0

    @property
    def has_ended(self) -> bool:
        """Whether the queue is through with it."""
        return self.state in ENDED


COLUMNS = ", ".join(field.name for field in dataclasses.fields(QueuedRun))


class Queue:
    """The queue of one workspace."""

    def __init__(self, workspace: Path) -> None:
        """The queue of `workspace`; nothing is written before the first change."""
        self.workspace = workspace
        self.file = workspace / "queue.db"
        self.lock_file = workspace / "queue.lock"
        self.process_file = workspace / "queue.process.json"
        self.log_file = workspace / "queue.log"
        self._old_file = workspace / "queue.json"

    def run(self, name: str) -> RunFolder:
        """The folder of a run in this workspace."""
        return RunFolder(runs_folder(self.workspace) / name)

    def runner(self) -> psutil.Process | None:
        """The process that runs the queue, if one does."""
        return live_process(self.process_file)

    def stored_jobs(self) -> list[QueuedRun]:
        """The jobs in order as they were last written.

        Raises:
            RunError: the file is not a queue.
        """
        if not self.file.exists() and not self._old_file.exists():
            return []
        with self._open() as db:
            return _jobs(db)

    def jobs(self) -> list[QueuedRun]:
        """The jobs in order with their present states: what a run did outside the queue counts too.

        Raises:
            RunError: as `stored_jobs`.
        """
        has_runner = self.runner() is not None
        return [self._refreshed(job, has_runner) for job in self.stored_jobs()]

    def _refreshed(self, job: QueuedRun, has_runner: bool) -> QueuedRun:
        run = self.run(job.run)
        if run.live_process() is not None:
            return dataclasses.replace(job, state=RUNNING, reason="")
        if job.state == RUNNING:
            return job if has_runner else dataclasses.replace(job, state=WAITING)
        if job.state == WAITING or file_bytes(run.events_file) <= job.events_bytes:
            return job
        progress = run.progress()
        status = run.status(progress)
        if status not in (*ENDED, PAUSED):
            return job
        return dataclasses.replace(job, state=status, reason=progress.reason)

    def rows(self) -> list[dict[str, Any]]:
        """The rows of `queue list --json`.

        Raises:
            RunError: as `stored_jobs`.
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

    def add(self, run: RunFolder) -> QueuedRun:
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
        job = QueuedRun(run.name, events_bytes=file_bytes(run.events_file))
        with self._transaction() as db:
            jobs = _jobs(db)
            if any(other.run == run.name and other.state in (WAITING, RUNNING) for other in jobs):
                raise RunError(f"The run {run.name} is in the queue already.")
            ended = [other.run for other in jobs if other.has_ended and other.run != run.name]
            db.executemany(
                "DELETE FROM jobs WHERE run = ?", [(name,) for name in (run.name, *ended[:-ENDED_KEPT])]
            )
            _append(db, job)
        return job

    def move(self, name: str, position: int) -> None:
        """Give a waiting run another place among those that wait; 1 is the next to start.

        Raises:
            RunError: it does not wait in the queue, or there is no such place.
        """
        with self._transaction() as db:
            job = _job(db, name)
            if job.state != WAITING:
                raise RunError(f"The run {name} is {job.state}; only jobs that wait can be moved.")
            waiting = [job.run for job in _jobs(db) if job.state == WAITING]
            if not 1 <= position <= len(waiting):
                raise RunError(
                    f"The position {position} is not one of the queue's; {len(waiting)} jobs wait, so it"
                    f" goes from 1 to {len(waiting)}."
                )
            places = db.execute("SELECT position FROM jobs WHERE state = ? ORDER BY position", [WAITING])
            positions = [place for (place,) in places]
            waiting.remove(name)
            waiting.insert(position - 1, name)
            db.executemany(
                "UPDATE jobs SET position = ? WHERE run = ?", list(zip(positions, waiting, strict=True))
            )

    def remove(self, name: str) -> None:
        """Take a run out of the queue; the run itself stays as it is.

        Raises:
            RunError: it is not in the queue, or is going on.
        """
        with self._transaction() as db:
            job = _job(db, name)
            if job.state == RUNNING and (self.runner() is not None or self.run(name).live_process()):
                raise RunError(f"The run {name} is going on; stop or pause it first.")
            db.execute("DELETE FROM jobs WHERE run = ?", [name])

    def take_next(self) -> QueuedRun | None:
        """The next job as it was, now marked as running: one that a killed runner left, else the first that
        waits."""
        with self._transaction() as db:
            jobs = _jobs(db)
            job = next((j for j in jobs if j.state == RUNNING), None) or next(
                (j for j in jobs if j.state == WAITING), None
            )
            if job is not None:
                db.execute("UPDATE jobs SET state = ? WHERE run = ?", [RUNNING, job.run])
            else:
                # Within the transaction: whoever adds a job now finds no runner, and starts one.
                self.process_file.unlink(missing_ok=True)
            return job

    def update(self, job: QueuedRun) -> None:
        """Write down the state, reason and restarts of a job, unless it was taken out."""
        values = [job.state, job.reason, job.restarts, file_bytes(self.run(job.run).events_file), job.run]
        with self._transaction() as db:
            db.execute(
                "UPDATE jobs SET state = ?, reason = ?, restarts = ?, events_bytes = ? WHERE run = ?", values
            )

    def is_enabled(self) -> bool:
        """Whether the queue was started, and neither worked off nor paused since.

        Raises:
            RunError: as `stored_jobs`.
        """
        if not self.file.exists() and not self._old_file.exists():
            return False
        with self._open() as db:
            return db.execute("SELECT 1 FROM runner WHERE enabled").fetchone() is not None

    def set_enabled(self, enabled: bool) -> None:
        """Remember whether the queue is to be run, also after the machine was off."""
        with self._transaction() as db:
            _enable(db, enabled)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Changes that are made together or, where the body raises, not at all.

        Raises:
            RunError: the file cannot be read or written.
        """
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")
            with db:
                yield db

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with contextlib.closing(
                sqlite3.connect(self.file, timeout=LOCK_TIMEOUT, isolation_level=None)
            ) as db:
                if not db.execute("PRAGMA user_version").fetchone()[0]:
                    db.executescript(f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")
                # Another connection may be in the way; the file can be used in either mode.
                with contextlib.suppress(sqlite3.OperationalError):
                    db.execute(f"PRAGMA journal_mode = {_journal_mode(self.workspace)}")
                if self._old_file.exists():
                    self._import_old(db)
                yield db
        except sqlite3.Error as error:
            raise RunError(f"The queue {self.file} {_problem(error)}") from error

    def _import_old(self, db: sqlite3.Connection) -> None:
        """Take over the queue.json of an earlier version, once.

        Raises:
            RunError: it is not a queue.
        """
        try:
            document = parse_json(self._old_file.read_bytes())
            known = {"run", "state", "reason", "restarts", "seen"}
            rows = [{k: v for k, v in row.items() if k in known} for row in document["jobs"]]
            jobs = [check_fields(QueuedRun, {"events_bytes": row.pop("seen", 0), **row}) for row in rows]
            enabled = bool(document.get("going"))
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(
                f"The queue {self._old_file} cannot be read; mend it, or remove it to begin with an empty"
                " one."
            ) from error
        db.execute("BEGIN IMMEDIATE")
        with db:
            there = {job.run for job in _jobs(db)}
            for job in jobs:
                if job.run not in there:
                    _append(db, job)
            _enable(db, enabled)
        with contextlib.suppress(FileNotFoundError):
            os.replace(self._old_file, self._old_file.with_suffix(".json.imported"))


def _jobs(db: sqlite3.Connection) -> list[QueuedRun]:
    return [QueuedRun(*row) for row in db.execute(f"SELECT {COLUMNS} FROM jobs ORDER BY position")]


def _job(db: sqlite3.Connection, name: str) -> QueuedRun:
    job = next((job for job in _jobs(db) if job.run == name), None)
    if job is None:
        raise RunError(f"The run {name} is not in the queue.")
    return job


def _append(db: sqlite3.Connection, job: QueuedRun) -> None:
    db.execute(
        f"INSERT INTO jobs ({COLUMNS}, position)"
        " VALUES (?, ?, ?, ?, ?, (SELECT COALESCE(MAX(position), 0) + 1 FROM jobs))",
        dataclasses.astuple(job),
    )


def _enable(db: sqlite3.Connection, enabled: bool) -> None:
    db.execute("DELETE FROM runner")
    db.execute("INSERT INTO runner VALUES (?)", [enabled])


@functools.cache
def _journal_mode(workspace: Path) -> str:
    if not is_network_drive(workspace):
        return "WAL"
    warn_on_stderr(
        f"The workspace {workspace} is on a network drive, so its queue uses SQLite's rollback journal, which"
        " is slower than WAL; change the queue from one computer at a time."
    )
    return "DELETE"


def _problem(error: sqlite3.Error) -> str:
    """What is wrong with the file and what to do, to follow its name."""
    code = (getattr(error, "sqlite_errorcode", 0) or 0) & 0xFF
    if code == sqlite3.SQLITE_BUSY:
        return "is being changed by a process that hangs."
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR):
        return f"cannot be read ({error}); mend it, or remove it to begin with an empty one."
    return f"cannot be written: {error}; make room or give the right to write there."
