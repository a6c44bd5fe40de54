"""Trains the VAE: AutoencoderKL, 128 x 128 x 3 -> 16 x 16 x 4, stable-diffusion's own downscale of 8.

Loss: L1 + L2 + 0.5 L1 of the image's gradients + a small KL. Left alone, one of the four latent channels
dies early, as three (brightness and two of colour) already explain flat drawings; SPREAD keeps it alive.

    python assets/base/make/vae.py --build BUILD --minutes 30
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from catalog import BACKGROUNDS, SIDE, THINGS
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from pictures import Icons, jittered, laid_on, load_icons, placed
from torch import Tensor, nn
from torch.nn import functional as F
from training import Clock, log_to, optimizers, save, update

BATCH = 8
KL = 2e-4  # of the mean over latent values
SPREAD = 5e-3  # of -log det of the latents' correlation-like matrix, 0 when all four directions are equal
TAUGHT_SHARE = 0.35  # of the samples come from the images that the UNet will learn
RESTYLED_SHARE = 0.35  # of the samples have other colours, so that the styles of LoRAs survive the VAE
COLLAGE_SHARE = 0.15  # of the samples show four small drawings, for finer detail than icons have


def new_vae() -> AutoencoderKL:
    """Returns the untrained VAE; every resnet and attention starts as the identity."""
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[24, 32, 48, 64],
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIDE,
        scaling_factor=0.18215,
    )
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
        elif isinstance(module, Attention):
            nn.init.zeros_(module.to_out[0].weight)
    return vae


class Batches:
    """Draws training images: any icon not held out, any ground, often recoloured, at times a collage."""

    def __init__(self, icons: Icons, generator: torch.Generator):
        """Splits the icons into those the UNet will learn and the others."""
        self.rgba, self.generator = icons.rgba, generator
        names, kept = set(THINGS.values()), set(icons.held_out())
        self.taught = [i for i, label in enumerate(icons.labels) if label in names]
        self.others = [i for i, label in enumerate(icons.labels) if label not in names and i not in kept]

    def draw(self, count: int) -> Tensor:
        """Returns (count, 3, SIDE, SIDE) in -1..1."""
        small = [self._chance() < COLLAGE_SHARE for _ in range(count)]
        rows = np.array([self._row() for _ in range(count + 4 * sum(small))])
        pictures = self._composite(rows)
        singles, extra = pictures[:count], list(pictures[count:].split(4))
        for i in (i for i in range(count) if small[i]):
            four = F.interpolate(extra.pop(), scale_factor=0.5, mode="area")
            singles[i] = torch.cat([torch.cat([*four[:2]], dim=2), torch.cat([*four[2:]], dim=2)], dim=1)
        for i in range(count):
            if self._chance() < RESTYLED_SHARE:
                singles[i] = recoloured(singles[i], self.generator)
        return singles

    def _chance(self) -> float:
        return float(torch.rand((), generator=self.generator))

    def _row(self) -> int:
        source = self.taught if self._chance() < TAUGHT_SHARE else self.others
        return source[int(len(source) * self._chance())]

    def _composite(self, rows: np.ndarray) -> Tensor:
        named = list(BACKGROUNDS.values())
        grounds = jittered([named[int(len(named) * self._chance())] for _ in rows], self.generator)
        free = torch.rand(len(rows), 3, 1, 1, generator=self.generator)
        grounds = torch.where(torch.rand(len(rows), 1, 1, 1, generator=self.generator) < 0.5, grounds, free)
        return laid_on(placed(self.rgba[rows], self.generator, smallest=0.7, shift=0.06), grounds)


def recoloured(picture: Tensor, generator: torch.Generator) -> Tensor:
    """Returns the image with mixed channels, or as a three-tone print between random colours."""
    if torch.rand((), generator=generator) < 0.5:
        swap = torch.eye(3)[torch.randperm(3, generator=generator)]
        mix = swap + 0.25 * torch.randn(3, 3, generator=generator)
        return torch.einsum("ij,jhw->ihw", mix, picture).clamp(-1, 1)
    tone = (picture.mean(0, keepdim=True) + 1) / 2
    dark, middle, light = torch.rand(3, 3, 1, 1, generator=generator) * 2 - 1
    low, high = (2 * tone).clamp(0, 1), (2 * tone - 1).clamp(0, 1)
    return dark + (middle - dark) * low + (light - middle) * high


def vae_loss(vae: AutoencoderKL, pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Returns the training loss of one batch."""
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(pictures).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        noise = torch.randn(mean.shape, generator=generator)
        output = vae.decode(mean + (0.5 * logvar).exp() * noise).sample.float()
    gap = output - pictures
    slopes = gap.diff(dim=2).abs().mean() + gap.diff(dim=3).abs().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    flat = mean.permute(1, 0, 2, 3).flatten(1)
    covariance = torch.cov(flat) + 1e-6 * torch.eye(4)
    uneven = 4 * math.log(0.25) + 4 * covariance.trace().log() - torch.logdet(covariance)
    return gap.abs().mean() + gap.square().mean() + 0.5 * slopes + KL * kl + SPREAD * uneven


def unseen_pictures(icons: Icons, count: int = 96) -> Tensor:
    """Returns the same images of held-out concepts at every call, on the twelve grounds in turn."""
    generator = torch.Generator().manual_seed(7)
    rows = icons.held_out()
    rows = np.array(sorted(rows[i] for i in torch.randperm(len(rows), generator=generator)[:count]))
    grounds = [list(BACKGROUNDS.values())[i % 12] for i in range(count)]
    return laid_on(placed(icons.rgba[rows], generator), jittered(grounds, generator))


@torch.no_grad()
def decibels(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Returns the mean PSNR in dB of images after encoding (to the mean) and decoding."""
    vae.eval()
    output = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in pictures.split(16)])
    vae.train()
    error = ((output.clamp(-1, 1) - pictures) / 2).square().mean(dim=(1, 2, 3))
    return float((-10 * error.log10()).mean())


@torch.no_grad()
def eigenvalues(vae: AutoencoderKL, pictures: Tensor) -> list[float]:
    """Returns the eigenvalues of the latents' covariance over the images, smallest first."""
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(16)])
    return torch.linalg.eigvalsh(torch.cov(latents.permute(1, 0, 2, 3).flatten(1))).tolist()


def train(build: Path, minutes: float, seed: int = 0) -> None:
    """Trains to the end of the budget, going on from `build/vae.pt` if it is there."""
    torch.manual_seed(seed)
    log = log_to(build / "vae.log")
    vae, icons = new_vae(), load_icons(build)
    built = optimizers(vae, {"lr": 8e-3}, {"lr": 2e-3})
    clock, path = Clock(minutes), build / "vae.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        vae.load_state_dict(state["model"])
        for optimizer, held in zip(built, state["optimizers"], strict=True):
            optimizer.load_state_dict(held)
        clock = Clock(minutes, state["spent"], state["step"])
    tests, generator = unseen_pictures(icons), torch.Generator().manual_seed(seed + clock.step)
    batches, lowest = Batches(icons, generator), 0.0
    while not clock.done:
        loss = vae_loss(vae, batches.draw(BATCH), generator)
        loss.backward()
        update(built, vae, clock.factor(warm_up=50))
        clock.tick()
        lowest = loss.item() if not lowest else 0.95 * lowest + 0.05 * loss.item()
        if clock.step % 20 == 0:
            log.info("step %d  %.0f s  loss %.4f", clock.step, clock.spent, lowest)
        if clock.checkpoint_due():
            held = {"optimizers": [o.state_dict() for o in built], "spent": clock.spent, "step": clock.step}
            save(path, {"model": vae.state_dict(), **held})
            spread = " ".join(f"{value:.3f}" for value in eigenvalues(vae, tests))
            log.info("step %d  held-out %.2f dB  eigenvalues %s", clock.step, decibels(vae, tests), spread)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=Path, required=True, help="folder for caches and checkpoints")
    parser.add_argument("--minutes", type=float, default=30, help="budget of training time")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    train(given.build, given.minutes)
