"""Where things are, and files that are written whole or not at all."""

import json
import math
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from lora_core.errors import AdapterFileError, ModelFileError, RunError
from lora_core.model_files.header import read_header
from lora_core.system import files
from lora_core.system.files import (
    check_fields,
    clean_text,
    clean_value,
    parse_json,
    workspace,
    write_atomically,
)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a b é.txt"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["a b é.txt"]


def test_a_name_of_almost_any_length_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / f"{'狐' * 83}.txt"
    write_atomically(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_the_old_file_survives_a_failed_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "a.txt"
    write_atomically(path, b"old")

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, full)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_what_cannot_be_written_is_called_by_its_own_name(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file") as caught:
        write_atomically(tmp_path / "gone" / "a.zip", b"")
    assert caught.value.filename == str(tmp_path / "gone" / "a.zip")


def test_writers_in_many_threads_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    failures: list[OSError] = []

    def write(letter: bytes) -> None:
        try:
            for _ in range(20):
                write_atomically(path, letter * 5000)
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b", b"c", b"d")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(set(path.read_bytes())) == 1
    assert path.stat().st_size == 5000


def test_the_workspace_is_the_chosen_one_before_the_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_EASEL_HOME", str(tmp_path / "of the variable"))
    assert workspace() == tmp_path / "of the variable"
    assert workspace(tmp_path / "chosen" / "é") == tmp_path / "chosen" / "é"
    assert (tmp_path / "chosen" / "é").is_dir()


def test_the_workspace_of_nobody_s_choice_is_the_platforms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LORA_EASEL_HOME")
    monkeypatch.setattr(files.platformdirs, "user_data_dir", lambda *a, **k: str(tmp_path / "data"))
    assert workspace() == tmp_path / "data"


def test_a_relative_workspace_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert workspace("here") == tmp_path / "here"


def test_a_workspace_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot be written.*--workspace"):
        workspace(tmp_path / "file" / "below")


def test_the_assets_are_found() -> None:
    for folder in (files.DEMO_BASE, files.DEMO_TRAIN, files.PRESETS):
        assert folder.is_dir(), folder


@pytest.mark.parametrize(
    ("text", "valid"), [("a é 😀\n", "a é 😀\n"), ("\ud800.png", "�.png"), ("a\udcff\udfff", "a��")]
)
def test_lone_surrogates_are_replaced(text: str, valid: str) -> None:
    assert clean_text(text) == valid


# Texts and JSON from files: valid, of the type that is asked for, or refused.


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
    assert clean_value(value) == {f"a{REPLACED}": [None, 2**63 - 1, [1, REPLACED]], 1: 2.5}


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


def test_a_header_with_text_that_cannot_be_shown_is_refused(tmp_path: Any) -> None:
    """One lone surrogate in a LoRA's header made every load of the page fail, also after a restart."""
    row = {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}
    for table in ({"a\ud800": row}, {"a": row, "__metadata__": {"k": "\udfff"}}):
        header = json.dumps(table).encode()
        file = tmp_path / "a.safetensors"
        file.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(AdapterFileError, match="no safetensors file") as refused:
            read_header(file)
        str(refused.value).encode()


def test_a_header_that_holds_a_tensor_twice_is_refused(tmp_path: Any) -> None:
    row = '{"dtype": "F16", "shape": [0], "data_offsets": [0, 0]}'
    header = f'{{"a": {row}, "b.up": {row}, "b.\\u0075p": {row}}}'.encode()
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    for error in (AdapterFileError, ModelFileError):
        with pytest.raises(error, match=r"more than one tensor named 'b\.up'"):
            read_header(file, error)
