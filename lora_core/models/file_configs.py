"""The configs of a single file's components: the family's, with the sizes that the tensors themselves have.

Depths and widths show in names and shapes; how attention is cut into heads does not, so that it stays as the
family's config says, or 64 channels a head where that does not divide.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lora_core.spec.base_facts import UNET, VAE
from lora_core.spec.families import Family, TextEncoder
from lora_core.spec.ldm_names import RESNETS, open_clip_path

Shapes = Mapping[str, Sequence[int]]
HEAD_WIDTH = 64
"""Channels of an attention head in every family from SD 2.x on, and in all CLIP text encoders."""


def unet_config(config: Mapping[str, Any], shapes: Shapes, family: Family) -> dict[str, Any]:
    """A UNet's config with the widths and depths of the file's tensors."""
    found = dict(config)
    levels = range(len(family.attention_levels))
    firsts = [f"{UNET}input_blocks.{1 + (RESNETS + 1) * level}" for level in levels]
    widths = [shapes.get(f"{first}.0.in_layers.2.weight") for first in firsts]
    channels = [int(width[0]) for width in widths if width]
    if len(channels) != len(firsts):
        return found
    found["block_out_channels"] = channels
    heads = config.get("attention_head_dim", 8)
    heads = list(heads) if isinstance(heads, list | tuple) else [heads] * len(channels)
    fitting = [_heads(own, width) for own, width in zip(heads, channels, strict=True)]
    found["attention_head_dim"] = fitting if len(set(fitting)) > 1 else fitting[0]
    depths = [_depth(shapes, f"{first}.1.transformer_blocks.") for first in firsts]
    if any(depths):
        kept = [depth or 1 for depth in depths]
        found["transformer_layers_per_block"] = kept if len(set(kept)) > 1 else kept[0]
    projection = next(
        (s for k, s in shapes.items() if k.startswith(UNET) and k.endswith(".proj_in.weight")), None
    )
    if projection:
        found["use_linear_projection"] = len(projection) == 2
    label = shapes.get(f"{UNET}label_emb.0.0.weight")
    if label and config.get("projection_class_embeddings_input_dim"):
        found["projection_class_embeddings_input_dim"] = int(label[1])
    return found


def _heads(own: int, channels: int) -> int:
    return own if channels % own == 0 else max(1, channels // HEAD_WIDTH)


def _depth(shapes: Shapes, start: str) -> int:
    """How many numbered things follow `start` in the names."""
    numbers = {match[1] for key in shapes if (match := re.match(re.escape(start) + r"(\d+)\.", key))}
    return len(numbers)


def vae_config(config: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
    """A VAE's config with the widths of the file's tensors, whichever names it uses."""
    found = dict(config)
    channels = []
    for level in range(len(config["block_out_channels"])):
        for key in (f"encoder.down.{level}.block.0", f"encoder.down_blocks.{level}.resnets.0"):
            shape = shapes.get(f"{VAE}{key}.conv1.weight") or shapes.get(f"{key}.conv1.weight")
            if shape:
                channels.append(int(shape[0]))
    if len(channels) == len(config["block_out_channels"]):
        found["block_out_channels"] = channels
    return found


def text_config(config: Mapping[str, Any], shapes: Shapes, encoder: TextEncoder) -> dict[str, Any]:
    """A text encoder's config with the widths and the depth of the file's tensors.

    OpenCLIP files of SD 2.x hold one layer more than is used, so the depth is never more than the config's.
    """
    found = dict(config)

    def shape(name: str) -> Sequence[int] | None:
        if encoder.open_clip:
            return shapes.get(encoder.single_file + open_clip_path(name)[0])
        return shapes.get(f"{encoder.single_file}text_model.{name}") or shapes.get(encoder.single_file + name)

    words, first = shape("embeddings.token_embedding.weight"), shape("encoder.layers.0.mlp.fc1.weight")
    if not words or not first:
        return found
    depth = max(
        _depth(shapes, encoder.single_file + layers)
        for layers in ("text_model.encoder.layers.", "encoder.layers.", "transformer.resblocks.")
    )
    width = int(words[1])
    found |= {
        "vocab_size": int(words[0]),
        "hidden_size": width,
        "intermediate_size": int(first[0]),
        "num_hidden_layers": min(depth, config["num_hidden_layers"]),
        "num_attention_heads": _heads(config["num_attention_heads"], width),
    }
    projection = shape("text_projection.weight") if encoder.pooled else None
    if projection:
        found["projection_dim"] = int(projection[1])
    return found
