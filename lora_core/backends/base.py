"""Frozen layers: one protocol for every way to keep and multiply the weights of the base.

A trained layer asks its frozen one for two products, both outside autograd: the output, and the gradient of
the input. Plain torch layers get them from `PlainLinear` and `PlainConv2d`; `onednn` and `int8` subclass
`FrozenModule`. Private operators of torch are called in this folder only.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

Adaptable = nn.Linear | nn.Conv2d
"""The layers that have a `FrozenLayer`, and that an adapter can wrap."""


class FrozenLayer(Protocol):
    """A linear layer or a convolution whose weight has no gradient."""

    def forward_frozen(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out), or (B, in, h, w) to (B, out, h', w'), in a new tensor."""
        ...

    def input_grad(self, grad_output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The gradient of the input in a new tensor; of `x`, shape and layout are read, never values."""
        ...


class FrozenModule(nn.Module):
    """Base class of the layers that replace plain ones: `FrozenLayer` made into a module with autograd."""

    def forward_frozen(self, x: torch.Tensor) -> torch.Tensor:
        """See `FrozenLayer`."""
        raise NotImplementedError

    def input_grad(self, grad_output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """See `FrozenLayer`."""
        raise NotImplementedError

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


class PlainLinear:
    """`nn.Linear` as a `FrozenLayer`."""

    __slots__ = ("_layer",)

    def __init__(self, layer: nn.Linear) -> None:
        """Read the weight of `layer` at each call."""
        self._layer = layer

    def forward_frozen(self, x: torch.Tensor) -> torch.Tensor:
        """See `FrozenLayer`."""
        return F.linear(x, self._layer.weight, self._layer.bias)

    def input_grad(self, grad_output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """See `FrozenLayer`."""
        return grad_output @ self._layer.weight


class PlainConv2d:
    """`nn.Conv2d` with zero padding as a `FrozenLayer`."""

    __slots__ = ("_layer",)

    def __init__(self, layer: nn.Conv2d) -> None:
        """Read the weight of `layer` at each call."""
        self._layer = layer

    def forward_frozen(self, x: torch.Tensor) -> torch.Tensor:
        """See `FrozenLayer`."""
        conv = self._layer
        return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    def input_grad(self, grad_output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """See `FrozenLayer`."""
        return conv2d_grads(grad_output, x, self._layer.weight, self._layer, (True, False))[0]


def frozen_layer(layer: Adaptable) -> FrozenLayer:
    """`layer` as a `FrozenLayer`: itself where it is one, else torch's own operators on its weight."""
    if isinstance(layer, FrozenModule):
        return layer
    return PlainConv2d(layer) if isinstance(layer, nn.Conv2d) else PlainLinear(layer)


def conv2d_grads(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, conv: nn.Conv2d, wanted: tuple[bool, bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of a convolution's input and of its weight, those that are wanted, in one call.

    Args:
        grad: of the output, (B, out, h', w').
        x: the input, (B, in, h, w).
        weight: (out, in, k, k), which need not be that of `conv`.
        conv: says stride, padding, dilation and groups.
        wanted: (of the input, of the weight).
    """
    x_grad, weight_grad, _ = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        None,
        conv.stride,
        conv.padding,
        conv.dilation,
        False,
        (0, 0),
        conv.groups,
        (*wanted, False),
    )
    return x_grad, weight_grad


def copy_conv_settings(target: nn.Conv2d, source: nn.Conv2d) -> None:
    """Give a convolution the stride, padding and other settings of another one, without its weights."""
    for name in (*nn.Conv2d.__constants__, "transposed"):
        setattr(target, name, getattr(source, name))


def replace_submodule(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at the dotted `path` below `root`."""
    parent, _, child = path.rpartition(".")
    setattr(root.get_submodule(parent), child, module)
