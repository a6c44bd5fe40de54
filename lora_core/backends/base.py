"""Frozen layers: one interface for every way to keep and multiply the weights of the base.

A trained layer asks its frozen one for two products, both outside autograd: the output, and the gradient of
the input. `FrozenLayer` computes them with torch's own operators; `onednn` and `int8` subclass
`FrozenModule`. Private operators of torch are called in this folder only.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

Adaptable = nn.Linear | nn.Conv2d
"""The layers that have a `FrozenLayer`, and that an adapter can wrap."""


class FrozenLayer:
    """A linear layer or a convolution with zero padding whose weight has no gradient; each product reads the
    weight once."""

    __slots__ = ("_layer",)

    def __init__(self, layer: Any) -> None:
        """Compute with the weight of `layer`."""
        self._layer = layer

    def forward_frozen(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out), or (B, in, h, w) to (B, out, h', w'), in a new tensor."""
        conv = self._layer
        if isinstance(conv, nn.Linear):
            return F.linear(x, conv.weight, conv.bias)
        return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    def input_grad(self, grad_output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The gradient of the input in a new tensor; of `x`, shape and layout are read, never values."""
        layer = self._layer
        if isinstance(layer, nn.Linear):
            return (grad_output.flatten(0, -2) @ layer.weight).view(x.shape)
        return conv2d_grads(grad_output, x, layer.weight, layer, (True, False))[0]


class FrozenModule(FrozenLayer, nn.Module):
    """Base class of the layers that replace plain ones: a `FrozenLayer` made into a module with autograd."""

    bias: Any

    def __init__(self, layer: Adaptable) -> None:
        """Take over the settings of `layer`, without weight and bias."""
        nn.Module.__init__(self)
        names = (
            (*nn.Conv2d.__constants__, "transposed") if isinstance(layer, nn.Conv2d) else layer.__constants__
        )
        for name in names:
            setattr(self, name, getattr(layer, name))

    @property
    def _layer(self) -> Any:
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the layer that this one replaces; autograd keeps no tensor."""
        y: torch.Tensor = _Frozen.apply(x, self)
        return y


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: FrozenLayer) -> torch.Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return layer.forward_frozen(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.layer.input_grad(grad, grad.new_empty(1).expand(ctx.shape)), None


def frozen_layer(layer: Adaptable) -> FrozenLayer:
    """`layer` as a `FrozenLayer`: itself where it is one, else torch's own operators on its weight."""
    return layer if isinstance(layer, FrozenModule) else FrozenLayer(layer)


def conv2d_grads(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, conv: nn.Conv2d, wanted: tuple[bool, bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of a convolution's input (B, in, h, w) and of its weight (out, in, k, k), those that are
    `wanted`, in one call; `weight` need not be that of `conv`, which says stride, padding and the rest."""
    x_grad, weight_grad, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, conv.stride, conv.padding, conv.dilation, False, (0, 0), conv.groups,
        (*wanted, False),
    )  # fmt: skip
    return x_grad, weight_grad


def replace_submodule(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at the dotted `path` below `root`."""
    parent, _, child = path.rpartition(".")
    setattr(root.get_submodule(parent), child, module)
