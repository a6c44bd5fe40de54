"""The Train tab in a real browser: the newcomer's three clicks, the form, the queue, a crash, and
quitting."""

import json
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.app.bases import write_header
from tests.browser.conftest import DEMO, SHORT, SHORT_DEMO
from tests.browser.pages import (
    find_setting,
    frames,
    has_value,
    open_settings,
    open_tab,
    set_steps,
    state_is,
    until,
)
from tests.waiting import PATIENCE

ONE_BY_ONE = {"train.steps": 120, "train.batch_size": 1}
KOHYA = {"ss_network_dim": "24", "ss_network_alpha": "12", "ss_max_train_steps": "77", "ss_clip_skip": "2"}

IN_FULL = """words => { const line = document.querySelector(".runbar .num"); line.textContent = words;
  return line.scrollWidth <= line.clientWidth && line.scrollHeight <= line.clientHeight + 1; }"""
HOLDS_STREAM = """(() => { const Own = EventSource; window.EventSource = class extends Own {
  set onmessage(tell) { super.onmessage = async (event) => { await window.streamHeld; tell(event); }; }
}; })()"""


def trainer(run: Path) -> psutil.Process:
    return psutil.Process(json.loads((run / "process.json").read_text())["pid"])


@pytest.mark.own_window
def test_three_clicks_from_nothing_to_a_strength_strip(page, window: Any) -> None:
    page.click("#use-demo")
    # Typed only to keep this short; the demo's own 120 steps take a minute or more on a shared machine.
    find_setting(page, "sampler steps", "#sample-steps input")
    page.fill("#sample-steps input", "4")
    page.press("#sample-steps input", "Tab")
    set_steps(page, 6)
    page.click("#start:enabled")
    state_is(page, "preparing", "running")
    page.wait_for_function("/^(Preparing|\\d+%) · .*demo/.test(document.title)")
    state_is(page, "done")
    page.wait_for_function("document.title.startsWith('Done') && easel.lastEnd?.endsWith('is done')")
    assert page.locator("#samples figure").first.inner_text() == "step 0, the base"
    page.click("#samples figure:nth-child(2) a")
    page.wait_for_selector("dialog.lightbox[open] img")
    page.keyboard.press("Escape")
    page.click("#see-result")
    page.wait_for_function("document.querySelectorAll('#strength-strip img').length >= 5")


@pytest.mark.parametrize("draft", [DEMO], ids=["demo"])
def test_form_search_reset_and_two_pages(page, new_page, window: Any, tmp_path: Path) -> None:
    open_tab(page, "Train")
    page.wait_for_selector("#start:enabled")
    other = new_page()
    other.goto(window.address)
    open_tab(other, "Train")
    other.wait_for_selector("#steps input")

    # A wrong value is marked where it stands, with its repair.
    page.fill("#steps input", "-5")
    page.press("#steps input", "Tab")
    page.wait_for_selector("#steps input[aria-invalid=true][aria-describedby=steps-problem]")
    # Start can be pressed all the same, and goes to the field.
    page.click("#start")
    page.wait_for_function("document.activeElement.closest('#steps')")
    page.click("#steps-problem [data-repair]")
    page.wait_for_selector("#steps-problem", state="detached")
    assert page.locator("#steps [aria-invalid]").count() == 0
    # So it does to one that is folded away, and a rate that its optimizer hardly bears has its repair too.
    find_setting(page, "learning rate", "#optimizer-lr input")
    page.fill("#optimizer-lr input", "10")
    page.wait_for_selector("#optimizer-lr-problem.notes >> text=usually given 0.000001 to 0.003")
    assert page.get_attribute("#optimizer-lr input", "aria-invalid") == "false"
    page.fill("#optimizer-lr input", "-1")
    page.wait_for_selector("#optimizer-lr-problem.problem")
    page.fill("#find-setting :is(input, textarea)", "")
    page.wait_for_selector("#optimizer-lr", state="hidden")
    page.click("#all-settings")
    page.wait_for_selector("#find-setting", state="hidden")
    page.click("#start")
    page.wait_for_function("document.activeElement.closest('#optimizer-lr')")
    page.click("#optimizer-lr-problem [data-repair]")
    page.wait_for_selector("#optimizer-lr-problem", state="detached")
    # Each tab has an address, so that Back works.
    assert page.url.endswith("#train")
    open_tab(page, "Export")
    page.wait_for_function("location.hash === '#export'")
    page.go_back()
    page.wait_for_selector("[role=tab][aria-selected=true] >> text=Train")

    # A list that is merely left changes nothing of what was typed.
    set_steps(page, 29)
    for name in ("#base-model", "#goal", "#preset"):
        page.focus(f"{name} input")
        page.keyboard.press("Tab")
    frames(page)
    assert page.locator(".option-list").count() == 0
    page.focus("#goal input")
    page.keyboard.press("ArrowDown")
    page.wait_for_selector("#goal .option-list")
    page.keyboard.press("Tab")
    page.wait_for_selector(".option-list", state="detached")
    find_setting(page, "warm", "#optimizer-warmup input")
    page.wait_for_selector("#optimizer-schedule", state="hidden")
    page.fill("#optimizer-warmup input", "0.2")
    page.press("#optimizer-warmup input", "Tab")
    page.wait_for_selector("#group-learning #reset-learning")
    assert "1 changed from preset" in page.inner_text("#group-learning .group-note")
    has_value(page, "#steps input", "29")
    # The other page was filled before that; what is typed there leaves it alone.
    set_steps(other, 31)
    draft = json.loads((window.project / "draft.json").read_text())["values"]
    assert (draft["optimizer.warmup"], draft["train.steps"]) == (0.2, 31)
    page.click("#reset-learning")
    page.wait_for_function("!document.querySelector('#reset-learning')")
    until(page, lambda: float(page.input_value("#optimizer-warmup input")) == 0.0)

    file = write_header(
        tmp_path / 'a "lora" é.safetensors',
        {
            "lora_unet_mid_attn1_to_q.lora_down.weight": [24, 8],
            "lora_unet_mid_attn1_to_q.lora_up.weight": [8, 24],
        },
        KOHYA,
    )
    page.get_by_text("Import settings from a file").click()
    frames(page)
    page.set_input_files("#like-file", str(file))
    page.wait_for_selector("#like-settings")
    page.wait_for_function("document.querySelector('#steps input')?.value === '77'")
    assert 'a "lora" é.safetensors' in page.inner_text("#like-settings")
    page.wait_for_function("document.querySelector('#command pre')?.textContent.includes('adapter.rank=24')")
    page.fill("#like-path input, #like-path textarea", str(tmp_path / "none.safetensors"))
    page.click("#like-take")
    page.wait_for_selector("#like-note .problem")


def test_a_slider_is_asked_for_in_two_prompts_and_no_images(page) -> None:
    open_tab(page, "Train")
    page.wait_for_selector("#start-why [data-field=no-images]")
    assert not page.locator("#slider").is_visible()
    page.click("#goal input")
    page.get_by_role("option", name="Slider", exact=True).click()
    for name, words in (("positive", "very old"), ("negative", "very young")):
        field = f"#slider-{name} :is(input, textarea)"
        page.wait_for_selector(field)

        def kept(field: str = field, words: str = words) -> bool:
            # Gradio fills the fields of a new goal after it has drawn them, over what is typed by then.
            if page.input_value(field) != words:
                page.fill(field, words)
                page.press(field, "Tab")
            return words in (page.text_content("#command pre") or "")

        until(page, kept)
    said = "document.querySelector('#command pre')?.textContent"
    page.wait_for_function(f"/--preset slider-.*slider.negative=very young/s.test({said})")
    page.wait_for_selector("#start:enabled")


@pytest.mark.own_window
@pytest.mark.parametrize("draft", [SHORT_DEMO], ids=["short"])
def test_the_queue_goes_on_after_a_failure_and_a_kill(page, new_page, watched, window: Any) -> None:
    open_tab(page, "Train")
    set_steps(page, 3)
    open_settings(page)
    for name in ("good", "broken"):
        page.fill("#run-name input, #run-name textarea", name)
        page.click("#add-to-queue:enabled")
        page.wait_for_selector(f"#queue-list [data-job={name}]")
        # The field for the next name is empty by then.
        page.wait_for_selector(f"#start-note >> text={name} waits in the queue")
        has_value(page, "#run-name :is(input, textarea)", "")
    page.click("#queue-list [data-job=broken] [aria-label='Move broken up']")
    page.wait_for_selector("#queue-list [data-job=broken] + [data-job=good]")
    # Its pictures go after it was queued: that fails in a sentence.
    broken = window.workspace / "runs" / "broken" / "config.toml"
    broken.write_text(broken.read_text().replace('path = "demo"', 'path = "/no/such/folder"'))
    watched.expected_away = True
    page.close()
    window.stop(signal.SIGKILL)
    window.start()
    watched.expected_away = False
    again = new_page()
    again.goto(window.address)
    again.wait_for_selector("html[data-ready]")
    open_tab(again, "Train")
    names = "[...document.querySelectorAll('#queue-list [data-job]')].map(one => one.dataset.job)"
    again.wait_for_function(f"{names}.join() === 'broken,good'")
    again.get_by_role("button", name="Start the queue").click()
    again.wait_for_selector("#earlier [data-run=broken][data-run-is=failed]")
    assert "/no/such/folder" in again.inner_text("#earlier [data-run=broken]")
    again.wait_for_function(
        "document.querySelector('[data-run-name]')?.dataset.runName === 'good' &&"
        " document.querySelector('[data-run-state]')?.dataset.runState === 'done'"
    )


@pytest.mark.own_window
@pytest.mark.parametrize("draft", [SHORT_DEMO], ids=["short"])
def test_a_crash_says_why_and_goes_on_and_quit_leaves_it_running(page, watched, window: Any) -> None:
    open_tab(page, "Train")
    set_steps(page, 4000)
    find_setting(page, "save every", "#save-every input")
    page.fill("#save-every input", "5")
    page.press("#save-every input", "Tab")
    page.wait_for_function("document.querySelector('#command pre')?.textContent.includes('save.every=5')")
    page.click("#start:enabled")
    state_is(page, "running")
    page.wait_for_function("Number(document.querySelector('#run-status')?.dataset.step) >= 7")
    (run,) = window.runs()
    trainer(run).kill()
    state_is(page, "interrupted")
    # At once, not only when the page looks again: the wrong reason must not be told in between.
    assert "was killed" in page.inner_text("#run-status [role=alert]")
    page.wait_for_selector("#bar-resume")
    assert page.inner_text("#bar-resume").startswith("Resume from step")
    page.wait_for_function("document.title.startsWith('Interrupted')")
    page.click("#bar-resume")
    state_is(page, "running")
    # On a laptop too the run's longest words are read in full, and its memory is seen.
    for width in (1440, 1366, 1280):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate(IN_FULL, "100%, step 1,800 of 2,000, 20 to 35 min left"), width
        page.wait_for_selector("#run-status .memory >> text=/[0-9.]+ GB/")
    # A phone sees the run first, and steers it.
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_function(
        "document.querySelector('#run-status')?.getBoundingClientRect().top <"
        " document.querySelector('#base-model')?.getBoundingClientRect().top"
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.click("#quit")
    page.wait_for_selector("dialog[open] >> text=continues")
    watched.expected_away = True
    page.click("dialog[open] .primary >> text=Quit")
    page.wait_for_selector("#closed")
    assert run.name in page.inner_text("#closed")
    assert window.process.wait(PATIENCE) == 0
    assert trainer(run).is_running()
    page.close()
    window.close_output()
    trainer(run).kill()


@pytest.mark.parametrize("draft", [{"values": {**SHORT, **ONE_BY_ONE}}], ids=["short"])
def test_a_resume_after_a_change_asks_and_goes_on_only_with_a_yes(
    page, window: Any, pictures: list[Path]
) -> None:
    page.fill("#dataset-path input, #dataset-path textarea", str(pictures[0].parent))
    page.click("#dataset-import")
    page.wait_for_selector("#dataset-grid [data-picture]")
    open_tab(page, "Train")
    page.click("#start:enabled")
    page.wait_for_function("Number(document.querySelector('#run-status')?.dataset.step) >= 2")
    page.click("#stop")
    state_is(page, "stopped")
    (run,) = window.runs()
    open_tab(page, "Dataset")
    page.click("#dataset-grid [data-picture='ball 1 é.png']")
    page.fill("#caption textarea", "another ball")
    page.wait_for_selector("#caption-state[data-state=saved]")

    open_tab(page, "Train")
    page.click("#resume")
    state_is(page, "failed")
    asked = page.wait_for_selector("#run-status [data-hint=changed]").inner_text()
    assert "this has changed: the image ball 1 é.png or its caption." in asked
    assert "--accept" not in page.inner_text("#run-status")
    row = page.locator(f"[data-run='{run.name}']")
    assert "ball 1 é.png or its caption" in row.inner_text()
    assert page.locator("#run-status").get_by_role("button", name="Resume from").count() == 1
    page.click("#train-accept")
    state_is(page, "done")
    assert page.get_attribute("#run-status", "data-step") == "120"
    assert page.locator("[data-hint=changed], #train-accept").count() == 0
    assert list((run / "export").glob("*.safetensors"))


@pytest.mark.own_window
@pytest.mark.parametrize("draft", [SHORT_DEMO], ids=["short"])
def test_a_sweep_is_ordered_compared_and_cloned(page) -> None:
    def order_is(*names: str) -> None:
        jobs = "[...document.querySelectorAll('#queue [data-job]')].map(one => one.dataset.job).join()"
        page.wait_for_function(f"{jobs} === '{','.join(names)}'")

    open_tab(page, "Train")
    page.click("#sweep summary")
    page.fill("#sweep-values", "5, 0")
    page.press("#sweep-values", "Enter")
    page.wait_for_selector("#sweep-values[aria-invalid=true]")
    assert page.inner_text("#sweep-problem").startswith("Rank")
    page.fill("#sweep-values", "5, 6, 7")
    page.press("#sweep-values", "Enter")
    order_is("rank-5", "rank-6", "rank-7")
    # Keys that come faster than the answers all count, and the focus goes with the run.
    page.focus("[data-job=rank-5] .view")
    for _ in range(2):
        page.keyboard.press("Alt+ArrowDown")
    order_is("rank-6", "rank-7", "rank-5")
    page.wait_for_function("document.activeElement?.closest('[data-job]')?.dataset.job === 'rank-5'")
    page.drag_and_drop("[data-job=rank-5] b", "[data-job=rank-6] b")
    order_is("rank-5", "rank-6", "rank-7")
    page.focus("[data-job=rank-5] .view")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_selector("#run-status[data-shown-run=rank-6]")
    page.get_by_role("link", name="Compare rank-7 with rank-6").click()
    page.wait_for_selector("#comparison[data-runs='rank-6+rank-7']")
    assert page.evaluate("decodeURIComponent(location.hash)") == "#run/rank-6+rank-7"
    row = page.get_by_role("row").filter(has=page.get_by_role("rowheader", name="Rank (size)", exact=True))
    assert row.get_by_role("cell").all_inner_texts() == ["6", "7"]
    page.get_by_role("link", name="Stop comparing", exact=True).click()
    page.wait_for_selector("#comparison", state="detached")
    command = "document.querySelector('#command pre')?.textContent.includes('adapter.rank=6')"
    page.get_by_role("button", name="Use these settings").click()
    page.wait_for_function(command)
    page.keyboard.press("Control+z")
    page.wait_for_function(f"!{command}")
    # Deleted without a question, as it can be undone.
    # The page learns only after the undo that the run had been deleted.
    page.add_init_script(HOLDS_STREAM)
    page.reload()
    page.wait_for_selector("#run-status[data-shown-run=rank-6]")
    page.evaluate("window.streamHeld = new Promise(done => { window.releaseStream = done; }), null")
    page.get_by_role("button", name="Delete rank-6").click()
    page.wait_for_selector("#easel-toast.on >> text=rank-6 is in the trash")
    with page.expect_response(lambda r: r.url.endswith("/easel/run") and "show" in r.request.post_data):
        page.keyboard.press("Control+z")
    page.evaluate("releaseStream()")
    page.wait_for_selector("#run-status[data-shown-run=rank-6]")
    order_is("rank-5", "rank-7")


@pytest.mark.parametrize("draft", [DEMO], ids=["demo"])
def test_another_optimizer_brings_its_rate_and_gives_it_back(page) -> None:
    open_tab(page, "Train")
    page.wait_for_selector("#start:enabled")
    find_setting(page, "optimizer", "#optimizer-name input")
    has_value(page, "#optimizer-lr input", "0.003")
    page.click("#optimizer-name input")
    page.get_by_role("option", name="Lion", exact=True).click()
    has_value(page, "#optimizer-lr input", "0.0006")
    page.wait_for_function(
        "document.querySelector('#command pre')?.textContent.includes('optimizer.name=lion')"
    )
    page.click("#swap-rates")
    has_value(page, "#optimizer-lr input", "0.003")
    page.wait_for_selector("#swap-rates:has-text('Use 0.0006')")
    frames(page)
    page.click("#optimizer-name input")
    page.fill("#optimizer-name input", "torch.optim:Adamax")
    page.press("#optimizer-name input", "Enter")
    page.wait_for_function(
        "document.querySelector('#command pre')?.textContent.includes('optimizer.name=torch.optim:Adamax')"
    )
