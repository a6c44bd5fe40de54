"""Before Start in a real browser: what a step takes is measured by itself, whom to tell is kept, and a phone
reaches the projects."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.browser.pages import frames, open_settings, open_tab


@pytest.mark.own_window
def test_time_is_measured_and_who_is_told_is_kept(page: Any, window: Any, tmp_path: Path) -> None:
    page.click("#use-demo")
    page.wait_for_selector("#measuring[data-measuring=known]")
    assert "it/s" in page.inner_text("#measuring") or "s/it" in page.inner_text("#measuring")
    assert "trial steps" in page.inner_text("#facts .facts small >> nth=0")
    kept = json.loads((window.workspace / "measured.json").read_text())["measured"]
    assert [one["base"] for one in kept.values()] == ["demo"]

    open_settings(page)
    page.click("#telling button:has-text('Notifications')")
    field = page.locator("#tell-whom input, #tell-whom textarea")
    field.wait_for()
    frames(page)
    field.fill("say 'hello")
    page.click("#tell-save")
    page.wait_for_selector("#tell-note .problem >> text=No closing quotation")
    told = tmp_path / "told it"
    command = f"\"{sys.executable}\" -c \"open(r'{told}', 'w').close()\""
    field.fill(command)
    page.click("#tell-try")
    page.wait_for_selector("#tell-note >> text=look whether it arrived")
    assert told.exists()
    page.click("#tell-save")
    page.wait_for_selector("#tell-note >> text=Saved.")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    open_tab(page, "Train")
    page.click("#telling button:has-text('Notifications')")
    page.wait_for_function(
        "document.querySelector('#tell-whom input, #tell-whom textarea')?.value.length > 9"
    )
    assert field.input_value() == command

    page.set_viewport_size({"width": 390, "height": 800})
    page.click("#project-picker")
    page.wait_for_selector("#projects[open] #projects-list >> text=Demo")
