"""The warm worker as the window has it: a real process, lines of JSON in and out."""

import base64
import io
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_core.formats.io import file_hashes, save_adapter
from lora_core.lora.weights import AdapterWeights, LayerWeights
from lora_core.model_files.families import FAMILIES
from lora_core.runs.folder import RunFolder
from lora_core.settings.config import RunConfig
from tests.waiting import PATIENCE

ROOT = Path(__file__).resolve().parents[2]


class Worker:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lora_core", "serve"],
            cwd=ROOT,
            env=os.environ | {"PYTHONIOENCODING": "latin-1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._lines: queue.Queue[bytes] = queue.Queue()
        self.complaints: list[bytes] = []
        for read in (self._read, self._listen):
            threading.Thread(target=read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)

    def _listen(self) -> None:
        assert self.process.stderr is not None
        self.complaints.extend(self.process.stderr)

    def send(self, request: object) -> None:
        self.send_raw(json.dumps(request, ensure_ascii=False).encode())

    def send_raw(self, line: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        line = self._lines.get(timeout=PATIENCE)
        found = json.loads(line.decode("utf-8"))
        assert isinstance(found, dict)
        return found

    def answers(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """All answers to a request, the last of which is `done` or `error`."""
        self.send(request)
        return self.rest(request["id"])

    def rest(self, name: str) -> list[dict[str, Any]]:
        found = [self.answer()]
        while found[-1]["event"] not in ("done", "error"):
            found.append(self.answer())
        assert {answer["id"] for answer in found} == {name}
        return found

    def error(self, request: dict[str, Any]) -> str:
        answers = self.answers(request)
        assert answers[-1]["event"] == "error", answers
        return str(answers[-1]["message"])


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker()
    try:
        ready = {"id": None, "event": "ready", "device": "cpu", "torch": torch.__version__}
        assert ready.items() <= worker.answer().items()
        yield worker
    finally:
        worker.process.kill()
        worker.process.wait()
        for pipe in (worker.process.stdin, worker.process.stdout, worker.process.stderr):
            assert pipe is not None
            pipe.close()


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Strong enough that every pixel shows it."""
    path = tmp_path_factory.mktemp("lora") / "größe 木.safetensors"
    draw = torch.Generator().manual_seed(0)
    layer = LayerWeights(torch.randn(4, 128, generator=draw), torch.randn(96, 4, generator=draw), 4.0)
    names = [f"down_blocks.1.attentions.0.transformer_blocks.0.attn2.{to}" for to in ("to_k", "to_v")]
    weights = AdapterWeights({("unet", name): layer for name in names})
    save_adapter(weights, path, FAMILIES["tiny"])
    return path


def wish(name: str, out: Path, **more: object) -> dict[str, Any]:
    how = {"prompt": "a red cat", "steps": 2, "cfg": 3.0, "width": 64, "height": 64, "seed": 5}
    return {"id": name, "do": "generate", "out": str(out), **how, **more}


def pixels(path: str) -> bytes:
    from PIL import Image

    with Image.open(path) as image:
        return image.tobytes()


def test_strengths_share_one_noise_and_zero_is_the_base(worker: Worker, lora: Path, tmp_path: Path) -> None:
    base = worker.answers(wish("base", tmp_path))[-1]["files"]
    loras = [{"file": str(lora)}]
    answers = worker.answers(wish("both", tmp_path / "Ausgabe ü", loras=loras, strengths=[0, 1]))
    zero, one = answers[-1]["files"]
    assert pixels(zero) == pixels(base[0])
    assert pixels(one) != pixels(zero)
    pictures = [a for a in answers if a["event"] == "picture"]
    assert [(a["index"], a["strength"], a["file"]) for a in pictures] == [(0, 0.0, zero), (1, 1.0, one)]
    ticks = [(a["done"], a["total"]) for a in answers if a["event"] == "progress"]
    assert ticks == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert answers[-1]["seconds"] > 0
    rescaled = [
        pixels(worker.answers(wish("phi", tmp_path, cfg_rescale=phi))[-1]["files"][0])
        for phi in ("auto", 0.7)
    ]
    assert rescaled[0] == pixels(base[0]) != rescaled[1]
    # What was merged for the last picture is out again for the next.
    assert pixels(worker.answers(wish("again", tmp_path))[-1]["files"][0]) == pixels(base[0])


def test_a_strength_multiplies_the_adapters_own(worker: Worker, lora: Path, tmp_path: Path) -> None:
    half = [{"file": str(lora), "strength": 0.5}]
    whole = [{"file": str(lora)}]
    first = worker.answers(wish("1", tmp_path, loras=half, strengths=[1.0]))[-1]["files"][0]
    second = worker.answers(wish("2", tmp_path, loras=whole, strengths=[0.5]))[-1]["files"][0]
    assert first != second
    assert pixels(first) == pixels(second)


def test_an_adapter_that_changed_on_disk_is_read_again(worker: Worker, lora: Path, tmp_path: Path) -> None:
    file = tmp_path / "changing.safetensors"
    shutil.copy(lora, file)
    before = worker.answers(wish("1", tmp_path, loras=[{"file": str(file)}]))[-1]["files"][0]
    layer = LayerWeights(torch.ones(2, 128), torch.ones(96, 2), 2.0)
    key = ("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k")
    save_adapter(AdapterWeights({key: layer}), file, FAMILIES["tiny"])
    after = worker.answers(wish("2", tmp_path, loras=[{"file": str(file)}]))[-1]["files"][0]
    assert pixels(before) != pixels(after)


def test_a_picture_under_way_is_cancelled(worker: Worker, tmp_path: Path) -> None:
    out = tmp_path / "out"
    worker.send(wish("long", out, steps=1000))
    while worker.answer()["event"] != "progress":
        pass
    worker.send({"id": "c", "do": "cancel", "target": "long"})
    last = worker.rest("long")[-1]
    assert (last["event"], last["message"]) == ("error", "Cancelled.")
    assert not out.exists()
    assert worker.answers(wish("next", out))[-1]["event"] == "done"


def test_one_that_waits_is_cancelled_too(worker: Worker, tmp_path: Path) -> None:
    worker.send(wish("first", tmp_path, steps=20))
    worker.send(wish("second", tmp_path, steps=1000))
    worker.send({"id": "c", "do": "cancel", "target": "second"})
    assert worker.rest("first")[-1]["event"] == "done"
    assert worker.rest("second")[-1]["message"] == "Cancelled."


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"loras": [{"file": "/nowhere/a.safetensors"}]}, "does not exist"),
        ({"base": "/nowhere/base"}, "/nowhere/base"),
        ({"sampler": "magic"}, "sampler"),
        ({"width": 100}, "width = 100"),
        ({"steps": 0}, "steps = 0"),
        ({"steps": "many"}, "many"),
        ({"cfg": float("nan")}, "cfg"),
        ({"cfg_rescale": 2}, "CFG rescale 2"),
        ({"zero_terminal_snr": "on", "prediction": "epsilon"}, "predicts noise"),
        ({"seed": -1}, "seed"),
        ({"strengths": [float("inf")]}, "strengths"),
        ({"loras": "a.safetensors"}, "not understood"),
        ({"loras": [{}]}, "file"),
        ({"do": "fly"}, "'fly'"),
        ({"do": "inspect"}, "file"),
        ({"do": "inspect", "file": str(ROOT / "pyproject.toml")}, "pyproject.toml"),
        ({"do": "export", "run": "/nowhere/run"}, "/nowhere/run"),
    ],
)
def test_an_error_is_an_answer(worker: Worker, tmp_path: Path, more: dict[str, object], words: str) -> None:
    message = worker.error(wish("bad", tmp_path / "out", **more))
    assert words in message
    assert message.endswith(".")
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written(worker: Worker, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "file" in worker.error(wish("bad", tmp_path / "file"))


@pytest.mark.parametrize("line", [b"{broken", b"", b"[1, 2]", b'"generate"', b"{}", b"\xff\xfe"])
def test_a_line_that_is_no_request_is_answered(worker: Worker, line: bytes) -> None:
    worker.send_raw(line)
    answer = worker.answer()
    assert (answer["id"], answer["event"]) == (None, "error")
    assert "JSON object" in answer["message"]


def test_inspect(worker: Worker, lora: Path) -> None:
    report = worker.answers({"id": "i", "do": "inspect", "file": str(lora)})[-1]["report"]
    assert (report["family"], report["format"], report["ranks"], report["modules"]) == (
        "tiny",
        "kohya",
        [4],
        2,
    )


def test_a_picture_is_drawn_with_the_base_as_the_run_had_it(worker: Worker, tmp_path: Path) -> None:
    usual = pixels(worker.answers(wish("as usual", tmp_path))[-1]["files"][0])
    asked = {"prediction": "epsilon", "zero_terminal_snr": "off"}
    other = worker.answers(wish("as noise", tmp_path, **asked))[-1]
    assert pixels(other["files"][0]) != usual
    # Without any signal in the first step, the noise says nothing of the image.
    assert "not finite" in worker.error(wish("as noise", tmp_path, prediction="epsilon"))
    again = worker.answers(wish("as usual again", tmp_path, tokens=75, clip_skip=1))[-1]
    assert pixels(again["files"][0]) == usual
    assert "nowhere" in worker.error(wish("vae", tmp_path, vae=str(tmp_path / "nowhere")))


def test_verify_says_what_a_file_is_and_who_reads_it(worker: Worker, lora: Path, tmp_path: Path) -> None:
    done = worker.answers({"id": "v", "do": "verify", "file": str(lora)})[-1]
    assert (done["report"]["kind"], done["report"]["modules"]) == ("LoRA", 2)
    assert [row["tool"] for row in done["verify"]["tools"]] == [
        "A1111", "Forge", "ComfyUI", "InvokeAI", "kohya", "diffusers",
    ]  # fmt: skip
    broken = tmp_path / "x.safetensors"
    broken.write_text("<html>")
    assert "a web page" in worker.error({"id": "w", "do": "verify", "file": str(broken)})


def test_export_of_a_checkpoint(worker: Worker, lora: Path, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "runs" / "mine", RunConfig())
    ask = {"id": "e", "do": "export", "run": str(run.path)}
    assert "no checkpoint yet" in worker.error(ask)
    run.checkpoint(20).mkdir()
    shutil.copy(lora, run.checkpoint(20) / "adapter.safetensors")
    done = worker.answers(ask | {"name": "Katze ü", "format": "diffusers", "precision": "fp32"})[-1]
    assert done["event"] == "done", done
    file = Path(done["file"])
    assert file == run.exports / "Katze ü.safetensors"
    assert (done["bytes"], done["modules"]) == (file.stat().st_size, 2)
    assert done["sha256"] == file_hashes(file)["sha256"]
    rows = done["works_in"]["tools"]
    assert done["works_in"]["ok"]
    assert [row["tool"] for row in rows if row["matched"] == row["keys"]] == ["diffusers"]
    assert "no checkpoint 7;" in worker.error(ask | {"checkpoint": "7"})
    assert "a/b" in worker.error(ask | {"name": "a/b"})
    assert "fp12" in worker.error(ask | {"precision": "fp12"})
    assert "onnx" in worker.error(ask | {"format": "onnx"})


def test_a_picture_can_be_looked_at_while_it_is_made(worker: Worker, tmp_path: Path) -> None:
    answers = worker.answers(wish("look", tmp_path, steps=60, look=True, width=128, height=128))
    looks = [answer for answer in answers if answer["event"] == "look"]
    assert looks
    began = [answer["event"] for answer in answers].index("look")
    assert answers[began - 1]["event"] == "progress"
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(looks[-1]["image"]))) as image:
        assert (image.format, image.size) == ("JPEG", (16, 16))
    # At most four a second, and none unless it is asked for.
    assert len(looks) <= 4 * answers[-1]["seconds"] + 1
    assert not [a for a in worker.answers(wish("none", tmp_path, steps=20)) if a["event"] == "look"]


def whole_adapter(path: Path, rank: int) -> Path:
    """On all attention layers of the UNet, as training makes them."""
    from lora_core.models.load import load_base

    draw = torch.Generator().manual_seed(rank)
    layers = {}
    for name, module in load_base("demo", torch.device("cpu"), torch.float32).denoiser.named_modules():
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            down = torch.randn(rank, module.in_features, generator=draw) * 0.1
            up = torch.randn(module.out_features, rank, generator=draw) * 0.1
            layers["unet", name] = LayerWeights(down, up, float(rank))
    save_adapter(AdapterWeights(layers), path, FAMILIES["tiny"], dtype="fp16")
    return path


def test_a_strength_costs_a_merge_and_no_reload(worker: Worker, tmp_path: Path) -> None:
    """50 ms up to the first step of the sampler; opening the base anew takes ten times that."""
    file = str(whole_adapter(tmp_path / "whole.safetensors", 16))
    seconds = []
    for number in range(8):
        ask = wish("s", tmp_path, loras=[{"file": file, "strength": 0.1 * number}], steps=1)
        seconds += [a["ready_in"] for a in worker.answers(ask) if a["event"] == "picture"]
    assert min(seconds[1:]) < 0.05, seconds


def test_ranks_and_text_strengths_are_in_the_request(worker: Worker, tmp_path: Path) -> None:
    file = str(whole_adapter(tmp_path / "whole.safetensors", 8))

    def drawn(**row: object) -> bytes:
        done = worker.answers(wish("r", tmp_path, loras=[{"file": file, **row}]))[-1]
        return pixels(done["files"][0])

    whole = drawn()
    assert drawn(rank=0) == drawn(rank=8) == whole
    assert drawn(rank=1) != whole
    assert drawn(text_strength=0.0) == whole, "it has no text encoder's layers"
    assert "rank" in worker.error(wish("bad", tmp_path, loras=[{"file": file, "rank": -1}]))


def test_a_sheet_is_made_of_pictures_that_are_there(worker: Worker, tmp_path: Path) -> None:
    from PIL import Image

    done = worker.answers(wish("a", tmp_path / "p", strengths=[0, 1]))[-1]
    ask = {"id": "t", "do": "sheet", "cells": [[*done["files"], None]], "columns": ["0", "1", "<b>x</b>"],
           "parameters": "an owl", "out": str(tmp_path / "sheet.png")}  # fmt: skip
    made = worker.answers(ask)[-1]
    with Image.open(made["files"][0]) as sheet, Image.open(done["files"][1]) as second:
        assert sheet.text["parameters"] == "an owl"
        assert sheet.size == (made["width"], made["height"])
        right, bottom = sheet.width - 8 - 64 - 8, sheet.height - 8
        assert sheet.crop((right - 64, bottom - 64, right, bottom)).tobytes() == second.tobytes()
    assert "gone.png" in worker.error(ask | {"cells": [[str(tmp_path / "gone.png")]]})
    assert "list of lists" in worker.error(ask | {"cells": "x"})


def test_cancelling_takes_no_longer_than_a_step(worker: Worker, tmp_path: Path) -> None:
    worker.send(wish("slow", tmp_path, steps=1000, width=128, height=128))
    seen = []
    while len(seen) < 3:
        answer = worker.answer()
        seen += [answer["done"]] if answer["event"] == "progress" else []
    worker.send({"id": "c", "do": "cancel", "target": "slow"})
    time.sleep(0.2)
    after = [answer for answer in worker.rest("slow") if answer["event"] == "progress"]
    # What was said before the word came through lies in the pipe still.
    assert all(answer["done"] < 500 for answer in after)


def test_memory_is_given_back_and_taken_again(worker: Worker, lora: Path, tmp_path: Path) -> None:
    assert worker.answers({"id": "r", "do": "release"})[-1]["event"] == "done"
    assert worker.answers(wish("after", tmp_path, loras=[{"file": str(lora)}]))[-1]["event"] == "done"


def test_quit_ends_it_in_silence(worker: Worker) -> None:
    """The last test of this module."""
    worker.send({"id": "q", "do": "quit"})
    assert worker.process.wait(PATIENCE) == 0
    assert worker.complaints == []
