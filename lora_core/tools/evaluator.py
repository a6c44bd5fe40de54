"""A base, pictures and fixed looks at them, on which any number of adapters are measured one after the
other."""

from collections.abc import Callable, Sequence

import torch

from lora_core.data.scan import ImageRecord
from lora_core.evaluate.validator import Gain, encode_eval_images, eval_losses, paired_gain
from lora_core.lora.inject import LoadedLora, Merger
from lora_core.models.encode import encode_prompt
from lora_core.models.load import BaseModel
from lora_core.models.unet import PromptEmbeds

MeasureGains = Callable[[Sequence[LoadedLora]], torch.Tensor]
"""From adapters to their gain on each look, the base's loss minus theirs, (pictures, K)."""


class Evaluator:
    """Measures adapters on the same (picture, noise, timestep) triples, so that their gains are paired."""

    def __init__(
        self,
        base: BaseModel,
        records: list[ImageRecord],
        triples: int = 8,
        seed: int = 0,
        note: Callable[[str], None] | None = None,
        on_picture: Callable[[int, int], None] | None = None,
        condition: Callable[[str], PromptEmbeds] | None = None,
    ) -> None:
        """Encode the pictures and measure the base.

        Args:
            base: with no adapter in it.
            records: pictures with captions.
            triples: looks a picture.
            seed: of the looks.
            note: told in a few words what is being measured.
            on_picture: called with (done, all) within each measurement; what it raises ends it.
            condition: a caption's text condition, where it is not the usual one.
        """
        self._base = base
        self._note = note
        self._on_picture = on_picture
        self._condition = condition or self._usual_condition
        self._pictures = encode_eval_images(base, records, triples, seed)
        self._merger = Merger(base.modules)
        self.calls = 0
        self.base_losses = self._losses([])

    def gains(self, adapters: Sequence[LoadedLora]) -> torch.Tensor:
        """What adapters gain together on each look, (pictures, K); exactly 0 where all strengths are 0."""
        return self.base_losses - self._losses(adapters)

    def gain(self, adapters: Sequence[LoadedLora]) -> Gain:
        """The mean gain of adapters together, with its standard error."""
        return paired_gain(self.base_losses, self._losses(adapters))

    def _losses(self, adapters: Sequence[LoadedLora]) -> torch.Tensor:
        self.calls += 1
        if self._note is not None:
            self._note(f"measurement {self.calls}: {self._words(adapters)}")
        self._merger.apply(list(adapters))
        try:
            return eval_losses(self._base, self._pictures, self._condition, self._on_picture)
        finally:
            self._merger.apply([])

    def _words(self, adapters: Sequence[LoadedLora]) -> str:
        if not adapters:
            return "the base"
        return ", ".join(f"rank {_rank(a)} at {a.strength:.3g}" for a in adapters)

    def _usual_condition(self, caption: str) -> PromptEmbeds:
        return encode_prompt(self._base, [caption])


def _rank(adapter: LoadedLora) -> int:
    return max(layer.rank for layer in adapter.weights.layers.values())
