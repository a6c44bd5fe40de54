"""What the layers of any adapter file do to a base's weights: LoRA, LoCon, LoHa, LoKr, and DoRA on top of
each.

With s = alpha / rank, the update of a weight W0 is

    LoRA   s up @ down                                                      Hu et al. 2021, section 4.1
    LoHa   s (w1a @ w1b) * (w2a @ w2b), multiplied element by element       Yeh et al. 2023, section 4.1
    LoKr   s kron(w1, w2), each of which may be a product itself            the same
    DoRA   m (W0 + update) / |W0 + update| - W0, norms of rows or columns   Liu et al. 2024, equation 5
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lora_core.errors import AdapterFileError
from lora_core.formats import detect, kohya, peft
from lora_core.formats.io import CONVERTIBLE, check_family, load_adapter, read_tensors
from lora_core.formats.layer_shapes import kernel_of, reshape_adapter
from lora_core.formats.layers import (
    MAGNITUDE,
    Tensors,
    check_finite,
    check_lycoris_factors,
    dora_update,
    magnitude_from_tensor,
    read_alpha,
)
from lora_core.formats.names import layer_of_prefix
from lora_core.lora.weights import LayerKey, LayerWeights
from lora_core.model_files.families import Family
from lora_core.model_files.header import Header, read_header

_ODD = re.compile(r"(.+)\.(hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))")
_LARGEST = 2**25
"""Numbers in a weight. The largest of Stable Diffusion XL has 29.5 million; a broken file can claim any."""


@dataclass(frozen=True)
class Update:
    """What a file does to the weight of one layer.

    Attributes:
        name: of the layer, for error sentences.
        low: the two factors of a LoRA; None for other kinds.
        roles: the tensors of a LoHa or a LoKr, by LyCORIS' names.
        scale: alpha / rank of a LoHa or a LoKr.
        kernel: (height, width) into which a flattened convolution is unfolded; () for a linear layer.
        magnitude: of a DoRA: (out, 1) where rows are normed, (1, in) where columns are.
    """

    name: str
    low: LayerWeights | None = None
    roles: Mapping[str, torch.Tensor] | None = None
    scale: float = 1.0
    kernel: tuple[int, ...] = ()
    magnitude: torch.Tensor | None = None

    @property
    def size(self) -> tuple[int, ...]:
        """The shape of the update, (out, in) or (out, in, k, k), found without computing it."""
        if self.low is not None:
            return (self.low.up.shape[0], *self.low.down.shape[1:])
        assert self.roles is not None
        shapes = {role: tensor.to("meta") for role, tensor in self.roles.items()}
        return tuple(replace(self, roles=shapes).product().shape)

    def product(self) -> torch.Tensor:
        """The update before magnitudes, in fp32."""
        if self.low is not None:
            return self.low.delta()
        assert self.roles is not None
        tensors = {role: tensor.float() for role, tensor in self.roles.items()}
        dense = self.scale * (_loha(tensors) if "hada_w1_a" in tensors else _lokr(tensors))
        if dense.dim() == 2 and self.kernel:
            return dense.reshape(dense.shape[0], -1, *self.kernel)
        return dense.flatten(1) if dense.shape[2:] == (1, 1) and not self.kernel else dense

    def factors(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(up, down) whose product is the update before magnitudes, where that has far fewer columns than it.

        A product element by element of two products is a product of all columns' pairs; so is a Kronecker
        product.
        """
        if self.low is not None:
            return self.low.scale * self.low.up.double(), self.low.down
        assert self.roles is not None
        pair = _paired({role: tensor.float() for role, tensor in self.roles.items()})
        if pair is None or 2 * pair[1].shape[0] > min(pair[0].shape[0], pair[1].shape[1]):
            return None
        up, down = self.scale * pair[0].double(), pair[1].reshape(pair[1].shape[0], *self.size[1:])
        return up.reshape(*up.shape, *(1 for _ in self.size[2:])), down

    def delta(self, weight: torch.Tensor | None) -> torch.Tensor:
        """The whole update at strength 1, in fp32.

        Args:
            weight: the frozen weight in fp32; only a DoRA needs it.

        Raises:
            AdapterFileError: the weight has another shape.
        """
        product = self.product()
        if self.magnitude is None:
            return product
        assert weight is not None
        if weight.numel() != product.numel() or weight.shape[0] != product.shape[0]:
            raise AdapterFileError(
                f"{self.name} has the shape {list(product.shape)} in the file and {list(weight.shape)} in the"
                " base; the file is for another base."
            )
        rows = self.magnitude.shape[1] == 1
        if self.magnitude.numel() != weight.shape[0 if rows else 1]:
            raise AdapterFileError(
                f"{self.name} has {self.magnitude.numel()} DoRA magnitudes for"
                f" {weight.shape[0 if rows else 1]} {'rows' if rows else 'columns'} of the base's layer."
            )
        return dora_update(weight, product, self.magnitude)


def _loha(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    halves = []
    for n in "12":
        a, b, core = tensors[f"hada_w{n}_a"], tensors[f"hada_w{n}_b"], tensors.get(f"hada_t{n}")
        # In the Tucker form the first factor lies the other way round.
        halves.append(a @ b if core is None else torch.einsum("ijkl,jr,ip->prkl", core, b, a))
    return halves[0] * halves[1]


def _lokr(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    first, second = (
        tensors[f"lokr_w{n}"] if f"lokr_w{n}" in tensors else _lokr_half(tensors, n) for n in "12"
    )
    return torch.kron(first.reshape(*first.shape, *(1,) * (second.dim() - 2)), second)


def _lokr_half(tensors: Mapping[str, torch.Tensor], n: str) -> torch.Tensor:
    a, b = tensors[f"lokr_w{n}_a"], tensors[f"lokr_w{n}_b"]
    if n == "2" and "lokr_t2" in tensors:
        return torch.einsum("ijkl,ip,jr->prkl", tensors["lokr_t2"], a, b).contiguous()
    return a @ b.flatten(1)


def _paired(tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A LoHa or a LoKr as a product of two matrices, or None where it is not one of two products."""
    if "hada_t1" in tensors or "lokr_t2" in tensors:
        return None
    if "hada_w1_a" in tensors:
        a, b, c, d = (tensors[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
        up = a[:, :, None] * c[:, None, :]
        return up.flatten(1), (b[:, None, :] * d[None, :, :]).flatten(0, 1)
    if "lokr_w2" in tensors:
        return None
    if "lokr_w1" in tensors:
        first = tensors["lokr_w1"], torch.eye(tensors["lokr_w1"].shape[1])
    else:
        first = tensors["lokr_w1_a"], tensors["lokr_w1_b"]
    second = tensors["lokr_w2_a"], tensors["lokr_w2_b"].flatten(1)
    return torch.kron(first[0], second[0]), torch.kron(first[1], second[1])


Updates = dict[LayerKey, Update]


def file_updates(path: Path, known: Family | None = None) -> tuple[Updates, dict[str, str], Family]:
    """The updates in an adapter file of any of these kinds, its header's texts, and the family it is for.

    Args:
        path: a .safetensors file.
        known: of the base that it is used with, if there is one.

    Raises:
        AdapterFileError: one sentence on what is wrong with the file, or that it is for another family.
    """
    header = read_header(path)
    if detect.detect_kind(header.shapes) in CONVERTIBLE:
        check_family(path, header)
    family = known or detect.detect_family(header.shapes, header.metadata)
    if detect.detect_kind(header.shapes) not in CONVERTIBLE:
        weights = load_adapter(path, known)
        if family is None:
            raise AdapterFileError(_no_family(path, header))
        layers = reshape_adapter(weights, family).layers
        return {key: Update(".".join(key), layer) for key, layer in layers.items()}, weights.metadata, family
    if family is None:
        raise AdapterFileError(_no_family(path, header))
    other = detect.mismatch(header.shapes, header.metadata, known) if known else ""
    if other:
        raise AdapterFileError(f"{path} is for {other}, the base is the {family.title}.")
    tensors, metadata = read_tensors(path)
    try:
        return _odd_updates(tensors, metadata, family), metadata, family
    except AdapterFileError as error:
        raise AdapterFileError(f"{path} cannot be used. {error}") from error


def _no_family(path: Path, header: Header) -> str:
    name = detect.detect_family_name(header.shapes, header.metadata)
    if name != "unknown":
        return f"{path} is for {name}, which cannot be used here."
    return f"Nothing in {path} says which family of base it is for; name its base with --base."


def _odd_updates(tensors: Tensors, metadata: Mapping[str, str], family: Family) -> Updates:
    for name in detect.extra_keys(tensors):
        del tensors[name]
    magnitudes = {match[1]: tensors.pop(key) for key in list(tensors) if (match := MAGNITUDE.fullmatch(key))}
    roles: dict[str, Tensors] = {}
    for key in list(tensors):
        if match := _ODD.fullmatch(key):
            roles.setdefault(match[1], {})[match[2]] = tensors.pop(key)
    updates = {
        _layer(name, family): _odd_update(name, found, tensors.pop(f"{name}.alpha", None), family)
        for name, found in roles.items()
    }
    if tensors:
        translator = kohya if kohya.matches(tensors) else peft
        plain = translator.from_tensors(tensors, metadata)
        check_finite(plain)
        for layer, low in reshape_adapter(plain, family).layers.items():
            updates[layer] = Update(".".join(layer), low)
    for name, magnitude in magnitudes.items():
        layer = _layer(name, family)
        if layer not in updates:
            raise AdapterFileError(f"{name!r} has DoRA magnitudes, but no update.")
        updates[layer] = replace(updates[layer], magnitude=magnitude_from_tensor(name, magnitude))
    return updates


def _layer(name: str, family: Family) -> LayerKey:
    """The layer that a module's name in a file means."""
    return layer_of_prefix(name, family) if "." not in name else peft.parse_key(f"{name}.alpha", family)[0]


def _odd_update(name: str, roles: Tensors, alpha: torch.Tensor | None, family: Family) -> Update:
    if alpha is None and "." in name:
        raise AdapterFileError(
            f"{name!r} is a LoHa or a LoKr under PEFT's names, where the strength is in no file; convert it"
            " with PEFT first."
        )
    check_lycoris_factors(name, roles)
    inner = next((roles[key] for key in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b") if key in roles), None)
    # Without a rank, as in a LoKr of two whole matrices, alpha means nothing.
    scale = 1.0
    if alpha is not None and inner is not None:
        if alpha.numel() != 1:
            raise AdapterFileError(
                f"{name!r} has an alpha of shape {list(alpha.shape)}; it must be one number."
            )
        scale = read_alpha(alpha) / inner.shape[0]
    layer = _layer(name, family)
    update = Update(".".join(layer), None, roles, scale, kernel_of(layer, family) or ())
    numbers = torch.stack([tensor.float().abs().max() for tensor in roles.values()])
    if not torch.isfinite(numbers).all() or abs(scale) == float("inf") or scale != scale:
        raise AdapterFileError(f"{name!r} holds numbers that are not finite (NaN or infinity).")
    try:
        size = update.size
    except RuntimeError as error:
        shapes = ", ".join(f"{role} {list(tensor.shape)}" for role, tensor in roles.items())
        raise AdapterFileError(f"{name!r} has shapes that do not fit together: {shapes}.") from error
    if len(size) not in (2, 4) or torch.Size(size).numel() > _LARGEST:
        raise AdapterFileError(
            f"{name!r} claims a weight of the shape {list(size)}, which no layer here has."
        )
    return update
