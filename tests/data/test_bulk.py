"""What captions become: expected texts are worked out by hand."""

import time

import pytest

from lora_core.errors import DatasetError
from lora_core.projects import caption_edits
from lora_core.projects.caption_edits import Edit, apply_edit, diff_captions
from tests.waiting import PATIENCE


def one(caption: str, edit: Edit) -> str:
    return apply_edit([caption], edit)[0]


@pytest.mark.parametrize(
    ("caption", "edit", "wanted"),
    [
        ("a cat. a cat", Edit("replace", "a", "the"), "the cthet. the cthet"),
        ("a (cat)", Edit("replace", "(cat)", "[dog]"), "a [dog]"),
        (r"a\1b", Edit("replace", r"\1", r"\2"), r"a\2b"),
        ("A Cat", Edit("replace", "cat", "dog"), "A Cat"),
        ("A Cat", Edit("replace", "cat", "dog", any_case=True), "A dog"),
        ("cat 12, cat 3", Edit("replace", r"cat (\d+)", r"dog \1", regex=True), "dog 12, dog 3"),
        ("a  b", Edit("replace", "  ", " "), "a b"),
        ("a cat", Edit("prepend", put="sks"), "sks, a cat"),
        ("a cat", Edit("prepend", put="photo of "), "photo of a cat"),
        ("photo of a cat", Edit("prepend", put="photo of "), "photo of a cat"),
        ("reddish cat", Edit("prepend", put="red"), "red, reddish cat"),
        ("a cat", Edit("append", put="outside"), "a cat, outside"),
        ("a cat, outside", Edit("append", put=", outside"), "a cat, outside"),
        ("a wolfhound", Edit("append", put="hound"), "a wolfhound, hound"),
        ("a cat.", Edit("append", put=" It sleeps."), "a cat. It sleeps."),
        ("", Edit("append", put=", outside"), "outside"),
        ("one\ntwo", Edit("append", put="end"), "one, end\ntwo, end"),
        ("red, Blue, red hat", Edit("rename tag", "RED", "green"), "green, Blue, red hat"),
        ("red, blue", Edit("rename tag", "red", "blue"), "blue"),
        ("red, blue", Edit("delete tag", "blue"), "red"),
        ("red , x,blue", Edit("delete tag", "green"), "red , x,blue"),
        ("red\nred, blue", Edit("delete tag", "red"), "\nblue"),
        ("a cat", Edit("trigger", put="sks"), "sks, a cat"),
        (" a SKS cat ", Edit("trigger", put="sks"), " a SKS cat "),
        ("sksy", Edit("trigger", put="sks"), "sks, sksy"),
    ],
)
def test_edits(caption: str, edit: Edit, wanted: str) -> None:
    assert one(caption, edit) == wanted


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (Edit("replace", "", "x"), "Type the text"),
        (Edit("delete tag", " "), "Type the text"),
        (Edit("append", put=" "), "Type the text"),
        (Edit("replace", "(", "x", regex=True), "pattern"),
        (Edit("replace", "a", r"\1", regex=True), "cannot be used"),
        (Edit("replace", "(?R)", "x", regex=True), "The pattern .* cannot be used"),
        (Edit("replace", "(" * 9000, "x", regex=True), r"The pattern '\({60,80}… cannot be used"),
        (Edit("replace", "(a)", r"\9", regex=True), "The replacement .* cannot be used"),
        (Edit("replace", "a", r"\g<x>", regex=True), "cannot be used"),
        (Edit("explode", "a"), "not an edit"),
    ],
)
def test_what_cannot_be_done_is_a_sentence(edit: Edit, said: str) -> None:
    with pytest.raises(DatasetError, match=said):
        one("a cat", edit)


def test_a_pattern_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_edits, "PATIENCE", 1.0)
    began = time.monotonic()
    with pytest.raises(DatasetError, match="takes longer"):
        one("a" * 60 + "!", Edit("replace", "(a|aa)+$", "b", regex=True))
    assert time.monotonic() - began < PATIENCE


def test_hostile_text_is_text() -> None:
    caption = '<img src=x onerror="1"> {{7*7}} \u202eabc 😀'
    assert one(caption, Edit("replace", "{{7*7}}", "<b>", regex=False)) == caption.replace("{{7*7}}", "<b>")
    assert one(caption, Edit("replace", "😀", "🙂", regex=True)) == caption.replace("😀", "🙂")


def test_nested_repeats_take_no_memory() -> None:
    assert one("a cat", Edit("replace", "((a{1000}){1000}){10}", "x", regex=True)) == "a cat"


def test_differences_add_up_to_both_texts() -> None:
    before, after = "a red cat, sitting", "a blue cat, sitting down"
    pieces = diff_captions(before, after)
    assert "".join(text for kind, text in pieces if kind != "new") == before
    assert "".join(text for kind, text in pieces if kind != "old") == after
    assert ("old", "red") in pieces
    assert ("new", "blue") in pieces


def test_what_is_put_in_front_is_marked_in_front() -> None:
    assert diff_captions("ohwx dog", "ohwx dog, ohwx dog") == [("new", "ohwx dog, "), ("same", "ohwx dog")]
    assert diff_captions("a cat", "a cat, outside") == [("same", "a cat"), ("new", ", outside")]
