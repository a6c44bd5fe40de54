"""Reading the header of an untrusted safetensors file without torch, and naming what cannot be used here.

The safetensors library checks each claim of the header first, so that a broken file gets an error and never
more memory than its own size. Format: https://github.com/huggingface/safetensors#format
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lora_core.errors import AdapterFileError, LoraError
from lora_core.system.files import parse_json

MAX_HEADER = 16 * 2**20
"""Bytes. Real headers stay under 3 MB, even with the tags of a large dataset."""
LONGEST_NAME = 1000
"""Characters of a tensor's name; real ones stay under 200."""
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8", "BOOL")
"""Supported dtypes."""

_NOT_SAFETENSORS = (
    (b"PK\x03\x04", "a pickled torch file or a zip"),
    *((bytes((0x80, version)), "a pickled torch file, which can run code") for version in range(2, 6)),
    (b"<", "a web page: the download went wrong"),
    (b"version https://git-lfs", "a Git LFS pointer: the download went wrong"),
)


@dataclass(frozen=True)
class Header:
    """The checked header of a safetensors file.

    Attributes:
        tensors: name to dtype, shape and offsets, as in the file.
        metadata: the texts in the file.
        start: offset of the tensor data, in bytes.
    """

    tensors: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    start: int

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Name to shape."""
        return {name: entry["shape"] for name, entry in self.tensors.items()}


def read_header(path: Path, error: type[LoraError] = AdapterFileError) -> Header:
    """The header of a safetensors file, with each of its claims checked against the file.

    Args:
        path: the file.
        error: the class to raise for a broken file: `AdapterFileError` or `ModelFileError`.

    Raises:
        LoraError: of the class `error`: what is wrong with the file.
    """
    path = Path(path)
    if not path.is_file():
        there = "is a folder; give the .safetensors file in it" if path.is_dir() else "does not exist"
        raise error(f"{path} {there}.")
    try:
        with open(path, "rb") as file:
            start = file.read(32)
            length = int.from_bytes(start[:8], "little")
            if refusal := _refusal(start, length, path.stat().st_size):
                raise error(f"{path} {refusal}.")
            with safe_open(str(path), framework="np"):  # raises unless each claim holds
                file.seek(8)
                values = parse_json(file.read(length))
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror or problem}.") from problem
    except (SafetensorError, ValueError) as problem:
        reason = str(problem).removeprefix("Error while deserializing header: ")[:120]
        raise error(f"{path} is cut short, broken or no safetensors file: {reason}.") from problem
    metadata = values.pop("__metadata__", None) or {}
    for name, entry in values.items():
        if len(name) > LONGEST_NAME or len(entry["shape"]) > 8 or entry["dtype"] not in DTYPES:
            what = f"{entry['dtype']} {str(entry['shape'])[:60]}"
            raise error(
                f"{path} holds the tensor {name[:200]!r} ({what}), which no tool writes into a model."
            )
    return Header(values, metadata, 8 + length)


def _refusal(start: bytes, length: int, size: int) -> str:
    if size == 0:
        return "is empty"
    # A valid header starts with a brace at byte 8; its length before that can look like any magic number.
    for magic, what in _NOT_SAFETENSORS if start[8:9] != b"{" else ():
        if start.lstrip().startswith(magic):
            return f"is not a safetensors file but {what}"
    if MAX_HEADER < length <= size - 8:
        return f"claims a header of {length:,} bytes; no real file has more than {MAX_HEADER:,}"
    return ""


# Kinds of models by the names of their tensors, so that errors can name them.

_UNET = r"^(?:model\.diffusion_model\.|diffusion_model\.|transformer\.)?"
_KINDS = (
    (
        r"(?:^|\.)lora_(?:unet|te)|\.lora_(?:down|up|A|B)\b|\.(?:hada|lokr)_w",
        "an adapter file (a LoRA or alike)",
    ),
    (_UNET + r"double_blocks\.\d+\.img_attn\.norm", "a Flux model"),
    (_UNET + r"joint_blocks\.\d+\.context_block", "a Stable Diffusion 3 model"),
    (_UNET + r"double_layers\.\d+\.attn", "an AuraFlow model"),
    (
        _UNET + r"(?:clip_txt_mapper|effnet_mapper|down_blocks\.\d+\.\d+\.channelwise)",
        "a Stable Cascade model",
    ),
    (_UNET + r"adaln_single\.linear|^adaln_single\.", "a PixArt model"),
    (_UNET + r"(?:mlp_t5|text_embedding_padding)", "a Hunyuan-DiT model"),
    (_UNET + r"double_blocks\.\d+\.img_mod", "a Hunyuan video model"),
    (_UNET + r"(?:head\.modulation|blocks\.\d+\.self_attn\.norm_q)", "a Wan video model"),
    (_UNET + r"(?:cap_embedder|noise_refiner)\.", "a Lumina model"),
    (_UNET + r"transformer_blocks\.\d+\.(?:img_mod|attn\.add_q_proj)", "a transformer-based image model"),
    (r"^control_model\.|^controlnet_|^input_hint_block\.", "a ControlNet"),
    (r"time_stack|time_mixer", "a Stable Video Diffusion model"),
    (r"^noise_augmentor\.", "an unCLIP model"),
    (r"^edm_(?:mean|std)$|^edm_vpred", "a model of the EDM kind, such as Playground 2.5"),
    (r"^conditioner\.embedders\.0\.model\.transformer\.", "the refiner of Stable Diffusion XL"),
)
_INPUT = "model.diffusion_model.input_blocks.0.0.weight"
_CHANNELS: dict[object, str] = {
    4: "",
    5: "a depth-guided model (5 input channels)",
    7: "an upscaling model (7 input channels)",
    8: "an instruction-editing model (8 input channels)",
    9: "an inpainting model (9 input channels)",
}
_PARTS = (
    (r"^(?:first_stage_model\.)?(?:encoder|decoder)\.(?:down|up|down_blocks|up_blocks)\.", "a VAE alone"),
    (
        r"^(?:text_model\.)?encoder\.layers\.\d+\.self_attn\.|^transformer\.resblocks\.",
        "a text encoder alone",
    ),
    (r"^(?:down_blocks|up_blocks)\.\d+\.resnets\.", "a UNet alone, in diffusers' names"),
    (r"^(?:emb_params|string_to_param|clip_[lg])$", "a textual-inversion embedding"),
)


def unsupported_kind(shapes: Mapping[str, Sequence[int]]) -> str:
    """What a file is, for messages, if it is no Stable Diffusion text-to-image checkpoint; else ""."""
    if kind := _first_match(_KINDS, shapes):
        return kind
    entry = shapes.get(_INPUT)
    if entry is not None and len(entry) == 4:
        return channels_kind(entry[1])
    whole = any(key.startswith("model.diffusion_model.") for key in shapes)
    return "" if whole else _first_match(_PARTS, shapes)


def _first_match(rows: Iterable[tuple[str, str]], names: Collection[str]) -> str:
    """The title of the first row whose pattern is found in a name, or ""."""
    return next((title for pattern, title in rows if any(map(re.compile(pattern).search, names))), "")


def channels_kind(channels: object) -> str:
    """What a UNet with this many input channels is, for messages, if not a text-to-image model; else ""."""
    return _CHANNELS.get(channels, f"a model with {channels} input channels")


_START = re.compile(
    r"^(?:(?:base_model\.model|model\.diffusion_model|diffusion_model|transformer|unet)\.|lora_(?:unet|transformer)_"
    r"|lycoris_|model\.)+"
)
"""Prefixes of a layer's name in adapter files of any tool."""

_OWN = re.compile(
    r"(?:(?:down|up)_blocks[._]\d+|mid_block)[._](?:attentions[._]\d+[._](?:transformer_blocks|proj)|resnets|\w+samplers)"
    r"|(?:input_blocks[._]\d+|output_blocks[._]\d+|middle_block)[._]\d"
    r"|(?:lora_te[12]?_|text_encoder(?:_2)?\.)?text_model[._]encoder"
)
"""Layers of Stable Diffusion's UNet and CLIP, which no other family has."""

_FAMILIES = (
    (
        r"^lora_prior_|(?:down|up)_blocks_\d+_\d+_(?:attention|kv_mapper|channelwise|depthwise|mapper)",
        "Stable Cascade",
    ),
    (r"^(?:clip_txt_mapper|clip_txt_pooled_mapper|effnet_mapper)", "Stable Cascade"),
    (
        r"_blocks_\d+_(?:img|txt)_(?:mlp_fc[12]|mod_linear)_|individual_token_refiner|context_embedder_token_ref",
        "Hunyuan Video",
    ),
    (r"^double_blocks\.\d+\.(?:img|txt)_attn_(?:qkv|proj)\.", "Hunyuan Video"),
    (r"^distilled_guidance_layer_", "Chroma"),
    (
        r"^(?:double|single)_stream_modulation_|attn_to_qkv_mlp_proj|_ff(?:_context)?_linear_(?:in|out)_",
        "Flux 2",
    ),
    (r"^(?:double|single)_blocks_\d+_", "Flux"),
    (r"^joint_blocks_\d+_|^lora_te3_|^text_encoder_3_", "Stable Diffusion 3"),
    (r"^(?:double|single)_stream_blocks_\d+_", "HiDream"),
    (r"^(?:joint_transformer_blocks|double_layers|single_layers)_\d+_", "AuraFlow"),
    (r"^transformer_blocks_\d+_(?:img|txt)_m(?:lp|od)_", "Qwen-Image"),
    # Of the bases with these names only this one has so many blocks.
    (r"^transformer_blocks_(?:3[89]|[45]\d)_attn_", "Qwen-Image"),
    (r"^blocks_\d+_(?:self_attn|cross_attn)_(?:[qkvo]|k_img|v_img|norm_[qk])_|^blocks_\d+_ffn_", "Wan"),
    (r"^blocks_\d+_attn2_add_[kv]_proj", "Wan"),
    (
        r"^blocks_\d+_(?:self_attn|cross_attn)_(?:[qkv]|output)_proj|^blocks_\d+_adaln_modulation",
        "Cosmos or Anima",
    ),
    (r"^blocks_\d+_attn_(?:qkv|proj|to_out)_[xy]_|^transformer_blocks_\d+_attn1_add_[qkv]_proj", "Mochi"),
    (r"^blocks_\d+_cross_attn_(?:q|kv)_linear|^blocks_\d+_attn_(?:qkv|proj)_", "PixArt"),
    (
        r"^blocks_\d+_(?:attn1_Wqkv|attn1_out_proj|attn2_(?:q|kv|out)_proj|default_modulation|skip_linear)",
        "Hunyuan-DiT",
    ),
    (r"^layers_\d+_self_attn_qkv_proj", "OmniGen"),
    (r"^transformer_blocks_\d+_ff_conv_(?:inverted|depth|point)", "Sana"),
    (r"^(?:visual|text)_transformer_blocks_\d+_|_add_k_proj_lora", "Kandinsky"),
    (r"motion_modules_|^temporal_", "AnimateDiff"),
    (r"temporal_transformer_blocks|_time_stack_|_time_mixer_", "Stable Video Diffusion"),
    (r"^encoder_hid_proj_|_self_attention_query_key_value", "Kolors"),
)
"""By names; diffusion transformers with similar names are distinguished by `_WIDTHS`."""

_WIDTHS: tuple[tuple[str, Mapping[int, str], str], ...] = (
    (r"^single_transformer_blocks_\d+_", {6144: "Flux 2"}, "Flux or Hunyuan Video"),
    (
        r"^transformer_blocks_\d+_attn_",
        {1536: "Stable Diffusion 3", 2432: "Stable Diffusion 3"},
        "Flux, Stable Diffusion 3 or Qwen-Image",
    ),
    (
        r"^transformer_blocks_\d+_attn[12]_",
        {
            1152: "PixArt",
            2048: "LTX-Video",
            2240: "Sana",
            1920: "CogVideoX",
            3072: "CogVideoX",
            4096: "LTX-Video",
        },
        "PixArt, LTX-Video or CogVideoX",
    ),
    (
        r"^blocks_\d+_attn[12]_",
        {1408: "Hunyuan-DiT", 1536: "Wan", 3072: "Wan", 5120: "Wan"},
        "Wan or Hunyuan-DiT",
    ),
    (
        r"^(?:layers_\d+|noise_refiner|context_refiner|cap_embedder)_",
        {2304: "Lumina 2", 3840: "Z-Image"},
        "Lumina 2 or Z-Image",
    ),
    (
        r"^(?:transformer_|joint_|single_|double_)?(?:transformer_)?(?:blocks|layers)_\d+_"
        r"|^adaln_single_|^caption_projection_",
        {},
        "a diffusion transformer, which has no UNet",
    ),
    (
        r"^lora_te\d?_encoder_block_\d+_|^text_encoder(?:_2)?_encoder_block_\d+_",
        {},
        "a base with a T5 text encoder",
    ),
)
"""Names that several families share, with the width of each, and the description of any other width."""

_HEADERS = {
    "flux-2": "Flux 2", "flux2": "Flux 2", "flux": "Flux", "chroma": "Chroma", "kolors": "Kolors",
    "stable-diffusion-3": "Stable Diffusion 3", "stable-diffusion-v3": "Stable Diffusion 3",
    "sd3": "Stable Diffusion 3", "stable-cascade": "Stable Cascade", "sana": "Sana", "mochi": "Mochi",
    "stable-video": "Stable Video Diffusion", "pixart": "PixArt", "qwen": "Qwen-Image", "wan": "Wan",
    "hunyuan-dit": "Hunyuan-DiT", "hunyuandit": "Hunyuan-DiT", "hunyuan": "Hunyuan Video",
    "framepack": "Hunyuan Video", "lumina": "Lumina 2", "auraflow": "AuraFlow", "hidream": "HiDream",
    "z-image": "Z-Image", "zimage": "Z-Image", "ltx": "LTX-Video", "cogvideo": "CogVideoX",
    "cosmos": "Cosmos or Anima", "anima": "Cosmos or Anima", "omnigen": "OmniGen", "kandinsky": "Kandinsky",
}  # fmt: skip
"""Prefixes of `modelspec.architecture` and `ss_base_model_version`."""


def other_family(shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str] | None = None) -> str:
    """The family of an adapter that is not for Stable Diffusion with a UNet, such as "Flux"; "" if none is
    recognized.

    Args:
        shapes: name of each tensor to its shape, in kohya's, diffusers' or ComfyUI's names.
        metadata: of the header, which takes precedence over the names.
    """
    stated = _family_in_header(metadata or {})
    if stated:
        return stated
    names = {key: name for key in shapes if not _OWN.match(name := _START.sub("", key))}
    flat = {key: name.replace(".", "_") for key, name in names.items()}
    if title := _first_match(_FAMILIES, (*flat.values(), *names.values())):
        return title
    for pattern, widths, title in _WIDTHS:
        found = re.compile(pattern)
        keys = [key for key, name in flat.items() if found.search(name)]
        if keys:
            sizes = {size for key in keys for size in shapes[key]}
            told = {family for width, family in widths.items() if width in sizes}
            return told.pop() if len(told) == 1 else title
    return ""


def _family_in_header(metadata: Mapping[str, str]) -> str:
    for key in ("modelspec.architecture", "ss_base_model_version"):
        text = metadata.get(key, "").lower().replace("_", "-").replace(" ", "-")
        for start, title in _HEADERS.items():
            if text.startswith(start):
                return title
    return ""
