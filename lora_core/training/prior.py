"""Pictures of the base's own, on which training should change nothing: what is lost on them is forgotten.

They are the base's distribution as far as it is of use here: latents sampled from plain prompts, made when
they are first measured and kept in the cache.
"""

from pathlib import Path

import torch

from lora_core.dataset.buckets import bucket_of
from lora_core.models.load import BaseModel
from lora_core.models.thin import is_packed
from lora_core.sampling.generate import OnStep, Picture, sampled_latents
from lora_core.spec.config import RunConfig
from lora_core.training.cache import TextSource, digest_of, from_disk_or
from lora_core.validation.gain import Measured
from lora_core.validation.triples import looks_at

_STEPS, _CFG, _SAMPLER = 10, 3.0, "ddim"


class Prior:
    """The base's pictures for one run; make them with the adapter at strength 0.

    Attributes:
        side: of the pictures, in pixels.
    """

    def __init__(
        self, base: BaseModel, text: TextSource, folder: Path, identity: str, config: RunConfig
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
        self.side = bucket_of(side, side, side, base.size_multiple).width
        self._looks = (config.validation.triples, config.seed)
        own = base.family.prior_prompts
        self._shots = [
            (own[number % len(own)], number // len(own)) for number in range(config.validation.prior)
        ]
        self._made: list[Measured] = []

    @property
    def prompts(self) -> list[str]:
        """What they show."""
        return list(dict.fromkeys(prompt for prompt, _ in self._shots))

    def measured(self, note: OnStep) -> list[Measured]:
        """The pictures with their fixed looks; `note` is called with (done, all) while they are drawn."""
        if not self._made:
            for prompt, number in self._shots:
                how = Picture(number, _STEPS, _CFG, _SAMPLER, self.side, self.side, cfg_rescale=0.0)
                latents = self._latents(prompt, how, note)
                looks = looks_at(f"{prompt}/{number}", latents, *self._looks, self._base.noise.timesteps)
                self._made.append(Measured(latents, looks, prompt))
        return self._made

    def _latents(self, prompt: str, picture: Picture, note: OnStep) -> torch.Tensor:
        base = self._base
        kept = (base.dtype, base.device.type, is_packed(base.unet))
        name = digest_of(self._identity, prompt, picture, kept)

        def draw() -> dict[str, torch.Tensor]:
            text = self._text.condition(prompt)
            made = sampled_latents(base, picture, text, self._text.negative(), note)
            return {"value": made[0].float().cpu()}

        return from_disk_or(self._folder / f"{name}.safetensors", draw)["value"]
