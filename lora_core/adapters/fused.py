"""A layer and its low-rank path as one operation, which is what is trained with.

`LoraLayer.forward` says the same in plain modules; `tests/adapters/test_fused.py` keeps the two equal. Here
products are added up in place, the gradients of the factors go straight to where the optimizer finds them,
and nothing is kept for the backward pass but the layer's input and the product as wide as the rank. A linear
layer takes three matrix products in the forward pass and five in the backward pass, and no other kernel.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from lora_core.adapters.storage import Place
from lora_core.adapters.targets import Adaptable
from lora_core.models.prepacked import PrepackedConv2d, PrepackedLinear


def fused_linear(x: torch.Tensor, base: Adaptable, place: Place, scale: float, known: Any) -> torch.Tensor:
    """y = base(x) + scale * up(down(x)), (..., in) to (..., out).

    Args:
        x: in the base's number format, which the low-rank path is computed in too.
        base: a linear layer.
        place: where the factors lie.
        scale: strength * alpha / rank.
        known: the factors as autograd knows them, so that y has a gradient.
    """
    result: torch.Tensor = _FusedLinear.apply(x, *known, base, place, scale)
    return result


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, base: Adaptable, place: Place,
        scale: float,
    ) -> torch.Tensor:  # fmt: skip
        factors = place.factors(x.dtype)
        rows = x.reshape(-1, place.inside)
        low = rows @ factors.down.T
        if isinstance(base, PrepackedLinear):
            frozen = base.product(rows)
        else:
            frozen = F.linear(rows, base.weight, base.bias)
        y = frozen.addmm_(low, factors.up.T, alpha=scale)
        ctx.save_for_backward(rows, low)
        ctx.base, ctx.place, ctx.scale, ctx.shape = base, place, scale, x.shape
        return y.view(*x.shape[:-1], place.outside)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, low = ctx.saved_tensors
        factors, gradients = ctx.place.factors(grad.dtype), ctx.place.gradients(grad.dtype)
        grad = grad.reshape(-1, ctx.place.outside)
        low_grad = grad @ factors.up
        gradients.up.addmm_(grad.T, low, alpha=ctx.scale)
        gradients.down.addmm_(low_grad.T, rows, alpha=ctx.scale)
        if not ctx.needs_input_grad[0]:
            return (None,) * 6
        frozen = (
            ctx.base.pulled_back(grad) if isinstance(ctx.base, PrepackedLinear) else grad @ ctx.base.weight
        )
        x_grad = frozen.addmm_(low_grad, factors.down, alpha=ctx.scale)
        return (x_grad.view(ctx.shape), *(None,) * 5)


def fused_conv2d(x: torch.Tensor, base: nn.Conv2d, place: Place, scale: float, known: Any) -> torch.Tensor:
    """y = base(x) + scale * up(down(x)), (B, in, h, w) to (B, out, h', w'); arguments as of `fused_linear`.

    `base` has one group and pads with zeros. The up factor is a product of matrices for each picture, and so
    is the down factor of a kernel of 1: small convolutions cost several times as much.
    """
    result: torch.Tensor = _FusedConv2d.apply(x, *known, base, place, scale)
    return result


class _FusedConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, base: nn.Conv2d, place: Place,
        scale: float,
    ) -> torch.Tensor:  # fmt: skip
        factors = place.factors(x.dtype)
        ctx.how = (base.stride, base.padding, base.dilation)
        ctx.pointwise = base.kernel_size == (1, 1) and base.stride == (1, 1) and base.padding in (0, (0, 0))
        if ctx.pointwise:
            low = torch.matmul(factors.down, x.flatten(2))
        else:
            # Not by the weight's shape: a thin layer makes its weight whole for whoever asks.
            down_kernel = factors.down.view(place.rank, x.shape[1], *base.kernel_size)
            low = F.conv2d(x, down_kernel, None, *ctx.how).flatten(2)
        if isinstance(base, PrepackedConv2d):
            y = base.product(x)
        else:
            y = F.conv2d(x, base.weight, base.bias, *ctx.how)
        y = y.contiguous()
        y.flatten(2).baddbmm_(factors.up.expand(len(x), -1, -1), low, alpha=scale)
        ctx.save_for_backward(x, low)
        ctx.base, ctx.place, ctx.scale = base, place, scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, low = ctx.saved_tensors
        factors, gradients = ctx.place.factors(grad.dtype), ctx.place.gradients(grad.dtype)
        grad = grad.contiguous()
        flat, each = grad.flatten(2), len(x)
        low_grad = torch.bmm(factors.up.T.expand(each, -1, -1), flat)
        gradients.up.add_(torch.bmm(flat, low.transpose(1, 2)).sum(0), alpha=ctx.scale)
        wanted: bool = ctx.needs_input_grad[0]
        below = None
        if ctx.pointwise:
            down_grad = torch.bmm(low_grad, x.flatten(2).transpose(1, 2)).sum(0)
        else:
            shape = (each, ctx.place.rank, *grad.shape[2:])
            down = factors.down.view(-1, *x.shape[1:2], *ctx.base.kernel_size)
            below, down_grad = _pulled_back(low_grad.view(shape), x, down, ctx.how, (wanted, True))
        gradients.down.add_(down_grad.view_as(gradients.down), alpha=ctx.scale)
        if not wanted:
            return (None,) * 6
        if isinstance(ctx.base, PrepackedConv2d):
            x_grad = ctx.base.pulled_back(grad, x.shape)
        else:
            x_grad, _ = _pulled_back(grad, x, ctx.base.weight, ctx.how, (True, False))
        if below is not None:
            x_grad.add_(below, alpha=ctx.scale)
        else:
            back = factors.down.T.expand(each, -1, -1)
            x_grad.flatten(2).baddbmm_(back, low_grad, alpha=ctx.scale)
        return (x_grad, *(None,) * 5)


def _pulled_back(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, how: Any, wanted: tuple[bool, bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of a convolution's input and of its weight, those that are wanted, in one call."""
    stride, padding, dilation = how
    x_grad, weight_grad, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, (0, 0), 1, (*wanted, False)
    )
    return x_grad, weight_grad
