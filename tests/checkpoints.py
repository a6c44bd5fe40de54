"""Stable Diffusion checkpoints of true block layout with random weights, as folders and as single files.

They come in four sizes: "narrow", widths and depths cut down; "wordless", the same with the embedded base's
vocabulary, a tenth, where CLIP's words are not read; "deep", the true depth at cut widths; "full".
What is never cut is what tells a family: number and order of the blocks, width of the context, kinds of text
encoders. Single files carry the original names;
`tests/models/test_single_files.py` has diffusers read them back.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers.initialization import no_init_weights

from lora_core.model_files.families import FAMILIES, Family
from lora_core.model_files.ldm_names import ldm_unet_path, ldm_vae_path, open_clip_path
from lora_core.system.files import CLIP_TOKENIZER, FAMILY_CONFIGS

NARROW: dict[str, dict[str, Any]] = {
    "vae": {"block_out_channels": (32, 32, 32, 32)},
    "text_encoder": {"num_hidden_layers": 2, "intermediate_size": 48},
    "text_encoder_2": {"num_hidden_layers": 2, "intermediate_size": 48},
}
"""What is smaller than in truth, by component; `narrow_unet` has the UNet."""
ROWS = 4096
"""Of the vocabulary of the embedded base. Larger ones have their first rows again: drawing each takes longer
than writing them."""
DEPTHS = ("num_hidden_layers", "transformer_layers_per_block")


def narrow_unet(family: Family) -> dict[str, Any]:
    """A UNet config's changes: one transformer a block and few channels, 64 a head where the family says
    so."""
    levels = len(family.attention_levels)
    if family.name == "sd15":
        return {"block_out_channels": (32, 64, 64, 64), "attention_head_dim": 8}
    depth = {"transformer_layers_per_block": (1, 2, 2)} if levels == 3 else {}
    return {
        "block_out_channels": (64, 64, 128, 128)[:levels],
        "attention_head_dim": (1, 1, 2, 2)[:levels],
        **depth,
    }


def cut(family: Family, part: str, size: str) -> dict[str, Any]:
    """The changes to a component's true config."""
    if size == "full":
        return {}
    changes = narrow_unet(family) if part == "unet" else NARROW[part]
    if size == "wordless" and part.startswith("text_encoder"):
        changes = changes | {"vocab_size": ROWS}
    return {k: v for k, v in changes.items() if size != "deep" or k not in DEPTHS}


def components(
    family: Family, size: str = "narrow", seed: int = 0, device: str = "cpu", inputs: int = 4
) -> Iterator[tuple[str, Any]]:
    """Each component of a base with random weights, as (part, module), one at a time."""

    def config(part: str) -> dict[str, Any]:
        path = FAMILY_CONFIGS / family.configs / part / "config.json"
        return json.loads(path.read_text()) | cut(family, part, size)

    torch.manual_seed(seed)
    unet = config("unet") | {"sample_size": family.resolution // 8, "in_channels": inputs}
    yield "unet", _random(lambda: UNet2DConditionModel.from_config(unet), size, device)
    yield "vae", _random(lambda: AutoencoderKL.from_config(config("vae")), size, device)
    for encoder in family.text_encoders:
        kind = CLIPTextModelWithProjection if encoder.pooled else CLIPTextModel
        made = CLIPTextConfig(**config(encoder.part))
        yield encoder.part, _random(lambda kind=kind, made=made: kind(made), size, device)


def _random(build: Any, size: str, device: str) -> Any:
    """A module with random numbers, for full size in bf16: the true initialisation draws several times."""
    dtype = torch.bfloat16 if size == "full" else torch.float32
    with init_empty_weights(include_buffers=False), no_init_weights():
        module = build()
    for name, parameter in list(module.named_parameters()):
        bound = 0.04 if parameter.dim() < 2 or "embedding" in name else parameter[0].numel() ** -0.5
        shape = list(parameter.shape)
        if "token_embedding" in name:
            shape[0] = min(shape[0], ROWS)
        value = torch.empty(shape, dtype=dtype, device=device).uniform_(-bound, bound)
        if shape[0] < len(parameter):
            value = value[torch.arange(len(parameter), device=device) % ROWS]
        if "norm" in name and name.endswith("weight"):
            value.add_(1.0)
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, torch.nn.Parameter(value, requires_grad=False))
    return module.to(device).eval()


def scheduler_config(family: Family, **changes: Any) -> dict[str, Any]:
    config = json.loads((FAMILY_CONFIGS / family.configs / "scheduler" / "scheduler_config.json").read_text())
    return config | {"prediction_type": family.prediction} | changes


def write_folder(
    path: Path, name: str, dtype: torch.dtype = torch.float32, size: str = "narrow", seed: int = 0,
    inputs: int = 4,
) -> Path:  # fmt: skip
    """A diffusers folder of the family `name`, whose UNet has so many input channels."""
    family = FAMILIES[name]
    for part, module in components(family, size, seed, inputs=inputs):
        module.to(dtype).save_pretrained(path / part)
        if hasattr(module.config, "sample_size") and part == "unet":
            assert (
                json.loads((path / part / "config.json").read_text())["sample_size"] == family.resolution // 8
            )
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler_config(family)))
    index: dict[str, Any] = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    for encoder in family.text_encoders:
        shutil.copytree(CLIP_TOKENIZER, path / encoder.tokenizer)
        tokenizer = path / encoder.tokenizer / "tokenizer_config.json"
        tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"pad_token": encoder.pad_token}))
        kind = "CLIPTextModelWithProjection" if encoder.pooled else "CLIPTextModel"
        index |= {encoder.part: ["transformers", kind], encoder.tokenizer: ["transformers", "CLIPTokenizer"]}
    xl = len(family.text_encoders) > 1
    index["_class_name"] = "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    if not xl:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def original_names(part: str, state: dict[str, torch.Tensor], family: Family) -> dict[str, torch.Tensor]:
    """A component's weights under the names that single files have."""
    if part == "unet":
        return {
            f"model.diffusion_model.{ldm_unet_path(k, family.attention_levels)}": v for k, v in state.items()
        }
    if part == "vae":
        renamed = {f"first_stage_model.{ldm_vae_path(k, 4)}": v for k, v in state.items()}
        # Attention in the original VAE is made of 1 x 1 convolutions.
        return {k: v[:, :, None, None] if "attn_1" in k and v.dim() == 2 else v for k, v in renamed.items()}
    encoder = next(encoder for encoder in family.text_encoders if encoder.part == part)
    if not encoder.open_clip:
        return {
            encoder.single_file + "text_model." + k.removeprefix("text_model."): v for k, v in state.items()
        }
    found: dict[str, Any] = {}
    for key, tensor in state.items():
        path, third = open_clip_path(key)
        if third is None:
            found[path] = tensor.t() if path == "text_projection" else tensor
        else:
            found.setdefault(path, [None] * 3)[third] = tensor
    return {encoder.single_file + k: torch.cat(v) if isinstance(v, list) else v for k, v in found.items()}


def write_single(
    path: Path, name: str, dtype: torch.dtype = torch.float32, size: str = "narrow", seed: int = 0,
    markers: tuple[str, ...] = (), metadata: dict[str, str] | None = None, without: tuple[str, ...] = (),
    inputs: int = 4,
) -> Path:  # fmt: skip
    """A single-file checkpoint with the weights of `write_folder` of the same family and seed.

    Args:
        path: the file.
        name: of the family.
        dtype: of its numbers.
        size: "narrow", "wordless", "deep" or "full".
        seed: of the weights.
        markers: names of empty tensors, such as "v_pred".
        metadata: texts of the header.
        without: components to leave out.
        inputs: input channels of the UNet.
    """
    family = FAMILIES[name]
    tensors: dict[str, torch.Tensor] = {}
    for part, module in components(family, size, seed, inputs=inputs):
        if part not in without:
            tensors |= original_names(part, {k: v.to(dtype) for k, v in module.state_dict().items()}, family)
    tensors |= {marker: torch.tensor([]) for marker in markers}
    state = {key: tensor.contiguous() for key, tensor in tensors.items()}
    if path.suffix == ".ckpt":
        torch.save({"state_dict": state, "global_step": 7}, path)
    else:
        save_file(state, path, metadata)
    return path
