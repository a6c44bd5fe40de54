"""Signals by which people and systems end a process, taken as a wish to end it well.

Ctrl-C, SIGTERM from whoever supervises a process, and SIGHUP from a terminal that is closed mean the same:
stop, and keep the work.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130
"""The exit code of a process that left on such a signal."""
_ENDING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
_KEYS = ("SIGINT", "SIGBREAK")
"""Those that a person sends from a keyboard."""


def _numbers(names: tuple[str, ...]) -> list[signal.Signals]:
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


@contextmanager
def signals_taken(take: Callable[[int], None]) -> Iterator[None]:
    """While the context is open, `take` is called with the number of each signal that would end the process.

    Python lets only the main thread do so; in another nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        take(number)

    kept = {number: signal.signal(number, on_signal) for number in _numbers(_ENDING)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


class Stopping:
    """Whether a signal asked this process to end. A second Ctrl-C ends it at once.

    Only that one: closing a terminal sends SIGHUP from the shell and from the system, and whoever supervises
    a process may say SIGTERM twice.

    Attributes:
        came: whether one did.
    """

    def __init__(self) -> None:
        """None came yet."""
        self.came = False
        self._by_key = False
        self._raises = False
        self._taken = False

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Take the signals while the context is open; inside another such context it changes nothing."""
        if self._taken:
            yield
            return
        self._taken = True
        try:
            with signals_taken(self._take):
                yield
        finally:
            self._taken = False

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Have a signal end what is done while the context is open, such as an import, by a
        KeyboardInterrupt.

        Raises:
            KeyboardInterrupt: a signal came, also where a library passed over it or made another error of it.
        """
        self._raises = True
        try:
            self._raise_if_came()
            yield
        except Exception:
            self._raise_if_came()
            raise
        finally:
            self._raises = False
        self._raise_if_came()

    def _raise_if_came(self) -> None:
        if self.came:
            raise KeyboardInterrupt

    def _take(self, number: int) -> None:
        if number in _numbers(_KEYS):
            if self._by_key:
                os._exit(INTERRUPTED)
            self._by_key = True
        self.came = True
        if self._raises:
            raise KeyboardInterrupt
