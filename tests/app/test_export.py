"""The Export tab: what each tool makes of a file, copying it into another tool's folder, and looking at any
file."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from app.export import view
from app.export.view import (
    check_folder,
    checkpoint_cards,
    choose,
    copied_line,
    export_buttons,
    folder_choices,
    report_card,
    upload,
    written_file,
)
from app.state import AppState, OtherTools, take_snapshot
from app.templates import render
from app.toolbox.view import (
    compatibility_card,
    describe_training,
    file_facts,
)
from lora_core.errors import RunError
from lora_core.system import other_tools
from lora_core.system.other_tools import InstalledTool, copy_export
from tests.app.test_preview import run_with_file
from tests.hub import hub_of, use_hub

HOSTILE = '"><img src=x onerror=alert(1)>'


def row(tool: str = "ComfyUI", **changes: Any) -> dict[str, Any]:
    fine = {
        "keys": 264,
        "matched": 264,
        "dropped": 0,
        "dropped_keys": [],
        "max_delta_error": 1e-4,
        "note": "reads every key",
    }
    return {"tool": tool, **fine, **changes}


@pytest.mark.parametrize(
    ("changes", "verdict", "said"),
    [
        ({}, "loads all keys", "264 of 264 keys, same strength"),
        ({"ok": True, "max_delta_error": None, "note": "reads every key"}, "loads all keys", "reads every"),
        ({"ok": True, "unused_keys": ["x"], "note": "no use of x"}, "loads all keys", "no use of x"),
        (
            {"matched": 262, "dropped": 2, "dropped_keys": ["a.alpha", "b.alpha"], "note": "drops 2"},
            "drops keys",
            "drops 2",
        ),
        (
            {"matched": 0, "dropped": 1, "dropped_keys": ["a"], "note": "refuses it"},
            "loads nothing",
            "refuses it",
        ),
        ({"max_delta_error": 1.0, "note": "2 times too strong"}, "wrong strength", "2 times too strong"),
        ({"max_delta_error": None, "note": "in different ways"}, "may differ", "in different ways"),
    ],
)
def test_a_row_a_tool(changes: dict[str, Any], verdict: str, said: str) -> None:
    shown = compatibility_card({"works_in": {"ok": True, "tools": [row(**changes)]}})
    assert verdict in shown
    assert said in shown
    assert ("Which keys" in shown) == (verdict == "drops keys")


def test_what_the_worker_says_of_tools_is_text() -> None:
    hostile = row(HOSTILE, matched=1, dropped=50, dropped_keys=[HOSTILE] * 50, note=HOSTILE)
    shown = compatibility_card({"works_in": {"ok": False, "tools": [hostile]}})
    assert "<img" not in shown
    assert "and 10 more" in shown
    assert "not every tool loads it" in shown
    written = {"file": f"/a/{HOSTILE}.safetensors", "bytes": 5e6, "modules": 3}
    assert "<img" not in "".join(written_file(written, HOSTILE, "/x", []).values())


def test_the_project_s_own_run_is_offered_first(app_state: AppState) -> None:
    """A run of another project is never chosen by itself, and the demo's file says where it works."""
    run_with_file(app_state)
    shown = checkpoint_cards(take_snapshot(app_state))
    assert "mine" in shown.split("</h2>")[0]
    assert "works only with that base" in shown
    assert 'value="last" selected' in shown
    choose(app_state, {"checkpoint": "50"})
    assert 'data-checkpoint="50" aria-pressed="true"' in checkpoint_cards(take_snapshot(app_state))
    assert "disabled" not in export_buttons(take_snapshot(app_state))
    app_state.projects.new("another")
    snapshot = take_snapshot(app_state)
    shown = checkpoint_cards(snapshot)
    assert "Nothing to export yet" in shown
    assert "Other projects" in shown
    assert export_buttons(snapshot).count("No checkpoint yet") == 3, "in words and both tips"
    assert "disabled" in report_card(snapshot)
    choose(app_state, {"run": "mine", "checkpoint": ""})
    assert "mine" in checkpoint_cards(take_snapshot(app_state)).split("</h2>")[0]


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "export"
    folder.mkdir(parents=True)
    (folder / "my dög.json").write_text('{"activation text": "zwx"}')
    (folder / "my dög.preview.png").write_bytes(b"picture")
    (folder / "my dög.md").write_text("a page for people")
    file = folder / "my dög.safetensors"
    file.write_bytes(b"weights")
    return file


@pytest.fixture
def loras(tmp_path: Path) -> Path:
    folder = tmp_path / "ComfyUI é" / "models" / "loras"
    folder.mkdir(parents=True)
    return folder


def test_an_export_is_copied_with_what_belongs_to_it(export: Path, loras: Path) -> None:
    done = copy_export(export, loras)
    assert sorted(os.listdir(loras)) == ["my dög.json", "my dög.preview.png", "my dög.safetensors"]
    assert done.file.read_bytes() == b"weights"
    assert (len(done.beside), done.kept, done.renamed) == (2, (), False)
    assert copy_export(export, loras) == other_tools.CopiedFile(done.file, (), (), False)


def test_another_file_of_that_name_is_never_replaced(export: Path, loras: Path) -> None:
    (loras / export.name).write_bytes(b"somebody else's")
    (loras / "my dög-2.safetensors").symlink_to(loras / "nowhere")
    done = copy_export(export, loras)
    assert done.file == loras / "my dög-3.safetensors"
    assert done.renamed
    assert (loras / "my dög-3.json").is_file()
    assert (loras / export.name).read_bytes() == b"somebody else's"


def test_words_that_a_person_wrote_there_stay(export: Path, loras: Path) -> None:
    copy_export(export, loras)
    side = loras / "my dög.json"
    side.write_text('{"activation text": "mine", "notes": "good at 0.7"}')
    done = copy_export(export, loras)
    assert (done.kept, done.renamed) == ((side,), False)
    assert "good at 0.7" in side.read_text()


def test_a_copy_that_fails_leaves_nothing_behind(
    export: Path, loras: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        Path(target).write_bytes(b"wei")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(other_tools.shutil, "copyfile", full)
    with pytest.raises(RunError, match="No space left"):
        copy_export(export, loras)
    assert os.listdir(loras) == []


def test_a_folder_that_is_none_is_a_sentence(export: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no folder at"):
        copy_export(export, tmp_path / "gone")
    for text, words in (("", "Choose a folder"), (str(tmp_path / "gone"), "no folder at"), (None, "Choose")):
        with pytest.raises(RunError, match=words):
            check_folder(text)
    assert check_folder(f' "{tmp_path}" ') == tmp_path


def test_folders_of_tools_and_folders_used_before_are_offered(
    app_state: AppState, loras: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    tools = [
        InstalledTool("ComfyUI", loras.parents[1], (), loras),
        InstalledTool("InvokeAI", tmp_path, (), None),
    ]
    app_state.tools = OtherTools(app_state.places, lambda extra: tools)
    app_state.tools.look(wait=True)
    for folder in (loras, own, tmp_path / "gone"):
        app_state.places.keep("lora_folders", str(folder))
    assert folder_choices(app_state) == [(f"ComfyUI: {loras}", str(loras)), (str(own), str(own))]


def test_what_was_copied_is_said(app_state: AppState, export: Path, loras: Path) -> None:
    tools = [InstalledTool("ComfyUI", loras.parents[1], (), loras)]
    app_state.tools = OtherTools(app_state.places, lambda extra: tools)
    app_state.tools.look(wait=True)
    (loras / export.name).write_bytes(b"other")
    said = copied_line(app_state, copy_export(export, loras))
    assert "Copied to ComfyUI, with its side files." in said
    assert "this file is called my dög-2" in said
    assert str(loras / "my dög-2.safetensors") in said
    assert "new tokens" not in said
    (tokens := export.with_name("my dög-tokens")).mkdir()
    said = copied_line(app_state, copy_export(export, loras))
    assert f"The files of its new tokens are in {tokens}; copy them" in said


def test_an_upload_is_private_and_says_where_it_is(
    app_state: AppState, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export.with_suffix(".md").write_text("---\ntags: [lora]\n---\n", encoding="utf-8")
    written = {"file": str(export), "works_in": []}
    monkeypatch.setattr(view, "write_export", lambda app_state, sent: (None, written))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(RunError, match="Type the repository"):
        upload(app_state, {"repo": " "})
    with hub_of() as hub:
        use_hub(monkeypatch, hub, tmp_path / "cache")
        hub.root = tmp_path / "uploaded"
        hub.root.mkdir()
        answer = upload(app_state, {"repo": "owner/dog", "license": "mit"})
        assert f'href="{hub.address}/owner/dog"' in answer["copied"]
        assert (hub.root / "dog" / export.name).read_bytes() == export.read_bytes()
        assert "license: mit" in (hub.root / "dog" / "README.md").read_text("utf-8")
        assert hub.public == set()
        assert "Uploaded to a private repository:" in answer["copied"]
        assert "README.md" not in answer["copied"]
        again = upload(app_state, {"repo": "owner/dog", "license": "apache-2.0"})
        assert "README.md stays as it is, so the licence was not written" in again["copied"]
        assert "license: mit" in (hub.root / "dog" / "README.md").read_text("utf-8")
    assert "<code>hf auth login</code>" in render("export/upload.html")
    assert "`" not in render("export/upload.html")
    assert "hf_secret" not in json.dumps(answer)


def test_what_a_file_says_of_its_training() -> None:
    assert (
        describe_training({"ss_sd_model_name": "v1-5", "ss_num_train_images": "20", "ss_steps": "x"})
        == "on v1-5, 20 images"
    )


def test_a_report_shows_what_a_file_says_as_text() -> None:
    report = {
        "family": "sd15", "kind": "LoCon", "format": "kohya", "ranks": [1, 4, 8, 16, 32], "alphas": [1.0],
        "modules": 264, "parameters": 9_437_184, "bytes": 18_900_000, "hash_matches": False,
        "metadata": {"ss_sd_model_name": HOSTILE}, "triggers": [HOSTILE], "writer": HOSTILE,
    }  # fmt: skip
    shown = file_facts(f"{HOSTILE}.safetensors", {"report": report, "verify": {"ok": True, "tools": [row()]}})
    assert "<img" not in shown
    assert "Stable Diffusion 1.x" in shown
    assert "1 to 32, 5 values" in shown
    assert "its hash differs" in shown
    assert "264 of 264 keys" in shown
    said = {"problem": f"it is broken {HOSTILE}", "extras": "Left out: changes of biases"}
    shown = file_facts("x", {"report": {**report, **said}, "verify": {"ok": True, "tools": [row()]}})
    assert "<img" not in shown
    assert "it is broken" in shown
    assert "changes of biases" in shown
    shown = file_facts("x", {"report": {**report, "family": HOSTILE}, "problem": HOSTILE})
    assert "<img" not in shown
    assert "<table>" not in shown
