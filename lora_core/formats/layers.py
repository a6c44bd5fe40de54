"""From the loose tensors of one layer, as any format names them, to checked `LayerWeights`."""

import math

import numpy as np
import torch

from lora_core.adapters.weights import AdapterWeights, LayerWeights
from lora_core.spec.errors import AdapterFileError

Tensors = dict[str, torch.Tensor]


def checked_layer(name: str, tensors: Tensors) -> LayerWeights:
    """The layer that a file calls `name`.

    Args:
        name: as the file has it, for error sentences.
        tensors: some of "down" (r, in, ...), "up" (out, r, ...), "mid" (r, r, k, k) and "alpha" (one number).
            Without alpha the scale is 1.

    Raises:
        AdapterFileError: half of a pair is missing, or shapes or numbers are impossible.
    """
    for role, other in (("down", "up"), ("up", "down")):
        if role not in tensors:
            found = other if other in tensors else next(iter(tensors))
            raise AdapterFileError(f"{name!r} has the {found} half of its weights, but not the {role} half.")
    down, up = tensors["down"], tensors["up"]
    if not (down.is_floating_point() and up.is_floating_point()):
        raise AdapterFileError(
            f"{name!r} holds {down.dtype} weights; only floating-point weights can be used."
        )
    if down.dtype.itemsize == 1 or up.dtype.itemsize == 1:
        # 8-bit floats are for storage only; torch cannot compute with them.
        down, up = down.float(), up.float()
    if "mid" in tensors:
        down = _without_mid(name, down, tensors["mid"])
    _check_shapes(name, down, up)
    return LayerWeights(down, up, _alpha(name, tensors.get("alpha"), down.shape[0]))


def _check_shapes(name: str, down: torch.Tensor, up: torch.Tensor) -> None:
    shapes = f"down {list(down.shape)} and up {list(up.shape)}"
    if down.ndim not in (2, 4) or up.ndim != down.ndim or 0 in (*down.shape, *up.shape):
        raise AdapterFileError(f"{name!r} has the shapes {shapes}, which no linear layer or convolution has.")
    if up.shape[1] != down.shape[0]:
        raise AdapterFileError(f"{name!r} has the shapes {shapes}, whose ranks differ.")
    if tuple(up.shape[2:]) not in ((), (1, 1)):
        raise AdapterFileError(
            f"{name!r} has the shapes {shapes}; the up half of a convolution must be 1 x 1."
        )


def _alpha(name: str, stored: torch.Tensor | None, rank: int) -> float:
    if stored is None:
        return float(rank)
    if stored.numel() != 1:
        raise AdapterFileError(f"{name!r} has an alpha of shape {list(stored.shape)}; it must be one number.")
    alpha = alpha_number(stored)
    if not math.isfinite(alpha):
        raise AdapterFileError(f"{name!r} has the alpha {alpha}, which is not a finite number.")
    return alpha


def alpha_number(stored: torch.Tensor) -> float:
    """The number in an alpha tensor; from fp32 the shortest decimal that rounds to it, 0.3 for 0.300000012.

    So an alpha that a person wrote comes back as the same number, and a resumed run scales just as an
    unbroken one.
    """
    number = float(stored.reshape(()))
    return float(str(np.float32(number))) if stored.dtype == torch.float32 else number


def _without_mid(name: str, down: torch.Tensor, mid: torch.Tensor) -> torch.Tensor:
    """Tucker form, mid (r, r, k, k) and down (r, in, 1, 1), as a plain pair: both become one down.

    The update is sum_pq up[o, p] mid[p, q] down[q, i], so p can stay as the rank. Source: LyCORIS, Yeh et al.
    2023.
    """
    rank = down.shape[0]
    if mid.ndim != 4 or down.ndim != 4 or tuple(mid.shape[:2]) != (rank, rank) or down.shape[2:] != (1, 1):
        raise AdapterFileError(
            f"{name!r} has the shapes down {list(down.shape)} and mid {list(mid.shape)}, which do not fit"
            " together."
        )
    return torch.einsum("pqkl,qi->pikl", mid.float(), down.float().flatten(1))


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers are finite. The sum tells in a fifth of the time, unless it overflows."""
    whole = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(whole.isfinite()) or bool(torch.isfinite(tensor).all())


def check_finite(weights: AdapterWeights) -> None:
    """Refuse NaN and infinity, which would turn every picture black.

    Raises:
        AdapterFileError: names the first layer with such a number, and how many there are.
    """
    bad = [
        f"{part}.{path}"
        for (part, path), layer in weights.layers.items()
        if not (is_finite(layer.down) and is_finite(layer.up) and math.isfinite(layer.alpha))
    ]
    if bad:
        raise AdapterFileError(
            f"{len(bad)} of {len(weights.layers)} layers hold numbers that are not finite (NaN or infinity),"
            f" the first is {bad[0]}; the adapter is broken."
        )


def check_plain(weights: AdapterWeights) -> None:
    """Refuse what cannot be written as a plain LoRA.

    Raises:
        AdapterFileError: there is no layer, or one has DoRA magnitudes.
    """
    if not weights.layers:
        raise AdapterFileError("The adapter has no layer, so there is nothing to write.")
    dora = [f"{part}.{path}" for (part, path), layer in weights.layers.items() if layer.magnitude is not None]
    if dora:
        raise AdapterFileError(
            f"{dora[0]} has DoRA magnitudes, which tools read in different ways; only a plain LoRA can be"
            " written."
        )
