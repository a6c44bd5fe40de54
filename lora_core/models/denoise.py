"""The one place that calls the UNet."""

import torch

from lora_core.models.encode import TextCondition
from lora_core.models.load import BaseModel


def prediction(
    base: BaseModel, noisy_latents: torch.Tensor, timesteps: torch.Tensor, text: TextCondition
) -> torch.Tensor:
    """What the UNet predicts, (B, 4, h, w) in fp32.

    Args:
        base: the base model, with whatever adapter is in it.
        noisy_latents: (B, 4, h, w) in any number format.
        timesteps: (B,).
        text: the captions' condition, B of them.
    """
    dtype = base.dtype
    output = base.unet(
        noisy_latents.to(dtype), timesteps, encoder_hidden_states=text.context.to(dtype), return_dict=False
    )
    return output[0].float()
