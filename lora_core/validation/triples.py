"""Fixed (picture, noise, timestep) triples, so that two measurements differ by the adapter alone."""

import hashlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Looks:
    """All looks at one picture: `timesteps` (K,) and `noise` (K, 4, h, w)."""

    timesteps: torch.Tensor
    noise: torch.Tensor


def looks_at(picture: str, latents: torch.Tensor, count: int, seed: int, timesteps: int) -> Looks:
    """The fixed looks at one picture.

    Timesteps are stratified over the whole range, one a stratum; noise comes in pairs of opposite sign, which
    cancels what is odd in it. All depends on (picture, seed, count) and not on which other pictures there
    are.

    Args:
        picture: what names it, the same at every measurement (its content hash).
        latents: (4, h, w), for the shape.
        count: K.
        seed: of the draws.
        timesteps: how many the base has.
    """
    digest = hashlib.sha256(f"{seed}/{picture}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    offsets = torch.rand(count, generator=generator, dtype=torch.float64)
    strata = (torch.arange(count, dtype=torch.float64) + offsets) / count
    halves = torch.randn((count + 1) // 2, *latents.shape, generator=generator)
    noise = torch.stack([halves, -halves], dim=1).flatten(0, 1)[:count]
    return Looks((strata * timesteps).long().clamp(max=timesteps - 1), noise)
