"""What somebody does to the files of a run, its pictures and its base: a sentence or no harm, never lost
work."""

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from PIL import Image

from lora_core.__main__ import main
from lora_core.errors import ConfigError, LoraError
from lora_core.runs import events
from lora_core.runs.folder import RunFolder
from tests.faults import corrupt
from tests.train.runs import (
    SAMPLED,
    Toy,
    broken_at,
    check_story,
    check_whole,
    notes,
    result,
    trained,
    trouble,
)


@pytest.mark.parametrize("how", ["flip", "cut"])
def test_spoiled_caches_are_made_anew(own_toy: Toy, how: str, wanted: dict) -> None:
    run = own_toy.run("cached", **SAMPLED)
    broken_at(run, events.StepDone, 5)
    files = [*own_toy.home.glob("cache/latents/*"), *own_toy.home.glob("cache/text/*")]
    assert len(files) >= 8
    whole = {path: path.read_bytes() for path in files}
    for path in files:
        corrupt(path, how)
    trained(run)
    assert result(run) == wanted
    assert {path: path.read_bytes() for path in files} == whole


@pytest.mark.parametrize(("name", "how"), [("adapter", "flip"), ("optimizer", "cut"), ("state", "empty")])
def test_of_a_spoiled_checkpoint_the_one_before_is_used(
    own_toy: Toy, name: str, how: str, wanted: dict
) -> None:
    run = own_toy.run("spoiled", **SAMPLED)
    broken_at(run, events.StepDone, 10)
    assert run.checkpoint_steps() == [4, 6, 8]
    (path,) = run.checkpoint(8).glob(f"{name}.*")
    corrupt(path, how)
    trained(run)
    assert any("step-000008 is broken" in note and "one before it is used" in note for note in notes(run))
    assert result(run) == wanted
    check_story(run)


def test_where_no_checkpoint_is_whole_it_begins_anew_and_says_so(own_toy: Toy, wanted: dict) -> None:
    run = own_toy.run("spoiled", **SAMPLED)
    broken_at(run, events.StepDone, 7)
    for path in run.checkpoints.rglob("adapter.safetensors"):
        corrupt(path, "cut")
    trained(run)
    told = [note for note in notes(run) if " is broken: " in note]
    assert ["step-000006" in told[0], "step-000004" in told[1]] == [True, True]
    assert told[0].endswith("The one before it is used.")
    assert told[1].endswith("There is no other one to resume from, so training starts over.")
    assert result(run) == wanted
    check_story(run)


def test_a_picture_deleted_or_changed_while_it_trains(own_toy: Toy, tmp_path: Path, wanted: dict) -> None:
    """A run holds all that it needs of its pictures; going on later, it says what has changed."""
    pictures = shutil.copytree(own_toy.pictures, tmp_path / "mine")
    toy = Toy(own_toy.base, pictures, own_toy.home)
    run = toy.run("changing", **SAMPLED)

    def change(event: events.Event) -> None:
        if isinstance(event, events.StepDone) and event.step == 2:
            (pictures / "0.png").unlink()
            Image.new("RGB", (32, 32), "black").save(pictures / "1.png")

    trained(run, change)
    assert result(run) == wanted
    broken = toy.run("later")
    broken_at(broken, events.StepDone, 5)
    (pictures / "2.png").unlink()
    sentence = trouble(broken)
    assert "this has changed: the image 2.png" in sentence
    assert "--accept-changes" in sentence
    assert broken.status() == "failed"
    # What the window asks about.
    assert broken.progress().changed == ["the picture 2.png"]
    check_whole(broken)
    trained(broken, accept_changes=True)
    assert broken.status() == "done"


def test_a_picture_that_goes_while_pictures_are_read_ends_in_a_sentence(own_toy: Toy, tmp_path: Path) -> None:
    pictures = shutil.copytree(own_toy.pictures, tmp_path / "mine")
    run = Toy(own_toy.base, pictures, own_toy.home).run("going")

    def delete(event: events.Event) -> None:
        if isinstance(event, events.Preparing) and event.phase.startswith("Encoding images"):
            for path in pictures.glob("*.png"):
                path.unlink()

    with pytest.raises(LoraError, match=r"\d\.png"):
        trained(run, delete)
    assert run.status() == "failed"


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler"])
def test_a_base_that_was_changed_is_told(own_toy: Toy, tmp_path: Path, part: str) -> None:
    base = shutil.copytree(own_toy.base, tmp_path / "base")
    run = Toy(base, own_toy.pictures, own_toy.home).run("based")
    broken_at(run, events.StepDone, 5)
    files = [*(base / part).glob("*.safetensors"), base / part / "scheduler_config.json"]
    path = next(path for path in files if path.is_file())
    if path.suffix == ".json":
        path.write_text(path.read_text().replace("0.00085", "0.00086"))
    else:
        # Another training of the same layout: as large, with the same header, every tensor different.
        from safetensors.torch import load_file, save_file

        save_file({name: tensor + 1e-3 for name, tensor in load_file(path).items()}, path)
    assert f"this has changed: the {part.replace('_', ' ')} of the base" in trouble(run)
    trained(run, accept_changes=True)
    assert run.status() == "done"


def test_settings_edited_by_hand_are_told(
    own_toy: Toy, unbroken: Callable[..., RunFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    """On the command line: a sentence and exit code 1, until it is accepted."""
    run = own_toy.run("edited")
    broken_at(run, events.StepDone, 5)
    text = run.config_file.read_text()
    run.config_file.write_text(text.replace("lr = 0.001", "lr = 0.0005"))
    capsys.readouterr()
    assert main(["resume", str(run.path)]) == 1
    said = capsys.readouterr().err
    assert "this has changed: config.toml. Put it back, or continue with --accept-changes" in said
    assert said.count("\n") == 1
    assert main(["resume", str(run.path), "--accept-changes"]) == 0
    assert run.status() == "done"
    other = own_toy.run("illegal")
    broken_at(other, events.StepDone, 5)
    text = other.config_file.read_text()
    other.config_file.write_text(text.replace("rank = 2", "rnak = 2"))
    with pytest.raises(ConfigError, match="did you mean"):
        trained(other)
    for rate in ("inf", "nan", "-1.0"):
        other.config_file.write_text(text.replace("lr = 0.001", f"lr = {rate}", 1))
        with pytest.raises(ConfigError, match=r"optimizer\.lr"):
            trained(other, accept_changes=True)
    other.config_file.write_text(text)
    check_whole(other)
    trained(other)
    assert result(other) == result(unbroken())


def test_half_a_line_of_events_and_a_lock_of_a_dead_process(own_toy: Toy, wanted: dict) -> None:
    run = own_toy.run("half", **SAMPLED)
    broken_at(run, events.StepDone, 6)
    with open(run.events_file, "ab") as file:
        file.write(b'{"event": "StepDone", "step": 7, "lo')
    # A process that is gone held the lock, and its number is another's now: this one's.
    run.lock_file.write_bytes(b"")
    me = psutil.Process()
    run.process_file.write_text(json.dumps({"pid": me.pid, "started": me.create_time() - 1000}))
    assert run.status() == "interrupted"
    trained(run)
    assert result(run) == wanted
    check_story(run)


def test_a_clock_that_is_set_back(own_toy: Toy, wanted: dict) -> None:
    """All that was written before lies a day ahead of now."""
    run = own_toy.run("clock", **SAMPLED)
    broken_at(run, events.StepDone, 6)
    text = run.events_file.read_text()
    run.events_file.write_text(re.sub(r'"time": ([\d.]+)', lambda m: f'"time": {float(m[1]) + 86_400}', text))
    for path in (p for p in run.path.rglob("*") if p.is_file()):
        os.utime(path, (time.time() + 86_400,) * 2)
    trained(run)
    assert result(run) == wanted
    check_story(run)
    times = [event.time for event in run.progress().losses]
    assert times[3] > times[-1]
