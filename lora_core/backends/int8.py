"""Compact layers: frozen weights that take less of the device's memory, in 8 bits or offloaded.

The full weight is materialized where it is needed, once in the forward pass and once in the backward pass,
and freed at once. Autograd keeps nothing of it: where the forward pass materializes it under autograd,
every full weight is kept until the backward pass, and training gains nothing. Low-rank updates can be added
to the weight as it is materialized, which previews use.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_core.backends.base import FrozenModule, replace_submodule
from lora_core.backends.offload import OffloadStore

Quantized = tuple[torch.Tensor, torch.Tensor]
"""A weight in 8 bits, and its scale for each output, shaped to be multiplied with it."""

Update = tuple[torch.Tensor, torch.Tensor, float]
"""up (out, r), down (r, in) and the factor of their product."""

BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")
"""Where in a UNet layers are made compact: its first and last ones and those of the timestep are small, and
errors in them spread to everything."""
LEVELS = 127


def quantize_int8(weight: torch.Tensor) -> Quantized:
    """Round a weight (out, ...) to 255 levels, spread for each output over its largest element.

    The error of an element is at most about 1/254 of the largest of its output. The scale of a weight in bf16
    is in bf16 too: all levels are integers that bf16 has, so that the product needs one multiplication and
    one rounding. fp16 is too short for small scales.
    """
    rows = weight.detach().float().flatten(1)
    scale = rows.abs().amax(1).div(LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
    scale = scale.to(torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32)
    packed = rows.div(scale[:, None]).round_().clamp_(-LEVELS, LEVELS)
    packed = packed.to(torch.int8).reshape(weight.shape)
    return packed, scale.reshape(-1, *[1] * (weight.dim() - 1))


class CompactLayer(FrozenModule):
    """A frozen layer whose weight is kept as it is, in fewer bits or offloaded, and computed in each use.

    `updates` are added to the weight as it is materialized; the stored weight is untouched.
    """

    data: torch.Tensor | None
    scale: torch.Tensor | None

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        """Replace `layer`, its weight as it is for now."""
        super().__init__(layer)
        self.bias = layer.bias
        self.dtype, self.shape = layer.weight.dtype, layer.weight.shape
        self.updates: list[Update] = []
        self.store: OffloadStore | None = None
        self.fetch: Callable[[], torch.Tensor] | None = None
        self.register_buffer("data", layer.weight.detach(), persistent=False)
        self.register_buffer("scale", None, persistent=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "CompactLayer":
        self.updates = [(fn(up), fn(down), factor) for up, down, factor in self.updates]
        result: CompactLayer = super()._apply(fn, recurse)
        return result

    def dequantize(self) -> torch.Tensor:
        """The full weight without its updates."""
        kept = self.fetch() if self.fetch is not None else self.data
        assert kept is not None
        return kept if self.scale is None else (kept * self.scale).to(self.dtype)

    def materialize(self) -> torch.Tensor:
        """The full weight, computed each time: W + sum of factor * up @ down."""
        weight = self.dequantize()
        for up, down, factor in self.updates:
            weight = torch.addmm(weight.flatten(1), up, down, alpha=factor).view(self.shape)
        return weight

    weight: Any = property(materialize)

    def quantize(self, how: Callable[[torch.Tensor], Quantized]) -> None:
        """Keep the weight in fewer bits, where it is now."""
        self.data, self.scale = how(self.dequantize())
        if self.store is not None:
            self.offload(self.store)

    def offload(self, store: OffloadStore) -> None:
        """Keep what is kept in `store`."""
        assert self.data is not None
        self.store, self.fetch = store, store.put(self.data)
        self.data = None


class CompactLinear(CompactLayer, nn.Linear):
    """A frozen linear layer."""


class CompactConv2d(CompactLayer, nn.Conv2d):
    """A frozen convolution with zero padding."""


def as_compact(layer: nn.Module) -> CompactLayer | None:
    """A compact layer with the weight of `layer`, which may be one already; None for other layers."""
    if isinstance(layer, CompactLayer):
        return layer
    if type(layer) is nn.Linear:
        return CompactLinear(layer)
    if type(layer) is nn.Conv2d and layer.padding_mode == "zeros":
        return CompactConv2d(layer)
    return None


def compact_layers(unet: nn.Module) -> list[CompactLayer]:
    """The compact layers of a UNet, in its own order."""
    return [layer for layer in unet.modules() if isinstance(layer, CompactLayer)]


def is_quantized(unet: nn.Module) -> bool:
    """Whether the blocks of a UNet are kept in fewer bits."""
    return any(layer.scale is not None for layer in compact_layers(unet))


def is_offloaded(unet: nn.Module) -> bool:
    """Whether the blocks of a UNet are offloaded."""
    return any(layer.fetch is not None for layer in compact_layers(unet))


@dataclass
class WeightPolicy:
    """How the weights of a UNet's blocks are kept: quantized, offloaded, both, or as they are."""

    quantize: Callable[[torch.Tensor], Quantized] | None = None
    store: OffloadStore | None = None

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return self.quantize is not None or self.store is not None

    def resident_bytes(self, root: nn.Module, dtype: torch.dtype) -> int:
        """Bytes that the weights of a UNet take on the device in `dtype`, kept like this."""
        total = 0
        for path, layer in root.named_modules():
            compact = bool(self) and path.startswith(BLOCKS) and as_compact(layer) is not None
            for name, parameter in layer.named_parameters(recurse=False):
                width = dtype.itemsize
                if compact and name == "weight":
                    width = 0 if self.store is not None else 1
                total += parameter.numel() * width
        return total

    def apply_to_layer(self, root: nn.Module, path: str) -> None:
        """Make the layer at `path` compact, if it can be."""
        if not path.startswith(BLOCKS):
            return
        layer = as_compact(root.get_submodule(path))
        if layer is None:
            return
        if self.quantize is not None and layer.scale is None:
            layer.quantize(self.quantize)
        if self.store is not None and layer.fetch is None:
            layer.offload(self.store)
        replace_submodule(root, path, layer)

    def apply_to(self, unet: nn.Module) -> None:
        """Make all layers of a UNet compact, those inside adapted ones too."""
        for path in [path for path, _ in unet.named_modules()]:
            self.apply_to_layer(unet, path)
