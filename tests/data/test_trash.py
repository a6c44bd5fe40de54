"""Caches are cleaned only while nobody uses them; the trash gives all back, and takes nothing in use."""

import contextlib
import os
import shutil
import sqlite3
import subprocess
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from lora_core.errors import RunError
from lora_core.projects.workspace import (
    cache_sizes,
    clean_caches,
    empty_trash,
    list_trash,
    move_to_trash,
    restore,
    trash_folder,
)
from lora_core.runs.folder import RunFolder, all_runs, runs_folder
from lora_core.runs.queue import Queue
from lora_core.settings.config import RunConfig
from lora_core.system.files import folder_bytes
from tests.waiting import PATIENCE


def filled(folder: Path, *sizes: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(sizes):
        (folder / f"{number}.safetensors").write_bytes(b"x" * size)
    return folder


def test_sizes_of_caches(tmp_path: Path) -> None:
    filled(tmp_path / "cache" / "latents", 100, 200)
    filled(tmp_path / "cache" / "text", 1000)
    filled(tmp_path / "cache" / "datasets" / "abc" / "deep", 30)
    filled(tmp_path / "projects" / "cats" / "pictures", 4000)
    assert list(cache_sizes(tmp_path).items()) == [("text", 1000), ("latents", 300), ("datasets", 30)]
    assert cache_sizes(tmp_path / "nowhere") == {}


@pytest.mark.skipif(shutil.which("du") is None, reason="no du")
def test_as_du_says(tmp_path: Path) -> None:
    filled(tmp_path / "a" / "b", 10, 20, 30)
    os.link(tmp_path / "a" / "b" / "2.safetensors", tmp_path / "a" / "again")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "a" / "b")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    said = subprocess.run(
        ["du", "-s", "--bytes", tmp_path], capture_output=True, text=True, check=True
    ).stdout
    folders = sum(path.stat().st_size for path in (tmp_path, tmp_path / "a", tmp_path / "a" / "b"))
    links = sum((tmp_path / "a" / name).lstat().st_size for name in ("link", "loop"))
    assert folder_bytes(tmp_path) == 60 + links
    # Older ones count the folders' own bytes too.
    assert int(said.split()[0]) in (60 + links, 60 + links + folders)


def test_many_files_take_no_time(tmp_path: Path) -> None:
    for number in range(40):
        folder = filled(tmp_path / str(number))
        for other in range(250):
            (folder / str(other)).touch()
    (tmp_path / "last").write_bytes(b"x" * 7)
    began = time.process_time()
    assert folder_bytes(tmp_path) == 7
    # 10,000 files; measured at 0.05 s.
    assert time.process_time() - began < 2.0


def test_caches_are_cleaned_and_nothing_else(tmp_path: Path) -> None:
    filled(tmp_path / "cache" / "latents", 100, 200)
    filled(tmp_path / "cache" / "text", 1000)
    (tmp_path / "cache" / "stray").write_bytes(b"x" * 5)
    filled(tmp_path / "cache" / ".latents.abc.going", 50)  # left by a cleaning that was killed
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "keep").write_bytes(b"keep")
    (tmp_path / "cache" / "link").symlink_to(tmp_path / "outside")
    link = (tmp_path / "cache" / "link").lstat().st_size
    run = RunFolder.create(runs_folder(tmp_path) / "one", RunConfig())
    with run.hold(), pytest.raises(RunError, match="one is still running"):
        clean_caches(tmp_path)
    assert cache_sizes(tmp_path) == {"text": 1000, "latents": 300}
    assert clean_caches(tmp_path) == 1355 + link
    assert list((tmp_path / "cache").iterdir()) == []
    assert (tmp_path / "outside" / "keep").read_bytes() == b"keep"
    assert run.config_file.is_file()
    assert clean_caches(tmp_path) == 0
    assert clean_caches(tmp_path / "nowhere") == 0


def made(home: Path, name: str = "one", dataset: str = "demo") -> RunFolder:
    return RunFolder.create(runs_folder(home) / name, RunConfig().changed({"dataset.path": dataset}))


def project(home: Path, name: str = "cats") -> Path:
    pictures = home / "projects" / name / "pictures"
    pictures.mkdir(parents=True)
    (pictures / "a.png").write_bytes(b"a")
    return pictures.parent


def test_a_run_goes_and_comes_back(tmp_path: Path) -> None:
    run = made(tmp_path)
    (run.checkpoints / "state").write_bytes(b"precious")
    before = run.config_file.read_bytes()
    moved = move_to_trash(run.path, tmp_path)
    assert not run.path.exists()
    assert all_runs(tmp_path) == []
    assert (moved / "checkpoints" / "state").read_bytes() == b"precious"
    (one,) = list_trash(tmp_path)
    assert (one.name, one.came_from, one.content) == ("one", run.path, moved)
    assert restore(one, tmp_path) == run.path
    assert run.config_file.read_bytes() == before
    assert list_trash(tmp_path) == []
    assert list(trash_folder(tmp_path).iterdir()) == []


def test_two_of_one_name(tmp_path: Path) -> None:
    move_to_trash(made(tmp_path).path, tmp_path)
    move_to_trash(made(tmp_path).path, tmp_path)
    again = made(tmp_path)
    newest, oldest = list_trash(tmp_path)
    assert newest.time >= oldest.time
    before = again.config_file.read_bytes()
    assert [restore(one, tmp_path).name for one in (newest, oldest)] == ["one-2", "one-3"]
    assert again.config_file.read_bytes() == before
    assert list_trash(tmp_path) == []
    assert sorted(run.name for run in all_runs(tmp_path)) == ["one", "one-2", "one-3"]
    move_to_trash(again.path, tmp_path)
    empty_trash(tmp_path)
    assert list_trash(tmp_path) == []


def test_a_live_run_stays(tmp_path: Path) -> None:
    run = made(tmp_path)
    with run.hold(), pytest.raises(RunError, match="one is still running; stop it"):
        move_to_trash(run.path, tmp_path)
    # One that has the lock and has not said yet who it is.
    locked, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with FileLock(run.lock_file):
            locked.set()
            leave.wait(PATIENCE)

    thread = threading.Thread(target=hold)
    thread.start()
    locked.wait(PATIENCE)
    with pytest.raises(RunError, match="one is still running"):
        move_to_trash(run.path, tmp_path)
    leave.set()
    thread.join()
    assert run.config_file.is_file()
    assert list_trash(tmp_path) == []
    move_to_trash(run.path, tmp_path)


def test_a_project_whose_pictures_are_trained_on_stays(tmp_path: Path) -> None:
    folder, other = project(tmp_path), project(tmp_path, "dogs")
    run = made(tmp_path, dataset=str(folder / "pictures"))
    with run.hold():
        with pytest.raises(RunError, match="one is still training on the images of cats"):
            move_to_trash(folder, tmp_path)
        move_to_trash(other, tmp_path)
    moved = move_to_trash(folder, tmp_path)
    assert (moved / "pictures" / "a.png").read_bytes() == b"a"
    assert {one.name for one in list_trash(tmp_path)} == {"cats", "dogs"}


def test_a_job_leaves_the_queue_too(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    queue.add(made(tmp_path, "one"))
    queue.add(made(tmp_path, "two"))
    move_to_trash(queue.run("one").path, tmp_path)
    assert [job.run for job in queue.jobs()] == ["two"]


@pytest.mark.parametrize(
    "place",
    ["", "runs", "runs/one/checkpoints", "cache", "runs/../runs/.trash", ".trash", "../outside", "runs/.."],
)
def test_nothing_else_is_ever_moved(tmp_path: Path, place: str) -> None:
    home = tmp_path / "home"
    made(home)
    (tmp_path / "outside" / "runs" / "x").mkdir(parents=True)
    for path in (home / place, tmp_path / "outside" / "runs" / "x"):
        with pytest.raises(RunError, match="neither a run nor a project"):
            move_to_trash(path, home)
    assert (tmp_path / "outside" / "runs" / "x").is_dir()
    assert made(home, "two").path.is_dir()


def test_what_is_gone_already(tmp_path: Path) -> None:
    for place in (runs_folder(tmp_path) / "gone", tmp_path / "projects" / "gone"):
        with pytest.raises(RunError, match="gone no longer exists"):
            move_to_trash(place, tmp_path)
    empty_trash(tmp_path)


def test_a_refused_rename_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, queue = made(tmp_path), Queue(tmp_path)
    queue.add(run, made(tmp_path, "two"))

    def refuse(source: object, target: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("lora_core.projects.workspace.os.rename", refuse)
    with pytest.raises(RunError, match="one cannot be moved to the trash: Permission denied"):
        move_to_trash(run.path, tmp_path)
    assert run.config_file.is_file()
    assert [job.run for job in queue.jobs()] == ["one", "two"]
    assert list_trash(tmp_path) == []
    assert list(trash_folder(tmp_path).iterdir()) == []


def test_a_queue_that_another_program_reads_costs_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue's file then refuses after the move, as on a drive with an error."""
    run, queue = made(tmp_path), Queue(tmp_path)
    queue.add(run)
    monkeypatch.setattr("lora_core.runs.queue.LOCK_TIMEOUT", 0.2)
    with contextlib.closing(sqlite3.connect(queue.file)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM jobs").fetchall()
        with pytest.raises(RunError, match="queue"):
            move_to_trash(run.path, tmp_path)
    assert run.config_file.is_file()
    assert [job.run for job in queue.jobs()] == ["one"]
    assert list_trash(tmp_path) == []
