"""Importing what is large: torch and diffusers together are some 3,500 modules."""

import contextlib
import gc
from collections.abc import Iterator


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
