"""The kohya format, the only one that all tools read: `<stem>.lora_down.weight`, `.lora_up.weight`, `.alpha`.

One alpha for the whole file, because diffusers 0.42 takes the most frequent alpha of a component for most
layers; where layers differ, the difference goes into `lora_up`. Ranks may differ.
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
    # Some trainers put PEFT's leaves below kohya's stems.
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
        weights: what to write; precisions stay as they are.
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
        stem = prefix_of_layer(part, path, family)
        kept = layer.alpha == common or keep_alphas
        tensors[f"{stem}.lora_down.weight"] = layer.down
        tensors[f"{stem}.lora_up.weight"] = layer.up if kept else _up_for_alpha(layer, common)
        alpha = layer.alpha if kept else common
        tensors[f"{stem}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    return tensors


def _up_for_alpha(layer: LayerWeights, alpha: float) -> torch.Tensor:
    """`up` such that the update stays the same under another alpha; one rounding, from double precision."""
    dtype = torch.promote_types(layer.up.dtype, torch.float32)
    return (layer.up.double() * (layer.alpha / alpha)).to(dtype)


def header(weights: AdapterWeights, family: Family) -> dict[str, str]:
    """What the header must say so that other tools treat the file right; all values are texts."""
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

    An alpha of 0 is taken at its word, as all tools but kohya's do: such a layer changes nothing. What
    `detect.extras_sentence` names is passed over.

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
    by_stem: dict[str, Tensors] = {}
    for key, tensor in tensors.items():
        stem, _, leaf = key.partition(".")
        if ROLES[leaf] in by_stem.setdefault(stem, {}):
            raise AdapterFileError(f"The file holds the {ROLES[leaf]} half of {stem!r} twice.")
        by_stem[stem][ROLES[leaf]] = tensor
    family = detect_family({key: tensor.shape for key, tensor in tensors.items()}, metadata)
    layers: dict[LayerKey, LayerWeights] = {}
    for stem, roles in by_stem.items():
        key_of_layer = layer_of_prefix(stem, family)
        if key_of_layer in layers:
            raise AdapterFileError(
                f"The file adapts {'.'.join(key_of_layer)} twice, the second time as {stem!r}."
            )
        layers[key_of_layer] = layer_from_tensors(stem, roles)
    return AdapterWeights(layers, dict(metadata))
