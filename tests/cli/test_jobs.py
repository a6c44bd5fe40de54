"""Ctrl-C while torch is still being imported, seconds before the trainer itself can take it as a stop."""

import os
import signal
import subprocess
import sys

import pytest

from lora_core.spec.run_folder import RunFolder

# A child of a background job is born deaf to SIGINT, which nobody at a keyboard is.
LISTENING = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    " from lora_core.__main__ import main; sys.exit(main())"
)


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to a single child")
def test_an_early_ctrl_c_is_a_stop(tmp_path):
    command = [
        sys.executable,
        "-c",
        LISTENING,
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
