"""LoRA layers, and flat parameters: all of an adapter in one tensor, all their gradients in another.

Optimizer, clipping, averaging and the check for non-finite values are one operation each; layers see views. A
base in half precision computes with a cast copy. Writes through `.data`, aliases and kernels of other
packages leave no trace in a tensor, so the copy is remade after every `mutate` and at each `zero_grad`.

`LoraLayer.forward` is the computation in plain torch, used with dropout. Otherwise `_LoraLinear` and
`_LoraConv2d` compute the same (`tests/lora/test_fused.py` keeps the two equal): products are added up in
place, the gradients of the factors go straight to where the optimizer finds them, and nothing is kept for the
backward pass but the layer's input and the product as wide as the rank. The price: autograd sees no gradient
of the factors, so hooks on them, `torch.autograd.grad` and DDP do not work.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from lora_core.backends.base import Adaptable, conv2d_grads, frozen_layer
from lora_core.lora.weights import LayerUpdate, LayerWeights, LoraSpec


@dataclass(frozen=True)
class Factors:
    """A layer's factors, or their gradients, as matrices: `down` (r, in) and `up` (out, r)."""

    down: torch.Tensor
    up: torch.Tensor


class FlatParams:
    """The parameters of an adapter and their gradients, group after group.

    Attributes:
        data: (N,), fp32; its `grad` is never None.
        groups: one trained tensor for each group, a view of `data`; its `grad` is a view of that of `data`.
            With `split_a_b` two: the group's down factors, then all others.
        factors: the layers' parameters that each of them holds.
    """

    def __init__(self, groups: Sequence[Sequence["AdaptedLayer"]], split_a_b: bool = False) -> None:
        """Move the factors of `groups` of layers here, bit for bit; other layers stay as they are."""
        factors = [factor for group in groups for layer in group for factor in layer.trained()]
        self.data = nn.Parameter(torch.empty(sum(map(torch.numel, factors)), device=factors[0].device))
        self.grads = self.data.grad = torch.zeros_like(self.data)
        self.groups: list[nn.Parameter] = []
        self.factors: list[list[nn.Parameter]] = []
        self._casts: dict[torch.dtype, _CastCopy] = {}
        self._homes: dict[int, tuple[int, torch.Tensor]] = {}
        end = 0
        for group in groups:
            starts: list[dict[str, int]] = [{} for _ in group]
            for part in (slice(1), slice(1, None)) if split_a_b else (slice(None),):
                start, moved = end, []
                for layer, places in zip(group, starts, strict=True):
                    for name in layer.factor_names[part]:
                        places[name] = end
                        moved.append(self._move(layer, name, end))
                        end += moved[-1].numel()
                self.groups.append(self._part(start, end))
                self.factors.append(moved)
            for layer, places in zip(group, starts, strict=True):
                layer.bind(self, places)

    def mark_changed(self) -> None:
        """Declare that the parameters were written to: the next use of a cast copy casts again."""
        for copy in self._casts.values():
            copy.stale = True

    @contextmanager
    def mutate(self) -> Iterator[torch.Tensor]:
        """`data` without autograd, to be written to by any means while the context is open."""
        try:
            yield self.data.detach()
        finally:
            self.mark_changed()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Have an optimizer of `groups`, or of the layers' factors, take its step, however it writes: some
        put a new tensor into `.data`, copied back to where the layers read; some move what is stopped."""
        with self.mutate():
            kept = [(parameter, parameter.detach().clone()) for parameter in stopped_parameters(optimizer)]
            optimizer.step()
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    pointer, home = self._homes[id(parameter)]
                    if parameter.data_ptr() != pointer:
                        home.copy_(parameter.detach())
                        parameter.data = home
            for parameter, before in kept:
                parameter.detach().copy_(before)

    def zero_grad(self) -> None:
        """Set all gradients to zero at the start of a step, for which the parameters are cast again."""
        self.mark_changed()
        for grads in (self.grads, *(copy.grads for copy in self._casts.values())):
            grads.zero_()

    def flush_grads(self) -> None:
        """Add the gradients that were computed in half precision to those in fp32."""
        for copy in self._casts.values():
            self.grads.add_(copy.grads)
            copy.grads.zero_()

    def cast(self, dtype: torch.dtype) -> "_CastCopy":
        """The parameters in another dtype than fp32, as they are now."""
        if dtype not in self._casts:
            self._casts[dtype] = _CastCopy(self.data.detach(), dtype)
        copy = self._casts[dtype]
        if copy.stale:
            copy.values.copy_(self.data.detach())
            copy.stale = False
        return copy

    def _move(self, layer: "AdaptedLayer", name: str, start: int) -> nn.Parameter:
        factor: nn.Parameter = getattr(layer, name)
        moved = self._part(start, start + factor.numel(), factor.shape)
        with torch.no_grad():
            moved.copy_(factor)
        layer.set_factor(name, moved)
        return moved

    def _part(self, start: int, end: int, shape: torch.Size | None = None) -> nn.Parameter:
        shape = shape or torch.Size([end - start])
        part = nn.Parameter(self.data.detach()[start:end].view(shape))
        self._homes[id(part)] = part.data_ptr(), part.detach()
        part.grad = self.grads[start:end].view(shape)
        return part


@dataclass
class ParamView:
    """A layer's factors in a `FlatParams` as matrices, `places` (start, rows, columns) of down and up. Views
    are made once for each dtype: hundreds of them in each step took a tenth of a small one."""

    flat: FlatParams
    places: tuple[tuple[int, int, int], ...]
    _views: dict[torch.dtype, tuple[Factors, Factors]] = field(default_factory=dict, repr=False)

    def in_dtype(self, dtype: torch.dtype) -> tuple[Factors, Factors]:
        """The factors in `dtype`, and where gradients computed in it are added up (`flush_grads`); all
        parameters are cast together, once after each change."""
        copy = None if dtype == torch.float32 else self.flat.cast(dtype)
        if dtype not in self._views:
            values = self.flat.data.detach() if copy is None else copy.values
            self._views[dtype] = self._slice(values), self._slice((copy or self.flat).grads)
        return self._views[dtype]

    def _slice(self, flat: torch.Tensor) -> Factors:
        cut = (flat[at : at + rows * columns].view(rows, columns) for at, rows, columns in self.places)
        return Factors(*cut)


class _CastCopy:
    """The parameters in half precision, and the gradients that were computed in it; `stale` where the
    parameters may have changed since they were cast."""

    def __init__(self, values: torch.Tensor, dtype: torch.dtype) -> None:
        self.values = torch.empty_like(values, dtype=dtype)
        self.grads = torch.zeros_like(self.values)
        self.stale = True


@dataclass
class DropoutState:
    """Position in training, set before each micro-batch: dropout masks follow from it alone, so a layer in a
    checkpointed block draws the same ones twice. Each kind of device draws others. A micro-batch that is
    split has the masks of all of it: of its `rows` images, those from `first` to `last` go through now.
    """

    seed: int = 0
    micro_batch: int = 0
    first: int = 0
    last: int = 0
    rows: int = 0


class AdaptedLayer(nn.Module):
    """A frozen layer with a trained update; the kinds of adapters are subclasses, with a row in
    `assets/choices.toml`. They name their parameters in `factor_names`, compute `forward`, and translate
    themselves to and from what files hold."""

    factor_names: tuple[str, ...]

    def __init__(self, base: Adaptable, name: str, spec: LoraSpec, state: DropoutState, seed: int) -> None:
        """Wrap `base`; `name` and `seed` decide the random start and the dropout masks."""
        super().__init__()
        self.base: Adaptable = base
        self.name = name
        self.spec = spec
        self.dropout_state = state
        self.drops = max(spec.dropout, spec.rank_dropout, spec.module_dropout) > 0
        self.strength = 1.0
        self.flat: FlatParams | None = None

    @property
    def weight(self) -> torch.Tensor:
        """The frozen weight: other code asks layers for its dtype and device."""
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The frozen bias."""
        return self.base.bias

    def trained(self) -> list[nn.Parameter]:
        """The trained parameters, in the order of their names."""
        return [getattr(self, name) for name in self.factor_names]

    def set_factor(self, name: str, factor: nn.Parameter) -> None:
        """Replace a trained parameter."""
        setattr(self, name, factor)

    def bind(self, flat: FlatParams, starts: dict[str, int]) -> None:
        """Note the `FlatParams` that holds the parameters, and where each begins in it."""
        self.flat = flat

    def layer_weights(self) -> LayerUpdate:
        """A detached copy of the update, on the CPU."""
        raise NotImplementedError

    def factors_of(self, weights: LayerUpdate) -> list[torch.Tensor]:
        """What the trained parameters are where the layer acts as `weights`, in their order."""
        raise NotImplementedError

    def from_layer_weights(self, weights: LayerUpdate) -> None:
        """Take over an update of the same kind, rank and alpha, bit for bit."""
        with torch.no_grad():
            for factor, given in zip(self.trained(), self.factors_of(weights), strict=False):
                factor.copy_(given.reshape(factor.shape))
        if self.flat is not None:
            self.flat.mark_changed()


class LoraLayer(AdaptedLayer):
    """y = base(x) + strength * (alpha / r) * up(down(x)), for a linear layer or a convolution.

    down is (r, in) or (r, in, k, k) and starts random, up is (out, r) or (out, r, 1, 1) and starts at zero,
    so that training starts at the base exactly. Both are fp32 whatever the base's dtype is. A layer whose
    factors are in a `FlatParams` is fused, unless a dropout is on.

    Source: Hu et al. 2021, section 4.1, equation 3.
    """

    factor_names: tuple[str, ...] = ("down", "up")
    param_view: ParamView | None = None
    """Set once a `FlatParams` holds the parameters."""

    def __init__(self, base: Adaptable, name: str, spec: LoraSpec, state: DropoutState, seed: int) -> None:
        super().__init__(base, name, spec, state, seed)
        weight = base.weight
        generator = torch.Generator().manual_seed(hash_seed(seed, name))
        down = torch.empty(spec.rank, *weight.shape[1:])
        # U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the start of PyTorch's linear layers and of the reference LoRA.
        down.uniform_(-1.0, 1.0, generator=generator).div_(down[0].numel() ** 0.5)
        up = torch.zeros(weight.shape[0], spec.rank, *[1] * (weight.dim() - 2))
        self.down = nn.Parameter(down.to(weight.device))
        self.up = nn.Parameter(up.to(weight.device))

    def bind(self, flat: FlatParams, starts: dict[str, int]) -> None:
        """Compute with views of `flat` from now on."""
        super().bind(flat, starts)
        pair = ("down", self.down), ("up", self.up)
        self.param_view = ParamView(flat, tuple((starts[n], len(one), one[0].numel()) for n, one in pair))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out), or (B, in, h, w) to (B, out, h', w')."""
        scale = self.strength * self.spec.alpha / self.spec.rank
        dropping = self.training and self.drops
        if self.param_view is not None and scale and not dropping:
            fused = _LoraConv2d if isinstance(self.base, nn.Conv2d) else _LoraLinear
            # Autograd is given the factors only so that y has a gradient.
            y: torch.Tensor = fused.apply(x, self.down, self.up, self.base, self.param_view, scale)
            return y
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
        """The update, masks drawn from (seed, micro-batch, layer), kept values scaled by 1 / (1 - p)."""
        state, spec = self.dropout_state, self.spec
        seed = hash_seed(state.seed, f"{state.micro_batch}/{self.name}")
        draw = torch.Generator(x.device).manual_seed(seed)
        keep_module = torch.rand((), generator=draw, device=x.device) >= spec.module_dropout
        keep_rank = torch.rand(spec.rank, generator=draw, device=x.device) >= spec.rank_dropout
        if spec.dropout:
            kept = self._uniform_rows(x, draw) >= spec.dropout
            x = x * (kept / (1 - spec.dropout))
        low = self._down(x)
        mask = keep_rank.to(low) * keep_module.to(low)
        mask = mask / ((1 - spec.rank_dropout) * (1 - spec.module_dropout))
        if isinstance(self.base, nn.Conv2d):
            mask = mask.view(-1, 1, 1)
        return self._up(low * mask)

    def _uniform_rows(self, x: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        """Uniform in [0, 1), of the shape of `x`: its rows of the draw for the full micro-batch."""
        state = self.dropout_state
        if state.last - state.first == state.rows:
            return torch.rand(x.shape, generator=draw, device=x.device)
        # A text encoder's layers see several rows an image, one for each chunk of its caption.
        each = len(x) // (state.last - state.first)
        full = torch.rand((each * state.rows, *x.shape[1:]), generator=draw, device=x.device)
        return full[each * state.first : each * state.last]

    def layer_weights(self) -> LayerUpdate:
        """See `AdaptedLayer`."""
        return LayerWeights(self.down.detach().cpu().clone(), self.up.detach().cpu().clone(), self.spec.alpha)

    def factors_of(self, weights: LayerUpdate) -> list[torch.Tensor]:
        """See `AdaptedLayer`."""
        assert isinstance(weights, LayerWeights)
        return [weights.down, weights.up]


class _LoraLinear(torch.autograd.Function):
    """y = frozen(x) + scale * up(down(x)), (..., in) to (..., out), in the dtype of x."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, base: nn.Linear, view: ParamView,
        scale: float,
    ) -> torch.Tensor:  # fmt: skip
        factors, frozen = view.in_dtype(x.dtype)[0], frozen_layer(base)
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ factors.down.T
        y = frozen.forward_frozen(rows).addmm_(low, factors.up.T, alpha=scale)
        ctx.save_for_backward(rows, low)
        ctx.frozen, ctx.view, ctx.scale, ctx.shape = frozen, view, scale, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, low = ctx.saved_tensors
        factors, grads = ctx.view.in_dtype(grad.dtype)
        grad = grad.reshape(-1, grad.shape[-1])
        low_grad = grad @ factors.up
        grads.up.addmm_(grad.T, low, alpha=ctx.scale)
        grads.down.addmm_(low_grad.T, rows, alpha=ctx.scale)
        if not ctx.needs_input_grad[0]:
            return (None,) * 6
        x_grad = ctx.frozen.input_grad(grad, rows).addmm_(low_grad, factors.down, alpha=ctx.scale)
        return (x_grad.view(ctx.shape), *(None,) * 5)


class _LoraConv2d(torch.autograd.Function):
    """y = frozen(x) + scale * up(down(x)), (B, in, h, w) to (B, out, h', w'), in the dtype of x.

    The up factor is a matrix product for each image, and so is the down factor of a kernel of 1: small
    convolutions cost several times as much.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, conv: nn.Conv2d, view: ParamView,
        scale: float,
    ) -> torch.Tensor:  # fmt: skip
        factors, frozen = view.in_dtype(x.dtype)[0], frozen_layer(conv)
        ctx.pointwise = conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding in (0, (0, 0))
        if ctx.pointwise:
            low = torch.matmul(factors.down, x.flatten(2))
        else:
            # Not by the weight's shape: reading it materializes that of a compact layer.
            kernel = factors.down.view(-1, x.shape[1], *conv.kernel_size)
            low = F.conv2d(x, kernel, None, conv.stride, conv.padding, conv.dilation).flatten(2)
        y = frozen.forward_frozen(x).contiguous()
        y.flatten(2).baddbmm_(factors.up.expand(len(x), -1, -1), low, alpha=scale)
        ctx.save_for_backward(x, low)
        ctx.frozen, ctx.conv, ctx.view, ctx.scale = frozen, conv, view, scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, low = ctx.saved_tensors
        factors, grads = ctx.view.in_dtype(grad.dtype)
        grad = grad.contiguous()
        flat, count = grad.flatten(2), len(x)
        low_grad = torch.bmm(factors.up.T.expand(count, -1, -1), flat)
        grads.up.add_(torch.bmm(flat, low.transpose(1, 2)).sum(0), alpha=ctx.scale)
        wanted: bool = ctx.needs_input_grad[0]
        low_x_grad = None
        if ctx.pointwise:
            down_grad = torch.bmm(low_grad, x.flatten(2).transpose(1, 2)).sum(0)
        else:
            shape = (count, len(factors.down), *grad.shape[2:])
            kernel = factors.down.view(-1, *x.shape[1:2], *ctx.conv.kernel_size)
            low_x_grad, down_grad = conv2d_grads(low_grad.view(shape), x, kernel, ctx.conv, (wanted, True))
        grads.down.add_(down_grad.reshape_as(grads.down), alpha=ctx.scale)
        if not wanted:
            return (None,) * 6
        x_grad = ctx.frozen.input_grad(grad, x)
        if low_x_grad is not None:
            x_grad.add_(low_x_grad, alpha=ctx.scale)
        else:
            x_grad.flatten(2).baddbmm_(factors.down.T.expand(count, -1, -1), low_grad, alpha=ctx.scale)
        return (x_grad, *(None,) * 5)


def stopped_parameters(optimizer: torch.optim.Optimizer) -> list[Any]:
    """The parameters of the groups at a rate of 0."""
    return [one for group in optimizer.param_groups if not group["lr"] for one in group["params"]]


def hash_seed(seed: int, text: str) -> int:
    """A 63-bit integer that follows from both."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{text}".encode()).digest()[:8], "little") >> 1
