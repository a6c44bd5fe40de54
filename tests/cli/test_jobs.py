"""Signals while torch is still being imported, seconds before the trainer itself can take them as a stop."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_core.runs.events import Stopped, read_events
from lora_core.runs.folder import RunFolder
from lora_core.settings.config import RunConfig
from tests.train.runs import SETTINGS
from tests.waiting import PATIENCE, wait_for
from tests.warm import program

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows sends no signals to a single child")

# A child of a background job is born deaf to SIGINT, which nobody at a keyboard is.
LISTENING = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    " from lora_core.__main__ import main; sys.exit(main())"
)
# As the real import, but it says when it begins, and it passes over what interrupts it, as libraries may.
DEAF_IMPORT = """
import builtins, contextlib, sys, time
real = builtins.__import__
def slow(name, *more, **named):
    if name == "lora_core.train.trainer":
        print("importing", flush=True)
        with contextlib.suppress(BaseException):
            time.sleep(600)
    return real(name, *more, **named)
builtins.__import__ = slow
from lora_core.__main__ import main
sys.exit(main())
"""


def child(code: str, *arguments: str, python: str = sys.executable) -> "subprocess.Popen[str]":
    command = [python, "-c", code, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def check_stopped(process: "subprocess.Popen[str]", run: RunFolder) -> None:
    _, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (130, "")
    assert run.status() == "stopped"
    assert [type(event) for event in read_events(run.events_file)[0]] == [Stopped]
    assert run.live_process() is None
    assert [path for path in run.path.rglob(".*") if path.suffix == ".tmp"] == []


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_an_early_signal_is_a_stop(tmp_path: Path, name: str) -> None:
    process = child(LISTENING, "train", "demo", "--name", "early", "--workspace", str(tmp_path))
    run = RunFolder(tmp_path / "runs" / "early")
    assert process.stdout is not None
    process.stdout.readline()  # "Run early in ...", just before the import
    wait_for(run.requests_file.exists, process)
    time.sleep({"SIGINT": 0.0, "SIGTERM": 0.4, "SIGHUP": 0.8}[name])
    process.send_signal(getattr(signal, name))
    check_stopped(process, run)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_that_a_library_passes_over_counts_all_the_same(tmp_path: Path, name: str) -> None:
    run = RunFolder.create(tmp_path / "runs" / "deaf", RunConfig().changed({**SETTINGS, "name": "deaf"}))
    process = child(DEAF_IMPORT, "resume", str(run.path), python=program("engine"))
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(getattr(signal, name))
    check_stopped(process, run)


def test_a_signal_before_there_is_a_run_leaves_none(tmp_path: Path) -> None:
    code = LISTENING.replace(
        "; sys.exit",
        "; import os, lora_core.runs.preflight as checks;"
        " checks.preflight = lambda *some: os.kill(os.getpid(), signal.SIGTERM); sys.exit",
    )
    words = ["train", "demo", "--name", "none", "--workspace", str(tmp_path)]
    process = child(code, *words, python=program("engine"))
    said, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, said, errors) == (130, "", "")
    assert not (tmp_path / "runs").exists() or list((tmp_path / "runs").iterdir()) == []
