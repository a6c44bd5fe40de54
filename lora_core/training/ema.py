"""A running average of the adapter, steadier than the last step; sampled, measured and exported beside it."""

from collections.abc import Iterator
from contextlib import contextmanager

from lora_core.adapters.inject import Injected, adapter_weights, load_weights
from lora_core.adapters.storage import Storage
from lora_core.adapters.weights import AdapterWeights


class Average:
    """The average beside an adapter in a base."""

    def __init__(self, injected: Injected, storage: Storage, decay: float) -> None:
        """Begin at the adapter as it stands; `decay` is below 1."""
        self._injected = injected
        self._decay = decay
        self._storage = storage
        self._mean = storage.whole.detach().clone()

    def update(self, step: int) -> None:
        """Take in the adapter after optimizer step `step`, counted from 1.

        mean = d mean + (1 - d) adapter, with d = min(decay, (1 + step) / (10 + step)), so that the first
        steps do not hold on to a start that has learned nothing. Source: the ramp of TensorFlow's
        ExponentialMovingAverage.
        """
        decay = min(self._decay, (1 + step) / (10 + step))
        self._mean.lerp_(self._storage.whole.detach(), 1.0 - decay)

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
        with self._storage.writing() as live:
            kept = live.clone()
            live.copy_(self._mean)
            self._mean.copy_(kept)
