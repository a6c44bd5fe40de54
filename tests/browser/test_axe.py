"""axe-core on each tab in both themes, with the folded parts open."""

from typing import Any

SEEN = {
    "Dataset": [("#picture-big img >> nth=0", "dialog.lightbox[open]")],
    "Train": [("#samples [data-large] >> nth=0", "dialog.lightbox[open]")],
    "Preview": [
        ("[data-compare=strip]", "#strength-strip img"),
        ("#strength-strip a >> nth=1", "dialog.lightbox[open]"),
        ("[data-compare=grid]", "#grid-form[data-ready]"),
        ("[data-compare=side]", "#compare"),
        ("[data-compare=slider]", "#flip"),
    ],
    "Export": [],
    "Toolbox": [
        ("#project-picker", "#projects[open] #projects-list > *"),
        ("#doctor", "#doctor-checks > *"),
    ],
}
"""By tab: what is clicked one after the other, and what shows it."""
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
    for tab, seen in SEEN.items():
        page.get_by_role("tab", name=tab, exact=True).click()
        page.wait_for_selector(f"[role=tab][aria-selected=true] >> text={tab}")
        page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        for click, shown in (("", "body"), *seen):
            if click:
                page.click(click)
            page.wait_for_selector(shown)
            # Colours fade over to their new values; a half-faded one has no contrast.
            page.evaluate("Promise.all(document.getAnimations().map(one => one.finished.catch(() => null)))")
            assert violations(page) == [], f"{tab}, {click or 'at first'}, {scheme}"
            if page.locator("dialog[open]").count():
                page.keyboard.press("Escape")
