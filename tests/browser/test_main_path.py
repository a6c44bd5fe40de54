"""The path of a person with pictures: drop a folder, caption, train, look, take the file; then the file is
loaded by diffusers."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.browser.pages import has_value, open_tab, set_steps, state_is

HOSTILE = "<img src=x onerror=\"document.title='broken in'\"> {{7*7}} 😀"

# Rough samples and little measuring, as neither is looked at here.
QUICK = {"values": {"sample.steps": 2, "validation.forgetting": 1}}


def train(page, steps: int) -> None:
    open_tab(page, "Train")
    set_steps(page, steps)
    page.click("#start")


@pytest.mark.parametrize("draft", [QUICK], ids=["quick"])
def test_from_pictures_to_a_file_that_diffusers_loads(
    page, window: Any, pictures: list[Path], tmp_path: Path
) -> None:
    drop(page, pictures[0].parent)
    page.wait_for_function(
        f"document.querySelectorAll('#dataset-grid [data-picture]').length == {len(pictures)}"
    )
    names = page.eval_on_selector_all("[data-picture]", "found => found.map(one => one.dataset.picture)")
    assert sum("3_more/" in name for name in names) == 2
    page.click("#dataset-grid [data-picture='ball 0 é.png']")
    page.fill("#caption textarea", HOSTILE)
    page.wait_for_selector("#caption-state[data-state=saved]")
    stored = window.project / "pictures" / "ball 0 é.txt"
    assert stored.read_text(encoding="utf-8").strip() == HOSTILE

    train(page, 6)
    state_is(page, "done")
    assert page.locator("#run-status").get_attribute("data-step") == "6"
    assert page.locator("#samples img").count() >= 2

    open_tab(page, "Preview")
    page.fill("#prompt textarea", "a ball")
    page.fill("#seed input", "7")
    page.click("#generate")
    page.wait_for_selector("#compare[data-strength='1.00'] #preview-result:not(.stale)")
    base, full = (page.get_attribute(f"#preview-{which} img", "src") for which in ("base", "result"))
    page.fill("#strength input[type=range]", "0.4")
    page.wait_for_selector("#compare[data-strength='0.40'] #preview-result:not(.stale)")
    assert page.get_attribute("#preview-base img", "src") == base
    assert page.get_attribute("#preview-result img", "src") != full
    page.wait_for_function("document.querySelectorAll('#strength-strip img').length == 5")

    open_tab(page, "Export")
    page.fill("#export-name input, #export-name textarea", "my ball")
    assert page.inner_text("#export-will").startswith("my ball.safetensors")
    with page.expect_download() as download:
        page.click("#export-download")
    assert download.value.suggested_filename == "my ball.safetensors"
    page.wait_for_selector("#works-in td")
    assert "keys in 6 apps" in page.inner_text("#export-will")
    assert "only with that base" in page.inner_text(".page-export .notice")
    file = tmp_path / "taken.safetensors"
    download.value.save_as(file)
    assert page.title() != "broken in"
    assert_diffusers_loads(file)


def assert_diffusers_loads(file: Path) -> None:
    import torch
    from diffusers import StableDiffusionPipeline
    from safetensors import safe_open

    from lora_core.system.files import DEMO_BASE

    pipe = StableDiffusionPipeline.from_pretrained(
        DEMO_BASE, torch_dtype=torch.float32, local_files_only=True
    )
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    injected = [name for name, _ in pipe.unet.named_modules() if name.endswith("lora_A")]
    with safe_open(file, "pt") as opened:
        written = [key for key in opened.keys() if key.endswith("lora_down.weight")]  # noqa: SIM118
    assert len(injected) == len(written) > 0


def drop(page, path: Path) -> None:
    """A real drop, as from a file manager."""
    session = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, "x": 400, "y": 500, "data": data})


@pytest.mark.own_window
@pytest.mark.parametrize("draft", [QUICK], ids=["quick"])
def test_the_run_outlives_page_and_server(page, new_page, watched, window: Any, pictures: list[Path]) -> None:
    page.fill("#dataset-path input, #dataset-path textarea", str(pictures[0].parent))
    page.click("#dataset-import")
    page.wait_for_selector("#dataset-grid [data-picture]")
    page.fill("#trigger input, #trigger textarea", "zwx ball")
    train(page, 5000)
    state_is(page, "running")
    run = next((window.workspace / "runs").iterdir())
    pid = json.loads((run / "process.json").read_text())["pid"]
    watched.expected_away = True
    page.close()
    window.stop(signal.SIGKILL)
    window.start()
    watched.expected_away = False
    for again in (new_page(), new_page()):
        again.goto(window.address)
        open_tab(again, "Train")
        state_is(again, "running")
        has_value(again, "#steps input", "5000")
        open_tab(again, "Dataset")
        has_value(again, "#trigger input, #trigger textarea", "zwx ball")
    assert json.loads((run / "process.json").read_text())["pid"] == pid
    open_tab(again, "Train")
    again.click("#pause")
    state_is(again, "paused")
    again.click("#resume")
    state_is(again, "running")
    again.click("#stop")
    state_is(again, "stopped")
    assert list((run / "export").glob("*.safetensors"))
    # Ctrl-C ends it, though pages are open, whose streams would go on.
    watched.expected_away = True
    assert window.stop() == 0
    again.wait_for_selector("#away >> text=Your run continues")
