"""Trains the VAE's decoder further with the encoder frozen, for crisper images from the same latents.

As the latents stay, so do all that was trained on them: this may run before, during or after the UNet. The
latents get a little noise, because those that the UNet makes are never exact either.

    python assets/base/make/decoder.py --build BUILD --minutes 10
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from pictures import load_icons
from torch import Tensor, nn
from training import Clock, log_to, optimizers, save, share, start_workers, update
from vae import Batches, decibels, unseen_pictures
from whitening import trained_vae

BATCH = 4  # of each worker
LATENT_NOISE = 0.05  # of the white latents' standard deviation
SLOPES = 1.0  # weight of the image's gradients, twice that of the first training


def polished_vae(build: Path) -> AutoencoderKL:
    """Returns the whitened VAE with the newest decoder, the one to ship."""
    vae = trained_vae(build)
    if (build / "decoder.pt").exists():
        trained_part(vae).load_state_dict(torch.load(build / "decoder.pt", weights_only=True)["model"])
    return vae


def trained_part(vae: AutoencoderKL) -> nn.ModuleDict:
    """Returns what is trained here; it shares its weights with the VAE."""
    return nn.ModuleDict({"decoder": vae.decoder, "entry": vae.post_quant_conv})


def decoder_loss(vae: AutoencoderKL, pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Returns L1 + L2 + SLOPES times L1 of the gradients of one batch."""
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            latents = vae.encode(pictures).latent_dist.mean.float()
        noise = torch.randn(latents.shape, generator=generator) / vae.config.scaling_factor
        gap = vae.decode(latents + LATENT_NOISE * noise).sample.float() - pictures
    slopes = gap.diff(dim=2).abs().mean() + gap.diff(dim=3).abs().mean()
    return gap.abs().mean() + gap.square().mean() + SLOPES * slopes


def train(rank: int, build: Path, minutes: float, seed: int = 0) -> None:
    """Trains to the end of the budget as one of the workers, going on from the checkpoint if there is one."""
    vae, icons, path, clock = polished_vae(build), load_icons(build), build / "decoder.pt", Clock(minutes)
    part = trained_part(vae).requires_grad_()
    built = optimizers(part, {"lr": 3e-3}, {"lr": 8e-4})
    if path.exists():
        state = torch.load(path, weights_only=True)
        for optimizer, held in zip(built, state["optimizers"], strict=True):
            optimizer.load_state_dict(held)
        clock = Clock(minutes, state["spent"], state["step"])
    generator = torch.Generator().manual_seed(seed + 1000 * clock.step + rank)
    batches, tests = Batches(icons, generator), unseen_pictures(icons)
    if rank == 0:
        log = log_to(build / "decoder.log")
    while not clock.done:
        decoder_loss(vae, batches.draw(BATCH), generator).backward()
        clock.tick()
        share(part, clock)
        update(built, part, clock.factor(warm_up=30))
        if rank == 0 and clock.checkpoint_due():
            held = {"optimizers": [o.state_dict() for o in built], "spent": clock.spent, "step": clock.step}
            save(path, {"model": part.state_dict(), **held})
            log.info("step %d  %.0f s  held-out %.2f dB", clock.step, clock.spent, decibels(vae, tests))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=Path, required=True, help="folder for caches and checkpoints")
    parser.add_argument("--minutes", type=float, default=10, help="budget of training time")
    parser.add_argument(
        "--workers", type=int, default=2, help="processes of one thread and BATCH samples each"
    )
    given = parser.parse_args()
    start_workers(train, given.workers, given.build, given.minutes)
