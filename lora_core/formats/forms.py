"""The form that a family's layers have: linear, or a convolution of a certain size.

Some tools write a 1 x 1 convolution as a linear layer, which means the same and which others refuse; and some
kinds of adapters flatten convolutions, so that their files do not say the size.
"""

import json
import re
from dataclasses import replace
from functools import cache

from lora_core.adapters.weights import AdapterWeights, LayerKey, LayerWeights
from lora_core.spec.families import Family
from lora_core.spec.paths import DEMO_BASE, FAMILY_CONFIGS

LINEAR = 0
"""In place of a kernel's side."""

_WIDE = re.compile(r"resnets\.\d+\.conv[12]|(?:down|up)samplers\.\d+\.conv|^conv_(?:in|out)$")
_NARROW = re.compile(r"conv_shortcut$")
_PROJECTION = re.compile(r"attentions\.\d+\.proj_(?:in|out)$")


def kernel_of(layer: LayerKey, family: Family) -> int:
    """The side of a layer's kernel in `family`, in pixels, or `LINEAR`."""
    part, path = layer
    if part != "unet":
        return LINEAR
    if _WIDE.search(path):
        return 3
    narrow = _NARROW.search(path) or (_PROJECTION.search(path) and not _linear_projections(family.configs))
    return 1 if narrow else LINEAR


@cache
def _linear_projections(configs: str) -> bool:
    folder = FAMILY_CONFIGS / configs if configs else DEMO_BASE
    config = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    return bool(config.get("use_linear_projection", False))


def in_own_form(weights: AdapterWeights, family: Family) -> AdapterWeights:
    """The adapter with its 1 x 1 convolutions and linear layers as the family has them; no number changes."""
    layers = {key: _formed(layer, kernel_of(key, family)) for key, layer in weights.layers.items()}
    return AdapterWeights(layers, weights.metadata)


def _formed(layer: LayerWeights, kernel: int) -> LayerWeights:
    if layer.down.dim() == 2 and kernel == 1:
        return replace(layer, down=layer.down[..., None, None], up=layer.up[..., None, None])
    if layer.down.dim() == 4 and kernel == LINEAR and layer.down.shape[2:] == (1, 1):
        return replace(layer, down=layer.down.flatten(1), up=layer.up.flatten(1))
    return layer
