"""The run folder: what others may read from it at any moment, and that its status is derived rightly."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lora_core.errors import RunError
from lora_core.runs import events
from lora_core.runs.events import EventWriter
from lora_core.runs.folder import RunFolder, all_runs, check_run_name, find_run
from lora_core.settings.config import RunConfig

STARTED = events.Started(steps=10, pid=1, device="cpu", threads=2, versions={})
STEP = events.StepDone(step=1, loss=1.0, lr=1e-4, seconds=0.1)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "runs" / "first", RunConfig().changed({"adapter.rank": 4}))


def write(run: RunFolder, *new: events.Event) -> None:
    writer = EventWriter(run.events_file)
    for event in new:
        writer.write(event)
    writer.close()


def name_as_trainer(run: RunFolder, pid: int, started: float) -> None:
    run.process_file.write_text(json.dumps({"pid": pid, "started": started}))


def dead_pid() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_a_new_run_holds_its_whole_config(run: RunFolder) -> None:
    assert run.config() == RunConfig().changed({"adapter.rank": 4})
    assert RunFolder.open(run.path) == run
    assert {path.name for path in run.path.iterdir()} == {"config.toml", "checkpoints", "previews", "export"}


def test_a_moved_workspace_takes_the_images_of_its_projects_along(tmp_path: Path) -> None:
    before, now = tmp_path / "before", tmp_path / "now"
    paths = [f"{before}/projects/cats/pictures/sub", f"{before}/projects/dogs", "/projects/\0", "demo"]
    runs = [
        RunFolder.create(before / "runs" / f"{number}", RunConfig().changed({"dataset.path": path}))
        for number, path in enumerate(paths)
    ]
    (before / "projects" / "cats" / "pictures" / "sub").mkdir(parents=True)
    assert [run.config().dataset.path for run in runs] == paths
    before.rename(now)
    moved = [RunFolder(now / "runs" / run.name).config().dataset.path for run in runs]
    assert moved == [str(now / "projects" / "cats" / "pictures" / "sub"), *paths[1:]]


def test_a_name_is_given_once(run: RunFolder) -> None:
    with pytest.raises(RunError, match=r"already exists.*resume"):
        RunFolder.create(run.path, RunConfig())
    assert run.config().adapter.rank == 4


def test_a_run_that_goes_while_the_folder_is_listed(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    (run.path.parent / "gone").mkdir()
    monkeypatch.setattr("lora_core.runs.folder.is_run_folder", Path.is_dir)
    assert run in all_runs(run.path.parent.parent)


def test_a_run_that_is_being_made_is_not_listed(tmp_path: Path) -> None:
    making = tmp_path / "runs" / ".first.0.making"
    making.mkdir(parents=True)
    (making / "config.toml").write_text("")
    assert all_runs(tmp_path) == []


def test_a_folder_without_a_config_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no config\.toml"):
        RunFolder.open(tmp_path)


def test_a_file_in_the_way_is_told(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(RunError, match="cannot be made"):
        RunFolder.create(tmp_path / "runs" / "first", RunConfig())


@pytest.mark.parametrize(
    ("story", "dead", "live"),
    [
        ([], "queued", "preparing"),
        ([STARTED], "interrupted", "preparing"),
        ([STARTED, events.Preparing(phase="Reading", done=0, total=1)], "interrupted", "preparing"),
        ([STARTED, STEP], "interrupted", "running"),
        ([STARTED, STEP, events.Paused(step=1)], "paused", "running"),
        ([STARTED, STEP, events.Paused(step=1), STARTED], "interrupted", "preparing"),
        ([STARTED, STEP, events.Stopped(step=1, export="export/a")], "stopped", "running"),
        ([STARTED, STEP, events.Finished(step=1, export="export/a")], "done", "running"),
        ([STARTED, events.Failed(reason="No images.")], "failed", "preparing"),
        ([events.Failed(reason="No images.")], "failed", "preparing"),
    ],
)
def test_status(run: RunFolder, story: list[events.Event], dead: str, live: str) -> None:
    write(run, *story)
    assert run.status() == dead
    name_as_trainer(run, dead_pid(), 1.0)
    assert run.status() == dead
    with run.hold():
        assert run.status() == live
    assert run.status() == dead


def test_a_reused_pid_is_not_the_trainer(run: RunFolder) -> None:
    write(run, STARTED, STEP)
    me = psutil.Process()
    name_as_trainer(run, me.pid, me.create_time() - 100.0)
    assert run.live_process() is None
    assert run.status() == "interrupted"
    name_as_trainer(run, me.pid, me.create_time())
    assert run.live_process() == me
    assert run.status() == "running"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"pid": "x", "started": 1}', '{"pid": 1}'])
def test_a_broken_process_file_names_nobody(run: RunFolder, text: str) -> None:
    run.process_file.write_text(text)
    assert run.live_process() is None


@pytest.mark.skipif(os.name == "nt", reason="Windows has no zombies")
def test_a_killed_trainer_that_nobody_waited_for_is_dead(run: RunFolder) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    name_as_trainer(run, child.pid, psutil.Process(child.pid).create_time())
    assert run.live_process() is not None
    os.kill(child.pid, 9)
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert run.live_process() is None
    child.wait()


def test_one_trainer_at_a_time(run: RunFolder) -> None:
    code = (
        "import sys; from pathlib import Path; from lora_core.runs.folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).hold(): pass"
    )
    with run.hold():
        done = subprocess.run(
            [sys.executable, "-c", code, str(run.path)], capture_output=True, text=True, check=False
        )
    assert "is being trained by another process" in done.stderr
    assert not run.process_file.exists()
    assert subprocess.run([sys.executable, "-c", code, str(run.path)], check=False).returncode == 0


def test_requests_come_in_order_and_resume_voids_those_before(run: RunFolder) -> None:
    assert run.requests() == []
    first = run.request("save")
    second = run.request("stop")
    assert run.requests() == [{"id": first, "action": "save"}, {"id": second, "action": "stop"}]
    run.request("resume")
    assert run.requests() == []
    third = run.request("pause")
    assert run.requests() == [{"id": third, "action": "pause"}]


def test_what_is_no_request_is_refused(run: RunFolder) -> None:
    with pytest.raises(RunError, match="'explode' is not a request; choose one of stop, pause"):
        run.request("explode")
    assert not run.requests_file.exists()


def test_a_request_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be written"):
        RunFolder(tmp_path / "gone").request("stop")


def test_broken_and_half_requests_are_passed_over(run: RunFolder) -> None:
    kept = run.request("save")
    with open(run.requests_file, "ab") as file:
        file.write(
            b'\n[]\n{"action": "stop"}\n{"id": 1, "action": "explode"}\n\xff\n{"id": "x", "action": "st'
        )
    assert run.requests() == [{"id": kept, "action": "save"}]


def test_requests_of_an_earlier_version_are_read(run: RunFolder) -> None:
    run.requests_file.write_bytes(
        b'{"id": "a", "do": "save"}\n{"id": "b", "do": "resume"}\n{"id": "c", "do": "pause"}\n'
    )
    later = run.request("stop")
    assert run.requests() == [{"id": "c", "action": "pause"}, {"id": later, "action": "stop"}]


def test_a_request_that_a_full_drive_took_half_of_spoils_none_after_it(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a drive takes a piece without an error; the next piece is refused."""
    real, pieces = os.write, []

    def write(handle: int, data: bytes) -> int:
        pieces.append(data)
        if len(pieces) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle, data[: len(data) // 2])

    with monkeypatch.context() as patch:
        patch.setattr("os.write", write)
        with pytest.raises(RunError, match=r"requests\.jsonl: No space left"):
            run.request("stop")
    assert run.requests() == []
    asked = run.request("pause")
    assert run.requests() == [{"id": asked, "action": "pause"}]


def test_requests_of_many_processes_stay_whole(run: RunFolder) -> None:
    code = (
        "import sys; from pathlib import Path; from lora_core.runs.folder import RunFolder\n"
        "run = RunFolder(Path(sys.argv[1]))\n"
        "for _ in range(200): run.request(sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(run.path)]
    children = [subprocess.Popen([*command, do]) for do in ("stop", "pause", "save", "preview")]
    assert [child.wait() for child in children] == [0, 0, 0, 0]
    found = run.requests()
    assert len(found) == 800
    assert len({request["id"] for request in found}) == 800


def test_only_whole_checkpoints_count(run: RunFolder) -> None:
    for step in (100, 20):
        run.checkpoint(step).mkdir()
        (run.checkpoint(step) / "adapter.safetensors").write_bytes(b"")
    run.checkpoint(300).mkdir()
    half = run.checkpoints / ".step-000400.tmp"
    half.mkdir()
    (half / "adapter.safetensors").write_bytes(b"")
    assert run.checkpoint_steps() == [20, 100]
    assert run.checkpoint(20).name == "step-000020"


def test_the_summary_has_the_keys_that_scripts_rely_on(run: RunFolder) -> None:
    write(run, STARTED, STEP, events.Failed(reason="The disk is full."))
    assert run.summary() == {
        "name": "first",
        "path": str(run.path),
        "status": "failed",
        "step": 1,
        "steps": 10,
        "loss": 1.0,
        "best_step": None,
        "reason": "The disk is full.",
    }


def test_runs_are_listed_newest_first_and_nothing_else_is(tmp_path: Path) -> None:
    assert all_runs(tmp_path) == []
    for age, name in enumerate(("new", "middle", "old")):
        made = RunFolder.create(tmp_path / "runs" / name, RunConfig())
        os.utime(made.config_file, (1000.0 - age, 1000.0 - age))
    (tmp_path / "runs" / "no run").mkdir()
    (tmp_path / "runs" / "file.txt").write_text("")
    assert [found.name for found in all_runs(tmp_path)] == ["new", "middle", "old"]


@pytest.mark.parametrize("name", ["first", "Größe 2 (neu)", "2026-11-24 demo", "a.b_c-d", "木"])
def test_names_that_every_file_system_takes(name: str) -> None:
    assert check_run_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        ".",
        "..",
        "a/b",
        "a\\b",
        "../a",
        "a:b",
        "a*",
        "a\nb",
        " a",
        "a ",
        "a.",
        "-a",
        "x" * 101,
        "CON",
        "nul",
        "com1.x",
        "LPT9",
        "com\N{SUPERSCRIPT ONE}",
    ],
)
def test_names_that_some_file_system_refuses(name: str) -> None:
    with pytest.raises(RunError, match="cannot be a folder's"):
        check_run_name(name)


@pytest.mark.parametrize(
    ("story", "free"),
    [
        ([STARTED, events.Failed(reason="No images.")], True),
        ([STARTED, STEP, events.Failed(step=1, reason="The disk is full.")], False),
        ([STARTED], False),
        ([STARTED, events.Stopped(export="")], False),
    ],
)
def test_a_run_that_failed_before_its_first_step_gives_its_name_back(
    run: RunFolder, story: list[events.Event], free: bool
) -> None:
    write(run, *story)
    if free:
        again = RunFolder.create(run.path, RunConfig().changed({"adapter.rank": 8}))
        assert again.config().adapter.rank == 8
        assert again.status() == "queued"
        assert not run.events_file.exists()
    else:
        with pytest.raises(RunError, match="resume"):
            RunFolder.create(run.path, RunConfig())
        assert run.config().adapter.rank == 4
    assert [path.name for path in run.path.parent.iterdir()] == ["first"]


def test_a_run_is_found_by_path_or_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = RunFolder.create(tmp_path / "home" / "runs" / "first", RunConfig())
    assert find_run("first", tmp_path / "home") == named
    monkeypatch.setenv("LORA_EASEL_HOME", str(tmp_path / "home"))
    assert find_run("first") == find_run("first/") == find_run(named.path) == named
    # A folder of that name that is no run is passed over; one that is a run comes first.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "first").mkdir()
    assert find_run("first") == named
    (tmp_path / "first").rmdir()
    here = RunFolder.create(tmp_path / "first", RunConfig())
    assert find_run("first") == here


@pytest.mark.parametrize("name", ["nobody", "", "/", "../first", "x" * 5000, "runs/first", "."])
def test_what_is_neither_says_where_it_was_looked_for(name: str, tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "runs" / "first", RunConfig())
    with pytest.raises(RunError, match="is not a run") as caught:
        find_run(name, tmp_path)
    assert str(tmp_path / "runs") in str(caught.value)


def test_a_folder_of_an_earlier_version_names_what_is_no_longer_used(run: RunFolder) -> None:
    assert run.retired_settings() == []
    text = run.config_file.read_text(encoding="utf-8")
    run.config_file.write_text(text.replace("[dataset]", "[dataset]\nrepeats = 10"), encoding="utf-8")
    assert run.config().adapter.rank == 4
    (sentence,) = run.retired_settings()
    assert sentence.startswith("dataset.repeats = 10 cannot be used: it changes nothing that is learned")
    assert sentence.endswith("The run continues as with 1.")
