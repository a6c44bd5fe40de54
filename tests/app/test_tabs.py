"""A tab is added through the registry alone."""

from pathlib import Path

import gradio as gr
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from app import main, page
from app.state import AppState, Bindings
from app.templates import html_block
from tests.app.runs import make_run, started, step


def build_toy(bindings: Bindings) -> None:
    bindings.follow(html_block(elem_id="toy"), lambda snap: f"<p>{snap.app_state.project.title} in a toy</p>")
    gr.Button("Toy button")


def add_toy_routes(app: FastAPI, app_state: AppState) -> None:
    app.get("/easel/toy")(lambda: {"runs": len(app_state.jobs.all())})


def test_a_row_adds_tab_routes_and_script(
    app_state: AppState, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assets = tmp_path / "assets"
    assets.mkdir()
    for file in [*page.ASSETS.glob("*.*"), *page.ASSETS.glob("vendor/*.js")]:
        (assets / file.relative_to(page.ASSETS)).parent.mkdir(exist_ok=True)
        (assets / file.relative_to(page.ASSETS)).write_bytes(file.read_bytes())
    (assets / "toy.js").write_text("window.toy = true;")
    monkeypatch.setattr(page, "ASSETS", assets)
    monkeypatch.setattr(page, "list_assets", page.list_assets.__wrapped__)
    toy = page.Tab("Toy", build_toy, add_toy_routes, ("toy.js",))
    monkeypatch.setattr(page, "TABS", (*page.TABS, toy))

    client = TestClient(main.build_app(app_state, ["testserver"]))
    assert client.get("/easel/toy").json() == {"runs": 0}
    assert client.get("/easel/assets/page.js").text.endswith("window.toy = true;")
    html = client.get("/").text
    assert "/easel/assets/page.js" in html
    for words in ("Toy button", "Dataset", "Train", "Preview", "Export", "Toolbox"):
        assert words in html
    app_state.close()


@pytest.mark.parametrize("encoding", ["br", "gzip", "identity"])
def test_the_page_and_its_scripts_come_in_what_the_browser_reads(app_state: AppState, encoding: str) -> None:
    client = TestClient(main.build_app(app_state, ["testserver"]))
    make_run(app_state, "a", started(), *map(step, range(1, 99)))
    for path, words in (
        ("/", "gradio_config"),
        ("/easel/assets/page.js", "window.easel = {"),
        ("/easel/curves/a", "charts"),
    ):
        answer = client.get(path, headers={"accept-encoding": encoding})
        assert words in answer.text
        assert answer.headers.get("content-encoding", "identity") == encoding
        assert "accept-encoding" in answer.headers.get("vary", "").lower()
    app_state.close()


def test_no_text_of_a_script_goes_over_a_lines_end() -> None:
    """Indentation and lines of comments can be left out."""
    for file in page.ASSETS.glob("*.js"):
        assert all(line.count("`") % 2 == 0 for line in file.read_text("utf-8").splitlines()), file
    scripts = page.list_assets()["page.js"].decode()
    assert not any(line.startswith((" ", "//")) for line in scripts.splitlines())
