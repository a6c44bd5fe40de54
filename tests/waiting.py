"""How tests wait for what a coroutine, another thread or process does: for a condition, and long, as the
machine may be busy; the limit is there for what hangs."""

import asyncio
import subprocess
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

PATIENCE = 600.0
"""Seconds after which what has not come does not come."""

Found = TypeVar("Found")


def run_async(work: Coroutine[Any, Any, Found]) -> Found:
    """The result of a coroutine, in a thread of its own: the browser's tests leave a loop in this one."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(asyncio.run, asyncio.wait_for(work, PATIENCE)).result()


def wait_for(found: Callable[[], Found], process: "subprocess.Popen[Any] | None" = None) -> Found:
    """Ask until the answer is true, and return it; a `process` that ends before that is an error."""
    end = time.monotonic() + PATIENCE
    while not (answer := found()):
        assert process is None or process.poll() is None, f"the process ended with {process.returncode}"
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
    return answer
