"""Signals in a real process: taken while a context is open, as they were afterwards."""

import os
import signal
import sys
import threading
import time

import pytest

from lora_core.system import processes
from lora_core.system.processes import StopRequest, catch_signals

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has other signals")


def send(name: str) -> None:
    os.kill(os.getpid(), getattr(signal, name))
    time.sleep(0.01)


def test_signals_are_given_back() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    taken: list[int] = []
    with catch_signals(taken.append):
        for name in ("SIGTERM", "SIGHUP", "SIGINT"):
            send(name)
    assert taken == [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]
    assert [signal.getsignal(number) for number in numbers] == before


def test_another_thread_changes_nothing() -> None:
    found: list[object] = []

    def look() -> None:
        with catch_signals(lambda number: None):
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [before]


def test_a_second_ctrl_c_leaves_and_other_signals_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(processes.os, "_exit", codes.append)
    wish = StopRequest()
    with wish.taken(), wish.taken():
        for name in ("SIGTERM", "SIGTERM", "SIGHUP", "SIGINT"):
            send(name)
        assert wish.came
        assert codes == []
        send("SIGINT")
    assert codes == [130]


@pytest.mark.parametrize("error", [None, ImportError("half")])
def test_within_an_import_it_ends_it_however_that_is_taken(error: Exception | None) -> None:
    wish = StopRequest()

    def imported() -> None:
        try:
            send("SIGTERM")
        except KeyboardInterrupt:
            if error is not None:
                raise error from None

    with wish.taken():
        with pytest.raises(KeyboardInterrupt), wish.raising():
            imported()
        send("SIGTERM")  # no longer
        with pytest.raises(KeyboardInterrupt), wish.raising():
            raise AssertionError("it is not begun")
    with pytest.raises(ImportError), StopRequest().raising():
        raise ImportError("its own")
