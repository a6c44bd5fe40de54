"""Where things are, and files that are written whole or not at all."""

import os
import threading
from pathlib import Path

import pytest

from lora_core.errors import RunError
from lora_core.system import files
from lora_core.system.files import clean_text, workspace, write_atomically


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a b é.txt"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["a b é.txt"]


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
