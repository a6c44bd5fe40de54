"""Ctrl-C while torch is still being imported, seconds before the trainer itself can take it as a stop."""

import os
import signal
import subprocess
import sys

import pytest

from lora_core.spec.run_folder import RunFolder


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to a single child")
def test_an_early_ctrl_c_is_a_stop(tmp_path):
    command = [
        sys.executable,
        "-m",
        "lora_core",
        "train",
        "demo",
        "--name",
        "early",
        "--workspace",
        str(tmp_path),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = RunFolder(tmp_path / "runs" / "early")
    assert process.stdout is not None
    process.stdout.readline()  # "Run early in ...", just before the import
    while not run.requests_file.exists():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (130, "")
    assert run.status() == "stopped"
    assert run.live_process() is None
