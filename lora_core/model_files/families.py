"""The model families as rows of data: what the files of a base do not say about themselves, which layers are
adapted, and what single files call the layers.

A config beside the weights always wins over a row. Nothing else in the project may branch on a family's name.
"""

import functools
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lora_core.errors import ConfigError, ModelFileError
from lora_core.settings.choices import TARGETS, chosen
from lora_core.system.files import FAMILY_CONFIGS


@dataclass(frozen=True)
class TextEncoder:
    """One text encoder of a family.

    Attributes:
        part: the component's name in a diffusers folder, and in `AdapterWeights` keys.
        kohya_prefix: of its keys in adapter files of the kohya format.
        width: hidden size, in channels.
        hidden: the hidden state that conditions the denoiser: "last", with the final layer norm, or
            "penultimate", without it.
        pooled: whether its pooled projection conditions the denoiser too.
        pad_token: pads captions, where no tokenizer config says it.
        single_file: prefix of its weights in a single-file checkpoint.
        open_clip: whether a single-file checkpoint has them under OpenCLIP's names.
    """

    part: str
    kohya_prefix: str
    width: int
    hidden: str = "last"
    pooled: bool = False
    pad_token: str = "<|endoftext|>"
    single_file: str = "cond_stage_model.transformer."
    open_clip: bool = False

    @property
    def tokenizer(self) -> str:
        """The tokenizer's folder beside the encoder's in a diffusers folder."""
        return self.part.replace("text_encoder", "tokenizer")


@dataclass(frozen=True)
class Footprint:
    """A family's use of a card's memory, measured at its true shapes on the simulated card by
    `python -m tests.simulated.footprints`: bf16, fused attention, allocated bytes.

    Attributes:
        unet, text, vae: parameters of each.
        blocks, largest: parameters of the UNet's layers that 8 bits and offloading apply to, and of the
            largest one.
        guided: bytes a latent pixel and image of a pass without gradients.
        encode, decode: bytes a latent pixel of the VAE in fp32.
        steps: by `adapter.targets`, bytes a latent pixel and image of a step: at rank 16, for each
            additional rank, and with checkpointing.
    """

    unet: int
    blocks: int
    largest: int
    text: int
    vae: int
    guided: int
    encode: int
    decode: int
    steps: Mapping[str, Sequence[int]]


@functools.cache
def _footprints() -> dict[str, Footprint]:
    """By `Family.configs`."""
    rows = tomllib.loads((FAMILY_CONFIGS / "footprints.toml").read_text(encoding="utf-8"))
    return {name: Footprint(**row) for name, row in rows.items()}


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: the row's key.
        title: its common name. Rows that share a title have the same layers: an adapter for one fits the
            others.
        text_encoders: in the order in which their hidden states are concatenated.
        context_width: channels of the cross-attention, by which a base's family is recognized.
        resolution: the side, in pixels, that the base was trained at.
        latent_scale: the VAE's scaling factor, where no VAE config says it.
        prediction: the prediction type, where nothing beside the weights says it: "epsilon" or
            "v_prediction". It distinguishes rows of one title.
        size_conditioning: whether the denoiser is conditioned on the image's size and crop.
        kohya_block_names: "diffusers" or "ldm", the UNet block names in kohya files.
        base_version: the value of `ss_base_model_version` in files for this family.
        modelspec: the value of `modelspec.architecture` in files for this family.
        attention_levels: for each level of the UNet, the finest first, whether it has attention: with it, the
            original (ldm) block numbers follow from diffusers' names.
        denoiser: the part that predicts from noisy latents, and its folder in a diffusers folder.
        configs: the folder below `assets/families` with the configs for single files, "" if there is none.
        subject_blocks, style_blocks: regular expressions for the UNet paths that carry what is shown, and how
            it looks.
        usual: whether an unmarked single file of this context width is assumed to be of this row.
        zero_negative: whether an empty negative prompt is zeros instead of an encoded empty text.
        settings: defaults of a run on such a base that differ from the general ones, dotted name to value.
        portable: whether other tools have bases that files for this family work with.
        prior_prompts: simple things that the base generates well; the loss on them is measured as forgetting.
    """

    name: str
    title: str
    text_encoders: tuple[TextEncoder, ...]
    context_width: int
    base_version: str
    modelspec: str
    resolution: int = 512
    latent_scale: float = 0.18215
    prediction: str = "epsilon"
    size_conditioning: bool = False
    kohya_block_names: str = "diffusers"
    attention_levels: tuple[bool, ...] = (True, True, True, False)
    denoiser: str = "unet"
    configs: str = ""
    subject_blocks: str = ""
    style_blocks: str = ""
    usual: bool = True
    zero_negative: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    portable: bool = True
    prior_prompts: tuple[str, ...] = (
        "a photo of a dog in a park",
        "a portrait of a woman",
        "a house by a lake",
        "a bowl of fruit on a table",
    )

    @property
    def parts(self) -> tuple[str, ...]:
        """The trainable components: the denoiser first, then the text encoders."""
        return (self.denoiser, *(encoder.part for encoder in self.text_encoders))

    @property
    def footprint(self) -> Footprint:
        """The footprint of its layers; where none was measured, that of the smallest family."""
        return _footprints().get(self.configs) or _footprints()["sd15"]


# Coarse layers decide the content, fine ones the style: Voynov et al. 2023 (P+), figure 4, measured on
# Stable Diffusion 1.x at 512 px; coarse is where the latents are 16 x 16 or less.
_COARSE = r"(?:down_blocks\.2|mid_block|up_blocks\.1)\..*"
_FINE = r"(?:down_blocks\.[01]|up_blocks\.[23])\..*"
_CLIP_L = TextEncoder("text_encoder", "lora_te", width=768)
_OPEN_CLIP_H = TextEncoder(
    "text_encoder",
    "lora_te",
    width=1024,
    pad_token="!",
    single_file="cond_stage_model.model.",
    open_clip=True,
)

_SD2 = Family(
    name="sd2",
    title="Stable Diffusion 2.x",
    text_encoders=(_OPEN_CLIP_H,),
    context_width=1024,
    base_version="sd_v2",
    modelspec="stable-diffusion-v2-512/lora",
    configs="sd2",
    subject_blocks=_COARSE,
    style_blocks=_FINE,
    usual=False,
)

FAMILIES: dict[str, Family] = {
    "tiny": Family(
        name="tiny",
        title="Embedded tiny base",
        text_encoders=(TextEncoder("text_encoder", "lora_te", width=128),),
        context_width=128,
        resolution=128,
        prediction="v_prediction",
        base_version="easel_tiny",
        modelspec="easel-tiny/lora",
        attention_levels=(False, True, True),
        subject_blocks=r"(?:down_blocks\.2|mid_block|up_blocks\.0)\..*",
        style_blocks=r"(?:down_blocks\.[01]|up_blocks\.[12])\..*",
        portable=False,
        prior_prompts=(
            "dog, noto style, on a white background",
            "car, noto style, on a sky blue background",
            "apple, noto style, on a white background",
            "house, noto style, on a grey background",
        ),
    ),
    "sd15": Family(
        name="sd15",
        title="Stable Diffusion 1.x",
        text_encoders=(_CLIP_L,),
        context_width=768,
        base_version="sd_v1",
        modelspec="stable-diffusion-v1/lora",
        configs="sd15",
        subject_blocks=_COARSE,
        style_blocks=_FINE,
    ),
    "sd2": _SD2,
    "sd2_v": replace(
        _SD2,
        name="sd2_v",
        resolution=768,
        prediction="v_prediction",
        base_version="sd_v2_v",
        modelspec="stable-diffusion-v2-768-v/lora",
        usual=True,
    ),
    "sdxl": Family(
        name="sdxl",
        title="Stable Diffusion XL",
        text_encoders=(
            TextEncoder(
                "text_encoder",
                "lora_te1",
                width=768,
                hidden="penultimate",
                single_file="conditioner.embedders.0.transformer.",
            ),
            TextEncoder(
                "text_encoder_2",
                "lora_te2",
                width=1280,
                hidden="penultimate",
                pooled=True,
                pad_token="!",
                single_file="conditioner.embedders.1.model.",
                open_clip=True,
            ),
        ),
        context_width=2048,
        resolution=1024,
        latent_scale=0.13025,
        size_conditioning=True,
        kohya_block_names="ldm",
        base_version="sdxl_base_v1-0",
        modelspec="stable-diffusion-xl-v1-base/lora",
        attention_levels=(False, True, True),
        configs="sdxl",
        # Frenkel et al. 2024 (B-LoRA), section 4: content and style each sit in one block of the decoder.
        subject_blocks=r"up_blocks\.0\.attentions\.0\..*",
        style_blocks=r"up_blocks\.0\.attentions\.1\..*",
        zero_negative=True,
        # Both text encoders take 1.6 GB in half precision; frozen, they are freed once captions are encoded.
        settings={"optimizer.text_encoder_lr": 0.0, "optimizer.text_encoder_2_lr": 0.0},
    ),
}


def is_text_encoder(part: str) -> bool:
    """Whether a part of a base is a text encoder; its denoiser is the other one that adapters are for."""
    return part.startswith("text")


def family_of_context_width(width: int, prediction: str = "") -> Family:
    """The family whose cross-attention has `width` channels.

    Args:
        width: of the cross-attention, in channels.
        prediction: chooses between rows of one title; "" for the first of them.

    Raises:
        ModelFileError: no family here has that width.
    """
    found = [family for family in FAMILIES.values() if family.context_width == width]
    if found:
        return next((family for family in found if family.prediction == prediction), found[0])
    widths = {family.title: family.context_width for family in FAMILIES.values()}
    known = ", ".join(f"{width} ({title})" for title, width in widths.items())
    raise ModelFileError(
        f"This base model attends to a text context {width} channels wide, which is not a family that can be"
        f" trained here; known are {known}."
    )


def family_of_version(version: str) -> Family | None:
    """The row whose files have `version` as `ss_base_model_version`, if there is one."""
    return next((family for family in FAMILIES.values() if family.base_version == version), None)


TEXT_LEVEL = "text_model."


@dataclass(frozen=True)
class Targets:
    """A set of layers to adapt, as patterns over diffusers' module paths.

    Attributes:
        unet, text: full-match patterns for the UNet's paths and for the text encoders'; "" for none.
        blocks: the field of a family that narrows the UNet's further, or "".
    """

    unet: str
    text: str
    blocks: str = ""

    def pattern(self, part: str) -> re.Pattern[str] | None:
        """The pattern for a part, or None where nothing of it is adapted."""
        text = self.text if is_text_encoder(part) else self.unet
        return re.compile(text) if text else None

    def within(self, family: Family) -> "Targets":
        """The same set with the family's blocks written into the pattern.

        Raises:
            ConfigError: the family does not say which blocks those are.
        """
        if not self.blocks:
            return self
        blocks = getattr(family, self.blocks)
        if not blocks:
            raise ConfigError(
                f"Which blocks of the {family.title} carry what is not known, so adapter.targets cannot"
                " choose them; choose attention, kohya or locon."
            )
        return replace(self, unet=rf"(?=(?:{blocks})\Z)(?:{self.unet})", blocks="")


def named_targets(name: str, family: Family | None = None) -> Targets:
    """The set of layers that `adapter.targets` names, narrowed to the family's blocks where it asks for that.

    Raises:
        ConfigError: there is no such set, or not for this family.
    """
    row = chosen(TARGETS, name, "adapter.targets")
    targets = Targets(row.unet, row.text, row.blocks)
    return targets if family is None else targets.within(family)


ATTENTION, KOHYA, LOCON = (named_targets(name) for name in ("attention", "kohya", "locon"))


def canonical_path(part: str, path: str) -> str:
    """`path` as adapters name it: text encoders always with the `text_model.` level, which newer transformers
    dropped."""
    return TEXT_LEVEL + path.removeprefix(TEXT_LEVEL) if is_text_encoder(part) else path


# The original (ldm, sgm) names of the layers: single-file checkpoints use them for all weights, and SDXL's
# adapter files of the kohya format for the UNet. Sources: the original code of Stable Diffusion
# (ldm/modules/diffusionmodules/openaimodel.py and model.py) and of OpenCLIP (src/open_clip/transformer.py).

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
