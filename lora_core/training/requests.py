"""What people ask of a run while it trains: lines in `requests.jsonl`, and signals, which mean stop."""

import os

from lora_core.spec.run_folder import RunFolder
from lora_core.spec.stopping import Stopping


class Interrupted(BaseException):
    """Raised inside long work to leave it at once; the work done so far is kept by the conductor.

    It derives from BaseException so that no handler of ordinary errors in a library takes it for one.
    """


class Requests:
    """New requests since the last look. A look is one `stat` of a small file unless something was written."""

    def __init__(self, run: RunFolder, handled: set[str]) -> None:
        """Look at the requests of `run`; those in `handled` were acted on before."""
        self.stopping = Stopping()
        self._run = run
        self._handled = handled
        self._seen: tuple[int, int] | None = None
        self._waiting: list[dict[str, str]] = []

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

    @property
    def signalled(self) -> bool:
        """Whether a signal asked for the end."""
        return self.stopping.came

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
