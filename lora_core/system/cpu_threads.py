"""Limits OpenMP spin-waiting: only one of our processes may spin at a time.

torch's threads wait for each other hundreds of times a step. libgomp lets them spin meanwhile, which is
fast while each has a core of its own, and very slow beside any other program that computes. So the process
that the user waits for spins for as long as most waits take, and all others sleep soon. Figures:
docs/decisions/speed.md.
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
"""Kinds of processes: one that the user waits for, which spins if it holds the lock; one that asks
`others_spin` before each piece of work, and takes one thread where they do, which waits for nobody; any
other, whose waiting threads sleep soon."""
PATIENCE = 0.3
"""Seconds to wait for the right: who only asks whether somebody has it holds it for a moment."""

_kept: list[FileLock] = []


def limit_spinning(kind: str) -> None:
    """Sets how long waiting threads spin, by the kind of this process.

    Call it before torch is imported. Nothing of it changes a result. The right ends with the process, however
    it ends. The user's own setting is kept. Seconds for a step of the demo on two cores of a virtual
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


@contextlib.contextmanager
def without_collecting() -> Iterator[None]:
    """Imports without the garbage collector, for a process that has just started.

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
