"""The range test: short training at rates that rise from far too low to far too high, which finds the rate.

Source: L. N. Smith 2017, "Cyclical Learning Rates for Training Neural Networks", section 3.3. The loss of a
batch of diffusion training says nothing by itself, since noise and timesteps are drawn at random; so each
batch is predicted by the bare base too, and what counts is the share of the base's loss that the adapter
takes away.
"""

import copy
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lora_core.spec.errors import RunError
from lora_core.training.between import at_strength
from lora_core.training.loop import StepPlan, drawn_batch, micro_batch, take_step
from lora_core.training.loss import picture_losses
from lora_core.training.prepare import Session

LOWEST, HIGHEST, EACH = -4, 8, 4
"""Octaves around the rate that is set, and steps an octave."""
WINDOW = 2
"""Neighbours on each side that a share is looked at with."""
SPOILED = 0.5
"""The test ends where less than this share of the best is left."""
LEAST = 0.01
"""A best share below this is noise."""
ABOVE_HALF = 1.0
"""Octaves from where half of the best share is reached to the rate that is taken: on two sets and with two
choices of layers that gained 94% to 100% of what the best fixed rate did (docs/sweep.md)."""


@dataclass(frozen=True)
class RangeTest:
    """What was found.

    Attributes:
        rates: of the first group, rising.
        shares: of the base's loss that the adapter took away after training at the rates up to it.
        octave: all rates are to be multiplied by 2 to this; a power of two, so that nothing is rounded.
    """

    rates: list[float]
    shares: list[float]
    octave: int


def range_tested(session: Session, plan: StepPlan, say: Callable[[str, int, int], None]) -> RangeTest:
    """Find how all rates should be multiplied; everything is as it was afterwards.

    Args:
        session: the run before its first step; no other process takes part.
        plan: of its steps.
        say: called with (phase, done, all); what it raises ends the test.

    Raises:
        RunError: nothing was learned at any rate.
    """
    trainee = session.trainee
    groups = trainee.optimizer.param_groups
    numbers = trainee.storage.whole.detach().clone()
    optimizer, scaler = copy.deepcopy(trainee.optimizer.state_dict()), trainee.scaler.state_dict()
    average, trainee.average = trainee.average, None
    count = (HIGHEST - LOWEST) * EACH + 1
    rates: list[float] = []
    shares: list[float] = []
    try:
        for number in range(count):
            say("Finding the learning rate", number, count)
            factor = 2.0 ** (LOWEST + number / EACH)
            for group in groups:
                group["lr"] = group["initial_lr"] * factor
            share = _step(session, plan, number)
            if not math.isfinite(share):
                break
            rates.append(groups[0]["lr"])
            shares.append(share)
            smooth = _smooth(shares)
            if smooth[-1] < SPOILED * max(smooth) - LEAST:
                break
        say("Finding the learning rate", count, count)
    finally:
        with trainee.storage.writing() as live:
            live.copy_(numbers)
        trainee.optimizer.load_state_dict(optimizer)
        trainee.scaler.load_state_dict(scaler)
        trainee.storage.clear()
        trainee.average = average
    return RangeTest(rates, shares, chosen_octave(shares))


def take_rates(optimizer: torch.optim.Optimizer, octave: int) -> None:
    """Multiply all rates by 2 to `octave`, to the very bits that a config with those rates gives."""
    for group in optimizer.param_groups:
        group["initial_lr"] *= 2.0**octave
        group["lr"] = group["initial_lr"]


def chosen_octave(shares: list[float]) -> int:
    """The octave to take for shares that were reached at rates `EACH` an octave from `LOWEST` on.

    Raises:
        RunError: they are all next to nothing.
    """
    smooth = _smooth(shares)
    best = max(smooth, default=0.0)
    if best < LEAST:
        raise RunError(
            "The range test learned nothing at any rate, so that optim.lr = auto finds none; give optim.lr a"
            " number, or look whether the pictures, the captions and the layers are as they should be."
        )
    half = next(number for number, share in enumerate(smooth) if share >= best / 2)
    return round(LOWEST + half / EACH + ABOVE_HALF)


def _smooth(shares: list[float]) -> list[float]:
    """The median of each and its neighbours; one wild batch is no find."""
    parts = [shares[max(0, place - WINDOW) : place + WINDOW + 1] for place in range(len(shares))]
    return [statistics.median(part) for part in parts]


def _step(session: Session, plan: StepPlan, number: int) -> float:
    """Train on micro-batch `number`; the share of the base's loss on it that the adapter took away before."""
    trainee, base = session.trainee, session.trainee.base
    batch, draw = drawn_batch(trainee, session.batches, plan, number)
    with torch.no_grad(), at_strength(trainee.injected, 0.0):
        condition = session.text.conditions(batch.captions)
        bare = picture_losses(base, batch.latents, condition, draw, plan.loss, batch.sizes).mean()
    trainee.storage.clear()
    part = micro_batch(trainee, session.batches, session.text, plan, number)
    loss, trouble = take_step(trainee, plan.clip, [part], number + 1)
    return math.nan if trouble else 1.0 - loss / max(float(bare), 1e-12)
