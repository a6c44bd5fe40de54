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
from dataclasses import dataclass, replace

import torch

from lora_core.backends.onednn import PLAIN, layout_of
from lora_core.errors import RunError
from lora_core.evaluate.validator import eval_losses
from lora_core.models.device import limited, out_of_memory
from lora_core.models.encode import decode_latents
from lora_core.models.unet import PromptEmbeds
from lora_core.runs import events
from lora_core.settings.choices import OPTIMIZERS
from lora_core.settings.config import RunConfig
from lora_core.train.loop import (
    StepSettings,
    TrainState,
    backward_micro_batch,
    mean_loss,
    optimizer_step,
    sample_batch,
)
from lora_core.train.loss import diffusion_loss
from lora_core.train.oom import VAE_ON_CPU, MemoryFallback, free_memory
from lora_core.train.setup import OnProgress, RuntimePlan, TrainSession
from lora_core.train.validation import at_strength

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
class RangeTestResult:
    """What was found.

    Attributes:
        rates: of the first group, rising.
        shares: of the base's loss that the adapter took away after training at the rates up to it.
        octave: all rates are to be multiplied by 2 to this; a power of two, so that nothing is rounded.
    """

    rates: list[float]
    shares: list[float]
    octave: int


def run_range_test(
    session: TrainSession, plan: StepSettings, say: Callable[[str, int, int], None]
) -> RangeTestResult:
    """Find how all rates should be multiplied; everything is as it was afterwards.

    Args:
        session: the run before its first step; no other process takes part.
        plan: of its steps.
        say: called with (phase, done, all); what it raises ends the test.

    Raises:
        RunError: nothing was learned at any rate.
    """
    state = session.state
    groups = state.optimizer.param_groups
    numbers = state.flat_params.data.detach().clone()
    optimizer, scaler = copy.deepcopy(state.optimizer.state_dict()), state.scaler.state_dict()
    average, state.average = state.average, None
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
        with state.flat_params.mutate() as live:
            live.copy_(numbers)
        state.optimizer.load_state_dict(optimizer)
        state.scaler.load_state_dict(scaler)
        state.flat_params.zero_grad()
        state.average = average
    return RangeTestResult(rates, shares, choose_octave(shares))


def scale_learning_rates(optimizer: torch.optim.Optimizer, octave: int) -> None:
    """Multiply all rates by 2 to `octave`, to the very bits that a config with those rates gives."""
    for group in optimizer.param_groups:
        group["initial_lr"] *= 2.0**octave
        group["lr"] = group["initial_lr"]


def choose_octave(shares: list[float]) -> int:
    """The octave to take for shares that were reached at rates `EACH` an octave from `LOWEST` on.

    Raises:
        RunError: they are all next to nothing.
    """
    smooth = _smooth(shares)
    best = max(smooth, default=0.0)
    if best < LEAST:
        raise RunError(
            "The range test learned nothing at any rate, so optimizer.lr = auto finds none; give optimizer.lr"
            " a number, or look whether the pictures, the captions and the layers are as they should be."
        )
    half = next(number for number, share in enumerate(smooth) if share >= best / 2)
    return round(LOWEST + half / EACH + ABOVE_HALF)


def _smooth(shares: list[float]) -> list[float]:
    """The median of each and its neighbours; one wild batch is no find."""
    parts = [shares[max(0, place - WINDOW) : place + WINDOW + 1] for place in range(len(shares))]
    return [statistics.median(part) for part in parts]


def _step(session: TrainSession, plan: StepSettings, number: int) -> float:
    """Train on micro-batch `number`; the share of the base's loss on it that the adapter took away before."""
    state, base = session.state, session.state.base
    batch, draw = sample_batch(state, session.batches, plan, number)
    with torch.no_grad(), at_strength(state.injected, 0.0):
        condition = session.text.embed_batch(batch.captions)
        bare = diffusion_loss(base, batch.latents, condition, draw, plan.loss, batch.sizes).mean()
    state.flat_params.zero_grad()
    loss = backward_micro_batch(state, session.batches, session.text, plan, number)
    losses, ok = optimizer_step(state, plan.max_grad_norm, [loss], number + 1)
    return 1.0 - mean_loss(losses) / max(float(bare), 1e-12) if ok else math.nan


# The trial: what a run chooses by trying before its first step.
#
# Nothing of the run is changed by it but where its weights lie and at which rates it learns.


TEMPORARIES = 2
"""Tensors as large as all trained numbers that an optimizer's step may make besides its state."""


class Autotune:
    """Chooses for one run, and keeps what there is to tell of it."""

    def __init__(
        self, session: TrainSession, memory: MemoryFallback, config: RunConfig, goal: int, say: OnProgress
    ) -> None:
        """For a run that is to have `goal` steps; `say` may end the trial by what it raises."""
        self.found: list[events.Event] = []
        self._session = session
        self._memory = memory
        self._config = config
        self._steps = StepSettings.of(config, goal)
        self._say = say

    def plan(self, plan: RuntimePlan, fresh: bool) -> RuntimePlan:
        """The plan with all that it lacks; `fresh` where no step was ever taken.

        Raises:
            OutOfMemory: a step does not fit by any means.
            RunError: the range test learned nothing.
        """
        state = self._session.state
        if not plan.layout:
            layouts = map(layout_of, state.base.modules.values())
            plan = replace(plan, layout=next((one for one in layouts if one != PLAIN), PLAIN))
        if not plan.tried and (fresh or plan.cap) and limited(state.base.device):
            self._say("Trying the heaviest step", 0, 1)
            optimizer_state = OPTIMIZERS[self._config.optimizer.name].state
            told, peak = fit_memory(self._session, self._memory, self._steps, optimizer_state)
            self.found += [events.Warned(message=sentence) for sentence in told]
            plan = replace(plan, rungs=self._memory.applied, tried=True, peak=peak)
        if self._config.optimizer.range_test and plan.octave is None:
            found = run_range_test(self._session, self._steps, self._say)
            scale_learning_rates(state.optimizer, found.octave)
            plan = replace(plan, octave=found.octave)
            rate = plan.rated(self._config).optimizer.lr
            self.found.append(events.RateFound(rate=rate, rates=found.rates, shares=found.shares))
        return plan


def fit_memory(
    session: TrainSession, memory: MemoryFallback, plan: StepSettings, optimizer_state: float
) -> tuple[list[str], int]:
    """Try the heaviest step, a validation and a sample before the first real one, and climb until they fit.

    Args:
        session: the run, at step 0.
        ladder: takes the rungs.
        plan: of the steps.
        optimizer_state: how many numbers the optimizer keeps for each that is trained.

    Returns:
        What there is to tell a person, and the peak in bytes where the device tells it.

    Raises:
        OutOfMemory: it does not fit with all rungs taken.
    """
    state = session.state
    told: list[str] = []
    device = state.base.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    while not _fits(state, lambda: _try_step(session, plan, optimizer_state)):
        told.append(f"The heaviest step does not fit into memory as it is. {memory.apply_next(0)}")
    while not _fits(state, lambda: _try_sample(session)):
        if memory.next is None or memory.next.name != VAE_ON_CPU:
            told.append("Samples do not fit into memory beside the training, so they may be left out.")
            break
        told.append(f"Samples do not fit into memory as it is. {memory.apply_next(0)}")
    return told, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _fits(state: TrainState, work: Callable[[], None]) -> bool:
    try:
        work()
        return True
    except Exception as error:
        if not out_of_memory(error):
            raise
        free_memory(state, error)
        return False
    finally:
        free_memory(state)


def _try_step(session: TrainSession, plan: StepSettings, optimizer_state: float) -> None:
    """What a step and a validation take, with nothing changed by it."""
    state, base = session.state, session.state.base
    numbers = sum(tensor.numel() for tensor in state.injected.parameters())
    held = torch.empty(int(optimizer_state * numbers), device=base.device)
    backward_micro_batch(state, session.batches, session.text, plan, session.batches.heaviest())
    temporary = torch.empty(TEMPORARIES * numbers, device=base.device)
    del temporary
    state.flat_params.zero_grad()
    if session.validation_sets.held_out:
        largest = max(session.validation_sets.held_out, key=lambda measured: measured.latents.numel())
        eval_losses(base, [largest], session.text.embed)
    if session.validation_sets.forgetting is not None:
        _guided_pass(session, session.validation_sets.forgetting.side)
    del held


def _try_sample(session: TrainSession) -> None:
    """What a sample takes: guided predictions, and the latents turned into an image."""
    base = session.state.base
    latents = _guided_pass(session, base.resolution)
    decode_latents(base, latents)


def _guided_pass(session: TrainSession, side: int) -> torch.Tensor:
    """One prediction with and without a prompt, as classifier-free guidance makes it, for an image of `side`
    pixels; returns the latents that it began with, (1, C, h, w)."""
    base = session.state.base
    edge = side // base.vae_scale_factor
    latents = torch.zeros(1, base.latent_channels, edge, edge, device=base.device)
    text = PromptEmbeds.cat([session.text.embed_negative(), session.text.embed("")])
    with torch.no_grad():
        base.predict_noise(torch.cat([latents, latents]), torch.zeros(1, device=base.device).long(), text)
    return latents
