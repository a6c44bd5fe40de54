"""Changes of many captions in the project: seen before, taken back after, byte for byte."""

from pathlib import Path

import pytest

from app.state import Desk
from lora_core.data.bulk_edit import Edit
from lora_core.errors import DatasetError
from lora_core.projects import caption_edits as bulk


def texts(pictures: list[Path]) -> list[bytes | None]:
    files = [picture.with_suffix(".txt") for picture in pictures]
    return [file.read_bytes() if file.exists() else None for file in files]


def test_a_preview_changes_nothing(desk: Desk, pictures: list[Path]) -> None:
    before = texts(pictures)
    seen = bulk.preview(desk.project, Edit("replace", "plain", "wide"), None)
    assert (seen["changed"], seen["asked"]) == (2, 3)
    assert seen["rows"][0] == {
        "picture": "picture-0.png",
        "pieces": [("same", "a "), ("old", "plain"), ("new", "wide"), ("same", " field, number 0")],
    }
    assert texts(pictures) == before


def test_a_change_is_taken_back_byte_for_byte(desk: Desk, pictures: list[Path]) -> None:
    pictures[1].with_suffix(".txt").write_bytes(b"\xef\xbb\xbfa plain field\r\n")
    desk.project.forget()
    before = texts(pictures)
    assert bulk.apply(desk.project, Edit("prepend", put="sks"), None) == 3
    assert pictures[2].with_suffix(".txt").read_text() == "sks"
    assert pictures[0].with_suffix(".txt").read_text() == "sks, a plain field, number 0"
    assert bulk.undo(desk.project) == (3, 0)
    assert texts(pictures) == before
    assert bulk.undoable(desk.project) == ""
    with pytest.raises(DatasetError, match="left to take back"):
        bulk.undo(desk.project)


def test_what_was_written_since_stays(desk: Desk, pictures: list[Path]) -> None:
    bulk.apply(desk.project, Edit("append", put="outside"), None)
    desk.project.save_caption("picture-0.png", "by hand")
    assert bulk.undo(desk.project) == (2, 1)
    assert desk.project.named("picture-0.png").caption == "by hand"
    assert desk.project.named("picture-2.png").caption == ""


def test_each_change_can_be_taken_back_the_last_first(desk: Desk, pictures: list[Path]) -> None:
    bulk.apply(desk.project, Edit("replace", "plain", "wide"), None)
    bulk.apply(desk.project, Edit("delete tag", "number 1"), None)
    assert bulk.undoable(desk.project) == "tag “number 1” deleted"
    assert bulk.undo(desk.project) == (1, 0)
    assert bulk.undoable(desk.project) == "“plain” replaced by “wide”"
    assert desk.project.named("picture-1.png").caption == "a wide field, number 1"


def test_only_the_named_pictures(desk: Desk, pictures: list[Path]) -> None:
    assert bulk.apply(desk.project, Edit("append", put="!"), {"picture-1.png"}) == 1
    assert desk.project.named("picture-0.png").caption == "a plain field, number 0"


def test_the_demo_stays_as_it_is(desk: Desk) -> None:
    desk.project.keep(dataset="demo")
    assert bulk.preview(desk.project, Edit("append", put="!"), None)["changed"] == 24
    with pytest.raises(DatasetError, match="demo"):
        bulk.apply(desk.project, Edit("append", put="!"), None)
