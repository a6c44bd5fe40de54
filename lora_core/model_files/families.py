"""The model families as rows of data: what the files of a base do not say about themselves, which layers are
adapted, and what single files call the layers.

A config beside the weights always wins over a row. Nothing else in the project may branch on a family's name.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lora_core.errors import ConfigError, ModelFileError
from lora_core.settings.schema import TARGETS, chosen
from lora_core.system.files import read_table


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
        unet, text, vae: parameters of each; `encoder`: of the largest text encoder.
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
    encoder: int
    vae: int
    guided: int
    encode: int
    decode: int
    steps: Mapping[str, Sequence[int]]


@functools.cache
def _footprints() -> dict[str, Footprint]:
    """By `Family.configs`."""
    rows = read_table("families/footprints.toml")
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
        subject_blocks, style_blocks: regular expressions for the UNet paths that carry the subject, and the
        style.
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


def _family(name: str, text_encoders: list[dict[str, Any]], **row: Any) -> Family:
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in row.items()
    }
    return Family(name, text_encoders=tuple(TextEncoder(**encoder) for encoder in text_encoders), **fields)


FAMILIES = {name: _family(name, **row) for name, row in read_table("families/families.toml").items()}


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
                f"The subject and style blocks of the {family.title} are unknown, so adapter.targets cannot "
                f"select them; choose attention, kohya or locon."
            )
        return replace(self, unet=rf"(?=(?:{blocks})\Z)(?:{self.unet})", blocks="")


def named_targets(name: str, family: Family | None = None) -> Targets:
    """The set of layers that `adapter.targets` names, narrowed to the family's blocks where it asks for that.

    Raises:
        ConfigError: no such set, or not for this family.
    """
    row = chosen(TARGETS, name, "adapter.targets")
    targets = Targets(row.unet, row.text, row.blocks)
    return targets if family is None else targets.within(family)


ATTENTION, KOHYA, LOCON = (named_targets(name) for name in ("attention", "kohya", "locon"))


def canonical_path(part: str, path: str) -> str:
    """`path` as adapters name it: text encoders always with the `text_model.` level, which newer transformers
    dropped."""
    return TEXT_LEVEL + path.removeprefix(TEXT_LEVEL) if is_text_encoder(part) else path
