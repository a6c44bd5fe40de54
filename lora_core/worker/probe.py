"""The worker's verb `probe`: what a step of some settings takes, by taking a few."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_core.settings.config import RunConfig
from lora_core.train.step_timing import time_steps
from lora_core.worker.draw import Cancelled

Request = dict[str, Any]


class Probe:
    """The verb, and how it tells and is told."""

    def __init__(
        self,
        answer: Callable[[dict[str, Any]], None],
        cancelled: set[str],
        release: Callable[[Request], dict[str, Any]],
    ) -> None:
        """Send answers through `answer`; `cancelled` holds ids to be dropped; `release` empties the
        memory."""
        self._answer = answer
        self._cancelled = cancelled
        self._release = release

    def probe(self, request: Request) -> dict[str, Any]:
        """Take some steps of `config`, as `time_steps`; `aside` is where weights may be offloaded to."""
        name = str(request["id"])

        def on_step(done: int, total: int) -> None:
            if done:
                self._answer({"id": name, "event": "progress", "done": done, "total": total})
            if name in self._cancelled:
                raise Cancelled

        # Never two bases at once: there may be memory for one.
        self._release({})
        try:
            folder = Path(str(request.get("aside") or tempfile.gettempdir()))
            return time_steps(RunConfig.from_dict(request["config"]), folder, on_step)
        finally:
            self._release({})
