"""Verbs about what a workspace keeps: the trash, caches, checkpoints by a run's name."""

import json
import os
import zipfile
from pathlib import Path

import pytest

from lora_core import api
from lora_core.cli import main
from lora_core.cli.parser import adapter_file, parse, weighted_lora
from lora_core.errors import AdapterFileError, RunError
from lora_core.generate.request import WeightedLora
from lora_core.runs.events import EventWriter, Finished
from lora_core.runs.folder import RunFolder
from lora_core.settings.config import RunConfig


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_EASEL_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def made(home: Path, name: str) -> RunFolder:
    return RunFolder.create(home / "runs" / name, RunConfig())


def words(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out.strip()


def test_a_run_goes_to_the_trash_and_back(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made(home, "first")
    words(capsys, "delete", "first")
    assert not run.path.exists()
    (row,) = json.loads(words(capsys, "trash", "list", "--json"))
    assert (row["name"], row["kind"]) == ("first", "run")
    assert row["id"] in words(capsys, "trash", "list")
    assert words(capsys, "trash", "restore", "first") == str(run.path)
    assert run.config() == RunConfig()
    assert words(capsys, "trash", "list") == "The trash is empty."


def test_two_of_one_name_are_told_apart_by_their_ids(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        made(home, "first")
        api.delete("first")
    ids = [row["id"] for row in api.trash_list()]
    assert main(["trash", "restore", "first"]) == 1
    said = capsys.readouterr().err
    assert all(one in said for one in ids)
    api.trash_restore(ids[0])
    assert main(["trash", "restore", "second"]) == 1
    assert capsys.readouterr().err == "The trash holds no second; it holds first.\n"
    assert api.trash_restore(ids[1]).name == "first-2"
    api.delete("first")
    assert api.trash_empty() > 0
    assert api.trash_list() == []


def test_caches(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert words(capsys, "caches", "list") == "There are no caches."
    for name, size in (("latents", 3_000_000), ("text", 10)):
        (home / "cache" / name).mkdir(parents=True)
        (home / "cache" / name / "one").write_bytes(b"0" * size)
    assert words(capsys, "caches", "list").split() == ["latents", "3.0", "MB", "text", "10", "bytes"]
    assert json.loads(words(capsys, "caches", "list", "--json")) == {"latents": 3_000_000, "text": 10}
    assert words(capsys, "caches", "clean") == "3.0 MB freed"
    assert api.caches_list() == {}


def test_an_adapter_is_a_file_or_a_runs_checkpoint(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made(home, "first")
    with pytest.raises(RunError, match="no checkpoint yet"):
        adapter_file("first", None)
    for step in (5, 10):
        run.checkpoint(step).mkdir()
        (run.checkpoint(step) / "adapter.safetensors").write_bytes(b"")
    files = {step: run.checkpoint(step) / "adapter.safetensors" for step in (5, 10)}
    assert adapter_file("first", None) == adapter_file("first@last", None) == files[10]
    assert adapter_file("first@5", home) == adapter_file(f"{run.path}@5", None) == files[5]
    assert adapter_file(str(run.path), None) == files[10]
    monkeypatch.chdir(run.path.parent)
    assert adapter_file("first", None) == files[10]
    monkeypatch.chdir(tmp_path)
    assert weighted_lora("first@5:0.5:0.25") == WeightedLora(str(files[5]), 0.5, 0.25)
    assert weighted_lora("first:0.5") == WeightedLora(str(files[10]), 0.5)
    with pytest.raises(RunError, match="no checkpoint 7; take best, last or one of 5, 10"):
        adapter_file("first@7", None)
    with pytest.raises(AdapterFileError, match="did you mean first"):
        adapter_file("frist", None)
    os.mkfifo("pipe")
    assert main(["inspect", "pipe"]) == 1
    assert "pipe is not a regular file." in capsys.readouterr().err
    # A file of that name comes first.
    (tmp_path / "first").write_bytes(b"")
    assert adapter_file("first", None) == Path("first")
    assert main(["export", "first", "--checkpoint", "7"]) == 1
    assert main(["export", "first", "--name", "../x"]) == 1


def test_who_is_told(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert words(capsys, "notify") == "Nobody is notified when a run ends."
    assert words(capsys, "notify", "echo hello") == "echo hello"
    assert words(capsys, "notify", "--test") == "echo hello"
    assert main(["notify", "no-such-command-here", "--test"]) == 1
    assert "could not be sent" in capsys.readouterr().err
    assert main(["notify", "echo 'open"]) == 1
    assert words(capsys, "notify", "") == "Nobody is notified when a run ends."


@pytest.mark.parametrize("verb", [["generate", "--prompt"], ["projects", "new"], ["trash", "restore"]])
def test_words_that_are_no_text(verb: list[str], home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*verb, "a\udcffb"]) == 1
    assert capsys.readouterr().err == "'a\\udcffb' holds bytes that are not UTF-8; type it again.\n"
    assert not home.exists()


def test_a_zip_for_a_bug_report(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made(home, "first")
    assert words(capsys, "debug", "first") == str(run.path / "debug.zip")
    with zipfile.ZipFile(run.path / "debug.zip") as archive:
        assert {"about.json", "settings.toml"} <= set(archive.namelist())


@pytest.mark.parametrize(
    ("verb", "more"),
    [
        ("inspect", []), ("verify", []), ("convert", ["o", "--to", "kohya"]), ("compare", ["first@5"]),
        ("shrink", ["--out", "o", "--rank", "1"]), ("strength", ["--dataset", "x"]),
        ("amplify", ["--base", "x"]),
    ],
)  # fmt: skip
def test_every_verb_takes_a_runs_checkpoint(verb: str, more: list[str], home: Path) -> None:
    file = made(home, "first").checkpoint(5) / "adapter.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"")
    for name in ("first", "first@best", "first@5"):
        found = parse([verb, name, *more]).arguments()
        assert {found[one] for one in ("file", "source", "first", "second") if one in found} == {file}
    assert main([verb, "frist", *more]) == 1


def test_a_runs_export_is_copied(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made(home, "first")
    assert main(["copy", "first", "--to", str(tmp_path)]) == 1
    assert "has no exported file; make one by `export first`" in capsys.readouterr().err
    (run.exports / "first.safetensors").write_bytes(b"one")
    writer = EventWriter(run.events_file)
    writer.write(Finished(step=1, export="export/first.safetensors"))
    writer.close()
    assert words(capsys, "copy", "first", "--to", str(tmp_path)) == str(tmp_path / "first.safetensors")
