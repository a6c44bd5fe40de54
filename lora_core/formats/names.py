"""Layer names: the dotted paths of diffusers, and the key prefixes of kohya, with underscores for dots.

A prefix cannot be split at underscores, since they are part of the names too. So all adaptable layers are
rows of a table with `#` for each number: a name's numbers are replaced, the row is looked up, and the numbers
are put back. This needs no model. The original (ldm) block names, which some families have in kohya files
(`Family.kohya_block_names`), are another table; `model_files/families.py` translates them.
"""

import re
from collections.abc import Iterable

from lora_core.errors import AdapterFileError
from lora_core.model_files.families import (
    FAMILIES,
    Family,
    diffusers_unet_path,
    is_text_encoder,
    ldm_unet_path,
)
from lora_core.model_files.header import other_family

_BLOCKS = ("down_blocks.#", "mid_block", "up_blocks.#")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.#")
_TRANSFORMER = (
    *(f"{attention}.{leaf}" for attention in ("attn1", "attn2") for leaf in _ATTENTION),
    "ff.net.#.proj",
    "ff.net.#",
)
_IN_BLOCK = (
    "attentions.#.proj_in",
    "attentions.#.proj_out",
    *(f"attentions.#.transformer_blocks.#.{leaf}" for leaf in _TRANSFORMER),
    *(f"resnets.#.{leaf}" for leaf in ("conv1", "conv2", "conv_shortcut", "time_emb_proj")),
    "downsamplers.#.conv",
    "upsamplers.#.conv",
)
UNET_PATHS = (
    *(f"{block}.{leaf}" for block in _BLOCKS for leaf in _IN_BLOCK),
    *("conv_in", "conv_out", "time_embedding.linear_#", "add_embedding.linear_#"),
)
_IN_LDM_BLOCK = (
    *("#.proj_in", "#.proj_out"),
    *(f"#.transformer_blocks.#.{leaf}" for leaf in _TRANSFORMER),
    *(
        f"#.{leaf}"
        for leaf in ("in_layers.#", "out_layers.#", "emb_layers.#", "skip_connection", "op", "conv")
    ),
)
LDM_PATHS = (
    *(f"input_blocks.#.{leaf}" for leaf in _IN_LDM_BLOCK),
    *(f"middle_block.{leaf}" for leaf in _IN_LDM_BLOCK),
    *(f"output_blocks.#.{leaf}" for leaf in _IN_LDM_BLOCK),
    *("input_blocks.#.#", "time_embed.#", "label_emb.#.#", "out.#"),
)
_CLIP_LAYER = "text_model.encoder.layers.#"
CLIP_PATHS = (
    *(f"{_CLIP_LAYER}.self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "out_proj")),
    *(f"{_CLIP_LAYER}.mlp.{leaf}" for leaf in ("fc1", "fc2")),
    "text_projection",
)

PREFIX_PARTS = {
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    # SimpleTuner's LyCORIS files.
    "lycoris": "unet",
}
"""The beginning of a kohya key, to the part that it adapts."""

_NUMBER = re.compile(r"(?<=[._])\d+(?=[._]|$)")
_PREFIX = re.compile(r"(lora_unet|lora_te1|lora_te2|lora_te|lycoris)_(.+)")
_PATHS = {"unet": set(UNET_PATHS), "text": set(CLIP_PATHS), "ldm": set(LDM_PATHS)}
_BY_FLAT_NAME = {kind: {path.replace(".", "_"): path for path in paths} for kind, paths in _PATHS.items()}


def _kind(part: str) -> str:
    return "text" if is_text_encoder(part) else "unet"


def with_text_model(path: str) -> str:
    """A text encoder's path with the `text_model.` level, which newer transformers dropped from some."""
    return f"text_model.{path}" if path.startswith(("encoder.", "embeddings.")) else path


def is_layer(part: str, path: str) -> bool:
    """Whether `path` can be an adaptable layer of `part`."""
    return _NUMBER.sub("#", path) in _PATHS[_kind(part)]


def ldm_family() -> Family:
    """The family whose kohya files have the original block names, for files that do not say their family."""
    return next(family for family in FAMILIES.values() if family.kohya_block_names == "ldm")


def layer_of_prefix(prefix: str, family: Family | None = None) -> tuple[str, str]:
    """(part, dotted path) of a kohya key prefix, with diffusers' block names or the original ones.

    Args:
        prefix: of a key, up to its first dot.
        family: whose blocks the original names count; None for the family that has them in its files.

    Raises:
        AdapterFileError: it names no layer of a UNet or a CLIP text encoder.
    """
    match = _PREFIX.fullmatch(prefix)
    if match is None:
        raise AdapterFileError(unknown_layer_message(prefix))
    part, name = PREFIX_PARTS[match[1]], match[2]
    if _kind(part) == "text" and name.startswith("encoder_layers_"):
        name = f"text_model_{name}"
    path = _dotted(name, _kind(part))
    if path is None and not is_text_encoder(part):
        path = from_ldm(_dotted(name, "ldm") or "", family)
    if path is None:
        raise AdapterFileError(unknown_layer_message(prefix))
    return part, path


def _dotted(name: str, kind: str) -> str | None:
    """The dotted path of an underscored name, or None if the table `kind` lacks it."""
    row = _BY_FLAT_NAME[kind].get(_NUMBER.sub("#", name))
    if row is None:
        return None
    numbers = iter(_NUMBER.findall(name))
    return re.sub("#", lambda _: next(numbers), row)


def from_ldm(path: str, family: Family | None = None) -> str | None:
    """A UNet layer's path in diffusers, from its original one, or None; `family` as in `layer_of_prefix`."""
    found = diffusers_unet_path(path, (family or ldm_family()).attention_levels)
    return found if found is not None and is_layer("unet", found) else None


def unknown_layer_message(whole: str) -> str:
    """The error message for a layer that no table has, by its name in the file."""
    other = other_family({f"{whole}.": ()})
    if other:
        return f"The file holds {whole!r}, a layer of {other}, which is not a family that can be used here."
    return f"The file holds {whole!r}, which names no layer of a UNet or a text encoder."


def prefix_of_layer(part: str, path: str, family: Family) -> str:
    """The kohya key prefix of a layer.

    Raises:
        AdapterFileError: the family lacks the part, or the layer has no such name.
    """
    prefixes = {"unet": "lora_unet"} | {e.part: e.kohya_prefix for e in family.text_encoders}
    if part not in prefixes:
        raise AdapterFileError(f"{family.title} has no part {part!r}; it has {', '.join(family.parts)}.")
    named: str | None = path if is_layer(part, path) else None
    if not is_text_encoder(part) and named and family.kohya_block_names == "ldm":
        named = ldm_unet_path(path, family.attention_levels)
    if named is None:
        raise AdapterFileError(f"The layer {part}.{path} has no name in the kohya format.")
    return f"{prefixes[part]}_{named.replace('.', '_')}"


def first_few(names: Iterable[str], most: int = 3) -> str:
    """The first names, quoted for a sentence: 'a', 'b', 'c' and 5 more."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(repr(name) for name in listed[:most]) + more
