"""The Preview tab in a real browser: LoRAs, strengths, strip, grid, what was drawn, settings out of a
picture."""

from pathlib import Path
from typing import Any

import pytest

from tests.browser.pages import has_value, open_tab
from tests.browser.test_main_path import drop

HOSTILE = "<img src=x onerror=\"document.title='broken in'\"> {{7*7}} \u202e😀"

CHOSEN = "(document.querySelector('#loras [data-row=\"0\"] select')?.selectedOptions[0].textContent || '')"


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Strong enough that every picture shows it."""
    import torch

    from lora_core.formats.io import save_adapter
    from lora_core.lora.weights import AdapterWeights, LayerWeights
    from lora_core.model_files.families import FAMILIES

    path = tmp_path_factory.mktemp("lora") / "größe \"<b>x'.safetensors"
    draw = torch.Generator().manual_seed(0)
    layer = LayerWeights(torch.randn(4, 128, generator=draw), torch.randn(96, 4, generator=draw), 1.0)
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v"
    save_adapter(AdapterWeights({("unet", name): layer}), path, FAMILIES["tiny"])
    return path


SHIFTS = """() => { window.shifts = []; new PerformanceObserver(
  (list) => shifts.push(...list.getEntries().map((one) => one.value))).observe({ type: 'layout-shift' }); }"""


def drawn(page) -> None:
    page.wait_for_selector("#preview-state[data-state=idle][data-busy='0']")


def source(page, which: str) -> str:
    return str(page.get_attribute(f"#preview-{which} img", "src"))


def test_loras_strengths_strip_and_history(page, window: Any, lora: Path) -> None:
    open_tab(page, "Preview")
    page.wait_for_selector("#loras[data-ready]")
    assert "press Generate" in page.inner_text("#stage")
    assert page.is_disabled("#cancel-drawing")
    # A typed path, then the dropped file itself.
    page.click("#add-lora")
    page.select_option("#loras [data-part=file]", "")
    page.fill("#loras [data-part=path]", "/nowhere/x.safetensors")
    page.fill("#prompt textarea", HOSTILE)
    page.click("#sampling summary")
    page.fill("#sampler-steps input", "3")
    page.fill("#seed input", "7")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(
        "#preview-state[data-state=error]:has-text('/nowhere/x.safetensors does not exist')"
    )
    page.click("[data-remove-lora]")
    # So is a full disk.
    asked = "**/easel/preview/generate"
    page.route(asked, lambda route: route.fulfill(json={"problem": "No space left."}))
    page.click("#generate")
    page.wait_for_selector("#preview-state[data-state=error]:has-text('No space left.')")
    page.unroute(asked)
    drop(page, lora)
    page.wait_for_selector("#preview-report:has-text('is added')")
    page.wait_for_function(f"{CHOSEN}.startsWith('größe')")
    assert page.locator("#loras [data-row]").count() == 1

    page.click("#generate")
    page.wait_for_function("document.querySelectorAll('#strength-strip img').length == 5")
    drawn(page)
    base, whole = source(page, "base"), source(page, "result")
    strip = page.eval_on_selector_all("#strength-strip img", "all => all.map(one => one.getAttribute('src'))")
    assert (strip[0], strip[4]) == (base, whole), "a cell of the strip is the very image"
    assert len(set(strip)) == 5
    assert "Seed 7" in page.inner_text("#preview-facts")

    # All of the base, all of the LoRA.
    shown = "[...document.querySelectorAll('#compare > span')].map(one => one.checkVisibility())"
    page.focus("input.split")
    for key, seen in ((" ", [True, False]), (" ", [False, True])):
        page.keyboard.press(key)
        assert page.evaluate(shown) == seen
    page.click("#flip >> text=Show base")
    assert page.inner_text("#flip") == "Show LoRA"
    page.fill("input.split", "50")
    assert page.evaluate(shown) == [True, True]

    # Enlarged: Space shows the base's own image in its place, 4x is of the image's own pixels.
    page.click("#enlarge")
    page.wait_for_selector("dialog.lightbox p:has-text('LoRA 1.00')")
    page.keyboard.press(" ")
    page.wait_for_selector("dialog.lightbox p:has-text('Base.')")
    assert page.get_attribute("dialog.lightbox img", "src") == base
    page.click("dialog.lightbox >> text=4\N{MULTIPLICATION SIGN}")
    page.wait_for_function("document.querySelector('dialog.lightbox img').width === 512 / devicePixelRatio")
    page.keyboard.press("Escape")

    page.fill("#strength input[type=range]", "0.4")
    page.wait_for_selector("#compare[data-strength='0.40'] #preview-result:not(.stale)")
    drawn(page)
    assert source(page, "base") == base
    page.fill("#strength input[type=number]", "2.5")
    page.wait_for_selector("#compare[data-strength='2.50'] #preview-result:not(.stale)")
    drawn(page)
    page.click("button[data-compare=strip]")
    with page.expect_download() as download:
        page.click("#save-strip")
    assert download.value.suggested_filename.endswith("-strip.png")

    page.wait_for_function("document.querySelectorAll('#history .cell').length == 4")
    page.fill("#prompt textarea", "something else")
    page.locator("#history [data-put-back]").last.click()
    page.wait_for_function(f"document.querySelector('#prompt textarea')?.value === {HOSTILE!r}")
    page.wait_for_function("document.querySelector('#strength input[type=range]')?.value === '1'")
    page.wait_for_selector("#compare[data-strength='1.00']")
    cell = page.locator("#history .cell").last
    assert cell.bounding_box()["y"] + 80 < page.locator(".foot-row:visible").bounding_box()["y"]
    cell.hover()
    cell.locator("[data-star]").click()
    page.mouse.move(0, 0)
    page.wait_for_selector("#history .cell:last-child [data-star][data-on='']:visible")
    thrown = len(list((window.workspace / ".trash").glob("*")))
    page.locator("#history .cell").first.hover()
    page.locator("#history [data-forget]").first.click()
    page.wait_for_function("document.querySelectorAll('#history .cell').length == 3")
    assert len(list((window.workspace / ".trash").iterdir())) == thrown + 1
    assert page.title() != "broken in"

    # Nothing moves while both images are new.
    page.fill("#seed input", "8")
    page.wait_for_timeout(600)
    page.evaluate(SHIFTS)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#preview-facts:has-text('Seed 8')")
    drawn(page)
    assert page.evaluate("shifts.reduce((sum, one) => sum + one, 0)") < 0.01


def test_a_grid_its_settings_and_cancelling(page, window: Any, lora: Path, tmp_path: Path) -> None:
    open_tab(page, "Preview")
    page.wait_for_selector("#loras[data-ready]")
    drop(page, lora)
    page.wait_for_selector("#loras [data-row]")
    page.check("#text-apart")
    page.fill("#loras [data-part=text][data-typed]", "0.25")
    # It comes back with the tick.
    page.uncheck("#text-apart")
    page.wait_for_selector("#loras [data-part=text]", state="detached")
    page.check("#text-apart")
    has_value(page, "#loras [data-part=text][data-typed]", "0.25")
    # The second of two quick clicks is not taken back by the answer to the first.
    for number in (2, 3):
        page.click("#add-lora")
        page.wait_for_selector(f"#loras [data-row='{number - 1}']")
    page.evaluate(
        """() => {
            const remove = () => [...document.querySelectorAll("[data-remove-lora]")].at(-1).click();
            remove(); setTimeout(remove, 5);
        }"""
    )
    page.wait_for_function("document.querySelectorAll('#loras [data-row]').length === 1")
    page.click("button[data-compare=grid]")
    page.wait_for_selector("#grid-form[data-ready]")
    page.fill("#grid-columns-values input", "0, 0.5")
    page.fill("#prompt textarea", "an owl")
    page.click("#sampling summary")
    page.fill("#sampler-steps input", "4")
    page.fill("#seed input", "-1")
    page.click("#draw-grid")
    page.wait_for_selector("#grid-state[data-state=done] img")
    # The lightbox: the sheet at its own size, closed by Escape.
    page.click("#grid-state a")
    page.click("dialog.lightbox >> text=1:1")
    page.wait_for_selector("dialog.lightbox [data-scale='1'] img")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog.lightbox", state="detached")
    with page.expect_download() as download:
        page.click("#save-grid")
    sheet = tmp_path / "sheet.png"
    download.value.save_as(sheet)
    from PIL import Image

    text = Image.open(sheet).text["parameters"]
    assert ":0.25:1>" in text
    assert 'Columns: "strength=0,0.5"' in text

    page.reload()
    open_tab(page, "Preview")
    page.wait_for_selector("#loras[data-ready] [data-row]")
    has_value(page, "#loras [data-part=text][data-typed]", "0.25")
    has_value(page, "#prompt textarea", "an owl")
    has_value(page, "#sampler-steps input", "4")
    page.click("button[data-compare=slider]")
    page.click("#sampling summary")
    page.fill("#prompt textarea", "a long one")
    page.fill("#sampler-steps input", "200")
    page.click("#generate")
    page.wait_for_selector("#compare img.look:not([hidden])")
    page.wait_for_selector("#preview-state:has-text('of 200')")
    page.click("#cancel-drawing")
    page.wait_for_selector("#preview-state[data-state=idle]:has-text('Cancelled')")
    page.wait_for_function("document.querySelector('#compare img.look')?.hidden")

    drop(page, sheet)
    page.wait_for_selector("#preview-report td:has-text('an owl')")
    page.click("#send-to-form")
    page.wait_for_function("document.querySelector('#prompt textarea')?.value === 'an owl'")
    page.wait_for_function("document.querySelector('#seed input').value !== '-1'")
    has_value(page, "#sampler-steps input", "4")

    # The sheet as what the next image starts from.
    drop(page, sheet)
    page.click("#preview-report [data-start-from]")
    page.wait_for_function("document.querySelector('#start-image input').value.endsWith('sheet.png')")
    page.fill("#denoising input", "0.5")
    page.fill("#seed input", "7")
    page.click("#generate")
    page.wait_for_selector("#preview-facts:has-text('from an image at 0.5')")
    page.wait_for_selector("#preview-state[data-state=idle]:has-text('about ')")


def test_a_painted_mask_is_for_an_inpainting_base(page, window: Any, tmp_path: Path) -> None:
    """It goes from the canvas into the form; the embedded base says that it takes none."""
    from PIL import Image

    Image.new("RGB", (128, 96), "green").save(tmp_path / "start.png")
    open_tab(page, "Preview")
    page.wait_for_selector("#loras[data-ready]")
    page.click("#sampling summary")
    page.fill("#start-image input", str(tmp_path / "start.png"))
    page.click("#paint-mask")
    box = page.wait_for_selector("dialog canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=3)
    page.mouse.up()
    page.click("dialog button:has-text('Done')")
    page.wait_for_selector("dialog canvas", state="detached")
    first = page.input_value("#start-mask input")
    # By keys, over what was painted: the middle is erased, and made white again by undoing that.
    page.focus("#paint-mask")
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog canvas:focus")
    for key in ("e", "]", "Space", "Control+z", "b", "ArrowRight", "Space", "Enter"):
        page.keyboard.press(key)
    page.wait_for_selector("dialog canvas", state="detached")
    page.wait_for_function("first => document.querySelector('#start-mask input').value != first", arg=first)
    mask = Path(page.input_value("#start-mask input"))
    with Image.open(mask) as painted:
        assert (painted.mode, painted.size) == ("L", (128, 96))
        assert painted.getpixel((40, 48)) == 255
        assert painted.getpixel((100, 10)) == 0
    # An unchanged mask keeps its file.
    page.focus("#paint-mask")
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog canvas:focus")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog canvas", state="detached")
    assert page.input_value("#start-mask input") == str(mask)
    page.fill("#sampler-steps input", "2")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#preview-state[data-state=error]:has-text('takes no mask')")
