"""Pictures of each tab, made from the real window: the demo is trained, looked at and exported.

Run it as `python -m tests.browser.screenshots [WORKSPACE] [--into FOLDER]`. With a workspace that holds a
finished run of the demo the training is skipped. Writes docs/screens/<tab>-<width>[-dark].webp, the first
screen of each tab at each width in both themes, and docs/window.webp while the demo trains.
"""

import argparse
import io
import itertools
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.browser.conftest import CHROMIUM, FLAGS
from tests.browser.pages import open_tab
from tests.browser.windows import ROOT, Window
from tests.waiting import PATIENCE

# What must be there before a tab is worth a picture.
READY = {
    "Dataset": ".thumb.on",
    "Train": "#samples img",
    "Preview": "#preview-base img",
    "Export": "#export-cards img",
    "Toolbox": "#toolbox-files select",
}
WIDTHS = (1440, 1024, 390)
SCHEMES = ("light", "dark")
SCREENS = ROOT / "docs" / "screens"
# All pictures together, in bytes: a clone should stay small.
MOST = 3_000_000


def prepare(page) -> None:
    """Bring the window into the state that the pictures show."""
    if page.locator("#use-demo").is_visible():
        page.click("#use-demo")
        page.click("#start:enabled")
        page.wait_for_selector("#run-status[data-state=running]")
        # Three rounds of samples: the base, and two with something learned.
        page.wait_for_selector("#samples .strip figure:nth-child(3):not(.ghost) img")
        shoot(page, ROOT / "docs" / "window.webp")
    open_tab(page, "Train")
    page.wait_for_selector("#run-status[data-state=done]")
    page.click("[data-show-preview]")
    page.wait_for_selector("#preview-base img")
    page.wait_for_function("document.querySelectorAll('#strength-strip img').length == 5")
    open_tab(page, "Export")
    with page.expect_download():
        page.click("#export-download:enabled")


def shoot(page, file: Path) -> None:
    """One picture of the whole page."""
    page.evaluate("window.scrollTo(0, 0)")
    # Pictures that are not shown are never loaded; waiting for those would be for ever.
    shown = "[...document.images].filter(one => one.offsetParent)"
    page.evaluate(f"Promise.all({shown}.map(one => one.decode().catch(() => null)))")
    image = Image.open(io.BytesIO(page.screenshot()))
    image.convert("RGB").save(file, quality=80, method=6)


def shoot_all(browser, address: str, folder: Path) -> None:
    """Each tab at each width, light and dark."""
    for tab, width, scheme in itertools.product(READY, WIDTHS, SCHEMES):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.set_default_timeout(1000 * PATIENCE)
        page.goto(address)
        page.wait_for_selector("[data-picture]")
        open_tab(page, tab)
        page.wait_for_selector(READY[tab])
        if tab == "Export":
            with page.expect_download():
                page.click("#export-download:enabled")
            page.wait_for_selector("#works-in td")
            # Where the pictures were made is nobody's business.
            name = "code => code.textContent = '~/LoRA Easel/runs/' + code.textContent.split('/runs/').pop()"
            page.locator("#export-written code").evaluate(name)
        if tab == "Toolbox":
            page.click("[data-tool=spectrum]")
            page.click("#toolbox-go:enabled")
            # What an earlier page asked for is shown at once.
            page.wait_for_selector("#toolbox-go:enabled")
            page.wait_for_selector("#toolbox-answer figure canvas")
        page.wait_for_timeout(700)
        shoot(page, folder / f"{tab.lower()}-{width}{'-dark' if scheme == 'dark' else ''}.webp")
        page.close()


def main(arguments: list[str]) -> int:
    """Make all pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "workspace", nargs="?", type=Path, default=Path(tempfile.gettempdir()) / "lora-easel-screenshots"
    )
    parser.add_argument("--into", type=Path, default=SCREENS, metavar="FOLDER")
    options = parser.parse_args(arguments)
    options.into.mkdir(parents=True, exist_ok=True)
    window = Window(options.workspace)
    address = window.start()
    from playwright.sync_api import sync_playwright

    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            page = browser.new_page(viewport={"width": 1440, "height": 900}, accept_downloads=True)
            page.set_default_timeout(1000 * PATIENCE)
            page.goto(address)
            page.wait_for_selector("#use-demo, [data-picture]")
            prepare(page)
            shoot_all(browser, address, options.into)
    finally:
        window.stop()
    size = sum(file.stat().st_size for file in options.into.glob("*.webp"))
    sys.stdout.write(f"{size / 1e6:.2f} MB in {options.into}\n")
    return 0 if size < MOST else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
