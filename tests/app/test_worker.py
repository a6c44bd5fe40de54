"""The client of the warm worker, against a small program that speaks its language."""

import sys
import time
from pathlib import Path

import pytest

from app.studio import STRIP, Scene, Studio
from app.worker import Worker

FAKE = """
import json, sys
print("a library says hello", flush=True)
print(json.dumps({"event": "ready"}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    say = lambda **more: print(json.dumps({"id": asked["id"], **more}), flush=True)
    if asked["do"] == "quit":
        break
    if asked["do"] == "die":
        print("the memory is full", file=sys.stderr, flush=True)
        sys.exit(7)
    if asked["do"] == "inspect" or asked.get("prompt") == "bad":
        say(event="error", message="It cannot be read.")
        continue
    files = []
    for index, strength in enumerate(asked.get("strengths", [])):
        say(event="progress", done=index, total=len(asked["strengths"]))
        name = asked["out"] + f"/{strength}.png"
        open(name, "wb").close()
        files.append(name)
        say(event="picture", index=index, strength=strength, file=name)
    say(event="done", files=files, seconds=0.1)
"""


@pytest.fixture
def worker(tmp_path: Path):
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    made = Worker([sys.executable, str(script)], {}, tmp_path / "logs" / "worker.txt")
    yield made
    made.close()


def wait_for(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def test_an_answer_and_an_error(worker: Worker, tmp_path: Path) -> None:
    reply = worker.ask({"do": "generate", "strengths": [0.0, 1.0], "out": str(tmp_path)}, timeout=20)
    assert (reply.state, len(reply.pictures), reply.result["seconds"]) == ("done", 2, 0.1)
    assert worker.ask({"do": "inspect"}, timeout=20).message == "It cannot be read."


def test_a_worker_that_dies_is_reported_and_started_again(worker: Worker, tmp_path: Path) -> None:
    reply = worker.ask({"do": "die"}, timeout=20)
    assert reply.state == "error"
    assert "code 7" in reply.message
    assert "the memory is full" in reply.message
    again = worker.ask({"do": "generate", "strengths": [1.0], "out": str(tmp_path)}, timeout=20)
    assert again.state == "done"


def test_a_worker_that_cannot_start_is_a_sentence(tmp_path: Path) -> None:
    worker = Worker([str(tmp_path / "missing")], {}, tmp_path / "log.txt")
    assert "is gone" in worker.ask({"do": "warm"}, timeout=20).message


def scene(prompt: str = "a cat", lora: str = "x.safetensors") -> Scene:
    return Scene("demo", lora, prompt, "", 1, 20, 5.0, "ddim")


def test_a_scene_is_drawn_at_the_wanted_strength_then_as_a_strip(worker: Worker, tmp_path: Path) -> None:
    studio = Studio(worker, tmp_path)
    assert not studio.look_at(0.5)
    studio.want(scene(), 0.8)
    assert studio.view().state == "working"
    wait_for(lambda: not studio.view().working)
    assert set(studio.view().pictures) == {0.8, *STRIP}
    assert studio.look_at(0.5)
    assert studio.view().state == "idle"


def test_without_a_lora_the_base_alone_is_drawn(worker: Worker, tmp_path: Path) -> None:
    studio = Studio(worker, tmp_path)
    studio.want(scene(lora=""), 1.0)
    wait_for(lambda: not studio.view().working)
    assert set(studio.view().pictures) == {0.0}


def test_an_error_stays_until_something_else_is_wanted(worker: Worker, tmp_path: Path) -> None:
    studio = Studio(worker, tmp_path)
    studio.want(scene("bad"), 1.0)
    wait_for(lambda: studio.view().state == "error")
    assert studio.view().message == "It cannot be read."
    studio.want(scene("good"), 1.0)
    wait_for(lambda: studio.view().state == "idle")
    assert [one.scene.prompt for one in studio.view().recent] == ["good"]
