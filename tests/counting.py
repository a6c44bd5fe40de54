"""What a piece of torch work costs, in ways that do not depend on the load of the machine: operations that
launch a kernel, and bytes that autograd keeps for the backward pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

FREE = {
    "alias", "as_strided", "chunk", "detach", "empty", "empty_like", "empty_strided", "expand", "lift_fresh",
    "narrow", "new_empty", "new_empty_strided", "permute", "select", "slice", "split", "split_with_sizes",
    "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_unsafe_view", "_reshape_alias",
    "_local_scalar_dense", "is_same_size", "sym_size", "set_", "resize_",
}  # fmt: skip
"""Operations that move no numbers."""


class Counted(TorchDispatchMode):
    """Counts operations while it is active: all, and those that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.all = 0
        self.launched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.all += 1
        self.launched += func.overloadpacket.__name__ not in FREE
        return func(*args, **(kwargs or {}))


def launches(work: Callable[[], object]) -> int:
    """How many operations of `work` launch a kernel, at the second time that it is done."""
    work()
    with Counted() as counted:
        work()
    return counted.launched


def kept_bytes(forward: Callable[[], object], ignored: set[int]) -> int:
    """Bytes that autograd keeps of a forward pass: each storage once, those at addresses `ignored` not."""
    kept: dict[int, int] = {}
    holding: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored:
            kept[storage.data_ptr()] = storage.nbytes()
            holding.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(kept.values())
