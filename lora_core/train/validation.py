"""Validation of a run: the adapter measured on the same fixed noise draws each time.

Three sets of images answer three questions. Held-out images: is there a gain? Training images: how much of it
is memorization? The base's own images: forgetting? The base's losses on them are measured once.
"""

import functools
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lora_core.backends.compact import quantized_bits
from lora_core.data.captions import class_captions, plain_record_caption
from lora_core.data.images import ImageRecord, choose_bucket, hash_file
from lora_core.evaluate import validator
from lora_core.generate.pipeline import sample_latents
from lora_core.generate.request import GenerationRequest
from lora_core.lora.inject import act_as, adapter_weights, at_strength, load_weights
from lora_core.lora.weights import LoadedLora
from lora_core.models.load import BaseModel
from lora_core.models.unet import default_time_ids
from lora_core.models.weight_files import load_or_compute, short_digest
from lora_core.runs import events
from lora_core.settings.config import RunConfig
from lora_core.settings.schema import PRIOR_IMAGES, SLIDER_IMAGES, parse_new_tokens
from lora_core.train.data import Batches, LatentCache, PromptCache, TrainImage
from lora_core.train.loop import TrainState
from lora_core.train.objectives import PriorBatches, partial_denoise, slider_target

OnStep = Callable[[int, int], None]
"""Called with (done, total); an exception ends the work."""
RAW = "raw"
"""The held-out images with the raw adapter, where the rest is measured with its average."""
MIN_TRAINING_IMAGES = 4
"""Least number of training images measured, if there are as many."""
MAX_CROSSED = 16
FEWEST_DRAWS, MOST_DRAWS = 4, 32
STEPS_BETWEEN = 2
"""Sampler steps between two of the points that a slider is measured at."""
CROSSED = (
    "There are too few images to hold any out, so the gain is measured on training images, each with the"
    " caption of another: that shows whether the words are learned, and little of memorization."
    " Add images to measure better."
)
_STEPS, _CFG, _SAMPLER = 10, 3.0, "ddim"


PRIOR_SEED = 1_000_000
"""The first seed of these, far from those that forgetting is measured on."""


class ForgettingSet:
    """Images of the base's own, on which training should change nothing.

    Latents sampled from plain prompts with the adapter off, made when they are first asked for and cached.

    Attributes:
        side: of the images, in pixels. prompts: their prompts.
    """

    def __init__(
        self, base: BaseModel, text: PromptCache, kept: tuple[Path, str], requests: list[tuple[str, int]],
        side: int,
    ) -> None:  # fmt: skip
        """Nothing is sampled yet; `kept` are the folder of the cache and a hash of the base, `requests` the
        prompts and seeds, see `repeat_prompts`."""
        self._base = base
        self._text = text
        self._folder, self._identity = kept
        self.side = choose_bucket(side, side, side, base.size_multiple).width
        self._requests = requests
        self.prompts = list(dict.fromkeys(prompt for prompt, _ in self._requests))
        self._images: list[validator.EvalImage] = []

    @property
    def missing(self) -> list[tuple[str, int]]:
        """The images, as (prompt, seed), that `images` has to sample or to load."""
        return [] if self._images else self._requests

    def images(self, draws: int, seed: int, on_step: OnStep) -> list[validator.EvalImage]:
        """The images with `draws` noise draws each; `on_step` is called while they are sampled."""
        if not self._images:
            for own, (prompt, number) in zip(self.latents(on_step), self._requests, strict=True):
                steps = self._base.noise.num_timesteps
                noise = validator.eval_noise(f"{prompt}/{number}", own, draws, seed, steps)
                self._images.append(validator.EvalImage(own, noise, prompt))
        return self._images

    def latents(self, on_step: OnStep) -> list[torch.Tensor]:
        """Of each image, (4, h, w) on the CPU; sampled with the adapter as it is, which has to be off."""
        return [self._latents(prompt, number, on_step) for prompt, number in self._requests]

    def _latents(self, prompt: str, number: int, on_step: OnStep) -> torch.Tensor:
        base = self._base
        request = GenerationRequest(
            seed=number, steps=_STEPS, cfg=_CFG, cfg_rescale=0.0, sampler=_SAMPLER, width=self.side,
            height=self.side,
        )  # fmt: skip
        kept = (base.dtype, base.device.type, quantized_bits(base.denoiser))
        name = short_digest(self._identity, prompt, request, kept)

        def sample() -> dict[str, torch.Tensor]:
            text = self._text.embed(prompt)
            made = sample_latents(base, request, text, self._text.embed_negative(), on_step)
            return {"value": made[0].float().cpu()}

        return load_or_compute(self._folder / f"{name}.safetensors", sample)["value"]


def repeat_prompts(prompts: Sequence[str], count: int, seed: int = 0) -> list[tuple[str, int]]:
    """Prompts and seeds of `count` images; those beyond the number of prompts have these again with the next
    seed."""
    return [(prompts[number % len(prompts)], seed + number // len(prompts)) for number in range(count)]


def forgetting_set(
    base: BaseModel, text: PromptCache, kept: tuple[Path, str], side: int, config: RunConfig
) -> ForgettingSet | None:
    """The images that forgetting is measured on; None where it is not."""
    section = config.validation
    if not (section.forgetting and section.every and section.pictures):
        return None
    return ForgettingSet(
        base, text, kept, repeat_prompts(base.family.prior_prompts, section.forgetting), side
    )


def prior_set(
    base: BaseModel, text: PromptCache, kept: tuple[Path, str], side: int, config: RunConfig,
    records: Sequence[ImageRecord],
) -> ForgettingSet | None:  # fmt: skip
    """The images on which the base's predictions are to be kept, of the captions of `records` without the
    trigger word and with the words that new tokens start from, or of plain things without a trigger; None if
    that is off, and for a concept slider."""
    if not config.keeps_prior:
        return None
    prompts = class_captions(records, config.dataset)
    for token in parse_new_tokens(config.adapter.new_tokens):
        words = token.words.replace("\\", r"\\")
        prompts = [token.word.sub(words, prompt) for prompt in prompts]
    prompts = list(dict.fromkeys(prompts))
    prompts = prompts or list(base.family.prior_prompts)
    prompts = random.Random(f"{config.seed}/prior").sample(prompts, min(PRIOR_IMAGES, len(prompts)))
    return ForgettingSet(base, text, kept, repeat_prompts(prompts, PRIOR_IMAGES, PRIOR_SEED), side)


def build_prior(
    state: TrainState, made: ForgettingSet, count: int, seed: int, say: Callable[[str, int, int], None]
) -> PriorBatches:
    """The images on which a run keeps the base's predictions, `count` a micro-batch."""
    with evaluating(state), at_strength(state.injected, 0.0):
        latents = made.latents(functools.partial(say, "Generating prior images"))
    pairs = list(zip(latents, (prompt for prompt, _ in made.missing), strict=True))
    return PriorBatches(pairs, default_time_ids(1, made.side, made.side)[0], count, seed)


@dataclass
class ValidationSets:
    """The images that answer a validation's three questions: `training` is empty and `forgetting` None where
    these are not measured; a concept slider has `slider` in place of `held_out`; `draws` per image, with
    their seed; notes for the user."""

    held_out: list[validator.EvalImage]
    training: list[validator.EvalImage] = field(default_factory=list)
    forgetting: ForgettingSet | None = None
    draws: int = 0
    seed: int = 0
    notes: list[str] = field(default_factory=list)
    slider: "list[EvalSlider]" = field(default_factory=list)

    @property
    def measured(self) -> "Sequence[validator.EvalImage | EvalSlider]":
        """What the gain is measured on."""
        return self.slider or self.held_out

    def by_name(self, on_step: OnStep) -> "dict[str, Sequence[validator.EvalImage | EvalSlider]]":
        """The sets that there are, with the adapter off; `on_step` is called while images are sampled."""
        found: dict[str, Sequence[validator.EvalImage | EvalSlider]] = {"held out": self.measured}
        if self.training:
            found["training"] = self.training
        if self.forgetting is not None:
            found["prior"] = self.forgetting.images(self.draws, self.seed, on_step)
        return found


def build_validation_sets(
    images: list[TrainImage],
    held_out: list[TrainImage],
    cache: LatentCache,
    config: RunConfig,
    base: BaseModel,
) -> ValidationSets:
    """Held-out and training images with fixed draws of noise and timestep, ready to be measured.

    Where there are too few images to hold any out, training images with each other's captions take their
    place: a cross-validation over captions.
    """
    section = config.validation
    if not section.every or not section.pictures:
        return ValidationSets([])
    if config.slider.on:
        return ValidationSets([], draws=section.draws_per_image, seed=config.seed)

    timesteps = base.noise.num_timesteps

    def to_eval(image: TrainImage, captioned: TrainImage | None = None) -> validator.EvalImage:
        """`image`, with the caption of another one if given."""
        latents = cache.latents(image.record, image.bucket, False)
        digest = hash_file(image.record.path)
        noise = validator.eval_noise(digest, latents, section.draws_per_image, config.seed, timesteps)
        masks = validator.mask_numbers(base, image.record)[:1]
        seen = cache.latents(image.record, image.bucket, False, masks[0]) if masks else None
        caption = plain_record_caption((captioned or image).record, config.dataset)
        return validator.EvalImage(latents, noise, caption, image.sizes(), image.weights, seen)

    count = max(len(held_out), MIN_TRAINING_IMAGES) if held_out else MAX_CROSSED
    order = random.Random(f"{config.seed}/measured").sample(range(len(images)), min(count, len(images)))
    training = [to_eval(images[index]) for index in sorted(order)] if section.memorization else []
    sets = ValidationSets([], training, None, section.draws_per_image, config.seed)
    if held_out:
        sets.held_out = [to_eval(image) for image in held_out]
    else:
        sets.held_out = [to_eval(images[i], images[(i + 1) % len(images)]) for i in sorted(order)]
        sets.notes.append(CROSSED)
    return sets


@dataclass(frozen=True)
class EvalSlider:
    """Points along one image of a concept slider's prompt, at which the wanted change is known.

    Attributes:
        caption: the prompt that it acts on.
        timesteps: (K,).
        noisy: (K, C, h, w), as the base denoises them.
        target: what the base predicts there, (K, C, h, w).
        shift: what the adapter should add at strength 1, and take away at -1, (K, C, h, w).
    """

    caption: str
    timesteps: torch.Tensor
    noisy: torch.Tensor
    target: torch.Tensor
    shift: torch.Tensor


def build_slider_set(
    state: TrainState, text: PromptCache, batches: Batches, config: RunConfig, kept: tuple[Path, str],
    say: Callable[[str, int, int], None],
) -> list[EvalSlider]:  # fmt: skip
    """The fixed points that a concept slider is measured on, along `SLIDER_IMAGES` images or one for each
    prompt, made once and `kept` in a folder under a hash of the base; none for a run with images."""
    section, prompts, base = config.validation, config.slider.prompts(), state.base
    if not (config.slider.on and section.every and section.pictures):
        return []
    found, latents = [], batches.batch(0).latents[0]
    count = min(max(SLIDER_IMAGES, len(prompts)), MAX_CROSSED)
    with evaluating(state), at_strength(state.injected, 0.0), torch.no_grad():
        for number in range(count):
            say("Preparing validation", number, count)
            three = prompts[number % len(prompts)]
            draws = validator.eval_noise(
                f"slider {number}", latents, section.draws_per_image, config.seed, base.noise.num_timesteps
            )
            how = (base.dtype, base.device.type, quantized_bits(base.denoiser), config.train.clip_skip)
            drawn = (number, len(draws.timesteps), config.seed, latents.shape)
            file = kept[0] / f"{short_digest(kept[1], three, drawn, how)}.safetensors"
            made = load_or_compute(file, functools.partial(_slider_points, base, text, three, draws))
            shift = config.slider.guidance * made["shift"]
            found.append(EvalSlider(three[0], draws.timesteps, made["value"], made["target"], shift))
    return found


def _slider_points(
    base: BaseModel, text: PromptCache, prompts: tuple[str, str, str], draws: validator.EvalNoise
) -> dict[str, torch.Tensor]:
    """One image, denoised from the last timestep through all of `draws`; the base's predictions at each."""
    at, latents = torch.tensor([base.noise.num_timesteps - 1]), draws.noise[:1]
    rows = []
    for timestep in draws.timesteps.flip(0).split(1):
        latents = partial_denoise(base, text, [prompts[0]], latents, (at, timestep), STEPS_BETWEEN)
        target, shift = slider_target(base, text, [[prompt] for prompt in prompts], latents, timestep)
        rows.append((latents.cpu(), target.cpu(), shift.cpu()))
        at = timestep
    columns = (torch.cat(column) for column in zip(*reversed(rows), strict=True))
    return dict(zip(("value", "target", "shift"), columns, strict=True))


def slider_losses(
    state: TrainState, points: Sequence[EvalSlider], encode: validator.Encode, on_step: OnStep
) -> torch.Tensor:
    """The squared distance of the prediction from the wanted one, the mean of strength 1 and -1 times the
    present strength, for each point, (images, K) in fp64."""
    base, strength = state.base, state.injected.strength
    rows = []
    for done, point in enumerate(points, start=1):
        losses = torch.zeros(len(point.timesteps), dtype=torch.float64)
        for direction in (1.0, -1.0):
            with torch.no_grad(), at_strength(state.injected, direction * strength):
                text = encode(point.caption)
                for start in range(0, len(losses), validator.BATCH):
                    part = slice(start, start + validator.BATCH)
                    noisy, at = point.noisy[part].to(base.device), point.timesteps[part].to(base.device)
                    predicted = base.predict_noise(noisy, at, text.expand(len(at))).cpu().double()
                    wanted = point.target[part] + direction * point.shift[part]
                    losses[part] += (predicted - wanted).square().flatten(1).mean(1) / 2
        rows.append(losses)
        on_step(done, len(points))
    return torch.stack(rows)


@contextmanager
def evaluating(state: TrainState, averaged: bool = True) -> Iterator[None]:
    """Dropout off, and the average in the adapter's place if there is one and `averaged`, while the context
    is open."""
    modules = state.base.modules.values()
    average = state.average if averaged else None
    for module in modules:
        module.eval()
    try:
        with average.in_place() if average is not None else nullcontext():
            yield
    finally:
        for module in modules:
            module.train()


@dataclass
class BestStep:
    """The best step so far: its gain, and its losses on the held-out images, (images, draws)."""

    step: int = 0
    gain: float = math.nan
    losses: torch.Tensor | None = None

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "BestStep":
        """As a checkpoint keeps it."""
        if not record:
            return cls()
        losses = record.get("losses")
        found = torch.tensor(losses, dtype=torch.float64) if losses else None
        return cls(int(record["step"]), float(record["gain"]), found)

    def record(self) -> dict[str, Any]:
        """For a checkpoint; empty where nothing was measured yet."""
        if not self.step:
            return {}
        losses = [] if self.losses is None else self.losses.tolist()
        return {"step": self.step, "gain": self.gain, "losses": losses}


class Validator:
    """Measures the adapter of one run.

    Attributes:
        state: the adapter and base.
        best: the best step so far, kept by `validate`.
        seconds: duration of the last measurement, without that of the base.
    """

    def __init__(self, state: TrainState, text: PromptCache, sets: ValidationSets) -> None:
        self.best = BestStep()
        self.seconds = 0.0
        self.state = state
        self._text = text
        self._sets = sets
        self._base_losses: dict[str, torch.Tensor] = {}
        self._bits = 0

    @property
    def enabled(self) -> bool:
        """Whether there is anything to measure."""
        return bool(self._sets.measured)

    @property
    def passes(self) -> int:
        """How often the next `validate` counts to its end: over each set, with the base too where that is not
        known yet, and over each image that the base samples first."""
        sets = self._sets
        count = 1 + bool(sets.training) + (sets.forgetting is not None)
        sampled = len(sets.forgetting.missing) if sets.forgetting is not None else 0
        return sampled + count * (1 if self._base_losses else 2) + (self.state.average is not None)

    def validate(self, step: int, on_step: OnStep) -> events.Validated:
        """Measure the adapter after `step`, which is `best` afterwards if it is the best so far."""
        state = self.state
        with evaluating(state):
            with at_strength(state.injected, 0.0):
                sets = self._sets.by_name(on_step)
                if self._bits != (bits := quantized_bits(state.base.denoiser)):
                    # A base in 8 bits is another base.
                    self._bits = bits
                    self._base_losses.clear()
                for name, images in sets.items():
                    if name not in self._base_losses:
                        self._base_losses[name] = self._losses(images, on_step)
            start = time.monotonic()
            adapted = {name: self._losses(images, on_step) for name, images in sets.items()}
        if state.average is not None:
            with evaluating(state, averaged=False):
                adapted[RAW] = self._losses(sets["held out"], on_step)
        self.seconds = time.monotonic() - start
        return self._event(step, adapted)

    def measure_gains(self, samples: int, seed: str, on_step: OnStep) -> validator.MeasureGains:
        """What measures adapters of at most the run's ranks, one at a time, on noise draws of their own.

        Args:
            samples: draws over all images, about; each image gets between 4 and 32.
            seed: of the draws, which are other than those of `validate` for any.
            on_step: called within each measurement.
        """
        state, held = self.state, self._sets.held_out[:: -(-len(self._sets.held_out) // MAX_CROSSED)]
        draws = min(MOST_DRAWS, max(FEWEST_DRAWS, samples // len(held)))

        def draw(number: int, image: validator.EvalImage) -> validator.EvalImage:
            name, steps = f"{seed}/{number}/{image.caption}", state.base.noise.num_timesteps
            noise = validator.eval_noise(name, image.latents, draws, self._sets.seed, steps)
            return replace(image, draws=noise)

        images = [draw(number, image) for number, image in enumerate(held)]

        def losses(strength: float) -> torch.Tensor:
            with evaluating(state, averaged=False), at_strength(state.injected, strength):
                return self._losses(images, on_step)

        def gains(adapters: Sequence[LoadedLora]) -> torch.Tensor:
            (adapter,) = adapters
            trained = adapter_weights(state.injected)
            try:
                act_as(state.injected, adapter.weights)
                return base - losses(adapter.strength)
            finally:
                load_weights(state.injected, trained)

        base = losses(0.0)
        return gains

    def _is_best(self, step: int, gain: float, against: float, error: float) -> bool:
        if self.best.step in (0, step):
            return True
        # Without the losses of the best step, the gains have to do.
        return gain > self.best.gain if math.isnan(against) else validator.is_better(against, error)

    def _losses(self, images: Sequence[validator.EvalImage | EvalSlider], on_step: OnStep) -> torch.Tensor:
        pictures = [image for image in images if isinstance(image, validator.EvalImage)]
        if points := [image for image in images if isinstance(image, EvalSlider)]:
            return slider_losses(self.state, points, self._text.embed, on_step)
        return validator.eval_losses(self.state.base, pictures, self._text.embed, on_step)

    def _event(self, step: int, adapted: dict[str, torch.Tensor]) -> events.Validated:
        base, now = self._base_losses, adapted["held out"]
        gain = validator.paired_gain(base["held out"], now)
        against, error = validator.paired_difference(self.best.losses, now)
        best = math.isfinite(gain.gain) and self._is_best(step, gain.gain, against, error)
        if best:
            self.best = BestStep(step, gain.gain, now)
        found: dict[str, Any] = {}
        if "training" in adapted:
            learned = base["training"] - adapted["training"]
            memorized = float(learned.mean()) - gain.gain
            spread = math.hypot(validator.clustered_error(learned), gain.standard_error)
            found = {"train_gain": float(learned.mean()), "gauge": memorized, "gauge_error": spread}
        if "prior" in adapted:
            kept = base["prior"] - adapted["prior"]
            found |= {"prior": float(kept.mean()), "prior_error": validator.clustered_error(kept)}
        if RAW in adapted:
            less, spread = validator.paired_difference(now, adapted[RAW])
            raw = validator.paired_gain(base["held out"], adapted[RAW]).gain
            found |= {"raw_gain": raw, "raw_against": less, "raw_against_error": spread}
        if self._sets.slider:
            found["on"] = events.WANTED_CHANGE
        timesteps = torch.stack([image.timesteps for image in self._sets.measured])
        highest = self.state.base.noise.num_timesteps
        bands = validator.gain_by_timestep(base["held out"], now, timesteps, highest)
        return events.Validated(
            step=step, best=best, against_best=against, against_best_error=error, bands=bands,
            **gain._asdict(), **found,
        )  # fmt: skip
