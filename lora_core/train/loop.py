"""The training loop, a generator that yields after each optimizer step and does only maths, and the loss of
one batch: timesteps and noise are drawn, the UNet predicts, the error is weighed.

A step is a function of (state, settings, step): images, captions, timesteps, noise and dropout follow from
(seed, micro-batch, row), so a resumed run or another process repeats them bit for bit, and no generator's
state is saved. Learning-rate schedules are pure functions of progress for the same reason.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F

from lora_core.lora.inject import Average, Injected, limit_norms
from lora_core.lora.layer import FlatParams, stopped_parameters
from lora_core.models.load import BaseModel
from lora_core.models.unet import NoisePredictor, NoiseSchedule, PromptEmbeds, to_device
from lora_core.settings.config import RunConfig
from lora_core.settings.schema import LOSSES, SCHEDULES, LossSection, chosen
from lora_core.train.data import Batch, Batches, PromptCache

CLIP_EPSILON = 1e-6
"""Added to the gradient norm when clipping, as `torch.nn.utils.clip_grad_norm_` does."""


@dataclass(frozen=True)
class NoiseSample:
    """The random draws of one batch, on the CPU: `timesteps` (B,), `noise` (B, 4, h, w), and the noise of the
    input where that is perturbed."""

    timesteps: torch.Tensor
    noise: torch.Tensor
    perturbed: torch.Tensor | None = None

    def rows(self, rows: slice) -> "NoiseSample":
        """The draw of some of the images."""
        perturbed = None if self.perturbed is None else self.perturbed[rows]
        return NoiseSample(self.timesteps[rows], self.noise[rows], perturbed)


@dataclass(frozen=True)
class StepSettings:
    """What a step depends on besides the state and its number: the run's settings, the optimizer steps of the
    run, and a factor of all learning rates, below 1 after a rollback."""

    config: RunConfig
    steps: int
    lr_scale: float = 1.0


@dataclass(frozen=True)
class Step:
    """A finished optimizer step: its number, counted from 1, mean loss, learning rate of the first group,
    duration in seconds; and the losses of each micro-batch where one of them or the gradient is not finite:
    the state is then as before the step."""

    number: int
    loss: float
    lr: float
    seconds: float
    nonfinite: list[torch.Tensor] | None = None


class PartialUpdate(Exception):
    """The optimizer failed midway, so some parameters took the step and others did not; see `__cause__`."""


class SingleProcess:
    """One process trains alone: it computes all rows. `distributed.ProcessGroup` has the same methods."""

    def local_rows(self, count: int) -> slice:
        """Which of the `count` rows of a micro-batch this process computes."""
        return slice(0, count)

    def all_reduce(self, *tensors: torch.Tensor) -> None:
        """Sum each tensor over all processes, in place."""


def image_loss(
    state: "TrainState", text: PromptCache, batch: Batch, rows: slice, draw: NoiseSample, config: RunConfig
) -> torch.Tensor:
    """The loss of some rows of a micro-batch of images, (B,)."""
    weights = None if batch.weights is None else batch.weights[rows]
    embeds, sizes = text.embed_batch(batch.captions[rows]), batch.sizes[rows]
    return diffusion_loss(state.base, batch.latents[rows], embeds, draw, config.loss, sizes, weights)


MicroBatchLoss = Callable[["TrainState", PromptCache, Batch, slice, NoiseSample, RunConfig], torch.Tensor]


class Preserved(Protocol):
    """What of the base is to be kept, micro-batch by micro-batch."""

    def loss(
        self, state: "TrainState", text: PromptCache, rows: slice, number: int, config: RunConfig
    ) -> torch.Tensor:
        """The loss of some rows of micro-batch `number`, (B,)."""


@dataclass
class TrainState:
    """What a step reads and changes: the base with the adapter `injected`, what trains it, and its average if
    one is kept.

    Attributes:
        max_norm: of each layer's update; 0 for no limit.
        loss: of some rows of a micro-batch, (B,); one but `image_loss` may leave the adapter at any strength.
        prior: images of the base's own, on which its predictions are to be kept.
        chunks: how many parts a micro-batch goes through the model in; they add up to the same gradient.
        group: the processes that train together.
    """

    base: BaseModel
    injected: Injected
    optimizer: torch.optim.Optimizer
    flat_params: FlatParams
    scaler: torch.amp.GradScaler
    average: Average | None = None
    max_norm: float = 0.0
    loss: MicroBatchLoss = image_loss
    prior: Preserved | None = None
    chunks: int = 1
    group: SingleProcess = field(default_factory=SingleProcess)


def training_steps(
    state: TrainState, batches: Batches, text: PromptCache, settings: StepSettings, done: int
) -> Iterator[Step]:
    """Train from `done` optimizer steps to `settings.steps`, yielding after each. A step whose loss or
    gradient is not finite counts but changes nothing.

    Raises:
        PartialUpdate: the optimizer failed midway.
    """
    for step in range(done, settings.steps):
        start = time.perf_counter()
        set_learning_rates(state.optimizer, settings, step)
        losses = accumulate_gradients(state, batches, text, settings, step)
        state.group.all_reduce(state.flat_params.grads, *losses)
        losses, ok = optimizer_step(state, settings.config.optimizer.max_grad_norm, losses, step + 1)
        lr, seconds = state.optimizer.param_groups[0]["lr"], time.perf_counter() - start
        yield Step(step + 1, mean_loss(losses), lr, seconds, None if ok else losses)


def set_learning_rates(optimizer: torch.optim.Optimizer, settings: StepSettings, step: int) -> None:
    """Set each group's rate for the step after `step` others; 0 after a group's share `until` of the run."""
    section = settings.config.optimizer
    factor = settings.lr_scale * lr_factor(step, settings.steps, section.schedule, section.warmup)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor if step < group["until"] * settings.steps else 0.0


def accumulate_gradients(
    state: TrainState, batches: Batches, text: PromptCache, settings: StepSettings, step: int
) -> list[torch.Tensor]:
    """Compute the gradient of the step after `step` others; returns the losses of each micro-batch, (B,)."""
    state.flat_params.zero_grad()
    count = settings.config.train.gradient_accumulation_steps
    numbers = range(step * count, (step + 1) * count)
    return [backward_micro_batch(state, batches, text, settings, number) for number in numbers]


def sample_batch(
    state: TrainState, batches: Batches, settings: StepSettings, number: int
) -> tuple[Batch, NoiseSample]:
    """Micro-batch `number` with its timesteps and noise."""
    batch, config = batches.batch(number), settings.config
    generator = torch.Generator().manual_seed(noise_seed(config.seed, number))
    timesteps = state.base.noise.num_timesteps
    return batch, sample_noise(batch.latents, timesteps, config.loss, generator)


def backward_micro_batch(
    state: TrainState, batches: Batches, text: PromptCache, settings: StepSettings, number: int
) -> torch.Tensor:
    """Add the gradient of this process's rows of micro-batch `number`; returns the losses, (B,) on the
    device, 0 for the rows of other processes."""
    dropout, config = state.injected.dropout_state, settings.config
    batch, noise = sample_batch(state, batches, settings, number)
    text.embed_ahead(batches, number)
    count = len(batch.latents)
    total = count * config.train.gradient_accumulation_steps
    local = state.group.local_rows(count)
    size = max(1, math.ceil((local.stop - local.start) / state.chunks))
    losses = []
    for start in range(local.start, local.stop, size):
        rows = slice(start, min(start + size, local.stop))
        dropout.micro_batch, dropout.rows = number, count
        dropout.first, dropout.last = rows.start, rows.stop
        found = state.loss(state, text, batch, rows, noise.rows(rows), config)
        state.scaler.scale(found.sum() / total if total > 1 else found.sum()).backward()
        losses.append(found.detach())
        if state.prior is not None:
            kept = state.prior.loss(state, text, rows, number, config)
            state.scaler.scale(kept.sum() / total).backward()
    if state.loss is not image_loss:
        state.injected.set_strength(1.0)
    state.flat_params.flush_grads()
    if (others := count - (local.stop - local.start)) or len(losses) != 1:
        before, after = torch.zeros(others, device=state.base.device).tensor_split([local.start])
        return torch.cat([before, *losses, after])
    return losses[0]


def optimizer_step(
    state: TrainState, max_grad_norm: float, losses: list[torch.Tensor], step: int
) -> tuple[list[torch.Tensor], bool]:
    """Clip the gradient and take the optimizer step number `step`, if loss and gradient are finite.

    Losses and gradient norm are fetched in one transfer, the only wait for the device in a step; the norm is
    finite only if every gradient is.

    Returns:
        The losses on the CPU, and False where one of them or the gradient is not finite. A loss scaler that
        still searches for its scale may overflow; that counts as fine.

    Raises:
        PartialUpdate: the optimizer failed midway.
    """
    scaler, grads = state.scaler, state.flat_params.grads
    scaler.unscale_(state.optimizer)
    for parameter in stopped_parameters(state.optimizer):
        parameter.grad.zero_()  # It has no part in the norm.
    with torch.no_grad():
        fetched = torch.cat([*losses, torch.linalg.vector_norm(grads).view(1)]).cpu()
    *losses, norms = fetched.split([*map(len, losses), 1])
    loss, norm = mean_loss(losses), norms[0]
    if math.isfinite(loss + float(norm)):
        try:
            if max_grad_norm and (factor := max_grad_norm / (norm + CLIP_EPSILON)) < 1.0:
                grads.mul_(factor)
            state.flat_params.step(state.optimizer)
            if state.max_norm:
                limit_norms(state.injected, state.flat_params, state.max_norm)
            scaler.update()
            if state.average is not None:
                state.average.update(step)
        except Exception as error:
            raise PartialUpdate from error
        return losses, True
    searching = scaler.is_enabled() and math.isfinite(loss) and scaler.get_scale() > 1.0
    scaler.update()
    return losses, searching


def mean_loss(losses: list[torch.Tensor]) -> float:
    """The mean over micro-batches of their mean losses."""
    return float(torch.stack([each.mean() for each in losses]).mean())


def noise_seed(seed: int, number: int) -> int:
    """A seed for each (run, micro-batch), far apart for neighbours."""
    return (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9 + 1) % 2**63


def sample_noise(
    latents: torch.Tensor, timesteps: int, rules: LossSection, generator: torch.Generator
) -> NoiseSample:
    """Draw timesteps, stratified over the batch, and noise for `latents` (B, 4, h, w), on the CPU so that
    every device draws the same.

    Stratification keeps the distribution of the base's `timesteps` and makes the loss of a batch less
    noisy (Kingma et al. 2021, section I.1). The noise offset adds a constant to each channel (N. Guttenberg
    2023). Input perturbation adds noise that is not to be predicted (Ning et al. 2023, "Input Perturbation
    Reduces Exposure Bias in Diffusion Models", algorithm 1).
    """
    count = len(latents)
    strata = torch.randperm(count, generator=generator).double()
    position = (strata + torch.rand(count, generator=generator, dtype=torch.float64)) / count
    noise = torch.randn(latents.shape, generator=generator)
    if rules.noise_offset:
        noise = noise + rules.noise_offset * torch.randn(*latents.shape[:2], 1, 1, generator=generator)
    if rules.multires_noise:
        noise = add_coarser_noise(noise, rules.multires_noise, rules.multires_discount, generator)
    perturbed = None
    if rules.input_perturbation:
        perturbed = noise + rules.input_perturbation * torch.randn(noise.shape, generator=generator)
    shares = [rules.timestep_at(quantile) for quantile in position.tolist()]
    drawn = (torch.tensor(shares, dtype=torch.float64) * timesteps).long().clamp(max=timesteps - 1)
    return NoiseSample(drawn, noise, perturbed)


def add_coarser_noise(
    noise: torch.Tensor, levels: int, discount: float, generator: torch.Generator
) -> torch.Tensor:
    """`noise` (B, 4, h, w) with up to `levels` noises added, each 2 to 4 times coarser than the one before,
    enlarged, and `discount` times as strong; each image has a standard deviation of 1 again.

    Source: J. Whitaker 2023, "Multi-Resolution Noise for Diffusion Model Training".
    """
    size = noise.shape[2:]
    for level in range(levels):
        ratio = 2.0 + 2.0 * float(torch.rand((), generator=generator, dtype=torch.float64))
        coarse_size = [max(1, int(side / ratio**level)) for side in size]
        coarse = torch.randn(*noise.shape[:2], *coarse_size, generator=generator)
        noise = noise + discount**level * F.interpolate(coarse, size=size, mode="bilinear")
        if 1 in coarse_size:
            break
    return noise / noise.std(dim=(1, 2, 3), keepdim=True)


def diffusion_loss(
    base: NoisePredictor, latents: torch.Tensor, text: PromptEmbeds, draw: NoiseSample, rules: LossSection,
    sizes: torch.Tensor | None = None, weights: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The weighted loss of each image of a batch, (B,) in fp32 on the base's device.

    Args:
        base: the base with the adapter in it.
        latents: (B, 4, h, w) on the CPU.
        text: B prompt embeddings.
        draw: timesteps and noise.
        rules: type of error and its weights.
        sizes: (B, 6) on the CPU, see `NoisePredictor.predict_noise`.
        weights: what the error of each latent counts, (B, 1, h, w) on the CPU; None for 1.
    """
    added = draw.noise if draw.perturbed is None else draw.perturbed
    noisy = base.noise.add_noise(latents, added, draw.timesteps)
    target = base.noise.target(latents, draw.noise, draw.timesteps)
    return prediction_loss(base, (noisy, target), draw.timesteps, text, rules, sizes, weights)


def prediction_loss(
    base: NoisePredictor, pair: tuple[torch.Tensor, torch.Tensor], timesteps: torch.Tensor,
    text: PromptEmbeds, rules: LossSection, sizes: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The weighted error of the prediction, (B,): see `diffusion_loss`; `pair` are the noisy latents and what
    should be predicted for them, (B, 4, h, w) on the CPU.

    What needs no gradient is computed on the CPU and copied together: on a card it would be a dozen small
    kernels.
    """
    gamma = rules.gamma(base.noise.objective)
    weight = min_snr_weight(base.noise, timesteps, gamma)
    if rules.debias:
        weight = weight * debiased_weight(base.noise, timesteps)
    numbers = {"noisy": pair[0], "target": pair[1], "timesteps": timesteps.float(), "weight": weight}
    if sizes is not None and base.family.size_conditioning:
        numbers["sizes"] = sizes
    if weights is not None:
        numbers["weights"] = weights
    sent = dict(zip(numbers, to_device(base.device, *numbers.values()), strict=True))
    error = chosen(LOSSES, rules.type, "loss.type").resolve()
    delta = functools.partial(rules.delta_at, base.noise, timesteps)
    predicted = base.predict_noise(sent["noisy"], sent["timesteps"], text, sent.get("sizes"))
    errors: torch.Tensor = error(predicted, sent["target"], delta)
    losses = (errors * sent["weights"] if weights is not None else errors).flatten(1).mean(1)
    return losses * sent["weight"] if gamma or rules.debias else losses


def debiased_weight(noise: NoiseSchedule, timesteps: torch.Tensor) -> torch.Tensor:
    """1 / sqrt(SNR) for epsilon, 1 / (SNR + 1) for velocity, (B,), with SNR at most 1,000 as in kohya's
    trainer, and at least 1 / 1,000.

    Source: Yu et al. 2023, "Debias the Training of Diffusion Models", section 3.
    """
    snr = noise.snr(timesteps).clamp(1e-3, 1e3)
    return snr.rsqrt() if noise.objective == "epsilon" else 1.0 / (snr + 1.0)


def min_snr_weight(noise: NoiseSchedule, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) / (SNR + 1) for velocity, (B,); 1 where gamma is 0.

    At zero SNR the weight is 1 for epsilon, its limit, and 0 for velocity, which is why `LossSection.gamma`
    leaves it off there. Source: Hang et al. 2023, section 3.4.
    """
    if not gamma:
        return torch.ones(len(timesteps), device=timesteps.device)
    snr = noise.snr(timesteps)
    if noise.objective == "epsilon":
        return (gamma / snr).clamp(max=1.0)
    return snr.clamp(max=gamma) / (snr + 1.0)


Delta = Callable[[], torch.Tensor]
"""Gives Huber's delta of each image of a batch, (B,)."""


def squared_error(predicted: torch.Tensor, target: torch.Tensor, delta: Delta) -> torch.Tensor:
    """Element by element, (B, 4, h, w)."""
    return F.mse_loss(predicted, target, reduction="none")


def lr_factor(step: int, steps: int, schedule: str, warmup: float) -> float:
    """The factor of the full learning rate for the step after `step` of `steps`.

    It rises linearly over the share `warmup` of the steps; then `schedule`, a key of `choices.SCHEDULES`,
    is a function of progress in [0, 1].
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    progress = (step - rising) / max(1, steps - rising)
    return float(chosen(SCHEDULES, schedule, "optimizer.schedule").resolve()(progress))


def cosine(progress: float) -> float:
    """From 1 to 0 along half a cosine (Loshchilov and Hutter 2017, equation 5)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))
