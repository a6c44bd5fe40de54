"""The `validate` verb: paired validation of an adapter on a folder of pictures."""

import random
from dataclasses import replace
from typing import Any

import torch

from lora_core.adapters.inject import Merger, Strengthened
from lora_core.dataset.buckets import bucket_of, size_conditioning
from lora_core.dataset.folder import ImageRecord
from lora_core.dataset.pictures import content_hash
from lora_core.models.encode import TextCondition, encoded_picture, text_condition
from lora_core.models.images import picture_pixels
from lora_core.models.load import BaseModel
from lora_core.validation.gain import Measured, clustered_error, paired_gain, timestep_bands, triple_losses
from lora_core.validation.triples import looks_at


def measured_pictures(base: BaseModel, records: list[ImageRecord], triples: int, seed: int) -> list[Measured]:
    """Pictures as latents with their fixed looks."""
    pictures = []
    for record in records:
        bucket = bucket_of(record.width, record.height, base.resolution, base.size_multiple)
        latents = encoded_picture(base, picture_pixels(record, bucket))
        looks = looks_at(content_hash(record.path), latents, triples, seed, base.noise.timesteps)
        sizes = torch.tensor(size_conditioning(record.width, record.height, bucket), dtype=torch.float32)
        pictures.append(Measured(latents, looks, record.caption, sizes))
    return pictures


def validation(
    base: BaseModel,
    records: list[ImageRecord],
    adapters: list[Strengthened],
    triples: int = 8,
    seed: int = 0,
    shuffle_captions: bool = False,
) -> dict[str, Any]:
    """The document of `validate --json`.

    With `shuffle_captions` each picture gets another one's caption, for base and adapter alike, and the key
    `captions` says how much worse the base's loss is than with the right ones.
    """
    pictures = measured_pictures(base, records, triples, seed)
    merger = Merger(base.modules)

    def condition(caption: str) -> TextCondition:
        return text_condition(base, [caption])

    asked = _shuffled(pictures, seed) if shuffle_captions else pictures
    base_losses = triple_losses(base, asked, condition)
    merger.apply(adapters)
    adapted_losses = triple_losses(base, asked, condition) if adapters else base_losses
    merger.apply([])
    gain = paired_gain(base_losses, adapted_losses)
    timesteps = torch.stack([picture.looks.timesteps for picture in pictures])
    report: dict[str, Any] = {
        "gain": gain.gain,
        "standard_error": gain.standard_error,
        "base_loss": gain.base_loss,
        "adapted_loss": gain.adapted_loss,
        "triples": base_losses.numel(),
        "bands": timestep_bands(base_losses, adapted_losses, timesteps, base.noise.timesteps),
        "strength": adapters[0].strength if adapters else 0.0,
        "pictures": len(pictures),
    }
    if shuffle_captions:
        right = triple_losses(base, pictures, condition)
        report["captions"] = {
            "right_loss": float(right.mean()),
            "shuffled_loss": gain.base_loss,
            "worse": float((base_losses - right).mean()),
            "standard_error": clustered_error(base_losses - right),
        }
    return report


def _shuffled(pictures: list[Measured], seed: int) -> list[Measured]:
    """Each picture with the caption of another, where there is another."""
    order = list(range(len(pictures)))
    random.Random(seed).shuffle(order)
    giver = {order[i]: order[(i + 1) % len(order)] for i in range(len(order))}
    return [replace(picture, caption=pictures[giver[i]].caption) for i, picture in enumerate(pictures)]
