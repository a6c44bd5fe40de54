"""How tests wait for what another thread or process does: for a condition, and long, as a busy machine may be slow.
A limit is there for what hangs."""

import time
from collections.abc import Callable
from typing import TypeVar

PATIENCE = 180.0
"""Seconds after which what has not come does not come."""

Found = TypeVar("Found")


def wait_for(found: Callable[[], Found], every: float = 0.02) -> Found:
    """Ask again and again until the answer is true, and return it."""
    end = time.monotonic() + PATIENCE
    while not (answer := found()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(every)
    return answer
