"""The one in-memory adapter, to and from which each file format translates, and how it is merged into a base.

On a processor, a layer's weight is overwritten by the sum in fp32 and W0 is kept beside it: inference costs
what the base costs. On other devices memory is scarcer than time: W0 stays, the factors are copied to the
device once, in the base's dtype, and each use of a layer computes the sum, by one `addmm` for each adapter.
So a new strength copies nothing, and no weight is there twice; of other kinds (`lycoris.py`) it is, since
they keep the full update.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from lora_core.backends.base import Adaptable, replace_submodule
from lora_core.backends.compact import CompactLayer, as_compact
from lora_core.errors import AdapterFileError
from lora_core.model_files.families import TEXT_LEVEL, is_text_encoder

LayerKey = tuple[str, str]
"""(part, module path): the part is one of `Family.parts`, such as "unet"; the path is diffusers'
dotted name below it, for text encoders always with the `text_model.` level
("text_model.encoder.layers.0.self_attn.q_proj")."""
Factors = tuple[torch.Tensor, torch.Tensor | None]
"""up (out, r) and down (r, in), or a full update (out, in) and None."""


@dataclass(frozen=True)
class LoraSpec:
    """What all layers of one adapter share: rank, alpha, the probabilities of three kinds of dropout, and
    the kind, a key of `schema.ADAPTER_KINDS`."""

    rank: int
    alpha: float
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    kind: str = "lora"


class LayerUpdate(Protocol):
    """The update of one layer: `LayerWeights`, or of any other kind (`lycoris.py`)."""

    @property
    def rank(self) -> int:
        """The inner width; 0 where there is none."""

    @property
    def scale(self) -> float:
        """alpha / rank."""

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the layer's weight: (out, in) or (out, in, k, k); (out,) where only that is known."""

    def delta(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The update at strength 1, in fp32; some kinds need the frozen weight, in fp32 too."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of a kohya file, by what follows the layer's name."""


@dataclass(frozen=True)
class LayerWeights:
    """The update of one layer: W = W0 + strength * (alpha / rank) * up @ down (Hu et al. 2021, section 4.1).

    Attributes:
        down: (r, in) for a linear layer, (r, in, k, k) for a convolution.
        up: (out, r) for a linear layer, (out, r, 1, 1) for a convolution.
        alpha: the numerator of the scale.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """The inner width r."""
        return self.down.shape[0]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the layer's weight: (out, in) or (out, in, k, k)."""
        return (self.up.shape[0], *self.down.shape[1:])

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def delta(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The update at strength 1 in the shape of the layer's weight, in fp32."""
        up, down = self.up.float(), self.down.float()
        product = up.flatten(1) @ down.flatten(1)
        return (self.scale * product).reshape(self.weight_shape)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of a kohya file, by what follows the layer's name."""
        return {"lora_down.weight": self.down, "lora_up.weight": self.up, "alpha": torch.tensor(self.alpha)}


@dataclass(frozen=True)
class AdapterWeights:
    """An adapter: its layers by (part, module path), the text metadata of its file, its layers of other kinds
    than a plain LoRA, which `check_plain` and `load_adapter` refuse where code cannot use them, and the
    vectors (n, width) of its new tokens by part and token."""

    layers: dict[LayerKey, LayerWeights]
    metadata: dict[str, str] = field(default_factory=dict)
    others: dict[LayerKey, LayerUpdate] = field(default_factory=dict)
    tokens: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    @property
    def highest_rank(self) -> int:
        """The largest inner width of a layer."""
        return max(layer.rank for layer in self.every_layer().values())

    def parts(self) -> list[str]:
        """The adapted components, in order of first appearance."""
        return list(dict.fromkeys(part for part, _ in self.every_layer()))

    def every_layer(self) -> dict[LayerKey, LayerUpdate]:
        """The layers of all kinds."""
        return {**self.layers, **self.others}


@dataclass(frozen=True)
class LoadedLora:
    """An adapter and its strengths: on the denoiser, and on the text encoders where that differs."""

    weights: AdapterWeights
    strength: float = 1.0
    text_strength: float | None = None

    def on(self, part: str) -> float:
        """The strength on a part."""
        text = self.text_strength
        return text if text is not None and is_text_encoder(part) else self.strength


def is_shape_of(size: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a `weight_shape` is that of a weight; linear layers and 1 x 1 convolutions are alike."""
    return size[0] == shape[0] and (len(size) == 1 or math.prod(size) == math.prod(shape))


def layer_by_path(module: nn.Module, path: str) -> tuple[str, Adaptable] | None:
    """The (real path, frozen layer) that a canonical path names in `module`, or None."""
    for candidate in dict.fromkeys((path, path.removeprefix(TEXT_LEVEL))):
        try:
            layer = module.get_submodule(candidate)
        except AttributeError:
            continue
        # An adapted layer hides the frozen one behind it.
        frozen = getattr(layer, "base", layer)
        if isinstance(frozen, Adaptable):
            return candidate, frozen
    return None


class Merger:
    """Merges adapters: W = W0 + sum of s (alpha/r) B A. Where every strength is 0 the weight is W0 bit for
    bit, and nothing depends on earlier merges."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self._modules = modules
        self._originals: dict[LayerKey, tuple[Adaptable, torch.Tensor]] = {}
        self._compact: dict[LayerKey, CompactLayer] = {}
        self._factors: dict[int, tuple[AdapterWeights, dict[LayerKey, Factors]]] = {}
        """By the adapter's id, beside the adapter, so that no other can have it."""

    def apply(self, adapters: list[LoadedLora]) -> None:
        """Make the base act as with exactly these adapters.

        Raises:
            AdapterFileError: a layer is not in this base or has another shape; nothing is changed then.
        """
        acting: dict[LayerKey, list[tuple[float, AdapterWeights]]] = {}
        for adapter in adapters:
            for key in adapter.weights.every_layer():
                self._prepare(key, adapter.weights)
                if strength := adapter.on(key[0]):
                    acting.setdefault(key, []).append((strength, adapter.weights))
        with torch.no_grad():
            for key, (layer, original) in self._originals.items():
                frozen = merged = original.float() if key in acting else original
                for strength, weights in acting.get(key, []):
                    delta = weights.every_layer()[key].delta(frozen)
                    merged = merged + strength * delta.reshape(original.shape)
                layer.weight.copy_(merged)
            if adapters and self._compact:
                used = {id(adapter.weights) for adapter in adapters}
                self._factors = {name: kept for name, kept in self._factors.items() if name in used}
            for key, compact in self._compact.items():
                compact.updates = [
                    (up, down, strength if down is None else strength * weights.layers[key].scale)
                    for strength, weights in acting.get(key, [])
                    for up, down in [self._factors_on_device(key, weights)]
                ]

    def _factors_on_device(self, key: LayerKey, weights: AdapterWeights) -> Factors:
        _, factors = self._factors.setdefault(id(weights), (weights, {}))
        layer, found = self._compact[key], factors.get(key)
        if found is None or (layer.data is not None and found[0].device != layer.data.device):
            frozen = layer.dequantize() if layer.data is None else layer.data
            if key in weights.others:
                delta = weights.others[key].delta(layer.dequantize().float())
                factors[key] = (delta.flatten(1).to(layer.dtype), None)
            else:
                pair = weights.layers[key].up, weights.layers[key].down
                up, down = (factor.flatten(1).to(frozen.device, layer.dtype) for factor in pair)
                factors[key] = (up, down)
        return factors[key]

    def _prepare(self, key: LayerKey, weights: AdapterWeights) -> None:
        """Check that a layer fits, and have its W0 kept."""
        part, path = key
        located = layer_by_path(self._modules[part], path) if part in self._modules else None
        if located is None:
            raise AdapterFileError(
                f"The adapter has a layer {part} {path} that this base does not have; it is for another base."
            )
        (real, layer), size = located, weights.every_layer()[key].weight_shape
        shape = layer.shape if isinstance(layer, CompactLayer) else layer.weight.shape
        if not is_shape_of(size, shape):
            raise AdapterFileError(
                f"The adapter's layer {part} {path} is {' to '.join(map(str, size[1::-1]))} wide, the base's "
                f"{shape[1]} to {shape[0]}; it is for another base."
            )
        if key in self._originals or key in self._compact:
            return
        # A weight on the CPU is merged in place.
        in_place = not isinstance(layer, CompactLayer) and layer.weight.device.type == "cpu"
        compact = None if in_place else as_compact(layer)
        if compact is None:
            self._originals[key] = (layer, layer.weight.detach().clone())
            return
        if compact is not layer:
            holder = self._modules[part].get_submodule(real)
            replace_submodule(self._modules[part], real if holder is layer else f"{real}.base", compact)
        self._compact[key] = compact
