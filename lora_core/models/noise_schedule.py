"""The forward diffusion: noisy latents, and what the UNet should predict from them.

Source: Ho et al. 2020 (equation 4) for the process, Salimans and Ho 2022 (section 4, appendix D) for
velocity.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler


@dataclass(frozen=True)
class NoiseSchedule:
    """How much of the picture is left at each timestep.

    Attributes:
        alphas_cumprod: (T,) share of the signal's variance, falling with the timestep.
        objective: "epsilon" or "v_prediction".
    """

    alphas_cumprod: torch.Tensor
    objective: str

    @classmethod
    def from_scheduler(cls, scheduler: DDPMScheduler) -> "NoiseSchedule":
        """The schedule of a diffusers scheduler, zero terminal SNR included."""
        config: Any = scheduler.config
        return cls(scheduler.alphas_cumprod.float(), config.prediction_type)

    @property
    def num_timesteps(self) -> int:
        """How many there are, T."""
        return len(self.alphas_cumprod)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """sqrt(a) latents + sqrt(1 - a) noise, all (B, 4, h, w), timesteps (B,)."""
        signal, spread = self._factors(timesteps, latents)
        return signal * latents + spread * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the UNet should say, (B, 4, h, w): the noise, or the velocity sqrt(a) noise - sqrt(1 - a)
        latents."""
        if self.objective == "epsilon":
            return noise
        signal, spread = self._factors(timesteps, latents)
        return signal * noise - spread * latents

    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio a / (1 - a) at each timestep, (B,)."""
        share = self.alphas_cumprod.to(timesteps.device)[timesteps]
        return share / (1.0 - share)

    def _factors(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        share = self.alphas_cumprod.to(like.device)[timesteps.to(like.device)].view(-1, 1, 1, 1)
        return share.sqrt().to(like.dtype), (1.0 - share).sqrt().to(like.dtype)
