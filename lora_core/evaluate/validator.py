"""Fixed (picture, noise, timestep) triples, so that two measurements differ by the adapter alone."""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from lora_core.data.buckets import choose_bucket, size_conditioning
from lora_core.data.images import hash_file
from lora_core.data.scan import ImageRecord
from lora_core.lora.inject import LoadedLora, Merger
from lora_core.models.encode import encode_image, encode_prompt, load_pixels
from lora_core.models.load import BaseModel
from lora_core.models.unet import PromptEmbeds


@dataclass(frozen=True)
class EvalNoise:
    """All looks at one picture: `timesteps` (K,) and `noise` (K, 4, h, w)."""

    timesteps: torch.Tensor
    noise: torch.Tensor


def eval_noise(picture: str, latents: torch.Tensor, count: int, seed: int, timesteps: int) -> EvalNoise:
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
    return EvalNoise((strata * timesteps).long().clamp(max=timesteps - 1), noise)


# Gain: how much better than the base an adapter predicts pictures that it was not trained on.
#
# The base's loss on the same triples is subtracted, so that what makes a picture or a noise level hard
# cancels out, and the standard error is that of the difference. Triples of one picture are not independent
# of each other: the error is clustered by picture.


BATCH = 4
"""Looks that go through the UNet at once; fixed, so that the bits of a loss do not depend on memory."""


@dataclass(frozen=True)
class EvalImage:
    """One picture ready to be measured: `latents` (4, h, w), its fixed looks, its caption, and what a UNet
    with size conditioning is told of it, (6,); None for a picture of just its size."""

    latents: torch.Tensor
    looks: EvalNoise
    caption: str
    sizes: torch.Tensor | None = None


@dataclass(frozen=True)
class Gain:
    """Mean over triples of base loss minus adapted loss, and its standard error clustered by picture."""

    gain: float
    standard_error: float
    base_loss: float
    adapted_loss: float


def eval_losses(
    base: BaseModel,
    pictures: list[EvalImage],
    condition: Callable[[str], PromptEmbeds],
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
                noisy = base.noise.add_noise(latents, noise, timesteps)
                target = base.noise.target(latents, noise, timesteps)
                sizes = None if picture.sizes is None else picture.sizes.expand(len(noise), -1)
                error = base.predict_noise(noisy, timesteps, text.expand(len(noise)), sizes) - target
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


def gain_by_timestep(
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


# The `validate` verb: paired validation of an adapter on a folder of pictures.


def encode_eval_images(
    base: BaseModel, records: list[ImageRecord], triples: int, seed: int
) -> list[EvalImage]:
    """Pictures as latents with their fixed looks."""
    pictures = []
    for record in records:
        bucket = choose_bucket(record.width, record.height, base.resolution, base.size_multiple)
        latents = encode_image(base, load_pixels(record, bucket))
        looks = eval_noise(hash_file(record.path), latents, triples, seed, base.noise.num_timesteps)
        sizes = torch.tensor(size_conditioning(record.width, record.height, bucket), dtype=torch.float32)
        pictures.append(EvalImage(latents, looks, record.caption, sizes))
    return pictures


def validation_report(
    base: BaseModel,
    records: list[ImageRecord],
    adapters: list[LoadedLora],
    triples: int = 8,
    seed: int = 0,
    shuffle_captions: bool = False,
) -> dict[str, Any]:
    """The document of `validate --json`.

    With `shuffle_captions` each picture gets another one's caption, for base and adapter alike, and the key
    `captions` says how much worse the base's loss is than with the right ones.
    """
    pictures = encode_eval_images(base, records, triples, seed)
    merger = Merger(base.modules)

    def condition(caption: str) -> PromptEmbeds:
        return encode_prompt(base, [caption])

    asked = _shuffled(pictures, seed) if shuffle_captions else pictures
    base_losses = eval_losses(base, asked, condition)
    merger.apply(adapters)
    adapted_losses = eval_losses(base, asked, condition) if adapters else base_losses
    merger.apply([])
    gain = paired_gain(base_losses, adapted_losses)
    timesteps = torch.stack([picture.looks.timesteps for picture in pictures])
    report: dict[str, Any] = {
        "gain": gain.gain,
        "standard_error": gain.standard_error,
        "base_loss": gain.base_loss,
        "adapted_loss": gain.adapted_loss,
        "triples": base_losses.numel(),
        "bands": gain_by_timestep(base_losses, adapted_losses, timesteps, base.noise.num_timesteps),
        "strength": adapters[0].strength if adapters else 0.0,
        "pictures": len(pictures),
    }
    if shuffle_captions:
        right = eval_losses(base, pictures, condition)
        report["captions"] = {
            "right_loss": float(right.mean()),
            "shuffled_loss": gain.base_loss,
            "worse": float((base_losses - right).mean()),
            "standard_error": clustered_error(base_losses - right),
        }
    return report


def _shuffled(pictures: list[EvalImage], seed: int) -> list[EvalImage]:
    """Each picture with the caption of another, where there is another."""
    order = list(range(len(pictures)))
    random.Random(seed).shuffle(order)
    giver = {order[i]: order[(i + 1) % len(order)] for i in range(len(order))}
    return [replace(picture, caption=pictures[giver[i]].caption) for i, picture in enumerate(pictures)]
