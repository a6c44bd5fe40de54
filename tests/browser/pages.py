"""What the browser's tests do with a page: open its tabs, steer its form, follow its run."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.waiting import PATIENCE


def frames(page) -> None:
    """Wait until what was just unfolded is drawn. Gradio puts a field's value in a frame after the field, so
    that what is typed before would be overwritten."""
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def until(page, holds: Callable[[], object]) -> None:
    """Wait for something that the page alone cannot tell."""
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, "it never came"
        page.wait_for_timeout(20)


def bytes_sent(page) -> dict[str, tuple[str, float]]:
    """The requests of a page from now on: their addresses and their bytes on the wire, with headers."""
    sent: dict[str, tuple[str, float]] = {}
    wire = page.context.new_cdp_session(page)
    wire.send("Network.enable")

    def asked(event) -> None:
        # Modules out of a script that was loaded come from nowhere.
        if not event["request"]["url"].startswith("blob:"):
            sent[event["requestId"]] = event["request"]["url"], 0

    def took(event, before: bool) -> None:
        key = event["requestId"]
        if key in sent:
            url, size = sent[key]
            sent[key] = url, size * before + event["encodedDataLength"]

    wire.on("Network.requestWillBeSent", asked)
    wire.on("Network.dataReceived", lambda event: took(event, True))
    wire.on("Network.loadingFinished", lambda event: took(event, False))
    return sent


def has_value(page, field: str, value: str) -> None:
    """Wait until a field holds a value: Gradio draws a field first and fills it in a later frame."""
    what = "([field, value]) => document.querySelector(field)?.value === value"
    page.wait_for_function(what, arg=[field, value])


def open_tab(page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()
    frames(page)


def find_setting(page, words: str, field: str) -> None:
    """Search the form, which unfolds the group of the setting at `field`."""
    open_settings(page)
    page.fill("#find-setting input, #find-setting textarea", words)
    page.wait_for_selector(field)
    frames(page)


def open_settings(page) -> None:
    """Open the row that all but the basic settings are behind."""
    if page.get_attribute("#all-settings", "aria-expanded") == "false":
        page.click("#all-settings")


def unfold(page, details: str) -> None:
    """Open a fold by keyboard: a click would be lost if something above it grew under the pointer."""
    page.press(f"{details} > summary", "Enter")
    page.wait_for_selector(f"{details}[open]")


def state_is(page, *states: str) -> None:
    page.wait_for_selector(", ".join(f"#run-status[data-state={state}]" for state in states))


def set_steps(page, steps: int) -> None:
    # Gradio fills the field some frames after it draws it, which would undo what is typed before.
    page.wait_for_function("Number(document.querySelector('#steps input')?.value) > 0")
    page.fill("#steps input", str(steps))
    page.press("#steps input", "Tab")
    # The form is kept as it is typed; the command shows that it has arrived.
    page.wait_for_function(
        f"document.querySelector('#command pre')?.textContent.includes('train.steps={steps}')"
    )


@contextmanager
def loaded_anew(page) -> Iterator[None]:
    """What is done within ends in a new load of the page, which is waited for: the old one may know of it
    before it goes."""
    page.evaluate("window.old = true")
    yield
    page.wait_for_function("!window.old && document.documentElement?.dataset.ready")
