"""Putting an adapter into a base: as trainable layers for training, or merged into the weights for use."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lora_core.adapters.lora import LoraLayer, LoraShape, Moment
from lora_core.adapters.targets import Adaptable, Targets, layer_by_path, target_modules
from lora_core.adapters.weights import AdapterWeights, LayerKey
from lora_core.models.thin import ThinConv2d, ThinLinear, thinned
from lora_core.spec.errors import AdapterFileError, ConfigError


@dataclass
class Injected:
    """Trainable layers in a base, by (part, module path)."""

    layers: dict[LayerKey, LoraLayer]
    moment: Moment

    def parameters(self, part: str | None = None) -> list[nn.Parameter]:
        """All trained tensors, or those of one part, in a fixed order."""
        chosen = [layer for (owner, _), layer in self.layers.items() if part in (None, owner)]
        return [tensor for layer in chosen for tensor in (layer.down, layer.up)]

    def parts(self) -> list[str]:
        """The adapted components."""
        return list(dict.fromkeys(part for part, _ in self.layers))

    def set_strength(self, strength: float) -> None:
        """Multiply the update of every layer by `strength`; at 0 the base is computed, bit for bit."""
        for layer in self.layers.values():
            layer.strength = strength


def inject(
    modules: dict[str, nn.Module], parts: Iterable[str], targets: Targets, shape: LoraShape, seed: int
) -> Injected:
    """Replace the targeted layers of `parts` by trainable ones around them.

    Args:
        modules: components of the base by part.
        parts: the parts to adapt.
        targets: which layers.
        shape: rank, alpha and dropout.
        seed: of the random start and of the dropout masks.

    Raises:
        ConfigError: a part has no such layer.
    """
    shapes: dict[LayerKey, LoraShape] = {}
    for part in parts:
        found = target_modules(part, modules[part], targets)
        if not found:
            raise ConfigError(
                f"The {part} of this base has no layer that adapter.targets names; choose other targets."
            )
        shapes |= {(part, name): shape for name in found}
    return inject_layers(modules, shapes, seed)


def inject_layers(modules: dict[str, nn.Module], shapes: Mapping[LayerKey, LoraShape], seed: int) -> Injected:
    """Replace each layer that `shapes` names by a trainable one of that shape around it.

    Args:
        modules: components of the base by part.
        shapes: rank, alpha and dropout of each layer.
        seed: of the random start and of the dropout masks.
    """
    moment = Moment(seed)
    layers: dict[LayerKey, LoraLayer] = {}
    for (part, name), shape in shapes.items():
        located = layer_by_path(part, modules[part], name)
        assert located is not None, f"{part} {name}"
        path, base = located
        layers[part, name] = LoraLayer(base, f"{part}/{name}", shape, moment, seed)
        _replace(modules[part], path, layers[part, name])
    return Injected(layers, moment)


def remove(modules: dict[str, nn.Module], injected: Injected) -> None:
    """Put the frozen layers back in place of the trainable ones."""
    for (part, name), layer in injected.layers.items():
        located = layer_by_path(part, modules[part], name)
        if located is not None:
            _replace(modules[part], located[0], layer.base)


def adapter_weights(injected: Injected) -> AdapterWeights:
    """The canonical form of what was trained."""
    return AdapterWeights({key: layer.layer_weights() for key, layer in injected.layers.items()})


def load_weights(injected: Injected, weights: AdapterWeights) -> None:
    """Set trainable layers to an adapter's factors, bit for bit.

    Raises:
        AdapterFileError: the two do not have the same layers and shapes.
    """
    if set(weights.layers) != set(injected.layers):
        odd = sorted(set(weights.layers) ^ set(injected.layers))[0]
        raise AdapterFileError(
            f"The saved adapter does not have the layers of this run; they differ at {' '.join(odd)}."
        )
    for key, layer in injected.layers.items():
        saved = weights.layers[key]
        if saved.down.numel() != layer.down.numel() or saved.up.numel() != layer.up.numel():
            raise AdapterFileError(f"The saved adapter has other shapes than this run at {' '.join(key)}.")
        layer.from_layer_weights(saved)


def _replace(root: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(root.get_submodule(parent), child, layer)


@dataclass(frozen=True)
class Strengthened:
    """An adapter and how strongly it acts: on the UNet, and on the text encoders."""

    weights: AdapterWeights
    strength: float = 1.0
    text_strength: float | None = None

    def on(self, part: str) -> float:
        """The strength on a part."""
        return self.strength if part == "unet" or self.text_strength is None else self.text_strength


Factors = tuple[torch.Tensor, torch.Tensor]
"""up (out, r) and down (r, in)."""


class Merger:
    """Adapters merged into a base's own weights, and taken out again: W = W0 + sum of s (alpha/r) B A.

    Where every strength is 0 the weight is W0 bit for bit, and nothing depends on what was merged before.

    On a processor, a layer's weight is overwritten by the sum in fp32 and W0 is kept beside it: inference
    costs what the base costs. On other devices memory is scarcer than time: W0 stays as it is, the factors
    are copied to the device once, in the base's dtype, and each use of a layer makes the sum anew, by one
    `addmm` for each adapter. So a new strength copies nothing, and no weight is there twice.
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        """Manage the components `modules`, by part."""
        self._modules = modules
        self._originals: dict[LayerKey, tuple[Adaptable, torch.Tensor]] = {}
        self._thin: dict[LayerKey, ThinLinear | ThinConv2d] = {}
        self._factors: dict[int, tuple[AdapterWeights, dict[LayerKey, Factors]]] = {}
        """By the adapter's id, beside the adapter, so that no other can have it."""

    def apply(self, adapters: list[Strengthened]) -> None:
        """Make the base act as with exactly these adapters.

        Raises:
            AdapterFileError: a layer is not in this base or has another shape; nothing is changed then.
        """
        acting: dict[LayerKey, list[tuple[float, AdapterWeights]]] = {}
        for adapter in adapters:
            for key in adapter.weights.layers:
                self._prepare(key, adapter.weights)
                if adapter.on(key[0]) != 0:
                    acting.setdefault(key, []).append((adapter.on(key[0]), adapter.weights))
        with torch.no_grad():
            for key, (layer, original) in self._originals.items():
                merged = original.float() if key in acting else original
                for strength, weights in acting.get(key, []):
                    merged = merged + strength * weights.layers[key].delta().reshape(original.shape)
                layer.weight.copy_(merged)
            if adapters and self._thin:
                wanted = {id(adapter.weights) for adapter in adapters}
                self._factors = {name: kept for name, kept in self._factors.items() if name in wanted}
            for key, thin in self._thin.items():
                thin.updates = [
                    (*self._on_device(key, weights), strength * weights.layers[key].scale)
                    for strength, weights in acting.get(key, [])
                ]

    def _on_device(self, key: LayerKey, weights: AdapterWeights) -> Factors:
        """up (out, r) and down (r, in) of a layer, in its dtype and on its device."""
        _, factors = self._factors.setdefault(id(weights), (weights, {}))
        layer = self._thin[key]
        known = factors.get(key)
        if known is None or (layer.data is not None and known[0].device != layer.data.device):
            device = (layer.frozen() if layer.data is None else layer.data).device
            update = weights.layers[key]
            up, down = (factor.flatten(1).to(device, layer.dtype) for factor in (update.up, update.down))
            factors[key] = (up, down)
        return factors[key]

    def _prepare(self, key: LayerKey, weights: AdapterWeights) -> None:
        """Check that a layer fits, and have its W0 kept."""
        part, path = key
        located = layer_by_path(part, self._modules[part], path) if part in self._modules else None
        if located is None:
            raise AdapterFileError(
                f"The adapter has a layer {part} {path} that this base has not; it is for another base."
            )
        (real, layer), update = located, weights.layers[key]
        shape = layer.shape if isinstance(layer, ThinLinear | ThinConv2d) else layer.weight.shape
        size = (update.up.shape[0], *update.down.shape[1:])
        if shape.numel() != math.prod(size) or shape[0] != size[0]:
            raise AdapterFileError(
                f"The adapter's layer {part} {path} is {size[1]} to {size[0]} wide, the base's "
                f"{shape[1]} to {shape[0]}; it is for another base."
            )
        if key in self._originals or key in self._thin:
            return
        if isinstance(layer, nn.Linear | nn.Conv2d) and (thin := _updatable(layer)) is not None:
            if thin is not layer:
                holder = self._modules[part].get_submodule(real)
                _replace(self._modules[part], real if holder is layer else f"{real}.base", thin)
            self._thin[key] = thin
        else:
            self._originals[key] = (layer, layer.weight.detach().clone())


def _updatable(layer: Adaptable) -> ThinLinear | ThinConv2d | None:
    """The thin layer that updates are put beside, or None where a weight is merged in place."""
    if isinstance(layer, ThinLinear | ThinConv2d):
        return layer
    return None if layer.weight.device.type == "cpu" else thinned(layer)
