"""Paired validation: how much better than the base an adapter predicts images that it was not trained on.

Base and adapter are measured on the same (image, noise, timestep) draws and their losses are subtracted, so
that what makes an image or a noise level hard cancels out, and the standard error is that of the difference.
Draws of one image are not independent of each other: errors are clustered by image.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from lora_core.data.images import (
    Bucket,
    Cut,
    ImageRecord,
    choose_bucket,
    crop_box,
    cut_at_focus,
    hash_file,
    open_mask,
    size_conditioning,
)
from lora_core.errors import DatasetError
from lora_core.lora.inject import merged
from lora_core.lora.weights import LoadedLora, Merger
from lora_core.model_files.sizes import RANDOM_MASKS
from lora_core.models.encode import encode_prompt
from lora_core.models.load import BaseModel, InpaintingModel
from lora_core.models.unet import PromptEmbeds
from lora_core.models.vae import load_pixels
from lora_core.runs.events import Validated

BATCH = 4
"""Draws that go through the UNet at once; fixed, so that the bits of a loss do not depend on memory."""

Encode = Callable[[str], PromptEmbeds]
"""From a caption to its embeddings, batch 1."""
OnProgress = Callable[[int, int], None]
"""Called with (done, total); an exception from it ends the work."""
MeasureGains = Callable[[Sequence[LoadedLora]], torch.Tensor]
"""From adapters to their gain on each draw, the base's loss minus theirs, (images, K)."""


@dataclass(frozen=True)
class EvalNoise:
    """The fixed draws of one image: `timesteps` (K,) and `noise` (K, C, h, w)."""

    timesteps: torch.Tensor
    noise: torch.Tensor


def eval_noise(name: str, latents: torch.Tensor, count: int, seed: int, num_timesteps: int) -> EvalNoise:
    """The fixed draws of one image, a function of (name, seed, count) and not of the other images.

    Timesteps are stratified over the full range, one per stratum; noise comes in pairs of opposite sign,
    which cancels its odd part.

    Args:
        name: of the image, the same at every measurement (its content hash).
        latents: (C, h, w), for the shape.
        count: K.
        num_timesteps: how many the base has.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    offsets = torch.rand(count, generator=generator, dtype=torch.float64)
    strata = (torch.arange(count, dtype=torch.float64) + offsets) / count
    halves = torch.randn((count + 1) // 2, *latents.shape, generator=generator)
    noise = torch.stack([halves, -halves], dim=1).flatten(0, 1)[:count]
    return EvalNoise((strata * num_timesteps).long().clamp(max=num_timesteps - 1), noise)


def weigh_latents(record: ImageRecord, bucket: Bucket, factor: int) -> torch.Tensor | None:
    """What each latent of an image counts in its loss, (1, H/f, W/f) in fp32 with the mean `record.weight`;
    None where all count 1.

    A mask m in [0, 1] is the mean over the pixels of each latent, cropped as the image is. The weight is
    outside + (1 - outside) m, divided by its mean, so that the loss is a weighted mean of the errors: an
    image with a small mask teaches as much as one without, and the loss keeps its size.

    Raises:
        DatasetError: the mask can no longer be read, or nothing of the image counts.
    """
    outside, size = record.outside, (bucket.width // factor, bucket.height // factor)
    if record.mask is None or outside == 1.0:
        return None if record.weight == 1.0 else torch.full((1, *size[::-1]), record.weight)
    small = _crop_mask(record, bucket, size)
    if not small.any():
        raise DatasetError(
            f"The mask {record.mask.name} leaves nothing of its image as it is cropped for training; paint"
            " white what should be learned, or remove it."
        )
    weights = outside + (1.0 - outside) * small
    return weights / weights.mean() * record.weight


def _crop_mask(record: ImageRecord, bucket: Bucket, size: tuple[int, int]) -> torch.Tensor:
    """The mask of an image, (1, H, W) in [0, 1], cropped as the image is and scaled to `size` (W, H)."""
    mask = open_mask(record)
    wide, high = mask.width / record.width, mask.height / record.height
    left, top, right, bottom = crop_box(record.width, record.height, bucket)
    box = (left * wide, top * high, min(right * wide, mask.width), min(bottom * high, mask.height))
    scaled = np.asarray(mask.resize(size, Image.Resampling.BOX, box), dtype=np.float32)
    return torch.from_numpy(scaled / 255.0)[None]


# Masks of inpainting bases.


SMALLEST_MASK = 0.2
"""The share of a side that a random mask covers at least."""


def mask_numbers(base: BaseModel, record: ImageRecord) -> range:
    """The masks that an image is trained with on a base, for `encode_view`; the first is measured with."""
    masks = 1 if record.mask is not None else RANDOM_MASKS
    return range(1, masks + 1 if isinstance(base, InpaintingModel) else 1)


def identify_view(record: ImageRecord, bucket: Bucket, mask: int) -> list[object]:
    """What `encode_view` depends on besides the image's bytes, its size and `flip`."""
    crop: list[object] = [record.crop] if record.crop else []
    crop += [bucket] if isinstance(bucket, Cut) else []
    masked = ["mask", hash_file(record.mask) if record.mask else mask] if mask else []
    return [*crop, *record.own_background, *masked]


def inpainting_mask(record: ImageRecord, bucket: Bucket, mask: int) -> torch.Tensor:
    """Mask number `mask` of an image, (1, H, W): 1 where an inpainting base is to paint. It is the image's
    own mask file where there is one, else a rectangle that follows from the image's bytes and the number.

    Source: `random_mask` of diffusers' examples/research_projects/dreambooth_inpaint, for rectangles of any
    size at any place. There each step has another; here the drawn ones are a few, whose latents are kept.
    """
    if record.mask is not None:
        return _crop_mask(record, bucket, (bucket.width, bucket.height))
    draw = random.Random(f"{hash_file(record.path)}/mask/{mask}")
    found = torch.zeros(1, bucket.height, bucket.width)
    wide, high = (round(side * draw.uniform(SMALLEST_MASK, 1.0)) for side in (bucket.width, bucket.height))
    left, top = draw.randint(0, bucket.width - wide), draw.randint(0, bucket.height - high)
    found[:, top : top + high, left : left + wide] = 1.0
    return found


def encode_view(
    base: BaseModel, record: ImageRecord, bucket: Bucket, flip: bool = False, mask: int = 0
) -> torch.Tensor:
    """The latents (4, h, w) of an image, mirrored or not; with the number of a mask, what an inpainting base
    sees of the image with it, (5, h, w).

    Raises:
        DatasetError: the image or its mask can no longer be read.
    """
    pixels = load_pixels(record, bucket, flip)
    if not mask:
        return base.encode_image(pixels)
    assert isinstance(base, InpaintingModel)
    covered = inpainting_mask(record, bucket, mask)
    return base.mask_condition(pixels, covered.flip(-1) if flip else covered)


@dataclass(frozen=True)
class EvalImage:
    """One image ready to be measured.

    Attributes:
        latents: (C, h, w).
        draws: its fixed noise and timesteps.
        caption: its caption.
        sizes: (6,), the size conditioning; None for an image of exactly its latents' size.
        weights: what the error of each latent counts, (1, h, w); None for 1.
        condition: what an inpainting base sees of it, (5, h, w); None for nothing.
    """

    latents: torch.Tensor
    draws: EvalNoise
    caption: str
    sizes: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    condition: torch.Tensor | None = None

    @property
    def timesteps(self) -> torch.Tensor:
        """Of its draws, (K,)."""
        return self.draws.timesteps


def encode_eval_image(
    base: BaseModel, record: ImageRecord, caption: str, draws: int, seed: int, resolution: int = 0
) -> EvalImage:
    """An image as latents with its fixed draws; a resolution of 0 is the base's own."""
    bucket = choose_bucket(record.width, record.height, resolution or base.resolution, base.size_multiple)
    bucket = cut_at_focus(record.width, record.height, bucket, record.focus)
    latents = encode_view(base, record, bucket)
    condition = encode_view(base, record, bucket, mask=1) if mask_numbers(base, record) else None
    fixed = eval_noise(hash_file(record.path), latents, draws, seed, base.noise.num_timesteps)
    sizes = torch.tensor(size_conditioning(record.width, record.height, bucket), dtype=torch.float32)
    weights = weigh_latents(record, bucket, base.vae_scale_factor)
    return EvalImage(latents, fixed, caption, sizes, weights, condition)


def encode_eval_images(
    base: BaseModel, records: Sequence[ImageRecord], draws: int, seed: int
) -> list[EvalImage]:
    """Images with their own captions, see `encode_eval_image`."""
    return [encode_eval_image(base, record, record.caption, draws, seed) for record in records]


def eval_losses(
    base: BaseModel, images: Sequence[EvalImage], encode: Encode, on_image: OnProgress | None = None
) -> torch.Tensor:
    """The squared error of the prediction for each draw, (images, K) in fp64, weighted as `EvalImage` says.

    Args:
        base: with whatever adapter is in it.
        images: what to measure on; all have K draws.
        on_image: called after each image.
    """
    rows = []
    with torch.no_grad():
        for done, image in enumerate(images, start=1):
            text = encode(image.caption)
            losses = []
            for start in range(0, len(image.draws.timesteps), BATCH):
                noise = image.draws.noise[start : start + BATCH].to(base.device)
                timesteps = image.draws.timesteps[start : start + BATCH].to(base.device)
                latents = image.latents.to(base.device).expand_as(noise)
                noisy = base.noise.add_noise(latents, noise, timesteps)
                target = base.noise.target(latents, noise, timesteps)
                if image.condition is not None:
                    seen = image.condition.to(base.device).expand(len(noise), -1, -1, -1)
                    noisy = torch.cat([noisy, seen], 1)
                sizes = None if image.sizes is None else image.sizes.expand(len(noise), -1)
                error = base.predict_noise(noisy, timesteps, text.expand(len(noise)), sizes) - target
                squared = error.cpu().double().square()  # MPS has no float64
                if image.weights is not None:
                    squared = squared * image.weights
                losses.append(squared.flatten(1).mean(1))
            rows.append(torch.cat(losses))
            if on_image is not None:
                on_image(done, len(images))
    return torch.stack(rows)


# Gains.


class Gain(NamedTuple):
    """The mean over draws of base loss minus adapted loss, and its standard error clustered by image."""

    gain: float
    standard_error: float
    base_loss: float
    adapted_loss: float


def paired_gain(base_losses: torch.Tensor, adapted_losses: torch.Tensor) -> Gain:
    """The gain of paired losses, both (images, K)."""
    difference = base_losses - adapted_losses
    return Gain(
        gain=float(difference.mean()),
        standard_error=clustered_error(difference),
        base_loss=float(base_losses.mean()),
        adapted_loss=float(adapted_losses.mean()),
    )


def standard_error(values: torch.Tensor) -> float:
    """The standard error of the mean of independent values (n,); 0 for fewer than two."""
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0


def clustered_error(values: torch.Tensor) -> float:
    """The standard error of the mean of (images, K) values: that of the images' means, but at least that of
    the draws taken for independent, as two or three images can agree by chance."""
    return max(standard_error(values.mean(dim=1)), standard_error(values.flatten()))


def gain_by_timestep(
    base_losses: torch.Tensor,
    adapted_losses: torch.Tensor,
    timesteps: torch.Tensor,
    highest: int,
    bands: int = 4,
) -> list[dict[str, float]]:
    """Gain by noise level: rows {from, to, gain, standard_error}, timesteps in [from, to).

    Args:
        base_losses, adapted_losses, timesteps: each (images, K).
        highest: how many timesteps the base has.
        bands: the number of equal bands.
    """
    rows = []
    difference = base_losses - adapted_losses
    for band in range(bands):
        low, high = highest * band // bands, highest * (band + 1) // bands
        inside = (timesteps >= low) & (timesteps < high)
        if not inside.any():
            continue
        means = torch.stack([d[m].mean() for d, m in zip(difference, inside, strict=True) if m.any()])
        gain = float(difference[inside].mean())
        rows.append({"from": low, "to": high, "gain": gain, "standard_error": standard_error(means)})
    return rows


class Evaluator:
    """Measures adapters one after the other on the same draws, so that their gains are paired."""

    def __init__(
        self,
        base: BaseModel,
        records: Sequence[ImageRecord],
        draws: int = 8,
        seed: int = 0,
        on_phase: Callable[[str], None] | None = None,
        on_image: OnProgress | None = None,
        encode: Encode | None = None,
    ) -> None:
        """Encode the images and measure the base.

        Args:
            base: with no adapter in it.
            records: images with captions.
            on_phase: called with the name of the measurement.
            on_image: called within each measurement.
            encode: the text encoders; None for the base's own at clip skip 1.
        """
        self._base = base
        self._on_phase = on_phase
        self._on_image = on_image
        self._encode = encode or (lambda caption: encode_prompt(base, [caption]))
        self.images = encode_eval_images(base, records, draws, seed)
        self._merger = Merger(base.modules)
        self._calls = 0
        self.base_losses = self.losses([])

    def gains(self, adapters: Sequence[LoadedLora]) -> torch.Tensor:
        """The joint gain of adapters on each draw, (images, K); exactly 0 where all strengths are 0."""
        return self.base_losses - self.losses(adapters)

    def losses(
        self, adapters: Sequence[LoadedLora], images: Sequence[EvalImage] | None = None
    ) -> torch.Tensor:
        """The losses with adapters, (images, K), on the evaluator's own images or on others."""
        self._calls += 1
        if self._on_phase is not None:
            self._on_phase(f"measurement {self._calls}: {_words(adapters)}")
        with merged(self._base, self._merger, adapters):
            return eval_losses(self._base, images or self.images, self._encode, self._on_image)


def _words(adapters: Sequence[LoadedLora]) -> str:
    ranks = [adapter.weights.highest_rank for adapter in adapters]
    words = [f"rank {rank} at strength {a.strength:.3g}" for rank, a in zip(ranks, adapters, strict=True)]
    return ", ".join(words) or "the base"


def validation_report(
    base: BaseModel,
    records: list[ImageRecord],
    adapters: list[LoadedLora],
    draws: int = 8,
    seed: int = 0,
    shuffle_captions: bool = False,
) -> dict[str, Any]:
    """The document of `validate --json`.

    With `shuffle_captions` each image gets another one's caption, for base and adapter alike, and `captions`
    has how much worse the base's loss is than with the right ones.
    """
    evaluator = Evaluator(base, records, draws, seed)
    right = evaluator.base_losses
    images = _shuffle_captions(evaluator.images, seed) if shuffle_captions else evaluator.images
    base_losses = evaluator.losses([], images) if shuffle_captions else right
    adapted_losses = evaluator.losses(adapters, images) if adapters else base_losses
    gain = paired_gain(base_losses, adapted_losses)
    timesteps = torch.stack([image.draws.timesteps for image in images])
    report: dict[str, Any] = {
        **gain._asdict(),
        "triples": base_losses.numel(),
        "bands": gain_by_timestep(base_losses, adapted_losses, timesteps, base.noise.num_timesteps),
        "strength": adapters[0].strength if adapters else 0.0,
        "pictures": len(images),
    }
    if shuffle_captions:
        report["captions"] = {
            "right_loss": float(right.mean()),
            "shuffled_loss": gain.base_loss,
            "worse": float((base_losses - right).mean()),
            "standard_error": clustered_error(base_losses - right),
        }
    return report


def _shuffle_captions(images: Sequence[EvalImage], seed: int) -> list[EvalImage]:
    """Each image with the caption of another, where there is another."""
    order = list(range(len(images)))
    random.Random(seed).shuffle(order)
    giver = {order[i]: order[(i + 1) % len(order)] for i in range(len(order))}
    return [replace(image, caption=images[giver[i]].caption) for i, image in enumerate(images)]


# Which step of a run is the best one, and when a run stops gaining: rules that know the error bars.
#
# All steps are measured on the same draws, so the difference of two of them has a small error of its own,
# however large that of either gain is. A step is better, or worse, than another where the difference
# exceeds its error; between the two the earlier one stays, which is less overfitted.


CLEARLY = 2.0
"""Standard errors from which a difference is clear."""


def paired_difference(before: torch.Tensor | None, now: torch.Tensor) -> tuple[float, float]:
    """How much lower the loss is now than before, on the same draws (images, K), and the standard error; NaN
    where `before` is None or of other draws."""
    if before is None or before.shape != now.shape:
        return float("nan"), float("nan")
    gained = before - now
    return float(gained.mean()), clustered_error(gained)


def is_better(gained: float, error: float) -> bool:
    """Whether a difference favours the later step."""
    return gained > error


def is_worse(gained: float, error: float) -> bool:
    """Whether a difference is against the later step."""
    return gained < -error


def reason_to_stop(validations: Sequence[Validated], patience: int) -> str:
    """Why a run should stop after its last validation, or "" where it should continue.

    It stops after `patience` validations in a row without improvement, if the last of them is clearly worse;
    after twice as many in any case.

    Args:
        validations: of the run, in order.
        patience: 0 for never.
    """
    best = next((at for at in range(len(validations) - 1, -1, -1) if validations[at].best), None)
    if not patience or best is None:
        return ""
    since = len(validations) - 1 - best
    last = validations[-1]
    falling = last.against_best < -CLEARLY * last.against_best_error
    if since < patience or not (falling or since >= 2 * patience):
        return ""
    how = (
        f"the last is {-last.against_best:.4f} below it (standard error {last.against_best_error:.4f})"
        if falling
        else (
            f"the last differs from it by {last.against_best:+.4f} (standard error"
            f" {last.against_best_error:.4f})"
        )
    )
    return (
        f"The gain on held-out images stopped growing after step {validations[best].step:,}: {since}"
        f" validations were no better, and {how}. Resume the run to continue anyway."
    )
