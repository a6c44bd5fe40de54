"""Samples and charts of a run on one time axis: pointer, keys, zoom, and the lightbox."""

from typing import Any

from tests.browser.pages import open_tab
from tests.browser.test_axe import violations

AT = "document.querySelector('#run-chart .chart-box')?.getAttribute('aria-valuenow')"
ON = "document.querySelector('#samples figure.on')?.dataset.step"


def test_samples_scrubber_and_charts_share_a_step(look: Any, trained: Any, watched: Any) -> None:
    page = look()
    # What draws charts comes with the first, and is asked for again where it does not arrive.
    watched.expected_away = True
    page.route("**/uplot.js*", lambda route: route.abort())
    open_tab(page, "Train")
    page.wait_for_selector("#run-chart .chart-box")
    assert violations(page) == []
    page.unroute("**/uplot.js*")
    page.wait_for_selector("#run-chart canvas")
    watched.expected_away = False
    last = page.get_attribute("#run-status", "data-step")
    # The newest samples are marked; the scrubber goes to the base, and to the end again.
    page.wait_for_function(f"{ON} === '{last}'")
    page.focus("#scrubber")
    page.keyboard.press("Home")
    page.wait_for_function(f"{ON} === '0'")
    assert page.get_attribute("#scrubber", "aria-valuetext") == "base"

    # The keys move through the values of the loss, and each is told.
    page.get_by_role("button", name="Loss", exact=True).click()
    box = page.locator("#run-chart .chart-box")
    box.focus()
    page.keyboard.press("End")
    page.wait_for_function(f"{AT} === '{last}'")
    page.wait_for_function(f"{ON} === '{last}'")
    page.keyboard.press("ArrowLeft")
    page.wait_for_function(f"{AT} === '{int(last) - 1}'")
    assert "smoothed 0." in str(box.get_attribute("aria-valuetext"))
    page.wait_for_selector("#run-chart .chart-tip img")
    page.keyboard.press("+")
    page.wait_for_selector("#run-chart >> text=Show all")
    page.keyboard.press("Escape")
    page.wait_for_selector("#run-chart >> text=Show all", state="hidden")
    page.click("#run-chart summary")
    page.wait_for_function("document.querySelectorAll('#run-chart tbody tr').length >= 4")

    # What a sample was made with is in its file, and goes into the form.
    page.locator("#samples figure:last-child a").first.click()
    page.wait_for_selector("dialog.lightbox p:has-text('Seed: ')")
    page.keyboard.press(" ")
    page.wait_for_selector("dialog.lightbox p:has-text('Base.')")
    page.click("dialog.lightbox >> text=Use these settings")
    page.wait_for_selector("#preview-report >> text=Its settings are in the form")
