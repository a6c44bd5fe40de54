"""axe-core on each tab in both themes, with the folded parts open."""

from typing import Any

TABS = ("Dataset", "Train", "Preview", "Export", "Toolbox")
GRADIOS_OWN: dict[str, dict[str, str]] = {}
"""By selector: elements of Gradio's that break a rule (the rule, and why we cannot mend it)."""


def violations(page: Any) -> list[str]:
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [
        f"{rule['id']}: {node['target']} {node['html'][:120]}"
        for rule in found
        for node in rule["nodes"]
        if not any(page.locator(own).count() and why.get(rule["id"]) for own, why in GRADIOS_OWN.items())
    ]


def test_no_tab_breaks_a_rule(look: Any) -> None:
    page = look("light")
    assert_no_violations(page, "light")
    page.click("[data-theme-switch]")
    page.wait_for_function("document.body.classList.contains('dark')")
    assert_no_violations(page, "dark")


def assert_no_violations(page: Any, scheme: str) -> None:
    for tab in TABS:
        page.get_by_role("tab", name=tab, exact=True).click()
        page.wait_for_selector(f"[role=tab][aria-selected=true] >> text={tab}")
        page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        # Colours fade over to their new values; a half-faded one has no contrast.
        page.evaluate("Promise.all(document.getAnimations().map(one => one.finished.catch(() => null)))")
        assert violations(page) == [], f"{tab}, {scheme}"
    page.click("#project-picker")
    page.wait_for_selector("#projects[open] #projects-list > *")
    assert violations(page) == [], "the dialog of projects"
    page.keyboard.press("Escape")
    page.click("#doctor")
    page.wait_for_selector("#doctor-checks > *")
    assert violations(page) == [], "the doctor"
    page.keyboard.press("Escape")
