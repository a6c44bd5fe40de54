"""A picture while it is made, for next to nothing: colours straight from latents, by one small matrix.

The matrix is fitted once a base, by least squares between the latents of a few pictures and their own colours
averaged over the pixels of a latent. It leaves out texture, which a look at something half done does not
need; decoding would cost as much as some steps of the sampler.
"""

import functools

import numpy as np
import torch
from PIL import Image

from lora_core.models.encode import encoded_picture
from lora_core.models.load import BaseModel
from lora_core.spec.paths import DEMO_TRAIN

FITTED_ON = 6
"""Pictures: of 256 latents each where a latent is 8 pixels wide, for a matrix of 15 numbers."""
SIDE = 128


def colour_matrix(base: BaseModel) -> torch.Tensor:
    """(C + 1, 3) in fp32: latents with a 1 behind them, times this, are colours in [0, 1]."""
    latents, colours = [], []
    for path in _pictures():
        with Image.open(path) as opened:
            image = opened.convert("RGB").resize((SIDE, SIDE))
        pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)
        latents.append(encoded_picture(base, pixels * 2 - 1).flatten(1).T)
        means = torch.nn.functional.avg_pool2d(pixels[None], base.pixels_a_latent)[0]
        colours.append(means.flatten(1).T)
    known = torch.cat(latents).double()
    ones = torch.ones(len(known), 1, dtype=torch.float64)
    solved = torch.linalg.lstsq(torch.cat([known, ones], dim=1), torch.cat(colours).double())
    return solved.solution.float()


@functools.cache
def _pictures() -> tuple[str, ...]:
    """A few of the demo's, evenly chosen."""
    found = sorted(path for path in DEMO_TRAIN.iterdir() if path.suffix.lower() != ".txt")
    return tuple(str(path) for path in found[:: max(1, len(found) // FITTED_ON)][:FITTED_ON])


def look(latents: torch.Tensor, matrix: torch.Tensor) -> Image.Image:
    """A small RGB picture, a pixel a latent, of latents (1, C, h, w)."""
    flat = latents[0].detach().float().cpu()
    colours = torch.einsum("chw,cr->hwr", flat, matrix[:-1]) + matrix[-1]
    return Image.fromarray((colours.nan_to_num().clamp(0, 1) * 255).round().byte().numpy())
