"""Makes the VAE's latents white, so that the UNet meets four equal channels of mean 0 and variance 1.

The transform is folded into the 1 x 1 convolutions at the border (`quant_conv`, `post_quant_conv`); the
scaling factor stays stable-diffusion's 0.18215, and no program has to know of a shift.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from vae import Batches, load_icons, new_vae

FLOOR = 0.08  # smallest eigenvalue, of the largest: a weak direction is not blown up to full strength
MEASURED_BATCHES = 24


def trained_vae(build: Path) -> AutoencoderKL:
    """Returns the VAE of the checkpoint, whitened once and kept as `vae_white.pt`, for encoding."""
    vae, path = new_vae(), build / "vae_white.pt"
    if path.exists():
        vae.load_state_dict(torch.load(path, weights_only=True))
    else:
        vae.load_state_dict(torch.load(build / "vae.pt", weights_only=True)["model"])
        batches = Batches(load_icons(build), torch.Generator().manual_seed(5))
        fold_whitening(vae, [batches.draw(16) for _ in range(MEASURED_BATCHES)])
        torch.save(vae.state_dict(), path)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def fold_whitening(vae: AutoencoderKL, pictures: list[Tensor]) -> None:
    """Rewrites the VAE so that latents of such images, times the scaling factor, are white."""
    posteriors = [vae.encode(batch).latent_dist for batch in pictures]
    means = torch.cat([p.mean.permute(1, 0, 2, 3).flatten(1) for p in posteriors], dim=1).double()
    noise = torch.cat([p.var.permute(1, 0, 2, 3).flatten(1) for p in posteriors], dim=1).double().mean(1)
    values, vectors = torch.linalg.eigh(torch.cov(means))
    scale = values.clamp(min=FLOOR * values.max()).rsqrt() / vae.config.scaling_factor
    white = vectors @ scale.diag() @ vectors.T
    centre = means.mean(1)

    entry, exit_ = vae.quant_conv, vae.post_quant_conv
    weight, bias = entry.weight[:4, :, 0, 0].double(), entry.bias[:4].double()
    entry.weight[:4, :, 0, 0] = (white @ weight).float()
    entry.bias[:4] = (white @ (bias - centre)).float()
    # The mixed noise has no exact diagonal form; its mean level does, and is all that sampling needs.
    entry.weight[4:] = 0
    entry.bias[4:] = (white.square() @ noise).log().float()

    weight, bias = exit_.weight[:, :, 0, 0].double(), exit_.bias.double()
    exit_.weight[:, :, 0, 0] = (weight @ torch.linalg.inv(white)).float()
    exit_.bias[:] = (weight @ centre + bias).float()
