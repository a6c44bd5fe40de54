"""The queue as the window steers it: what waits, in which order, and whether it is being worked through."""

import contextlib
import threading
from pathlib import Path
from typing import Any

from app.jobs import Jobs
from lora_core.errors import RunError
from lora_core.runs.folder import RunFolder, checked_name, runs_folder
from lora_core.runs.queue import PAUSED, RUNNING, WAITING, Job, Queue
from lora_core.runs.runner import ensure_owner, pause_queue, take_up
from lora_core.settings.config import RunConfig


class Line:
    """The queue of a workspace, read anew only where its file changed."""

    def __init__(self, workspace: Path, jobs: Jobs) -> None:
        """Take up a queue that was being worked through when the machine went down."""
        self.workspace = workspace
        self.queue = Queue(workspace)
        self._runs = jobs
        self._lock = threading.Lock()
        # A queue that cannot be read is told where it is shown.
        with contextlib.suppress(RunError, OSError):
            take_up(workspace)

    def jobs(self) -> list[Job]:
        """What waits, runs or is paused, in order.

        Raises:
            RunError: the file is no queue.
        """
        if not self.queue.file.exists():
            return []
        return [job for job in self.queue.jobs() if job.left]

    def ended(self) -> list[Job]:
        """What the queue is through with, the newest first.

        Raises:
            RunError: the file is no queue.
        """
        if not self.queue.file.exists():
            return []
        return [job for job in reversed(self.queue.jobs()) if not job.left]

    @property
    def worked(self) -> bool:
        """Whether somebody works through it."""
        return self.queue.owner() is not None

    def add(self, config: RunConfig) -> RunFolder:
        """Make a run and put it at the end. While a run is going on the queue is set going behind it.

        Raises:
            RunError: the name is taken, or the queue cannot be written.
        """
        run = self._runs.create(config)
        self.queue.add(run)
        if self._runs.live() is not None:
            self.start()
        return run

    def start(self) -> None:
        """Have the queue worked through, also when the window is closed.

        Raises:
            RunError: it cannot be read.
        """
        with self._lock:
            for job in self.queue.written():
                if job.state == PAUSED:
                    self.queue.note(job.run, state=WAITING, reason="")
            ensure_owner(self.workspace)

    def pause(self) -> None:
        """Stop working through it: the run in hand is paused and waits again.

        Raises:
            RunError: the queue cannot be written.
        """
        pause_queue(self.workspace)

    def move(self, name: str, by: int) -> None:
        """Move a waiting job up or down.

        Raises:
            RunError: it does not wait, or stands at that end already.
        """
        waiting = [job.run for job in self.queue.written() if job.state == WAITING]
        if name not in waiting:
            raise RunError(f"The run {name} does not wait in the queue any more.")
        self.queue.move(name, waiting.index(name) + 1 + by)

    def remove(self, name: str) -> None:
        """Take a job out; a run that never began goes to the trash with it.

        Raises:
            RunError: it is not in the queue, or is going on.
        """
        name = checked_name(name)
        self.queue.remove(name)
        run = RunFolder(runs_folder(self.workspace) / name)
        if run.path.is_dir() and not run.events_file.exists():
            self._runs.delete(name)

    def act(self, do: str, name: str) -> None:
        """What a button of the queue asks for.

        Raises:
            RunError: it cannot be done now.
        """
        acts: dict[str, Any] = {
            "up": lambda: self.move(name, -1),
            "down": lambda: self.move(name, 1),
            "remove": lambda: self.remove(name),
            "start": self.start,
            "pause": self.pause,
        }
        if do not in acts:
            raise RunError("The queue knows no such action.")
        acts[do]()

    def holds(self, name: str) -> bool:
        """Whether a run waits here or is trained from here."""
        try:
            return any(job.run == name and job.state in (WAITING, RUNNING) for job in self.jobs())
        except RunError:
            return False
