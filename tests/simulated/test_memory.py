"""What Stable Diffusion takes on a card at its true shapes, phase by phase, without a card or weights.

Bytes that torch's allocator would hold (bf16, VAE in fp32, rank 16, batch 1); the context and libraries take
about 0.8 GiB more on a real card.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import nn
from transformers.initialization import no_init_weights
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

from lora_core.lora.inject import inject
from lora_core.lora.layer import FlatParams, LoraSpec
from lora_core.model_files.families import FAMILIES, named_targets
from lora_core.models.load import BaseModel, streamline
from lora_core.models.unet import NoiseSchedule, PromptEmbeds
from lora_core.models.vae import decode_latents
from lora_core.settings.schema import LossSection
from lora_core.system.files import FAMILY_CONFIGS
from lora_core.train.loop import diffusion_loss, sample_noise
from lora_core.train.setup import set_train_mode
from tests.simulated.device import GIB, SimulatedDevice

# GiB. The first three are weights alone, the others peaks: the VAE alone while it encodes or decodes,
# the UNet alone in a step.
PHASES = ("unet", "text encoders", "vae", "encode", "decode", "step", "step with checkpointing")
MEMORY = {
    ("sd15", 512, "attention"): (1.60, 0.229, 0.312, 0.94, 1.06, 2.43, 1.88),
    ("sdxl", 1024, "kohya"): (4.78, 1.52, 0.312, 2.82, 3.31, 11.92, 6.17),
}
CLOSE = 0.01
"""By how much a peak may differ."""


def placed(module: Any, dtype: torch.dtype, card: SimulatedDevice) -> Any:
    """The module with weights of its shapes on the device, frozen."""
    for name, parameter in list(module.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        weight = torch.empty(parameter.shape, dtype=dtype, device=card.device)
        setattr(module.get_submodule(parent), leaf, nn.Parameter(weight, requires_grad=False))
    return module.to(card.device).eval()


def opened(family_name: str, card: SimulatedDevice) -> tuple[BaseModel, dict[str, Callable[[], None]]]:
    """A base of a family without weights, and what gives its parts theirs."""
    family = FAMILIES[family_name]
    configs, bf16 = FAMILY_CONFIGS / family.configs, torch.bfloat16
    with init_empty_weights(include_buffers=False), no_init_weights():
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(configs / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(configs / "vae"))
        encoders = {
            encoder.part: (CLIPTextModelWithProjection if encoder.pooled else CLIPTextModel)(
                CLIPTextConfig.from_pretrained(configs / encoder.part, local_files_only=True)
            )
            for encoder in family.text_encoders
        }
    base = BaseModel(
        name=family_name, path=configs, family=family, denoiser=unet, vae=vae, text_encoders=encoders,
        tokenizers={}, noise=NoiseSchedule.from_scheduler(DDPMScheduler()),
        device=card.device, dtype=bf16, facts=None,
    )  # fmt: skip
    parts = {
        "unet": lambda: placed(unet, bf16, card),
        "text encoders": lambda: [placed(encoder, bf16, card) for encoder in encoders.values()],
        "vae": lambda: placed(vae, torch.float32, card),
    }
    return base, parts


def stepping(base: BaseModel, side: int, targets: str, checkpointing: bool) -> Callable[[], None]:
    """A whole step of a base with an adapter in its UNet."""
    family = base.family
    layers = inject(base.modules, ["unet"], named_targets(targets, family), LoraSpec(16, 16.0), 0).layers
    streamline(base.denoiser)
    set_train_mode(base, checkpointing)
    storage = FlatParams([list(layers.values())])
    optimizer = torch.optim.AdamW(storage.groups, fused=True)
    width = base.denoiser.config["cross_attention_dim"]
    pooled = torch.randn(1, 1280) if family.size_conditioning else None
    text = PromptEmbeds(torch.randn(1, 77, width), pooled).to(base.device)
    latents = torch.zeros(1, 4, side // 8, side // 8)
    sizes = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32)

    def step() -> None:
        storage.zero_grad()
        draw = sample_noise(latents, base.noise.num_timesteps, LossSection(), torch.Generator())
        diffusion_loss(base, latents, text, draw, LossSection(), sizes).sum().backward()
        storage.flush_grads()
        norm = nn.utils.get_total_norm([storage.grads])
        nn.utils.clip_grads_with_norm_(storage.data, 1.0, norm)
        storage.step(optimizer)

    return step


@pytest.mark.parametrize(("family", "side", "targets"), MEMORY)
def test_each_phase_takes_the_memory_that_forecasts_assume(family: str, side: int, targets: str) -> None:
    found: dict[str, float] = {}
    with SimulatedDevice(gib=80, numbers=False) as card:
        base, parts = opened(family, card)

        def takes(phase: str, work: Callable[[], object], without: int = 0) -> None:
            card.clear()
            work()
            found[phase] = (card.peak - without) / GIB

        takes("vae", parts["vae"])
        takes("encode", lambda: base.encode_image(torch.zeros(3, side, side)))
        takes("decode", lambda: decode_latents(base, torch.zeros(1, 4, side // 8, side // 8)))
        base.vae = None  # type: ignore[assignment]
        del parts["vae"]
        takes("text encoders", parts["text encoders"], card.live)
        base.text_encoders.clear()
        del parts["text encoders"]
        takes("unet", parts["unet"], card.live)
        step = stepping(base, side, targets, checkpointing=False)
        for phase in ("step", "step with checkpointing"):
            step()
            takes(phase, step)
            set_train_mode(base, True)
    assert found == pytest.approx(dict(zip(PHASES, MEMORY[family, side, targets], strict=True)), rel=CLOSE)
