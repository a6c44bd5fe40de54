"""Fits a run to its machine: memory fallbacks, and what steps before the first one find out.

Each fallback costs time, or nothing, and all but one change a gradient by rounding alone: a base in 8 bits is
another base, by a little. The applied ones, with their steps, are kept in `plan.json`, so that a resumed run
does the same at the same steps.

The learning rate is found by a range test: short training at rates that rise from far too low to far too
high. The loss of a single diffusion batch says nothing, since noise and timesteps are random, so the bare
base predicts each batch too; what counts is the share of the base's loss that the adapter takes away. Source:
L. N. Smith 2017, "Cyclical Learning Rates for Training Neural Networks", section 3.3.
"""

import copy
import importlib
import importlib.util
import math
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from lora_core.backends import compact
from lora_core.backends.onednn import PLAIN, is_prepacked, layout_of, undo_prepack
from lora_core.data.images import Bucket, choose_bucket
from lora_core.errors import OutOfMemory, RunError
from lora_core.evaluate.validator import eval_losses
from lora_core.lora.inject import at_strength
from lora_core.model_files import sizes
from lora_core.model_files.families import is_text_encoder
from lora_core.models.device import cap_memory, limited, out_of_memory, release_failed, use_device
from lora_core.models.load import BaseModel
from lora_core.models.unet import PromptEmbeds
from lora_core.models.vae import decode_latents
from lora_core.runs import events
from lora_core.settings.config import RunConfig
from lora_core.settings.schema import TrainSection, require_package
from lora_core.system.files import free_bytes
from lora_core.train import setup
from lora_core.train.data import Batch, Batches, PromptCache
from lora_core.train.loop import (
    StepSettings,
    TrainState,
    backward_micro_batch,
    mean_loss,
    optimizer_step,
    sample_batch,
    training_steps,
)
from lora_core.train.objectives import PriorBatches, SliderBatches

TIMED_STEPS = 4
"""The first one warms up and does not count."""
MAX_SECONDS = 20.0
"""No further step is timed after this many seconds."""
CAPTION = "a picture of something"
CFG_BATCH = 2
"""What one step of a sampler puts through the UNet: with the prompt and without."""
TEMPORARIES = 2
"""Tensors as large as all trained parameters that an optimizer may allocate in a step besides its state."""
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
class Fallback:
    """One way to take less memory: its name in `plan.json`, whether it can be applied now, what applies it,
    and whether gradients stay the same but for rounding."""

    name: str
    possible: "Callable[[MemoryFallback], bool]"
    apply: "Callable[[MemoryFallback], None]"
    exact: bool = True


@dataclass
class MemoryFallback:
    """Applies fallbacks to the training of one run.

    Attributes:
        state: what trains.
        batch_size: images per micro-batch.
        applied: names of fallbacks with the steps that they were applied after; the list is added to.
        offload_folder: on whose drive the base may be offloaded to.
    """

    state: TrainState
    batch_size: int
    applied: list[tuple[str, int]]
    offload_folder: Path | None = None
    _count: int = 0
    _step: int = 0

    def apply_until(self, step: int) -> None:
        """Apply what an earlier process applied after `step` steps or fewer.

        Raises:
            ConfigError: the package of the 8-bit optimizer is no longer installed.
        """
        self._step = step
        while self._count < len(self.applied) and self.applied[self._count][1] <= step:
            name = self.applied[self._count][0]
            self._count += 1
            fallback = next((each for each in FALLBACKS if each.name == name), None)
            if fallback is not None and fallback.possible(self):
                fallback.apply(self)
            elif name == sizes.OPTIMIZER_8BIT:
                # The checkpoints hold a state that no other optimizer can read.
                package = sizes.BITSANDBYTES
                require_package("AdamW in 8 bits, which this run has begun with,", package, package)

    @property
    def next(self) -> Fallback | None:
        """The fallback that `apply_next` would apply."""
        order = FALLBACKS_WITHIN_A_RUN if self._step else FALLBACKS
        return next((each for each in order if each.possible(self)), None)

    def apply_next(self, step: int) -> str:
        """Apply the next fallback, from the step after `step` on; returns its description.

        Raises:
            OutOfMemory: there is none left.
        """
        self.apply_until(step)
        fallback = self.next
        if fallback is None:
            raise OutOfMemory(self._nothing_left())
        # Plans for later steps no longer apply.
        del self.applied[self._count :]
        self.applied.append((fallback.name, step))
        self.apply_until(step)
        return sizes.FALLBACKS[fallback.name]

    def _nothing_left(self) -> str:
        unet = self.state.base.denoiser
        tried = ["checkpointing is on"]
        tried += ["images go through one at a time"] if self.state.chunks > 1 else []
        bits = compact.quantized_bits(unet)
        tried += [f"the base is kept in {bits} bits"] if bits else []
        tried += ["the base waits outside of the device's memory"] if compact.is_offloaded(unet) else []
        listed = " and ".join((", ".join(tried[:-1]), tried[-1]) if tried[1:] else tried)
        others = ""
        if any(map(is_text_encoder, self.state.injected.parts())):
            others = " or train no text encoder, so that they can leave the device,"
        if not compact.is_offloaded(unet):
            others += " or make room on the workspace's drive, where the base could wait,"
        if not importlib.util.find_spec(sizes.BITSANDBYTES):
            others += f" or install {sizes.BITSANDBYTES} for an 8-bit optimizer,"
        return (
            f"The device ran out of memory although {listed}; lower train.resolution or adapter.rank,"
            f"{others} or close other programs that use the device. Everything saved is complete."
        )


def _can_move_text_encoders(memory: MemoryFallback) -> bool:
    encoders = memory.state.base.text_encoders.values()
    trained = any(is_text_encoder(part) for part in memory.state.injected.parts())
    return not trained and any(not setup.is_on_cpu(encoder) for encoder in encoders)


def _move_text_encoders(memory: MemoryFallback) -> None:
    for part in memory.state.base.text_encoders:
        memory.state.base.put(part, torch.device("cpu"))


def _undo_prepacking(memory: MemoryFallback) -> None:
    for module in memory.state.base.modules.values():
        undo_prepack(module)


def _halve_chunks(memory: MemoryFallback) -> None:
    memory.state.chunks *= 2


def _can_use_8bit_adamw(memory: MemoryFallback) -> bool:
    optimizer = memory.state.optimizer
    fresh = type(optimizer) is torch.optim.AdamW and not optimizer.state
    fresh = fresh and not any(group["amsgrad"] or group["maximize"] for group in optimizer.param_groups)
    return fresh and _has_8bit_adamw(memory.state.flat_params.data.device)


def _has_8bit_adamw(device: torch.device) -> bool:
    """Whether bitsandbytes is installed and can take a step on a device, which its build may have no code
    for."""
    if importlib.util.find_spec(sizes.BITSANDBYTES) is None:
        return False
    try:
        values = setup.try_step(_class_8bit_adamw(), device)
    except (ImportError, OSError, RuntimeError, AttributeError, NameError):
        return False
    return bool(values.isfinite().all() and values.all())


def _class_8bit_adamw() -> Callable[[Any], torch.optim.Optimizer]:
    made: Callable[[Any], torch.optim.Optimizer]
    made = importlib.import_module(f"{sizes.BITSANDBYTES}.optim").AdamW8bit
    return made


def _use_8bit_adamw(memory: MemoryFallback) -> None:
    known = ("params", "lr", "initial_lr", "until", "betas", "eps", "weight_decay")
    groups = [{key: group[key] for key in known} for group in memory.state.optimizer.param_groups]
    memory.state.optimizer = _class_8bit_adamw()(groups)


def _can_quantize(memory: MemoryFallback) -> bool:
    # An offloaded base leaves nothing to save.
    unet = memory.state.base.denoiser
    return not compact.quantized_bits(unet) and not compact.is_offloaded(unet)


def _can_offload(memory: MemoryFallback) -> bool:
    unet, device, folder = memory.state.base.denoiser, memory.state.base.device, memory.offload_folder
    if compact.is_offloaded(unet) or folder is None:
        return False
    need = sum(tensor.nbytes for tensor in (*unet.parameters(), *unet.buffers()))
    room = psutil.virtual_memory().available if device.type == "cuda" else free_bytes(folder)
    return room > need + sizes.OFFLOAD_SPARE


def _offload(memory: MemoryFallback) -> None:
    assert memory.offload_folder is not None
    store = compact.offload_store_for(memory.state.base.device, memory.offload_folder)
    compact.WeightPolicy(None, store).apply_to(memory.state.base.denoiser)


FALLBACKS = (
    Fallback(
        sizes.VAE_ON_CPU,
        lambda memory: not setup.is_on_cpu(memory.state.base.vae),
        lambda memory: memory.state.base.put("vae", torch.device("cpu")),
    ),
    Fallback(sizes.TEXT_ON_CPU, _can_move_text_encoders, _move_text_encoders),
    Fallback(
        sizes.PLAIN_LAYOUT,
        lambda memory: any(map(is_prepacked, memory.state.base.modules.values())),
        _undo_prepacking,
    ),
    Fallback(
        sizes.CHECKPOINTING,
        lambda memory: not memory.state.base.denoiser.is_gradient_checkpointing,
        lambda memory: setup.enable_checkpointing(memory.state.base),
    ),
    Fallback(sizes.HALVES, lambda memory: memory.state.chunks < memory.batch_size, _halve_chunks),
    Fallback(sizes.OPTIMIZER_8BIT, _can_use_8bit_adamw, _use_8bit_adamw),
    Fallback(
        sizes.INT8,
        _can_quantize,
        lambda memory: compact.WeightPolicy(compact.quantize_int8).apply_to(memory.state.base.denoiser),
        exact=False,
    ),
    Fallback(sizes.OFFLOAD, _can_offload, _offload),
)
"""In the order in which they are applied before the first step."""
FALLBACKS_WITHIN_A_RUN = tuple(sorted(FALLBACKS, key=lambda each: not each.exact))
"""The order after the first step. The adapter fits its base by then, so the base changes last; before the
first step 8 bits come before offloading, because they cost far less time."""


def free_memory(state: TrainState, error: BaseException | None = None) -> None:
    """Release all that a failed step holds."""
    state.flat_params.zero_grad()
    release_failed(error, state.base.device)


def next_base_fallback(train: TrainSection, applied: list[tuple[str, int]]) -> str:
    """The next fallback that makes the base itself smaller, for one that does not fit when loaded, or ""."""
    done = {name for name, _ in applied}
    done |= {sizes.INT8} if train.quantize_base != "none" else set()
    done |= {sizes.OFFLOAD} if train.offload else set()
    return next((name for name in (sizes.INT8, sizes.OFFLOAD) if name not in done), "")


def run_range_test(
    session: setup.TrainSession, settings: StepSettings, on_progress: setup.OnProgress
) -> tuple[list[float], list[float], int]:
    """Find the factor for all learning rates before the first step; the state is as before afterwards.

    Returns:
        Rising rates of the first group; for each, the share of the base's loss that the adapter took away
        after training at the rates up to it; and the octave: all rates are to be multiplied by 2 to this, a
        power of two, so that nothing is rounded.

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
    return rates, shares, choose_octave(shares)


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
            " a number, or look whether the images, the captions and the layers are as they should be."
        )
    half = next(number for number, share in enumerate(smooth) if share >= best / 2)
    return round(LOWEST + half / EACH + ABOVE_HALF)


def _smooth(shares: list[float]) -> list[float]:
    """The running median; one wild batch does not count."""
    parts = [shares[max(0, place - WINDOW) : place + WINDOW + 1] for place in range(len(shares))]
    return [statistics.median(part) for part in parts]


def _share(session: setup.TrainSession, settings: StepSettings, number: int) -> float:
    """Train on micro-batch `number`; the share of the base's loss on it that the adapter took away before."""
    state = session.state
    batch, draw = sample_batch(state, session.batches, settings, number)
    with torch.no_grad(), at_strength(state.injected, 0.0):
        bare = state.loss(state, session.text, batch, slice(None), draw, settings.config).mean()
    state.flat_params.zero_grad()
    loss = backward_micro_batch(state, session.batches, session.text, settings, number)
    losses, ok = optimizer_step(state, settings.config.optimizer.max_grad_norm, [loss], number + 1)
    return 1.0 - mean_loss(losses) / max(float(bare), 1e-12) if ok else math.nan


def autotune(
    session: setup.TrainSession, memory: MemoryFallback, settings: StepSettings, plan: setup.RuntimePlan,
    fresh: bool, on_progress: setup.OnProgress,
) -> tuple[setup.RuntimePlan, list[events.Event]]:  # fmt: skip
    """Choose what `plan` lacks before the first step; `fresh` if none was ever taken.

    Returns:
        The plan, and the events that tell of it.

    Raises:
        OutOfMemory: a step does not fit by any means.
        RunError: the range test learned nothing.
    """
    state, optim = session.state, settings.config.optimizer
    found: list[events.Event] = []
    if not plan.layout:
        layouts = map(layout_of, state.base.modules.values())
        plan = replace(plan, layout=next((one for one in layouts if one != PLAIN), PLAIN))
    if not plan.tried and (fresh or plan.cap) and limited(state.base.device):
        on_progress("Trying the heaviest step", 0, 1)
        warnings, peak = fit_memory(session, memory, settings, optim.row.state)
        found += [events.Warned(message=warning) for warning in warnings]
        plan = replace(plan, rungs=memory.applied, tried=True, peak=peak)
    if optim.range_test and plan.octave is None:
        rates, shares, octave = run_range_test(session, settings, on_progress)
        for group in state.optimizer.param_groups:
            # To the very bits that a config with these rates gives.
            group["lr"] = group["initial_lr"] = group["initial_lr"] * 2.0**octave
        plan = replace(plan, octave=octave)
        rate = plan.with_lr(settings.config).optimizer.lr
        found.append(events.RateFound(rate=rate, rates=rates, shares=shares))
    return plan, found


def fit_memory(
    session: setup.TrainSession, memory: MemoryFallback, settings: StepSettings, optimizer_state: float
) -> tuple[list[str], int]:
    """Try the heaviest step, a validation and a sample at step 0, and apply fallbacks until they fit.

    `optimizer_state`: how many values the optimizer keeps for each trained parameter.

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
        if memory.next is None or memory.next.name not in sizes.ON_CPU:
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


def _try_step(session: setup.TrainSession, settings: StepSettings, optimizer_state: float) -> None:
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
        side = session.validation_sets.forgetting.side
        _guided_pass(session, side, side)
    del held


def _try_sample(session: setup.TrainSession) -> None:
    """Allocate what the largest sample takes: guided predictions, and decoded latents."""
    base = session.state.base
    sizes = [base.image_size(sample.width, sample.height) for sample in session.samples]
    latents = _guided_pass(session, *max(sizes, key=math.prod))
    decode_latents(base, latents)


def _guided_pass(session: setup.TrainSession, width: int, height: int) -> torch.Tensor:
    """Predict with and without a prompt, as classifier-free guidance does, for an image of `width` x `height`
    pixels; returns the latents, (1, C, h, w)."""
    base = session.state.base
    factor = base.vae_scale_factor
    latents = torch.zeros(1, base.latent_channels, height // factor, width // factor, device=base.device)
    text = PromptEmbeds.cat([session.text.embed_negative(), session.text.embed("")])
    with torch.no_grad():
        base.predict_noise(torch.cat([latents, latents]), torch.zeros(1, device=base.device).long(), text)
    return latents


def time_steps(
    config: RunConfig, offload_folder: Path, on_step: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Take some training steps and a sampler's step of these settings. Nothing is kept in memory afterwards.

    The images are noise, since their content costs nothing. `offload_folder` is on the drive that weights may
    be offloaded to; `on_step` is called with (done, total) and may raise to end the measurement.

    Returns:
        step and draw (seconds of a training step and of a sampler's step), steps (how many counted), peak
        (bytes of the device's memory, 0 on a CPU) and device (its kind).

    Raises:
        OutOfMemory: a step does not fit.
    """
    try:
        return _time_steps(config, offload_folder, on_step or (lambda done, total: None))
    except Exception as error:
        full = out_of_memory(error)
        # Its frames hold the base for as long as the error is known.
        traceback.clear_frames(error.__traceback__)
        if not full:
            raise
        raise OutOfMemory(
            "A step did not fit into memory as it is, so the run would take slower ways that need less; with"
            " a lower train.batch_size or train.resolution it needs none."
        ) from None


def _time_steps(
    config: RunConfig, offload_folder: Path, on_step: Callable[[int, int], None]
) -> dict[str, Any]:
    train, device = config.train, use_device(config.train.device)
    cap_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    base = setup.open_base_for(config, device, setup.training_dtype(config, device), [], offload_folder)
    base.load(*base.text_encoders)
    layout = setup.plan_adapter(base, config)
    tokens = train.max_token_length
    slider = config.slider
    text = PromptCache(base, offload_folder / "text", layout.encoders_trained, train.clip_skip, tokens)
    if not layout.encoders_trained:
        text.embed_batch([CAPTION])
        for caption in slider.captions():
            text.embed(caption)
        text.release()
    base.load(base.family.denoiser, "vae")
    on_step(0, TIMED_STEPS)
    side = config.resolution(base.resolution)
    bucket = choose_bucket(side, side, side, base.size_multiple)
    batches: Batches = (
        SliderBatches(base, slider, train.batch_size, bucket.width, 0)
        if slider.on
        else _Noise(base, bucket, train.batch_size)
    )
    state, _ = setup.build_train_state(base, layout, config, "")
    if config.keeps_prior:
        noise = batches.batch(0)
        state.prior = PriorBatches([(noise.latents[0], CAPTION)], noise.sizes[0], train.batch_size, 0)
    seconds: list[float] = []
    for step in training_steps(state, batches, text, StepSettings(config, TIMED_STEPS), 0):
        seconds.append(step.seconds)
        on_step(len(seconds), TIMED_STEPS)
        if len(seconds) > 1 and sum(seconds) > MAX_SECONDS:
            break
    # Where one step takes a minute, warming up is the least of it.
    counted = seconds[1:] or seconds
    return {
        "step": statistics.median(counted),
        "draw": _time_sampler_step(base, text.embed_batch([CAPTION])),
        "steps": len(counted),
        "peak": int(torch.cuda.max_memory_reserved(device) + sizes.CONTEXT) if device.type == "cuda" else 0,
        "device": device.type,
    }


class _Noise(Batches):
    """Micro-batches of noise, all of one size."""

    def __init__(self, base: BaseModel, bucket: Bucket, count: int) -> None:
        side = base.vae_scale_factor
        shape = (count, base.latent_channels, bucket.height // side, bucket.width // side)
        self._latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        size = [bucket.height, bucket.width]
        self._sizes = torch.tensor([[*size, 0, 0, *size]] * count, dtype=torch.float32)

    def batch(self, number: int) -> Batch:
        """The same each time."""
        count = len(self._latents)
        return Batch(self._latents, [CAPTION] * count, ["noise"] * count, self._sizes)


def _time_sampler_step(base: BaseModel, text: PromptEmbeds) -> float:
    """Seconds of a sampler's step at the base's own size, the faster of two."""
    side = base.resolution // base.vae_scale_factor
    latents = torch.randn(CFG_BATCH, base.latent_channels, side, side).to(base.device)
    timesteps = torch.full((CFG_BATCH,), base.noise.num_timesteps // 2, device=base.device)
    base.denoiser.eval()
    taken = []
    with torch.no_grad():
        for _ in range(2):
            began = time.perf_counter()
            # Fetching a number waits for the device.
            float(base.predict_noise(latents, timesteps, text.expand(CFG_BATCH)).float().sum())
            taken.append(time.perf_counter() - began)
    return min(taken)
