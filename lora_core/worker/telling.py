"""How long work in the worker says how far it is, and ends where its sender wants it no more."""

import time
from collections.abc import Callable
from typing import Any

from lora_core.worker.draw import Cancelled

EVERY = 0.1
"""Seconds between two words, so that a file of many layers does not fill the pipe."""


class Telling:
    """Answers progress for one request."""

    def __init__(self, answer: Callable[[dict[str, Any]], None], cancelled: set[str], name: str) -> None:
        """Tell through `answer` for the request `name`; `cancelled` holds the ids of those to be dropped."""
        self._answer, self._cancelled, self._name = answer, cancelled, name
        self._phase, self._told_at = "", 0.0

    def phase(self, words: str) -> None:
        """Say what is being done."""
        self._phase, self._told_at = words, 0.0
        self.step(0, 0)

    def step(self, done: int, total: int) -> None:
        """Say how far it is.

        Raises:
            Cancelled: by its sender.
        """
        if self._name in self._cancelled:
            raise Cancelled
        if time.monotonic() - self._told_at >= EVERY:
            self._told_at = time.monotonic()
            count = {"done": done, "total": total, "phase": self._phase}
            self._answer({"id": self._name, "event": "progress", **count})

    def both(self, words: str, done: int, total: int) -> None:
        """Say what is being done, and how far that is.

        Raises:
            Cancelled: by its sender.
        """
        if words != self._phase:
            self._phase, self._told_at = words, 0.0
        self.step(done, total)
