"""What people ask of a run while it trains: lines in `requests.jsonl`, and signals, which mean stop."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lora_core.spec.run_folder import RunFolder

INTERRUPTED = 130
"""The exit code of a process that left on Ctrl-C."""


class Interrupted(BaseException):
    """Raised inside long work to leave it at once; the work done so far is kept by the conductor.

    It derives from BaseException so that no handler of ordinary errors in a library takes it for one.
    """


class Requests:
    """New requests since the last look. A look is one `stat` of a small file unless something was written."""

    def __init__(self, run: RunFolder, handled: set[str]) -> None:
        """Look at the requests of `run`; those in `handled` were acted on before."""
        self._run = run
        self._handled = handled
        self._seen: tuple[int, int] | None = None
        self._waiting: list[dict[str, str]] = []
        self.signalled = False
        self._interrupted = False

    def waiting(self) -> list[dict[str, str]]:
        """Requests that nobody has acted on, in order."""
        try:
            found = os.stat(self._run.requests_file)
        except FileNotFoundError:
            return []
        now = (found.st_mtime_ns, found.st_size)
        if now != self._seen:
            self._seen = now
            self._waiting = [r for r in self._run.requests() if r["id"] not in self._handled]
        return self._waiting

    def done(self, request: dict[str, str]) -> None:
        """Note that a request was acted on."""
        self._handled.add(request["id"])
        self._waiting = [r for r in self._waiting if r["id"] != request["id"]]

    def ending(self) -> bool:
        """Whether the run is asked to end soon."""
        return self.signalled or any(r["do"] in ("stop", "pause") for r in self.waiting())

    def check(self) -> None:
        """Leave long work if the run is asked to end.

        Raises:
            Interrupted: it is.
        """
        if self.ending():
            raise Interrupted

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Take a signal as a stop that keeps the work; a second Ctrl-C ends the process at once.

        Only that one: closing a terminal sends SIGHUP from the shell and from the system, and whoever
        supervises a process may say SIGTERM twice.
        """
        interrupts = (signal.SIGINT, getattr(signal, "SIGBREAK", None))

        def on_signal(number: int, frame: FrameType | None) -> None:
            if number in interrupts:
                if self._interrupted:
                    os._exit(INTERRUPTED)
                self._interrupted = True
            self.signalled = True

        names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        kept = {number: signal.signal(number, on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)
