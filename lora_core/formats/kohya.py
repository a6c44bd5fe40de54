"""The kohya format: `<prefix>.lora_down.weight`, `.lora_up.weight`, `.alpha`. All tools read it. Layers of
other kinds have the names that LyCORIS gives them: `.hada_w1_a`, `.lokr_w1`, `.dora_scale`; new tokens those
of A1111, `bundle_emb.TOKEN.clip_l`.

One alpha for the entire file, because diffusers 0.42 takes the most frequent alpha of a component for most
layers; where layers differ, `lora_up` is scaled instead. Ranks may differ.
"""

from collections import Counter

import torch

from lora_core.formats.kinds import TOKEN_PARTS
from lora_core.formats.layers import Tensors, check_plain, prefix_of_layer
from lora_core.lora.weights import AdapterWeights
from lora_core.model_files.families import Family


def file_alpha(weights: AdapterWeights) -> float:
    """The alpha of a file for `weights`: the most frequent one, so that few layers have to be scaled.

    Zero is never taken, since kohya's own loader reads it as "alpha = rank".
    """
    counts = Counter(layer.alpha for layer in weights.layers.values() if layer.alpha != 0)
    if not counts:
        return float(next((layer.rank for layer in weights.layers.values()), 0))
    return counts.most_common(1)[0][0]


def to_tensors(weights: AdapterWeights, family: Family, keep_alphas: bool = False) -> Tensors:
    """The tensors of a file, by name.

    Args:
        family: whose names to use.
        keep_alphas: write each layer's own alpha, bit for bit; diffusers reads such a file at the wrong
        strength.

    Raises:
        AdapterFileError: a layer has no name in this format, or there is none.
    """
    tensors: Tensors = {
        f"{prefix_of_layer(part, path, family)}.{end}": tensor
        for (part, path), update in weights.others.items()
        for end, tensor in update.tensors().items()
    }
    if not weights.others:
        check_plain(weights)
    for part, tokens in weights.tokens.items():
        tensors |= {f"bundle_emb.{token}.{TOKEN_PARTS[part]}": rows for token, rows in tokens.items()}
    common = file_alpha(weights)
    for (part, path), layer in weights.layers.items():
        prefix = prefix_of_layer(part, path, family)
        kept = layer.alpha == common or keep_alphas
        tensors[f"{prefix}.lora_down.weight"] = layer.down
        up = layer.up
        if not kept:
            # The update stays the same under another alpha; one rounding, from double precision.
            up = up.double() * (layer.alpha / common)
            up = up.to(torch.promote_types(layer.up.dtype, torch.float32))
        tensors[f"{prefix}.lora_up.weight"] = up
        alpha = layer.alpha if kept else common
        tensors[f"{prefix}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    return tensors


def header(weights: AdapterWeights, family: Family) -> dict[str, str]:
    """The header entries that other tools need to treat the file correctly. LyCORIS' `network_args` and the
    rank of the kinds other than LoRA follow from a run's settings, see `metadata.export_metadata`."""
    network = {"ss_network_module": "lycoris.kohya"}
    if weights.layers:
        rank = Counter(layer.rank for layer in weights.layers.values()).most_common(1)[0][0]
        network = {
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(rank),
            "ss_network_alpha": str(file_alpha(weights)),
        }
    return network | {
        "ss_base_model_version": family.base_version,
        "ss_v2": str(family.base_version.startswith("sd_v2")),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": family.modelspec,
    }
