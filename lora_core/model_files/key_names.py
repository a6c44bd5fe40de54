"""The original (ldm, sgm) names of Stable Diffusion's layers, from diffusers' names and back.

Single-file checkpoints use them for all weights, and SDXL's adapter files of the kohya format for the UNet.
Both directions follow from one table of rows and from arithmetic on block numbers; every family here has two
resnets a level. Paths may end in a parameter (`.weight`). Sources: the original code of Stable Diffusion
(ldm/modules/diffusionmodules/openaimodel.py and model.py) and of OpenCLIP (src/open_clip/transformer.py).
"""

import re
from collections.abc import Sequence

RESNETS = 2
"""A level's resnets on the way down; there is one more on the way up."""
_STRIDE = RESNETS + 1

_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_RESNET_BACK = {ldm: own for own, ldm in _RESNET.items()}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_LDM_BLOCK = re.compile(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)")


def ldm_unet_path(path: str, attention_levels: Sequence[bool]) -> str | None:
    """The original path of what diffusers calls `path` in the UNet, or None where there is none.

    Args:
        path: a layer or parameter, such as "down_blocks.1.attentions.0.proj_in".
        attention_levels: `Family.attention_levels`.
    """
    match = _BLOCK.fullmatch(path)
    if match is None:
        return _with_ends(path, _UNET_ENDS, _RESNET)
    way, block, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if block >= len(attention_levels):
        return None
    if kind == "downsamplers":
        return f"input_blocks.{_STRIDE * (block + 1)}.0.{rest.replace('conv', 'op', 1)}"
    if kind == "upsamplers":
        place = 2 if attention_levels[-1 - block] else 1
        return f"output_blocks.{_STRIDE * block + RESNETS}.{place}.{rest}"
    number = _STRIDE * block + index
    start = f"input_blocks.{number + 1}" if way == "down" else f"output_blocks.{number}"
    if kind == "attentions":
        return f"{start}.1.{rest}"
    renamed = _renamed(rest, _RESNET)
    return None if renamed is None else f"{start}.0.{renamed}"


def diffusers_unet_path(path: str, attention_levels: Sequence[bool]) -> str | None:
    """The inverse of `ldm_unet_path`: diffusers' path of an original one, or None where there is none."""
    match = _LDM_BLOCK.fullmatch(path)
    if match is None or path.startswith("input_blocks.0."):
        back = {ldm: own for own, ldm in _UNET_ENDS.items()}
        return _with_ends(path, back, _RESNET_BACK)
    way, number, place, rest = match[1], int(match[2]), int(match[3]), match[4]
    block, index = divmod(number - 1 if way == "input" else number, _STRIDE)
    if block >= len(attention_levels):
        return None
    if way == "input" and index == RESNETS:
        return f"down_blocks.{block}.downsamplers.0.{rest.replace('op', 'conv', 1)}"
    start = f"{'down' if way == 'input' else 'up'}_blocks.{block}"
    if place == 0:
        renamed = _renamed(rest, _RESNET_BACK)
        return None if renamed is None else f"{start}.resnets.{index}.{renamed}"
    attention = attention_levels[block if way == "input" else -1 - block]
    if place == 1 and attention:
        return f"{start}.attentions.{index}.{rest}"
    return f"{start}.upsamplers.0.{rest}" if way == "output" and index == RESNETS else None


def _with_ends(path: str, ends: dict[str, str], resnet: dict[str, str]) -> str | None:
    for own, other in ends.items():
        if path == own:
            return other
        if path.startswith(f"{own}."):
            rest = path[len(own) + 1 :]
            inner = _renamed(rest, resnet) if "resnets" in own or "resnets" in other else rest
            return None if inner is None else f"{other}.{inner}"
    return None


def _renamed(rest: str, table: dict[str, str]) -> str | None:
    for own, other in table.items():
        if rest == own or rest.startswith(f"{own}."):
            return other + rest[len(own) :]
    return None


_VAE = (
    (r"(encoder|decoder)\.mid_block\.resnets\.0\.", r"\1.mid.block_1."),
    (r"(encoder|decoder)\.mid_block\.resnets\.1\.", r"\1.mid.block_2."),
    (r"(encoder|decoder)\.mid_block\.attentions\.0\.group_norm\.", r"\1.mid.attn_1.norm."),
    (r"(encoder|decoder)\.mid_block\.attentions\.0\.to_([qkv])\.", r"\1.mid.attn_1.\2."),
    (r"(encoder|decoder)\.mid_block\.attentions\.0\.to_out\.0\.", r"\1.mid.attn_1.proj_out."),
    (r"encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block."),
    (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
    (r"(encoder|decoder)\.conv_norm_out\.", r"\1.norm_out."),
)


def ldm_vae_path(path: str, levels: int) -> str:
    """The original name of a VAE parameter; the weights of its attention are 1 x 1 convolutions there.

    Args:
        path: diffusers' name of a parameter.
        levels: how many the VAE has; the original counts the decoder's from the finest.
    """
    up = re.match(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers\.0)\.", path)
    if up:
        kind = "block" if up[2] == "resnets" else "upsample"
        path = f"decoder.up.{levels - 1 - int(up[1])}.{kind}.{path[up.end() :]}"
    for pattern, other in _VAE:
        path = re.sub(rf"^{pattern}", other, path)
    return path.replace("conv_shortcut", "nin_shortcut")


_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def open_clip_path(path: str) -> tuple[str, int | None]:
    """OpenCLIP's name of a text encoder's parameter, and which third of it along the first axis, or None.

    OpenCLIP keeps q, k and v in one tensor, and the text projection transposed.

    Args:
        path: transformers' name, with or without the `text_model.` level.
    """
    path = path.removeprefix("text_model.")
    if path == "text_projection.weight":
        return "text_projection", None
    for own, other in _OPEN_CLIP.items():
        if path == own or path.startswith(f"{own}."):
            return other + path[len(own) :], None
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", path)
    assert match is not None, path
    block = f"transformer.resblocks.{match[1]}"
    third = re.fullmatch(r"self_attn\.([qkv])_proj", match[2])
    if third:
        return f"{block}.attn.in_proj_{match[3]}", "qkv".index(third[1])
    return f"{block}.{_OPEN_CLIP_LAYER[match[2]]}.{match[3]}", None
