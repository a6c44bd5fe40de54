"""The kohya format: `<prefix>.lora_down.weight`, `.lora_up.weight`, `.alpha`. All tools read it.

One alpha for the whole file, because diffusers 0.42 takes the most frequent alpha of a component for most
layers; where layers differ, `lora_up` is scaled instead. Ranks may differ.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

import torch

from lora_core.errors import AdapterFileError
from lora_core.formats.detect import detect_family, extra_keys
from lora_core.formats.layers import Tensors, check_plain, layer_from_tensors
from lora_core.formats.names import PREFIX_PARTS, first_few, layer_of_prefix, prefix_of_layer
from lora_core.lora.weights import AdapterWeights, LayerKey, LayerWeights
from lora_core.model_files.families import Family

ROLES = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "alpha": "alpha",
    # Some trainers put PEFT's suffixes after kohya's prefixes.
    "lora_A.weight": "down",
    "lora_B.weight": "up",
}
_STARTS = tuple(f"{prefix}_" for prefix in PREFIX_PARTS)


def matches(keys: Iterable[str]) -> bool:
    """Whether tensors with these names are of this format."""
    return any(key.startswith(_STARTS) and "." in key for key in keys)


def file_alpha(weights: AdapterWeights) -> float:
    """The alpha of a file for `weights`: the most frequent one, so that few layers have to be scaled.

    Zero is never taken, since kohya's own loader reads it as "alpha = rank".
    """
    counts = Counter(layer.alpha for layer in weights.layers.values() if layer.alpha != 0)
    if not counts:
        return float(next(iter(weights.layers.values())).rank)
    return counts.most_common(1)[0][0]


def to_tensors(weights: AdapterWeights, family: Family, keep_alphas: bool = False) -> Tensors:
    """The tensors of a file, by name.

    Args:
        weights: to write; dtypes are kept.
        family: whose names to use.
        keep_alphas: write each layer's own alpha, bit for bit; diffusers reads such a file at the wrong
        strength.

    Raises:
        AdapterFileError: a layer has no name in this format, or is no plain LoRA.
    """
    check_plain(weights)
    common = file_alpha(weights)
    tensors: Tensors = {}
    for (part, path), layer in weights.layers.items():
        prefix = prefix_of_layer(part, path, family)
        kept = layer.alpha == common or keep_alphas
        tensors[f"{prefix}.lora_down.weight"] = layer.down
        tensors[f"{prefix}.lora_up.weight"] = layer.up if kept else _up_for_alpha(layer, common)
        alpha = layer.alpha if kept else common
        tensors[f"{prefix}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    return tensors


def _up_for_alpha(layer: LayerWeights, alpha: float) -> torch.Tensor:
    """`up` such that the update stays the same under another alpha; one rounding, from double precision."""
    dtype = torch.promote_types(layer.up.dtype, torch.float32)
    return (layer.up.double() * (layer.alpha / alpha)).to(dtype)


def header(weights: AdapterWeights, family: Family) -> dict[str, str]:
    """The header entries that other tools need to treat the file correctly."""
    rank = Counter(layer.rank for layer in weights.layers.values()).most_common(1)[0][0]
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(file_alpha(weights)),
        "ss_base_model_version": family.base_version,
        "ss_v2": str(family.base_version.startswith("sd_v2")),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": family.modelspec,
    }


def from_tensors(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> AdapterWeights:
    """The adapter in a file's tensors; ranks and alphas may differ, and without alpha the scale is 1.

    An alpha of 0 means 0, as in all tools but kohya's: such a layer changes nothing. What
    `detect.extras_sentence` names is skipped.

    Raises:
        AdapterFileError: names a key that is unknown, incomplete, doubled or of an impossible shape.
    """
    extras = extra_keys(tensors)
    tensors = {key: tensor for key, tensor in tensors.items() if key not in extras}
    unknown = [key for key in tensors if key.partition(".")[2] not in ROLES]
    if unknown:
        raise AdapterFileError(
            f"The file holds tensors that belong to no plain LoRA of the kohya format: {first_few(unknown)}."
        )
    by_prefix: dict[str, Tensors] = {}
    for key, tensor in tensors.items():
        prefix, _, suffix = key.partition(".")
        if ROLES[suffix] in by_prefix.setdefault(prefix, {}):
            raise AdapterFileError(f"The file holds the {ROLES[suffix]} half of {prefix!r} twice.")
        by_prefix[prefix][ROLES[suffix]] = tensor
    family = detect_family({key: tensor.shape for key, tensor in tensors.items()}, metadata)
    layers: dict[LayerKey, LayerWeights] = {}
    for prefix, roles in by_prefix.items():
        key_of_layer = layer_of_prefix(prefix, family)
        if key_of_layer in layers:
            raise AdapterFileError(
                f"The file adapts {'.'.join(key_of_layer)} twice, the second time as {prefix!r}."
            )
        layers[key_of_layer] = layer_from_tensors(prefix, roles)
    return AdapterWeights(layers, dict(metadata))
