"""Storage: all trained numbers of an adapter in one tensor, and all their gradients in another.

Optimizer, clipping, averaging and the check for numbers that are not finite are then one operation each
instead of one for each factor. Layers see views, so that nothing else has to know.

A base in half precision computes with a rounded copy. Writes through `.data`, aliases and kernels of other
packages leave no trace in a tensor, so the copy is made anew after every `writing` and at each `clear`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass(frozen=True)
class Factors:
    """A layer's factors, or their gradients, as matrices: `down` (r, in) and `up` (out, r)."""

    down: torch.Tensor
    up: torch.Tensor


class AdapterLayer(nn.Module):
    """A layer with trained factors, `down` and `up`; `place` is where they lie once a storage holds them."""

    down: nn.Parameter
    up: nn.Parameter
    place: "Place | None" = None

    def mark_changed(self) -> None:
        """Declare that the factors were written to."""
        if self.place is not None:
            self.place.storage.mark_changed()


class FlatParams:
    """The numbers of an adapter and their gradients, group after group.

    Attributes:
        whole: (N,), fp32; its `grad` is never None.
        groups: one trained tensor for each group, a view of `whole`; its `grad` is a view of that of `whole`.
            Where factors are kept apart, two: the group's down factors, then its up factors.
        kinds: names of the factors that each of a group's tensors holds.
    """

    def __init__(self, groups: Sequence[Sequence[AdapterLayer]], apart: bool = False) -> None:
        """Move the factors of `groups` of layers here, bit for bit; other layers stay as they are."""
        factors = [factor for group in groups for layer in group for factor in (layer.down, layer.up)]
        self.whole = nn.Parameter(torch.empty(sum(map(torch.numel, factors)), device=factors[0].device))
        self.grads = self.whole.grad = torch.zeros_like(self.whole)
        self.groups: list[nn.Parameter] = []
        self.kinds = (("down",), ("up",)) if apart else (("down", "up"),)
        self._rounded: dict[torch.dtype, _CastCopy] = {}
        self._homes: dict[int, tuple[int, torch.Tensor]] = {}
        end = 0
        for group in groups:
            starts: dict[tuple[int, str], int] = {}
            for names in self.kinds:
                start = end
                for number, layer in enumerate(group):
                    for name in names:
                        starts[number, name] = end
                        end = self._move(layer, name, end)
                self.groups.append(self._part(start, end))
            for number, layer in enumerate(group):
                sizes = len(layer.down), layer.down[0].numel(), layer.up.shape[0]
                layer.place = ParamView(self, starts[number, "down"], starts[number, "up"], *sizes)

    def mark_changed(self) -> None:
        """Declare that the numbers were written to: the next use of a rounded copy rounds anew."""
        for rounded in self._rounded.values():
            rounded.stale = True

    @contextmanager
    def writing(self) -> Iterator[torch.Tensor]:
        """`whole` without autograd, to be written to by any means while the context is open."""
        try:
            yield self.whole.detach()
        finally:
            self.mark_changed()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Have an optimizer of `groups`, or of the layers' factors, take its step, however it writes.

        Some write through `.data` or with kernels of their own, some put a new tensor into `.data`: that is
        copied back to where the layers read.
        """
        with self.writing():
            optimizer.step()
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    pointer, home = self._homes[id(parameter)]
                    if parameter.data_ptr() != pointer:
                        home.copy_(parameter.detach())
                        parameter.data = home

    def clear(self) -> None:
        """Set all gradients to zero, as a step begins; the numbers are rounded anew for it."""
        self.mark_changed()
        for grads in (self.grads, *(rounded.grads for rounded in self._rounded.values())):
            grads.zero_()

    def gather(self) -> None:
        """Add the gradients that were computed in shorter formats to those in fp32."""
        for rounded in self._rounded.values():
            self.grads.add_(rounded.grads)
            rounded.grads.zero_()

    def rounded(self, dtype: torch.dtype) -> "_Rounded":
        """The numbers in another format than fp32, as they are now."""
        if dtype not in self._rounded:
            self._rounded[dtype] = _CastCopy(self.whole.detach(), dtype)
        rounded = self._rounded[dtype]
        if rounded.stale:
            rounded.values.copy_(self.whole.detach())
            rounded.stale = False
        return rounded

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
        part = nn.Parameter(self.whole.detach()[start:end].view(shape))
        self._homes[id(part)] = part.data_ptr(), part.detach()
        part.grad = self.grads[start:end].view(shape)
        return part


@dataclass
class ParamView:
    """Where a layer's factors lie in a storage: (rank, inside) from `down`, (outside, rank) from `up`.

    Views are made once for each number format: hundreds of them in each step took a tenth of a small one.
    """

    storage: FlatParams
    down: int
    up: int
    rank: int
    inside: int
    outside: int
    _views: dict[torch.dtype, tuple[Factors, Factors]] = field(default_factory=dict, repr=False)

    def factors(self, dtype: torch.dtype) -> Factors:
        """The factors in a number format; all numbers are rounded together, once after each change."""
        if dtype != torch.float32:
            self.storage.cast(dtype)
        return self._both(dtype)[0]

    def gradients(self, dtype: torch.dtype) -> Factors:
        """Where gradients that were computed in a number format are added up; see `Storage.gather`."""
        return self._both(dtype)[1]

    def _both(self, dtype: torch.dtype) -> tuple[Factors, Factors]:
        if dtype not in self._views:
            if dtype == torch.float32:
                numbers, gradients = self.storage.data.detach(), self.storage.grads
            else:
                rounded = self.storage.cast(dtype)
                numbers, gradients = rounded.values, rounded.grads
            self._views[dtype] = self._seen(numbers), self._seen(gradients)
        return self._views[dtype]

    def _seen(self, numbers: torch.Tensor) -> Factors:
        down = numbers[self.down : self.down + self.rank * self.inside]
        up = numbers[self.up : self.up + self.outside * self.rank]
        return Factors(down.view(self.rank, self.inside), up.view(self.outside, self.rank))


class _CastCopy:
    """The numbers in a shorter format, and the gradients that were computed in it; `stale` where the numbers
    may have changed since they were rounded."""

    def __init__(self, numbers: torch.Tensor, dtype: torch.dtype) -> None:
        self.values = torch.empty_like(numbers, dtype=dtype)
        self.grads = torch.zeros_like(self.values)
        self.stale = True
