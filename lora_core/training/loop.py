"""The training loop: a generator that does the maths and nothing else.

It yields after every optimizer step. Whoever drives it decides when to log, validate, sample, save or stop;
what is random in a step follows from (seed, step) alone.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from lora_core.adapters.inject import Injected
from lora_core.models.load import BaseModel
from lora_core.spec.config import RunConfig
from lora_core.spec.errors import RunError
from lora_core.spec.sections import LossSection
from lora_core.training.batches import Batches
from lora_core.training.cache import TextSource
from lora_core.training.loss import drawn, training_loss
from lora_core.training.schedules import rate_factor


@dataclass(frozen=True)
class StepPlan:
    """The numbers that a step needs.

    Attributes:
        steps: in the whole run.
        accumulate: micro-batches a step.
        clip: largest gradient norm, 0 for none.
        schedule, warmup: of the learning rate.
        seed: of timesteps and noise.
        loss: kind of error and its weights.
    """

    steps: int
    accumulate: int
    clip: float
    schedule: str
    warmup: float
    seed: int
    loss: LossSection

    @classmethod
    def of(cls, config: RunConfig, steps: int) -> "StepPlan":
        """The plan of a config that runs to `steps`."""
        optim, train = config.optim, config.train
        return cls(
            steps, train.accumulate, optim.clip, optim.schedule, optim.warmup, config.seed, config.loss
        )


@dataclass(frozen=True)
class Step:
    """A finished optimizer step: its number from 1, mean loss, learning rate of the first group, seconds."""

    number: int
    loss: float
    lr: float
    seconds: float


@dataclass
class Trainee:
    """What a step changes: the base with the adapter in it, the optimizer, the loss scaler."""

    base: BaseModel
    injected: Injected
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


def training_steps(
    trainee: Trainee, batches: Batches, text: TextSource, plan: StepPlan, done: int
) -> Iterator[Step]:
    """Train from `done` optimizer steps to `plan.steps`, yielding after each.

    Raises:
        RunError: the loss is not finite; the adapter is as it was before that step.
    """
    for step in range(done, plan.steps):
        began = time.perf_counter()
        factor = rate_factor(step, plan.steps, plan.schedule, plan.warmup)
        for group in trainee.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor if step < group["until"] * plan.steps else 0.0
        trainee.optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for part in range(plan.accumulate):
            loss += _micro_batch(trainee, batches, text, plan, step * plan.accumulate + part)
        if not math.isfinite(loss):
            raise RunError(
                f"The loss of step {step + 1} is not finite, so training has stopped before it could spoil"
                " the adapter. Lower optim.lr, or set train.precision to fp32 or bf16."
            )
        _apply(trainee, plan.clip)
        yield Step(step + 1, loss, trainee.optimizer.param_groups[0]["lr"], time.perf_counter() - began)


def _micro_batch(trainee: Trainee, batches: Batches, text: TextSource, plan: StepPlan, number: int) -> float:
    """Add the gradient of micro-batch `number`; returns its share of the step's loss."""
    base = trainee.base
    trainee.injected.moment.micro_batch = number
    batch = batches.batch(number)
    latents = batch.latents.to(base.device)
    generator = torch.Generator().manual_seed(_noise_seed(plan.seed, number))
    draw = drawn(latents, base.noise.timesteps, plan.loss.noise_offset, generator)
    condition = text.conditions(batch.captions)
    loss = training_loss(base, latents, condition, draw, plan.loss, batch.sizes) / plan.accumulate
    trainee.scaler.scale(loss).backward()
    return float(loss.detach())


def _apply(trainee: Trainee, clip: float) -> None:
    trainee.scaler.unscale_(trainee.optimizer)
    if clip:
        nn.utils.clip_grad_norm_(trainee.injected.parameters(), clip)
    trainee.scaler.step(trainee.optimizer)
    trainee.scaler.update()


def _noise_seed(seed: int, number: int) -> int:
    """A seed for each (run, micro-batch), far apart for neighbours."""
    return (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9 + 1) % 2**63
