"""Whole runs on a toy base: made, trained here or broken off, and compared bit for bit."""

import contextlib
import io
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from lora_core.errors import LoraError
from lora_core.runs import events
from lora_core.runs.events import read_events
from lora_core.runs.folder import RunFolder
from lora_core.settings.config import RunConfig
from lora_core.train.checkpoint import load_checkpoint
from lora_core.train.trainer import Outcome, train
from tests.tiny import tiny_folder

LEFTOVERS = (".tmp", ".draft", ".making")
SETTINGS = {
    "adapter.rank": 2, "adapter.alpha": 2.0, "train.steps": 12, "train.batch_size": 2, "train.resolution": 16,
    "train.precision": "fp32", "optimizer.lr": 1e-3, "validation.pictures": 0.0, "validation.every": 0,
    "validation.max_time_share": 0.0, "validation.draws_per_image": 2, "validation.forgetting": 1,
    "sample.every": 0, "sample.steps": 1, "sample.prompts": ["a dot"], "save.every": 4,
    "save.keep_last": 2, "loss.min_snr": 0.0, "optimizer.text_encoder_lr": 0.0,
}  # fmt: skip
RANDOM = {
    "dataset.flip": True, "dataset.shuffle_tags": True, "dataset.caption_dropout": 0.3,
    "adapter.dropout": 0.2, "adapter.rank_dropout": 0.2, "adapter.module_dropout": 0.1,
    "train.gradient_accumulation_steps": 2,
    "optimizer.text_encoder_lr": 5e-4,
}  # fmt: skip
SAMPLED = {"sample__every": 6, "validation__pictures": 1, "validation__every": 6}
"""A short run that does everything."""


class Broken(BaseException):
    """A process that ends here and now, as far as a test's own process can."""


@dataclass(frozen=True)
class Toy:
    """A toy base and a few pictures, and a workspace."""

    base: Path
    pictures: Path
    home: Path

    def run(self, name: str, **changes: object) -> RunFolder:
        """A new run; `changes` has `__` where settings have a dot."""
        own = {key.replace("__", "."): value for key, value in changes.items()}
        where: dict[str, object] = {
            "name": name,
            "model.base": str(self.base),
            "dataset.path": str(self.pictures),
        }
        return RunFolder.create(self.home / "runs" / name, RunConfig().changed({**SETTINGS, **where, **own}))


def toy(folder: Path, in_channels: int = 4) -> Toy:
    """Made in a folder; the base is for inpainting with 9 `in_channels`."""
    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(4):
        image = Image.new("RGB", (32, 32), ("red", "blue", "green", "white")[number])
        ImageDraw.Draw(image).ellipse((4, 4, 14 + 2 * number, 24), fill="orange")
        image.save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(f"dot, number {number}, plain")
    return Toy(tiny_folder(folder / "base", in_channels=in_channels), pictures, folder / "home")


def trained(
    run: RunFolder, on_event: Callable[[events.Event], None] | None = None, accept_changes: bool = False
) -> Outcome:
    """Train a run in this process."""
    with run.hold(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.request("resume")
        return train(run, None, on_event or (lambda event: None), accept_changes)


def trouble(run: RunFolder) -> str:
    """Train a run that ends in a sentence, and give that."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            trained(run)
        except LoraError as error:
            return str(error)
    raise AssertionError("the run came to its end")


def broken_at(run: RunFolder, kind: type[events.Event], step: int) -> None:
    """Train until an event of a kind at a step was written, and break off there."""

    def on_event(event: events.Event) -> None:
        if isinstance(event, kind) and event.step == step:
            raise Broken

    with contextlib.suppress(Broken):
        trained(run, on_event)
        raise AssertionError("the run never came there")


def asked_at(run: RunFolder, do: str, step: int) -> Outcome:
    """Train, and ask the run for something after a step."""

    def on_event(event: events.Event) -> None:
        if isinstance(event, events.StepDone) and event.step == step:
            run.request(do)

    return trained(run, on_event)


def tensors(path: Path) -> dict[str, bytes]:
    """The bytes of each tensor of a file."""
    found = load_file(path)
    return {
        name: tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in found.items()
    }


def result(run: RunFolder) -> dict[str, dict[str, bytes]]:
    """What a finished run leaves, whatever its name: the tensors of its last checkpoint and of its export."""
    assert run.status() == "done", (run.status(), run.progress().reason)
    last = run.checkpoint(run.checkpoint_steps()[-1])
    found = {path.name: tensors(path) for path in last.glob("*.safetensors")}
    exports = {"export": run.exports / f"{run.name}.safetensors"}
    if run.config().save.ema:
        exports["raw export"] = run.exports / f"{run.name}-raw.safetensors"
    return found | {name: tensors(path) for name, path in exports.items()}


def check_whole(run: RunFolder) -> None:
    """Everything that has its final name is whole, whatever happened.

    Raises:
        AssertionError, or what reading it raises.
    """
    for step in run.checkpoint_steps():
        load_checkpoint(run.checkpoint(step))
    for folder in run.checkpoints.glob("step-*"):
        assert (folder / "state.json").is_file(), folder
    for path in run.exports.glob("[!.]*.safetensors"):
        load_file(path)
    for path in run.previews.glob("[!.]*.png"):
        with Image.open(path) as image:
            image.load()
    for name in ("plan.json", "inputs.json", "process.json"):
        if (run.path / name).exists():
            json.loads((run.path / name).read_text(encoding="utf-8"))
    run.config()


def check_story(run: RunFolder) -> None:
    """A reader of the events sees each step once, in order, and nothing is left half-written."""
    steps = [event.step for event in run.progress().losses]
    assert steps == list(range(1, len(steps) + 1))
    workspace = run.path.parent.parent
    assert [path for path in workspace.rglob(".*") if path.suffix in LEFTOVERS] == []


def notes(run: RunFolder) -> list[str]:
    """All warnings, also those of steps that became void."""
    story = read_events(run.events_file)[0]
    return [event.message for event in story if isinstance(event, events.Warned)]
