"""The client of the warm worker, against a small program that speaks its language."""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app import worker_client
from app.preview.history import GridState
from app.preview.render_queue import PreviewState, RenderQueue
from app.preview.sent_form import STRIP
from app.state import AppState, MemoryYieldPolicy
from app.worker_client import WorkerClient
from lora_core.generate.grid import make_axis, vary
from lora_core.generate.request import GenerationRequest, WeightedLora
from lora_core.runs.events import to_line
from lora_core.system.hardware import Card
from lora_core.system.processes import detached
from tests.app.runs import come_alive, make_run, started, step
from tests.waiting import PATIENCE, wait_for

FAKE = """
import json, os, pathlib, queue, sys, threading
print("a library says hello", flush=True)
print(json.dumps({"event": "ready", "device": os.environ.get("DEVICE", "")}), flush=True)
dropped, asks = set(), queue.Queue()
def read():
    for line in sys.stdin:
        asked = json.loads(line)
        dropped.add(asked["target"]) if asked["do"] == "cancel" else asks.put(asked)
    asks.put({"do": "quit", "id": ""})
threading.Thread(target=read, daemon=True).start()
count = 0
while True:
    asked = asks.get()
    say = lambda **more: print(json.dumps({"id": asked["id"], **more}), flush=True)
    while pathlib.Path(sys.argv[0]).with_name("hold").exists():
        threading.Event().wait(0.01)
    if asked["do"] == "quit":
        break
    if asked["do"] == "die":
        print("the memory is full", file=sys.stderr, flush=True)
        sys.exit(7)
    if asked["do"] == "inspect" or asked.get("prompt") == "bad":
        say(event="error", message="It cannot be read.")
        continue
    if asked["do"] == "sheet":
        pathlib.Path(asked["out"]).write_text(json.dumps(asked))
        say(event="done", files=[asked["out"]])
        continue
    while asked.get("prompt") == "slow" and asked["id"] not in dropped:
        threading.Event().wait(0.01)
    while asked.get("until") and not pathlib.Path(asked["until"]).exists():
        say(event="progress", done=1, total=20)
        threading.Event().wait(0.01)
    if asked["id"] in dropped:
        say(event="error", message="Cancelled.")
        continue
    if asked.get("look"):
        say(event="look", image="anBlZw==")
    files = []
    for index, strength in enumerate(asked.get("strengths", [1.0]) if asked["do"] == "generate" else []):
        say(event="progress", done=index, total=1)
        count += 1
        pathlib.Path(asked["out"]).mkdir(parents=True, exist_ok=True)
        name = asked["out"] + f"/{count}.png"
        open(name, "wb").close()
        files.append(name)
        say(event="picture", index=index, strength=strength, file=name)
    say(event="done", files=files, seconds=0.1)
"""


@pytest.fixture
def worker(tmp_path: Path):
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    made = WorkerClient([sys.executable, str(script)], {}, tmp_path / "logs" / "worker.txt")
    yield made
    made.close()


def test_an_answer_and_an_error(worker: WorkerClient, tmp_path: Path) -> None:
    reply = worker.ask({"do": "generate", "strengths": [0.0, 1.0], "out": str(tmp_path)}, timeout=PATIENCE)
    assert (reply.state, len(reply.images), reply.result["seconds"]) == ("done", 2, 0.1)
    assert worker.ask({"do": "inspect"}, timeout=PATIENCE).message == "It cannot be read."


def test_a_worker_that_dies_is_reported_and_started_again(worker: WorkerClient, tmp_path: Path) -> None:
    reply = worker.ask({"do": "die"}, timeout=PATIENCE)
    assert reply.state == "error"
    assert "code 7" in reply.message
    assert "the memory is full" in reply.message
    again = worker.ask({"do": "generate", "strengths": [1.0], "out": str(tmp_path)}, timeout=PATIENCE)
    assert again.state == "done"


def test_a_worker_that_cannot_start_is_a_sentence(tmp_path: Path) -> None:
    worker = WorkerClient([str(tmp_path / "missing")], {}, tmp_path / "log.txt")
    assert "The worker process ended" in worker.ask({"do": "warm"}, timeout=PATIENCE).message


def shot(prompt: str = "a cat", *strengths: float) -> GenerationRequest:
    return GenerationRequest(
        prompt=prompt, loras=tuple(WeightedLora(f"{n}.safetensors", s) for n, s in enumerate(strengths))
    )


@pytest.fixture
def render_queue(worker: WorkerClient, tmp_path: Path) -> RenderQueue:
    return RenderQueue(worker, lambda: tmp_path / "projects" / "x" / "generated")


def settled(render_queue: RenderQueue) -> PreviewState:
    wait_for(lambda: not render_queue.view().working)
    return render_queue.view()


def test_a_shot_is_drawn_then_the_base_then_the_strip(render_queue: RenderQueue) -> None:
    render_queue.want(shot("a cat", 0.8), STRIP)
    assert render_queue.view().state == "working"
    view = settled(render_queue)
    assert {one.loras[0].strength if one.loras else 0.0 for one in view.images} == {0.8, *STRIP}
    # The strip holds it already, so that nothing is drawn again.
    render_queue.want(shot("a cat", 0.5))
    assert render_queue.view().state == "idle"


def test_strength_zero_is_the_base_s_own_picture(render_queue: RenderQueue) -> None:
    render_queue.want(shot("a cat", 1.0), (0.0, 1.0))
    view = settled(render_queue)
    assert view.shot is not None
    assert view.image(vary(view.shot, "strength", 0.0)) == view.image(view.shot.alone())
    assert len(set(view.images.values())) == 2


def test_without_a_lora_the_base_alone_is_drawn(render_queue: RenderQueue) -> None:
    render_queue.want(shot("a cat"), STRIP)
    assert set(settled(render_queue).images) == {shot("a cat")}


def test_an_error_stays_until_something_else_is_wanted(render_queue: RenderQueue) -> None:
    render_queue.want(shot("bad", 1.0), ())
    wait_for(lambda: render_queue.view().state == "error")
    assert render_queue.view().message == "It cannot be read."
    render_queue.want(shot("good", 1.0), ())
    wait_for(lambda: render_queue.view().state == "idle")
    assert [one.shot.prompt for one in render_queue.history.newest()] == ["good"]


def test_a_grid_is_filled_cell_by_cell_and_put_together(render_queue: RenderQueue) -> None:
    grid = GridState.of(shot("a cat", 0.8), make_axis("seed", [1, 2]), make_axis("strength", [0, 0.5, 1]))
    render_queue.draw_grid(grid)
    view = settled(render_queue)
    assert view.grid is not None
    assert view.grid.sheet is not None
    assert len(view.images) == 6
    kept = render_queue.history.newest()[0]
    assert (kept.file, kept.rows, kept.is_sheet) == (view.grid.sheet, make_axis("seed", [1, 2]), True)
    asked = json.loads((view.grid.sheet).read_text())
    assert asked["rows"] == ["seed 1", "seed 2"]
    assert [[Path(c).is_file() for c in row] for row in asked["cells"]] == [[True] * 3] * 2


def test_a_file_that_is_written_anew_waits_for_the_next_wish(
    render_queue: RenderQueue, tmp_path: Path
) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"one")
    wanted = GenerationRequest(prompt="a cat", loras=(WeightedLora(str(file), 1.0),))
    render_queue.want(wanted, ())
    first = settled(render_queue).images
    # An export writes the file once more; nobody asked for another picture by that.
    file.write_bytes(b"two")
    os.utime(file, ns=(1, 1))
    assert (render_queue.view().state, render_queue.view().images) == ("idle", first)
    (tmp_path / "hold").touch()
    render_queue.want(wanted)
    assert render_queue.view().state == "working"
    (tmp_path / "hold").unlink()
    again = settled(render_queue).images
    assert (again[wanted.alone()], again[wanted.acting()] == first[wanted.acting()]) == (
        first[wanted.alone()],
        False,
    )


def test_another_project_draws_its_own(worker: WorkerClient, tmp_path: Path) -> None:
    """The history and the trash of a project hold what was drawn in it, so no picture serves two."""
    here = tmp_path / "one"
    render_queue = RenderQueue(worker, lambda: here)
    render_queue.want(shot("a cat", 0.8))
    first = settled(render_queue).images
    assert first
    here = tmp_path / "two"
    render_queue.clear()
    assert render_queue.view().shot is None
    render_queue.want(shot("a cat", 0.8))
    second = settled(render_queue).images
    assert first.keys() == second.keys()
    assert all(path.is_relative_to(tmp_path / "two") for path in second.values())


def test_a_grid_that_fails_says_so_and_stops(render_queue: RenderQueue) -> None:
    render_queue.draw_grid(GridState.of(shot("bad", 1.0), None, make_axis("seed", [1, 2])))
    wait_for(lambda: bool(render_queue.view().grid and render_queue.view().grid.problem))
    assert render_queue.view().grid.problem == "It cannot be read."
    assert not render_queue.view().working


def test_cancelling_stops_picture_strip_and_grid(render_queue: RenderQueue) -> None:
    render_queue.want(shot("slow", 1.0), STRIP)
    render_queue.draw_grid(GridState.of(shot("slow", 1.0), None, make_axis("seed", [1, 2])))
    wait_for(lambda: render_queue.view().drawing is not None)
    render_queue.cancel()
    view = settled(render_queue)
    assert (view.state, view.message) == ("idle", "Cancelled.")
    assert view.grid is not None
    assert view.grid.problem == "Cancelled."
    render_queue.want(shot("quick", 1.0), ())
    assert settled(render_queue).state == "idle"


def test_who_waits_is_told_how_long(worker: WorkerClient, tmp_path: Path) -> None:
    first = worker.submit({"do": "generate", "prompt": "slow", "strengths": [1], "out": str(tmp_path)})
    second = worker.submit({"do": "generate", "strengths": [1], "out": str(tmp_path)})
    third = worker.submit({"do": "generate", "strengths": [1], "out": str(tmp_path)})
    wait_for(lambda: first.state == "working")
    assert worker.describe(second) == "Waiting: 1 request before this one."
    assert worker.describe(third) == "Waiting: 2 requests before this one."
    worker.cancel(third)
    worker.cancel(first)
    assert second.finished.wait(PATIENCE)
    assert third.finished.wait(PATIENCE)
    assert (first.message, second.state, third.message) == ("Cancelled.", "done", "Cancelled.")
    assert worker.describe(second) == ""


def test_looks_are_kept_while_a_picture_is_made(worker: WorkerClient, tmp_path: Path) -> None:
    reply = worker.ask(
        {"do": "generate", "strengths": [1], "look": True, "out": str(tmp_path)}, timeout=PATIENCE
    )
    assert (reply.look, reply.looks) == (b"jpeg", 1)


def test_memory_is_given_back_when_a_run_begins_and_after_a_rest() -> None:
    live = ""
    gives = MemoryYieldPolicy(lambda: live, rest=60)
    assert not gives(1000)
    live = "a run"
    assert gives(5)
    assert not gives(10)
    assert gives(61)
    live = "another"
    assert gives(1)


def test_a_worker_with_memory_looks_around_for_a_run(
    worker: WorkerClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.worker_client.LOOK_AROUND_EVERY", 0.05)
    asked: list[float] = []
    worker.is_needed_elsewhere = lambda idle: bool(asked.append(idle)) or len(asked) == 2
    worker.ask({"do": "warm"}, timeout=PATIENCE)
    time.sleep(0.3)
    assert asked == [], "nothing is held"
    worker.ask({"do": "generate", "strengths": [1], "out": str(tmp_path)}, timeout=PATIENCE)
    wait_for(lambda: len(asked) == 2)
    time.sleep(0.3)
    assert len(asked) == 2, "it was released, so nobody looks any more"


@pytest.fixture
def on_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerClient]:
    monkeypatch.setattr("app.worker_client.LOOK_AROUND_EVERY", 0.05)
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    made = WorkerClient([sys.executable, str(script)], {"DEVICE": "cuda"}, tmp_path / "logs" / "worker.txt")
    yield made
    made.close()


def test_on_a_card_the_process_ends_for_a_run_and_what_it_drew_is_drawn_after_it(
    on_card: WorkerClient, tmp_path: Path
) -> None:
    run, go = "", tmp_path / "go"
    on_card.is_needed_elsewhere = MemoryYieldPolicy(lambda: run)
    on_card.in_the_way = lambda request: f"Waiting for {run}." if run else ""
    picture = {"do": "generate", "strengths": [1], "out": str(tmp_path)}
    reply = on_card.submit({**picture, "until": str(go)})
    wait_for(lambda: reply.done)
    process = on_card._process
    assert process is not None
    # A run that another program starts is noticed between two steps of the sampler.
    run = "a run"
    wait_for(lambda: process.poll() is not None)
    wait_for(lambda: reply.message == "Waiting for a run.")
    assert (reply.state, reply.done, on_card.describe(reply)) == ("waiting", 0, reply.message)
    # What opens no base goes on, in a new process.
    assert on_card.ask({"do": "sheet", "out": str(tmp_path / "a.png")}, PATIENCE).state == "done"
    assert reply.state == "waiting"
    assert on_card._process is not process
    go.touch()
    run = ""
    assert reply.finished.wait(PATIENCE)
    assert (reply.state, len(reply.images)) == ("done", 1)


def test_what_is_asked_while_the_process_is_ended_is_drawn_by_the_next(
    on_card: WorkerClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = {"do": "generate", "strengths": [1], "out": str(tmp_path)}
    on_card.ask(picture, PATIENCE)
    asked, kill = [], worker_client._kill

    def slow_kill(process: Any) -> None:
        asked.append(on_card.submit(picture))
        asked[0].finished.wait(0.2)
        kill(process)

    monkeypatch.setattr(worker_client, "_kill", slow_kill)
    (tmp_path / "hold").touch()
    on_card.release()
    monkeypatch.undo()
    (tmp_path / "hold").unlink()
    assert asked[0].finished.wait(PATIENCE)
    assert (asked[0].state, asked[0].message) == ("done", "")


def test_start_ends_an_idle_process_on_a_card_at_once_and_a_picture_starts_it_again(
    on_card: WorkerClient, tmp_path: Path
) -> None:
    picture = {"do": "generate", "strengths": [1], "out": str(tmp_path)}
    on_card.ask(picture, PATIENCE)
    process = on_card._process
    assert process is not None
    on_card.release()
    assert process.poll() is not None
    assert not on_card.ready
    assert on_card.ask(picture, PATIENCE).state == "done"


def test_a_picture_that_waits_for_a_run_is_cancelled_at_once(on_card: WorkerClient, tmp_path: Path) -> None:
    on_card.in_the_way = lambda request: "Waiting for a run."
    reply = on_card.submit({"do": "generate", "strengths": [1], "out": str(tmp_path)})
    wait_for(lambda: reply.message)
    on_card.cancel(reply)
    assert reply.finished.wait(PATIENCE)
    assert (reply.state, reply.message) == ("error", "Cancelled.")


def test_a_picture_beside_a_run_on_the_card_waits_until_it_fits(app_state: AppState) -> None:
    picture, train = {"do": "generate", "base": "demo"}, make_run(app_state, "a", started())
    card = Card("RTX 3060", used=9 * 10**9, total=12 * 10**9)
    app_state.hardware._cards, app_state.hardware.known = [card], True
    app_state.hardware._asked = time.monotonic() + 1000
    app_state.worker.found = {"device": "cuda"}
    assert app_state._in_the_way(picture) == ""
    come_alive(train)
    # Before its first step it has not taken all of its memory.
    assert "Waiting for the GPU" in app_state._in_the_way(picture)
    with open(train.events_file, "a") as events:
        events.write(to_line(step(1)))
    assert app_state._in_the_way(picture) == ""
    app_state.hardware._cards = [replace(card, used=11 * 10**9)]
    sentence = app_state._in_the_way(picture)
    assert "It does not fit beside the run: about 1.5 GB are needed" in sentence
    assert "1.0 GB are free. It is done when the run a has ended or is paused." in sentence
    # On a processor, both go on side by side.
    app_state.worker.found = {"device": "cpu"}
    assert app_state._in_the_way(picture) == ""


def test_one_that_is_closed_while_it_starts_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Event()

    def slowly() -> dict[str, Any]:
        begun.set()
        time.sleep(0.2)
        return detached()

    monkeypatch.setattr("app.worker_client.detached", slowly)
    made = WorkerClient([sys.executable, "-c", "input()"], {}, tmp_path / "worker.txt")
    reply = made.submit({"do": "warm"})
    assert begun.wait(PATIENCE)
    made.close()
    assert reply.finished.wait(PATIENCE)
    assert made._process is not None
    assert made._process.poll() is not None, "it goes on though nobody knows of it"
    # Nor does what is asked of it afterwards start one.
    late = WorkerClient([sys.executable, "-c", "input()"], {}, tmp_path / "worker.txt")
    late.close()
    late.submit({"do": "warm"})
    assert late._running_process() is None
