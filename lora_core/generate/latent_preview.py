"""The latent preview: a small image of a sample in progress.

Latents are mapped to colours by one small matrix. It is fitted once per base by least squares between the
latents of a few images and their colours averaged over the pixels of a latent. It leaves out texture;
decoding would cost as much as some steps of the sampler.
"""

import base64
import functools
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from lora_core.data.images import encode_file
from lora_core.models.load import BaseModel
from lora_core.system.files import DEMO_TRAIN

OnLatents = Callable[[Callable[[], torch.Tensor]], None]
"""Called after each step with a function that computes the predicted clean latents (1, C, h, w)."""
FIT_IMAGES = 6
"""Enough for a matrix of 15 entries: each has 256 latents where a latent is 8 pixels wide."""
FIT_SIDE = 128
SECONDS_BETWEEN = 0.25
SIDE = 128
"""The longer side of a preview that is sent, in pixels."""


def fit_rgb_matrix(base: BaseModel) -> torch.Tensor:
    """(C + 1, 3) in fp32: latents with a 1 appended, times this, are colours in [0, 1]."""
    latents, colours = [], []
    for path in _fit_images():
        with Image.open(path) as opened:
            image = opened.convert("RGB").resize((FIT_SIDE, FIT_SIDE))
        pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)
        latents.append(base.encode_image(pixels * 2 - 1).flatten(1).T)
        means = torch.nn.functional.avg_pool2d(pixels[None], base.vae_scale_factor)[0]
        colours.append(means.flatten(1).T)
    known = torch.cat(latents).double()
    ones = torch.ones(len(known), 1, dtype=torch.float64)
    solved = torch.linalg.lstsq(torch.cat([known, ones], dim=1), torch.cat(colours).double())
    return solved.solution.float()


@functools.cache
def _fit_images() -> tuple[str, ...]:
    """A few of the demo's images, evenly spaced."""
    found = sorted(path for path in DEMO_TRAIN.iterdir() if path.suffix.lower() != ".txt")
    return tuple(str(path) for path in found[:: max(1, len(found) // FIT_IMAGES)][:FIT_IMAGES])


def latent_preview(latents: torch.Tensor, matrix: torch.Tensor) -> Image.Image:
    """A small RGB image, one pixel for each latent of (1, C, h, w)."""
    flat = latents[0].detach().float().cpu()
    colours = torch.einsum("chw,cr->hwr", flat, matrix[:-1]) + matrix[-1]
    return Image.fromarray((colours.nan_to_num().clamp(0, 1) * 255).round().byte().numpy())


def predict_clean(
    base: BaseModel, scaled: torch.Tensor, output: torch.Tensor, timestep: torch.Tensor
) -> torch.Tensor:
    """Clean latents from the UNet's output.

    The UNet's input has the variance of the forward process with every sampler, so the scheduler is not
    asked.
    Source: Ho et al. 2020, equation 15; Salimans and Ho 2022, appendix D.
    """
    step = int(timestep.round().clamp(0, base.noise.num_timesteps - 1))
    share = base.noise.alphas_cumprod[step].clamp(min=1e-4)
    signal, spread = float(share.sqrt()), float((1 - share).sqrt())
    if base.noise.objective == "epsilon":
        return (scaled - spread * output) / signal
    return signal * scaled - spread * output


def previewer(matrix: torch.Tensor, send: Callable[..., None]) -> OnLatents:
    """Calls `send` every few steps with `image`, the image so far as a JPEG in base64."""
    sent_at = time.monotonic()

    def on_latents(latents: Callable[[], torch.Tensor]) -> None:
        nonlocal sent_at
        if time.monotonic() - sent_at >= SECONDS_BETWEEN:
            sent_at = time.monotonic()
            image = latent_preview(latents(), matrix)
            image.thumbnail((SIDE, SIDE))
            send(image=base64.b64encode(encode_file(image, "JPEG", quality=85)).decode())

    return on_latents
