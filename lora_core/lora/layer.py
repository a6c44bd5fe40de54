"""A layer and its low-rank path as one operation, which is what is trained with.

`LoraLayer.forward` says the same in plain modules; `tests/lora/test_fused.py` keeps the two equal. Here
products are added up in place, the gradients of the factors go straight to where the optimizer finds them,
and nothing is kept for the backward pass but the layer's input and the product as wide as the rank. A linear
layer takes three matrix products in the forward pass and five in the backward pass, and no other kernel.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from lora_core.backends.onednn import OneDnnConv2d, OneDnnLinear
from lora_core.lora.flat_params import AdapterLayer, ParamView
from lora_core.lora.targets import Adaptable
from lora_core.lora.weights import LayerWeights


def fused_linear(
    x: torch.Tensor, base: Adaptable, view: ParamView, scale: float, params: Any
) -> torch.Tensor:
    """y = base(x) + scale * up(down(x)), (..., in) to (..., out).

    Args:
        x: in the base's number format, which the low-rank path is computed in too.
        base: a linear layer.
        view: where the factors lie.
        scale: strength * alpha / rank.
        params: the factors as autograd knows them, so that y has a gradient.
    """
    result: torch.Tensor = _FusedLinear.apply(x, *params, base, view, scale)
    return result


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, base: Adaptable, view: ParamView,
        scale: float,
    ) -> torch.Tensor:  # fmt: skip
        factors = view.factors(x.dtype)
        rows = x.reshape(-1, view.in_features)
        low = rows @ factors.down.T
        if isinstance(base, OneDnnLinear):
            frozen = base.product(rows)
        else:
            frozen = F.linear(rows, base.weight, base.bias)
        y = frozen.addmm_(low, factors.up.T, alpha=scale)
        ctx.save_for_backward(rows, low)
        ctx.base, ctx.view, ctx.scale, ctx.shape = base, view, scale, x.shape
        return y.view(*x.shape[:-1], view.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, low = ctx.saved_tensors
        factors, gradients = ctx.view.factors(grad.dtype), ctx.view.grads(grad.dtype)
        grad = grad.reshape(-1, ctx.view.out_features)
        low_grad = grad @ factors.up
        gradients.up.addmm_(grad.T, low, alpha=ctx.scale)
        gradients.down.addmm_(low_grad.T, rows, alpha=ctx.scale)
        if not ctx.needs_input_grad[0]:
            return (None,) * 6
        frozen = ctx.base.pulled_back(grad) if isinstance(ctx.base, OneDnnLinear) else grad @ ctx.base.weight
        x_grad = frozen.addmm_(low_grad, factors.down, alpha=ctx.scale)
        return (x_grad.view(ctx.shape), *(None,) * 5)


def fused_conv2d(
    x: torch.Tensor, base: nn.Conv2d, view: ParamView, scale: float, params: Any
) -> torch.Tensor:
    """y = base(x) + scale * up(down(x)), (B, in, h, w) to (B, out, h', w'); arguments as of `fused_linear`.

    `base` has one group and pads with zeros. The up factor is a product of matrices for each picture, and so
    is the down factor of a kernel of 1: small convolutions cost several times as much.
    """
    result: torch.Tensor = _FusedConv2d.apply(x, *params, base, view, scale)
    return result


class _FusedConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, base: nn.Conv2d, view: ParamView,
        scale: float,
    ) -> torch.Tensor:  # fmt: skip
        factors = view.factors(x.dtype)
        ctx.how = (base.stride, base.padding, base.dilation)
        ctx.pointwise = base.kernel_size == (1, 1) and base.stride == (1, 1) and base.padding in (0, (0, 0))
        if ctx.pointwise:
            low = torch.matmul(factors.down, x.flatten(2))
        else:
            # Not by the weight's shape: a thin layer makes its weight whole for whoever asks.
            down_kernel = factors.down.view(view.rank, x.shape[1], *base.kernel_size)
            low = F.conv2d(x, down_kernel, None, *ctx.how).flatten(2)
        if isinstance(base, OneDnnConv2d):
            y = base.product(x)
        else:
            y = F.conv2d(x, base.weight, base.bias, *ctx.how)
        y = y.contiguous()
        y.flatten(2).baddbmm_(factors.up.expand(len(x), -1, -1), low, alpha=scale)
        ctx.save_for_backward(x, low)
        ctx.base, ctx.view, ctx.scale = base, view, scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, low = ctx.saved_tensors
        factors, gradients = ctx.view.factors(grad.dtype), ctx.view.grads(grad.dtype)
        grad = grad.contiguous()
        flat, each = grad.flatten(2), len(x)
        low_grad = torch.bmm(factors.up.T.expand(each, -1, -1), flat)
        gradients.up.add_(torch.bmm(flat, low.transpose(1, 2)).sum(0), alpha=ctx.scale)
        wanted: bool = ctx.needs_input_grad[0]
        below = None
        if ctx.pointwise:
            down_grad = torch.bmm(low_grad, x.flatten(2).transpose(1, 2)).sum(0)
        else:
            shape = (each, ctx.view.rank, *grad.shape[2:])
            down = factors.down.view(-1, *x.shape[1:2], *ctx.base.kernel_size)
            below, down_grad = _conv2d_grads(low_grad.view(shape), x, down, ctx.how, (wanted, True))
        gradients.down.add_(down_grad.view_as(gradients.down), alpha=ctx.scale)
        if not wanted:
            return (None,) * 6
        if isinstance(ctx.base, OneDnnConv2d):
            x_grad = ctx.base.pulled_back(grad, x.shape)
        else:
            x_grad, _ = _conv2d_grads(grad, x, ctx.base.weight, ctx.how, (True, False))
        if below is not None:
            x_grad.add_(below, alpha=ctx.scale)
        else:
            back = factors.down.T.expand(each, -1, -1)
            x_grad.flatten(2).baddbmm_(back, low_grad, alpha=ctx.scale)
        return (x_grad, *(None,) * 5)


def _conv2d_grads(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, how: Any, wanted: tuple[bool, bool]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of a convolution's input and of its weight, those that are wanted, in one call."""
    stride, padding, dilation = how
    x_grad, weight_grad, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, (0, 0), 1, (*wanted, False)
    )
    return x_grad, weight_grad


# LoRA: the frozen layer plus a trained low-rank path beside it.


@dataclass(frozen=True)
class LoraSpec:
    """What all layers of one adapter share: rank, alpha, and the chances of the three kinds of dropout."""

    rank: int
    alpha: float
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0

    @property
    def drops(self) -> bool:
        """Whether any dropout is on."""
        return max(self.dropout, self.rank_dropout, self.module_dropout) > 0


@dataclass
class DropoutState:
    """Where training stands, told to all layers before each micro-batch: dropout masks follow from it alone.

    A layer inside a checkpointed block runs twice a step; masks drawn from this moment are the same both
    times. Masks are drawn on the device that computes; each kind of device draws others. A micro-batch that
    goes through in parts has the masks of the whole: of its `rows` pictures, those from `first` to `last` go
    through now. 0 rows: all of them.
    """

    seed: int = 0
    micro_batch: int = 0
    first: int = 0
    last: int = 0
    rows: int = 0


class LoraLayer(AdapterLayer):
    """y = base(x) + strength * (alpha / r) * up(down(x)), for a linear layer or a convolution.

    down is (r, in) or (r, in, k, k) and starts random, up is (out, r) or (out, r, 1, 1) and starts at zero,
    so that training starts at the base exactly. Both are fp32 whatever the base's number format is. A layer
    whose factors lie in a `Storage` is computed by `fused`, unless a dropout is on.

    Source: Hu et al. 2021, section 4.1, equation 3.
    """

    def __init__(self, base: Adaptable, name: str, spec: LoraSpec, state: DropoutState, seed: int) -> None:
        """Wrap `base`; `name` and `seed` decide the random start and the dropout masks."""
        super().__init__()
        self.base: Adaptable = base
        self.name = name
        self.spec = shape
        self.dropout_state = state
        self.strength = 1.0
        weight = base.weight
        generator = torch.Generator().manual_seed(_hash_seed(seed, name))
        down = torch.empty(shape.rank, *weight.shape[1:])
        # U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the start of PyTorch's own linear layers and of the reference
        # LoRA.
        down.uniform_(-1.0, 1.0, generator=generator).div_(down[0].numel() ** 0.5)
        up = torch.zeros(weight.shape[0], shape.rank, *[1] * (weight.dim() - 2))
        self.down = nn.Parameter(down.to(weight.device))
        self.up = nn.Parameter(up.to(weight.device))

    @property
    def weight(self) -> torch.Tensor:
        """The frozen weight: other code asks layers for its dtype and device."""
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The frozen bias."""
        return self.base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out), or (B, in, h, w) to (B, out, h', w')."""
        scale = self.strength * self.spec.alpha / self.spec.rank
        dropping = self.training and self.spec.drops
        if self.param_view is not None and scale and not dropping:
            params = (self.down, self.up)
            if isinstance(self.base, nn.Conv2d):
                return fused_conv2d(x, self.base, self.param_view, scale, params)
            return fused_linear(x, self.base, self.param_view, scale, params)
        frozen: torch.Tensor = self.base(x)
        if self.strength == 0:
            return frozen
        low = x.to(self.down.dtype)
        update = self._dropped_update(low) if dropping else self._up(self._down(low))
        return frozen + (scale * update).to(frozen.dtype)

    def _down(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.base, nn.Conv2d):
            return F.conv2d(x, self.down, None, self.base.stride, self.base.padding, self.base.dilation)
        return F.linear(x, self.down)

    def _up(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.up) if isinstance(self.base, nn.Conv2d) else F.linear(x, self.up)

    def _dropped_update(self, x: torch.Tensor) -> torch.Tensor:
        """The update with masks drawn from (seed, micro-batch, layer); what is kept is scaled up by 1 / (1 -
        p)."""
        draw = torch.Generator(x.device).manual_seed(
            _hash_seed(self.dropout_state.seed, f"{self.dropout_state.micro_batch}/{self.name}")
        )
        keep_module = torch.rand((), generator=draw, device=x.device) >= self.spec.module_dropout
        keep_rank = torch.rand(self.spec.rank, generator=draw, device=x.device) >= self.spec.rank_dropout
        if self.spec.dropout:
            kept = self._drawn_rows(x, draw) >= self.spec.dropout
            x = x * (kept / (1 - self.spec.dropout))
        low = self._down(x)
        mask = (
            keep_rank.to(low)
            * keep_module.to(low)
            / ((1 - self.spec.rank_dropout) * (1 - self.spec.module_dropout))
        )
        if isinstance(self.base, nn.Conv2d):
            mask = mask.view(-1, 1, 1)
        return self._up(low * mask)

    def _drawn_rows(self, x: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        """Numbers in [0, 1) of the shape of `x`, those of its place in the whole micro-batch."""
        state = self.dropout_state
        if state.last - state.first == state.rows:
            return torch.rand(x.shape, generator=draw, device=x.device)
        # A text encoder's layers see several rows a picture, one for each chunk of its caption.
        each = len(x) // (state.last - state.first)
        whole = torch.rand((each * state.rows, *x.shape[1:]), generator=draw, device=x.device)
        return whole[each * state.first : each * state.last]

    def layer_weights(self) -> LayerWeights:
        """A detached copy of the factors, on the CPU."""
        return LayerWeights(self.down.detach().cpu().clone(), self.up.detach().cpu().clone(), self.spec.alpha)

    def from_layer_weights(self, weights: LayerWeights) -> None:
        """Take over factors of the same rank and alpha, bit for bit."""
        with torch.no_grad():
            self.down.copy_(weights.down.reshape(self.down.shape))
            self.up.copy_(weights.up.reshape(self.up.shape))
        self.mark_changed()


def _hash_seed(seed: int, text: str) -> int:
    """A 63-bit number that follows from both."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{text}".encode()).digest()[:8], "little") >> 1
