"""What is drawn from captions.

Golden captions: written down from the first run and checked by hand against the values that
`Random(seed).random()` gives, which Python promises to keep.
"""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lora_core.data import captions
from lora_core.data.captions import (
    count_all_tokens,
    count_tags,
    count_tokens,
    sample_caption,
    split_chunks,
    split_tags,
    truncated_part,
    with_trigger,
)
from lora_core.errors import ModelFileError
from lora_core.settings.schema import DatasetSection
from lora_core.system.files import CLIP_TOKENIZER, DEMO_BASE

TAGS = "one, two, three, four, five"


def rules(**changes: Any) -> DatasetSection:
    return DatasetSection(**{"caption_dropout": 0.0, **changes})


PLAIN = rules()


def draws(caption: str, chosen: DatasetSection, count: int = 400) -> Counter[str]:
    return Counter(sample_caption(caption, chosen, random.Random(seed)) for seed in range(count))


@pytest.mark.parametrize(
    ("caption", "trigger", "wanted"),
    [
        ("a cat", "zxc", "zxc, a cat"),
        ("", "zxc", "zxc"),
        ("a cat", "", "a cat"),
        ("a ZXC cat", "zxc", "a ZXC cat"),
        ("a zxcat", "zxc", "zxc, a zxcat"),
        ("a cat, by zxc.", "zxc", "a cat, by zxc."),
        ("a photo of sks dog", "sks dog", "a photo of sks dog"),
        ("a c++ book", "c++", "a c++ book"),
        ("one\n\nzxc two", "zxc", "zxc, one\nzxc two"),
    ],
)
def test_trigger(caption: str, trigger: str, wanted: str) -> None:
    assert with_trigger(caption, trigger) == wanted
    assert with_trigger(wanted, trigger) == wanted


def test_without_rules_a_caption_stays_as_it_is() -> None:
    for caption in ("", "a cat", "a , b,,c", "{not a wildcard}", "tag |_|, :|", "a|b"):
        assert sample_caption(caption, PLAIN, random.Random(0)) == caption


# Random(0): 0.844, 0.758, 0.421, 0.259, 0.511, 0.405. Random(1): 0.134, 0.847, 0.764, 0.255, 0.495, 0.449.
# Random(2): 0.956, 0.948, 0.057, 0.085, 0.835, 0.736. The first of each is that of caption dropout.
@pytest.mark.parametrize(
    ("seed", "shuffled", "dropped"),
    [
        (0, "three, five, one, two, four", "one, four"),
        (1, "two, three, one, four, five", "one, two"),
        (2, "three, two, four, one, five", "one, four, five"),
    ],
)
def test_golden(seed: int, shuffled: str, dropped: str) -> None:
    assert sample_caption(TAGS, rules(shuffle_tags=True), random.Random(seed)) == shuffled
    assert sample_caption(TAGS, rules(tag_dropout=0.5), random.Random(seed)) == dropped


def test_the_same_arguments_give_the_same_caption() -> None:
    chosen = rules(trigger="zxc", caption_dropout=0.3, tag_dropout=0.3, shuffle_tags=True, keep_tags=1)
    caption = "a, b, {c|d|e}, f\ng, h | i, j"
    for seed in range(50):
        first, second = (sample_caption(caption, chosen, random.Random(seed)) for _ in range(2))
        assert first == second


def test_caption_dropout_takes_the_trigger_too() -> None:
    drawn = draws("a cat", rules(trigger="zxc", caption_dropout=0.25))
    assert set(drawn) == {"", "zxc, a cat"}
    # 100 of 400 with a standard deviation of 8.7.
    assert 60 < drawn[""] < 140
    assert set(draws("a cat", rules(caption_dropout=1.0))) == {""}


def test_kept_tags_stay_in_front() -> None:
    chosen = rules(shuffle_tags=True, tag_dropout=0.5, keep_tags=2)
    drawn = draws(TAGS, chosen)
    assert all(caption.startswith("one, two") for caption in drawn)
    assert {tag for caption in drawn for tag in split_tags(caption)} == set(split_tags(TAGS))
    assert "one, two" in drawn


def test_all_orders_are_drawn() -> None:
    drawn = draws("a, b, c", rules(shuffle_tags=True), 600)
    assert len(drawn) == 6
    # 100 each with a standard deviation of 9.1.
    assert min(drawn.values()) > 60


def test_dropped_tags_leave_the_trigger() -> None:
    assert set(draws("zxc, a, b", rules(trigger="zxc", tag_dropout=1.0))) == {"zxc"}


@pytest.mark.parametrize(
    ("caption", "wanted"),
    [
        ("a cat\n\n  a tom \r\n", {"a cat", "a tom"}),
        ("a cat | a tom", {"a cat", "a tom"}),
        (
            "a {red|blue|{dark|light} green} cat",
            {f"a {c} cat" for c in ("red", "blue", "dark green", "light green")},
        ),
        ("{ a | b } x", {"a x", "b x"}),
        ("a {|big }cat", {"a cat", "a bigcat"}),
    ],
)
def test_alternatives(caption: str, wanted: set[str]) -> None:
    assert set(draws(caption, PLAIN)) == wanted


def test_tag_counts() -> None:
    captions = ["Red hat, cat", "red hat, dog, dog", "cat\ncat, tree", ""]
    assert list(count_tags(captions).items()) == [("cat", 2), ("Red hat", 2), ("dog", 1), ("tree", 1)]


TEXTS = [
    "",
    "a photo of a cat",
    "A  Photo,\n of the CAT's 3 hats (masterpiece:1.2), they're & you'll!",
    "naïve café, straße, 熊猫, привет мир, 🐈‍⬛",
    "cafe\u0301 1girl, 2024 x_x <|endoftext|> 'tis",
    "supercalifragilisticexpialidocious " * 30,
]


def test_a_tokenizer_without_its_marks_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"<|startoftext|>": 0}')
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(ModelFileError, match=r"vocab\.json lacks <\|endoftext\|>"):
        count_tokens("a cat", tmp_path)


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of CLIP's kind with five merges: all bytes, alone and at the end of a word, then the
    marks."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t</w>"), ("o", "f</w>"), ("t", "h"), ("th", "e</w>")]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    folder = tmp_path_factory.mktemp("Zerleger für Text")
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_token_count_by_hand(small_tokenizer: Path) -> None:
    # "the" and "cat" are one token by their merges, "hat" is three letters, "of" one.
    assert count_tokens("The hat of the cat", small_tokenizer) == 1 + 3 + 1 + 1 + 1
    assert count_tokens("", small_tokenizer) == 0


@pytest.mark.parametrize("which", ["small", "embedded"])
def test_token_count_equals_transformers(small_tokenizer: Path, which: str) -> None:
    from transformers import CLIPTokenizer

    folder = small_tokenizer if which == "small" else DEMO_BASE / "tokenizer"
    theirs = CLIPTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert count_tokens(text, folder) == len(theirs(text, add_special_tokens=False).input_ids), text


def test_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"vocab\.json and merges\.txt"):
        count_tokens("a", tmp_path)


A, COMMA_ID = 5, 7


@pytest.mark.parametrize(
    ("ids", "chunks", "lengths"),
    [
        ([], 3, [0]),
        ([A] * 75, 3, [75]),
        ([A] * 76, 3, [75, 1]),
        ([A] * 300, 3, [75, 75, 75]),
        # The last comma within 20 tokens of the end: what follows it moves on.
        ([A] * 60 + [COMMA_ID] + [A] * 40, 3, [61, 40]),
        ([A] * 55 + [COMMA_ID] + [A] * 40, 3, [56, 40]),
        ([A] * 54 + [COMMA_ID] + [A] * 40, 3, [75, 20]),
        ([A] * 57 + [COMMA_ID] + [A] * 3 + [COMMA_ID] + [A] * 40, 3, [62, 40]),
        # The caption ends with the chunk, or a comma comes next: nothing moves.
        ([A] * 60 + [COMMA_ID] + [A] * 14, 3, [75]),
        ([A] * 60 + [COMMA_ID] + [A] * 14 + [COMMA_ID] + [A] * 5, 3, [75, 6]),
        # The last chunk is simply cut.
        ([A] * 60 + [COMMA_ID] + [A] * 40, 1, [75]),
        ([A] * 60 + [COMMA_ID] + [A] * 100, 2, [61, 75]),
    ],
)
def test_long_captions_are_cut_into_chunks_as_a1111_does(ids, chunks, lengths):
    """Expected values worked out by hand from A1111 1.10.1, modules/sd_hijack_clip.py, tokenize_line."""
    rows = split_chunks(ids, COMMA_ID, chunks)
    assert [len(row) for row in rows] == lengths
    flat = [token for row in rows for token in row]
    assert flat == ids[: len(flat)]


def test_many_texts_are_counted_as_each_of_them_and_once(small_tokenizer, monkeypatch):
    texts = ["the hat", "of the cat " * 9, "", "the hat"]
    assert count_all_tokens(texts, small_tokenizer) == [count_tokens(text, small_tokenizer) for text in texts]
    monkeypatch.setattr(captions, "_BATCH", 1)
    texts = [f"the cat {number}" for number in range(5)]
    together = count_all_tokens(texts, small_tokenizer)
    monkeypatch.setattr(captions, "_clip_tokenizer", lambda folder: None)
    assert count_all_tokens(texts[::-1], small_tokenizer) == together[::-1]


def test_what_is_not_read_follows_the_chunks():
    text = "a " * 70 + ", " + "b " * 100
    # 71 tokens to the comma, then 75 of the rest.
    assert truncated_part(text, 150, CLIP_TOKENIZER).split() == ["b"] * 25
    assert truncated_part(text, 75, CLIP_TOKENIZER).split() == ["b"] * 96
    assert truncated_part(text, 225, CLIP_TOKENIZER) == ""
