"""The queue of a workspace: which runs are trained one after another, in the SQLite file `queue.db`.

Window, command line and runner change it from processes of their own. Each change is one transaction of a
connection of its own, so that no change is lost, a kill leaves the state before or after it, and threads
share nothing. The table keeps the order and what the runner saw; whether a run is live is read from its run
folder. Changes are few and small, so SQLite's rollback journal is used: WAL would gain nothing here, and
it needs shared memory, which network drives do not provide.

The runner is the one process that starts the jobs, as children. It outlives the window, and its children
outlive it: a killed runner leaves its trainer running, and the next runner waits for that one before it
starts another. A job whose process died without an event (killed, or the machine went down) is started again
from its last checkpoint, once; one that failed with a reason is not, since it would fail again.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from lora_core.data.dataset import EPOCHS
from lora_core.errors import ConfigError, RunError, wrap_os_errors
from lora_core.runs.diagnosis import ExitRecorder, find_crash, last_log_sentence, notify_end
from lora_core.runs.folder import RunFolder, all_runs, check_run_name, runs_folder
from lora_core.settings.config import RunConfig, current_names, parsed_assignment
from lora_core.system import processes
from lora_core.system.files import (
    check_fields,
    file_bytes,
    fold_name,
    parse_json,
    read_json,
    unused_stem,
    write_atomically,
)

WAITING, RUNNING, PAUSED, DONE, STOPPED, FAILED = "waiting", "running", "paused", "done", "stopped", "failed"
ENDED = (DONE, STOPPED, FAILED)
MOST_SWEPT = 100
SWEEPS_KEPT = 50
ENDED_KEPT = 50
"""How many ended jobs stay listed; older ones are dropped when a job is added."""
LOCK_TIMEOUT = 60.0
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


@dataclass(frozen=True)
class QueuedRun:
    """One run in the queue.

    Attributes:
        run: its name.
        state: waiting, running, paused, done, stopped or failed.
        reason: why it failed, in a sentence.
        restarts: how often the runner started it again after its process died.
        events_bytes: size of the run's events when the state was written; a larger file means that the run
            has continued since.
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
    """The queue of one workspace.

    All that reads or writes it raises RunError where the file is not a queue or cannot be written.
    """

    def __init__(self, workspace: Path) -> None:
        """The queue of `workspace`; nothing is written before the first change."""
        self.workspace = workspace
        self.file = workspace / "queue.db"
        self.lock_file = workspace / "queue.lock"
        self.process_file = workspace / "queue.process.json"
        self.log_file = workspace / "queue.log"
        self._sweeps_file = workspace / "sweeps.json"
        self._old_file = workspace / "queue.json"

    def run(self, name: str) -> RunFolder:
        """The folder of a run in this workspace."""
        return RunFolder(runs_folder(self.workspace) / name)

    def runner(self) -> psutil.Process | None:
        """The process that runs the queue, if one does."""
        return processes.live_process(self.process_file)

    def stored_jobs(self) -> list[QueuedRun]:
        """The jobs in order as they were last written."""
        if not self.file.exists() and not self._old_file.exists():
            return []
        with self._open() as db:
            return _jobs(db)

    def jobs(self) -> list[QueuedRun]:
        """The jobs in order with their present states: what a run did outside the queue counts too."""
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
        """The rows of `queue list --json`."""
        rows: list[dict[str, Any]] = []
        position = 0
        for job in self.jobs():
            run = self.run(job.run)
            progress = run.progress()
            position += job.state == WAITING
            row = {"position": position if job.state == WAITING else None, "name": job.run}
            row |= {"path": str(run.path), "state": job.state, "step": progress.step}
            rows.append(row | {"steps": progress.steps or None, "reason": job.reason})
        return rows

    def add_new(
        self, configs: Sequence[RunConfig], create: Callable[[RunConfig], RunFolder] | None = None
    ) -> list[RunFolder]:
        """Make a run of each config and put them at the end; none of them is left where one fails.

        Several are a sweep, see `sweeps`.

        Args:
            configs: of the runs, in order.
            create: makes the folder, by default the one of the config's name.

        Raises:
            RunError: a name is taken, or a folder or the queue cannot be written.
        """
        folder = runs_folder(self.workspace)
        create = create or (lambda config: RunFolder.create(folder / config.name, config))
        made: list[RunFolder] = []
        try:
            for config in configs:
                made.append(create(config))
            if len(made) > 1:
                self._keep_sweep(made)
            self.add(*made)
        except BaseException:
            for run in made:
                shutil.rmtree(run.path, ignore_errors=True)
            raise
        return made

    def _keep_sweep(self, made: Sequence[RunFolder]) -> None:
        # Within the queue's transaction, as another process may queue a sweep too.
        with (
            self._transaction(),
            wrap_os_errors(RunError, f"The sweeps cannot be written to {self._sweeps_file}"),
        ):
            sweeps = [*self.sweeps(), [run.name for run in made]][-SWEEPS_KEPT:]
            write_atomically(self._sweeps_file, json.dumps({"sweeps": sweeps}, ensure_ascii=False).encode())

    def sweeps(self) -> list[list[str]]:
        """The names of runs that were queued together, to be compared; the newest last."""
        found = read_json(self._sweeps_file).get("sweeps")
        return [[str(name) for name in one] for one in found if isinstance(one, list)] if found else []

    def add(self, *runs: RunFolder) -> None:
        """Put runs at the end, all or none; one that is paused or ended in the queue waits again.

        Raises:
            RunError: one is not a run of this workspace, waits or is trained already, or is done.
        """
        jobs = [self._new_job(run) for run in runs]
        with self._transaction() as db:
            for job in jobs:
                _add(db, job)

    def _new_job(self, run: RunFolder) -> QueuedRun:
        if run.path.resolve() != self.run(run.name).path.resolve():
            raise RunError(f"The run {run.path} is not one of the workspace {self.workspace}.")
        if run.live_process() is not None:
            raise RunError(f"The run {run.name} is being trained already, so it cannot wait in the queue.")
        if run.status() == DONE:
            raise RunError(
                f"The run {run.name} is done; train it further with `resume {run.path} --steps N`."
            )
        return QueuedRun(run.name, events_bytes=file_bytes(run.events_file))

    def move(self, name: str, position: int) -> None:
        """Give a waiting run another place among those that wait; 1 is the next to start.

        Raises:
            RunError: it does not wait in the queue, or no such place.
        """
        with self._transaction() as db:
            job = _job(db, name)
            if job.state != WAITING:
                raise RunError(f"The run {name} is {job.state}; only jobs that wait can be moved.")
            waiting = [job.run for job in _jobs(db) if job.state == WAITING]
            if not 1 <= position <= len(waiting):
                raise RunError(
                    f"The position {position} is not one of the queue's; it goes from 1 to {len(waiting)}."
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
            RunError: it is not in the queue, or is running.
        """
        with self.removing(name):
            pass

    @contextmanager
    def removing(self, name: str) -> Iterator[None]:
        """Take a run out of the queue, as `remove` does, unless the body raises."""
        with self._transaction() as db:
            job = _job(db, name)
            if job.state == RUNNING and (self.runner() is not None or self.run(name).live_process()):
                raise RunError(f"The run {name} is still running; stop or pause it first.")
            db.execute("DELETE FROM jobs WHERE run = ?", [name])
            yield

    def take_next(self) -> QueuedRun | None:
        """The next job as it was, now marked as running: one that a killed runner left, else the first that
        waits."""
        with self._transaction() as db:
            found = [job for state in (RUNNING, WAITING) for job in _jobs(db) if job.state == state]
            job = found[0] if found else None
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
        """Whether the queue was started, and neither worked off nor paused since."""
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
        """Changes that are made together or, where the body raises, not at all."""
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
                # Earlier versions used WAL; another connection may be in the way until the next time.
                with contextlib.suppress(sqlite3.OperationalError):
                    db.execute("PRAGMA journal_mode = DELETE")
                if self._old_file.exists():
                    self._import_old(db)
                yield db
        except sqlite3.Error as error:
            raise RunError(f"The queue {self.file} {_problem(error)}") from error

    def _import_old(self, db: sqlite3.Connection) -> None:
        """Take over the queue.json of an earlier version, once."""
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
                f"The queue {self._old_file} cannot be read; fix it, or remove it to begin with an empty one."
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


def _add(db: sqlite3.Connection, job: QueuedRun) -> None:
    jobs = _jobs(db)
    if any(other.run == job.run and other.state in (WAITING, RUNNING) for other in jobs):
        raise RunError(f"The run {job.run} is in the queue already.")
    ended = [other.run for other in jobs if other.has_ended and other.run != job.run]
    db.executemany("DELETE FROM jobs WHERE run = ?", [(name,) for name in (job.run, *ended[:-ENDED_KEPT])])
    _append(db, job)


def _append(db: sqlite3.Connection, job: QueuedRun) -> None:
    db.execute(
        f"INSERT INTO jobs ({COLUMNS}, position)"
        " VALUES (?, ?, ?, ?, ?, (SELECT COALESCE(MAX(position), 0) + 1 FROM jobs))",
        dataclasses.astuple(job),
    )


def _enable(db: sqlite3.Connection, enabled: bool) -> None:
    db.execute("DELETE FROM runner")
    db.execute("INSERT INTO runner VALUES (?)", [enabled])


def _problem(error: sqlite3.Error) -> str:
    """The problem of the file and what to do, to follow its name."""
    code = (getattr(error, "sqlite_errorcode", 0) or 0) & 0xFF
    if code == sqlite3.SQLITE_BUSY:
        return "is being changed by a process that hangs."
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_ERROR):
        return f"cannot be read ({error}); fix it, or remove it to begin with an empty one."
    return f"cannot be written: {error}; make room or give the right to write there."


Axis = tuple[str, Sequence[object]]
"""A setting by its dotted name, and values as the command line takes them, or numbers."""


def sweep_configs(
    config: RunConfig,
    setting: str,
    values: Sequence[object],
    runs: Path,
    by: Sequence[Axis] = (),
    seeds: int = 1,
) -> list[RunConfig]:
    """The settings of one run for each value of a setting, named after it: "rank-8", or "NAME-rank-8".

    Args:
        config: all other settings; its name, unless it is "", begins the others.
        setting: by its dotted name.
        values: of the setting.
        runs: the folder in which the names are to be free.
        by: further settings with their values: each combination is a run.
        seeds: number of runs of each combination, from the config's seed on.

    Raises:
        ConfigError: no such setting, no value, or one that is not legal; all in one message.
    """
    axes = [(setting, values), *by]
    if not 1 <= seeds <= MOST_SWEPT:
        raise ConfigError(f"--seeds {seeds} is out of range; it must be between 1 and {MOST_SWEPT}.")
    if seeds > 1:
        axes.append(("seed", range(config.seed, config.seed + seeds)))
    texts = [[text for value in values if (text := str(value).strip())] for _, values in axes]
    if (count := math.prod(map(len, texts))) > MOST_SWEPT:
        raise ConfigError(f"{count:,} runs are too many; a sweep takes up to {MOST_SWEPT}.")
    names = [next(iter(current_names({name.strip(): None}))) for name, _ in axes]
    if double := next((name for name in names if names.count(name) > 1), ""):
        raise ConfigError(f"{double} is given twice; name each setting of a sweep once, with all its values.")
    problems: list[str] = []
    found: list[RunConfig] = []
    seen: list[RunConfig] = []
    taken = {fold_name(path.name) for path in runs.glob("*")}
    for chosen in itertools.product(*texts):
        try:
            changed = _with_values(config, zip(names, chosen, strict=True))
        except ConfigError as error:
            problems.append(str(error))
            continue
        # 1e-4 and 0.0001 are one run.
        if changed in seen:
            continue
        seen.append(changed)
        words = [config.name]
        for name, text in zip(names, chosen, strict=True):
            words.append(name.rpartition(".")[2].replace("_", "-"))
            words.append(re.sub(r"[^\w.-]+", "-", text)[: 40 // len(names)].strip("-."))
        run_name = check_run_name(unused_stem("-".join(filter(None, words)), taken))
        taken.add(fold_name(run_name))
        found.append(changed.changed({"name": run_name}))
    if problems or not found:
        raise ConfigError(" ".join(dict.fromkeys(problems)) or "Give at least one value, such as 4, 8, 16.")
    return found


def _with_values(config: RunConfig, chosen: Iterable[tuple[str, str]]) -> RunConfig:
    """The settings of a sweep's run.

    Raises:
        ConfigError: a value is not legal, or would change nothing.
    """
    changes = dict(parsed_assignment(f"{name}={text}") for name, text in chosen)
    if "name" in changes:
        raise ConfigError("Runs of a sweep are named after their values; choose another setting.")
    changed = config.changed(changes)
    for steps in EPOCHS.keys() & changes.keys():
        if changed.get(EPOCHS[steps]):
            raise ConfigError(f"{steps} follows from {EPOCHS[steps]}; try values of that instead.")
    return changed


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
    _children[workspace] = processes.start_detached(command, queue.log_file, workspace)
    return True


def run_queue(
    workspace: Path, say: Callable[[str], None], trainer: tuple[str, ...] = processes.TRAINER
) -> tuple[list[QueuedRun], bool]:
    """Train the jobs of a queue until none waits.

    Args:
        workspace: whose queue.
        say: called with a line for each start and end.
        trainer: the command that a run's path is appended to.

    Returns:
        The jobs that ended, in order, and whether a signal or a pause ended the work before its time.

    Raises:
        RunError: another process runs it already, or the queue cannot be read or written.
    """
    queue = Queue(workspace)
    other = queue.runner()
    pid = f" ({other.pid})" if other else ""
    busy = f"The queue of {workspace} is being worked through by another process{pid} already."
    if other is not None:
        raise RunError(busy)
    with processes.hold_lock(queue.lock_file, queue.process_file, busy, HANDOVER):
        runner = _Runner(queue, say, trainer)
        with processes.catch_signals(runner.on_signal):
            runner.work()
        return runner.ended, runner.must_end


class _Runner:
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
        while True:
            self._check_paused()
            if self.must_end or not self._wait_while(self._other_run):
                return
            job = self._queue.take_next()
            if job is None:
                self._queue.set_enabled(False)
                return
            self._run_job(job)

    def _check_paused(self) -> None:
        """Note whether the queue was paused; a file that cannot be read now may be readable later."""
        with contextlib.suppress(RunError):
            self.must_end = self.must_end or not self._queue.is_enabled()

    def _wait_while(self, busy: Callable[[], str]) -> bool:
        """Wait while `busy` names a run that another process trains; false where this runner must end."""
        announced = False
        while name := busy():
            self._check_paused()
            if self.must_end:
                return False
            if not announced:
                self._say(f"Waiting for the run {name}, which is still running.")
            announced = True
            time.sleep(TICK * 2)
        return True

    def _other_run(self) -> str:
        """A run that was started by hand, which the machine is left to."""
        jobs = self._queue.stored_jobs()
        if any(job.state == RUNNING for job in jobs) or not any(job.state == WAITING for job in jobs):
            return ""
        live = (run for run in all_runs(self._queue.workspace) if run.live_process() is not None)
        return next((run.name for run in live), "")

    def _run_job(self, job: QueuedRun) -> None:
        run = self._queue.run(job.run)
        if not run.config_file.is_file():
            self._end(job, FAILED, "Its folder is gone.")
            return
        if not self._wait_while(lambda: run.name if run.live_process() else ""):
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

    def _outcome_elsewhere(self, run: RunFolder, events_bytes: int) -> tuple[str, str] | None:
        """How a run that continued outside the queue ended, or None if it has more to do."""
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
        child = processes.start_detached([*self._trainer, str(run.path)], run.log_file, self._queue.workspace)
        code, last_look = None, 0.0
        while code is None:
            if time.monotonic() - last_look > LOOK:
                last_look = time.monotonic()
                recorder.sample_memory(child.pid)
                self._check_paused()
            if self.must_end:
                _ask_to_pause(run)
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = child.wait(TICK)
        recorder.record(code)
        if code == processes.INTERRUPTED and not self.must_end:
            time.sleep(TICK * 4)  # a shutdown sends its signal to all, one after the other
        return self._outcome(run, code, before)

    def _outcome(self, run: RunFolder, code: int, events_before: int) -> tuple[str, str]:
        if run.live_process() is not None:
            # Another process was quicker by a moment, and the child refused.
            if not self._wait_while(lambda: run.name if run.live_process() else ""):
                return DIED, ""
            return self._outcome_elsewhere(run, 0) or (DIED, find_crash(run).reason)
        progress = run.progress()
        status = run.status(progress)
        if code == 0 and status in (DONE, PAUSED, STOPPED):
            return status, ""
        if file_bytes(run.events_file) > events_before and status in (DONE, PAUSED, STOPPED, FAILED):
            return status, progress.reason or (last_log_sentence(run) if code == 1 else "")
        return (FAILED if code == 1 else DIED), find_crash(run).reason


def _ask_to_pause(run: RunFolder) -> None:
    """Repeat the request until it is recorded: a starting trainer voids earlier requests."""
    if not any(request["action"] == "pause" for request in run.requests()):
        with contextlib.suppress(RunError):
            run.request("pause")
