"""A person with other tools on the computer: their bases are offered, the export goes into their folder, and
any LoRA file can be looked at."""

import json
from pathlib import Path
from typing import Any

from tests.browser.pages import frames, open_tab
from tests.browser.test_main_path import drop
from tests.browser.test_toolbox import type_path


def choose_base(page, words: str) -> None:
    page.click("#base-model input")
    page.fill("#base-model input", words)
    page.keyboard.press("Enter")


def test_bases_of_other_tools_are_offered_and_described(page: Any, tmp_path: Path) -> None:
    open_tab(page, "Train")
    page.wait_for_selector("#base-model input")
    page.click("#base-model input")
    page.wait_for_selector("li:has-text('ComfyUI: my xl base.safetensors')")
    page.fill("#base-model input", "xl base")
    page.wait_for_selector("li:has-text('my xl base')")
    page.keyboard.press("Enter")
    page.wait_for_selector(
        "#base-note:has-text('Stable Diffusion XL, trained at 1024 px, predicts velocity')"
    )
    page.wait_for_function("document.querySelector('#resolution input')?.value.startsWith('1024')")
    assert page.locator("#model-prediction input").count() == 0 or not page.is_visible(
        "#model-prediction input"
    )
    choose_base(page, "old two")
    page.wait_for_selector("#base-note:has-text('a guess')")
    page.wait_for_selector("#model-prediction input")
    frames(page)
    page.click("#model-prediction input")
    page.click("li:has-text('epsilon')")
    page.wait_for_selector("#base-note:has-text('trained at 512 px, predicts noise (as set)')")
    broken = tmp_path / "broken.safetensors"
    broken.write_text("<html>")
    choose_base(page, str(broken))
    page.wait_for_selector("#base-model:has([aria-invalid=true]) #base-model-problem:has-text('a web page')")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    open_tab(page, "Train")
    page.wait_for_selector("#base-model-problem")
    page.click("#base-model input")
    page.wait_for_selector("li:has-text('ComfyUI: my xl base.safetensors')")


def test_an_export_goes_into_another_tool_s_folder(home: Path, look: Any, trained: Any) -> None:
    page = look()
    open_tab(page, "Export")
    page.wait_for_function("document.querySelector('#copy-folder input')?.value.includes('ComfyUI')")
    page.fill("#export-name input, #export-name textarea", "my style")
    found = page.input_value("#copy-folder input")
    page.fill("#copy-folder input", "/nowhere")
    page.click("#copy-export")
    page.wait_for_selector("#export-will .problem:has-text('no folder at')")
    loras = home / "ComfyUI" / "models" / "loras"
    (loras / "my style.safetensors").write_bytes(b"another file")
    page.locator("#export-apps").get_by_role("button", name="Copy to ComfyUI").click()
    page.wait_for_selector("#copy-note:has-text('Copied to ComfyUI')")
    assert page.input_value("#copy-folder input") == found
    assert "my style-2" in page.inner_text("#copy-note")
    assert (loras / "my style.safetensors").read_bytes() == b"another file"
    assert {"my style-2.safetensors", "my style-2.json"} <= {file.name for file in loras.iterdir()}
    rows = page.locator("#works-in tr").all_inner_texts()
    assert len(rows) == 6
    assert all("420 of 420 keys, same strength" in row for row in rows)
    assert json.loads((trained.workspace / "places.json").read_text())["lora_folders"] == [str(loras)]

    drop(page, loras / "my style-2.safetensors")
    page.wait_for_selector("#toolbox-answer:has-text('LoRA Easel')")
    assert "Embedded tiny base" in page.inner_text("#toolbox-answer")
    type_path(page, loras / "my style.safetensors")
    page.click("#toolbox-go:enabled")
    page.wait_for_selector("#toolbox-state.problem:has-text('my style.safetensors')")
