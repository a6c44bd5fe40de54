"""The loss of one batch: timesteps and noise are drawn, the UNet predicts, the error is weighed."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lora_core.models.unet import NoisePredictor, NoiseSchedule, PromptEmbeds, to_device
from lora_core.settings.schema import HUBER_SCHEDULES, LOSSES, LossSection, chosen


@dataclass(frozen=True)
class NoiseSample:
    """What is random in one batch, on the CPU: `timesteps` (B,) and `noise` (B, 4, h, w)."""

    timesteps: torch.Tensor
    noise: torch.Tensor

    def rows(self, rows: slice) -> "NoiseSample":
        """The draw of some of the images."""
        return NoiseSample(self.timesteps[rows], self.noise[rows])


def sample_noise(
    latents: torch.Tensor, timesteps: int, noise_offset: float, generator: torch.Generator
) -> NoiseSample:
    """Draw timesteps, stratified over the batch, and noise for `latents` (B, 4, h, w), on the CPU so that
    every device draws the same.

    Stratification keeps each of the base's `timesteps` equally likely and makes the loss of a batch less
    noisy (Kingma et al. 2021, section I.1). The noise offset adds a constant to each channel (N. Guttenberg
    2023).
    """
    count = len(latents)
    strata = torch.randperm(count, generator=generator).double()
    position = (strata + torch.rand(count, generator=generator, dtype=torch.float64)) / count
    noise = torch.randn(latents.shape, generator=generator)
    if noise_offset:
        noise = noise + noise_offset * torch.randn(*latents.shape[:2], 1, 1, generator=generator)
    chosen_timesteps = (position * timesteps).long().clamp(max=timesteps - 1)
    return NoiseSample(chosen_timesteps, noise)


def diffusion_loss(
    base: NoisePredictor, latents: torch.Tensor, text: PromptEmbeds, draw: NoiseSample, rules: LossSection,
    sizes: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The weighted loss of each image of a batch, (B,) in fp32 on the base's device.

    What needs no gradient is computed on the CPU and copied together: on a card it would be a dozen small
    kernels.

    Args:
        base: the base with the adapter in it.
        latents: (B, 4, h, w) on the CPU.
        text: B prompt embeddings.
        draw: timesteps and noise.
        rules: type of error and its weights.
        sizes: (B, 6) on the CPU, see `NoisePredictor.predict_noise`.
    """
    gamma = rules.gamma(base.noise.objective)
    numbers = {
        "noisy": base.noise.add_noise(latents, draw.noise, draw.timesteps),
        "target": base.noise.target(latents, draw.noise, draw.timesteps),
        "timesteps": draw.timesteps.float(),
        "weight": min_snr_weight(base.noise, draw.timesteps, gamma),
    }
    if sizes is not None and base.family.size_conditioning:
        numbers["sizes"] = sizes
    sent = dict(zip(numbers, to_device(base.device, *numbers.values()), strict=True))
    error = chosen(LOSSES, rules.type, "loss.type").resolve()
    delta = functools.partial(huber_delta, base.noise, draw.timesteps, rules)
    predicted = base.predict_noise(sent["noisy"], sent["timesteps"], text, sent.get("sizes"))
    losses: torch.Tensor = error(predicted, sent["target"], delta).flatten(1).mean(1)
    return losses * sent["weight"] if gamma else losses


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


def absolute_error(predicted: torch.Tensor, target: torch.Tensor, delta: Delta) -> torch.Tensor:
    """Element by element, (B, 4, h, w)."""
    return F.l1_loss(predicted, target, reduction="none")


def huber_error(predicted: torch.Tensor, target: torch.Tensor, delta: Delta) -> torch.Tensor:
    """2 d (sqrt(e^2 + d^2) - d), element by element, (B, 4, h, w), with e the error and d = `delta`.

    It is e^2 for small errors, as squared error, and 2 d |e| for large ones, so that no element's gradient is
    above 2 d. Written as a quotient, which loses no digits where e is small. The scale is that of kohya's
    `loss_type = huber`, so that its `huber_c` means the same here.
    Source: Khrapov et al. 2024, "Improving Diffusion Models's Data-Corruption Resistance using Scheduled
    Pseudo-Huber Loss", section 3.
    """
    turn = delta().to(predicted).view(-1, 1, 1, 1)
    squared = F.mse_loss(predicted, target, reduction="none")
    return 2.0 * turn * squared / ((squared + turn.square()).sqrt() + turn)


def huber_delta(noise: NoiseSchedule, timesteps: torch.Tensor, rules: LossSection) -> torch.Tensor:
    """Huber's delta at each timestep, (B,), by the schedule that `rules` names."""
    schedule = chosen(HUBER_SCHEDULES, rules.huber_schedule, "loss.huber_schedule").resolve()
    delta: torch.Tensor = schedule(noise, timesteps, rules.huber_delta)
    return delta


def constant_delta(noise: NoiseSchedule, timesteps: torch.Tensor, delta: float) -> torch.Tensor:
    """`delta` for each of the timesteps, (B,)."""
    return torch.full((len(timesteps),), delta, device=timesteps.device)


def snr_delta(noise: NoiseSchedule, timesteps: torch.Tensor, delta: float) -> torch.Tensor:
    """(1 - delta) / (1 + s)^2 + delta, (B,), with s = sqrt((1 - a) / a), the noise over the signal.

    Finite where there is no signal, too. Source: as of `huber_error`, section 3.2.
    """
    share = noise.alphas_cumprod.to(timesteps.device)[timesteps]
    signal, spread = share.sqrt(), (1.0 - share).sqrt()
    return (1.0 - delta) * (signal / (signal + spread)).square() + delta


def exponential_delta(noise: NoiseSchedule, timesteps: torch.Tensor, delta: float) -> torch.Tensor:
    """delta^(t / T), (B,): 1 at the first timestep, `delta` at the end. Source: as of `huber_error`."""
    return delta ** (timesteps.float() / noise.num_timesteps)
