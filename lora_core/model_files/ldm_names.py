"""The original (ldm, sgm) names of layers and parameters.

Single-file checkpoints use them for all weights, and SDXL's adapter files of the kohya format for the UNet.
Sources: the original code of Stable Diffusion (ldm/modules/diffusionmodules/openaimodel.py and model.py) and
of OpenCLIP (src/open_clip/transformer.py).
"""

import functools
import re
from collections.abc import Mapping, Sequence

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


@functools.cache
def _unet_names(attention_levels: tuple[bool, ...]) -> dict[str, str]:
    """diffusers' path of each of the UNet's modules, or of the block that it is in, to the original one."""
    blocks = {own: ldm for own, ldm in _UNET_ENDS.items() if "resnets" not in own}
    resnets = {own: ldm for own, ldm in _UNET_ENDS.items() if "resnets" in own}
    last = len(attention_levels) - 1
    for block in range(len(attention_levels)):
        ways = (("down", "input", RESNETS, 1, block), ("up", "output", RESNETS + 1, 0, -1 - block))
        for way, ldm_way, count, first, level in ways:
            for index in range(count):
                start = f"{ldm_way}_blocks.{_STRIDE * block + index + first}"
                resnets[f"{way}_blocks.{block}.resnets.{index}"] = f"{start}.0"
                if attention_levels[level]:
                    blocks[f"{way}_blocks.{block}.attentions.{index}"] = f"{start}.1"
        if block < last:
            blocks[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{_STRIDE * (block + 1)}.0.op"
            place = 2 if attention_levels[-1 - block] else 1
            upsampler = f"output_blocks.{_STRIDE * block + RESNETS}.{place}"
            blocks[f"up_blocks.{block}.upsamplers.0"] = upsampler
    return blocks | {
        f"{own}.{inner}": f"{ldm}.{inner_ldm}"
        for own, ldm in resnets.items()
        for inner, inner_ldm in _RESNET.items()
    }


@functools.cache
def _unet_names_back(attention_levels: tuple[bool, ...]) -> dict[str, str]:
    return {ldm: own for own, ldm in _unet_names(attention_levels).items()}


def ldm_unet_path(path: str, attention_levels: Sequence[bool]) -> str | None:
    """The original path of what diffusers calls `path` in the UNet, or None where there is none.

    Args:
        path: a layer or parameter, such as "down_blocks.1.attentions.0.proj_in".
        attention_levels: `Family.attention_levels`.
    """
    return _renamed(path, _unet_names(tuple(attention_levels)))


def diffusers_unet_path(path: str, attention_levels: Sequence[bool]) -> str | None:
    """The inverse of `ldm_unet_path`: diffusers' path of an original one, or None where there is none."""
    return _renamed(path, _unet_names_back(tuple(attention_levels)))


def _renamed(path: str, names: Mapping[str, str]) -> str | None:
    """`path` with the longest of its beginnings that is in `names` replaced."""
    head = path
    while head not in names:
        head, dot, _ = head.rpartition(".")
        if not dot:
            return None
    return names[head] + path[len(head) :]


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
    if named := _renamed(path, _OPEN_CLIP):
        return named, None
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", path)
    assert match is not None, path
    block = f"transformer.resblocks.{match[1]}"
    third = re.fullmatch(r"self_attn\.([qkv])_proj", match[2])
    if third:
        return f"{block}.attn.in_proj_{match[3]}", "qkv".index(third[1])
    return f"{block}.{_OPEN_CLIP_LAYER[match[2]]}.{match[3]}", None
