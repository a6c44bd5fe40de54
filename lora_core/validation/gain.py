"""Gain: how much better than the base an adapter predicts pictures that it was not trained on.

The base's loss on the same triples is subtracted, so that what makes a picture or a noise level hard cancels
out, and the standard error is that of the difference. Triples of one picture are not independent of each
other: the error is clustered by picture.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lora_core.models.denoise import prediction
from lora_core.models.encode import TextCondition
from lora_core.models.load import BaseModel
from lora_core.validation.triples import Looks

BATCH = 4
"""Looks that go through the UNet at once; fixed, so that the bits of a loss do not depend on memory."""


@dataclass(frozen=True)
class Measured:
    """One picture ready to be measured: `latents` (4, h, w), its fixed looks, its caption, and what a UNet
    with size conditioning is told of it, (6,); None for a picture of just its size."""

    latents: torch.Tensor
    looks: Looks
    caption: str
    sizes: torch.Tensor | None = None


@dataclass(frozen=True)
class Gain:
    """Mean over triples of base loss minus adapted loss, and its standard error clustered by picture."""

    gain: float
    standard_error: float
    base_loss: float
    adapted_loss: float


def triple_losses(
    base: BaseModel,
    pictures: list[Measured],
    condition: Callable[[str], TextCondition],
    on_picture: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """The plain squared error of the prediction for each triple, (pictures, K) in fp64.

    Args:
        base: the base, with whatever adapter is in it.
        pictures: what to measure on; all have K looks.
        condition: a caption's text condition, batch 1.
        on_picture: called with (done, all) after each picture; what it raises ends the measurement.
    """
    rows = []
    with torch.no_grad():
        for done, picture in enumerate(pictures, start=1):
            text = condition(picture.caption)
            losses = []
            for start in range(0, len(picture.looks.timesteps), BATCH):
                noise = picture.looks.noise[start : start + BATCH].to(base.device)
                timesteps = picture.looks.timesteps[start : start + BATCH].to(base.device)
                latents = picture.latents.to(base.device).expand_as(noise)
                noisy = base.noise.noisy_latents(latents, noise, timesteps)
                target = base.noise.target(latents, noise, timesteps)
                sizes = None if picture.sizes is None else picture.sizes.expand(len(noise), -1)
                error = prediction(base, noisy, timesteps, text.expand(len(noise)), sizes) - target
                losses.append(error.cpu().double().square().flatten(1).mean(1))  # MPS has no float64
            rows.append(torch.cat(losses))
            if on_picture is not None:
                on_picture(done, len(pictures))
    return torch.stack(rows)


def paired_gain(base_losses: torch.Tensor, adapted_losses: torch.Tensor) -> Gain:
    """The gain of paired losses, both (pictures, K)."""
    difference = base_losses - adapted_losses
    return Gain(
        gain=float(difference.mean()),
        standard_error=clustered_error(difference),
        base_loss=float(base_losses.mean()),
        adapted_loss=float(adapted_losses.mean()),
    )


def clustered_error(values: torch.Tensor) -> float:
    """Standard error of the mean of (pictures, K) values: the spread of the pictures' means over
    sqrt(pictures)."""
    means = values.mean(dim=1)
    if len(means) < 2:
        return float(values.std() / max(1, values.numel()) ** 0.5) if values.numel() > 1 else 0.0
    return float(means.std() / len(means) ** 0.5)


def timestep_bands(
    base_losses: torch.Tensor,
    adapted_losses: torch.Tensor,
    timesteps: torch.Tensor,
    highest: int,
    bands: int = 4,
) -> list[dict[str, float]]:
    """Gain by noise level: rows {from, to, gain, standard_error}, timesteps in [from, to).

    Args:
        base_losses, adapted_losses, timesteps: each (pictures, K).
        highest: how many timesteps the base has.
        bands: into how many equal bands they are cut.
    """
    rows = []
    difference = base_losses - adapted_losses
    for band in range(bands):
        low, high = highest * band // bands, highest * (band + 1) // bands
        inside = (timesteps >= low) & (timesteps < high)
        if not inside.any():
            continue
        means = torch.stack([d[m].mean() for d, m in zip(difference, inside, strict=True) if m.any()])
        error = float(means.std() / len(means) ** 0.5) if len(means) > 1 else 0.0
        rows.append(
            {"from": low, "to": high, "gain": float(difference[inside].mean()), "standard_error": error}
        )
    return rows
