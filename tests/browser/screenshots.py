"""Pictures of each tab for the README, made from the real window: the demo is trained, looked at and
exported.

Run it as `python -m tests.browser.screenshots [WORKSPACE]`. With a workspace that holds a finished run of the
demo the training is skipped. Writes docs/<tab>-<width>[-dark].webp.
"""

import argparse
import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.browser.conftest import CHROMIUM, FLAGS, ROOT, Window

TABS = ("Dataset", "Train", "Preview", "Export")
WIDTHS = (1440, 390)
PATIENCE = 600_000


def open_tab(page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def prepare(page) -> None:
    """Bring the window into the state that the pictures show."""
    if page.locator("#use-demo").is_visible():
        page.click("#use-demo")
        page.click("#start:enabled")
    open_tab(page, "Train")
    page.wait_for_selector("#run-status[data-state=done]")
    page.click("[data-show-preview]")
    page.wait_for_selector("#preview-base img")
    page.wait_for_function("document.querySelectorAll('#strength-strip img').length == 6")
    open_tab(page, "Export")
    with page.expect_download():
        page.click("#export-download:enabled")


def shoot(page, name: str) -> None:
    """One picture, whole page, as WebP."""
    page.evaluate("Promise.all([...document.images].map(one => one.decode().catch(() => null)))")
    image = Image.open(io.BytesIO(page.screenshot(full_page=True)))
    image.convert("RGB").save(ROOT / "docs" / f"{name}.webp", quality=88, method=6)


def shoot_all(browser, address: str) -> None:
    """Each tab at each width, light and dark."""
    for scheme in ("light", "dark"):
        for width in WIDTHS:
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page.set_default_timeout(PATIENCE)
            page.goto(address)
            page.wait_for_selector("[data-picture]")
            for tab in TABS:
                open_tab(page, tab)
                page.wait_for_selector(
                    {"Dataset": ".thumb.on", "Train": "#samples img"}.get(tab, "[role=tabpanel] img")
                )
                page.wait_for_timeout(500)
                shoot(page, f"{tab.lower()}-{width}{'-dark' if scheme == 'dark' else ''}")
            page.close()


def main(arguments: list[str]) -> int:
    """Make all pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "workspace", nargs="?", type=Path, default=Path(tempfile.gettempdir()) / "lora-easel-screenshots"
    )
    window = Window(parser.parse_args(arguments).workspace)
    address = window.start()
    from playwright.sync_api import sync_playwright

    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            page = browser.new_page(viewport={"width": 1440, "height": 900}, accept_downloads=True)
            page.set_default_timeout(PATIENCE)
            page.goto(address)
            page.wait_for_selector("#use-demo, [data-picture]")
            prepare(page)
            shoot_all(browser, address)
    finally:
        window.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
