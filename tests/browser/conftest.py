"""A real window in a process of its own and a real Chromium on it; every test also asserts that the page
stayed quiet."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# A demo run that is over soon, for tests that only look at what is left of it.
SHORT = {"train.steps": 4, "train.batch_size": 2, "preview.steps": 6, "validation.prior": 1}
SHORT_DEMO = {"dataset": "demo", "level": "demo", "goal": "style", "values": SHORT}
# Two cores may be shared with other work; a test that waits is better than one that fails.
PATIENCE = 180_000


class Window:
    """The server, which can be killed and started again on the same workspace."""

    def __init__(self, workspace: Path) -> None:
        self.workspace = workspace
        self.process: subprocess.Popen[str] | None = None
        self.address = ""

    def start(self, *arguments: str, port: str = "0") -> str:
        code = "import sys, app.main; sys.exit(app.main.main(sys.argv[1:]))"
        command = [
            sys.executable,
            "-c",
            code,
            "--no-browser",
            "--port",
            port,
            "--workspace",
            str(self.workspace),
        ]
        self.process = subprocess.Popen(
            [*command, *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("Ready at "):
                self.address = line.removeprefix("Ready at ").strip()
                return self.address
        raise AssertionError(f"the window ended with {self.process.wait()}")

    def stop(self, how: signal.Signals = signal.SIGINT) -> int:
        assert self.process is not None
        self.process.send_signal(how)
        code = self.process.wait(20)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code


def keep_draft(workspace: Path, said: dict[str, Any]) -> None:
    """The unsent form as a page would have left it."""
    draft = workspace / "projects" / "default" / "draft.json"
    draft.parent.mkdir(parents=True, exist_ok=True)
    draft.write_text(json.dumps(said))


@pytest.fixture
def draft() -> dict[str, Any]:
    """What the form holds when the window opens: nothing, but where a test says otherwise."""
    return {}


@pytest.fixture
def window(tmp_path: Path, draft: dict[str, Any]) -> Iterator[Window]:
    made = Window(tmp_path / "work space é")
    if draft:
        keep_draft(made.workspace, draft)
    made.start()
    yield made
    if made.process is not None and made.process.poll() is None:
        made.stop()
    _end_runs(made.workspace)


def _end_runs(workspace: Path) -> None:
    """Runs outlive the window by design; those of a test must not outlive the test."""
    from lora_core.spec.run_folder import all_runs

    for run in all_runs(workspace):
        process = run.live_process()
        if process is not None:
            with contextlib.suppress(Exception):
                process.kill()


@pytest.fixture(scope="session")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield made
        made.close()


class Watched:
    """What a page did that it should not."""

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.expected_away = False

    def follow(self, page) -> None:
        page.on("console", lambda m: self._note(f"console: {m.text}") if m.type == "error" else None)
        page.on("pageerror", lambda error: self._note(f"page error: {error}"))
        page.on("response", lambda r: self._note(f"{r.status} {r.url}") if r.status >= 400 else None)
        page.on("request", self._request)

    def _note(self, text: str) -> None:
        # While the server is away on purpose the browser says so on the console.
        if not self.expected_away:
            self.wrong.append(text)

    def _request(self, request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme in ("http", "https", "ws", "wss") and parts.hostname not in (
            "127.0.0.1",
            "localhost",
        ):
            self.wrong.append(f"a request beyond this computer: {request.url}")


@pytest.fixture
def watched() -> Watched:
    return Watched()


@pytest.fixture
def new_page(browser, watched: Watched, window: Window):
    contexts = []

    def make(**options):
        context = browser.new_context(
            viewport={"width": 1440, "height": 900}, accept_downloads=True, **options
        )
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        watched.follow(page)
        return page

    yield make
    for context in contexts:
        context.close()
    assert watched.wrong == []


@pytest.fixture
def page(new_page, window: Window):
    made = new_page()
    made.goto(window.address)
    made.wait_for_selector("#dataset-drop")
    return made


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Six drawings of two sizes, five with captions."""
    folder = tmp_path / "my pictures"
    (folder / "3_more").mkdir(parents=True)
    made = []
    for index in range(6):
        size = (160, 160) if index % 2 else (220, 160)
        image = Image.new("RGB", size, (230, 215, 180))
        ImageDraw.Draw(image).ellipse((30, 20, 120, 120), fill=(40 * index, 60, 160))
        path = (folder / "3_more" if index > 3 else folder) / f"ball {index} é.png"
        image.save(path)
        if index:
            path.with_suffix(".txt").write_text(f"a ball, number {index}", encoding="utf-8")
        made.append(path)
    return made


@pytest.fixture(scope="session")
def trained(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Window]:
    """A window whose demo was trained for a few steps and looked at; for tests that only look."""
    workspace = tmp_path_factory.mktemp("trained")
    keep_draft(workspace, SHORT_DEMO)
    window = Window(workspace)
    window.start()
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.set_default_timeout(PATIENCE)
    page.goto(window.address)
    page.wait_for_selector("[data-picture]")
    page.get_by_role("tab", name="Train", exact=True).click()
    page.click("#start:enabled")
    page.wait_for_selector("#run-status[data-state=done]")
    page.click("#see-result")
    page.wait_for_function("document.querySelectorAll('#strength-strip img').length == 5")
    page.close()
    yield window
    window.stop()
    _end_runs(window.workspace)


@pytest.fixture
def look(browser: Any, trained: Window, watched: Watched) -> Iterator[Any]:
    """A page on it, of some width and theme, that is watched."""
    pages = []

    def opened(scheme: str = "light", width: int = 1440) -> Any:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.set_default_timeout(PATIENCE)
        watched.follow(page)
        pages.append(page)
        page.goto(trained.address)
        page.wait_for_selector("[data-picture]")
        page.wait_for_selector("[data-run-state]")
        return page

    yield opened
    for page in pages:
        page.close()
    assert watched.wrong == []
