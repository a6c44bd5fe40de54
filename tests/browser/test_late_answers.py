"""What a person does while an answer is on its way: nothing typed is lost, nothing is done twice, and an
answer of the time before does not count."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import DEMO
from tests.browser.pages import open_tab, state_is, unfold, until
from tests.browser.test_dataset import apply_bulk, names, pictures_in, stored, take
from tests.browser.windows import Window

AREA = "#caption textarea"


class Held(list[Any]):
    """Routes with the server's answers, which the page does not get before `release`."""

    def release(self) -> None:
        while self:
            route, answer = self.pop()
            route.fulfill(response=answer)


@contextmanager
def held_back(page: Any, path: str, method: str = "GET") -> Iterator[Held]:
    """The server answers at once, but the page gets the first such answer only at the end of the block.

    Playwright does not report every request that is sent while the last route is taken away: a test that
    counts what the answer makes the page send releases it and counts within the block.
    """
    held = Held()
    taken = False

    def handle(route: Any) -> None:
        nonlocal taken
        if route.request.method != method or taken:
            route.continue_()
            return
        taken = True
        held.append((route, route.fetch()))

    page.route(path, handle)
    yield held
    held.release()
    page.unroute(path)


def test_an_older_list_of_pictures_does_not_take_back_what_was_typed(
    page: Any, window: Window, pictures: list[Path]
) -> None:
    take(page, [*pictures, *(p.with_suffix(".txt") for p in pictures[1:])])
    pictures_in(page, 6)
    page.click("#dataset-grid [data-picture='ball 1 é.png']")
    with held_back(page, "**/easel/dataset") as held:
        page.evaluate("window.loaded = window.easel.load(), null")
        until(page, lambda: held)
        page.fill(AREA, "typed meanwhile")
        page.wait_for_selector("#caption-state >> text=Saved")
        # Not even until the list is asked for once more: somebody may be typing.
        page.evaluate(
            "area => { window.read = new Set(); setInterval(() => window.read.add(area.value), 1); }",
            page.query_selector(AREA),
        )
    page.evaluate("window.loaded")
    assert page.evaluate("[...window.read]") == ["typed meanwhile"]
    assert page.evaluate("easel.shelf().pictures[1].caption") == "typed meanwhile"
    assert (stored(window) / "ball 1 é.txt").read_text() == "typed meanwhile"


def test_the_newest_of_two_captions_stays_and_a_change_waits_for_the_one_before(
    page: Any, window: Window, pictures: list[Path]
) -> None:
    take(page, [*pictures, *(p.with_suffix(".txt") for p in pictures[1:])])
    pictures_in(page, 6)
    page.click("#dataset-grid [data-picture='ball 1 é.png']")
    sent: list[Any] = []
    page.on(
        "request", lambda r: sent.append(r.post_data_json["text"]) if r.url.endswith("/caption") else None
    )
    with held_back(page, "**/easel/caption", "POST") as held:
        page.fill(AREA, "older")
        until(page, lambda: held)
        page.fill(AREA, "newer")
        page.wait_for_timeout(600)
        assert sent == ["older"]
        held.release()
        until(page, lambda: len(sent) == 2)
    page.wait_for_selector("#caption-state[data-state=saved]")
    assert sent == ["older", "newer"]
    assert (stored(window) / "ball 1 é.txt").read_text() == "newer"

    unfold(page, "#bulk")
    page.click("#bulk-tags [aria-label='Delete the tag newer']")
    page.wait_for_selector("#bulk-note >> text=1 caption changed")
    with held_back(page, "**/easel/tags") as held:
        page.click("#bulk-undo")
        until(page, lambda: held)
        page.fill("#trigger input, #trigger textarea", "sks ball")
        page.click("#trigger-to-all")
    page.wait_for_selector("#import-note >> text=6 captions changed")
    assert (stored(window) / "ball 1 é.txt").read_text() == "sks ball, newer"


def test_twice_pressed_is_done_once_and_each_delete_takes_its_own(
    page: Any, window: Window, pictures: list[Path]
) -> None:
    take(page, [*pictures, *(p.with_suffix(".txt") for p in pictures[1:])])
    pictures_in(page, 6)
    unfold(page, "#bulk")
    page.select_option("#bulk-do", "prepend")
    page.fill("#bulk-put", "zwx, ")
    apply_bulk(page, times=2)
    page.wait_for_selector("#bulk-note >> text=captions changed")
    page.evaluate("window.easel.load()")
    assert page.evaluate("easel.shelf().pictures[1].caption").count("zwx") == 1

    listed = names(page)
    page.click(f"#dataset-grid [data-picture='{listed[1]}']")
    for _ in range(3):
        page.keyboard.press("Delete")
    pictures_in(page, 3)
    assert names(page) == [listed[0], *listed[4:]]
    assert page.evaluate("document.activeElement.dataset.picture") == listed[4]


def test_a_list_whose_options_come_and_go_shows_the_one_that_the_server_chose(page: Any) -> None:
    filled = """([before, after]) => {
      const place = document.createElement("div");
      for (const html of [before, after]) easel.fill(place, `<select>${html}</select>`);
      return place.firstChild.value;
    }"""
    others = '<optgroup label="Other projects"><option value="old">old</option></optgroup>'
    none = f'<option value="" selected>Choose a run</option>{others}'
    own = '<optgroup label="This project"><option value="new" selected>new</option></optgroup>'
    assert page.evaluate(filled, [none, own + others]) == "new"
    assert page.evaluate(filled, [own + others, none]) == ""
    # The one that the user chose is gone.
    gone = """() => {
      const place = document.createElement("div"), last = "<option selected>c</option>";
      easel.fill(place, `<select><option>a</option><option>b</option>${last}</select>`);
      place.firstChild.value = "b";
      easel.fill(place, `<select><option>a</option>${last}</select>`);
      return place.firstChild.value;
    }"""
    assert page.evaluate(gone) == "c"


def test_a_file_is_added_to_the_toolbox_although_a_tool_is_chosen_before_the_answer(page: Any) -> None:
    open_tab(page, "Toolbox")
    page.wait_for_selector("#toolbox [data-tool=check][aria-pressed=true]")
    page.click("#toolbox [data-verb~=merge]")
    page.wait_for_selector("#toolbox [data-tool=merge][aria-pressed=true]")
    click = "(...all) => all.forEach((one) => document.querySelector(one).click())"
    page.evaluate(f"({click})('#toolbox-add', '#toolbox [data-tool=stack]')")
    page.wait_for_selector("#toolbox [data-tool=stack][aria-pressed=true]")
    assert page.locator(".toolbox-file").count() == 2


@pytest.mark.parametrize("draft", [DEMO], ids=["demo"])
def test_a_start_counts_although_an_older_answer_comes_after_it(page: Any, window: Window) -> None:
    page.wait_for_selector("#dataset-grid [data-picture]")
    with held_back(page, "**/easel/insights") as held:
        unfold(page, "#learned")
        until(page, lambda: held)
        page.click("#captions-start")
        page.wait_for_selector("[data-insight-cancel=captions]:visible")
    page.wait_for_selector("#captions-found :is(.notes, .small)")
    assert page.is_hidden("[data-insight-cancel=captions]")


def test_a_mask_that_opens_or_is_saved_late_leaves_the_next_image_alone(
    page: Any, window: Window, pictures: list[Path]
) -> None:
    take(page, pictures[:2])
    pictures_in(page, 2)
    first, second = page.query_selector_all("#dataset-grid [data-picture]")
    first.click()
    page.click("#mask-start")
    page.wait_for_selector("#picture-big canvas:focus")
    with held_back(page, "**/easel/mask", "POST") as held:
        page.keyboard.press("Space")
        second.click()
        page.wait_for_selector("#mask-bar", state="hidden")
        until(page, lambda: held)
        page.fill(AREA, "a caption")
    page.wait_for_selector("#easel-toast >> text=1 mask saved.")
    assert page.evaluate(f"document.activeElement.matches('{AREA}')")
    first.click()
    page.wait_for_selector("#picture-big .mask:not([hidden])")
    with held_back(page, "**/*-masklabel.png*") as held:
        page.click("#mask-start")
        until(page, lambda: held)
        second.click()
    # What opens the editor has had its turn.
    page.evaluate("window.easel.inTurn(() => {})")
    assert page.is_hidden("#mask-bar")
    assert len(list(stored(window).rglob("*-masklabel.png"))) == 1


def add_lora(page: Any) -> None:
    """Add a row, and wait until the server has it."""
    with page.expect_response("**/easel/preview/loras"):
        page.click("#add-lora")
    page.wait_for_selector("#loras [data-row]")


def test_rows_arrive_in_the_order_in_which_they_were_changed(page: Any, window: Window) -> None:
    open_tab(page, "Preview")
    page.wait_for_selector("#loras[data-ready]")
    add_lora(page)
    sent: list[Any] = []
    page.on("request", lambda r: sent.append(r.post_data_json) if r.url.endswith("/preview/rows") else None)
    with held_back(page, "**/easel/preview/rows", "POST") as held:
        page.fill("#strength input[type=number]", "0.3")
        until(page, lambda: held)
        for value in ("0.4", "0.5"):
            page.fill("#strength input[type=number]", value)
            page.wait_for_timeout(150)
        assert [one["rows"][0]["strength"] for one in sent] == [0.3]
        held.release()
        until(page, lambda: len(sent) == 2)
    assert page.input_value("#strength input[type=number]") == "0.5"
    assert [one["rows"][0]["strength"] for one in sent] == [0.3, 0.5]


def test_what_is_changed_while_generate_is_under_way_counts(page: Any, window: Window) -> None:
    open_tab(page, "Preview")
    page.wait_for_selector("#loras[data-ready]")
    add_lora(page)
    sent: list[Any] = []
    page.on("request", lambda r: sent.append(r.post_data_json) if r.url.endswith("/preview/rows") else None)
    with held_back(page, "**/easel/preview/generate", "POST") as held:
        page.click("#generate")
        until(page, lambda: held)
        page.fill("#strength input[type=number]", "0.4")
        page.wait_for_timeout(150)
        assert not sent
        held.release()
        until(page, lambda: sent)
    assert sent[0]["rows"][0]["strength"] == 0.4


def test_an_address_that_is_not_encoded_right_stops_nothing(page: Any, window: Window) -> None:
    page.evaluate("location.hash = '#run/%E0%A4%A'")
    page.wait_for_selector("[role=tab][aria-selected=true] >> text=Train")
    open_tab(page, "Export")
    until(page, lambda: page.evaluate("location.hash") == "#export")


def test_a_button_that_is_drawn_anew_keeps_the_keyboard(page: Any, window: Window) -> None:
    page.focus("#tell-end")
    page.evaluate(
        "const box = document.querySelector('#tell-end').parentElement; box.innerHTML = box.innerHTML"
    )
    until(page, lambda: page.evaluate("document.activeElement.id") == "tell-end")


@pytest.mark.parametrize("draft", [{**DEMO, "values": {"train.steps": 4}}], ids=["demo"])
def test_a_page_that_nobody_looks_at_tells_how_the_run_ended(page: Any, window: Window) -> None:
    open_tab(page, "Train")
    page.click("#start:enabled")
    state_is(page, "preparing", "running")
    # What a browser does for a page in the background: it gets no frames.
    page.evaluate("window.requestAnimationFrame = () => 0")
    page.wait_for_selector("#run-status[data-state=done]", state="attached")
    until(page, lambda: page.title().startswith("Done"))
    until(page, lambda: page.evaluate("easel.lastEnd?.endsWith('is done')"))
