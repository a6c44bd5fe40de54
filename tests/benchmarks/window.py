"""The window: how soon its first page can be used, how soon the worker is warm, and what it costs idle."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from playwright.sync_api import sync_playwright

from tests.benchmarks.rows import Row
from tests.browser.conftest import CHROMIUM

ROOT = Path(__file__).resolve().parents[2]
TIMES = 5
IDLE = 20.0


@contextlib.contextmanager
def _server(home: Path) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    code = "import sys, app.main; sys.exit(app.main.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--no-browser", "--port", "0", "--workspace", str(home)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True, env={**os.environ}
    )
    try:
        assert process.stdout is not None
        address = next(line.split()[-1] for line in process.stdout if line.startswith("Ready"))
        yield process, address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def _family(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    whole = psutil.Process(process.pid)
    return [whole, *whole.children(recursive=True)]


def _cpu(process: "subprocess.Popen[str]") -> float:
    spent = 0.0
    for one in _family(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = one.cpu_times()
            spent += times.user + times.system
    return spent


def _once(home: Path) -> tuple[float, float, float]:
    """Seconds to a page that can be used, and to a warm worker after it; share of a core when idle."""
    with sync_playwright() as play, _server(home) as (process, address):
        began = time.perf_counter()
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        launched = time.perf_counter()
        page = browser.new_page()
        page.goto(address)
        page.get_by_role("tab", name="Train", exact=True).click()
        page.locator("#start").wait_for()
        usable = time.perf_counter() - launched
        # Warm is a worker that has read what drawing takes and waits: its processor time stands still.
        warm, quiet, before = 0.0, 0, -1.0
        while quiet < 3:
            time.sleep(0.5)
            now = _cpu(process)
            quiet = quiet + 1 if now - before < 0.06 else 0
            warm = time.perf_counter() - began - 1.5
            before = now
            assert warm < 120
        start = _cpu(process)
        time.sleep(IDLE)
        idle = (_cpu(process) - start) / IDLE
        browser.close()
    return usable, warm, idle


def window_rows() -> list[Row]:
    """Five starts on an empty workspace each."""
    found = []
    for _ in range(TIMES):
        with tempfile.TemporaryDirectory() as folder:
            found.append(_once(Path(folder)))
    columns = [sorted(column) for column in zip(*found, strict=True)]
    usable, warm, idle = columns
    middle = TIMES // 2

    def told(values: list[float], unit: str, factor: float = 1.0) -> str:
        a, b, c = (factor * value for value in (values[middle], values[0], values[-1]))
        return f"{a:.1f}{unit} ({b:.1f} to {c:.1f}, {TIMES} starts)"

    return [
        Row(
            "First page that can be used, after `Ready`", told(usable, " s"), "below 5 s", usable[middle] < 5
        ),
        Row("Worker warm, after the page was asked for", told(warm, " s"), "within 15 s", warm[middle] <= 15),
        Row(
            "Processor when idle, a page open",
            told(idle, "% of a core", 100),
            "below 3%",
            idle[middle] < 0.03,
        ),
    ]
