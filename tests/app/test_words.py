"""The window's words: all are in the catalogues, translated, and the page speaks the chosen language."""

import errno
import gettext
import json
import re
from collections import Counter
from pathlib import Path

import gradio as gr
import jinja2
import pytest
from fastapi.testclient import TestClient

from app import templates
from app.jobs import RunView
from app.main import build_app
from app.page import list_assets
from app.state import AppState
from app.templates import FOLDER, LANGUAGES, LOCALE, WORDS, _, pluralize, preferred_language, script_words
from lora_core.runs.folder import RunFolder
from lora_core.settings import schema
from lora_core.settings.config import FIELDS, label_of
from tests import catalogues

UNTRANSLATED = {"LoRA Easel", "Ctrl+Enter", "Esc"}
"""Names and keys that templates hold outside of `_`."""


@pytest.fixture(autouse=True)
def english():
    WORDS.__init__()
    yield
    WORDS.__init__()


def texts(catalog) -> set:
    return {message.id for message in catalog if message.id}


@pytest.fixture(scope="module")
def collected():
    return catalogues.collect()


def test_the_languages_are_those_of_the_catalogues() -> None:
    assert LANGUAGES == {"en": "English", "ja": "日本語", "zh_CN": "简体中文"}
    assert [name for name in LANGUAGES if name != "en"] == catalogues.languages()


@pytest.mark.parametrize("language", catalogues.languages())
def test_a_catalogue_has_each_text_translated_with_its_places(language: str, collected) -> None:
    catalog = catalogues.read(language)
    assert texts(catalog) == texts(collected), "run `python -m tests.catalogues`"
    assert catalogues.missing(catalog) == []
    compiled = gettext.translation("easel", LOCALE, [language])
    for message in (message for message in catalog if message.id):
        one, said = (
            (message.id[0], message.string[0])
            if isinstance(message.id, tuple)
            else (message.id, message.string)
        )
        wanted, found = (
            Counter(re.sub(r"^\{\d", "{", place) for place in catalogues.PLACES.findall(text))
            for text in (one, said)
        )
        assert wanted == found, one
        known = compiled.ngettext(*message.id, 1) if message.pluralizable else compiled.gettext(one)
        assert known == said, "run `python -m tests.catalogues`"


def test_templates_hold_no_text_that_is_not_marked() -> None:
    """What stands between tags and in attributes that are read aloud comes out of `_` or of `trans`."""
    environment = jinja2.Environment(extensions=["jinja2.ext.i18n"])
    for file in FOLDER.rglob("*.html"):
        source = re.sub(r"{%-? trans.*?endtrans [+-]?%}", "", file.read_text("utf-8"), flags=re.S)
        data = "".join(value if kind == "data" else " " for _line, kind, value in environment.lex(source))
        data = re.sub(r"<(style|script|svg).*?</\1>|{[{%].*?[%}]}", "", data, flags=re.S)
        said = re.findall(r'(?<![\w-])(?:title|placeholder|aria-label|alt)="([^"]*)"', data)
        said += re.sub(r"<[^>]*>", "\n", data).splitlines()
        plain = {text.strip(): re.sub(r"&\w+;|/\S*|\?v=", "", text) for text in said}
        assert {text for text in plain if re.search(r"[A-Za-z]{2}", plain[text])} <= UNTRANSLATED, file


BUTTON = re.compile(r'(?:ui\.(?:post_)?button\(|<(?:button|summary|option|h\d)[^>]*>{{ )_\("([^"]+)"')
OTHER_WORDS = re.compile(
    r"\b(pictures?|looks|passed over|by heart|goes? on|gone on|twins|left out|leave out|take back|gains?)\b",
    re.IGNORECASE,
)
"""What the window calls image, skipped, overfitting, continue, duplicate, exclude, include, improvement."""


def test_a_label_has_at_most_12_words_and_one_word_is_for_one_thing() -> None:
    tables = [row for name, table in schema.rows().items() if name != "patterns" for row in table.values()]
    labels = {row.get("title", "") for row in tables if not isinstance(row, str)} | set(map(label_of, FIELDS))
    for file in FOLDER.rglob("*.html"):
        labels |= set(BUTTON.findall(file.read_text("utf-8")))
    assert len(labels) > 300
    assert [label for label in labels if len(label.split()) > 12 or OTHER_WORDS.search(label)] == []


def test_texts_are_filled_and_counted(tmp_path: Path) -> None:
    assert _("Open {name}", name="a{b}") == "Open a{b}"
    assert [pluralize(1, "image"), pluralize(1200, "image")] == ["1 image", "1,200 images"]
    WORDS.speak("ja")
    assert _("Open {name}", name="a{b}") == "a{b} を開く"
    assert [pluralize(1, "image"), pluralize(1200, "image")] == ["画像 1 枚", "画像 1,200 枚"]
    assert _("") == ""
    assert _("a run of mine") == "a run of mine"
    assert templates.label_of("optimizer.lr") == "学習率"
    assert templates.render("train/like.html").startswith('<div id="like-drop"')
    (tmp_path / "config.toml").touch()
    assert re.fullmatch(r"\d{4}/\d\d/\d\d", RunView(RunFolder(tmp_path)).made)


@pytest.mark.parametrize(
    ("header", "language"),
    [
        ("ja,en-US;q=0.7,en;q=0.3", "ja"),
        ("zh-TW,zh;q=0.9", "zh_CN"),
        ("de-DE, en;q=0.5, ja;q=0.1", "en"),
        ("fr", "en"),
        ("", "en"),
    ],
)
def test_a_browser_is_answered_in_the_first_of_its_languages_that_there_is(
    header: str, language: str
) -> None:
    assert preferred_language(header) == language


def test_scripts_get_their_words_and_english_none() -> None:
    scripts = list_assets()["page.js"]
    assert script_words("en", scripts) == ""
    WORDS.speak("zh_CN")
    words = json.loads(script_words("zh_CN", scripts))
    assert words["Undo"] == "撤销"
    assert words["{count} image"] == words["{count} images"] == "{count} 张图片"
    asked = {
        text
        for file in LOCALE.parent.glob("*.js")
        for found in catalogues.texts_of_script(file.read_text("utf-8"))
        for text in ([found] if isinstance(found, str) else found)
    }
    assert all(_(text) == text for text in asked if text not in words)


def test_notes_and_marks_of_scripts_are_translated() -> None:
    for file in LOCALE.parent.glob("*.js"):
        said = re.findall(r'\b(?:toast|marks\.(?:push|unshift))\((["`][^"`]*)', file.read_text("utf-8"))
        assert said == [], file


def test_the_page_is_served_where_its_language_cannot_be_kept(tmp_path: Path, monkeypatch) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("app.page.write_atomically", full)
    with TestClient(build_app(AppState(tmp_path / "workspace", ["no-such-program"]), [])) as client:
        answer = client.get("/", headers={"host": "127.0.0.1", "accept-language": "ja"})
    assert answer.status_code == 200
    assert '<html lang="ja">' in answer.text


def test_open_pages_reload_only_when_the_page_speaks_the_new_language(tmp_path: Path, monkeypatch) -> None:
    app_state = AppState(tmp_path / "workspace", ["no-such-program"])
    with TestClient(build_app(app_state, [])) as client:
        said = [app_state.live.look()[0]["version"]]
        made = gr.Blocks.get_config_file

        def look_meanwhile(page: gr.Blocks) -> object:
            said.append(app_state.live.look()[0]["version"])
            return made(page)

        monkeypatch.setattr(gr.Blocks, "get_config_file", look_meanwhile)
        client.post("/easel/language", json={"language": "ja"}, headers={"host": "127.0.0.1"})
        said.append(app_state.live.look()[0]["version"])
    before, meanwhile, after = said
    assert meanwhile == before
    assert after != before


def test_the_page_follows_the_browser_once_and_then_the_choice(tmp_path: Path) -> None:
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    host = {"host": "127.0.0.1"}

    def page(client: TestClient, languages: str) -> str:
        return client.get("/", headers={**host, "accept-language": languages}).text

    with TestClient(build_app(AppState(workspace, ["no-such-program"]), [])) as client:
        first = page(client, "zh-CN,zh;q=0.9")
        assert '<html lang="zh-CN">' in first
        assert all(word in first for word in ('"学习率"', "开始训练", 'id="words"', "查找设置"))
        assert '<html lang="zh-CN">' in page(client, "ja")
        assert client.post("/easel/language", json={"language": "xx"}, headers=host).status_code == 404
        client.post("/easel/language", json={"language": "en"}, headers=host)
        english = page(client, "ja")
        assert '<html lang="en">' in english
        assert '"Learning rate"' in english
        assert not re.search(r"[\u3040-\u9fff]", english.replace("日本語", "").replace("简体中文", ""))
        assert 'id="words"' not in english
    with TestClient(build_app(AppState(workspace, ["no-such-program"]), [])) as client:
        assert '<html lang="en">' in page(client, "zh-CN")
