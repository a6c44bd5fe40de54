"""Gradio's modules as one script: every module that is asked for can be found."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from app import gradio_modules
from app.gradio_modules import FOLDER, bundle_modules
from app.page import build_page
from app.state import AppState


def test_a_bundle_holds_all_that_its_modules_import() -> None:
    script = bundle_modules(["html", "textbox", "dropdown"])["gradio.js"].decode()
    entry, modules = json.loads(f"[{script.rpartition('})' + chr(10) + '(')[2].removesuffix(');')}]")
    assert entry in modules
    for name, text in modules.items():
        assert not re.search(r"(from|import)\(?[\"'`]\./", text), name
        assert set(re.findall(r'(?:from|import)"gradio/([\w.-]+)"', text)) <= set(modules), name
        for lazy in re.findall(r"import\(`gradio/([\w.-]+)`\)", text):
            assert (FOLDER / "assets" / lazy).is_file(), lazy


def test_only_what_the_components_need_is_in_it() -> None:
    few, more = (bundle_modules(kinds) for kinds in (["html"], ["html", "dropdown", "number"]))
    for name in ("gradio.js", "gradio.css"):
        assert len(few[name]) < len(more[name]) < 1_000_000


def test_the_compiler_of_templates_is_left_out_and_none_of_ours_needs_it(app_state: AppState) -> None:
    script = bundle_modules(["html"])["gradio.js"].decode()
    assert "{default:{compile:text=>()=>text}}" in script
    assert "Handlebars" not in script
    blocks = [block for block in build_page(app_state).blocks.values() if block.get_block_name() == "html"]
    assert not any("{{" in block.html_template + block.css_template for block in blocks)


def test_a_build_of_gradio_that_looks_different_is_served_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "index.html").write_text("<script type=module src=main.js></script>")
    monkeypatch.setattr(gradio_modules, "FOLDER", tmp_path)
    assert bundle_modules(["html"]) == {}


def test_components_are_defined_without_stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_button.py").write_text("import gradio\n\n\nclass OwnButton(gradio.Button):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    with gradio_modules.without_stubs():
        importlib.import_module("own_button")
    assert not (tmp_path / "own_button.pyi").exists()
    sys.modules.pop("own_button")
    importlib.import_module("own_button")
    assert (tmp_path / "own_button.pyi").exists()  # else what is left out is gone from Gradio itself
    sys.modules.pop("own_button")
