"""The diffusers / PEFT format: `<part>.<path>.lora_A.weight` (down), `.lora_B.weight` (up); older spellings.

Alpha is in the header, as the arguments of a PEFT `LoraConfig` for each part; without that header it is the
rank. PEFT itself writes it to `adapter_config.json` beside its `adapter_model.safetensors`.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora_core.errors import AdapterFileError
from lora_core.formats.kinds import detect_family, extra_keys
from lora_core.formats.layers import (
    PAIR_ROLES,
    Tensors,
    check_plain,
    first_few,
    layer_from_tensors,
    split_key,
    tensors_by_layer,
)
from lora_core.lora.weights import AdapterWeights, LayerKey, LayerWeights
from lora_core.model_files.families import Family
from lora_core.system.files import parse_json, read_object

HEADER_KEY = "lora_adapter_metadata"
"""Never in a kohya file: diffusers refuses a file that has both this and alphas among its tensors."""


def to_tensors(weights: AdapterWeights, family: Family, keep_alphas: bool = True) -> Tensors:
    """The tensors of a file, by name; `header` must go into the same file.

    Args:
        family: which parts there are.
        keep_alphas: ignored, for the same signature as `kohya.to_tensors`; alphas are always kept.

    Raises:
        AdapterFileError: the family lacks a part, or a layer is not a plain LoRA.
    """
    check_plain(weights)
    tensors: Tensors = {}
    for (part, path), layer in weights.layers.items():
        if part not in family.parts:
            raise AdapterFileError(f"{family.title} has no part {part!r}; it has {', '.join(family.parts)}.")
        tensors[f"{part}.{path}.lora_A.weight"] = layer.down
        tensors[f"{part}.{path}.lora_B.weight"] = layer.up
    return tensors


def header(weights: AdapterWeights, family: Family) -> dict[str, str]:
    """The header entries from which diffusers takes the rank and alpha of each layer."""
    values: dict[str, Any] = {}
    for part in weights.parts():
        layers = {_target(path): layer for (p, path), layer in weights.layers.items() if p == part}
        rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
        alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
        config = {
            "r": rank,
            "lora_alpha": _plain(alpha),
            "rank_pattern": {path: layer.rank for path, layer in layers.items() if layer.rank != rank},
            "alpha_pattern": {
                path: _plain(layer.alpha) for path, layer in layers.items() if layer.alpha != alpha
            },
            "target_modules": sorted(layers),
        }
        values |= {f"{part}.{key}": value for key, value in config.items()}
    return {
        HEADER_KEY: json.dumps(values, sort_keys=True),
        "ss_base_model_version": family.base_version,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": family.modelspec,
    }


def _target(path: str) -> str:
    """The end of a layer's name by which PEFT finds it, with and without the `text_model.` level.

    Short names ("q_proj") would also match layers that are not in the file, which PEFT would fill at random.
    """
    return path.removeprefix("text_model.")


def _plain(number: float) -> float:
    return int(number) if number == int(number) else number


def from_tensors(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> AdapterWeights:
    """The plain LoRA in a file's tensors and header, except what `kinds.extras_sentence` names.

    Each layer may have the name of either format. Ranks and alphas may differ, and without alpha the scale
    is 1. An alpha of 0 means 0, as in all tools but kohya's: such a layer changes nothing.

    Raises:
        AdapterFileError: a key is unknown, incomplete, doubled or of an impossible shape, or the header's
            alphas cannot be read.
    """
    extras = extra_keys(tensors)
    tensors = {key: tensor for key, tensor in tensors.items() if key not in extras}
    if unknown := [key for key in tensors if split_key(key)[1] not in PAIR_ROLES]:
        raise AdapterFileError(f"The file holds tensors that belong to no plain LoRA: {first_few(unknown)}.")
    family = detect_family({key: tensor.shape for key, tensor in tensors.items()}, metadata)
    found = tensors_by_layer(tensors, family)
    layers = {layer: layer_from_tensors(name, roles) for layer, (name, roles) in found.items()}
    return apply_header_alphas(
        layers, metadata, {key for key, (_, roles) in found.items() if "alpha" in roles}
    )


def apply_header_alphas(
    layers: Mapping[LayerKey, LayerWeights], metadata: Mapping[str, str], own: Container[LayerKey] = ()
) -> AdapterWeights:
    """The adapter of `layers` with the header's alphas, except for the layers in `own`, which keep theirs.

    Raises:
        AdapterFileError: the header's alphas cannot be read.
    """
    found = dict(layers)
    without = [key for key in layers if key not in own]
    values = read_lora_config(metadata) if without else {}
    for part, path in without:
        if f"{part}.lora_alpha" in values:
            alpha = _header_alpha(values, part, path, layers[part, path].rank)
            found[part, path] = replace(layers[part, path], alpha=alpha)
    return AdapterWeights(found, {k: v for k, v in metadata.items() if k != HEADER_KEY})


def read_lora_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The arguments of PEFT's LoraConfigs in a file's header, by dotted name; none without such a header.

    Raises:
        AdapterFileError: they cannot be read.
    """
    raw = metadata.get(HEADER_KEY)
    if not raw:
        return {}
    try:
        values = parse_json(raw)
    except ValueError as error:
        raise AdapterFileError(
            f"The header's {HEADER_KEY} is not valid JSON, so alpha is unknown."
        ) from error
    if not isinstance(values, dict):
        raise AdapterFileError(f"The header's {HEADER_KEY} is not a table, so alpha is unknown.")
    return values


def _header_alpha(values: Mapping[str, Any], part: str, path: str, rank: int) -> float:
    """A layer's alpha by PEFT's rules: of the first pattern that ends its name, else of its part."""
    alpha = values[f"{part}.lora_alpha"]
    patterns = values.get(f"{part}.alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise AdapterFileError(f"The header's {part}.alpha_pattern is not a table, so alpha is unknown.")
    for pattern, own in patterns.items():
        # PEFT reads these as regular expressions; a file must not be able to make us run one.
        name = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if not re.fullmatch(r"[\w.]+", name):
            raise AdapterFileError(f"The header gives alpha for {pattern!r}, which is not a layer's name.")
        if f".{path}".endswith(f".{name}") or f".{_target(path)}".endswith(f".{name}"):
            alpha = own
            break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise AdapterFileError(f"The header gives {part}.{path} the alpha {alpha!r}, which is not a number.")
    # rsLoRA scales by alpha / sqrt(rank) (Kalajdzievski 2023); everything here scales by alpha / rank.
    return float(alpha) * (math.sqrt(rank) if values.get(f"{part}.use_rslora") is True else 1.0)


PEFT_FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_TAKEN = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules")


def add_peft_config(path: Path, keys: Iterable[str], metadata: Mapping[str, str]) -> dict[str, str]:
    """A file's metadata, with the alphas of a PEFT config beside it put where diffusers has them.

    Source: huggingface/peft, `PeftModel.save_pretrained`.

    Raises:
        AdapterFileError: the config is there and cannot be read.
    """
    config = path.with_name(CONFIG)
    if path.name != PEFT_FILE or HEADER_KEY in metadata or not config.is_file():
        return dict(metadata)
    try:
        values = read_object(config)
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{config} cannot be read, so alpha is unknown: {error}.") from error
    part = "text_encoder" if any("encoder.layers." in key for key in keys) else "unet"
    stated = {f"{part}.{key}": values[key] for key in _TAKEN if key in values}
    return {**metadata, HEADER_KEY: json.dumps(stated)}
