"""Text that wants to be more than text, wherever a person or a file can bring some: it is shown as it is and
saved byte for byte, and the page stays the page."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from app.state import AppState
from lora_core.runs import events
from tests.app.runs import make_run, started, step
from tests.browser.pages import frames, has_value, loaded_anew, open_settings, open_tab, unfold
from tests.browser.test_dataset import pictures_in, take
from tests.browser.test_toolbox import type_path
from tests.browser.windows import Window

HOSTILE = (
    '<img src=x onerror="window.hit=1">{{7*7}}${7*7} \u202eabc\u200f 😀 \'q\' "Q"'
    " &amp;<script>window.hit=1</script>"
)
LONG = "word " * 2000
NAME = "we\"ird '<img src=x onerror=hit=1>' {{7*7}} \u202eabc 😀\nline.png"


@pytest.fixture
def window(own_window: Window, pictures: list[Path]) -> Window:
    """With a run whose every text is hostile; written before the first page looks."""
    app_state = AppState(own_window.workspace, worker_command=["no-such-program"])
    lines = [
        started(),
        step(3),
        events.PreviewDone(step=3, files=["previews/3.png"], prompts=[HOSTILE]),
        events.Warned(step=3, message=HOSTILE),
        events.Failed(step=3, reason=f"The base {HOSTILE} cannot be read."),
    ]
    run = make_run(app_state, "first", *lines, dataset__trigger=HOSTILE, sample__prompts=[HOSTILE])
    (run.path / "previews").mkdir(exist_ok=True)
    shutil.copy(pictures[0], run.path / "previews" / "3.png")
    run.log_file.write_text(f"{HOSTILE}\n", encoding="utf-8")
    app_state.close()
    return own_window


def lora(path: Path) -> Path:
    """A LoRA whose header says hostile things of itself."""
    import torch

    from lora_core.formats.io import save_adapter
    from lora_core.lora.weights import AdapterWeights, LayerWeights
    from lora_core.model_files.families import FAMILIES

    layer = LayerWeights(torch.zeros(4, 128), torch.zeros(96, 4), 1.0)
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v"
    said = {
        "modelspec.trigger_phrase": HOSTILE,
        "modelspec.title": HOSTILE,
        "ss_sd_model_name": HOSTILE,
        "ss_output_name": HOSTILE,
        "ss_optimizer": HOSTILE,
        "ss_network_dim": HOSTILE,
        "software": json.dumps({"name": HOSTILE, "version": LONG}),
    }
    weights = AdapterWeights({("unet", name): layer}, said)
    save_adapter(weights, path, FAMILIES["tiny"], metadata=said)
    return path


def unhurt(page: Any) -> None:
    """Nothing ran, no picture of that name stands in the page, and nothing was worked out."""
    assert page.evaluate("window.hit") is None
    assert page.locator("img[src=x], body script:text('window.hit')").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def said(page: Any, selector: str) -> str:
    return " ".join(page.locator(selector).all_text_contents())


def test_text_is_only_text(page: Any, window: Any, pictures: list[Path], tmp_path: Path) -> None:
    stored = window.workspace / "projects"
    own = tmp_path / "drop"
    own.mkdir()
    picture = own / NAME
    shutil.copy(pictures[0], picture)
    picture.with_suffix(".txt").write_text(HOSTILE, encoding="utf-8")

    # A project, and a picture with a caption, both named so.
    page.click("#project-picker")
    title = HOSTILE[:70]
    page.fill("#project-new input", title)
    with loaded_anew(page):
        page.press("#project-new input", "Enter")
    page.wait_for_function(
        "title => document.querySelector('#project-picker')?.textContent.trim() === title", arg=title
    )
    (project,) = (one for one in stored.iterdir() if one.is_dir() and one.name != "default")
    assert json.loads((project / "project.json").read_text(encoding="utf-8"))["title"] == title
    page.wait_for_selector("#dataset-mark", state="attached")
    take(page, [picture, picture.with_suffix(".txt")])
    pictures_in(page, 1)
    shown = page.get_attribute("[data-picture]", "data-picture")
    # What no file system or not each takes is its full-width twin or an underscore; the rest is as it was.
    assert shown == "we\uff02ird '\uff1cimg src=x onerror=hit=1\uff1e' {{7\uff0a7}} \u202eabc 😀_line.png"
    page.click("[data-picture]")
    has_value(page, "#caption textarea", HOSTILE)
    assert shown in page.inner_text("#picture-name")
    caption = (project / "pictures" / shown).with_suffix(".txt")
    for text in (f"{HOSTILE} {LONG}".strip(), f"{HOSTILE} once more"):
        page.fill("#caption textarea", text)
        page.wait_for_selector("#caption-state[data-state=saved]")
        assert caption.read_text(encoding="utf-8") == text
    page.fill("#trigger :is(input, textarea)", HOSTILE)
    page.press("#trigger :is(input, textarea)", "Tab")
    page.wait_for_selector("#dataset-mark[data-trigger*='onerror']", state="attached")
    unfold(page, "#bulk")
    page.wait_for_selector("#bulk-tags >> text=onerror")
    page.fill("#bulk-find", "once more")
    page.fill("#bulk-put", HOSTILE)
    page.wait_for_selector("#bulk-preview ins")
    assert HOSTILE in said(page, "#bulk-preview ins")
    unhurt(page)

    # A run may not be called so, and says it as text; what runs bring along is text too.
    open_tab(page, "Train")
    open_settings(page)
    page.fill("#run-name :is(input, textarea)", HOSTILE)
    page.click("#start:enabled")
    page.wait_for_selector("text=cannot be a folder's")
    assert HOSTILE[:30] in said(page, ".gradio-container")
    assert [run.name for run in (window.workspace / "runs").glob("[!.]*")] == ["first"]
    unhurt(page)

    file = lora(tmp_path / NAME.replace("\n", " ").replace(".png", ".safetensors"))
    page.get_by_text("Import settings from a file").click()
    frames(page)
    page.set_input_files("#like-file", str(file))
    page.wait_for_selector("#like-settings, #like-note .problem")
    open_tab(page, "Preview")
    page.wait_for_selector("#loras[data-ready]")
    page.click("#negative-fold summary")
    for field in ("#prompt textarea", "#negative textarea"):
        page.fill(field, f"{HOSTILE}\n{LONG}")
        page.press(field, "Tab")
    page.wait_for_timeout(300)
    unhurt(page)
    open_tab(page, "Toolbox")
    type_path(page, file)
    page.click("#toolbox-go:enabled")
    page.wait_for_selector("#toolbox-answer .check-result")
    assert said(page, "#toolbox-answer").count("{{7*7}}${7*7}") >= 3
    unhurt(page)

    # All of it once more, after a new load; then the other project with its hostile run.
    page.reload()
    page.wait_for_function("document.querySelector('#prompt textarea, #dataset-mark')")
    open_tab(page, "Preview")
    page.wait_for_selector("#loras[data-ready]")
    has_value(page, "#prompt textarea", f"{HOSTILE}\n{LONG}")
    open_tab(page, "Dataset")
    page.click("#project-picker")
    with loaded_anew(page):
        page.get_by_role("button", name="Open My images", exact=True).click()
    page.wait_for_function("document.querySelector('#project-picker')?.textContent.trim() === 'My images'")
    open_tab(page, "Train")
    page.wait_for_selector("#run-status[data-state=failed]")
    assert HOSTILE in said(page, "#run-status [role=alert]")
    assert HOSTILE in said(page, "#samples .prompt")
    assert HOSTILE in said(page, ".log")
    unhurt(page)
