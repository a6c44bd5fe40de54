"""What each family takes of a card, at its true shapes: python -m tests.simulated.footprints

Prints what `assets/families/footprints.toml` holds, in some minutes: every layer runs, without
values.
"""

import gc
import sys
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from transformers.initialization import no_init_weights
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

from lora_core.backends.compact import BLOCKS
from lora_core.lora.inject import inject
from lora_core.lora.layer import FlatParams, LoraSpec
from lora_core.model_files.families import FAMILIES, Family, named_targets
from lora_core.settings.schema import TARGETS
from lora_core.system.files import FAMILY_CONFIGS
from tests.simulated.device import SimulatedDevice

RANKS = (16, 64)


def on_card(module: Any, dtype: torch.dtype) -> Any:
    """`module`, built without weights, with weights on the card."""
    for name, parameter in list(module.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        weight = torch.empty(parameter.shape, dtype=dtype, device="cuda")
        setattr(module.get_submodule(parent), leaf, nn.Parameter(weight, requires_grad=False))
    return module


def components(family: Family) -> tuple[Any, Any, list[Any]]:
    """UNet, VAE and text encoders without weights."""
    root = FAMILY_CONFIGS / family.configs
    with init_empty_weights(include_buffers=False), no_init_weights():
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(root / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(root / "vae"))
        encoders = []
        for encoder in family.text_encoders:
            kind: Any = CLIPTextModelWithProjection if encoder.pooled else CLIPTextModel
            config = CLIPTextConfig.from_pretrained(root / encoder.part, local_files_only=True)
            encoders.append(kind(config))
    return unet, vae, encoders


def inputs(unet: Any, side: int, rows: int) -> dict[str, Any]:
    """What the UNet takes for `rows` images of `side` pixels."""
    config, half = unet.config, torch.bfloat16
    more = {}
    if config.get("addition_embed_type") == "text_time":
        pooled = torch.zeros(rows, 1280, dtype=half, device="cuda")
        more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": torch.ones(rows, 6, device="cuda")}}
    return {
        "sample": torch.zeros(rows, 4, side // 8, side // 8, dtype=half, device="cuda"),
        "timestep": torch.ones(rows, device="cuda"),
        "encoder_hidden_states": torch.zeros(rows, 77, config.cross_attention_dim, dtype=half, device="cuda"),
        "return_dict": False,
        **more,
    }


def step_bytes(family: Family, targets: str, rank: int, checkpointing: bool) -> int:
    """Bytes that a step of one image takes besides what is there between two steps."""
    with SimulatedDevice(gib=200, numbers=False) as card:
        unet = on_card(components(family)[0], torch.bfloat16).train()
        given = inputs(unet, family.resolution, 1)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        injected = inject(
            {"unet": unet}, ["unet"], named_targets(targets, family), LoraSpec(rank, float(rank)), 0
        )
        storage = FlatParams([list(injected.layers.values())])
        storage.cast(torch.bfloat16)
        gc.collect()
        card.clear()
        before = card.live
        unet(**given)[0].float().square().mean().backward()
        return card.peak - before


def forward_bytes(card: SimulatedDevice, module: Any, *given: Any, **more: Any) -> int:
    """Bytes that a call takes without gradients."""
    card.clear()
    before = card.live
    with torch.no_grad():
        module(*given, **more)
    return card.peak - before


def footprint(family: Family) -> dict[str, Any]:
    """A family's row."""
    side = family.resolution
    pixels = (side // 8) ** 2
    unet, vae, encoders = components(family)
    blocks = [
        layer.weight.numel()
        for name, layer in unet.named_modules()
        if name.startswith(BLOCKS) and type(layer) in (nn.Linear, nn.Conv2d)
    ]
    row: dict[str, Any] = {
        "unet": sum(p.numel() for p in unet.parameters()),
        "blocks": sum(blocks),
        "largest": max(blocks),
        "text": sum(p.numel() for encoder in encoders for p in encoder.parameters()),
        "encoder": max(sum(p.numel() for p in encoder.parameters()) for encoder in encoders),
        "vae": sum(p.numel() for p in vae.parameters()),
    }
    with SimulatedDevice(gib=200, numbers=False) as card:
        given = inputs(on_card(unet, torch.bfloat16), side, 2)
        row["guided"] = forward_bytes(card, unet, **given) // (2 * pixels)
        on_card(vae, torch.float32)
        image = torch.zeros(1, 3, side, side, device="cuda")
        row["encode"] = forward_bytes(card, vae.encode, image) // pixels
        latents = torch.zeros(1, 4, side // 8, side // 8, device="cuda")
        row["decode"] = forward_bytes(card, vae.decode, latents) // pixels
        del given, image, latents, unet, vae
    steps = {}
    for targets in TARGETS:
        if targets != "subject":
            plain, larger = (step_bytes(family, targets, rank, False) // pixels for rank in RANKS)
            checkpointed = step_bytes(family, targets, RANKS[0], True) // pixels
            steps[targets] = (plain, (larger - plain) // (RANKS[1] - RANKS[0]), checkpointed)
    return {**row, "steps": steps}


if __name__ == "__main__":
    for configs in dict.fromkeys(family.configs for family in FAMILIES.values()):
        if sys.argv[1:] and configs not in sys.argv[1:]:
            continue
        first = next(family for family in FAMILIES.values() if family.configs == configs)
        print(configs, footprint(first), flush=True)  # noqa: T201
