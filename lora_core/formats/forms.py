"""The form that a family's layers have: linear, or a convolution of a certain size.

Some tools write a 1 x 1 convolution as a linear layer, which means the same and which others refuse; and some
kinds of adapters flatten convolutions, so that their files do not say the size.
"""

from dataclasses import replace

from lora_core.adapters.weights import AdapterWeights, LayerKey, LayerWeights
from lora_core.formats.layout import family_layout
from lora_core.spec.families import Family


def kernel_of(layer: LayerKey, family: Family) -> tuple[int, ...] | None:
    """(height, width) of a layer's kernel, () of a linear one, None for a layer that the family lacks."""
    shape = family_layout(family).get(layer)
    return None if shape is None else tuple(shape[2:])


def in_own_form(weights: AdapterWeights, family: Family) -> AdapterWeights:
    """The adapter with its 1 x 1 convolutions and linear layers as the family has them; no number changes."""
    layers = {key: _formed(layer, kernel_of(key, family)) for key, layer in weights.layers.items()}
    return AdapterWeights(layers, weights.metadata)


def _formed(layer: LayerWeights, kernel: tuple[int, ...] | None) -> LayerWeights:
    if layer.down.dim() == 2 and kernel == (1, 1):
        return replace(layer, down=layer.down[..., None, None], up=layer.up[..., None, None])
    if layer.down.dim() == 4 and kernel == () and layer.down.shape[2:] == (1, 1):
        return replace(layer, down=layer.down.flatten(1), up=layer.up.flatten(1))
    return layer
