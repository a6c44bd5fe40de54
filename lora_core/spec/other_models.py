"""Model files that are no base for us, known by names and shapes of their tensors, so that each is refused by
its name."""

import re
from collections.abc import Mapping, Sequence

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
_CHANNELS = {
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


def refused_kind(shapes: Mapping[str, Sequence[int]]) -> str:
    """What a file is, for a sentence, if it is no Stable Diffusion text-to-image checkpoint; else ""."""
    for pattern, kind in _KINDS:
        if any(re.search(pattern, key) for key in shapes):
            return kind
    entry = shapes.get(_INPUT)
    if entry is not None and len(entry) == 4:
        return _CHANNELS.get(entry[1], f"a model with {entry[1]} input channels")
    if not any(key.startswith("model.diffusion_model.") for key in shapes):
        for pattern, kind in _PARTS:
            if any(re.search(pattern, key) for key in shapes):
                return kind
    return ""
