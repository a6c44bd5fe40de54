"""The model families as rows of data: what the files of a base model do not say about themselves.

A config that lies beside the weights always wins over a row. Nothing else in the project may branch on a
family's name.
"""

from dataclasses import dataclass

from lora_core.spec.errors import ModelFileError


@dataclass(frozen=True)
class TextEncoder:
    """One text encoder of a family.

    Attributes:
        part: the component's name in a diffusers folder, and in `AdapterWeights` keys.
        kohya_prefix: how adapter files of the kohya format begin its keys.
        width: hidden size, in channels.
        hidden: which hidden state conditions the UNet, "last" or "penultimate".
        pooled: whether its pooled projection conditions the UNet too.
    """

    part: str
    kohya_prefix: str
    width: int
    hidden: str = "last"
    pooled: bool = False


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: the row's key.
        title: what people call it.
        text_encoders: in the order in which their hidden states are joined.
        context_width: channels of the UNet's cross-attention; this is how a folder's family is told.
        resolution: the side, in pixels, that the base was trained at.
        latent_scale: the factor between VAE latents and what the UNet sees, where no VAE config says it.
        prediction: what the UNet predicts, where no scheduler config says it: "epsilon" or "v_prediction".
        size_conditioning: whether the UNet is told the picture's size and crop.
        kohya_block_names: "diffusers" or "ldm", the UNet block names in kohya files.
        base_version: the value of `ss_base_model_version` in files for this family.
        modelspec: the value of `modelspec.architecture` in files for this family.
        portable: whether files for this family are of use with bases that other tools have.
    """

    name: str
    title: str
    text_encoders: tuple[TextEncoder, ...]
    context_width: int
    resolution: int
    latent_scale: float
    prediction: str
    size_conditioning: bool
    kohya_block_names: str
    base_version: str
    modelspec: str
    portable: bool = True

    @property
    def parts(self) -> tuple[str, ...]:
        """The trainable components: the UNet first, then the text encoders."""
        return ("unet", *(encoder.part for encoder in self.text_encoders))


FAMILIES: dict[str, Family] = {
    "tiny": Family(
        name="tiny",
        title="Embedded tiny base",
        text_encoders=(TextEncoder("text_encoder", "lora_te", width=128),),
        context_width=128,
        resolution=128,
        latent_scale=0.18215,
        prediction="v_prediction",
        size_conditioning=False,
        kohya_block_names="diffusers",
        base_version="easel_tiny",
        modelspec="easel-tiny/lora",
        portable=False,
    ),
    "sd15": Family(
        name="sd15",
        title="Stable Diffusion 1.x",
        text_encoders=(TextEncoder("text_encoder", "lora_te", width=768),),
        context_width=768,
        resolution=512,
        latent_scale=0.18215,
        prediction="epsilon",
        size_conditioning=False,
        kohya_block_names="diffusers",
        base_version="sd_v1",
        modelspec="stable-diffusion-v1/lora",
    ),
}


def family_of_context_width(width: int) -> Family:
    """The family whose UNet attends to a context of `width` channels.

    Raises:
        ModelFileError: no family here has that width.
    """
    for family in FAMILIES.values():
        if family.context_width == width:
            return family
    known = ", ".join(f"{f.context_width} ({f.title})" for f in FAMILIES.values())
    raise ModelFileError(
        f"This base model attends to a text context {width} channels wide, which is no family that can be"
        f" trained here; known are {known}."
    )
