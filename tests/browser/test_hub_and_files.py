"""A base of the hub, new files of LoRAs, the file manager and the trash, as a user meets them.

The window has a desktop whose programs write down what they are asked, and a hub on this computer."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import DEMO
from tests.browser.pages import frames, loaded_anew, open_tab, until
from tests.browser.test_axe import violations
from tests.browser.test_toolbox import done, tool, type_path
from tests.browser.windows import Window, close
from tests.hub import Hub, hub_of, small_repo
from tests.tools.planted import LAYERS, random_layer, saved


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files é")


@pytest.fixture(scope="module")
def hub(place: Path) -> Iterator[Hub]:
    with hub_of(base=small_repo(place / "repo")) as made:
        yield made


@pytest.fixture(scope="module")
def own(place: Path, hub: Hub, home: Path) -> Iterator[Window]:
    programs = place / "bin"
    programs.mkdir()
    for name, code in (("dbus-send", 1), ("xdg-open", 0)):
        (programs / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> "{place}/asked"\nexit {code}\n')
        (programs / name).chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    environment = {**hub.environment(place / "hf"), "PATH": path, "DISPLAY": ":9"}
    window = Window(place / "work space", home, environment)
    window.start()
    yield window
    close(window)


@pytest.fixture
def window(own: Window, tmp_path: Path, draft: dict[str, Any]) -> Window:
    own.open_project(tmp_path.name, draft)
    return own


@pytest.mark.parametrize("draft", [DEMO])
def test_a_base_of_the_hub_is_downloaded(page: Any, hub: Hub) -> None:
    open_tab(page, "Train")
    page.click("#base-model input")
    page.fill("#base-model input", "owner/base")
    page.press("#base-model input", "Enter")
    page.wait_for_selector("#base-download[data-state=offered] >> text=to download from the hub")
    assert "not on this computer yet" in page.inner_text("#start-why")
    hub.gate.clear()
    page.click("#base-download button")
    page.wait_for_selector("#base-download[data-state=downloading] [aria-valuenow]:not([aria-valuenow='0'])")
    assert violations(page) == []
    # The hub goes on only once the window knows of it, else the download might end before.
    with page.expect_response("**/easel/run"):
        page.click("#base-download button >> text=Cancel")
    hub.gate.set()
    page.wait_for_selector("#base-download[data-state=offered] >> text=are here already")
    page.click("#base-download button >> text=Download the rest")
    page.wait_for_selector("#base-note >> text=Stable Diffusion 1.x, trained at")
    # The preset of the demo is for the embedded base alone.
    page.wait_for_function("document.querySelector('#preset input')?.value === 'Balanced'")
    page.wait_for_selector("#start-why", state="detached")


def test_new_files_and_the_file_manager(page: Any, place: Path) -> None:
    lora = saved({key: random_layer(key, 4, 4.0, 1, 0.1) for key in LAYERS}, place / "my lora.safetensors")
    open_tab(page, "Toolbox")
    page.wait_for_selector(".toolbox-file select")
    type_path(page, lora)

    tool(page, "convert")
    page.select_option("#toolbox-format", "diffusers")
    page.click("#toolbox-go:enabled")
    done(page, "Only diffusers reads this format")
    page.click("#toolbox-answer button >> text=Show in folder")
    file = page.inner_text("#toolbox-answer .where code")
    until(
        page, lambda: (place / "asked").exists() and str(Path(file).parent) in (place / "asked").read_text()
    )
    assert Path(file).as_uri() in (place / "asked").read_text()

    tool(page, "plain")
    assert page.input_value("#toolbox-base") == ""
    page.fill("#toolbox-rank", "2")
    page.click("#toolbox-go:enabled")
    done(page, "-plain2")

    tool(page, "merge")
    page.fill("#toolbox-blocks", "nothing_is_called_so=0")
    page.click("#toolbox-go:enabled")
    done(page, "matches no layer of these files")
    page.fill("#toolbox-blocks", "to_k=0.5")
    page.click("#toolbox-go:enabled")
    done(page, "-merged")
    assert violations(page) == []

    tool(page, "into-base")
    page.fill("#toolbox-blocks", "")
    page.select_option("#toolbox-base", "demo")
    page.click("#toolbox-go:enabled")
    done(page, "layers of the base changed by one file")
    assert not page.locator("#toolbox-answer [data-toolbox-go-on]").count()
    page.wait_for_selector("#toolbox-base option[value$='base-my lora']", state="attached")
    page.set_viewport_size({"width": 390, "height": 844})
    frames(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_the_trash_gives_back_by_keyboard(page: Any, window: Any) -> None:
    page.click("#project-picker")
    page.fill("#project-new input", "Gone <b>")
    with loaded_anew(page):
        page.press("#project-new input", "Enter")
    page.click("#project-picker")
    page.get_by_role("button", name="Delete Gone <b>", exact=True).click()
    with loaded_anew(page):
        page.get_by_role("button", name="Delete", exact=True).click()
    page.click("#project-picker")
    # What cannot be seen yet takes no focus.
    page.wait_for_selector("#projects-trash summary")
    page.focus("#projects-trash summary")
    page.keyboard.press("Enter")
    assert violations(page) == []
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Restore the project gone-b"
    page.keyboard.press("Enter")
    page.wait_for_selector("#projects-done >> text=gone-b is restored.")
    assert page.is_hidden("#projects-trash")
    page.wait_for_selector("#projects-list >> text=Gone <b>")
    assert (window.workspace / "projects" / "gone-b" / "project.json").exists()
