"""The processor and who may keep it busy by waiting: of all our processes one at a time.

The threads of torch wait for each other hundreds of times a step. Libgomp has them spin meanwhile, which is
fast as long as each has a core for itself, and ruinous beside anything else that computes: each spins away
the time that the other would need to arrive. So nobody spins for as long as libgomp would, and one of our
processes at a time for as long as most waits are.
"""

import contextlib
import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

VARIABLE = "GOMP_SPINCOUNT"
SOON, AWHILE = "1000", "20000"
"""Turns after which a waiting thread goes to sleep; libgomp's own are 300,000 and more."""
COMPUTES, GIVES_WAY, SLEEPS = "computes", "gives way", "sleeps"
"""What a process is: one that a person waits for, which spins where it has the right; one that asks
`others_spin` before each piece of work, and takes one thread where they do, which waits for nobody; any
other, whose waiting threads sleep soon."""
PATIENCE = 0.3
"""Seconds to wait for the right: who only asks whether somebody has it holds it for a moment."""

_kept: list[FileLock] = []


def limit_spinning(kind: str) -> None:
    """Let threads that wait spin, or have them go to sleep soon, as becomes the kind of this process.

    Call it before torch is imported. Nothing of it changes a result. The right ends with the process, however
    it ends. What a person has set stays. Seconds for a step of the demo on two cores of a virtual
    machine, by turns:

    | turns | alone | beside another program that keeps one core busy |
    |---|---|---|
    | 1,000 | 0.24 | 0.30 |
    | 3,000 | 0.17 | 0.39 |
    | 10,000 | 0.145 | 0.63 |
    | 20,000 | 0.141 | 0.84 |
    | 30,000 | 0.137 | 0.99 |
    | libgomp's own | 0.138 | 3.9 |
    """
    if not _is_default():
        return
    if kind == GIVES_WAY or (kind == COMPUTES and _may_spin()):
        os.environ[VARIABLE] = AWHILE
    else:
        os.environ[VARIABLE] = SOON


def others_spin() -> bool:
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


def _is_default() -> bool:
    return sys.platform.startswith("linux") and os.environ.get(VARIABLE, SOON) in (SOON, AWHILE)


def _lock() -> FileLock:
    return FileLock(Path(tempfile.gettempdir()) / f"lora-easel-processor-{os.getuid()}.lock")


def _may_spin() -> bool:
    if not _kept:
        lock = _lock()
        with contextlib.suppress(Timeout, OSError):
            lock.acquire(timeout=PATIENCE)
            _kept.append(lock)
    return bool(_kept)


# Importing what is large: torch and diffusers together are some 3,500 modules.


@contextlib.contextmanager
def without_collecting() -> Iterator[None]:
    """Import without the garbage collector, for a process that has just begun.

    What an import makes stays, yet the collector goes through all of it again and again: a fifth of the
    processor time of importing the trainer (3.7 s with it, 3.0 s without, two shared cores). What is there
    afterwards is left out of later collections too; the first time only, for in a process that has worked
    already this would keep its garbage for ever.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            gc.freeze()
        if was_on:
            gc.enable()
