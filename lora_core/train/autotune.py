"""What a run chooses by trying before its first step: memory fallbacks, and the learning rate.

Nothing else of the run is changed by it. The learning rate is found by a range test: short training at rates
that rise from far too low to far too high. The loss of a single diffusion batch says nothing, since noise and
timesteps are random, so the bare base predicts each batch too; what counts is the share of the base's loss
that the adapter takes away. Source: L. N. Smith 2017, "Cyclical Learning Rates for Training Neural Networks",
section 3.3.
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
"""Octaves around the rate that is set, and steps per octave."""
WINDOW = 2
"""Neighbours on each side, for the running median of shares."""
SPOILED = 0.5
"""The test ends where less than this part of the best share is left."""
LEAST = 0.01
"""A best share below this is noise."""
ABOVE_HALF = 1.0
"""Octaves from where half of the best share is reached to the rate that is taken: on two sets and with two
choices of layers that gained 94% to 100% of what the best fixed rate did (docs/sweep.md)."""


@dataclass(frozen=True)
class RangeTestResult:
    """The result of a range test.

    Attributes:
        rates: of the first group, rising.
        shares: of the base's loss that the adapter took away after training at the rates up to it.
        octave: all rates are to be multiplied by 2 to this; a power of two, so that nothing is rounded.
    """

    rates: list[float]
    shares: list[float]
    octave: int


def run_range_test(session: TrainSession, settings: StepSettings, on_progress: OnProgress) -> RangeTestResult:
    """Find the factor for all learning rates; the state is as before afterwards.

    Args:
        session: the run before its first step; no other process takes part.
        settings: of its steps.
        on_progress: called with (phase, done, total); what it raises ends the test.

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
            on_progress("Finding the learning rate", number, count)
            factor = 2.0 ** (LOWEST + number / EACH)
            for group in groups:
                group["lr"] = group["initial_lr"] * factor
            share = _share(session, settings, number)
            if not math.isfinite(share):
                break
            rates.append(groups[0]["lr"])
            shares.append(share)
            smooth = _smooth(shares)
            if smooth[-1] < SPOILED * max(smooth) - LEAST:
                break
        on_progress("Finding the learning rate", count, count)
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
    """Choose the octave, given the shares at `EACH` rates per octave from `LOWEST` on.

    Raises:
        RunError: none is above noise.
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
    """The running median; one wild batch does not count."""
    parts = [shares[max(0, place - WINDOW) : place + WINDOW + 1] for place in range(len(shares))]
    return [statistics.median(part) for part in parts]


def _share(session: TrainSession, settings: StepSettings, number: int) -> float:
    """Train on micro-batch `number`; the share of the base's loss on it that the adapter took away before."""
    state, base = session.state, session.state.base
    batch, draw = sample_batch(state, session.batches, settings, number)
    with torch.no_grad(), at_strength(state.injected, 0.0):
        condition = session.text.embed_batch(batch.captions)
        bare = diffusion_loss(base, batch.latents, condition, draw, settings.loss, batch.sizes).mean()
    state.flat_params.zero_grad()
    loss = backward_micro_batch(state, session.batches, session.text, settings, number)
    losses, ok = optimizer_step(state, settings.max_grad_norm, [loss], number + 1)
    return 1.0 - mean_loss(losses) / max(float(bare), 1e-12) if ok else math.nan


TEMPORARIES = 2
"""Tensors as large as all trained parameters that an optimizer may allocate in a step besides its state."""


def autotune(
    session: TrainSession,
    memory: MemoryFallback,
    config: RunConfig,
    settings: StepSettings,
    plan: RuntimePlan,
    fresh: bool,
    on_progress: OnProgress,
) -> tuple[RuntimePlan, list[events.Event]]:
    """Choose what `plan` lacks.

    Args:
        session: the run before its first step.
        memory: its fallbacks.
        config: its settings.
        settings: of its steps.
        plan: what was chosen before.
        fresh: whether no step was ever taken.
        on_progress: called with (phase, done, total); what it raises ends the work.

    Returns:
        The plan, and the events that tell of it.

    Raises:
        OutOfMemory: a step does not fit by any means.
        RunError: the range test learned nothing.
    """
    state = session.state
    found: list[events.Event] = []
    if not plan.layout:
        layouts = map(layout_of, state.base.modules.values())
        plan = replace(plan, layout=next((one for one in layouts if one != PLAIN), PLAIN))
    if not plan.tried and (fresh or plan.cap) and limited(state.base.device):
        on_progress("Trying the heaviest step", 0, 1)
        warnings, peak = fit_memory(session, memory, settings, OPTIMIZERS[config.optimizer.name].state)
        found += [events.Warned(message=warning) for warning in warnings]
        plan = replace(plan, rungs=memory.applied, tried=True, peak=peak)
    if config.optimizer.range_test and plan.octave is None:
        test = run_range_test(session, settings, on_progress)
        scale_learning_rates(state.optimizer, test.octave)
        plan = replace(plan, octave=test.octave)
        rate = plan.with_lr(config).optimizer.lr
        found.append(events.RateFound(rate=rate, rates=test.rates, shares=test.shares))
    return plan, found


def fit_memory(
    session: TrainSession, memory: MemoryFallback, settings: StepSettings, optimizer_state: float
) -> tuple[list[str], int]:
    """Try the heaviest step, a validation and a sample, and apply fallbacks until they fit.

    Args:
        session: the run, at step 0.
        memory: its fallbacks.
        settings: of its steps.
        optimizer_state: how many values the optimizer keeps for each trained parameter.

    Returns:
        Warnings for the user, and the peak in bytes where the device tells it, else 0.

    Raises:
        OutOfMemory: it does not fit with all fallbacks.
    """
    state = session.state
    warnings: list[str] = []
    device = state.base.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    while not _fits(state, lambda: _try_step(session, settings, optimizer_state)):
        warnings.append(f"The heaviest step does not fit into memory as it is. {memory.apply_next(0)}")
    while not _fits(state, lambda: _try_sample(session)):
        if memory.next is None or memory.next.name != VAE_ON_CPU:
            warnings.append("Samples do not fit into memory beside the training, so they may be left out.")
            break
        warnings.append(f"Samples do not fit into memory as it is. {memory.apply_next(0)}")
    return warnings, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


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


def _try_step(session: TrainSession, settings: StepSettings, optimizer_state: float) -> None:
    """Allocate what a step and a validation take, and change nothing."""
    state, base = session.state, session.state.base
    parameters = sum(tensor.numel() for tensor in state.injected.parameters())
    held = torch.empty(int(optimizer_state * parameters), device=base.device)
    backward_micro_batch(state, session.batches, session.text, settings, session.batches.heaviest())
    temporary = torch.empty(TEMPORARIES * parameters, device=base.device)
    del temporary
    state.flat_params.zero_grad()
    if session.validation_sets.held_out:
        largest = max(session.validation_sets.held_out, key=lambda image: image.latents.numel())
        eval_losses(base, [largest], session.text.embed)
    if session.validation_sets.forgetting is not None:
        _guided_pass(session, session.validation_sets.forgetting.side)
    del held


def _try_sample(session: TrainSession) -> None:
    """Allocate what a sample takes: guided predictions, and decoded latents."""
    base = session.state.base
    latents = _guided_pass(session, base.resolution)
    decode_latents(base, latents)


def _guided_pass(session: TrainSession, side: int) -> torch.Tensor:
    """Predict with and without a prompt, as classifier-free guidance does, for an image of `side` pixels;
    returns the latents, (1, C, h, w)."""
    base = session.state.base
    edge = side // base.vae_scale_factor
    latents = torch.zeros(1, base.latent_channels, edge, edge, device=base.device)
    text = PromptEmbeds.cat([session.text.embed_negative(), session.text.embed("")])
    with torch.no_grad():
        base.predict_noise(torch.cat([latents, latents]), torch.zeros(1, device=base.device).long(), text)
    return latents
