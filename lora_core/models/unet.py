"""The one place that calls the UNet."""

import torch

from lora_core.models.encode import PromptEmbeds
from lora_core.models.load import BaseModel


def predict_noise(
    base: BaseModel,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    text: PromptEmbeds,
    sizes: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the UNet predicts, (B, 4, h, w) in fp32.

    Args:
        base: the base model, with whatever adapter is in it.
        noisy_latents: (B, 4, h, w) in any number format.
        timesteps: (B,).
        text: the captions' condition, B of them.
        sizes: (B, 6), for families that are told the picture's size: original height and width, top and left
            of the crop, height and width after it, all in pixels (Podell et al. 2023, section 2.2). None is a
            picture made at just this size.
    """
    dtype = base.dtype
    more = {}
    if base.family.size_conditioning:
        assert text.pooled is not None
        if sizes is None:
            height, width = (side * base.vae_scale_factor for side in noisy_latents.shape[-2:])
            sizes = default_time_ids(len(noisy_latents), height, width)
        more["added_cond_kwargs"] = {
            "text_embeds": text.pooled.to(dtype),
            "time_ids": sizes.to(noisy_latents.device),
        }
    output = base.unet(
        noisy_latents.to(dtype), timesteps, encoder_hidden_states=text.context.to(dtype), return_dict=False,
        **more,
    )  # fmt: skip
    return output[0].float()


def default_time_ids(count: int, height: int, width: int) -> torch.Tensor:
    """The sizes (count, 6) of uncropped pictures of `height` and `width` pixels."""
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).expand(count, -1)
