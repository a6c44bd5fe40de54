"""Which process does something: known by its number and its start, whatever the clock says."""

import errno
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lora_core.errors import RunError
from lora_core.system import processes
from lora_core.system.files import write_atomically
from lora_core.system.processes import live_process, pid_file


def test_a_process_is_known_by_its_start(tmp_path: Path) -> None:
    file = tmp_path / "process.json"
    with pid_file(file):
        assert live_process(file) == psutil.Process()
    assert live_process(file) is None


def test_a_clock_that_is_set_back_hides_no_live_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """psutil tells the start of a process by the time of day at which the machine came up, which moves
    along."""
    file = tmp_path / "process.json"
    with pid_file(file):
        if not json.loads(file.read_text())["ticks"]:
            pytest.skip("no such file on this system")
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: 1_000.0)
        assert live_process(file) is not None


def test_the_same_number_and_other_ticks_are_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "process.json"
    with pid_file(file):
        monkeypatch.setattr(processes, "_ticks", lambda pid: "another/1")
        assert live_process(file) is None


def test_a_full_drive_is_told_with_the_file_that_it_did_not_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(tmp_path / "file", b"x")
    assert caught.value.filename == str(tmp_path / "file")
    sentence = r"process\.json cannot be written: No space left on device; make room"
    with pytest.raises(RunError, match=sentence), pid_file(tmp_path / "process.json"):
        raise AssertionError("it was entered")
    assert list(tmp_path.iterdir()) == []


# Imports without the garbage collector: it is on again afterwards, whatever happened, and has less to do.


CODE = """
import gc
from lora_core.system.processes import without_collecting

with without_collecting():
    assert not gc.isenabled()
    import email.mime.text
assert gc.isenabled()
frozen = gc.get_freeze_count()
assert frozen > 1000, frozen
try:
    with without_collecting():
        raise KeyboardInterrupt
except KeyboardInterrupt:
    pass
assert gc.isenabled()
assert gc.get_freeze_count() <= frozen
gc.disable()
with without_collecting():
    pass
assert not gc.isenabled()
"""


def test_the_collector_is_as_it_was_before() -> None:
    subprocess.run([sys.executable, "-c", CODE], check=True)


def test_the_worker_collects_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lives as long as the window: only its imports are without."""
    import lora_core.worker
    from lora_core.cli.parser import function_of

    seen: list[bool] = []
    monkeypatch.setattr(lora_core.worker, "main", lambda: seen.append(gc.isenabled()))
    monkeypatch.setattr("gc.freeze", lambda: None)
    gc.enable()
    assert function_of("serve")() == 0
    assert seen == [True]
