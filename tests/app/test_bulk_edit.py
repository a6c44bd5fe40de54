"""Changes of many captions in the project: seen before, taken back after, byte for byte."""

import os
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from app.state import AppState
from lora_core.data import dataset
from lora_core.errors import DatasetError
from lora_core.projects import caption_edits as bulk
from lora_core.projects import project as projects
from lora_core.projects.caption_edits import Edit, apply_edit
from lora_core.system.files import LARGEST_JSON


def texts(pictures: list[Path]) -> list[bytes | None]:
    files = [picture.with_suffix(".txt") for picture in pictures]
    return [file.read_bytes() if file.exists() else None for file in files]


def test_a_preview_changes_nothing(app_state: AppState, pictures: list[Path]) -> None:
    before = texts(pictures)
    seen = bulk.preview(app_state.project, Edit("replace", "plain", "wide"), None)
    assert (seen["changed"], seen["asked"]) == (2, 3)
    assert seen["rows"][0] == {
        "picture": "picture-0.png",
        "pieces": [("same", "a "), ("old", "plain"), ("new", "wide"), ("same", " field, number 0")],
    }
    assert texts(pictures) == before


def test_the_caption_that_is_read_is_the_one_that_is_edited(
    app_state: AppState, pictures: list[Path]
) -> None:
    """Where a concept's captions have another ending, beside a text file that is not read."""
    project, files = app_state.project, [picture.with_suffix(".caption") for picture in pictures]
    (project.image_folder / "dataset.toml").write_text(
        '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "."\ncaption_extension = ".caption"\n'
    )
    files[0].write_bytes(b"a wide field\r\n")
    project.invalidate()
    others = texts(pictures)

    def read() -> list[str]:
        project.invalidate()
        return [record.caption for record in project.images().values()]

    assert read() == ["a wide field", "a plain field, number 1", ""]
    assert bulk.apply(project, Edit("prepend", put="sks"), None) == 3
    assert read() == ["sks, a wide field", "sks, a plain field, number 1", "sks"]
    # Now that all have one, the folder is not read again in between.
    assert bulk.apply(project, Edit("append", put="far"), None) == 3
    assert read() == ["sks, a wide field, far", "sks, a plain field, number 1, far", "sks, far"]
    assert (bulk.undo(project), bulk.undo(project)) == ((3, 0), (3, 0))
    assert read() == ["a wide field", "a plain field, number 1", ""]
    assert [file.read_bytes() if file.exists() else None for file in files] == [
        b"a wide field\r\n",
        None,
        None,
    ]
    project.save_caption("picture-0.png", "by hand")
    assert read()[0] == "by hand"
    assert texts(pictures) == others


def test_a_change_is_taken_back_byte_for_byte(app_state: AppState, pictures: list[Path]) -> None:
    pictures[1].with_suffix(".txt").write_bytes(b"\xef\xbb\xbfa plain field\r\n")
    app_state.project.invalidate()
    before = texts(pictures)
    assert bulk.apply(app_state.project, Edit("prepend", put="sks"), None) == 3
    assert pictures[2].with_suffix(".txt").read_text() == "sks"
    assert pictures[0].with_suffix(".txt").read_text() == "sks, a plain field, number 0"
    assert bulk.undo(app_state.project) == (3, 0)
    assert texts(pictures) == before
    assert bulk.last_change(app_state.project) == ""
    with pytest.raises(DatasetError, match="left to undo"):
        bulk.undo(app_state.project)


def test_what_was_written_since_stays(app_state: AppState, pictures: list[Path]) -> None:
    bulk.apply(app_state.project, Edit("append", put="outside"), None)
    app_state.project.save_caption("picture-0.png", "by hand")
    assert bulk.undo(app_state.project) == (2, 1)
    assert app_state.project.find_image("picture-0.png").caption == "by hand"
    assert app_state.project.find_image("picture-2.png").caption == ""


def test_each_change_can_be_taken_back_the_last_first(app_state: AppState, pictures: list[Path]) -> None:
    bulk.apply(app_state.project, Edit("replace", "plain", "wide"), None)
    bulk.apply(app_state.project, Edit("delete tag", "number 1"), None)
    assert bulk.last_change(app_state.project) == "tag “number 1” deleted"
    assert bulk.undo(app_state.project) == (1, 0)
    assert bulk.last_change(app_state.project) == "“plain” replaced by “wide”"
    assert app_state.project.find_image("picture-1.png").caption == "a wide field, number 1"


def test_only_the_named_pictures(app_state: AppState, pictures: list[Path]) -> None:
    assert bulk.apply(app_state.project, Edit("append", put="!"), {"picture-1.png"}) == 1
    assert app_state.project.find_image("picture-0.png").caption == "a plain field, number 0"


def test_the_demo_stays_as_it_is(app_state: AppState) -> None:
    app_state.project.update_draft(dataset="demo")
    assert bulk.preview(app_state.project, Edit("append", put="!"), None)["changed"] == 24
    with pytest.raises(DatasetError, match="demo"):
        bulk.apply(app_state.project, Edit("append", put="!"), None)


def test_the_folder_is_read_again_only_where_captions_came_from_elsewhere(
    app_state: AppState, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    app_state.project.dataset()
    scans: list[Path] = []
    plain = dataset.scan
    monkeypatch.setattr(
        dataset, "scan", lambda folder, sizes: (scans.append(folder), plain(folder, sizes))[1]
    )
    named = {"picture-0.png", "picture-1.png"}
    assert bulk.apply(app_state.project, Edit("append", put="outside"), named) == 2
    shown = [record.caption for record in app_state.project.dataset().records]
    assert shown == ["a plain field, number 0, outside", "a plain field, number 1, outside", ""]
    assert scans == []
    app_state.project.invalidate()
    assert [record.caption for record in app_state.project.dataset().records] == shown
    # A caption that another program has written meanwhile is seen, and stays as it is.
    pictures[0].with_suffix(".txt").write_text("by another program")
    assert bulk.apply(app_state.project, Edit("append", put="by night"), named) == 1
    assert app_state.project.find_image("picture-0.png").caption == "by another program"
    assert app_state.project.find_image("picture-1.png").caption.endswith("outside, by night")


def shown(app_state: AppState) -> list[tuple[str, str]]:
    return [(record.path.name, record.caption) for record in app_state.project.dataset().records]


def seen_before(app_state: AppState) -> None:
    """The folder was read long ago, as coarse clocks see it."""
    os.utime(app_state.project.image_folder, (1e9, 1e9))
    app_state.project.dataset()


@pytest.mark.parametrize("when", ["apply_edit", "_keep", "write_caption"])
def test_an_image_that_comes_during_an_edit_is_seen(
    app_state: AppState, pictures: list[Path], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    seen_before(app_state)
    module = projects if when == "write_caption" else bulk
    plain, new = getattr(module, when), app_state.project.image_folder / "new.png"

    def slowly(*given: object) -> object:
        if not new.exists():
            shutil.copyfile(pictures[2], new)
        return plain(*given)

    monkeypatch.setattr(module, when, slowly)
    named = {"picture-0.png", "picture-1.png"}
    assert bulk.apply(app_state.project, Edit("append", put="outside"), named) == 2
    captions = [f"a plain field, number {n}, outside" for n in range(2)]
    names = ["new.png", *(path.name for path in pictures)]
    assert shown(app_state) == list(zip(names, ["", *captions, ""], strict=True))


def test_a_file_that_takes_another_s_place_during_an_edit_is_seen(
    app_state: AppState, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen_before(app_state)
    plain = projects.write_caption

    def slowly(*given: object) -> None:
        plain(*given)
        Image.new("RGB", (200, 100)).save(pictures[2].with_name("made.png"))
        pictures[2].with_name("made.png").replace(pictures[2])

    monkeypatch.setattr(projects, "write_caption", slowly)
    app_state.project.save_caption("picture-0.png", "outside")
    assert (app_state.project.find_image("picture-2.png").width, shown(app_state)[0][1]) == (200, "outside")


def test_a_text_of_several_images_changes_for_each(app_state: AppState, pictures: list[Path]) -> None:
    for name in ("picture-0.jpg", "Picture-1.webp"):
        Image.new("RGB", (64, 64)).save(pictures[0].with_name(name))
    seen_before(app_state)
    for image, word in (("picture-0.png", "one"), ("picture-0.jpg", "two"), ("picture-1.png", "three")):
        assert bulk.apply(app_state.project, Edit("append", put=word), {image}) == 1
        captions = shown(app_state)
        app_state.project.invalidate()
        assert captions == shown(app_state)
    texts = {"picture-0.png": "of the first", "picture-0.jpg": "of the last"}
    edit = Edit("caption", "tagger", texts=texts, how="replace")
    assert bulk.apply(app_state.project, edit, texts.keys()) == 2
    captions = shown(app_state)
    app_state.project.invalidate()
    assert captions == shown(app_state)


def test_what_can_be_taken_back_is_bounded_in_bytes(
    app_state: AppState, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "MOST_BYTES", 1000)
    for word in ("red", "green", "x" * 2000):
        bulk.apply(app_state.project, Edit("append", put=word), None)
    assert bulk.last_change(app_state.project).startswith("“xxx")
    # The last one whatever it takes.
    assert bulk.undo(app_state.project) == (3, 0)
    assert bulk.last_change(app_state.project) == ""
    assert app_state.project.find_image("picture-2.png").caption == "red, green"


def test_more_than_other_small_files_may_have_can_be_taken_back(
    app_state: AppState, pictures: list[Path]
) -> None:
    long = "word " * 190_000
    for picture in pictures:
        picture.with_suffix(".txt").write_text(long.strip())
    app_state.project.invalidate()
    for word in ("one", "two", "three"):
        assert bulk.apply(app_state.project, Edit("append", put=word), None) == 3
    assert (app_state.project.path / "undo.json").stat().st_size > LARGEST_JSON
    assert bulk.undo(app_state.project) == (3, 0)
    assert bulk.last_change(app_state.project) == "“two” put at the end"


TABLE = """# what the taggers call it
Kitty, kitten -> cat
watermark, signature ->
first: sks, cat
last: simple background, grey background
"""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a dog,  on grass", "a dog,  on grass"),
        ("kitty, on grass, watermark", "cat, on grass"),
        ("simple background, on grass, KITTEN, sks", "sks, cat, on grass, simple background"),
        ("cat, kitten, kitty", "cat"),
        ("grey background, a, simple background, b", "a, b, simple background, grey background"),
        ("signature", ""),
        ("kitty, a, Cat, a", "Cat, a"),
        ("a, a", "a, a"),
        ("b, a\nkitten, sks", "b, a\nsks, cat"),
    ],
)
def test_tags_are_changed_by_a_table(before: str, after: str) -> None:
    edit = Edit("table", TABLE)
    assert apply_edit([before, after], edit) == [after, after]


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ("# nothing\n", "The table of tags is empty"),
        ("cat -> a, b", "Line 1 of the table, 'cat -> a, b', is neither"),
        ("\n-> cat", "Line 2 of the table"),
        ("cat", "Line 1 of the table"),
        ("middle: cat", "Line 1 of the table"),
        ("a -> b\nc, A -> d", "Line 2 of the table names 'A' a second time"),
        ("first: a\nlast: b, a", "Line 2 of the table names 'a' a second time"),
    ],
)
def test_a_wrong_table_is_a_sentence(table: str, sentence: str) -> None:
    with pytest.raises(DatasetError, match=re.escape(sentence)):
        apply_edit(["a"], Edit("table", table))
