"""A page follows what moves from wherever it happens, catches up after it was hidden, and stays where it is
when the server comes back, which gets what was typed meanwhile."""

from typing import Any

import pytest
from PIL import Image

from tests.browser.pages import bytes_sent, has_value, open_settings, open_tab, set_steps, until
from tests.browser.windows import Window

HIDE = """hide => {
  Object.defineProperty(document, "hidden", { configurable: true, get: () => hide });
  document.dispatchEvent(new Event("visibilitychange"));
}"""
RENAME = """title => {
  const { project } = document.querySelector("#dataset-mark").dataset;
  return window.easel.post("projects", { do: "rename", project, title });
}"""
EVENTS = "**/gradio_api/run/**"
TITLE = "title => document.querySelector('#project-picker').textContent.trim() === title"


@pytest.mark.own_window
def test_pages_follow_catch_up_and_stay(page: Any, new_page: Any, watched: Any, window: Window) -> None:
    other = new_page()
    other.goto(window.address)
    other.wait_for_selector("html[data-ready]")
    other.evaluate(RENAME, "First")
    page.wait_for_function(TITLE, arg="First")

    page.evaluate(HIDE, True)
    other.evaluate(RENAME, "Second")
    other.wait_for_function(TITLE, arg="Second")
    assert page.evaluate(TITLE, "First"), "a hidden page follows the header alone"
    page.evaluate(HIDE, False)
    page.wait_for_function(TITLE, arg="Second")

    page.evaluate("location.hash = 'run/gone'")
    page.wait_for_selector("#run-status[data-shown-run=gone] >> text=no run of this name")
    page.evaluate("window.old = true")
    watched.expected_away = True
    window.stop()
    page.wait_for_selector("#away:visible")
    # What is typed meanwhile arrives later, from a page that is loaded anew too; what is pressed does not.
    for steps in ("6", "66"):
        page.fill("#steps input", steps)
    other.wait_for_selector("#away:visible")
    other.click("#use-demo")
    other.wait_for_selector("#easel-toast.on >> text=does not answer")
    # What is typed next is for the project of the page.
    open_tab(other, "Train")
    open_settings(other)
    other.fill("#find-setting :is(input, textarea)", "rank")
    other.wait_for_function("sessionStorage['easel-unsent']?.includes('x-easel-project')")
    open_tab(other, "Preview")
    other.fill("#prompt textarea", "a prompt")
    other.wait_for_function("sessionStorage['easel-unsent']?.includes('a prompt')")
    other.goto("about:blank")
    window.port = int(window.address.rpartition(":")[2])
    window.start()
    other.goto(window.address)
    other.wait_for_selector("html[data-ready]")
    page.wait_for_selector("#away", state="hidden")
    # A server that starts again knows nothing of what a page looked at, and is told.
    page.wait_for_selector("#run-status[data-shown-run=gone]")
    watched.expected_away = False
    page.wait_for_function("document.querySelector('#command pre')?.textContent.includes('train.steps=66')")
    until(page, lambda: "a prompt" in (window.project / "draft.json").read_text())
    assert '"dataset": "demo"' not in (window.project / "draft.json").read_text()
    # A page of the same browser follows.
    beside = page.context.new_page()
    beside.goto(window.address)
    beside.wait_for_selector("#easel-toast.on >> text=The last edit wins")
    set_steps(page, 77)
    has_value(beside, "#steps input", "77")
    assert page.evaluate("window.old"), "the page was loaded anew"
    # With a 502 a reverse proxy says that the server is away.
    watched.expected_away = True
    page.route(EVENTS, lambda route: route.fulfill(status=502))
    page.fill("#steps input", "88")
    page.wait_for_selector("#away:visible")
    page.unroute(EVENTS)
    page.wait_for_function("document.querySelector('#command pre')?.textContent.includes('train.steps=88')")
    # What has not arrived when another project is opened is refused in words, and the page asks nothing.
    page.route(EVENTS, lambda route: route.abort())
    page.fill("#steps input", "99")
    page.wait_for_selector("#away:visible")
    window.open_project("other", {})
    page.wait_for_function("!window.old")
    page.unroute(EVENTS)
    words = "Another page has opened another project, so nothing was changed here."
    page.get_by_text(words, exact=True).wait_for()
    assert "99" not in (window.project / "draft.json").read_text()


def test_a_first_load_is_light(new_page: Any, window: Window, record_property: Any) -> None:
    """At most 40 requests and 300 kB, of a new project with the demo's images."""
    page = new_page()
    sent = bytes_sent(page)
    page.goto(window.address)
    page.wait_for_selector("html[data-ready]")
    page.wait_for_function("[...document.images].every((image) => image.complete)")
    kilobytes = sum(size for _, size in sent.values()) / 1000
    record_property("first_load", f"{len(sent)} requests, {kilobytes:.0f} kB")
    assert 10 < len(sent) <= 40
    assert 100 < kilobytes <= 300
    # What draws charts comes with the first of them.
    assert not any("uplot" in url for url, _ in sent.values())
    # The tokens of the caption shown are counted once.
    (window.project / "pictures").mkdir(exist_ok=True)
    Image.new("RGB", (96, 96)).save(window.project / "pictures" / "a.png")
    sent.clear()
    page.reload()
    page.wait_for_selector("html[data-ready]")
    page.wait_for_selector("#caption-tokens >> text=0 of 75 tokens")
    assert sum(url.endswith("/easel/tokens") for url, _ in sent.values()) == 1
