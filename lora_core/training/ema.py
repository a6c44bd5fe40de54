"""A running average of the adapter: steadier than the last step, so it is what is sampled and exported."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lora_core.adapters.inject import Injected, adapter_weights, load_weights
from lora_core.adapters.weights import AdapterWeights


class Average:
    """The average beside an adapter in a base."""

    def __init__(self, injected: Injected, decay: float) -> None:
        """Begin at the adapter as it stands; `decay` is below 1."""
        self._injected = injected
        self._decay = decay
        self._live = injected.parameters()
        self._mean = [tensor.detach().clone() for tensor in self._live]

    def update(self, step: int) -> None:
        """Take in the adapter after optimizer step `step`, counted from 1.

        mean = d mean + (1 - d) adapter, with d = min(decay, (1 + step) / (10 + step)), so that the first
        steps do not hold on to a start that has learned nothing. Source: the ramp of TensorFlow's
        ExponentialMovingAverage.
        """
        decay = min(self._decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(self._mean, [tensor.detach() for tensor in self._live], 1.0 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The average takes the adapter's place while the context is open; the bits of both stay."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def weights(self) -> AdapterWeights:
        """The average as an adapter."""
        with self.in_place():
            return adapter_weights(self._injected)

    def load(self, weights: AdapterWeights) -> None:
        """Take over a saved average, bit for bit."""
        with self.in_place():
            load_weights(self._injected, weights)

    def _swap(self) -> None:
        with torch.no_grad():
            for live, mean in zip(self._live, self._mean, strict=True):
                kept = live.detach().clone()
                live.copy_(mean)
                mean.copy_(kept)
