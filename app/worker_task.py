"""A task that a page starts in the worker and follows. One at a time, independent of the page: a page that
returns finds its state."""

import logging
import threading
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from app.formatting import pluralize
from app.live import LiveStream
from app.routes import add_actions
from app.templates import problem_html
from app.worker_client import Reply, WorkerClient
from lora_core.errors import LoraError, RunError

UNSHOWN = "The result cannot be shown because of a bug in LoRA Easel; its log has the details."
BUSY = "A tool is already running; wait for it, or cancel it."


class BackgroundTask:
    """The current task, or the last one."""

    def __init__(self, worker: WorkerClient) -> None:
        """Run tasks in `worker`."""
        self._worker = worker
        self._lock = threading.Lock()
        self._reply: Reply | None = None
        self._shows: Callable[[dict[str, Any]], str] = lambda result: ""
        self._name = ""
        self._html = ""
        self._revision = 0
        self._told = True
        self.title = ""

    @property
    def working(self) -> bool:
        """Whether a task is running."""
        reply = self._reply
        return reply is not None and not reply.finished.is_set()

    def start(
        self, title: str, request: dict[str, Any], shows: Callable[[dict[str, Any]], str], name: str = ""
    ) -> None:
        """Start a task.

        Args:
            title: what it is called while it is under way.
            request: for the worker.
            shows: makes HTML of its answer.
            name: tells a page what the answer belongs to.

        Raises:
            RunError: something is under way.
        """
        with self._lock:
            if self.working:
                raise RunError(BUSY)
            self.title, self._shows, self._told, self._name = title, shows, False, name
            self._reply = self._worker.submit(request)

    def cancel(self) -> None:
        """Cancel the running task."""
        reply = self._reply
        if reply is not None and self.working:
            self._worker.cancel(reply)

    def now(self) -> dict[str, Any]:
        """The state, and what the last task came to while none is running."""
        with self._lock:
            reply = self._reply
            if reply is not None and reply.finished.is_set() and not self._told:
                self._told, self._revision = True, self._revision + 1
                self._html = self._outcome(reply)
            state = "idle" if reply is None else "working" if self.working else reply.state
            said = {"state": state, "words": self._words(), "revision": self._revision, "name": self._name}
            if reply is not None and state == "working":
                said |= {"done": reply.done, "total": reply.total}
            return said | ({} if state == "working" else {"html": self._html})

    def _outcome(self, reply: Reply) -> str:
        if reply.state == "error":
            return problem_html(reply.message)
        try:
            return self._shows(reply.result)
        except LoraError as error:
            return problem_html(error)
        except Exception:
            logging.getLogger(__name__).exception("The result of %s cannot be shown", self.title)
            return problem_html(UNSHOWN)

    def _words(self) -> str:
        reply = self._reply
        if reply is None or not self.working:
            return ""
        ahead = self._worker.ahead_of(reply)
        if ahead:
            return f"{self.title}: waits for {pluralize(ahead, 'other request')}"
        said = reply.phase or reply.message
        count = f", {reply.done:,} of {reply.total:,}" if reply.total > 1 else ""
        return f"{self.title}: {said[:1].lower() + said[1:]}{count}" if said else f"{self.title}"


def add_task(app: FastAPI, live: LiveStream, name: str, task: BackgroundTask) -> None:
    """Tell pages of a task by the live stream, and let them cancel it at `/easel/NAME/cancel`."""
    live.feeds[name] = task.now
    add_actions(app, {f"{name}/cancel": lambda sent: task.cancel()})
