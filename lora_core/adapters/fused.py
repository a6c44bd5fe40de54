"""A linear layer and its low-rank path as one operation, which is what is trained with.

`LoraLayer.forward` says the same in plain modules; `tests/adapters/test_fused.py` keeps the two equal. Here
products are added up in place, the gradients of the factors go straight to where the optimizer finds them,
and nothing is kept for the backward pass but the layer's input and the product as wide as the rank: three
matrix products in the forward pass and five in the backward pass, and no other kernel.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from lora_core.adapters.storage import Place
from lora_core.adapters.targets import Adaptable
from lora_core.models.prepacked import PrepackedLinear


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
