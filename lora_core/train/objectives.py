"""Objectives beside the squared error on a run's images: other errors, masks of inpainting bases, predictions
of the base that are to be kept, and concept sliders, whose batches are prompts."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lora_core.evaluate.validator import mask_numbers
from lora_core.lora.inject import at_strength
from lora_core.models.load import BaseModel, InpaintingModel
from lora_core.models.unet import NoisePredictor, NoiseSchedule, PromptEmbeds, default_time_ids, to_device
from lora_core.settings.config import RunConfig
from lora_core.settings.schema import SLIDER_STEPS, DatasetSection, SliderSection
from lora_core.train.data import Batch, Batches, LatentCache, PromptCache, TrainImage
from lora_core.train.loop import Delta, NoiseSample, TrainState, noise_seed, prediction_loss, sample_noise

WHOLE = 0.25
"""Share of the rows of an inpainting base whose mask covers the full image, as in the training of Stable
Diffusion inpainting (its model card: "in 25% mask everything")."""
KEPT = 0.5
"""Share of a slider's rows that are prompts to leave alone, where there are any."""
SLIDER_CFG = 3.0
"""Guidance of the latents that a slider is trained on, as in LECO."""


def absolute_error(predicted: torch.Tensor, target: torch.Tensor, delta: Delta) -> torch.Tensor:
    """Element by element, (B, 4, h, w)."""
    return F.l1_loss(predicted, target, reduction="none")


def huber_error(predicted: torch.Tensor, target: torch.Tensor, delta: Delta) -> torch.Tensor:
    """2 d (sqrt(e^2 + d^2) - d), element by element, (B, 4, h, w), with e the error and d = `delta`.

    It is e^2 for small errors, as squared error, and 2 d |e| for large ones, so that no element's gradient is
    above 2 d. Written as a quotient, which loses no digits where e is small. The scale is that of kohya's
    `loss_type = huber`, so that its `huber_c` means the same here.
    Source: Khrapov et al. 2024, "Improving Diffusion Models's Data-Corruption Resistance using Scheduled
    Pseudo-Huber Loss", section 3.
    """
    turn = delta().to(predicted).view(-1, 1, 1, 1)
    squared = F.mse_loss(predicted, target, reduction="none")
    return 2.0 * turn * squared / ((squared + turn.square()).sqrt() + turn)


def constant_delta(noise: NoiseSchedule, timesteps: torch.Tensor, delta: float) -> torch.Tensor:
    """`delta` for each of the timesteps, (B,)."""
    return torch.full((len(timesteps),), delta, device=timesteps.device)


def snr_delta(noise: NoiseSchedule, timesteps: torch.Tensor, delta: float) -> torch.Tensor:
    """(1 - delta) / (1 + s)^2 + delta, (B,), with s = sqrt((1 - a) / a), the noise over the signal.

    Finite without a signal, too. Source: as of `huber_error`, section 3.2.
    """
    share = noise.alphas_cumprod.to(timesteps.device)[timesteps]
    signal, spread = share.sqrt(), (1.0 - share).sqrt()
    return (1.0 - delta) * (signal / (signal + spread)).square() + delta


def exponential_delta(noise: NoiseSchedule, timesteps: torch.Tensor, delta: float) -> torch.Tensor:
    """delta^(t / T), (B,): 1 at the first timestep, `delta` at the end. Source: as of `huber_error`."""
    return delta ** (timesteps.float() / noise.num_timesteps)


@dataclass(frozen=True)
class InpaintingBatch(Batch):
    """One micro-batch of an inpainting base, with the condition of each image, `conditions` (B, 5, h, w)."""

    conditions: torch.Tensor


class InpaintingBatches(Batches):
    """All micro-batches of a run on an inpainting base, by number: each image has its own mask, or where it
    has none one of its random masks or, for a share `WHOLE` of the rows, one that covers it."""

    def __init__(
        self, base: InpaintingModel, images: list[TrainImage], cache: LatentCache, rules: DatasetSection,
        batch_size: int, seed: int,
    ) -> None:  # fmt: skip
        super().__init__(images, cache, rules, batch_size, seed)
        self._base = base

    def batch(self, number: int) -> InpaintingBatch:
        """Micro-batch `number`, counted from 0 over the run."""
        batch, seen = super().batch(number), []
        for row, (item, flip, _) in enumerate(self._rows(number)):
            draw = random.Random(f"{self._seed}/mask/{number}/{row}")
            if item.record.mask is None and draw.random() < WHOLE:
                seen.append(self._base.blank_condition(*batch.latents.shape[-2:]))
            else:
                mask = draw.choice(mask_numbers(self._base, item.record))
                seen.append(self._cache.latents(item.record, item.bucket, flip, mask))
        return InpaintingBatch(**vars(batch), conditions=torch.stack(seen))


def inpainting_loss(
    state: TrainState, text: PromptCache, batch: Batch, rows: slice, draw: NoiseSample, config: RunConfig
) -> torch.Tensor:
    """As `image_loss`, over the full image, with an inpainting base's condition; a batch without masks counts
    as masked all over."""
    noise, latents = state.base.noise, batch.latents[rows]
    added = draw.noise if draw.perturbed is None else draw.perturbed
    noisy = noise.add_noise(latents, added, draw.timesteps)
    if isinstance(batch, InpaintingBatch):
        noisy = torch.cat([noisy, batch.conditions[rows]], 1)
    pair = noisy, noise.target(latents, draw.noise, draw.timesteps)
    embeds, weights = text.embed_batch(batch.captions[rows]), batch.weights
    counted = None if weights is None else weights[rows]
    sizes = batch.sizes[rows]
    return prediction_loss(state.base, pair, draw.timesteps, embeds, config.loss, sizes, counted)


class PriorBatches:
    """Micro-batches of images that the base made itself, by number."""

    def __init__(
        self, images: list[tuple[torch.Tensor, str]], sizes: torch.Tensor, batch_size: int, seed: int
    ) -> None:
        """Draw `batch_size` of the images, latents (4, h, w) and caption each; `sizes` is (6,), see
        `size_conditioning`."""
        self._made = images
        self._sizes = sizes.expand(batch_size, -1)
        self._seed = seed

    def batch(self, number: int) -> Batch:
        """What goes with micro-batch `number`, counted from 0 over the run."""
        draw = random.Random(f"{self._seed}/prior/{number}")
        latents, captions = zip(*draw.choices(self._made, k=len(self._sizes)), strict=True)
        return Batch(torch.stack(latents), list(captions), ["prior"] * len(captions), self._sizes)

    def loss(
        self, state: TrainState, text: PromptCache, rows: slice, number: int, config: RunConfig
    ) -> torch.Tensor:
        """The error against the base's own prediction for some rows of micro-batch `number`, (B,), times
        `loss.prior_preservation`.

        Source: Ruiz et al. 2023 ("DreamBooth", section 3.3) for images that the base makes itself; the base's
        prediction in place of their noise is the prior prediction of OneTrainer, and has less variance.
        """
        base, batch = state.base, self.batch(number)
        # Torch takes 32 bits of a seed on the CPU; no run has so many micro-batches.
        generator = torch.Generator().manual_seed(noise_seed(config.seed, number + 2**31))
        draw = sample_noise(batch.latents, base.noise.num_timesteps, config.loss, generator).rows(rows)
        noisy = base.noise.add_noise(batch.latents[rows], draw.noise, draw.timesteps)
        captions, sizes = batch.captions[rows], batch.sizes[rows]
        with torch.no_grad(), at_strength(state.injected, 0.0):
            sent, at = to_device(base.device, noisy, draw.timesteps.float())
            target = base.predict_noise(sent, at, text.embed_batch(captions), sizes).cpu()
        embeds, pair = text.embed_batch(captions), (noisy, target)
        found = prediction_loss(base, pair, draw.timesteps, embeds, config.loss, sizes)
        return config.loss.prior_preservation * found


@dataclass(frozen=True)
class SliderBatch(Batch):
    """One micro-batch of a concept slider: `captions` are the slider's targets, with B prompts of each
    opposite, and a direction, 1 or -1. `latents` are zeros, for their shape."""

    positive: list[str]
    negative: list[str]
    direction: float


class SliderBatches(Batches):
    """All micro-batches of a concept slider, by number: prompts in place of images, one direction after the
    other."""

    def __init__(
        self, base: BaseModel, section: SliderSection, batch_size: int, side: int, seed: int
    ) -> None:
        """Draw the prompts of `batch_size` rows from those of `section`; images are `side` pixels large."""
        edge = side // base.vae_scale_factor
        self._latents = torch.zeros(batch_size, base.latent_channels, edge, edge)
        self._sizes = default_time_ids(batch_size, side, side)
        self._section = section
        self._seed = seed

    def batch(self, number: int) -> SliderBatch:
        """Micro-batch `number`, counted from 0 over the run."""
        draw, kept = random.Random(f"{self._seed}/slider/{number}"), self._section.kept()
        sources = [kept if kept and draw.random() < KEPT else self._section.prompts() for _ in self._latents]
        rows = [draw.choice(source) for source in sources]
        target, positive, negative = (list(column) for column in zip(*rows, strict=True))
        direction = -1.0 if number % 2 else 1.0
        return SliderBatch(self._latents, target, target, self._sizes, positive, negative, direction)

    def captions(self, number: int) -> list[str]:
        """All prompts."""
        return self._section.captions()

    def heaviest(self) -> int:
        """The number of a micro-batch; all are as heavy."""
        return 0


def slider_loss(
    state: TrainState, text: PromptCache, batch: Batch, rows: slice, draw: NoiseSample, config: RunConfig
) -> torch.Tensor:
    """The loss of some rows of a micro-batch of a concept slider, (B,), with the adapter at the batch's
    direction afterwards.

    At strength d = 1 or -1 the adapter should predict base(target) + d eta (base(positive) -
    base(negative)), for latents that it denoised itself from noise to a random timestep. The base's
    predictions are those of the same weights at strength 0, so that nothing is loaded twice.

    Source: Gandikota et al. 2023, equation 7, and LECO (github.com/p1atdev/LECO) for the latents.
    """
    base, injected = state.base, state.injected
    assert isinstance(batch, SliderBatch)
    with torch.no_grad():
        injected.set_strength(batch.direction)
        start = torch.full_like(draw.timesteps, base.noise.num_timesteps - 1)
        targets, positives, negatives = (
            prompts[rows] for prompts in (batch.captions, batch.positive, batch.negative)
        )
        noisy = partial_denoise(base, text, targets, draw.noise, (start, draw.timesteps), SLIDER_STEPS)
        injected.set_strength(0.0)
        target, shift = slider_target(base, text, (targets, positives, negatives), noisy, draw.timesteps)
        wanted = target + batch.direction * config.slider.guidance * shift
    injected.set_strength(batch.direction)
    pair = noisy.cpu(), wanted.cpu()
    embeds = text.embed_batch(targets)
    return prediction_loss(base, pair, draw.timesteps, embeds, config.loss, batch.sizes[rows])


def partial_denoise(
    base: NoisePredictor, text: PromptCache, prompts: list[str], noisy: torch.Tensor,
    span: tuple[torch.Tensor, torch.Tensor], steps: int,
) -> torch.Tensor:  # fmt: skip
    """Latents (B, 4, h, w) on the base's device, taken in DDIM steps from one timestep to a lower one, `span`
    (B,) and (B,), under B prompts with guidance."""
    first, last = span
    guided = any(prompts)
    embeds = text.embed_batch(prompts)
    if guided:
        embeds = PromptEmbeds.cat([text.embed_negative().expand(len(prompts)), embeds])
    latents = noisy.to(base.device)
    stops = [(first + (last - first) * done / steps).round().long() for done in range(steps + 1)]
    for at, to in itertools.pairwise(stop.to(base.device) for stop in stops):
        if guided:
            without, under = base.predict_noise(latents.repeat(2, 1, 1, 1), at.repeat(2), embeds).chunk(2)
            predicted = without + SLIDER_CFG * (under - without)
        else:
            predicted = base.predict_noise(latents, at, embeds)
        latents = ddim_step(base.noise, latents, predicted, at, to)
    return latents


def ddim_step(
    noise: NoiseSchedule, noisy: torch.Tensor, prediction: torch.Tensor, timesteps: torch.Tensor,
    to: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """A DDIM step without noise from `timesteps` to the lower ones `to`, both (B,), given the prediction, all
    (B, C, h, w). Source: Song et al. 2021, equation 12 with sigma = 0."""
    signal, spread = noise.factors(timesteps, noisy)
    if noise.objective == "epsilon":
        return noise.add_noise((noisy - spread * prediction) / signal, prediction, to)
    if noise.objective == "flow":
        return noise.add_noise(noisy - spread * prediction, noisy + signal * prediction, to)
    clean, added = signal * noisy - spread * prediction, spread * noisy + signal * prediction
    return noise.add_noise(clean, added, to)


def slider_target(
    base: NoisePredictor, text: PromptCache, prompts: Sequence[list[str]], noisy: torch.Tensor,
    timesteps: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """What the base, at strength 0, predicts for B target prompts, and how far apart its predictions for the
    positive and the negative ones are, both (B, 4, h, w); `noisy` is on the base's device."""
    at = timesteps.to(base.device)
    target, positive, negative = (base.predict_noise(noisy, at, text.embed_batch(each)) for each in prompts)
    return target, positive - negative
