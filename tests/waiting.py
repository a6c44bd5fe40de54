"""How tests wait for what another thread or process does: for a condition, and long, as the machine may be
busy; the limit is there for what hangs."""

import subprocess
import time
from collections.abc import Callable
from typing import Any, TypeVar

PATIENCE = 600.0
"""Seconds after which what has not come does not come."""

Found = TypeVar("Found")


def wait_for(found: Callable[[], Found], process: "subprocess.Popen[Any] | None" = None) -> Found:
    """Ask until the answer is true, and return it; a `process` that ends before that is an error."""
    end = time.monotonic() + PATIENCE
    while not (answer := found()):
        assert process is None or process.poll() is None, f"the process ended with {process.returncode}"
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
    return answer
