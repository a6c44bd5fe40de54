"""The layers of a family's models: their names in adapter files, and the tensors of one layer.

In kohya's key prefixes underscores replace dots, and since they are part of the names too, a prefix cannot be
split at them. So each layer of a family is a row of a table with `#` for each number: a name's numbers are
replaced, the row is looked up, and the numbers are put back. The original (ldm) block names, which some
families have in kohya files (`Family.kohya_block_names`), are another table.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch

from lora_core.errors import AdapterFileError
from lora_core.lora.weights import AdapterWeights, LayerKey, LayerWeights
from lora_core.model_files.detect import Layout, family_layout
from lora_core.model_files.families import FAMILIES, Family, is_text_encoder
from lora_core.model_files.header import other_family
from lora_core.model_files.ldm_names import NAMES, diffusers_unet_path, ldm_unet_path

Tensors = dict[str, torch.Tensor]


def kernel_of(layer: LayerKey, family: Family) -> tuple[int, ...] | None:
    """(height, width) of a layer's kernel, () for a linear layer, None for a layer that the family lacks."""
    shape = family_layout(family).get(layer)
    return None if shape is None else tuple(shape[2:])


def reshape_adapter(weights: AdapterWeights, family: Family) -> AdapterWeights:
    """The same update, 1 x 1 convolutions and linear layers each as the family has them.

    Some tools write one as the other, which means the same and which others refuse.
    """
    layers = {}
    for key, layer in weights.layers.items():
        kernel, down, up = kernel_of(key, family), layer.down, layer.up
        if down.dim() == 2 and kernel == (1, 1):
            layer = replace(layer, down=down[..., None, None], up=up[..., None, None])
        elif down.dim() == 4 and kernel == () and down.shape[2:] == (1, 1):
            layer = replace(layer, down=down.flatten(1), up=up.flatten(1))
        layers[key] = layer
    return replace(weights, layers=layers)


def norm_layers(layout: Layout) -> list[LayerKey]:
    """The norm layers of the models with these layers."""
    found = [(part, "conv_norm_out") for part, path in layout if path == "conv_out"]
    for part, path in layout:
        for end, norm in NAMES["norms"].items():
            if path.endswith(end):
                found.append((part, path.removesuffix(end) + norm))
    encoders = dict.fromkeys(part for part, _ in layout if is_text_encoder(part))
    return [*found, *((part, "text_model.final_layer_norm") for part in encoders)]


# Names.

_NUMBER = re.compile(r"(?<=[._])\d+(?=[._]|$)")
_PREFIX = re.compile(r"(lora_unet|lora_te1|lora_te2|lora_te|lycoris)_(.+)")


@lru_cache(maxsize=3)
def _rows(kind: str) -> dict[str, str]:
    """Names with underscores to names with dots: of "text" encoders, of the "unet", or its "ldm" ones."""
    rows = {}
    for family in FAMILIES.values():
        for part, path in family_layout(family):
            named: str | None = path
            if kind == "ldm" and not is_text_encoder(part):
                named = ldm_unet_path(path, family.attention_levels)
            if named is not None and is_text_encoder(part) == (kind == "text"):
                row = _NUMBER.sub("#", named)
                rows[row.replace(".", "_")] = row
    return rows


def _kind(part: str) -> str:
    return "text" if is_text_encoder(part) else "unet"


def with_text_model(path: str) -> str:
    """A text encoder's path with the `text_model.` level, which newer transformers dropped from some."""
    return f"text_model.{path}" if path.startswith(("encoder.", "embeddings.")) else path


def is_layer(part: str, path: str) -> bool:
    """Whether `path` can be an adaptable layer of `part`."""
    row = _NUMBER.sub("#", path)
    return _rows(_kind(part)).get(row.replace(".", "_")) == row


def ldm_family() -> Family:
    """The family whose kohya files have the original block names, for files that do not say their family."""
    return next(family for family in FAMILIES.values() if family.kohya_block_names == "ldm")


def layer_of_prefix(prefix: str, family: Family | None = None) -> LayerKey:
    """(part, dotted path) of a kohya key prefix, with diffusers' block names or the original ones.

    Args:
        prefix: of a key, up to its first dot.
        family: whose blocks the original names count; None for the family that has them in its files.

    Raises:
        AdapterFileError: it names no layer of a UNet or a CLIP text encoder.
    """
    match = _PREFIX.fullmatch(prefix)
    if match is None:
        raise _unknown_layer(prefix)
    part, name = NAMES["kohya_parts"][match[1]], match[2]
    if is_text_encoder(part) and name.startswith("encoder_layers_"):
        name = f"text_model_{name}"
    path = _dotted(name, _kind(part))
    if path is None and not is_text_encoder(part):
        path = _from_ldm(_dotted(name, "ldm") or "", family)
    if path is None:
        raise _unknown_layer(prefix)
    return part, path


def _dotted(name: str, kind: str) -> str | None:
    """The dotted path of an underscored name, or None if the table `kind` lacks it."""
    row = _rows(kind).get(_NUMBER.sub("#", name))
    numbers = iter(_NUMBER.findall(name))
    return None if row is None else re.sub("#", lambda _: next(numbers), row)


def _from_ldm(path: str, family: Family | None) -> str | None:
    """A UNet layer's path in diffusers, from its original one, or None; `family` as in `layer_of_prefix`."""
    found = diffusers_unet_path(path, (family or ldm_family()).attention_levels)
    return found if found is not None and is_layer("unet", found) else None


def _unknown_layer(name: str) -> AdapterFileError:
    other = other_family({f"{name}.": ()})
    if other:
        return AdapterFileError(
            f"The file holds {name!r}, a layer of {other}, which is not a family that can be used here."
        )
    return AdapterFileError(f"The file holds {name!r}, which names no layer of a UNet or a text encoder.")


def prefix_of_layer(part: str, path: str, family: Family) -> str:
    """The kohya key prefix of a layer.

    Raises:
        AdapterFileError: the family lacks the part, or the layer has no such name.
    """
    prefixes = {family.denoiser: "lora_unet"} | {e.part: e.kohya_prefix for e in family.text_encoders}
    if part not in prefixes:
        raise AdapterFileError(f"{family.title} has no part {part!r}; it has {', '.join(family.parts)}.")
    named: str | None = path if is_layer(part, path) else None
    if not is_text_encoder(part) and named and family.kohya_block_names == "ldm":
        named = ldm_unet_path(path, family.attention_levels)
    if named is None:
        raise AdapterFileError(f"The layer {part}.{path} has no name in the kohya format.")
    return f"{prefixes[part]}_{named.replace('.', '_')}"


_DOTTED = re.compile(
    r"(?:base_model\.model\.)?"
    r"(?:(unet|text_encoder_2|text_encoder|diffusion_model|text_encoders\.clip_[lgh]\.transformer)\.)?"
    r"(?:base_model\.model\.)?"
)


def layer_of_module(module: str, family: Family | None = None) -> LayerKey:
    """The layer of a module's name in a file of any format; arguments and errors of `layer_of_prefix`."""
    if is_kohya_key(f"{module}."):
        return layer_of_prefix(module, family)
    prefix = _DOTTED.match(module)
    assert prefix is not None
    path = module[prefix.end() :].replace(".processor.", ".")
    # Files of one part alone carry no prefix; only text encoders have numbered encoder layers.
    part = prefix[1] or ("text_encoder" if "encoder.layers." in path else "unet")
    part = NAMES["comfyui_parts"].get(part, part)
    parent, _, leaf = path.rpartition(".")
    path = f"{parent}.{NAMES[f'older_{_kind(part)}'].get(leaf, leaf)}" if parent else path
    path = with_text_model(path) if is_text_encoder(part) else _from_ldm(path, family) or path
    if not is_layer(part, path):
        raise _unknown_layer(module)
    return part, path


def is_kohya_key(key: str) -> bool:
    """Whether a tensor's name is of the kohya format."""
    return key.startswith(tuple(f"{prefix}_" for prefix in NAMES["kohya_parts"])) and "." in key


_LEAF = re.compile(
    r"\.(?:(?:processor\.)?(?:(?P<old>to_q|to_k|to_v|to_out)_lora|lora|lora_linear_layer)"
    r"\.(?P<half>down|up)\.weight"
    r"|lora_(?P<role>A|B|down|up|mid)(?:\.default)?\.weight"
    r"|(?P<own>alpha|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|oft_blocks)"
    r"|(?P<magnitude>dora_scale|lora_magnitude_vector)(?:\.default)?(?:\.weight)?)$"
)
_ROLES = {"A": "down", "B": "up"}
PAIR_ROLES = ("down", "up", "mid", "alpha")
LYCORIS_ROLES = ("hada_", "lokr_", "oft_")
"""How the roles of the kinds beside LoRA begin."""


def split_key(key: str) -> tuple[str, str]:
    """The module in a tensor's name, and its role there: "down", "up", "mid", "alpha", "magnitude", or a
    factor of LyCORIS such as "hada_w1_a"; "" for any other."""
    leaf = _LEAF.search(key)
    if leaf is None:
        return key.rpartition(".")[0] or key, ""
    role = (
        "magnitude"
        if leaf["magnitude"]
        else leaf["half"] or leaf["own"] or _ROLES.get(leaf["role"], leaf["role"])
    )
    return key[: leaf.end("old") if leaf["old"] else leaf.start()], role


def tensors_by_layer(
    tensors: Mapping[str, torch.Tensor], family: Family | None
) -> dict[LayerKey, tuple[str, Tensors]]:
    """For each layer its name in the file, and its tensors by role; `family` as in `layer_of_prefix`.

    Raises:
        AdapterFileError: a name is of no layer or has no role, or two tensors have the same.
    """
    found: dict[LayerKey, tuple[str, Tensors]] = {}
    for key, tensor in tensors.items():
        module, role = split_key(key)
        if not role:
            raise AdapterFileError(
                f"The file holds {key!r}, which belongs to no plain LoRA, LoHa, LoKr or OFT of LyCORIS."
            )
        layer = layer_of_module(module, family)
        roles = found.setdefault(layer, (module, {}))[1]
        if role in roles:
            raise AdapterFileError(
                f"The file holds the {role} half of {'.'.join(layer)} twice, the second time as {key!r}."
            )
        roles[role] = tensor
    return found


def first_few(names: Iterable[str], most: int = 3) -> str:
    """The first names, quoted for a sentence: 'a', 'b', 'c' and 5 more."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(repr(name) for name in listed[:most]) + more


# The tensors of one layer.


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
    layers = weights.every_layer()
    bad = [
        ".".join(key) for key, layer in layers.items() if not all(map(is_finite, layer.tensors().values()))
    ]
    for tokens in weights.tokens.values():
        bad += [f"the new token {token}" for token, rows in tokens.items() if not is_finite(rows)]
    if bad:
        raise AdapterFileError(
            f"{len(bad)} of {len(layers)} layers hold numbers that are not finite (NaN or infinity),"
            f" the first is {bad[0]}; the adapter is broken."
        )


def check_plain(weights: AdapterWeights) -> None:
    """Refuse what is not a plain LoRA.

    Raises:
        AdapterFileError: it has no layer, or one of another kind.
    """
    if not weights.every_layer():
        raise AdapterFileError("The adapter has no layer, so there is nothing to write.")
    if weights.others:
        raise AdapterFileError(
            f"{'.'.join(next(iter(weights.others)))} is a LoHa, a LoKr, an OFT or a DoRA, and this takes a"
            " plain LoRA alone; merge it into one with --rank, or keep to the kohya format."
        )
