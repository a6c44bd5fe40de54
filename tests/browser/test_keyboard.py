"""The keyboard alone: from the first page to a run that is going on, and out of it again; and where the
keyboard is can always be seen."""

from typing import Any

import pytest

from tests.browser.pages import has_value, open_settings, open_tab, state_is

MOST_STOPS = 120
# Where the keyboard is must look different from where it is not: the thing itself, or what it stands in.
SEEN = """() => {
  const one = document.activeElement;
  if (one === document.body) return true;
  const looks = () => { const said = []; let at = one;
    for (let up = 0; at && up < 4; up += 1, at = at.parentElement) {
      for (const motion of at.getAnimations()) motion.finish();
      const style = getComputedStyle(at);
      const outline = style.outlineStyle === 'none' ? '' : style.outline;
      said.push(outline, style.boxShadow, style.borderColor, style.backgroundColor);
    }
    return said.join('|'); };
  const on = looks();
  one.blur();
  const off = looks();
  one.focus({ focusVisible: true });
  return on !== off;
}"""
WHAT = "() => document.activeElement.outerHTML.slice(0, 140)"


def tab_to(page: Any, selector: str, key: str = "Tab") -> list[str]:
    """Press Tab until something is reached; gives the stops at which nothing showed where the keyboard is."""
    unseen = []
    for _ in range(MOST_STOPS):
        page.keyboard.press(key)
        if not page.evaluate(SEEN):
            unseen.append(page.evaluate(WHAT))
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return unseen
    raise AssertionError(f"{selector} cannot be reached by {key}")


@pytest.mark.own_window
def test_from_the_first_page_to_a_run_and_out_of_it(page: Any, window: Any) -> None:
    assert tab_to(page, "#use-demo") == []
    page.keyboard.press("Enter")
    page.wait_for_selector("#start:enabled")
    # Whoever sees the form sees the demo's settings in it.
    has_value(page, "#steps input", "120")
    unseen = tab_to(page, "[role=tab][aria-selected=true]")
    unseen += tab_to(page, "#base-model input")
    # A list opens, moves and closes by its keys.
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Escape")
    unseen += tab_to(page, "#steps input")
    page.keyboard.press("Control+a")
    page.keyboard.type("4000")
    unseen += tab_to(page, "#start")
    page.wait_for_function("document.querySelector('#command pre')?.textContent.includes('train.steps=4000')")
    page.wait_for_selector("#start:enabled")
    page.focus("#start")
    page.keyboard.press("Enter")
    state_is(page, "running")
    page.wait_for_function("document.activeElement.id === 'run-status'")
    # What was pressed is off for a moment, which takes the focus away; the next key goes on from there.
    page.focus("#save-now")
    page.keyboard.press("Space")
    page.wait_for_selector("#save-now:enabled")
    page.wait_for_function("document.activeElement.id === 'save-now'")
    unseen += tab_to(page, "#stop", "Shift+Tab")
    page.keyboard.press("Space")
    state_is(page, "stopped")
    assert unseen == []


def test_tabs_and_dialogs(look: Any) -> None:
    page = look()
    unseen = tab_to(page, "#project-picker")
    page.keyboard.press("Enter")
    page.wait_for_selector("#projects[open]")
    page.keyboard.press("Escape")
    page.wait_for_function("!document.querySelector('#projects').open")
    assert page.evaluate("document.activeElement.id") == "project-picker"
    unseen += tab_to(page, "[role=tab]")
    for name in ("Train", "Preview", "Export", "Toolbox"):
        while page.evaluate("document.activeElement.textContent.trim()") != name:
            unseen += tab_to(page, "[role=tab]")
        page.keyboard.press("Enter")
        page.wait_for_selector(f"[role=tab][aria-selected=true] >> text={name}")
    open_tab(page, "Train")
    page.focus("#run-status [data-export-run]")
    page.keyboard.press("Enter")
    page.wait_for_selector("#page-export:focus")
    unseen += tab_to(page, "#export-run")
    unseen += tab_to(page, "#export-download")
    with page.expect_download():
        page.keyboard.press("Enter")
    open_tab(page, "Preview")
    unseen += tab_to(page, "#prompt textarea")
    page.keyboard.type("a castle")
    unseen += tab_to(page, "#generate")
    page.keyboard.press("Enter")
    page.wait_for_selector("#preview-state[data-state=working]")
    page.wait_for_selector("#preview-state[data-state=idle][data-busy='0']")
    unseen += tab_to(page, "#flip", "Shift+Tab")
    page.keyboard.press("Space")
    page.wait_for_selector("html[data-shows=base]")
    assert unseen == []


def test_one_tip_at_a_time_and_escape_puts_it_away(look: Any) -> None:
    page = look()
    open_tab(page, "Train")
    open_settings(page)
    # Those that have their place; what is out of the way is one pixel wide.
    tips = """() => [...document.querySelectorAll('.tip .info-text')]
      .filter((one) => one.offsetWidth > 1).map((one) => one.closest('.block').id)"""
    fields = page.locator(".tip input:not([type=range]):visible")
    fields.nth(0).focus()
    (focused,) = page.evaluate(tips)
    fields.nth(2).hover()
    (hovered,) = page.evaluate(tips)
    assert hovered != focused
    page.keyboard.press("Escape")
    assert page.evaluate(tips) == []
    fields.nth(1).hover()
    page.mouse.move(2, 400)
    assert page.evaluate(tips) == [focused]
