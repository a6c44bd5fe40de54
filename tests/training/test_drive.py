"""A drive that is full, gone or read-only, and files that somebody spoils: a sentence or no harm, never lost
work."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import psutil
import pytest
from PIL import Image

from lora_core.spec import events, room
from lora_core.spec.errors import ConfigError, LoraError, NoRoom
from lora_core.spec.events import read_events
from lora_core.spec.run_folder import RunFolder
from tests.faults import Fault, Nursery, armed, corrupt
from tests.training.runs import (
    Toy,
    broken_at,
    check_story,
    check_whole,
    notes,
    result,
    trained,
    trouble,
)

SAMPLED = {"preview__every": 6, "validation__pictures": 1, "validation__every": 6}
WRITES = {
    "the plan": Fault("write", r"plan\.json"),
    "the inputs": Fault("fsync", r"inputs\.json"),
    "a cached picture": Fault("write", r"cache/latents", nth=2, half=True),
    "the folder of a checkpoint": Fault("mkdir", "step-000008"),
    "an adapter": Fault("write", r"step-000008.*adapter", nth=3, half=True),
    "the optimizer": Fault("write", r"step-000008.*optimizer", half=True),
    "the state": Fault("open", r"step-000008.*state"),
    "a checkpoint's name": Fault("rename", r"checkpoints/step-000008"),
    "a sample": Fault("write", r"previews", nth=2),
    "the export": Fault("write", r"export/.*\.draft", nth=3, half=True),
    "the page beside it": Fault("fsync", r"export/.*\.md"),
    "a drive that fails": Fault("fsync", r"step-000008.*optimizer", code="EIO"),
    "a drive that became read-only": Fault("open", r"step-000008", code="EROFS"),
}


@pytest.fixture
def wanted(unbroken: Callable[..., RunFolder]) -> dict[str, dict[str, bytes]]:
    return result(unbroken(**SAMPLED))


@pytest.mark.parametrize("what", list(WRITES))
def test_a_write_that_fails_pauses_the_run(own_toy: Toy, what: str, wanted: dict) -> None:
    run = own_toy.run("full", **SAMPLED)
    fault = WRITES[what]
    with armed(Fault(fault.on, fault.path, fault.nth, 0, code=fault.code, half=fault.half)):
        sentence = trouble(run)
    assert "resume it when the drive is well" in sentence
    assert sentence.count("\n") == 0
    assert (run.status(), run.progress().reason) == ("paused", sentence)
    assert run.summary()["reason"] == sentence
    check_whole(run)
    trained(run)
    assert result(run) == wanted
    check_story(run)
    assert run.progress().reason == ""


def test_too_little_room_is_known_before_the_write(own_toy: Toy, wanted: dict) -> None:
    run = own_toy.run("tight", **SAMPLED)
    real = shutil.disk_usage

    def nearly_full(path: Path) -> object:
        return real(path)._replace(free=2**20 + 1000)

    with mock.patch.object(room.shutil, "disk_usage", nearly_full), pytest.raises(NoRoom, match="make room"):
        trained(run)
    assert run.status() == "paused"
    assert not run.checkpoint_steps()
    assert not list(run.checkpoints.iterdir())
    trained(run)
    assert result(run) == wanted


@pytest.mark.parametrize("times", [1, 7, 0])
def test_events_that_cannot_be_written_end_no_run(
    own_toy: Toy, capsys: pytest.CaptureFixture[str], times: int, wanted: dict
) -> None:
    run = own_toy.run("mute", **SAMPLED)
    with armed(Fault("write", r"events\.jsonl", nth=9, times=times, half=True)):
        outcome = trained(run)
    assert outcome.status == "done"
    assert "The events cannot be written to" in capsys.readouterr().err
    if times:
        assert run.status() == "done"
        plural = "lines" if times > 1 else "line"
        assert [n for n in notes(run) if f"{times} {plural} about this run could not be written" in n]
    else:
        # Nobody could be told, so a reader takes it for broken off; going on finds all done.
        assert run.status() == "interrupted"
        trained(run)
    assert result(run) == wanted
    for line in run.events_file.read_bytes().split(b"\n")[:-1]:
        with contextlib.suppress(ValueError):
            json.loads(line)
    assert read_events(run.events_file)[0]


def test_no_room_and_no_events_either(own_toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    run = own_toy.run("all", **SAMPLED)
    full = [Fault(on, r"full|events|all/", nth=60, times=0) for on in ("write", "open")]
    with armed(*full), pytest.raises(LoraError, match="No space left"):
        trained(run)
    assert "The events cannot be written" in capsys.readouterr().err
    assert run.status() in ("paused", "interrupted")
    check_whole(run)
    trained(run)
    check_story(run)


@pytest.fixture
def small_drive(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 6 MB; only root may mount one."""
    place = tmp_path / "drive"
    place.mkdir()
    done = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(place)], capture_output=True, check=False
        )
        if sys.platform == "linux" and os.geteuid() == 0
        else None
    )
    if done is None or done.returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_real_drive_that_fills_up_and_is_cleared(own_toy: Toy, small_drive: Path, wanted: dict) -> None:
    toy = Toy(own_toy.base, own_toy.pictures, small_drive / "home")
    run = toy.run("small", **SAMPLED)
    filler = small_drive / "filler"

    def fill(event: events.Event) -> None:
        if isinstance(event, events.StepDone) and event.step == 7:
            with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

    with pytest.raises(NoRoom, match="MB free"):
        trained(run, fill)
    assert run.status() in ("paused", "interrupted")
    check_whole(run)
    assert run.checkpoint_steps() == [4, 6]
    filler.unlink()
    trained(run)
    assert result(run) == wanted
    check_story(run)


def test_a_real_drive_that_turns_read_only_and_one_that_is_gone(own_toy: Toy, small_drive: Path) -> None:
    toy = Toy(own_toy.base, own_toy.pictures, small_drive / "home")
    run = toy.run("locked")

    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(small_drive)], check=True)

    broken_at(run, events.StepDone, 6)
    remount("ro")
    with pytest.raises(LoraError, match="cannot be written: Read-only"):
        trained(run)
    with pytest.raises(LoraError, match="Read-only"):
        toy.run("new")
    remount("rw")
    trained(run)
    assert run.status() == "done"
    check_story(run)

    other = toy.run("gone")

    def unplug(event: events.Event) -> None:
        if isinstance(event, events.StepDone) and event.step == 2:
            os.rename(small_drive / "home", small_drive / "elsewhere")

    with pytest.raises(NoRoom, match=r"is gone\. Connect its drive again"):
        trained(other, unplug)
    os.rename(small_drive / "elsewhere", small_drive / "home")
    other.process_file.unlink()  # named this process, which lives on, unlike a trainer's own
    assert other.status() in ("paused", "interrupted")
    trained(other)
    assert other.status() == "done"
    check_story(other)


def test_a_file_size_limit_of_the_system_is_a_full_drive(own_toy: Toy) -> None:
    run = own_toy.run("limited", adapter__rank=64, preview__every=0)
    nursery = Nursery()
    try:
        code, said = nursery.train(run.path, file_size=300_000)
        assert code == 1
        assert "File too large" in said
        assert said.count("\n") == 1
        assert run.status() == "paused"
        check_whole(run)
        assert nursery.train(run.path)[0] == 0
        assert run.status() == "done"
    finally:
        nursery.close()


# What somebody does to the files of a run.


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


@pytest.mark.parametrize("how", ["flip", "empty"])
def test_of_a_spoiled_checkpoint_the_one_before_is_used(own_toy: Toy, how: str, wanted: dict) -> None:
    run = own_toy.run("spoiled", **SAMPLED)
    broken_at(run, events.StepDone, 10)
    assert run.checkpoint_steps() == [4, 6, 8]
    corrupt(run.checkpoint(8) / "adapter.safetensors", how)
    trained(run)
    assert any("step-000008 is broken" in note and "one before it is used" in note for note in notes(run))
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
    assert "this has changed: the picture 2.png" in sentence
    assert "--accept-changes" in sentence
    assert broken.status() == "failed"
    check_whole(broken)
    trained(broken, accept_changes=True)
    assert broken.status() == "done"


def test_a_picture_that_goes_while_pictures_are_read_ends_in_a_sentence(own_toy: Toy, tmp_path: Path) -> None:
    pictures = shutil.copytree(own_toy.pictures, tmp_path / "mine")
    run = Toy(own_toy.base, pictures, own_toy.home).run("going")

    def delete(event: events.Event) -> None:
        if isinstance(event, events.Preparing) and event.phase.startswith("Encoding pictures"):
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


def test_settings_edited_by_hand_are_told(own_toy: Toy) -> None:
    run = own_toy.run("edited")
    broken_at(run, events.StepDone, 5)
    text = run.config_file.read_text()
    run.config_file.write_text(text.replace("lr = 0.001", "lr = 0.0005"))
    assert "this has changed: config.toml" in trouble(run)
    trained(run, accept_changes=True)
    assert run.status() == "done"
    other = own_toy.run("illegal")
    broken_at(other, events.StepDone, 5)
    other.config_file.write_text(text.replace("rank = 2", "rnak = 2"))
    with pytest.raises(ConfigError, match="did you mean"):
        trained(other)


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


def test_what_a_kill_leaves_in_caches_and_folders_is_gone_at_the_next_start(own_toy: Toy) -> None:
    run = own_toy.run("left")
    broken_at(run, events.StepDone, 6)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = [
        own_toy.home / "cache" / "latents" / f".a.safetensors.{gone.pid}-1.tmp",
        run.path / f".plan.json.{gone.pid}-1.tmp",
        run.exports / f".left.safetensors.{gone.pid}.draft",
        run.checkpoint(4) / f".state.json.{gone.pid}-7.tmp",
        run.checkpoints / ".step-000008.making",
        run.checkpoints / ".step-000002.going.making",
    ]
    living = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    other = own_toy.home / "cache" / "text" / f".b.safetensors.{living.pid}-1.tmp"
    for path in (*left, other):
        path.mkdir() if path.suffix == ".making" else path.write_bytes(b"half")
    try:
        trained(run)
        assert [path for path in left if path.exists()] == []
        # That one is another's, who is just writing it.
        assert other.exists()
    finally:
        living.kill()
        living.wait()
    trained(own_toy.run("next"))
    assert not other.exists()


def test_a_folder_that_a_kill_left_half_made_goes_with_the_next(tmp_path: Path, own_toy: Toy) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    half = own_toy.home / "runs" / f".new.{gone.pid}-abc.making"
    half.mkdir(parents=True)
    own_toy.run("new")
    assert not half.exists()
    assert [path.name for path in (own_toy.home / "runs").iterdir()] == ["new"]


def test_needed_room_is_told_before_the_start(own_toy: Toy) -> None:
    """By hand, for AdamW: three copies of each number, 4 bytes each, and the exported one in 2."""
    run = own_toy.run("size", adapter__rank=64, save__keep_last=2, save__every=4)
    trained(run)
    export = (run.exports / "size.safetensors").stat().st_size
    estimate = room.checkpoint_bytes(run.config(), export // 2)
    actual = sum(file.stat().st_size for file in run.checkpoint(12).iterdir())
    assert actual <= estimate < 1.3 * actual
    need = room.needed_bytes(run.config(), export)
    assert need >= 2 * actual + export
    assert need == pytest.approx(5 * estimate + export + room.MARGIN)
    assert room.free_bytes(own_toy.home / "not" / "there" / "yet") > 0
    with pytest.raises(NoRoom, match=r"The checkpoint of step 4 needs .* MB"):
        room.require_room(own_toy.home, 10**18, "The checkpoint of step 4")


def test_a_run_of_many_checkpoints_needs_no_more_than_was_told(own_toy: Toy) -> None:
    run: RunFolder = own_toy.run("many", save__every=1, save__keep_last=2, **SAMPLED)
    most = [0]

    def measure(event: events.Event) -> None:
        if isinstance(event, events.CheckpointDone):
            files = [path for path in run.path.rglob("*") if path.is_file()]
            most.append(sum(path.stat().st_size for path in files))

    trained(run, measure)
    assert max(most) <= room.needed_bytes(run.config(), (run.exports / "many.safetensors").stat().st_size)
