"""The one writer of a run's `events.jsonl`: lines appended to a file that others read meanwhile."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from lora_core.spec.events import Event, Warned, to_line


def complain(sentence: str) -> None:
    """Say on stderr what cannot be said in the events; a stderr that nobody reads is no reason to fail."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{sentence}\n")
        sys.stderr.flush()


class EventWriter:
    """The one writer of an events file.

    Each line is one write, so that a kill leaves at most one half line. A line that cannot be written is
    lost and said elsewhere: no run ends because of its diary. When lines can be written again, the hole is
    told in one.
    """

    def __init__(self, path: Path, say: Callable[[str], None] = complain) -> None:
        """Append to `path`; what goes wrong with it is given to `say`."""
        self._path = path
        self._say = say
        self._handle: int | None = None
        self._lost = 0
        self._reason = ""
        with self._surviving():
            self._handle = opened_for_lines(path)

    def write(self, event: Event) -> None:
        """Append one line."""
        lost = self._lost
        with self._surviving():
            if lost:
                self._append(Warned(step=event.step, message=self._hole()))
                self._lost = 0
            self._append(event)

    def close(self) -> None:
        """Close the file."""
        if self._handle is not None:
            handle, self._handle = self._handle, None
            with contextlib.suppress(OSError):
                os.close(handle)

    def _append(self, event: Event) -> None:
        if self._handle is None:
            self._handle = opened_for_lines(self._path)
        write_line(self._handle, to_line(event).encode())

    def _hole(self) -> str:
        lines = "line" if self._lost == 1 else "lines"
        return (
            f"{self._lost} {lines} about this run could not be written ({self._reason}); the training itself"
            " went on."
        )

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        """What is written inside may fail; the file is opened anew for the next line, which ends a half
        one."""
        try:
            yield
        except OSError as error:
            self.close()
            self._reason = error.strerror or str(error)
            if not self._lost:
                self._say(f"The events cannot be written to {self._path}: {self._reason}. The run goes on.")
            self._lost += 1


def opened_for_lines(path: Path) -> int:
    """The file, open for appending; a half line left by a killed writer is ended first.

    Raises:
        OSError: it cannot be opened or written.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o644)
    try:
        size = os.fstat(handle).st_size
        if size:
            os.lseek(handle, size - 1, os.SEEK_SET)
            if os.read(handle, 1) != b"\n":
                os.write(handle, b"\n")
    except OSError:
        os.close(handle)
        raise
    return handle


def write_line(handle: int, line: bytes) -> None:
    """Write all of a line; a drive that is about to be full takes a piece of it without an error.

    Raises:
        OSError: it cannot be written.
    """
    while line:
        line = line[os.write(handle, line) :]
