"""Work on LoRA files that takes a while: one piece at a time in the worker, and what came of it.

The work goes on without the page; a page that comes back finds where it is.
"""

import threading
from collections.abc import Callable
from typing import Any

from app.words import safe
from app.worker import Reply, Worker
from lora_core.spec.errors import RunError

BUSY = "One look is under way already; wait for it, or cancel it."


class Job:
    """The piece of work in hand, or the last one."""

    def __init__(self, worker: Worker) -> None:
        """Work through `worker`."""
        self._worker = worker
        self._lock = threading.Lock()
        self._reply: Reply | None = None
        self._shows: Callable[[dict[str, Any]], str] = lambda result: ""
        self._html = ""
        self._revision = 0
        self._told = True
        self.title = ""

    @property
    def working(self) -> bool:
        """Whether something is under way."""
        reply = self._reply
        return reply is not None and not reply.finished.is_set()

    @property
    def result(self) -> dict[str, Any]:
        """What the last piece of work answered; {} where it failed or there was none."""
        reply = self._reply
        return dict(reply.result) if reply is not None and reply.state == "done" else {}

    def start(self, title: str, request: dict[str, Any], shows: Callable[[dict[str, Any]], str]) -> None:
        """Begin.

        Args:
            title: what it is called while it is under way.
            request: for the worker.
            shows: makes HTML of its answer.

        Raises:
            RunError: something is under way.
        """
        with self._lock:
            if self.working:
                raise RunError(BUSY)
            self.title, self._shows, self._told = title, shows, False
            self._reply = self._worker.submit(request)

    def cancel(self) -> None:
        """Drop what is under way."""
        reply = self._reply
        if reply is not None and self.working:
            self._worker.cancel(reply)

    def now(self, known: int) -> dict[str, Any]:
        """Where it is; the HTML only for a page that knows another revision of it."""
        with self._lock:
            reply = self._reply
            if reply is not None and reply.finished.is_set() and not self._told:
                self._told, self._revision = True, self._revision + 1
                self._html = self._outcome(reply)
            state = "idle" if reply is None else "working" if self.working else reply.state
            said = {"state": state, "words": self._words(), "revision": self._revision}
            if reply is not None and state == "working":
                said |= {"done": reply.done, "total": reply.total}
            return said | ({"html": self._html} if known != self._revision else {})

    def _outcome(self, reply: Reply) -> str:
        if reply.state == "error":
            return f'<p class="problem" role="alert">{safe(reply.message)}</p>'
        return self._shows(reply.result)

    def _words(self) -> str:
        reply = self._reply
        if reply is None or not self.working:
            return ""
        ahead = self._worker.ahead_of(reply)
        if ahead:
            return f"{self.title}: waits for {ahead} other {'request' if ahead == 1 else 'requests'}"
        said = reply.phase or reply.message
        count = f", {reply.done:,} of {reply.total:,}" if reply.total > 1 else ""
        return f"{self.title}: {said[:1].lower() + said[1:]}{count}" if said else f"{self.title}"
