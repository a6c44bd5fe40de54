"""Checks the tensors of one layer of a file, of any format, and makes `LayerWeights` of them."""

import math
import re

import numpy as np
import torch

from lora_core.errors import AdapterFileError
from lora_core.lora.weights import AdapterWeights, LayerWeights

Tensors = dict[str, torch.Tensor]


def layer_from_tensors(name: str, tensors: Tensors) -> LayerWeights:
    """The `LayerWeights` in the tensors of one layer.

    Args:
        name: in the file, for errors.
        tensors: some of "down" (r, in, ...), "up" (out, r, ...), "mid" (r, r, k, k) and "alpha" (one
            element). Without alpha the scale is 1.

    Raises:
        AdapterFileError: half of a pair is missing, or shapes or values are impossible.
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
    alpha = read_alpha(stored)
    if not math.isfinite(alpha):
        raise AdapterFileError(f"{name!r} has the alpha {alpha}, which is not a finite number.")
    return alpha


def read_alpha(stored: torch.Tensor) -> float:
    """The value of an alpha tensor; from fp32 the shortest decimal that rounds to it, 0.3 for 0.300000012.

    So the alpha in a user's settings comes back as the same float, and a resumed run scales exactly as an
    uninterrupted one.
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
    """Whether all values are finite. The sum shows it in a fifth of the time, unless it overflows."""
    if tensor.dtype.itemsize == 1:
        # torch cannot compute with 8-bit floats.
        tensor = tensor.float()
    whole = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(whole.isfinite()) or bool(torch.isfinite(tensor).all())


def check_finite(weights: AdapterWeights) -> None:
    """Refuse NaN and infinity, which would turn every image black.

    Raises:
        AdapterFileError: names the first layer with such a value, and how many there are.
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


def check_lycoris_factors(name: str, roles: Tensors) -> None:
    """Refuse a LoHa or a LoKr that lacks a tensor.

    Args:
        name: of the layer, for errors.
        roles: its tensors by LyCORIS' names, such as "hada_w1_a" or "lokr_w2".

    Raises:
        AdapterFileError: a factor is missing, empty or of an integer dtype.
    """
    if any(role.startswith("hada") for role in roles):
        needed = {f"hada_w{n}_{half}" for n in "12" for half in "ab"}
        needed |= {"hada_t1", "hada_t2"} if roles.keys() & {"hada_t1", "hada_t2"} else set()
    else:
        needed = set()
        for n in "12":
            needed |= {f"lokr_w{n}"} if f"lokr_w{n}" in roles else {f"lokr_w{n}_a", f"lokr_w{n}_b"}
    missing = sorted(needed - roles.keys())
    if missing:
        raise AdapterFileError(f"{name!r} lacks {', '.join(missing)}.")
    if any(not t.is_floating_point() or t.numel() == 0 for t in roles.values()):
        raise AdapterFileError(f"{name!r} holds tensors that are empty or of whole numbers.")


MAGNITUDE = re.compile(r"(.+)\.(?:dora_scale|lora_magnitude_vector)(?:\.default)?(?:\.weight)?")
"""The name of a tensor of DoRA magnitudes; the first group is the layer's."""


def magnitude_from_tensor(name: str, stored: torch.Tensor) -> torch.Tensor:
    """A layer's DoRA magnitudes, (out, 1) where rows are normed, (1, in) where columns are.

    In kohya's files the shape tells which; PEFT always has one for each row.

    Args:
        name: of the layer in the file.
        stored: the tensor in the file.

    Raises:
        AdapterFileError: the shape is impossible, or a value is not finite.
    """
    if stored.numel() == 0 or stored.numel() != max(stored.shape, default=0):
        raise AdapterFileError(f"{name!r} has DoRA magnitudes of the impossible shape {list(stored.shape)}.")
    if not is_finite(stored):
        raise AdapterFileError(f"{name!r} holds numbers that are not finite (NaN or infinity).")
    columns = "." not in name and stored.dim() > 1 and stored.shape[0] == 1
    return stored.reshape(1, -1) if columns else stored.reshape(-1, 1)


def dora_update(
    weight: torch.Tensor, product: torch.Tensor, magnitude: torch.Tensor, norm: str = ""
) -> torch.Tensor:
    """m (W0 + update) / |V| - W0 in fp32, Liu et al. 2024, equation 5.

    Args:
        weight: W0, (out, in) or (out, in, k, k).
        product: the update before magnitudes, with as many elements.
        magnitude: m, (out, 1) or (1, in).
        norm: what |V| is: "rows" or "columns" of W0 + update, or "base rows", those of W0 alone; "" for
            the axis of the magnitudes.
    """
    merged = weight + product.reshape(weight.shape)
    norm = norm or ("rows" if magnitude.shape[1] == 1 else "columns")
    normed = (weight if norm == "base rows" else merged).reshape(*weight.shape[:2], -1)
    lengths = normed.norm(dim=(0, 2) if norm == "columns" else (1, 2)).reshape(
        (1, -1) if norm == "columns" else (-1, 1)
    )
    factor = magnitude.float() / lengths.clamp_min(torch.finfo(torch.float32).tiny)
    return merged * factor.reshape(*factor.shape, *(1,) * (weight.dim() - 2)) - weight


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
