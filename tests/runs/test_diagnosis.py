"""Why a run broke off: real processes that end in real ways, and what is said of each."""

import json
import os
import re
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from lora_core.runs import diagnosis, events
from lora_core.runs.diagnosis import ExitRecorder, exit_file, find_crash, read_exit, resume_step
from lora_core.runs.events import EventWriter
from lora_core.runs.folder import RunFolder, runs_folder
from lora_core.settings.config import RunConfig
from tests.warm import program

ROOT = Path(__file__).resolve().parents[2]
BEGINNING = """
import ctypes, os, signal, sys
from pathlib import Path
from lora_core.runs import events
from lora_core.runs.events import EventWriter
from lora_core.runs.folder import RunFolder
run = RunFolder(Path(sys.argv[1]))
writer = EventWriter(run.events_file)
def start():
    writer.write(events.Started(steps=9, pid=os.getpid(), device="cpu", threads=1, versions={}))
    writer.write(events.StepDone(step=8, loss=1.0, lr=1.0, seconds=0.1))
"""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(runs_folder(tmp_path) / "one", RunConfig())


def ended(run: RunFolder, code: str) -> None:
    """A child that does `code`, watched as the owner of the queue does it."""
    recorder = ExitRecorder(run)
    with open(run.log_file, "ab") as log:
        command = [program("engine"), "-c", BEGINNING + code, str(run.path)]
        env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        child = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=env)
    while child.poll() is None:
        recorder.sample_memory(child.pid)
        time.sleep(0.02)
    recorder.record(child.returncode)


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("start(); os.kill(os.getpid(), 9)", r"Its process was killed at step 8 \(signal 9\), by a user.*"),
        ("start(); os.kill(os.getpid(), 15)", r"Its process was ended by the signal SIGTERM at step 8\."),
        (
            "start(); ctypes.string_at(0)",
            r"Its process crashed at step 8 in compiled code \(SIGSEGV\), which points to .*",
        ),
        ("start(); os.abort()", r"Its process crashed at step 8 in compiled code \(SIGABRT\).*"),
        ("start(); os._exit(7)", r"Its process ended with code 7 at step 8\."),
        (
            "start(); {}['weights']",
            r"A defect of the program at step 8: KeyError: 'weights'\.",
        ),
        (
            "start(); writer.write(events.Failed(step=8, reason='a.png is cut short.')); sys.exit(1)",
            r"a\.png is cut short\.",
        ),
        ("print('Hello'); sys.exit('The rank is 0.')", r"The rank is 0\."),
        (
            "writer.write(events.Started(steps=9, pid=1, device='cpu', threads=1, versions={}));"
            "writer.write(events.Preparing(phase='Encoding images', done=1, total=2));"
            "os.kill(os.getpid(), 9)",
            r"Its process was killed at “Encoding images” \(signal 9\).*",
        ),
        ("start(); writer.write(events.Finished(step=9, export=''))", r""),
        ("start(); writer.write(events.Paused(step=9))", r""),
        ("start(); writer.write(events.Stopped(step=9, export='')); sys.exit(130)", r""),
    ],
)  # fmt: skip
def test_what_is_said(run: RunFolder, code: str, sentence: str) -> None:
    ended(run, code)
    assert re.fullmatch(sentence, find_crash(run).reason), find_crash(run).reason


def test_an_earlier_end_is_not_mistaken_for_the_last(run: RunFolder) -> None:
    assert find_crash(run).reason == ""  # never started
    ended(run, "start(); {}['weights']")
    ended(run, "start(); os._exit(7)")
    assert find_crash(run).reason == "Its process ended with code 7 at step 8."
    ended(run, "start(); writer.write(events.Failed(step=8, reason='The first.')); sys.exit(1)")
    ended(run, "sys.exit('The second.')")
    assert find_crash(run).reason == "The second."
    # Somebody trains it by hand, and nobody watches: the note of the last exit is old.
    writer = EventWriter(run.events_file)
    writer.write(events.Started(steps=9, pid=1, device="cpu", threads=1, versions={}))
    writer.close()
    assert read_exit(run) is None
    assert find_crash(run).reason.startswith("Its process ended before its first step without saying why")


def test_a_live_run_has_not_crashed(run: RunFolder) -> None:
    ended(run, "start(); os._exit(7)")
    with run.hold():
        assert find_crash(run).reason == ""


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize(
    ("held", "free", "kills", "words"),
    [
        (14.2, 0.4, 0, "killed at step 8, probably because memory ran out: it held 14.2 of 16.0 GB"),
        (13.0, 5.0, 0, "probably because memory ran out: it held 13.0 of 16.0 GB"),
        (3.0, 9.0, 0, "by a user or another program"),
        (3.0, 9.0, 1, "The system killed its process at step 8 because memory ran out: it held 3.0 of 16.0"),
    ],
)
def test_who_killed_it(run: RunFolder, held: float, free: float, kills: int, words: str) -> None:
    ended(run, "start(); os.kill(os.getpid(), 9)")
    note = json.loads(exit_file(run).read_text())
    assert note["code"] == -9
    assert 0 < note["held"] < note["total"] == psutil.virtual_memory().total
    note |= {"held": int(held * 1e9), "free": int(free * 1e9), "total": int(16e9), "kills": kills}
    exit_file(run).write_text(json.dumps(note))
    assert words in find_crash(run).reason
    assert ("train.batch_size" in find_crash(run).reason) == ("memory" in words)
    assert find_crash(run).cause == ("out_of_memory" if "memory" in words else "")


def test_windows_codes(run: RunFolder) -> None:
    """Popen gives the unsigned number there."""
    for code, words in (
        (0xC0000005, "crashed at step 8 in compiled code (code 0xc0000005)"),
        (0xC000012D, "ran out of memory at step 8; lower train.batch_size"),
    ):
        ended(run, "start()")
        note = json.loads(exit_file(run).read_text())
        exit_file(run).write_text(json.dumps(note | {"code": code}))
        assert words in find_crash(run).reason


def test_the_machine_went_down(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = EventWriter(run.events_file)
    writer.write(events.Started(time=1000.0, steps=9, pid=1, device="cpu", threads=1, versions={}))
    writer.write(events.StepDone(time=1001.0, step=5, loss=1.0, lr=1.0, seconds=0.1))
    writer.close()
    monkeypatch.setattr(diagnosis.psutil, "boot_time", lambda: 2000.0)
    assert find_crash(run).reason == "The computer was shut down or lost power while the run was at step 5."
    monkeypatch.setattr(diagnosis.psutil, "boot_time", lambda: 500.0)
    run.log_file.write_text("step 5 of 9\nKilled\n")
    assert find_crash(run).reason == "Its process ended at step 5 without saying why; its last words: Killed."


def test_the_step_that_a_resume_begins_with(run: RunFolder) -> None:
    assert resume_step(run) == 0
    for step in (4, 8):
        folder = run.checkpoint(step)
        folder.mkdir()
        save_file({"a": torch.zeros(8)}, folder / "adapter.safetensors")
        (folder / "state.json").write_text(json.dumps({"sha256": {"adapter.safetensors": "0"}}))
    assert resume_step(run) == 8
    path = run.checkpoint(8) / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    assert resume_step(run) == 4
    (run.checkpoint(4) / "state.json").write_text("{")
    assert resume_step(run) == 0
