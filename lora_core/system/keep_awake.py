"""Keeps the computer awake during a run, by each system's own means.

Best effort: where a system has no such means or refuses, the run continues as it would have.
"""

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WHY = "A training run is going on"
_CONTINUOUS, _SYSTEM_REQUIRED = 0x80000000, 0x00000001
_SYSTEMD = Path("/run/systemd/system")
"""There on machines that systemd runs, and nowhere else: sd_booted(3)."""


@contextmanager
def keep_awake(system: str = sys.platform) -> Iterator[None]:
    """The computer does not go to sleep by itself while the context is open; its screen may.

    The process that holds it awake ends with this one, however this one ends.
    """
    command = _command(system)
    holder = None
    if system == "win32":
        _windows(_CONTINUOUS | _SYSTEM_REQUIRED)
    elif command:
        holder = _start(command)
    try:
        yield
    finally:
        if system == "win32":
            _windows(_CONTINUOUS)
        if holder is not None:
            _end(holder)


def _command(system: str) -> list[str]:
    """The program that keeps this system awake, or [] where there is none."""
    if system == "darwin" and shutil.which("caffeinate"):
        return ["caffeinate", "-i", "-w", str(os.getpid())]
    if system == "linux" and shutil.which("systemd-inhibit") and _SYSTEMD.is_dir():
        # `cat` ends when its input does, and that ends with this process, even if it is killed.
        return ["systemd-inhibit", "--what=idle:sleep", "--who=LoRA Easel", f"--why={WHY}", "cat"]
    return []


def _start(command: list[str]) -> "subprocess.Popen[bytes] | None":
    with contextlib.suppress(OSError):
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # Ctrl-C is for the trainer, which still has work to save.
            start_new_session=True,
        )
    return None


def _end(holder: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        if holder.stdin is not None:
            holder.stdin.close()
        holder.terminate()
        holder.wait(5)


def _windows(state: int) -> None:
    """SetThreadExecutionState of kernel32."""
    library: Any = getattr(ctypes, "windll", None)
    if library is not None:
        library.kernel32.SetThreadExecutionState(ctypes.c_uint(state))
