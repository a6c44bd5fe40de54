"""The Toolbox, and making a run's report, as a person does it; the report opened alone, as a friend
would."""

from pathlib import Path
from typing import Any

from tests.browser.pages import open_tab
from tests.browser.test_axe import violations


def ready(page: Any) -> None:
    open_tab(page, "Toolbox")
    page.wait_for_function("document.querySelector('#toolbox-files select')?.value.endsWith('.safetensors')")


def type_path(page: Any, file: Path) -> None:
    """Choose a file by its path."""
    page.select_option(".toolbox-file select", label="Another file: type its path")
    page.fill(".toolbox-file [data-part=path]", str(file))


def done(page: Any, words: str) -> str:
    page.wait_for_function(
        "words => document.querySelector('#toolbox-state')?.dataset.state !== 'working' &&"
        " [...document.querySelectorAll('#toolbox-answer, #toolbox-state')]"
        ".some(one => one.innerText.includes(words))",
        arg=words,
    )
    return str(page.inner_text("#toolbox-answer"))


def tool(page: Any, name: str) -> None:
    page.click(f"#toolbox [data-verb~={name}]")
    page.wait_for_selector(f"#toolbox [data-verb~={name}][aria-pressed=true]")
    page.click(f"#toolbox [data-tool={name}]")
    page.wait_for_selector(f"#toolbox [data-tool={name}][aria-pressed=true]")


def test_in_the_dark_on_a_phone(look: Any) -> None:
    """Any file by its path."""
    page = look("dark", 390)
    assert page.evaluate("document.body.classList.contains('dark')")
    ready(page)
    file = page.eval_on_selector("#toolbox-files select", "one => one.value")
    type_path(page, file)
    page.click("#toolbox-go:enabled")
    done(page, "Trigger words")
    tool(page, "spectrum")
    page.click("#toolbox-go:enabled")
    done(page, "layers of rank 8")
    page.evaluate("document.querySelectorAll('#toolbox details').forEach(one => { one.open = true; })")
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_a_file_is_looked_into_and_made_smaller(look: Any, trained: Any) -> None:
    page = look()
    ready(page)
    tool(page, "spectrum")
    page.click("#toolbox-go:enabled")
    said = done(page, "layers of rank 8")
    assert "effective rank" in said
    labels = page.eval_on_selector_all(
        "#toolbox-answer :is(.chart-box, .bars)", "all => all.map(one => one.getAttribute('aria-label'))"
    )
    assert len(labels) == 3
    assert all(labels)
    page.evaluate("document.querySelectorAll('#toolbox details').forEach(one => { one.open = true; })")
    assert page.locator("#toolbox-answer tbody tr").count() > 60
    assert violations(page) == []

    tool(page, "compare")
    assert page.is_disabled("#toolbox-go")
    assert "Two files are needed" in page.inner_text("#toolbox-why")
    page.click("#toolbox-add")
    values = page.eval_on_selector_all(".toolbox-file:last-child option", "all => all.map(one => one.value)")
    page.locator(".toolbox-file select").nth(1).select_option(values[1])
    page.click("#toolbox-go:enabled")
    # A file is like itself, whichever layers it has.
    assert "100.0% of input directions" in done(page, "Almost identical")

    # A tool for one file takes the first; each keeps its answer.
    tool(page, "amplify")
    assert "Almost identical" not in page.inner_text("#toolbox-answer")
    assert page.is_visible("#toolbox-base")
    page.click("#toolbox-go:enabled")
    done(page, "Where it acts")
    assert violations(page) == []

    tool(page, "shrink")
    page.fill("#toolbox-rank", "none")
    page.click("#toolbox-go:enabled")
    page.wait_for_selector("#toolbox-state[data-state=error]:has-text('should be a number')")
    page.fill("#toolbox-rank", "2")
    page.click("#toolbox-go:enabled")
    done(page, "Each layer keeps rank 2")
    # The new file is in the lists, which stay on what was chosen.
    page.wait_for_selector(".toolbox-file:last-child option[value*='-rank2']", state="attached")
    assert page.locator(".toolbox-file select").nth(1).input_value() == values[1]
    # The file first; once something else is asked for, that.
    primary = page.locator("#page-toolbox .primary:visible")
    assert primary.all_inner_texts() == ["Download"]
    assert "-rank2.safetensors, " in page.inner_text("#toolbox-made")
    page.fill("#toolbox-rank", "3")
    assert primary.all_inner_texts() == ["Shrink"]
    with page.expect_download() as started:
        page.get_by_role("link", name="Download", exact=True).click()
    assert started.value.suggested_filename.endswith(".safetensors")
    assert "-rank2" in started.value.suggested_filename
    page.click("#toolbox-answer [data-toolbox-go-on]")
    page.wait_for_selector("#tabs [role=tab][aria-selected=true]:has-text('Train')")
    # The form says it, and the command that it stands for.
    page.wait_for_function("document.querySelector('#command pre')?.textContent.includes('adapter.init=')")
    assert "-rank2" in str(page.text_content("#command pre"))


def test_measuring_can_be_cancelled_and_ends_in_a_file(look: Any) -> None:
    page = look()
    ready(page)
    tool(page, "strength")
    chosen = page.eval_on_selector("#toolbox-measure", "one => one.selectedOptions[0].textContent")
    assert chosen.endswith("held out")
    page.click("#toolbox-go:enabled")
    page.wait_for_selector("#toolbox-cancel:visible")
    page.click("#toolbox-cancel")
    done(page, "Cancelled.")
    page.click("#toolbox-go:enabled")
    said = done(page, "Measured on")
    if "Bake" in said:
        page.get_by_role("button", name="Bake").click()
        done(page, "is now strength 1")
    assert page.evaluate("document.documentElement.scrollWidth") <= 1440


def test_a_report_opens_anywhere(look: Any, trained: Any, browser: Any, tmp_path: Path) -> None:
    page = look()
    # From the list of runs, without having seen the Export tab: a quick one.
    open_tab(page, "Train")
    page.click("#run-status [data-report-run]")
    page.wait_for_selector("#easel-toast >> text=is being made")
    page.wait_for_selector("#easel-toast >> text=is made")
    with page.expect_popup() as opened:
        page.click("#run-status [data-report-of]")
    opened.value.wait_for_selector(".strip img")
    opened.value.close()
    open_tab(page, "Export")
    page.uncheck("#report-measure")
    page.click("#report-make:enabled")
    page.wait_for_selector("#report-state[data-state=done]")
    address = page.get_attribute("#report-open", "href")
    with page.expect_download() as started:
        page.click("#report-download")
    file = tmp_path / "a friend's.html"
    started.value.save_as(file)
    for scheme in ("light", "dark"):
        for where in (file.as_uri(), f"{trained.address}{address}"):
            alone = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme=scheme)
            asked: list[str] = []
            wrong: list[str] = []
            alone.on("request", lambda request, asked=asked: asked.append(request.url))
            alone.on("console", lambda message, wrong=wrong: wrong.append(message.text))
            alone.goto(where)
            assert alone.locator(".strip img").count() >= 2
            assert alone.evaluate("[...document.images].every(one => one.naturalWidth > 0)")
            assert alone.evaluate("document.documentElement.scrollWidth") == 390
            assert [url for url in asked if not url.startswith("data:")] == [where]
            assert wrong == []
            if where.startswith("file:"):
                alone.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
                assert violations(alone) == [], scheme
            alone.close()
