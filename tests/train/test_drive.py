"""Writes that fail, each by its name, and room that is known to be too little: the run is paused and loses
nothing. `test_real_drive.py` does the same with file systems that are full in earnest."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from lora_core.errors import LoraError, NoRoom
from lora_core.model_files import sizes
from lora_core.runs import events
from lora_core.runs.events import read_events
from lora_core.runs.folder import RunFolder
from lora_core.system import files as disk_space
from tests.faults import Fault, Nursery, armed
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

WRITES = {
    "the plan": Fault("write", r"plan\.json"),
    "the inputs": Fault("fsync", r"inputs\.json"),
    "a cached image": Fault("write", r"cache/latents", nth=2, half=True),
    "a cached caption": Fault("fsync", r"cache/text", nth=3),
    "an image of what should not change": Fault("write", r"cache/prior", half=True),
    "the folder of a checkpoint": Fault("mkdir", "step-000008"),
    "an adapter": Fault("write", r"step-000008.*adapter", nth=3, half=True),
    "the optimizer": Fault("write", r"step-000008.*optimizer", half=True),
    "the state": Fault("open", r"step-000008.*state"),
    "a checkpoint's name": Fault("rename", r"checkpoints/step-000008"),
    "a sample": Fault("write", r"previews", nth=2),
    "the export": Fault("write", r"export/.*\.safetensors\..*\.tmp", nth=3, half=True),
    "the page beside it": Fault("fsync", r"export/.*\.md"),
    "a drive that fails": Fault("fsync", r"step-000008.*optimizer", code="EIO"),
    "a drive that became read-only": Fault("open", r"step-000008", code="EROFS"),
}


@pytest.mark.parametrize("what", list(WRITES))
def test_a_write_that_fails_pauses_the_run(own_toy: Toy, what: str, wanted: dict) -> None:
    run = own_toy.run("full", **SAMPLED)
    fault = WRITES[what]
    with armed(Fault(fault.on, fault.path, fault.nth, 0, code=fault.code, half=fault.half)):
        sentence = trouble(run)
    assert "resume it when the drive works again" in sentence
    assert sentence.count("\n") == 0
    assert (run.status(), run.progress().reason) == ("paused", sentence)
    assert run.progress().cause == "disk_full"
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

    with (
        mock.patch.object(disk_space.shutil, "disk_usage", nearly_full),
        pytest.raises(NoRoom, match="free some space"),
    ):
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


def test_needed_room_is_told_before_the_start(own_toy: Toy) -> None:
    """By hand, for AdamW: three copies of each number, 4 bytes each, and the exported one in 2."""
    run = own_toy.run("size", adapter__rank=64, save__keep_last=2, save__every=4)
    trained(run)
    export = (run.exports / "size.safetensors").stat().st_size
    estimate = sizes.checkpoint_bytes(run.config(), export // 2)
    actual = sum(file.stat().st_size for file in run.checkpoint(12).iterdir())
    assert actual <= estimate < 1.3 * actual
    need = sizes.needed_bytes(run.config(), export)
    assert need >= 2 * actual + export
    assert need == pytest.approx(5 * estimate + export + disk_space.MARGIN)
    assert disk_space.free_bytes(own_toy.home / "not" / "there" / "yet") > 0
    with pytest.raises(NoRoom, match=r"The checkpoint of step 4 needs .* MB"):
        disk_space.require_room(own_toy.home, 10**18, "The checkpoint of step 4")


def test_a_run_of_many_checkpoints_needs_no_more_than_was_told(own_toy: Toy) -> None:
    run: RunFolder = own_toy.run("many", save__every=1, save__keep_last=2, **SAMPLED)
    most = [0]

    def measure(event: events.Event) -> None:
        if isinstance(event, events.CheckpointDone):
            files = [path for path in run.path.rglob("*") if path.is_file()]
            most.append(sum(path.stat().st_size for path in files))

    trained(run, measure)
    assert max(most) <= sizes.needed_bytes(run.config(), (run.exports / "many.safetensors").stat().st_size)


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
    living = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
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


@pytest.mark.skipif(sys.platform == "win32", reason="a nursery forks")
def test_a_zip_that_a_kill_left_half_unpacked_is_unpacked_anew(
    own_toy: Toy, unbroken: Callable[..., RunFolder], nursery: Nursery, tmp_path: Path
) -> None:
    pictures = Path(shutil.make_archive(str(tmp_path / "pictures"), "zip", own_toy.pictures))
    run = Toy(own_toy.base, pictures, own_toy.home).run("zipped", train__steps=4)
    code, _ = nursery.train(run.path, Fault("write", r"cache/datasets/", nth=3, do="kill"))
    assert code == -signal.SIGKILL
    assert run.status() == "interrupted"
    (half,) = own_toy.home.glob("cache/datasets/.*")
    assert half.suffix == ".making"
    assert 0 < len(list(half.iterdir())) < 8
    assert nursery.train(run.path) == (0, "")
    assert result(run) == result(unbroken(train__steps=4))
    (whole,) = (own_toy.home / "cache" / "datasets").iterdir()
    assert len(list(whole.iterdir())) == 8
    check_story(run)


def test_a_zip_that_finds_no_room_pauses_the_run(own_toy: Toy, tmp_path: Path) -> None:
    pictures = Path(shutil.make_archive(str(tmp_path / "pictures"), "zip", own_toy.pictures))
    run = Toy(own_toy.base, pictures, own_toy.home).run("zipped", train__steps=4)
    with armed(Fault("write", r"cache/datasets/", nth=3, times=0)):
        assert "No space left on device" in trouble(run)
    assert run.status() == "paused"
    assert list(own_toy.home.glob("cache/datasets/*")) == []
    trained(run)
    assert run.status() == "done"
