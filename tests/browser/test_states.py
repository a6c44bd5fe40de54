"""What a window looks like in its states and widths, and what it costs while nothing happens."""

import json
import shutil
from collections.abc import Callable
from typing import Any

import psutil

from app.preview.request_form import ADDED
from tests.browser.pages import frames, loaded_anew, open_tab

TABS = ("Dataset", "Train", "Preview", "Export")
IDLE_SECONDS = 7
MOST_OF_A_CORE = 0.03
# What went before may still cost something, such as thumbnails ahead of who looks; idle is what comes after.
MOST_LOOKS = 10
BEAT = "{}"
"""What an idle stream sends now and then."""


def assert_idle(page: Any, window: Any, record: Callable[[str, object], None]) -> None:
    """What the server spends and sends while a page is open and nothing happens."""
    asked: list[str] = []
    told: list[str] = []
    wire = page.context.new_cdp_session(page)
    wire.send("Network.enable")
    wire.on("Network.eventSourceMessageReceived", lambda event: told.append(event["data"]))
    page.on("request", lambda request: asked.append(request.url))
    server = psutil.Process(window.process.pid)
    share = 1.0
    # What opening set off has to end first.
    for _ in range(MOST_LOOKS):
        asked.clear()
        told.clear()
        before = server.cpu_times()
        page.wait_for_timeout(1000 * IDLE_SECONDS)
        after = server.cpu_times()
        share = (after.user + after.system - before.user - before.system) / IDLE_SECONDS
        record("share of a core", share)
        if share < MOST_OF_A_CORE and not asked and set(told) <= {BEAT}:
            break
    assert asked == []
    assert set(told) <= {BEAT}
    assert share < MOST_OF_A_CORE


def test_an_idle_window_costs_next_to_nothing(look: Any, trained: Any, record_property: Any) -> None:
    page = look()
    for tab in TABS:
        open_tab(page, tab)
    page.wait_for_function("document.querySelectorAll('#export-cards img').length")
    assert_idle(page, trained, record_property)


def test_narrow_windows(look: Any, trained: Any) -> None:
    file = next((trained.workspace / "runs").glob("*/export/*.safetensors"))
    added = trained.project / ADDED
    added.mkdir(exist_ok=True)
    shutil.copy(file, added / f"{'a file with a long name ' * 6}.safetensors")
    page = look("light", 390)
    for tab in TABS:
        open_tab(page, tab)
        page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        for width in (320, 390, 720, 1024):
            page.set_viewport_size({"width": width, "height": 900})
            frames(page)
            page.wait_for_timeout(300)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, tab
            beyond = page.evaluate(BEYOND)
            assert beyond == [], f"{tab} at {width}: {json.dumps(beyond)}"
            tight = page.evaluate(TIGHT)
            assert tight == [], f"{tab} at {width}: {json.dumps(tight)}"


# Fields and buttons that can be seen must be so in full; what scrolls by itself (the tabs) may be wider.
BEYOND = """() => [...document.querySelectorAll('button, input, select, textarea, h2, h3, p')]
  .filter((one) => one.checkVisibility({ visibilityProperty: true, opacityProperty: true }))
  .filter((one) => !one.closest('[role=tablist], dialog:not([open]), .away, table, .log'))
  .filter((one) => { const box = one.getBoundingClientRect();
    return box.width > 1 && (box.left < -1 || box.right > window.innerWidth + 1); })
  .map((one) => one.outerHTML.slice(0, 120))"""

# Words of buttons and of the foot that are wider than their place; the project's button is beside the bell.
TIGHT = """() => [...document.querySelectorAll('button, .bar .facts > *')]
  .filter((one) => one.checkVisibility({ visibilityProperty: true, opacityProperty: true }))
  .filter((one) => one.scrollWidth > one.clientWidth + 1 && one.clientWidth > 1)
  .concat([...document.querySelectorAll('#project-picker')].filter((one) =>
    one.getBoundingClientRect().right > document.querySelector('#tell-end').getBoundingClientRect().left + 1))
  .map((one) => one.outerHTML.slice(0, 120))"""

# What hides the primary act, or is hidden by the foot at the page's end.
PRIMARY = """() => {
  const shown = [...document.querySelectorAll('.primary')]
    .filter((one) => one.checkVisibility({ visibilityProperty: true }));
  const inside = ({ top, bottom, left, right }) =>
    top >= 0 && left >= 0 && bottom <= innerHeight && right <= innerWidth;
  const [act] = shown, box = act?.getBoundingClientRect();
  if (shown.length !== 1 || !act.closest('.foot')) return shown.map((one) => one.outerHTML.slice(0, 120));
  const hit = document.elementFromPoint(box.left + box.width / 2, box.top + box.height / 2);
  if (!inside(box) || !act.contains(hit)) return [JSON.stringify(box)];
  scrollTo(0, document.documentElement.scrollHeight);
  const foot = act.closest('.foot').getBoundingClientRect(), tab = act.closest('.tabitem');
  const covered = [...tab.querySelectorAll('.page *')].filter((one) => one.checkVisibility())
    .filter((one) => one.getBoundingClientRect().bottom > foot.top + 1 && !one.closest('.rail, .side'));
  scrollTo(0, 0);
  return covered.slice(0, 3).map((one) => one.outerHTML.slice(0, 120));
}"""


def test_the_one_primary_act_of_each_tab_is_on_the_first_screen(look: Any) -> None:
    page = look()
    for width, height in ((1440, 900), (1024, 768), (390, 844), (320, 700), (720, 450)):
        page.set_viewport_size({"width": width, "height": height})
        for tab in (*TABS, "Toolbox"):
            open_tab(page, tab)
            page.wait_for_selector(".foot .primary:visible")
            assert page.evaluate(PRIMARY) == [], f"{tab} at {width} x {height}"


# A disabled button says why: in its tip, or in words that it points to.
SILENT = """() => [...document.querySelectorAll('button:disabled')]
  .filter((one) => one.checkVisibility({ visibilityProperty: true }))
  .filter((one) => !one.title && !one.getAttribute('aria-describedby') && !one.closest('[title]'))
  .map((one) => one.outerHTML.slice(0, 160))"""

TYPE = """() => [...document.querySelectorAll('body *:not(script, style)')].flatMap((node) => {
  const text = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
  const { fontSize, fontWeight } = getComputedStyle(node);
  return text && node.offsetParent ? [`${fontSize} ${fontWeight}`] : [];
})"""
ROLES = {"18px 600", *(f"{size}px {weight}" for size in (12, 14) for weight in (400, 500, 600))}


def test_a_first_visit_teaches_and_each_button_that_is_off_says_why(page: Any) -> None:
    page.wait_for_selector("#grid-empty >> text=No images yet")
    silent = {}
    for tab in TABS:
        open_tab(page, tab)
        page.wait_for_timeout(300)
        silent[tab] = page.evaluate(SILENT)
    assert not any(silent.values()), silent
    open_tab(page, "Train")
    assert page.get_attribute("#run-status", "data-state") == "none"
    assert "no images yet" in page.inner_text("#start-why")
    # Start is never off: it goes to what is in the way.
    page.click("#start")
    page.wait_for_function("document.activeElement.textContent.trim() === 'Go to Dataset'")


def test_after_a_run_each_button_that_is_off_says_why(look: Any) -> None:
    page = look()
    for tab in TABS:
        open_tab(page, tab)
        page.wait_for_timeout(300)
        assert page.evaluate(SILENT) == [], tab
        # Three roles of type: titles, bodies and small print.
        assert set(page.evaluate(TYPE)) <= ROLES, tab


def test_an_address_leads_to_its_image_and_a_tab_to_where_it_was_left(look: Any) -> None:
    page = look()
    page.wait_for_function("location.hash.startsWith('#dataset/')")
    page.goto(f"{page.url.split('#')[0]}#dataset/fox.png")
    page.wait_for_selector("[data-picture='fox.png'].on")
    page.click("[data-picture='panda.png']")
    page.wait_for_function("location.hash === '#dataset/panda.png'")
    page.go_back()
    page.wait_for_function("location.hash !== '#dataset/panda.png'")
    page.goto(f"{page.url.split('#')[0]}#dataset/gone.png")
    page.wait_for_selector("#easel-toast.on >> text=no image gone.png")
    page.evaluate("location.hash = 'train'")
    page.wait_for_selector("#samples img")
    page.evaluate("scrollTo(0, 300)")
    page.evaluate("location.hash = 'export'")
    page.wait_for_function("document.documentElement.dataset.tab === 'export' && scrollY === 0")
    page.go_back()
    back = "document.documentElement.dataset.tab === 'train' && Math.abs(scrollY - 300) < 40"
    page.wait_for_function(back)
    with loaded_anew(page):
        page.reload()
    page.wait_for_function(back)
    # What a button opens is seen from its top, as the image that was asked for is there.
    page.click("#see-result")
    page.wait_for_function("document.documentElement.dataset.tab === 'preview' && scrollY === 0")
