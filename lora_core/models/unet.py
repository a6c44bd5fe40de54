"""Forward diffusion, and the network that predicts from noisy latents: a UNet today.

Source: Ho et al. 2020 (equation 4) for the process, Salimans and Ho 2022 (section 4, appendix D) for
velocity, Liu et al. 2023 ("Flow Straight and Fast", equation 1) for flow.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import nn

from lora_core.model_files.families import Family


def to_device(device: torch.device, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Copy tensors of one dtype from the CPU to `device`; a card gets them in one asynchronous copy from
    pinned memory, as other copies make the CPU wait, and they share memory there."""
    if device.type != "cuda":
        return tuple(tensor.to(device) for tensor in tensors)
    packed = torch.cat([tensor.flatten() for tensor in tensors]).pin_memory().to(device, non_blocking=True)
    parts = packed.split([tensor.numel() for tensor in tensors])
    return tuple(part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True))


@dataclass(frozen=True)
class PromptEmbeds:
    """What the text encoders make of captions: `context` (B, T, D), the hidden states that the denoiser
    attends to, and `pooled` (B, P), or None where the family has no pooled conditioning."""

    context: torch.Tensor
    pooled: torch.Tensor | None = None

    @classmethod
    def cat(cls, prompts: list["PromptEmbeds"]) -> "PromptEmbeds":
        """Concatenate along B."""
        pooled = [prompt.pooled for prompt in prompts if prompt.pooled is not None]
        return cls(torch.cat([p.context for p in prompts]), torch.cat(pooled) if pooled else None)

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.context.nbytes + (0 if self.pooled is None else self.pooled.nbytes)

    def expand(self, count: int) -> "PromptEmbeds":
        """Repeat one caption (B = 1) for `count` images; no memory is copied."""
        pooled = None if self.pooled is None else self.pooled.expand(count, -1)
        return PromptEmbeds(self.context.expand(count, -1, -1), pooled)

    def to(self, device: torch.device) -> "PromptEmbeds":
        """Copy to another device."""
        if device == self.context.device:
            return self
        parts = [self.context] if self.pooled is None else [self.context, self.pooled]
        packed = self.context.device.type == "cpu"
        return PromptEmbeds(*(to_device(device, *parts) if packed else (part.to(device) for part in parts)))


class Denoiser(Protocol):
    """The network that predicts from noisy latents; sides of these must be multiples of `downscale`. A module
    that has these attributes is used as it is."""

    latent_channels: int
    downscale: int

    def predict(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, prompt: PromptEmbeds,
        time_ids: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        """What `NoiseSchedule.target` should be, (B, C, h, w) in the dtype of the latents.

        `timesteps` is (B,); `time_ids` is (B, 6), or None where the family is not conditioned on sizes.
        """
        ...


class UNet:
    """diffusers' UNet as a `Denoiser`."""

    def __init__(self, module: UNet2DConditionModel) -> None:
        self._module: Any = module
        config: Any = module.config
        self.latent_channels = int(config.out_channels)
        # Each level halves the sides.
        self.downscale = int(2 ** (len(config.block_out_channels) - 1))

    def predict(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, prompt: PromptEmbeds,
        time_ids: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        """See `Denoiser`."""
        dtype, more = noisy_latents.dtype, {}
        if time_ids is not None:
            assert prompt.pooled is not None
            more["added_cond_kwargs"] = {"text_embeds": prompt.pooled.to(dtype), "time_ids": time_ids}
        context = prompt.context.to(dtype)
        output: torch.Tensor = self._module(
            noisy_latents, timesteps, encoder_hidden_states=context, return_dict=False, **more
        )[0]
        return output


def as_denoiser(module: nn.Module) -> Denoiser:
    """`module` as a `Denoiser`: itself, or diffusers' UNet behind the same protocol."""
    denoiser: Any = UNet(module) if isinstance(module, UNet2DConditionModel) else module
    return denoiser


def default_time_ids(count: int, height: int, width: int) -> torch.Tensor:
    """The size conditioning (count, 6) of uncropped images of `height` and `width` pixels: original height
    and width, top and left of the crop, height and width after it (Podell et al. 2023, section 2.2)."""
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).expand(count, -1)


@dataclass(frozen=True)
class NoiseSchedule:
    """`alphas_cumprod` (T,), the share of the signal's variance, falling with the timestep, and the
    `objective`: the prediction, "epsilon", "v_prediction" or "flow" (a line from latents to noise)."""

    alphas_cumprod: torch.Tensor
    objective: str

    @classmethod
    def from_scheduler(cls, scheduler: DDPMScheduler) -> "NoiseSchedule":
        """The schedule of a diffusers scheduler, zero terminal SNR included."""
        config: Any = scheduler.config
        return cls(scheduler.alphas_cumprod.float(), config.prediction_type)

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """sqrt(a) latents + sqrt(1 - a) noise, all (B, C, h, w), timesteps (B,); for flow both factors are
        divided by their sum."""
        signal, spread = self.factors(timesteps, latents)
        return signal * latents + spread * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What should be predicted, (B, C, h, w): the noise, the velocity sqrt(a) noise - sqrt(1 - a)
        latents, or the flow noise - latents."""
        if self.objective == "epsilon":
            return noise
        if self.objective == "flow":
            return noise - latents
        signal, spread = self.factors(timesteps, latents)
        return signal * noise - spread * latents

    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio a / (1 - a) at each timestep, (B,)."""
        share = self.alphas_cumprod.to(timesteps.device)[timesteps]
        return share / (1.0 - share)

    def factors(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What signal and noise are multiplied by at each timestep, (B, 1, 1, 1) as `like`."""
        share = self.alphas_cumprod.to(like.device)[timesteps.to(like.device)].view(-1, 1, 1, 1)
        signal, spread = share.sqrt(), (1.0 - share).sqrt()
        if self.objective == "flow":
            signal, spread = signal / (signal + spread), spread / (signal + spread)
        return signal.to(like.dtype), spread.to(like.dtype)


class NoisePredictor:
    """The part of a base model that a training step calls; `models.load.BaseModel` is one."""

    family: Family
    denoiser: nn.Module
    noise: NoiseSchedule
    device: torch.device
    dtype: torch.dtype

    @property
    def vae_scale_factor(self) -> int:
        """Pixels a latent, along a side."""
        raise NotImplementedError

    def predict_noise(
        self, noisy_latents: torch.Tensor, timesteps: torch.Tensor, prompt: PromptEmbeds,
        sizes: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """What the denoiser predicts, with whatever adapter is in it, (B, C, h, w) in fp32.

        `timesteps` is (B,); `sizes` is (B, 6), for families conditioned on them, else `default_time_ids`.
        """
        time_ids = None
        if self.family.size_conditioning:
            if sizes is None:
                height, width = (side * self.vae_scale_factor for side in noisy_latents.shape[-2:])
                sizes = default_time_ids(len(noisy_latents), height, width)
            time_ids = sizes.to(noisy_latents.device)
        noisy_latents = noisy_latents.to(self.dtype)
        return as_denoiser(self.denoiser).predict(noisy_latents, timesteps, prompt, time_ids).float()
