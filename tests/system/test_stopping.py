"""Signals in a real process: taken while a context is open, as they were afterwards."""

import importlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

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


def test_an_import_ends_where_the_next_module_is_searched_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not within a module, which may be called by C++ that lets nothing pass."""
    for name, code in (
        ("first_of_two", "os.kill(os.getpid(), signal.SIGTERM)"),
        ("second_of_two", "raise AssertionError('it is not begun')"),
    ):
        made = tmp_path / f"{name}.py"
        made.write_text(
            f"import os, signal\n{code}\nopen(__file__ + '.done', 'w').close()\nimport second_of_two"
        )
    monkeypatch.syspath_prepend(tmp_path)
    wish = StopRequest()
    with wish.taken(), pytest.raises(KeyboardInterrupt), wish.raising():
        importlib.import_module("first_of_two")
    assert [file.name for file in tmp_path.glob("*.done")] == ["first_of_two.py.done"]
    assert wish not in sys.meta_path
