"""Thin layers: frozen ones whose weight takes less of the device's memory, in 8 bits or waiting elsewhere, or
has low-rank updates beside it.

The weight is made whole where it is needed, once in the forward pass and once in the backward pass, and let
go at once. Autograd keeps nothing of it: a library that makes it whole inside the forward pass has every
whole weight kept until the backward pass, and gains nothing where one trains.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from lora_core.backends.offload import OffloadStore

Quantized = tuple[torch.Tensor, torch.Tensor]
"""A weight in 8 bits, and its scale for each output, shaped to be multiplied with it."""

Update = tuple[torch.Tensor, torch.Tensor, float]
"""up (out, r), down (r, in) and the factor of their product."""

BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")
"""Where in a UNet layers are made thin: its first and last ones and those of the timestep are small, and
errors in them spread to everything."""
LEVELS = 127


def quantize_int8(weight: torch.Tensor) -> Quantized:
    """Round a weight (out, ...) to 255 levels, those of each output spread over its largest number.

    The error of a number is at most about 1/254 of the largest of its output. The scale of a weight in bf16
    is in bf16 too: all levels are whole numbers that bf16 has, so that the product is made in one go, with
    one rounding. fp16 is too short for small scales.
    """
    rows = weight.detach().float().flatten(1)
    scale = rows.abs().amax(1).div(LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
    scale = scale.to(torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32)
    packed = rows.div(scale[:, None]).round_().clamp_(-LEVELS, LEVELS)
    packed = packed.to(torch.int8).reshape(weight.shape)
    return packed, scale.reshape(-1, *[1] * (weight.dim() - 1))


class _Product(torch.autograd.Function):
    """What a thin layer does to its input. Only the input has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: "ThinLinear | ThinConv2d") -> torch.Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return layer.product(x, layer.whole())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.layer.pulled_back(grad, ctx.layer.whole(), ctx.shape), None


class _Compact(nn.Module):
    """What both kinds share: how the weight is kept."""

    data: torch.Tensor | None
    scale: torch.Tensor | None

    def keep(self, weight: torch.Tensor) -> None:
        """Keep a weight as it is, for now."""
        self.dtype, self.shape = weight.dtype, weight.shape
        self.updates: list[Update] = []
        """Added to the weight as it is made whole, which leaves what is kept untouched."""
        self.depot: OffloadStore | None = None
        self.fetch: Callable[[], torch.Tensor] | None = None
        self.register_buffer("data", weight.detach(), persistent=False)
        self.register_buffer("scale", None, persistent=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "_Thin":
        self.updates = [(fn(up), fn(down), factor) for up, down, factor in self.updates]
        result: _Compact = super()._apply(fn, recurse)
        return result

    def frozen(self) -> torch.Tensor:
        """The whole weight without its updates."""
        kept = self.fetch() if self.fetch is not None else self.data
        assert kept is not None
        return kept if self.scale is None else (kept * self.scale).to(self.dtype)

    def whole(self) -> torch.Tensor:
        """The whole weight, made anew each time: W + sum of factor * up @ down."""
        weight = self.frozen()
        for up, down, factor in self.updates:
            weight = torch.addmm(weight.flatten(1), up, down, alpha=factor).view(self.shape)
        return weight

    weight: Any = property(whole)

    def pack(self, how: Callable[[torch.Tensor], Quantized]) -> None:
        """Keep the weight packed, where it lies."""
        self.data, self.scale = how(self.frozen())
        if self.depot is not None:
            self.move(self.depot)

    def move(self, depot: OffloadStore) -> None:
        """Keep what is kept in `depot`."""
        assert self.data is not None
        self.depot, self.fetch = depot, depot.put(self.data)
        self.data = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the layer that it stands for."""
        result: torch.Tensor = _Product.apply(x, self)
        return result


class CompactLinear(_Compact, nn.Linear):
    """A frozen linear layer."""

    def __init__(self, layer: nn.Linear) -> None:
        """Stand for `layer`, its weight as it is."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        self.keep(layer.weight)

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        return F.linear(x, weight, self.bias)

    def pulled_back(self, grad: torch.Tensor, weight: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The gradient of the input from that of the output."""
        return (grad.flatten(0, -2) @ weight).reshape(shape)


class CompactConv2d(_Compact, nn.Conv2d):
    """A frozen convolution that pads with zeros."""

    def __init__(self, layer: nn.Conv2d) -> None:
        """Stand for `layer`, its weight as it is."""
        nn.Module.__init__(self)
        for name in (*nn.Conv2d.__constants__, "transposed"):
            setattr(self, name, getattr(layer, name))
        self.bias = layer.bias
        self.keep(layer.weight)

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """(B, in, h, w) to (B, out, h', w')."""
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def pulled_back(self, grad: torch.Tensor, weight: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The gradient of the input from that of the output."""
        more: Any = (self.stride, self.padding, self.dilation, self.groups)
        return conv2d_input(shape, weight, grad, *more)


def as_compact(layer: nn.Module) -> CompactLinear | CompactConv2d | None:
    """A thin layer with the weight of `layer`, which may be one already; None where there is no such kind."""
    if isinstance(layer, CompactLinear | CompactConv2d):
        return layer
    if type(layer) is nn.Linear:
        return CompactLinear(layer)
    if type(layer) is nn.Conv2d and layer.padding_mode == "zeros":
        return CompactConv2d(layer)
    return None


def compact_layers(unet: nn.Module) -> list[CompactLinear | CompactConv2d]:
    """The thin layers of a UNet, in its own order."""
    return [layer for layer in unet.modules() if isinstance(layer, CompactLinear | CompactConv2d)]


def is_quantized(unet: nn.Module) -> bool:
    """Whether the blocks of a UNet are kept in fewer bits."""
    return any(layer.scale is not None for layer in compact_layers(unet))


def is_offloaded(unet: nn.Module) -> bool:
    """Whether the blocks of a UNet wait outside of the device."""
    return any(layer.fetch is not None for layer in compact_layers(unet))


class WeightPolicy:
    """Makes the layers of a UNet thin in the same way, whether all at once or as each is read."""

    def __init__(
        self, how: Callable[[torch.Tensor], Quantized] | None = None, depot: OffloadStore | None = None
    ) -> None:
        """Pack weights by `how` and keep them in `depot`, each where there is one."""
        self.how = how
        self.depot = depot

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return self.how is not None or self.depot is not None

    def resident_bytes(self, root: nn.Module, dtype: torch.dtype) -> int:
        """Bytes that the weights of a UNet take on the device in `dtype`, made thin like this."""
        total = 0
        for path, layer in root.named_modules():
            thin = bool(self) and path.startswith(BLOCKS) and as_compact(layer) is not None
            for name, parameter in layer.named_parameters(recurse=False):
                width = dtype.itemsize
                if thin and name == "weight":
                    width = 0 if self.depot is not None else 1
                total += parameter.numel() * width
        return total

    def layer(self, root: nn.Module, path: str) -> None:
        """Make the layer at `path` thin, where it is one that can be."""
        if not path.startswith(BLOCKS):
            return
        parent, _, child = path.rpartition(".")
        layer = as_compact(root.get_submodule(path))
        if layer is None:
            return
        if self.how is not None and layer.scale is None:
            layer.pack(self.how)
        if self.depot is not None and layer.fetch is None:
            layer.move(self.depot)
        setattr(root.get_submodule(parent), child, layer)

    def every(self, unet: nn.Module) -> None:
        """Make all layers of a UNet thin, those inside adapted ones too."""
        for path in [path for path, _ in unet.named_modules()]:
            self.layer(unet, path)
