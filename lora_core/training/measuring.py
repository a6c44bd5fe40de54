"""What a run's validation measures: pictures that are held out, some that are trained on, some of the base's
own."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from lora_core.dataset.captions import plain_caption
from lora_core.dataset.pictures import content_hash
from lora_core.models.load import BaseModel
from lora_core.spec.config import RunConfig
from lora_core.training.batches import Item
from lora_core.training.cache import LatentCache
from lora_core.training.prior import Prior
from lora_core.validation.gain import Measured
from lora_core.validation.triples import looks_at

FEWEST_BY_HEART = 4
"""So many training pictures are measured at least, where there are as many."""
MOST_CROSSED = 16
CROSSED = (
    "There are too few pictures to hold any out, so the gain is measured on training pictures, each with the"
    " caption of another: that tells whether the words are learned, and little of what is learned by heart."
    " Add pictures to measure better."
)


@dataclass
class Groups:
    """The pictures that answer a validation's three questions.

    Attributes:
        held_out: does it gain?
        by_heart: training pictures: how much of that is learned by heart? Empty where that is not asked.
        prior: of the base's own: what is forgotten? None where that is not asked.
        notes: what a person should know of them, a sentence each.
    """

    held_out: list[Measured]
    by_heart: list[Measured] = field(default_factory=list)
    prior: Prior | None = None
    notes: list[str] = field(default_factory=list)

    def by_name(self, note: Callable[[int, int], None]) -> dict[str, list[Measured]]:
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


def groups_of(
    items: list[Item], held_out: list[Item], cache: LatentCache, config: RunConfig, base: BaseModel
) -> Groups:
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
        return Groups([])

    def measured(item: Item, caption: str) -> Measured:
        latents = cache.latents(item.record, item.bucket, False)
        picture = content_hash(item.record.path)
        looks = looks_at(picture, latents, config.validation.triples, config.seed, base.noise.timesteps)
        return Measured(latents, looks, caption, item.sizes)

    own = [plain_caption(item.record.caption, config.dataset.trigger) for item in items]
    count = max(len(held_out), FEWEST_BY_HEART) if held_out else MOST_CROSSED
    order = random.Random(f"{config.seed}/measured").sample(range(len(items)), min(count, len(items)))
    by_heart = [measured(items[index], own[index]) for index in sorted(order)]
    kept = by_heart if config.validation.gauge else []
    if held_out:
        trigger = config.dataset.trigger
        return Groups([measured(i, plain_caption(i.record.caption, trigger)) for i in held_out], kept)
    others = [measured(items[index], own[(index + 1) % len(items)]) for index in sorted(order)]
    return Groups(others, kept, notes=[CROSSED])
