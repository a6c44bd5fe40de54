"""The queue through the real command line, with the real trainer on the embedded base."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from PIL import Image

from lora_core.__main__ import main
from lora_core.errors import ConfigError, RunError
from lora_core.model_files.header import read_header
from lora_core.model_files.starting_settings import preset
from lora_core.runs import events, folder
from lora_core.runs.diagnosis import write_recipient
from lora_core.runs.events import EventWriter, read_events
from lora_core.runs.folder import RunFolder, runs_folder
from lora_core.runs.queue import Queue, sweep_configs
from lora_core.settings.config import RunConfig
from tests.waiting import PATIENCE, wait_for
from tests.warm import program

ROOT = Path(__file__).resolve().parents[2]
FEW = {
    "train.steps": 3, "train.resolution": 64, "train.batch_size": 1, "adapter.rank": 2, "adapter.alpha": 2.0,
    "sample.every": 0, "validation.pictures": 0.0, "save.every": 1, "optimizer.text_encoder_lr": 0.0,
}  # fmt: skip


@pytest.fixture
def home(tmp_path: Path) -> Path:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(2):
        Image.new("RGB", (64, 64), (90 * number, 0, 0)).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(f"square number {number}", encoding="utf-8")
    return tmp_path / "home ü"


def made(home: Path, name: str, **changes: object) -> RunFolder:
    pictures = home.parent / "pictures"
    settings = preset("demo") | FEW | {"name": name, "dataset.path": str(pictures)}
    config = RunConfig().changed(settings | {k.replace("__", "."): v for k, v in changes.items()})
    return RunFolder.create(runs_folder(home) / name, config)


def said(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def test_words_about_the_queue(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--workspace", home)
    assert "The queue is empty" in said(capsys, "queue", "list", *where)
    for name in ("a", "b", "c"):
        made(home, name)
    # By its folder, which says the workspace too, and by its name.
    assert "a waits in the queue" in said(capsys, "queue", "add", runs_folder(home) / "a")
    said(capsys, "queue", "add", "b", *where)
    said(capsys, "queue", "add", "c", *where)
    said(capsys, "queue", "move", "c", 1, *where)
    said(capsys, "queue", "remove", "a", *where)
    rows = json.loads(said(capsys, "queue", "list", "--json", *where))
    assert rows == [
        {"position": position, "name": name, "path": str(runs_folder(home) / name), "state": "waiting",
         "step": 0, "steps": None, "reason": ""}
        for position, name in ((1, "c"), (2, "b"))
    ]  # fmt: skip
    listed = said(capsys, "queue", "list", *where)
    assert [line.split()[:3] for line in listed.splitlines()[:2]] == [
        ["1.", "c", "waiting"],
        ["2.", "b", "waiting"],
    ]
    assert "The queue is not running" in listed
    # A job whose folder is gone can still be taken out.
    (runs_folder(home) / "b").rename(home / "b")
    said(capsys, "queue", "remove", "b", *where)
    assert RunFolder.open(runs_folder(home) / "c").status() == "queued"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["add", "nobody"], "nobody is not a run"),
        (["add", "/"], "/ is not a run"),
        (["move", "a", "1"], "The run a is not in the queue."),
        (["remove", "a"], "The run a is not in the queue."),
    ],
)
def test_what_goes_wrong(
    home: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    made(home, "a")
    capsys.readouterr()
    assert main(["queue", *words, "--workspace", str(home)]) == 1
    assert capsys.readouterr().err.startswith(sentence)


@pytest.mark.parametrize("words", [[], ["fly"], ["add"], ["move", "a"], ["move", "a", "first"], ["run", "a"]])
def test_wrong_usage(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["queue", *words])
    assert ended.value.code == 2


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_three_jobs_one_fails_one_is_killed(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["broken", "killed", "last"]
    for name in names:
        made(home, name, **({"dataset__path": str(home / "gone")} if name == "broken" else {}))
    told = home / "told"
    script = home / "tell.py"
    script.write_text(
        "import os; v = os.environ\n"
        f"open({str(told)!r}, 'a').write(v['LORA_EASEL_RUN'] + ' ' + v['LORA_EASEL_STATUS'] + '\\n')"
    )
    write_recipient(home, f'"{sys.executable}" "{script}"')
    # Time to be killed in.
    killed = made_longer(home, "killed")
    for name in names:
        said(capsys, "queue", "add", name, "--workspace", home)
    command = [program("engine"), "-m", "lora_core", "queue", "run", "--workspace", str(home)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        wait_for(lambda: len(killed.checkpoint_steps()) > 0 and killed.live_process(), process)
        trainer = killed.live_process()
        assert trainer is not None
        os.kill(trainer.pid, signal.SIGKILL)
        out, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1
    assert errors == "1 of 3 jobs failed: broken; `lora-easel queue list` says why.\n"
    jobs = Queue(home).jobs()
    assert [(job.run, job.state) for job in jobs] == [
        ("broken", "failed"),
        ("killed", "done"),
        ("last", "done"),
    ]
    assert jobs[0].reason.startswith(f"The dataset {home / 'gone'} does not exist; give a folder")
    starts = [line.removesuffix(": started") for line in out.splitlines() if line.endswith(": started")]
    assert starts == ["broken", "killed", "killed", "last"]
    began = []
    for name in names:
        run = RunFolder.open(runs_folder(home) / name)
        story = read_events(run.events_file)[0]
        began.append(story[0].time)
        if name == "broken":
            assert run.status() == "failed"
            continue
        assert run.status() == "done"
        assert read_header(run.exports / f"{name}.safetensors").tensors
        kinds = [event.kind for event in story]
        assert ("Resumed" in kinds) == (name == "killed")
        steps = [event.step for event in story if isinstance(event, events.StepDone)]
        assert sorted(set(steps)) == list(range(1, run.config().train.steps + 1))
    assert began == sorted(began)
    # Each end is told once; that it was killed and goes on is no end.
    assert told.read_text().splitlines() == [
        "broken failed",
        "killed done",
        "last done",
    ]
    left = [
        p.info["cmdline"] for p in psutil.process_iter(["cmdline"]) if str(home) in str(p.info["cmdline"])
    ]
    assert left == []


def test_a_sweep_queues_copies_of_a_run(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ("--workspace", home)
    made(home, "a")
    assert "a-rank-4 waits in the queue" in said(capsys, "queue", "sweep", "a", "adapter.rank", 4, 8, *where)
    assert [job.run for job in Queue(home).jobs()] == ["a-rank-4", "a-rank-8"]
    config = Queue(home).run("a-rank-8").config()
    assert (config.name, config.adapter.rank, config.train.steps) == ("a-rank-8", 8, 3)
    assert main(["queue", "sweep", "a", "adapter.rank", "2", "0", *map(str, where)]) != 0
    assert main(["queue", "sweep", "a", "name", "b", *map(str, where)]) != 0
    assert main(["queue", "sweep", "a", "adapter.rank", *map(str, range(1, 102)), *map(str, where)]) != 0
    assert len(Queue(home).jobs()) == 2
    # A library gives numbers; what is the same run twice is queued once.
    found = sweep_configs(config, "optimizer.text_encoder_lr", [0, 1e-4, "0.0001"], runs_folder(home))
    assert [one.optimizer.text_encoder_lr for one in found] == [0, 1e-4]
    grid = ["queue", "sweep", "a", "adapter.rank", "2", "3", "--by", "optimizer.lr=1e-4,3e-4", "--seeds", "2"]
    assert main([*grid, *map(str, where)]) == 0
    names = [job.run for job in Queue(home).jobs()][2:]
    assert len(names) == 8
    assert names[:2] == ["a-rank-2-lr-1e-4-seed-0", "a-rank-2-lr-1e-4-seed-1"]
    assert Queue(home).run("a-rank-3-lr-3e-4-seed-1").config().optimizer.lr == 3e-4
    # What was queued last is compared, what one of a sweep names, or several runs.
    for words, rows in (((), 4), (("a-rank-4",), 2), (names[:3], 2)):
        found = json.loads(said(capsys, "queue", "results", *words, *where, "--json"))
        assert len(found["rows"]) == rows
        assert "nothing to compare yet" in found["sentence"]
    for wrong, words in (
        (["--by", "adapter.rank=4"], "adapter.rank is given twice"),
        (["--by", "optimizer.lr=x"], "optimizer.lr = 'x' should be a number"),
        (["--by", "optimizer.lr="], "Give at least one value"),
        (["--seeds", "0"], "--seeds 0 is out of range"),
        (["--seeds", "60"], "120 runs are too many"),
    ):
        assert main([*grid[:6], *wrong, *map(str, where)]) == 1
        assert words in capsys.readouterr().err
    # A sweep of which nothing is left is as if it had never been.
    for name in names:
        shutil.rmtree(runs_folder(home) / name)
    assert len(json.loads(said(capsys, "queue", "results", *where, "--json"))["rows"]) == 2
    epochs = config.changed({"train.epochs": 2})
    with pytest.raises(ConfigError, match=r"train\.steps follows from train\.epochs"):
        sweep_configs(epochs, "train.steps", [10, 20], runs_folder(home))
    assert len(sweep_configs(epochs, "train.epochs", [1, 3], runs_folder(home))) == 2
    # The queue may be run from another folder.
    (home / "other").mkdir()
    Image.new("RGB", (64, 64)).save(home / "other" / "a.png")
    monkeypatch.chdir(home)
    assert main(["queue", "sweep", "a", "dataset.path", "other", *map(str, where)]) == 0
    assert Queue(home).run("a-path-other").config().dataset.path == str(home / "other")


def test_a_disk_that_fills_midway_leaves_no_run_of_a_sweep(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made(home, "a")
    sweep = ["queue", "sweep", "a", "seed", "1", "2", "3", "--workspace", str(home)]
    whole, count = folder.write_atomically, 0

    def full(path: Path, data: bytes) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        whole(path, data)

    monkeypatch.setattr(folder, "write_atomically", full)
    assert main(sweep) == 1
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.setattr(folder, "write_atomically", whole)

    def refuse(self: Queue, *runs: RunFolder) -> None:
        raise RunError("The queue cannot be written: disk is full.")

    monkeypatch.setattr(Queue, "add", refuse)
    assert main(sweep) == 1
    assert "disk is full" in capsys.readouterr().err
    assert [path.name for path in runs_folder(home).iterdir()] == ["a"]
    assert Queue(home).jobs() == []


def made_longer(home: Path, name: str) -> RunFolder:
    run = RunFolder(runs_folder(home) / name)
    text = run.config_file.read_text(encoding="utf-8")
    run.config_file.write_text(text.replace("steps = 3\n", "steps = 30\n"), encoding="utf-8")
    assert run.config().train.steps == 30
    return run


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_run_that_broke_off_says_why(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made(home, "alone")
    writer = EventWriter(run.events_file)
    writer.write(events.Started(steps=3, pid=1, device="cpu", threads=1, versions={}))
    writer.write(events.StepDone(step=2, loss=1.0, lr=1.0, seconds=0.1))
    writer.close()
    (row,) = json.loads(said(capsys, "runs", "--json", "--workspace", home))
    assert (row["status"], row["step"]) == ("interrupted", 2)
    assert row["reason"] == "Its process ended at step 2 without saying why."
