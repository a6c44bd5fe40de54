"""A real window in a process of its own and a real Chromium on it; every test also asserts that the page
stayed quiet."""

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image, ImageDraw

from tests.app.bases import checkpoint
from tests.browser.windows import Spares, Window, close, end_runs
from tests.waiting import PATIENCE

# The headless shell first: without the browser's own frame a page costs a seventh less.
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# A demo run that is over soon, for tests that only look at what is left of it.
SHORT = {"train.steps": 4, "train.batch_size": 2, "sample.steps": 2, "validation.forgetting": 1}
DEMO = {"dataset": "demo", "level": "demo", "goal": "style"}
SHORT_DEMO = {**DEMO, "values": SHORT}


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of a person with a ComfyUI in it; every window of these tests lives there."""
    made = tmp_path_factory.mktemp("home") / "home é"
    comfy = made / "ComfyUI"
    for name in ("comfy", "models/checkpoints", "models/loras"):
        (comfy / name).mkdir(parents=True)
    (comfy / "main.py").touch()
    checkpoints = comfy / "models" / "checkpoints"
    # With the marker of bases that predict velocity: of the other one, that has to be guessed.
    checkpoint(checkpoints / "my xl base.safetensors", "sdxl", size=150_000_000, v_pred=[0])
    checkpoint(checkpoints / "old two.safetensors", "sd2", size=150_000_000)
    return made


@pytest.fixture
def draft() -> dict[str, Any]:
    """What the form holds when the window opens: nothing, but where a test says otherwise."""
    return {}


@pytest.fixture(scope="session")
def spares(
    request: pytest.FixtureRequest, home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Spares]:
    own = [
        item
        for item in request.session.items
        if item.get_closest_marker("own_window") or "own_window" in getattr(item, "fixturenames", ())
    ]
    made = Spares(home, tmp_path_factory, len(own) + len((shared_window, trained)))
    yield made
    if made.next is not None:
        made.next.wait_ready()
        close(made.next)


@pytest.fixture(scope="session")
def shared_window(spares: Spares) -> Iterator[Window]:
    """A window for all tests that do not end it, each with a project of its own."""
    made = spares.take()
    yield made
    close(made)


@pytest.fixture
def own_window(spares: Spares) -> Iterator[Window]:
    """A window on a workspace that nobody else has used."""
    made = spares.take()
    yield made
    close(made)


@pytest.fixture
def window(request: pytest.FixtureRequest, tmp_path: Path, draft: dict[str, Any]) -> Iterator[Window]:
    """The shared window with a new project open; one of its own for a test marked `own_window`."""
    if request.node.get_closest_marker("own_window"):
        made = request.getfixturevalue("own_window")
        if draft:
            made.open_project("default", draft)
        yield made
        return
    made = request.getfixturevalue("shared_window")
    made.open_project(tmp_path.name, draft)
    yield made
    end_runs(made.workspace)


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
        context.set_default_timeout(1000 * PATIENCE)
        contexts.append(context)
        page = context.new_page()
        # The headless shell draws only one page, and the others have no frames to look in.
        page.wait_for_function = functools.partial(page.wait_for_function, polling=100)
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
    made.wait_for_selector("html[data-ready]")
    return made


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Six drawings of two sizes, five with captions."""
    folder = tmp_path / "my images"
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
def trained(browser: Any, spares: Spares) -> Iterator[Window]:
    """A window whose demo was trained for a few steps and looked at; for tests that only look."""
    window = spares.take()
    window.open_project("default", SHORT_DEMO)
    page = browser.new_page(viewport={"width": 1440, "height": 900})
    page.set_default_timeout(1000 * PATIENCE)
    page.goto(window.address)
    page.wait_for_selector("[data-picture]")
    page.get_by_role("tab", name="Train", exact=True).click()
    page.click("#start:enabled")
    page.wait_for_selector("#run-status[data-state=done]")
    page.click("#see-result")
    page.wait_for_function("document.querySelectorAll('#strength-strip img').length == 5")
    page.close()
    yield window
    close(window)


@pytest.fixture
def look(browser: Any, trained: Window, watched: Watched) -> Iterator[Any]:
    """A page on it, of some width and theme, that is watched."""
    pages = []

    def opened(scheme: str = "light", width: int = 1440) -> Any:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.set_default_timeout(1000 * PATIENCE)
        watched.follow(page)
        pages.append(page)
        page.goto(trained.address)
        page.wait_for_selector("[data-picture]")
        page.wait_for_selector("html[data-ready]")
        return page

    yield opened
    for page in pages:
        page.close()
    assert watched.wrong == []
