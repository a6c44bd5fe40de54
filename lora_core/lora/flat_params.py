"""Flat parameters: all trained parameters of an adapter in one tensor, and all their gradients in another.

Optimizer, clipping, averaging and the check for non-finite values are one operation each; layers see views.
A base in half precision computes with a cast copy. Writes through `.data`, aliases and kernels of other
packages leave no trace in a tensor, so the copy is made anew after every `mutate` and at each `zero_grad`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn


@dataclass(frozen=True)
class Factors:
    """A layer's factors, or their gradients, as matrices: `down` (r, in) and `up` (out, r)."""

    down: torch.Tensor
    up: torch.Tensor


class AdapterLayer(nn.Module):
    """A layer with trained parameters, named by `factor_names`, which all layers of an adapter share;
    `param_view` is set once a `FlatParams` holds them."""

    factor_names: ClassVar[tuple[str, ...]] = ("down", "up")
    down: nn.Parameter
    up: nn.Parameter
    param_view: "ParamView | None" = None

    def trained(self) -> list[nn.Parameter]:
        """The trained parameters, in the order of their names."""
        return [getattr(self, name) for name in self.factor_names]


class FlatParams:
    """The parameters of an adapter and their gradients, group after group.

    Attributes:
        data: (N,), fp32; its `grad` is never None.
        groups: one trained tensor for each group, a view of `data`; its `grad` is a view of that of `data`.
            With `split_a_b` two: the group's down factors, then all others.
        factor_names: names of the parameters that each of a group's tensors holds.
    """

    def __init__(self, groups: Sequence[Sequence[AdapterLayer]], split_a_b: bool = False) -> None:
        """Move the factors of `groups` of layers here, bit for bit; other layers stay as they are."""
        factors = [factor for group in groups for layer in group for factor in layer.trained()]
        self.data = nn.Parameter(torch.empty(sum(map(torch.numel, factors)), device=factors[0].device))
        self.grads = self.data.grad = torch.zeros_like(self.data)
        self.groups: list[nn.Parameter] = []
        first, *others = groups[0][0].factor_names
        self.factor_names = ((first,), tuple(others)) if split_a_b else ((first, *others),)
        self._casts: dict[torch.dtype, _CastCopy] = {}
        self._homes: dict[int, tuple[int, torch.Tensor]] = {}
        end = 0
        for group in groups:
            starts: dict[tuple[int, str], int] = {}
            for names in self.factor_names:
                start = end
                for number, layer in enumerate(group):
                    for name in names:
                        starts[number, name] = end
                        end = self._move(layer, name, end)
                self.groups.append(self._part(start, end))
            for number, layer in enumerate(group):
                sizes = len(layer.down), layer.down[0].numel(), layer.up.shape[0]
                layer.param_view = ParamView(self, starts[number, "down"], starts[number, "up"], *sizes)

    def checksum(self) -> int:
        """The sum of the bits of all parameters, to tell whether anything was written to them."""
        return int(self.data.detach().view(torch.int32).sum(dtype=torch.int64))

    def mark_changed(self) -> None:
        """Declare that the parameters were written to: the next use of a cast copy casts anew."""
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
        put a new tensor into `.data`, which is copied back to where the layers read."""
        with self.mutate():
            optimizer.step()
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    pointer, home = self._homes[id(parameter)]
                    if parameter.data_ptr() != pointer:
                        home.copy_(parameter.detach())
                        parameter.data = home

    def zero_grad(self) -> None:
        """Set all gradients to zero at the start of a step, for which the parameters are cast anew."""
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

    def _move(self, layer: AdapterLayer, name: str, start: int) -> int:
        factor: nn.Parameter = getattr(layer, name)
        end = start + factor.numel()
        moved = self._part(start, end, factor.shape)
        with torch.no_grad():
            moved.copy_(factor)
        setattr(layer, name, moved)
        return end

    def _part(self, start: int, end: int, shape: torch.Size | None = None) -> nn.Parameter:
        shape = shape or torch.Size([end - start])
        part = nn.Parameter(self.data.detach()[start:end].view(shape))
        self._homes[id(part)] = part.data_ptr(), part.detach()
        part.grad = self.grads[start:end].view(shape)
        return part


@dataclass
class ParamView:
    """A layer's factors in a `FlatParams`: (rank, in_features) from `down`, (out_features, rank) from `up`.
    Views are made once for each dtype: hundreds of them in each step took a tenth of a small one."""

    flat: FlatParams
    down: int
    up: int
    rank: int
    in_features: int
    out_features: int
    _views: dict[torch.dtype, tuple[Factors, Factors]] = field(default_factory=dict, repr=False)

    def in_dtype(self, dtype: torch.dtype) -> tuple[Factors, Factors]:
        """The factors in `dtype`, and where gradients computed in it are added up (`flush_grads`); all
        parameters are cast together, once after each change."""
        copy = None if dtype == torch.float32 else self.flat.cast(dtype)
        if dtype not in self._views:
            values, grads = (
                (self.flat.data.detach(), self.flat.grads) if copy is None else (copy.values, copy.grads)
            )
            self._views[dtype] = self._slice(values), self._slice(grads)
        return self._views[dtype]

    def _slice(self, flat: torch.Tensor) -> Factors:
        down = flat[self.down : self.down + self.rank * self.in_features]
        up = flat[self.up : self.up + self.out_features * self.rank]
        return Factors(down.view(self.rank, self.in_features), up.view(self.out_features, self.rank))


class _CastCopy:
    """The parameters in half precision, and the gradients that were computed in it; `stale` where the
    parameters may have changed since they were cast."""

    def __init__(self, values: torch.Tensor, dtype: torch.dtype) -> None:
        self.values = torch.empty_like(values, dtype=dtype)
        self.grads = torch.zeros_like(self.values)
        self.stale = True
