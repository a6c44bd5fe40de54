"""An open page: what its first load takes, what it costs while a run goes on, idle and hidden, whether it
shifts and grows, and a dataset of a thousand pictures.

Layout shift is measured over a whole demo, costs during a simulated run: a process writes the events of a
training run at two steps a second, so that the figures are those of window and browser alone. Costs are
processor seconds, not elapsed time.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from lora_core.runs.folder import RunFolder, runs_folder
from lora_core.settings.config import RunConfig
from tests.benchmarks.rows import Row
from tests.browser.conftest import CHROMIUM
from tests.browser.pages import bytes_sent, unfold
from tests.browser.windows import Window, close

SECONDS = float(os.environ.get("LORA_EASEL_PAGE_SECONDS", "60"))
PICTURES = 1000
SIZES = ((1440, 900), (1024, 768), (390, 844))
RUN = """
import math, sys, time
from pathlib import Path
from lora_core.runs import events
from lora_core.runs.folder import RunFolder

run = RunFolder(Path(sys.argv[1]))
with run.hold():
    writer = events.EventWriter(run.events_file)
    writer.write(events.Started(steps=20000, pid=1, device="cpu", threads=1, versions={}))
    for step in range(1, 20000):
        loss = 0.1 + 0.05 * math.sin(step) + 0.2 / step
        writer.write(events.StepDone(step=step, loss=loss, lr=1e-4, seconds=0.5))
        time.sleep(0.5)
"""
SHIFTS = """
window.shifted = 0;
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shifted += entry.value;
}).observe({ type: "layout-shift", buffered: true });
"""
HIDE = """
Object.defineProperty(document, "hidden", { get: () => true });
document.dispatchEvent(new Event("visibilitychange"));
"""
LISTED = f"document.querySelector('[data-picture]')?.ariaSetSize == {PICTURES}"
SELECT_ALL = """document.activeElement.dispatchEvent(
  new KeyboardEvent("keydown", { key: "a", ctrlKey: true, bubbles: true }))"""


def page_rows() -> list[Row]:
    """All figures of one window."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        window = Window(Path(folder) / "work")
        window.start()
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        try:
            return [
                *_load(browser, window),
                *_cost(browser, window),
                *_thousand(browser, window, Path(folder)),
                *(_shift(browser, Path(folder), size) for size in SIZES),
            ]
        finally:
            browser.close()
            close(window)


def _opened(browser: Any, window: Window, size: tuple[int, int] = SIZES[0]) -> tuple[Any, Page]:
    context = browser.new_context(viewport={"width": size[0], "height": size[1]})
    page = context.new_page()
    page.add_init_script(SHIFTS)
    return context, page


def _load(browser: Any, window: Window) -> list[Row]:
    """Requests and bytes of a first and of a second visit."""
    context, page = _opened(browser, window)
    sent = bytes_sent(page)
    rows = []
    for visit in ("First", "Second"):
        sent.clear()
        page.goto(window.address)
        page.wait_for_selector("html[data-ready]")
        page.wait_for_timeout(1000)
        kilobytes = sum(size for _, size in sent.values()) / 1000
        if os.environ.get("LORA_EASEL_LIST"):
            for url, size in sent.values():
                sys.stdout.write(f"{visit} {size:9.0f} {url[:150]}\n")
        rows.append(
            Row(
                f"{visit} load",
                f"{len(sent)} requests, {kilobytes:.0f} kB",
                "40, 300 kB",
                len(sent) <= 40 and kilobytes <= 300,
            )
        )
    context.close()
    return rows


def _cost(browser: Any, window: Window) -> list[Row]:
    """Processor time of server and browser with one page open."""
    context, page = _opened(browser, window)
    page.goto(window.address + "#train")
    page.wait_for_selector("html[data-ready]")
    page.wait_for_timeout(20_000)
    shift = page.evaluate("window.shifted")
    rows = [Row("Layout shift of the load", f"{shift:.4f}", "under 0.02", shift < 0.02)]
    rows.append(_spent(page, window, "idle", 0.005))
    run = RunFolder.create(runs_folder(window.workspace) / "played", RunConfig().changed({"name": "played"}))
    child = subprocess.Popen([sys.executable, "-c", RUN, str(run.path)])
    page.wait_for_selector("#run-status[data-state=running]")
    page.wait_for_timeout(3000)
    wire = context.new_cdp_session(page)
    before = _heap(wire)
    rows.append(_spent(page, window, "with a run going on", 0.03))
    after = _heap(wire)
    level = after[0] < 1.2 * before[0] + 2 and after[1] < 1.1 * before[1] + 200
    rows.append(
        Row(
            "Heap and nodes, before and after",
            f"{before[0]:.1f} MB, {before[1]} and {after[0]:.1f} MB, {after[1]}",
            "level",
            level,
        )
    )
    page.evaluate(HIDE)
    page.wait_for_timeout(2000)
    rows.append(_spent(page, window, "hidden", 0.005))
    child.terminate()
    child.wait()
    context.close()
    return rows


def _shift(browser: Any, folder: Path, size: tuple[int, int]) -> Row:
    """How far the page shifts over the demo, from Start to its end."""
    words = "x".join(map(str, size))
    window = Window(folder / words)
    window.start()
    try:
        context, page = _opened(browser, window, size)
        page.goto(window.address)
        page.wait_for_selector("html[data-ready]")
        page.click("#use-demo")
        page.wait_for_selector("#start:enabled")
        page.wait_for_timeout(3000)
        page.evaluate("window.shifted = 0")
        page.click("#start")
        page.wait_for_selector("#run-status[data-state=done]", timeout=600_000)
        page.wait_for_timeout(4000)
        shift = page.evaluate("window.shifted")
        context.close()
    finally:
        close(window)
    return Row(f"Layout shift over the demo, {words}", f"{shift:.4f}", "under 0.02", shift < 0.02)


def _heap(wire: Any) -> tuple[float, int]:
    """Megabytes of JavaScript and nodes, garbage collected."""
    wire.send("HeapProfiler.collectGarbage")
    wire.send("Performance.enable")
    found = {one["name"]: one["value"] for one in wire.send("Performance.getMetrics")["metrics"]}
    return found["JSHeapUsedSize"] / 1e6, int(found["Nodes"])


def _browser_seconds() -> float:
    return sum(
        _seconds(one) for one in psutil.Process().children(recursive=True) if "chrom" in one.name().lower()
    )


def _seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
        return float(times.user + times.system)
    except psutil.Error:
        return 0.0


def _spent(page: Page, window: Window, words: str, most: float) -> Row:
    assert window.process is not None
    server = psutil.Process(window.process.pid)
    before = _seconds(server), _browser_seconds()
    page.wait_for_timeout(1000 * SECONDS)
    shares = [
        (after - was) / SECONDS
        for after, was in zip((_seconds(server), _browser_seconds()), before, strict=True)
    ]
    found = f"server {shares[0]:.2%}, browser {shares[1]:.2%} of a core"
    return Row(f"An open page, {words}", found, f"under {most:.1%} each", max(shares) < most)


def _thousand(browser: Any, window: Window, folder: Path) -> list[Row]:
    """Grid, select all and bulk edit of a thousand pictures."""
    images = window.project / "pictures"
    images.mkdir(parents=True, exist_ok=True)
    for index in range(PICTURES):
        Image.new("RGB", (96, 96), (index % 256, index // 4, 90)).save(images / f"{index:04d}.png")
        (images / f"{index:04d}.txt").write_text(f"a picture, number {index}")
    context, page = _opened(browser, window)
    page.goto(window.address)
    page.wait_for_selector("html[data-ready]")
    page.wait_for_function(LISTED)
    rows: list[Row] = []
    assert window.process is not None
    server = psutil.Process(window.process.pid)

    def timed(words: str, act: str, done: str) -> None:
        before = _seconds(server) + _browser_seconds()
        page.evaluate(
            """async ([act, done]) => {
              const holds = () => Function(`return ${done}`)();
              await Function(`return ${act}`)();
              while (!holds()) await new Promise((done) => setTimeout(done, 10));
            }""",
            [act, done],
        )
        took = _seconds(server) + _browser_seconds() - before
        rows.append(Row(words, f"{took:.2f} s of processor time", "under 1 s", took < 1))

    timed(
        "A thousand pictures: the list is asked for and drawn",
        "easel.load()",
        LISTED,
    )
    page.click("[data-picture]")
    timed(
        "Select all",
        SELECT_ALL,
        f"/{PICTURES:,} selected/.test(document.querySelector('#selection-count').textContent)",
    )
    unfold(page, "#bulk")
    page.select_option("#bulk-do", "append")
    page.fill("#bulk-put", ", more")
    page.wait_for_selector("#bulk-apply:enabled")
    timed(
        "Bulk edit of all captions",
        "document.querySelector('#bulk-form').requestSubmit()",
        "/captions changed/.test(document.querySelector('#bulk-note').textContent)",
    )
    context.close()
    return rows
