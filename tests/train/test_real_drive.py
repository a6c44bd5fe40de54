"""File systems that are full, read-only or gone in earnest: small ones that are mounted for a test, and the
system's limit on the size of a file.

Where room is asked for before a write, the answer is a lie here, as it is where a quota counts: the write
itself is what fails.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from lora_core.errors import LoraError, NoRoom
from lora_core.runs import events
from lora_core.runs.folder import RunFolder
from lora_core.system import files as disk_space
from tests.faults import Nursery
from tests.train.runs import SAMPLED, Toy, broken_at, check_story, check_whole, notes, result, trained

PAGE = 4096
"""What such a file system gives away at a time; a folder or an empty file takes nothing of it."""
FILLED: dict[str, tuple[type[events.Event] | None, int | str, list[str | int], str]] = {
    "who trains it": (None, 0, [], r"process\.json cannot be written: No space left"),
    "a request": (None, 0, [1], r"requests\.jsonl: No space left"),
    "the plan": (None, 0, [2], r"plan\.json cannot be written"),
    "the inputs": (events.Preparing, "Reading the images", [], r"inputs\.json cannot be written"),
    "a cached image": (events.Preparing, "Encoding images", [1], r"cache/latents/"),
    "a cached caption": (events.Preparing, "Encoding captions", [20], r"cache/text/"),
    "an image of what should not change": (events.StepDone, 6, [], r"cache/prior/"),
    "an adapter": (events.StepDone, 4, [5], r"checkpoints/.*adapter\.safetensors cannot be written"),
    "the optimizer": (events.StepDone, 4, ["adapter.safetensors", 9], r"optimizer\.safetensors"),
    "the state": (events.StepDone, 4, ["adapter.safetensors", "optimizer.safetensors"], r"state\.json"),
    "a sample": (events.CheckpointDone, 6, [], r"previews/.*\.png"),
    "the export": (events.PreviewDone, 12, [3], r"export/.*\.safetensors cannot be written"),
    "the side file": (events.PreviewDone, 12, ["export"], r"export/.*\.json"),
    "the page beside it": (events.PreviewDone, 12, ["export", 1], r"export/.*\.(md|png)"),
}
"""When the drive is filled, at which step or phase; what still goes onto it, files and pages; the words."""


@contextlib.contextmanager
def mounted(place: Path, size: str) -> Iterator[Path]:
    """A file system of its own; only root may mount one."""
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    may = sys.platform == "linux" and os.geteuid() == 0
    if not may or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def small_drive(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "drive", "6m") as place:
        yield place


def fill(drive: Path, left: int = 0) -> Path:
    """Fill a drive but for so many pages; returns the file that does."""
    filler = drive / "filler"
    with contextlib.suppress(OSError), open(filler, "ab", buffering=0) as file:
        while True:
            file.write(bytes(PAGE))
    os.truncate(filler, filler.stat().st_size - left * PAGE)
    return filler


def said(error: BaseException | None) -> str:
    """What an error says, and those that it came from."""
    words = []
    while error is not None:
        words.append(f"{error} {getattr(error, 'filename', '')}")
        error = error.__cause__
    return "\n".join(words)


def pages(whole: RunFolder, fits: list[str | int]) -> int:
    """How many pages files of a finished run take, and others."""
    last = whole.checkpoint(whole.checkpoint_steps()[-1])
    files = {path.name: path for path in last.iterdir()} | {
        "export": next(whole.exports.glob("*.safetensors"))
    }
    return sum(-(-files[one].stat().st_size // PAGE) if isinstance(one, str) else one for one in fits)


def unasked() -> contextlib.AbstractContextManager[object]:
    """A drive that seems to have room for everything."""
    return mock.patch.object(disk_space, "free_bytes", return_value=2**50)


@pytest.mark.parametrize("what", list(FILLED))
def test_a_drive_that_is_full_at_each_kind_of_write(
    own_toy: Toy, small_drive: Path, unbroken: Callable[..., RunFolder], wanted: dict, what: str
) -> None:
    kind, at, fits, sentence = FILLED[what]
    left = pages(unbroken(**SAMPLED), fits)
    toy = Toy(own_toy.base, own_toy.pictures, small_drive / "home")
    run = toy.run("full", **SAMPLED)

    def on_event(event: events.Event) -> None:
        now = event.phase if isinstance(event, events.Preparing) else event.step
        if type(event) is kind and now == at and not (small_drive / "filler").exists():
            fill(small_drive, left)

    if kind is None:
        fill(small_drive, left)
    with unasked(), pytest.raises(LoraError) as caught:
        trained(run, on_event)
    assert "No space left on device" in str(caught.value)
    assert str(caught.value).count("\n") == 0
    assert re.search(sentence, said(caught.value)), said(caught.value)
    check_whole(run)
    assert run.status() in ("paused", "queued", "interrupted")
    (small_drive / "filler").unlink()
    trained(run)
    assert result(run) == wanted
    check_story(run)


def test_only_the_events_have_no_room(own_toy: Toy, tmp_path: Path, wanted: dict) -> None:
    """They lie on a drive of one page, which is made larger later; half of it is taken by a line that nobody
    knows."""
    with mounted(tmp_path / "page", "4k") as page:
        run = own_toy.run("mute", **SAMPLED)
        run.events_file.symlink_to(page / "events.jsonl")
        run.events_file.write_text(json.dumps({"event": "Other", "words": 2000 * "x"}) + "\n")

        def on_event(event: events.Event) -> None:
            if isinstance(event, events.StepDone) and event.step == 11:
                subprocess.run(["mount", "-o", "remount,size=64k", str(page)], check=True)

        assert trained(run, on_event).status == "done"
        assert result(run) == wanted
        (told,) = [note for note in notes(run) if "could not be written" in note]
        assert "No space left on device" in told
        assert [event.step for event in run.progress().losses][-1] == 12


def test_a_base_that_is_put_aside_on_a_full_drive(own_toy: Toy, small_drive: Path) -> None:
    toy = Toy(own_toy.base, own_toy.pictures, small_drive / "home")
    run = toy.run("aside", train__steps=2, train__offload=True)
    filler = fill(small_drive, 12)
    with unasked(), pytest.raises(NoRoom, match="No space left on device"):
        trained(run)
    assert run.status() == "paused"
    filler.unlink()
    trained(run)
    assert run.status() == "done"
    check_story(run)


def test_a_real_drive_that_fills_up_and_is_cleared(own_toy: Toy, small_drive: Path, wanted: dict) -> None:
    toy = Toy(own_toy.base, own_toy.pictures, small_drive / "home")
    run = toy.run("small", **SAMPLED)

    def on_event(event: events.Event) -> None:
        if isinstance(event, events.StepDone) and event.step == 7:
            fill(small_drive)

    with pytest.raises(NoRoom, match="MB free"):
        trained(run, on_event)
    assert run.status() in ("paused", "interrupted")
    check_whole(run)
    assert run.checkpoint_steps() == [4, 6]
    (small_drive / "filler").unlink()
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


@pytest.mark.skipif(sys.platform == "win32", reason="limits are those of POSIX")
def test_a_file_size_limit_of_the_system_is_a_full_drive(own_toy: Toy, nursery: Nursery) -> None:
    run = own_toy.run("limited", adapter__rank=64, sample__every=0)
    code, said = nursery.train(run.path, file_size=300_000)
    assert code == 1
    assert "File too large" in said
    assert said.count("\n") == 1
    assert run.status() == "paused"
    check_whole(run)
    assert nursery.train(run.path)[0] == 0
    assert run.status() == "done"


@pytest.mark.slow
@pytest.mark.parametrize("by", [0, 1, 2, 3])
def test_whatever_room_is_left_at_the_start(own_toy: Toy, small_drive: Path, wanted: dict, by: int) -> None:
    """From nothing to enough for all of it, a few pages more each time."""
    toy = Toy(own_toy.base, own_toy.pictures, small_drive / "home")
    ended = set()
    for left in range(by * 6, 708, 24):
        run = toy.run("swept", **SAMPLED)
        filler = fill(small_drive, left)
        with unasked(), contextlib.suppress(LoraError):
            trained(run)
        ended.add(run.status())
        check_whole(run)
        filler.unlink()
        trained(run)
        assert result(run) == wanted, left
        check_story(run)
        shutil.rmtree(small_drive / "home")
    assert ended >= {"paused", "done"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="limits are those of POSIX")
def test_whatever_size_of_a_file_is_allowed(own_toy: Toy, nursery: Nursery, wanted: dict) -> None:
    """Each kind of file is the first to be too large at one of these: half as much again each time."""
    codes = set()
    for power in range(22):
        run = own_toy.run("limited", **SAMPLED)
        code, words = nursery.train(run.path, file_size=int(60 * 1.5**power))
        codes.add(code)
        assert code in (0, 1), words
        assert "Traceback" not in words
        assert "File too large" in words or not code
        check_whole(run)
        if code:
            assert nursery.train(run.path)[0] == 0
        assert result(run) == wanted, power
        shutil.rmtree(own_toy.home)
    assert codes == {0, 1}
