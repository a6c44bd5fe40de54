"""The queue as the window steers it: what waits, in which order, and whether it is run."""

import contextlib
import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path

from app.jobs import Jobs
from lora_core.errors import RunError
from lora_core.runs.folder import RunFolder, check_run_name, runs_folder
from lora_core.runs.queue import (
    PAUSED,
    RUNNING,
    WAITING,
    Queue,
    QueuedRun,
    ensure_runner,
)
from lora_core.settings.config import RunConfig


class QueueClient:
    """The queue of a workspace, for its window."""

    def __init__(self, workspace: Path, jobs: Jobs) -> None:
        """Go on with a queue that ran when the machine went down."""
        self.workspace = workspace
        self.queue = Queue(workspace)
        self._runs = jobs
        self._lock = threading.Lock()
        # A queue that cannot be read says so where it is shown.
        with contextlib.suppress(RunError, OSError):
            if self.queue.is_enabled():
                ensure_runner(workspace)

    def jobs(self) -> list[QueuedRun]:
        """What waits, runs or is paused, in order.

        Raises:
            RunError: the file is not a queue.
        """
        return [job for job in self.queue.jobs() if not job.has_ended]

    @property
    def is_running(self) -> bool:
        """Whether a process runs the queue."""
        return self.queue.runner() is not None

    def add(self, config: RunConfig) -> RunFolder:
        """Make a run and put it at the end. While a run is going on the queue is started behind it.

        Raises:
            RunError: the name is taken, or the queue cannot be written.
        """
        run = self._runs.create(config)
        self.queue.add(run)
        if self._runs.live() is not None:
            self.start()
        return run

    def start(self) -> None:
        """Start the queue, which goes on when the window is closed.

        Raises:
            RunError: it cannot be read.
        """
        with self._lock:
            for job in self.queue.stored_jobs():
                if job.state == PAUSED:
                    self.queue.update(dataclasses.replace(job, state=WAITING, reason=""))
            ensure_runner(self.workspace)

    def move(self, name: str, by: int) -> None:
        """Move a waiting job up or down.

        Raises:
            RunError: it does not wait, or is at that end already.
        """
        waiting = [job.run for job in self.queue.stored_jobs() if job.state == WAITING]
        if name not in waiting:
            raise RunError(f"The run {name} does not wait in the queue any more.")
        self.queue.move(name, waiting.index(name) + 1 + by)

    def remove(self, name: str) -> None:
        """Take a job out; a run that never began goes to the trash with it.

        Raises:
            RunError: it is not in the queue, or is going on.
        """
        name = check_run_name(name)
        self.queue.remove(name)
        run = RunFolder(runs_folder(self.workspace) / name)
        if run.path.is_dir() and not run.events_file.exists():
            self._runs.delete(name)

    def act(self, action: str, name: str) -> None:
        """Do what a button of the queue asks for.

        Raises:
            RunError: it cannot be done now.
        """
        actions: dict[str, Callable[[], None]] = {
            "up": lambda: self.move(name, -1),
            "down": lambda: self.move(name, 1),
            "remove": lambda: self.remove(name),
            "start": self.start,
            "pause": lambda: self.queue.set_enabled(False),
        }
        if action not in actions:
            raise RunError("The queue knows no such action.")
        actions[action]()

    def holds(self, name: str) -> bool:
        """Whether a run waits here or is trained from here."""
        try:
            return any(job.run == name and job.state in (WAITING, RUNNING) for job in self.jobs())
        except RunError:
            return False
