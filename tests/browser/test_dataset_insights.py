"""What will be learned, in a real browser with the real worker: findings lead to pictures, the base finds
swapped captions, a word is proposed and taken, a run's pictures are measured, and a model captions them."""

import shutil
from pathlib import Path

import pytest
import torch

from lora_core.formats.io import save_adapter
from lora_core.lora.weights import AdapterWeights, LayerWeights
from lora_core.model_files.families import FAMILIES
from lora_core.runs.folder import RunFolder
from lora_core.settings.config import RunConfig
from lora_core.system.files import DEMO_BASE
from tests.browser.pages import unfold
from tests.browser.test_axe import violations
from tests.browser.test_dataset import apply_bulk
from tests.browser.windows import Window
from tests.captioners import write_blip, write_clipseg

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v"
LEFT, RIGHT = "02-grapes.png", "05-pineapple.png"


@pytest.fixture
def window(own_window: Window) -> Window:
    """Five pictures in the base's own style, two captions of them swapped, and a run on them."""
    pictures = own_window.project / "pictures"
    for file in sorted((DEMO_BASE / "check").glob("0[1-5]-*")):
        shutil.copy(file, pictures / file.name)
    one, other = (pictures / Path(name).with_suffix(".txt") for name in (LEFT, RIGHT))
    texts = one.read_text(), other.read_text()
    one.write_text(texts[1])
    other.write_text(texts[0])
    settings = {"dataset.path": str(pictures), "validation.pictures": 1, "name": "first"}
    run = RunFolder.create(own_window.workspace / "runs" / "first", RunConfig().changed(settings))
    run.checkpoint(5).mkdir(parents=True)
    draw = torch.Generator().manual_seed(0)
    layer = LayerWeights(torch.randn(2, 128, generator=draw), 0.02 * torch.randn(96, 2, generator=draw), 2.0)
    weights = AdapterWeights({("unet", LAYER): layer})
    save_adapter(weights, run.checkpoint(5) / "adapter.safetensors", FAMILIES["tiny"])
    own_window.open_project("default", {})
    return own_window


def chosen(page) -> str:
    return page.get_attribute("#dataset-grid .thumb.on", "data-picture")


def test_what_will_be_learned(page, window: Window, tmp_path: Path) -> None:
    page.wait_for_selector("#dataset-grid [data-picture]")
    unfold(page, "#learned")
    page.wait_for_selector("#learned-found >> text=of the steps")
    assert "Prompts can ask for" in page.inner_text("#learned-found")
    # A word shows the pictures that have it, in the caption or in the name.
    page.click("[data-learned-word=grapes]")
    page.wait_for_function("document.querySelectorAll('#dataset-grid .thumb:not([hidden])').length == 2")
    page.fill("#dataset-search", "")
    page.wait_for_function("document.querySelector('#picture-facts')?.textContent.includes('% of the steps')")

    # The base names both swapped captions; each row leads to its picture.
    page.click("#captions-start:enabled")
    page.wait_for_selector("#captions-found >> text=2 captions likely wrong")
    page.click(f"#captions-found .finding .mini[data-open-picture='{LEFT}'] >> nth=0")
    assert chosen(page) == LEFT
    page.wait_for_selector("[data-filter=doubt] >> text=In doubt 2")
    assert "in doubt" in page.get_attribute(f"[data-picture='{RIGHT}']", "aria-label")

    # After the captions are set right, what was found is no longer of these captions.
    page.fill("#caption textarea", "grapes, noto style, on a black background")
    page.wait_for_selector("#caption-state[data-state=saved]")
    page.reload()
    page.wait_for_selector("#dataset-grid [data-picture]")
    unfold(page, "#learned")
    page.wait_for_selector("#captions-state >> text=have changed since")
    assert page.locator("[data-filter=doubt]").is_hidden()

    # What the run has learned of each picture.
    page.click("#pictures-start:enabled")
    page.wait_for_selector("#pictures-state >> text=The run first, step 5")
    assert page.locator("#pictures-found .finding").count() == 5
    page.click("[data-learned-order=most]")
    last = page.locator("#pictures-found .mini").last
    name = last.get_attribute("data-open-picture")
    last.click()
    assert chosen(page) == name
    assert "of its loss gained by the last run" in page.inner_text("#picture-facts")

    # A model captions the images: shown first, changed on request, taken back; a wrong folder is a sentence.
    unfold(page, "#bulk")
    page.select_option("#bulk-do", "caption")
    for field, value in (("model", str(write_blip(tmp_path / "tiny-blip"))), ("max_tokens", "4")):
        page.fill(f"[data-captioner={field}]", value)
    page.select_option("[data-captioner=how]", "replace")
    page.wait_for_selector("#bulk-preview >> text=Press Preview")
    page.click("#caption-start:enabled")
    page.wait_for_selector("#bulk-preview >> text=5 captions of 5 would change")
    apply_bulk(page)
    page.wait_for_selector("#bulk-note >> text=5 captions changed")
    page.click("#bulk-undo")
    page.wait_for_selector("#bulk-note >> text=5 captions restored")
    page.fill("[data-captioner=model]", "/nowhere/at all")
    page.click("#caption-start:enabled")
    page.wait_for_selector("#caption-line.problem >> text=There is no folder")
    assert page.is_disabled("#bulk-apply")

    # A model masks the images, by the same steps.
    page.select_option("#bulk-do", "mask")
    for field, value in (
        ("model", str(write_clipseg(tmp_path / "clipseg"))), ("prompt", "grapes"), ("threshold", "0"),
    ):  # fmt: skip
        page.fill(f"[data-masker={field}]", value)
    page.wait_for_selector("#bulk-preview >> text=Press Preview")
    page.click("#masks-preview:enabled")
    page.wait_for_selector("#bulk-preview >> text=5 images of 5 would get a mask.")
    page.wait_for_function("document.querySelector('#bulk-preview img.made-mask')?.naturalWidth > 0")
    apply_bulk(page)
    page.wait_for_selector("#bulk-note >> text=5 masks written")
    page.click("#bulk-undo")
    page.wait_for_selector("#bulk-note >> text=5 masks restored")
    page.select_option("#bulk-do", "table")
    page.fill("#bulk-table", "noto style -> another style\nfirst: another style")
    page.wait_for_selector("#bulk-preview >> text=captions of 5 would change")
    page.select_option("#bulk-do", "caption")

    # A word is proposed, and a click makes it the trigger word.
    page.click("#trigger-propose:enabled")
    page.wait_for_selector("#trigger-found .word")
    for _ in ("light", "dark"):
        page.evaluate("Promise.all(document.getAnimations().map(one => one.finished.catch(() => null)))")
        assert violations(page) == []
        page.click("[data-theme-switch]")
    word = page.get_attribute("#trigger-found .word >> nth=0", "data-trigger-word")
    page.click("#trigger-found .word >> nth=0")
    page.wait_for_function(f"document.querySelector('#dataset-mark')?.dataset.trigger == '{word}'")
    page.click("#trigger-close")
    assert page.locator("#trigger-words").is_hidden()
