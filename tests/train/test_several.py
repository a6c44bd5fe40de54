"""One run trained by several processes, real ones: as by one process, and none is left when it ends."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lora_core.runs import events
from lora_core.runs.events import read_events
from lora_core.runs.folder import RunFolder
from tests.train.runs import Toy, check_story, check_whole, notes, trained
from tests.train.together import BREAKS, CASES, STARVED, TRAINED
from tests.waiting import PATIENCE, wait_for
from tests.warm import program

ROOT = Path(__file__).parents[2]
CLOSE = 1e-5
"""The product's bar for the relative difference of gradients and adapters."""
"""Seconds in which all processes have to be gone, on a busy machine too; a launcher alone may take 5."""
ALONE = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def free_port() -> int:
    """None that the system gives out by itself, so that nobody takes it before it is bound."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as found:
            found.bind(("127.0.0.1", port))
            return port


def pair(*words: str, python: str = sys.executable) -> list[subprocess.Popen[str]]:
    """Two processes of a module with what a launcher tells them, without the seconds that it takes itself."""
    port = str(free_port())
    return [
        subprocess.Popen(
            [python, "-m", *words],
            env=os.environ
            | ALONE
            | {"RANK": str(n), "LOCAL_RANK": str(n), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        for n in range(2)
    ]


@pytest.fixture
def launched() -> Iterator[list[psutil.Process]]:
    """The processes of a test, which are ended after it."""
    started: list[psutil.Process] = []
    yield started
    for process in started:
        if process.is_running():
            process.kill()


def launch(launched: list[psutil.Process], *words: str) -> subprocess.Popen[str]:
    """Two processes of the command line by `accelerate launch`."""
    how = (
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--main_process_port",
        str(free_port()),
    )
    plain = ("--mixed_precision", "no", "--dynamo_backend", "no", "-m", "lora_core")
    command = [sys.executable, "-m", "accelerate.commands.launch", *how, *plain, *words]
    made = subprocess.Popen(
        command, env=os.environ | ALONE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    launched.append(psutil.Process(made.pid))
    return made


def main_process(run: RunFolder, step: int, started: psutil.Process) -> psutil.Process:
    """The process that trains the run, once it has done a step after `step`."""
    wait_for(lambda: not started.is_running() or (run.live_process() and run.progress().step > step))
    assert started.is_running()
    main = run.live_process()
    assert main is not None
    return main


def check_gone(made: subprocess.Popen[str], processes: list[psutil.Process]) -> str:
    """All processes end by themselves and soon; what one of them said."""
    said, _ = made.communicate(timeout=PATIENCE)
    _, alive = psutil.wait_procs(processes, PATIENCE)
    assert alive == []
    return said


@pytest.fixture(scope="module")
def numbers(shared_toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> tuple[Toy, Toy]:
    """Where two processes did all cases and runs, and where one did the runs alone, meanwhile."""
    pictures = shutil.copytree(shared_toy.pictures, tmp_path_factory.mktemp("pictures") / "set")
    Image.linear_gradient("L").resize((32, 32)).save(pictures / "0-masklabel.png")
    homes = [Toy(shared_toy.base, pictures, tmp_path_factory.mktemp(name)) for name in ("two", "one")]
    for name, changes in CASES.items():
        homes[0].run(name, **changes)
    homes[0].run(BREAKS)
    homes[0].run(STARVED)
    for home in homes:
        for name, changes in TRAINED.items():
            home.run(name, **changes)
    processes = pair("tests.train.together", str(homes[0].home), python=program("engine"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in TRAINED:
            trained(RunFolder(homes[1].home / "runs" / name))
        said = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    finally:
        torch.set_num_threads(threads)
        for process in processes:
            process.kill()
    assert (homes[0].home / "left-0").exists(), said
    return homes[0], homes[1]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("process", [0, 1])
def test_the_gradient_is_that_of_one_process(numbers: tuple[Toy, Toy], name: str, process: int) -> None:
    found = json.loads((numbers[0].home / f"found-{process}.json").read_text())[name]
    assert found["size"] > 0
    assert found["gradient"] < CLOSE
    assert found["losses"] < CLOSE


def of(toy: Toy, name: str) -> RunFolder:
    return RunFolder(toy.home / "runs" / name)


def test_sgd_comes_to_the_same_adapter(numbers: tuple[Toy, Toy]) -> None:
    two, one = (load_file(of(toy, "sgd").checkpoint(20) / "adapter.safetensors") for toy in numbers)
    assert two.keys() == one.keys()
    flat_two, flat_one = (torch.cat([found[key].flatten() for key in sorted(found)]) for found in (two, one))
    assert (flat_two - flat_one).norm() / flat_one.norm() < CLOSE
    ups = [key for key in one if "lora_up" in key]
    moved = torch.cat([one[key].flatten() for key in ups])
    # What was learned, apart from the start that both have.
    assert moved.norm() > 1e-3
    assert (torch.cat([two[key].flatten() for key in ups]) - moved).norm() / moved.norm() < CLOSE


def test_adamw_comes_to_the_same_gain_within_its_error(numbers: tuple[Toy, Toy]) -> None:
    two, one = (
        [e for e in read_events(of(toy, "adamw").events_file)[0] if isinstance(e, events.Validated)]
        for toy in numbers
    )
    assert [event.step for event in two] == [event.step for event in one] == [10, 20]
    for ours, theirs in zip(two, one, strict=True):
        assert abs(ours.gain - theirs.gain) < theirs.standard_error
    losses = [torch.tensor([loss.loss for loss in of(toy, "adamw").progress().losses]) for toy in numbers]
    assert torch.allclose(*losses, rtol=1e-3)


def test_a_run_by_two_has_one_story(numbers: tuple[Toy, Toy]) -> None:
    for name in TRAINED:
        run = of(numbers[0], name)
        assert run.status() == "done"
        assert notes(run) == notes(of(numbers[1], name))
        check_story(run)
        check_whole(run)


def test_all_processes_hold_the_same_bits_after_each_step(numbers: tuple[Toy, Toy]) -> None:
    for name in TRAINED:
        main, worker = ((numbers[0].home / f"{name}-{rank}.txt").read_text().split() for rank in (0, 1))
        assert main == worker
        assert len(set(main)) == 20


def test_an_error_of_the_main_process_lets_the_other_go(numbers: tuple[Toy, Toy]) -> None:
    assert of(numbers[0], BREAKS).status() == "failed"
    assert [(numbers[0].home / f"left-{number}").exists() for number in range(2)] == [True, True]


def test_want_of_memory_in_one_process_ends_the_run_in_a_sentence(numbers: tuple[Toy, Toy]) -> None:
    run = of(numbers[0], STARVED)
    assert run.status() == "failed"
    assert "The device of one of the processes ran out of memory" in run.progress().reason
    assert "train.gradient_checkpointing" in run.progress().reason
    assert run.progress().step == 2


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.slow
def test_a_killed_main_process_takes_all_along_and_the_run_goes_on(
    own_toy: Toy, launched: list[psutil.Process]
) -> None:
    settings = {"train.steps": 5000, "train.batch_size": 2, "train.resolution": 32, "adapter.rank": 2}
    words = [f"--set={key}={value}" for key, value in settings.items()]
    more = ("--set=validation.every=0", "--set=sample.every=0", "--set=save.every=4")
    place = ("--workspace", str(own_toy.home), "--name", "asked", "--base", str(own_toy.base))
    made = launch(launched, "train", str(own_toy.pictures), *place, *words, *more)
    run = RunFolder(own_toy.home / "runs" / "asked")
    main = main_process(run, 4, launched[0])
    workers = [process for process in launched[0].children() if "lora_core" in process.cmdline()]
    assert len(workers) == 2
    os.kill(main.pid, signal.SIGKILL)
    launched += workers
    said = check_gone(made, launched)
    assert "2 processes share each batch of 2." in said
    assert [path.name for path in (own_toy.home / "runs").iterdir()] == ["asked"]
    assert run.status() == "interrupted"
    check_whole(run)

    made = launch(launched, "resume", str(run.path))
    main_process(run, run.progress().step, launched[-1])
    launched += launched[-1].children()
    run.request("stop")
    said = check_gone(made, launched)
    assert made.returncode == 0, said
    assert run.status() == "stopped"
    check_whole(run)
    check_story(run)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.slow
def test_a_killed_process_ends_the_run_in_a_sentence(own_toy: Toy, launched: list[psutil.Process]) -> None:
    run = own_toy.run("long", train__steps=5000)
    processes = pair("lora_core", "resume", str(run.path))
    launched += [psutil.Process(process.pid) for process in processes]
    assert main_process(run, 4, launched[0]).pid == processes[0].pid
    processes[1].kill()
    said = check_gone(processes[0], launched)
    processes[1].communicate()
    assert run.status() == "failed"
    assert "Another process of this run ended" in run.progress().reason
    assert run.progress().reason in said
    assert "Traceback" not in said
    check_whole(run)


@pytest.mark.slow
def test_a_launcher_that_starts_one_of_several_is_named(tmp_path: Path) -> None:
    how = ("--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no")
    command = [sys.executable, "-m", "accelerate.commands.launch", *how, "--dynamo_backend", "no"]
    words = ("-m", "lora_core", "resume", str(tmp_path))
    said = subprocess.run(
        [*command, *words], capture_output=True, text=True, cwd=ROOT, env=os.environ | ALONE
    )
    assert "started one, as it does with --cpu" in said.stdout
    assert "is not a run" in said.stderr
