"""Learning-rate schedules as pure functions of progress, so that a resume needs no state of them.

Each takes progress in [0, 1] after the warm-up and gives the factor of the full rate.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_core.lora.flat_params import FlatParams
from lora_core.lora.inject import Injected, adapter_weights, load_weights
from lora_core.lora.weights import AdapterWeights
from lora_core.models.load import BaseModel
from lora_core.settings.choices import SCHEDULES, chosen
from lora_core.settings.config import RunConfig
from lora_core.settings.schema import LossSection
from lora_core.train.data import Batch, Batches, PromptCache
from lora_core.train.distributed import ProcessGroup
from lora_core.train.loss import NoiseSample, diffusion_loss, sample_noise

RESTARTS = 3


def constant(progress: float) -> float:
    """1 throughout."""
    return 1.0


def linear(progress: float) -> float:
    """From 1 to 0 in a straight line."""
    return 1.0 - progress


def cosine(progress: float) -> float:
    """From 1 to 0 along half a cosine (Loshchilov and Hutter 2017, equation 5)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def cosine_restarts(progress: float) -> float:
    """Three times from 1 to 0 along half a cosine."""
    return cosine(progress * RESTARTS % 1.0) if progress < 1.0 else 0.0


def lr_factor(step: int, steps: int, schedule: str, warmup: float) -> float:
    """The factor of the full learning rate for the step that follows `step` done ones.

    Args:
        step: optimizer steps done.
        steps: in the whole run.
        schedule: a key of `choices.SCHEDULES`.
        warmup: share of the steps over which the rate rises in a straight line.
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    return float(
        chosen(SCHEDULES, schedule, "optimizer.schedule").resolve()((step - rising) / max(1, steps - rising))
    )


# A running average of the adapter, steadier than the last step; sampled, measured and exported beside it.


class EMA:
    """The average beside an adapter in a base."""

    def __init__(self, injected: Injected, storage: FlatParams, decay: float) -> None:
        """Begin at the adapter as it stands; `decay` is below 1."""
        self._injected = injected
        self._decay = decay
        self._storage = storage
        self._mean = storage.data.detach().clone()

    def update(self, step: int) -> None:
        """Take in the adapter after optimizer step `step`, counted from 1.

        mean = d mean + (1 - d) adapter, with d = min(decay, (1 + step) / (10 + step)), so that the first
        steps do not hold on to a start that has learned nothing. Source: the ramp of TensorFlow's
        ExponentialMovingAverage.
        """
        decay = min(self._decay, (1 + step) / (10 + step))
        self._mean.lerp_(self._storage.data.detach(), 1.0 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The average takes the adapter's place while the context is open; the bits of both stay."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def weights(self) -> AdapterWeights:
        """The average as an adapter."""
        with self.in_place():
            return adapter_weights(self._injected)

    def load(self, weights: AdapterWeights) -> None:
        """Take over a saved average, bit for bit."""
        with self.in_place():
            load_weights(self._injected, weights)

    def _swap(self) -> None:
        with self._storage.mutate() as live:
            kept = live.clone()
            live.copy_(self._mean)
            self._mean.copy_(kept)


# The training loop: a generator that does the maths and nothing else.
#
# It yields after every optimizer step. Whoever drives it decides when to log, validate, sample, save or
# stop; what is random in a step follows from (seed, step) alone.


CLIP_EPSILON = 1e-6
"""Added to the gradient's norm where it is clipped, as by `torch.nn.utils.clip_grad_norm_`."""
NAMED = 4
"""So many pictures are named in a sentence."""


@dataclass(frozen=True)
class StepSettings:
    """The numbers that a step needs.

    Attributes:
        steps: in the whole run.
        accumulate: micro-batches a step.
        clip: largest gradient norm, 0 for none.
        schedule, warmup: of the learning rate.
        seed: of timesteps and noise.
        loss: kind of error and its weights.
        rate: factor of all learning rates, below 1 after a return to an earlier state.
    """

    steps: int
    accumulate: int
    clip: float
    schedule: str
    warmup: float
    seed: int
    loss: LossSection
    rate: float = 1.0

    @classmethod
    def of(cls, config: RunConfig, steps: int, rate: float = 1.0) -> "StepSettings":
        """The plan of a config that runs to `steps`."""
        optim, train = config.optimizer, config.train
        return cls(
            steps,
            train.gradient_accumulation_steps,
            optim.max_grad_norm,
            optim.schedule,
            optim.warmup,
            config.seed,
            config.loss,
            rate,
        )


@dataclass(frozen=True)
class Step:
    """A finished optimizer step.

    Attributes:
        number: counted from 1.
        loss: the mean.
        lr: learning rate of the first group.
        seconds: that it took.
        trouble: what was not finite, with the pictures and timesteps, if anything was: the adapter and the
            optimizer are then as before the step.
    """

    number: int
    loss: float
    lr: float
    seconds: float
    trouble: str = ""


@dataclass
class TrainState:
    """What a step changes, and how it is fitted into memory.

    Attributes:
        base: the base with the adapter in it.
        injected: the adapter.
        optimizer: of the adapter.
        storage: where its numbers lie, and their gradients.
        scaler: of the loss.
        average: the running average of the adapter, if one is kept.
        split: parts that a micro-batch goes through the model in, to take less memory; they add up to the
            same gradient.
        applying: whether the optimizer is at work: a step that fails then is half done.
        aside: the folder on whose drive weights may be put aside.
        group: the processes that train together with this one, if there are any.
    """

    base: BaseModel
    injected: Injected
    optimizer: torch.optim.Optimizer
    storage: FlatParams
    scaler: torch.amp.GradScaler
    average: EMA | None = None
    split: int = 1
    applying: bool = False
    aside: Path | None = None
    group: ProcessGroup | None = None


@dataclass
class MicroBatch:
    """What a micro-batch was and gave: names of pictures, their timesteps (B,), their losses (B,), which
    are on the device until the step is taken."""

    names: list[str]
    timesteps: torch.Tensor
    losses: list[torch.Tensor] = field(default_factory=list)

    @property
    def loss(self) -> torch.Tensor:
        """The mean, a scalar."""
        return torch.cat(self.losses).mean()


@dataclass(frozen=True)
class Call:
    """What the main process tells the others of a step: how many are done, and the scaler's `state_dict`."""

    step: int
    scaler: dict[str, Any]


def training_steps(
    state: TrainState, batches: Batches, text: PromptCache, plan: StepSettings, done: int
) -> Iterator[Step]:
    """Train from `done` optimizer steps to `plan.steps`, yielding after each.

    A step whose loss or gradient is not finite is counted but changes nothing. Losses and gradient norm come
    from the device in one transfer, the only wait for it in a step; the norm is finite only where every
    gradient is.
    """
    for step in range(done, plan.steps):
        began = time.perf_counter()
        factor = plan.rate * lr_factor(step, plan.steps, plan.schedule, plan.warmup)
        for group in state.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor if step < group["until"] * plan.steps else 0.0
        parts = (shared_parts if state.group else own_parts)(state, batches, text, plan, step)
        loss, trouble = optimizer_step(state, plan.clip, parts, step + 1)
        rate = state.optimizer.param_groups[0]["lr"]
        yield Step(step + 1, loss, rate, time.perf_counter() - began, trouble)


def own_parts(
    state: TrainState, batches: Batches, text: PromptCache, plan: StepSettings, step: int
) -> list[MicroBatch]:
    """The micro-batches of the step after `step` others; their gradients lie in the storage."""
    state.storage.zero_grad()
    return [
        backward_micro_batch(state, batches, text, plan, step * plan.accumulate + part)
        for part in range(plan.accumulate)
    ]


def shared_parts(
    state: TrainState, batches: Batches, text: PromptCache, plan: StepSettings, step: int
) -> list[MicroBatch]:
    """`own_parts`, of which each process computes some rows, with gradients and losses added up over all."""
    group = state.group
    assert group is not None
    if group.main:
        group.tell(Call(step, state.scaler.state_dict()))
    with state.storage.mutate() as numbers:
        group.spread(numbers)
    parts = group.agreed(lambda: own_parts(state, batches, text, plan, step))
    losses = torch.stack([torch.cat(part.losses) for part in parts])
    group.add_up(state.storage.grads, losses)
    for part, whole in zip(parts, losses, strict=True):
        part.losses = [whole]
    return parts


def sample_batch(
    state: TrainState, batches: Batches, plan: StepSettings, number: int
) -> tuple[Batch, NoiseSample]:
    """Micro-batch `number`, and what is random in it."""
    batch = batches.batch(number)
    generator = torch.Generator().manual_seed(_noise_seed(plan.seed, number))
    timesteps = state.base.noise.num_timesteps
    return batch, sample_noise(batch.latents, timesteps, plan.loss.noise_offset, generator)


def backward_micro_batch(
    state: TrainState, batches: Batches, text: PromptCache, plan: StepSettings, number: int
) -> MicroBatch:
    """Add the gradient of micro-batch `number`, in `state.split` parts that add up to that of the whole.

    Where others train with this process, it is that of this process's rows, and the losses of others are 0.
    """
    base, dropout = state.base, state.injected.dropout_state
    batch, draw = sample_batch(state, batches, plan, number)
    done = MicroBatch(batch.names, draw.timesteps)
    latents, count = batch.latents, len(batch.latents)
    share = state.group.share(count) if state.group else slice(0, count)
    size = max(1, math.ceil((share.stop - share.start) / state.split))
    for start in range(share.start, share.stop, size):
        rows = slice(start, min(start + size, share.stop))
        dropout.micro_batch, dropout.rows = number, count
        dropout.first, dropout.last = rows.start, rows.stop
        condition = text.conditions(batch.captions[rows])
        losses = diffusion_loss(base, latents[rows], condition, draw.rows(rows), plan.loss, batch.sizes[rows])
        looks = count * plan.accumulate
        state.scaler.scale(losses.sum() / looks if looks > 1 else losses.sum()).backward()
        done.losses.append(losses.detach())
    state.storage.flush_grads()
    if state.group:
        others = (share.start, count - share.stop)
        before, after = (torch.zeros(rows, device=base.device) for rows in others)
        done.losses = [before, *done.losses, after]
    return done


def optimizer_step(state: TrainState, clip: float, parts: list[MicroBatch], step: int) -> tuple[float, str]:
    """Take the step if all is finite; returns the loss and what was not."""
    scaler, optimizer = state.scaler, state.optimizer
    scaler.unscale_(optimizer)
    loss, norm = _read(parts, state.storage.grads)
    if math.isfinite(loss + float(norm)):
        state.applying = True
        factor = clip / (norm + CLIP_EPSILON) if clip else norm.new_ones(())
        if factor < 1.0:
            state.storage.grads.mul_(factor)
        state.storage.step(optimizer)
        scaler.update()
        if state.average is not None:
            state.average.update(step)
        state.applying = False
        return loss, ""
    # A scaler finds its scale by overflowing now and then; such a step is passed over in silence.
    searching = scaler.is_enabled() and math.isfinite(loss) and scaler.get_scale() > 1.0
    if scaler.is_enabled():
        scaler.update()
    return loss, "" if searching else _trouble(state.injected, parts, loss)


def _read(parts: list[MicroBatch], grads: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The mean loss and the norm of the gradients, a scalar on the CPU; the parts' losses move there too."""
    sizes = [len(losses) for part in parts for losses in part.losses]
    with torch.no_grad():
        norm = torch.linalg.vector_norm(grads).view(1)
        read = torch.cat([*(losses for part in parts for losses in part.losses), norm]).cpu()
    pieces = iter(read.split([*sizes, 1]))
    for part in parts:
        part.losses = [next(pieces) for _ in part.losses]
    return float(torch.stack([part.loss for part in parts]).mean()), next(pieces)[0]


def _trouble(injected: Injected, parts: list[MicroBatch], loss: float) -> str:
    """Says what of a step is not finite, and which pictures at which timesteps may have done it."""
    shown = [
        f"{name} at timestep {int(timestep)}"
        for part in parts
        for name, timestep, own in zip(part.names, part.timesteps, torch.cat(part.losses), strict=True)
        if math.isfinite(loss) or not math.isfinite(float(own))
    ]
    named = ", ".join(shown[:NAMED]) + (f" and {len(shown) - NAMED} more" if len(shown) > NAMED else "")
    if not math.isfinite(loss):
        return f"the loss is not finite ({named})"
    layer = next(
        (
            " ".join(key)
            for key, layer in injected.layers.items()
            if not all(p.grad is None or bool(p.grad.isfinite().all()) for p in (layer.down, layer.up))
        ),
        "",
    )
    where = f"of {layer} " if layer else ""
    return f"the gradient {where}is not finite ({named})"


def _noise_seed(seed: int, number: int) -> int:
    """A seed for each (run, micro-batch), far apart for neighbours."""
    return (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9 + 1) % 2**63
