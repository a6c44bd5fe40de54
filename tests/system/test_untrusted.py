"""Texts and JSON from files: valid, of the type that is asked for, or refused."""

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from lora_core.model_files.header import read_header
from lora_core.system.files import check_fields, clean_value, parse_json

REPLACED = "\N{REPLACEMENT CHARACTER}"


@dataclass
class Row:
    name: str
    size: int = 0
    share: float = 0.0
    on: bool = False
    words: list[str] | None = None
    at: float | Literal["auto"] = "auto"


def test_json_with_lone_surrogates_and_numbers_that_are_none() -> None:
    assert parse_json('{"\\ud800": ["a\\udfffb", NaN, Infinity, "\\ud83d\\ude00"]}') == {
        REPLACED: [f"a{REPLACED}b", None, None, "\N{GRINNING FACE}"]
    }


@pytest.mark.parametrize("text", ["[" * 100_000, "", "{", b"\xff", "9" * 5000])
def test_what_is_no_json_is_a_value_error(text: Any) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        parse_json(text)


def test_values_that_a_page_cannot_be_sent() -> None:
    value = {"a\ud800": [math.nan, 10**30, (1, "\udc00")], 1: 2.5}
    assert clean_value(value) == {f"a{REPLACED}": [None, None, [1, REPLACED]], 1: 2.5}


@pytest.mark.parametrize(
    "values",
    [
        {"name": 1},
        {"name": "a", "size": 1.5},
        {"name": "a", "size": True},
        {"name": "a", "size": 10**30},
        {},
        {"name": "a", "share": "0"},
        {"name": "a", "on": 1},
        {"name": "a", "words": ["a", 1]},
        {"name": "a", "x": 1},
        {"name": "a", "at": "never"},
    ],
)
def test_fields_of_another_type_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        check_fields(Row, values)


def test_fields_of_their_type_are_taken() -> None:
    found = check_fields(Row, {"name": "a", "size": 2, "share": 1, "words": ["b"], "at": 0.5})
    assert (found.size, found.share, found.words, found.at) == (2, 1, ["b"], 0.5)
    assert check_fields(Row, {"name": "a", "words": None}).at == "auto"


def test_names_and_texts_of_a_header_can_be_shown(tmp_path: Any) -> None:
    """One lone surrogate in a LoRA's header made every load of the page fail, also after a restart."""
    table = {
        "a\ud800": {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]},
        "__metadata__": {"k": "\udfff"},
    }
    header = json.dumps(table).encode()
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    found = read_header(file)
    assert (list(found.tensors), found.metadata) == ([f"a{REPLACED}"], {"k": REPLACED})
