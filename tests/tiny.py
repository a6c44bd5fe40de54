"""Stable Diffusion models of true layout and toy size with random weights, built in code."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from lora_core.models.unet import NoiseSchedule
from lora_core.system.files import DEMO_BASE

TOKENIZER = DEMO_BASE / "tokenizer"


def tiny_unet(
    context_width: int = 32, attention_up: bool = True, in_channels: int = 4
) -> UNet2DConditionModel:
    """Two levels, attention in the outer one and in the middle, on the way up where asked for; proj_in and
    proj_out are 1x1 convolutions as in SD 1.x."""
    torch.manual_seed(1)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D" if attention_up else "UpBlock2D"),
        cross_attention_dim=context_width,
        attention_head_dim=2,
        norm_num_groups=8,
    )


def tiny_text_encoder(width: int = 32, vocabulary: int = 4096, layers: int = 2) -> CLIPTextModel:
    """The first layers of CLIP."""
    torch.manual_seed(2)
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return CLIPTextModel(config).eval()


def tiny_vae() -> AutoencoderKL:
    """Two levels: one latent stands for 2x2 pixels."""
    torch.manual_seed(3)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )


def tiny_folder(
    path: Path, context_width: int = 768, prediction: str = "epsilon", in_channels: int = 4
) -> Path:
    """A diffusers folder that looks like SD 1.x from outside: its context is 768 wide, its prediction
    epsilon. With one layer of text encoder and no attention on the way up: whole runs are trained on it."""
    vocabulary = len(json.loads((TOKENIZER / "vocab.json").read_text(encoding="utf-8")))
    tiny_unet(context_width, attention_up=False, in_channels=in_channels).save_pretrained(path / "unet")
    tiny_text_encoder(context_width, vocabulary, layers=1).save_pretrained(path / "text_encoder")
    tiny_vae().save_pretrained(path / "vae")
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        prediction_type=prediction,
    )
    scheduler.save_pretrained(path / "scheduler")
    shutil.copytree(TOKENIZER, path / "tokenizer")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def tiny_output(unet: torch.nn.Module) -> torch.Tensor:
    """What a tiny UNet predicts for one fixed input."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        latents = torch.randn(1, 4, 8, 8, generator=generator)
        width = unet.config["cross_attention_dim"]
        return unet(latents, torch.tensor([500]), torch.randn(1, 7, width, generator=generator)).sample


def flow_schedule(timesteps: int) -> NoiseSchedule:
    """Rectified flow: noisy = (1 - s) latents + s noise, with s = (t + 1) / T."""
    sigmas = torch.arange(1, timesteps + 1, dtype=torch.float64) / timesteps
    return NoiseSchedule(((1 - sigmas) ** 2 / ((1 - sigmas) ** 2 + sigmas**2)).float(), "flow")
