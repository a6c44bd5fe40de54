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

_kept: list[FileLock] = []


def share_processor(computes: bool) -> None:
    """Let threads that wait spin if no other of our processes may, else have them go to sleep soon.

    Call it before torch is imported. Nothing of it changes a result. The right ends with the process, however
    it ends. What a person has set stays. Steps of the demo on two cores of a virtual machine: 0.14 s
    spinning, 0.28 s sleeping; two trainings at once 0.35 s where one or none spins, 1.2 to 2 s where both do.

    Args:
        computes: whether this process works through something that a person waits for; others sleep in any
            case.
    """
    if not sys.platform.startswith("linux") or os.environ.get(VARIABLE, SOON) != SOON:
        return
    if computes and _may_spin():
        os.environ.pop(VARIABLE, None)
    else:
        os.environ[VARIABLE] = SOON


def _may_spin() -> bool:
    if not _kept:
        lock = FileLock(Path(tempfile.gettempdir()) / f"lora-easel-processor-{os.getuid()}.lock")
        with contextlib.suppress(Timeout, OSError):
            lock.acquire(timeout=0)
            _kept.append(lock)
    return bool(_kept)
