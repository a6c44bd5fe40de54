"""The project picker in a real browser: what was typed and dropped is where it was left."""

from pathlib import Path
from typing import Any

import pytest

from tests.browser.pages import has_value, loaded_anew
from tests.browser.test_dataset import pictures_in, take

NAME = "Dog <img src=x onerror=\"document.title='broken in'\"> 😀"


def make(page, title: str) -> None:
    page.click("#project-picker")
    page.fill("#project-new input", title)
    with loaded_anew(page):
        page.press("#project-new input", "Enter")
    page.wait_for_function(
        "title => document.querySelector('#project-picker')?.textContent.trim() === title", arg=title
    )
    page.wait_for_selector("#dataset-mark", state="attached")


def open_project(page, title: str) -> None:
    page.click("#project-picker")
    with loaded_anew(page):
        page.get_by_role("button", name=f"Open {title}", exact=True).click()
    page.wait_for_function(
        "title => document.querySelector('#project-picker')?.textContent.trim() === title", arg=title
    )


@pytest.mark.own_window
def test_new_open_rename_delete(page, new_page, window: Any, pictures: list[Path]) -> None:
    take(page, pictures)
    pictures_in(page, 6)
    page.fill("#trigger input, #trigger textarea", "sks ball")
    page.press("#trigger input, #trigger textarea", "Tab")
    page.wait_for_selector("#dataset-mark[data-trigger='sks ball']", state="attached")
    other = new_page()
    other.goto(window.address)
    pictures_in(other, 6)
    # What it has asked for by then is there; of another project it would be no more.
    other.wait_for_function("[...document.querySelectorAll('.thumb img')].every(one => one.naturalWidth)")

    make(page, NAME)
    page.wait_for_selector("#grid-empty >> text=No images yet")
    has_value(page, "#trigger input, #trigger textarea", "")
    # The other page follows: what it showed is of a project that is not open any more.
    other.wait_for_selector("#grid-empty >> text=No images yet")
    take(page, pictures[:2])
    pictures_in(page, 2)

    open_project(page, "My images")
    pictures_in(page, 6)
    page.wait_for_function("document.querySelector('#trigger :is(input, textarea)')?.value === 'sks ball'")

    page.click("#project-picker")
    page.get_by_role("button", name=f"Rename {NAME}", exact=True).click()
    page.fill("#projects-list input", "Our dog")
    page.press("#projects-list input", "Enter")
    rows = "document.querySelectorAll('#projects-list > .row').length"
    page.get_by_role("button", name="Delete Our dog", exact=True).click()
    page.get_by_role("button", name="Undo", exact=True).click()
    page.wait_for_selector("#projects-done >> text=is restored")
    page.wait_for_function(f"{rows} === 2")
    page.get_by_role("button", name="Delete Our dog", exact=True).click()
    page.wait_for_function(f"{rows} === 1")
    assert "trash" in page.inner_text("#projects-room")
    page.get_by_role("button", name="Clear cache").click()
    page.wait_for_selector("#projects-done >> text=freed")
    page.get_by_role("button", name="Delete My images", exact=True).click()
    page.get_by_role("button", name="Delete", exact=True).click()
    page.wait_for_selector("#projects-note >> text=only project")
    page.keyboard.press("Escape")
    page.wait_for_function("document.activeElement?.id === 'project-picker'")
    assert page.title() != "broken in"
    assert len(list((window.project / "pictures").glob("**/*.png"))) == 6
