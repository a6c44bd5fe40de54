"""The processor and who may keep it busy by waiting: of all our processes one at a time.

The threads of torch wait for each other hundreds of times a step. Libgomp has them spin meanwhile, which is
fast as long as each has a core for itself, and ruinous where two processes do it on the same cores: each
spins away the time that the other's threads would need to arrive.
"""

import contextlib
import os
import sys
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout

VARIABLE = "GOMP_SPINCOUNT"
SOON = "1000"
"""Turns after which a waiting thread goes to sleep; libgomp's own are 300,000."""
COMPUTES, GIVES_WAY, SLEEPS = "computes", "gives way", "sleeps"
"""What a process is: one that a person waits for, which spins where it has the right; one that asks
`others_compute` before each piece of work, and takes one thread where they do, which waits for nobody; any
other, whose waiting threads sleep soon."""
PATIENCE = 0.3
"""Seconds to wait for the right: who only asks whether somebody has it holds it for a moment."""

_kept: list[FileLock] = []


def share_processor(kind: str) -> None:
    """Let threads that wait spin, or have them go to sleep soon, as becomes the kind of this process.

    Call it before torch is imported. Nothing of it changes a result. The right ends with the process, however
    it ends. What a person has set stays. Steps of the demo on two cores of a virtual machine: 0.14 s
    spinning, 0.28 s sleeping; two trainings at once 0.35 s where one or none spins, 1.2 to 2 s where both do;
    beside a process of one thread 0.14 s spinning, 0.34 s sleeping.
    """
    if not _to_be_shared():
        return
    if kind == GIVES_WAY or (kind == COMPUTES and _may_spin()):
        os.environ.pop(VARIABLE, None)
    else:
        os.environ[VARIABLE] = SOON


def others_compute() -> bool:
    """Whether another of our processes has the right to spin now."""
    if _kept or not sys.platform.startswith("linux"):
        return False
    lock = _lock()
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return True
    lock.release()
    return False


def _to_be_shared() -> bool:
    return sys.platform.startswith("linux") and os.environ.get(VARIABLE, SOON) == SOON


def _lock() -> FileLock:
    return FileLock(Path(tempfile.gettempdir()) / f"lora-easel-processor-{os.getuid()}.lock")


def _may_spin() -> bool:
    if not _kept:
        lock = _lock()
        with contextlib.suppress(Timeout, OSError):
            lock.acquire(timeout=PATIENCE)
            _kept.append(lock)
    return bool(_kept)
