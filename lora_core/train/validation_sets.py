"""Pictures of the base's own, on which training should change nothing: what is lost on them is forgotten.

They are the base's distribution as far as it is of use here: latents sampled from plain prompts, made when
they are first measured and kept in the cache.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lora_core.backends.int8 import is_quantized
from lora_core.data.buckets import choose_bucket
from lora_core.data.captions import plain_caption
from lora_core.data.images import hash_file
from lora_core.evaluate.validator import EvalImage, eval_noise
from lora_core.generate.pipeline import OnStep, sample_latents
from lora_core.generate.request import GenerationRequest
from lora_core.models.load import BaseModel
from lora_core.settings.config import RunConfig
from lora_core.train.data import LatentCache, PromptCache, TrainImage, load_or_compute, short_digest

_STEPS, _CFG, _SAMPLER = 10, 3.0, "ddim"


class ForgettingSet:
    """The base's pictures for one run; make them with the adapter at strength 0.

    Attributes:
        side: of the pictures, in pixels.
    """

    def __init__(
        self, base: BaseModel, text: PromptCache, folder: Path, identity: str, config: RunConfig
    ) -> None:
        """Nothing is drawn yet.

        Args:
            base: the base.
            text: conditions of captions; those of `prompts` have to be known to it.
            folder: of the cache.
            identity: what the base is.
            config: the run's; where more pictures are wished for than there are prompts, those come again
                with the next seed.
        """
        self._base = base
        self._text = text
        self._folder = folder
        self._identity = identity
        side = config.train.resolution or base.resolution
        self.side = choose_bucket(side, side, side, base.size_multiple).width
        self._looks = (config.validation.draws_per_image, config.seed)
        own = base.family.prior_prompts
        self._shots = [
            (own[number % len(own)], number // len(own)) for number in range(config.validation.forgetting)
        ]
        self._made: list[EvalImage] = []

    @property
    def prompts(self) -> list[str]:
        """What they show."""
        return list(dict.fromkeys(prompt for prompt, _ in self._shots))

    def measured(self, note: OnStep) -> list[EvalImage]:
        """The pictures with their fixed looks; `note` is called with (done, all) while they are drawn."""
        if not self._made:
            for prompt, number in self._shots:
                how = GenerationRequest(
                    seed=number, steps=_STEPS, cfg=_CFG, cfg_rescale=0.0, sampler=_SAMPLER,
                    width=self.side, height=self.side,
                )  # fmt: skip
                latents = self._latents(prompt, how, note)
                looks = eval_noise(
                    f"{prompt}/{number}", latents, *self._looks, self._base.noise.num_timesteps
                )
                self._made.append(EvalImage(latents, looks, prompt))
        return self._made

    def _latents(self, prompt: str, request: GenerationRequest, note: OnStep) -> torch.Tensor:
        base = self._base
        kept = (base.dtype, base.device.type, is_quantized(base.denoiser))
        name = short_digest(self._identity, prompt, request, kept)

        def draw() -> dict[str, torch.Tensor]:
            text = self._text.condition(prompt)
            made = sample_latents(base, request, text, self._text.negative(), note)
            return {"value": made[0].float().cpu()}

        return load_or_compute(self._folder / f"{name}.safetensors", draw)["value"]


# What a run's validation measures: pictures that are held out, some that are trained on, some of the base's
# own.


FEWEST_BY_HEART = 4
"""So many training pictures are measured at least, where there are as many."""
MOST_CROSSED = 16
CROSSED = (
    "There are too few pictures to hold any out, so the gain is measured on training pictures, each with the"
    " caption of another: that tells whether the words are learned, and little of what is learned by heart."
    " Add pictures to measure better."
)


@dataclass
class ValidationSets:
    """The pictures that answer a validation's three questions.

    Attributes:
        held_out: does it gain?
        by_heart: training pictures: how much of that is learned by heart? Empty where that is not asked.
        prior: of the base's own: what is forgotten? None where that is not asked.
        notes: what a person should know of them, a sentence each.
    """

    held_out: list[EvalImage]
    by_heart: list[EvalImage] = field(default_factory=list)
    prior: ForgettingSet | None = None
    notes: list[str] = field(default_factory=list)

    def by_name(self, note: Callable[[int, int], None]) -> dict[str, list[EvalImage]]:
        """The groups that there are.

        Args:
            note: called while the base's own pictures are drawn, for which the adapter has to be at strength
                0.
        """
        found = {"held out": self.held_out}
        if self.by_heart:
            found["training"] = self.by_heart
        if self.prior is not None:
            found["prior"] = self.prior.measured(note)
        return found


def build_validation_sets(
    items: list[TrainImage],
    held_out: list[TrainImage],
    cache: LatentCache,
    config: RunConfig,
    base: BaseModel,
) -> ValidationSets:
    """The groups of a run, the base's own pictures apart.

    Where pictures are wished for and too few to hold any out, training pictures with each other's captions
    take their place: a cross-validation over captions.

    Args:
        items: to train on.
        held_out: kept out of training.
        cache: of latents.
        config: the run's.
        base: for the shape of noise and number of timesteps.
    """
    if not config.validation.every or not config.validation.pictures:
        return ValidationSets([])

    def measured(item: TrainImage, caption: str) -> EvalImage:
        latents = cache.latents(item.record, item.bucket, False)
        picture = hash_file(item.record.path)
        looks = eval_noise(
            picture, latents, config.validation.draws_per_image, config.seed, base.noise.num_timesteps
        )
        return EvalImage(latents, looks, caption, item.sizes)

    own = [plain_caption(item.record.caption, config.dataset.trigger) for item in items]
    count = max(len(held_out), FEWEST_BY_HEART) if held_out else MOST_CROSSED
    order = random.Random(f"{config.seed}/measured").sample(range(len(items)), min(count, len(items)))
    by_heart = [measured(items[index], own[index]) for index in sorted(order)]
    kept = by_heart if config.validation.memorization else []
    if held_out:
        trigger = config.dataset.trigger
        return ValidationSets([measured(i, plain_caption(i.record.caption, trigger)) for i in held_out], kept)
    others = [measured(items[index], own[(index + 1) % len(items)]) for index in sorted(order)]
    return ValidationSets(others, kept, notes=[CROSSED])
