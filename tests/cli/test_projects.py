"""Verbs about projects, their pictures and captions, on a plain folder and on a project."""

import json
import shutil
from pathlib import Path

import pytest

from lora_core import api
from lora_core.__main__ import main
from lora_core.errors import LoraError, RunError
from lora_core.projects.project import Project
from lora_core.system.files import DEMO_TRAIN


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORA_EASEL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(params=["folder", "project"])
def dataset(request: pytest.FixtureRequest, home: Path, tmp_path: Path) -> tuple[str, Path]:
    """How it is called, and where its pictures are: a.png, b.png, c.png with captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, demo, caption in (
        ("a", "apple", "apple, red"),
        ("b", "fox", "fox, red"),
        ("c", "butterfly", ""),
    ):
        shutil.copy(DEMO_TRAIN / f"{demo}.png", folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption)
    if request.param == "folder":
        return str(folder), folder
    made = api.projects_new("My cats")
    assert api.projects_import("My cats", folder)["added"] == 6
    return "my CATS", made / "pictures"


def captions(folder: Path) -> list[str]:
    return [file.read_text() for file in sorted(folder.glob("*.txt"))]


def words(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("change", "after"),
    [
        (["replace", "red", "blue"], ["apple, blue", "fox, blue", ""]),
        (["replace", "RED", "blue"], ["apple, red", "fox, red", ""]),
        (["replace", "RED", "blue", "--any-case"], ["apple, blue", "fox, blue", ""]),
        (["replace", "(\\w+), red", "red \\1", "--regex"], ["red apple", "red fox", ""]),
        (["prefix", "a photo of "], ["a photo of apple, red", "a photo of fox, red", "a photo of"]),
        (["suffix", ", sharp"], ["apple, red, sharp", "fox, red, sharp", "sharp"]),
        (["rename-tag", "red", "crimson"], ["apple, crimson", "fox, crimson", ""]),
        (["delete-tag", "red"], ["apple", "fox", ""]),
        (["trigger", "zqx"], ["zqx, apple, red", "zqx, fox, red", "zqx"]),
    ],
)
def test_captions_are_changed_shown_and_taken_back(
    change: list[str], after: list[str], dataset: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    name, folder = dataset
    before = captions(folder)
    command = ["captions", change[0], name, *change[1:]]
    shown = words(capsys, *command, "--dry-run")
    assert captions(folder) == before
    found = json.loads(words(capsys, *command, "--json"))
    assert [text.strip() for text in captions(folder)] == after
    assert found["changed"] == sum(one != other for one, other in zip(before, after, strict=True))
    assert f"{found['changed']} of 3 captions would change." in shown
    assert all(f"{row['picture']}: " in shown for row in found["rows"])
    if found["changed"]:
        assert words(capsys, "captions", "undo", name) == f"{found['changed']} captions are as before."
    assert captions(folder) == before
    assert main(["captions", "undo", name]) == 1
    assert "No edit of captions is left" in capsys.readouterr().err


def test_pictures_are_left_out_and_taken_back(
    dataset: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    name, folder = dataset
    there = sorted(path.name for path in folder.iterdir() if path.is_file())
    assert words(capsys, "leave-out", name, "a.png", "b.png") == "2 left out."
    assert api.audit(folder)["pictures"] == 1
    assert words(capsys, "take-back", name) == "a.png\nb.png"
    assert words(capsys, "take-back", name, "a.png", "b.png") == "2 taken back."
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == there
    assert main(["leave-out", name, "nobody.png"]) == 1
    assert "no image named 'nobody.png'" in capsys.readouterr().err


def test_pictures_are_held_out_and_captions_written(
    dataset: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    name, folder = dataset
    api.captions_set(name, "a.png", "new words")
    assert captions(folder)[0].strip() == "new words"
    assert main(["hold-out", name, "a.png"]) == 0
    assert main(["crop", name, "a.png", "0,0,1,0.5"]) == 0
    assert (folder / "crops.json").is_file()
    assert main(["crop", name, "a.png", "0,0,half,1"]) == 1
    assert "is not four or six numbers" in capsys.readouterr().err
    assert main(["crop", name, "a.png", "0,0,1,1"]) == 0
    assert not (folder / "crops.json").exists()
    with pytest.raises(LoraError, match=r"no image named 'x\.png'"):
        api.hold_out(name, ["x.png"])
    with pytest.raises(LoraError, match=r"no image named 'x\.png'"):
        api.captions_set(name, "x.png", "")


@pytest.mark.parametrize(
    "command",
    [["captions", "prefix", "demo", "a"], ["leave-out", "demo", "apple.png"], ["captions", "undo", "demo"]],
    ids=" ".join,
)
def test_the_demo_stays_as_it_is(command: list[str], home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 1
    assert "The demo's images and captions stay as they are" in capsys.readouterr().err


def test_a_project_is_a_dataset_by_its_name(
    dataset: tuple[str, Path], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, folder = dataset
    assert words(capsys, "audit", name).startswith("3 images, 2 with a caption.")
    config = api.run_config(name)
    assert config.dataset.path == str(folder)
    assert config.name.endswith(f"-{Path(name).stem.replace(' ', '-')}")
    assert main(["audit", "my dogs"]) == 1
    assert "The dataset my dogs does not exist; give a folder of images" in capsys.readouterr().err


def test_projects(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = words(capsys, "projects", "new", "My cats")
    assert path == str(home / "projects" / "my-cats")
    assert main(["projects", "new", "my cats"]) == 1
    assert main(["projects", "rename", "My cats", "Dogs"]) == 0
    rows = json.loads(words(capsys, "projects", "list", "--json"))
    assert [(row["title"], row["is_open"]) for row in rows] == [("Dogs", True), ("My images", False)]
    assert main(["projects", "open", "My images"]) == 0
    assert "* My images" in words(capsys, "projects", "list")
    Project(home / "projects" / "my-cats").update_draft(dataset="demo")
    assert api.projects_list()[1]["pictures"] == 24
    words(capsys, "projects", "delete", "dogs")
    assert len(api.projects_list()) == 1
    assert words(capsys, "trash", "restore", "my-cats") == path
    assert main(["projects", "delete", "dgos"]) == 1
    assert "did you mean Dogs?" in capsys.readouterr().err
    with pytest.raises(RunError, match="Type a name"):
        api.projects_new("  ")


def test_copying_to_another_tool(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, folder = tmp_path / "a.safetensors", tmp_path / "loras"
    file.write_bytes(b"one")
    folder.mkdir()
    assert words(capsys, "copy", str(file), "--to", str(folder)) == str(folder / "a.safetensors")
    file.write_bytes(b"two")
    assert api.copy(file, str(folder))["file"] == str(folder / "a-2.safetensors")
    assert main(["copy", str(file), "--to", "no such tool"]) == 1
    assert "no such tool is neither a folder nor a tool on this computer" in capsys.readouterr().err
