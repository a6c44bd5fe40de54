"""A process of several: `python -m tests.train.together FOLDER`, started as a launcher does it."""

import contextlib
import hashlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

from lora_core.runs import events
from lora_core.runs.folder import RunFolder
from lora_core.train import loop
from lora_core.train.distributed import ProcessGroup, process_group, train_as_worker
from lora_core.train.loop import StepSettings, accumulate_gradients
from lora_core.train.setup import RuntimePlan, prepare
from lora_core.train.trainer import train

CASES: dict[str, dict[str, object]] = {
    "plain": {},
    "accumulation": {"train__gradient_accumulation_steps": 3},
    "dropout": {"adapter__dropout": 0.3, "adapter__rank_dropout": 0.2, "adapter__module_dropout": 0.1},
    "text encoder": {"optimizer__text_encoder_lr": 5e-4, "adapter__dropout": 0.3},
    "three images": {"train__batch_size": 3},
    "one image": {"train__batch_size": 1},
    "prior": {"train__batch_size": 3, "loss__prior_preservation": 1.0},
    "new tokens": {"adapter__new_tokens": ["zwx = dot"], "dataset__trigger": "zwx"},
    "slider": {"slider__positive": "red", "slider__negative": "blue", "train__batch_size": 3},
    **{kind: {"adapter__kind": kind} for kind in ("dora", "loha", "lokr", "oft")},
    "in halves": {"train__batch_size": 4, "adapter__dropout": 0.3},
}
"""Settings by name, for runs of the same name; the last goes through in two parts on each process."""
SPLIT = "in halves"
TRAINED = {
    "sgd": {
        "optimizer__name": "sgd", "optimizer__lr": 0.1, "train__steps": 20, "train__batch_size": 3,
        "dataset__flip": True, "dataset__caption_dropout": 0.3, "adapter__dropout": 0.2, "save__every": 20,
    },
    "adamw": {
        "train__steps": 20, "train__gradient_accumulation_steps": 2, "validation__pictures": 2.0,
        "validation__every": 10,
        "validation__draws_per_image": 8, "sample__every": 10, "save__ema": 0.9, "save__every": 10,
    },
}  # fmt: skip
"""Runs that are trained to their end, here and alone."""
BREAKS, STARVED = "breaks", "starved"


def worst_difference(folder: Path, group: ProcessGroup, name: str) -> dict[str, float]:
    """How far the gradient and the losses of a step are from those of this process alone, as a share."""
    run = RunFolder(folder / "runs" / name)
    config = run.config()
    # The main process encodes what is not in the caches yet.
    plan = group.broadcast_object(replace(RuntimePlan.of(run, config), threads=1) if group.is_main else None)
    session = prepare(run, config, plan, lambda phase, done, total: None)
    state, grads = session.state, session.state.flat_params.grads
    state.chunks = 2 if name == SPLIT else 1
    state.flat_params.data.detach().normal_(std=0.05, generator=torch.Generator().manual_seed(3))
    step = (session.batches, session.text, StepSettings(config, 12), 4)
    losses = torch.stack(accumulate_gradients(state, *step))
    gradient = grads.clone()
    state.group = group
    shared = accumulate_gradients(state, *step)
    group.all_reduce(grads, *shared)
    return {
        "gradient": float((grads - gradient).norm() / gradient.norm()),
        "losses": float((torch.stack(shared) - losses).norm() / losses.norm()),
        "size": float(gradient.norm()),
    }


@contextlib.contextmanager
def noted_states(path: Path) -> Iterator[None]:
    """Write down what each step left: a hash of all parameters."""
    real = loop.optimizer_step

    def optimizer_step(state, *given):
        found = real(state, *given)
        digest = hashlib.sha256(state.flat_params.data.detach().numpy().tobytes()).hexdigest()
        with open(path, "a") as file:
            file.write(f"{digest}\n")
        return found

    with mock.patch.object(loop, "optimizer_step", optimizer_step):
        yield


def trained_together(
    folder: Path, group: ProcessGroup, name: str, on_event: Callable[[events.Event], None]
) -> None:
    if not group.is_main:
        train_as_worker(group)
        return
    run = RunFolder(folder / "runs" / name)
    with run.hold():
        try:
            train(run, None, on_event, group=group)
        finally:
            if name != STARVED:
                group.broadcast_object(None)


def breaking(event: events.Event) -> None:
    if isinstance(event, events.StepDone) and event.step == 2:
        raise ZeroDivisionError


def starve() -> None:
    """Have this process lack the memory for the next third micro-batch."""
    asked: list[None] = []
    losses = loop.diffusion_loss

    def starved_losses(*given: object) -> torch.Tensor:
        asked.append(None)
        if len(asked) == 3:
            raise MemoryError
        return losses(*given)  # type: ignore[arg-type]

    loop.diffusion_loss = starved_losses


def main(folder: Path, group: ProcessGroup) -> None:
    """Gradients of all cases, then all runs, then one that breaks in the main process between two steps, and
    one that lacks memory in the other."""
    found = {name: worst_difference(folder, group, name) for name in CASES}
    (folder / f"found-{group.rank}.json").write_text(json.dumps(found))
    for name in TRAINED:
        with noted_states(folder / f"{name}-{group.rank}.txt"):
            trained_together(folder, group, name, lambda event: None)
    with contextlib.suppress(ZeroDivisionError):
        trained_together(folder, group, BREAKS, breaking)
    (folder / f"left-{group.rank}").touch()
    if not group.is_main:
        starve()
    trained_together(folder, group, STARVED, lambda event: None)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with process_group() as us:
        main(Path(sys.argv[1]), us)
