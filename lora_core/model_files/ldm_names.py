"""The original (ldm, sgm) names of layers and parameters.

Single-file checkpoints use them for all weights, and SDXL's adapter files of the kohya format for the UNet.
Sources: the original code of Stable Diffusion (ldm/modules/diffusionmodules/openaimodel.py and model.py) and
of OpenCLIP (src/open_clip/transformer.py).
"""

import functools
import re
from collections.abc import Mapping, Sequence

from lora_core.system.files import read_table

RESNETS = 2
"""A level's resnets on the way down; there is one more on the way up."""
_STRIDE = RESNETS + 1

NAMES: dict[str, dict[str, str]] = read_table("families/layer_names.toml")


@functools.cache
def _unet_names(attention_levels: tuple[bool, ...]) -> dict[str, str]:
    """diffusers' path of each of the UNet's modules, or of the block that it is in, to the original one."""
    blocks, resnets = dict(NAMES["unet"]), dict(NAMES["unet_resnets"])
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
        for inner, inner_ldm in NAMES["resnet"].items()
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
    for pattern, other in NAMES["vae"].items():
        path = re.sub(rf"^{pattern}", other, path)
    return path.replace("conv_shortcut", "nin_shortcut")


def open_clip_path(path: str) -> tuple[str, int | None]:
    """OpenCLIP's name of a text encoder's parameter, and which third of it along the first axis, or None.

    OpenCLIP keeps q, k and v in one tensor, and the text projection transposed. `path` is transformers' name,
    with or without the `text_model.` level.
    """
    path = path.removeprefix("text_model.")
    if path == "text_projection.weight":
        return "text_projection", None
    if named := _renamed(path, NAMES["open_clip"]):
        return named, None
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", path)
    assert match is not None, path
    block = f"transformer.resblocks.{match[1]}"
    third = re.fullmatch(r"self_attn\.([qkv])_proj", match[2])
    if third:
        return f"{block}.attn.in_proj_{match[3]}", "qkv".index(third[1])
    return f"{block}.{NAMES['open_clip_layer'][match[2]]}.{match[3]}", None
