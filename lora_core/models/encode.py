"""Pictures to latents and back, captions to what the UNet attends to."""

from dataclasses import dataclass
from typing import Any

import torch

from lora_core.models.load import BaseModel


@dataclass(frozen=True)
class TextCondition:
    """What the text encoders make of captions.

    Attributes:
        context: (B, T, D), the hidden states that the UNet attends to.
        pooled: (B, P), or None where the family has no pooled conditioning.
    """

    context: torch.Tensor
    pooled: torch.Tensor | None = None


def encoded_picture(base: BaseModel, pixels: torch.Tensor) -> torch.Tensor:
    """The latents of one picture: the mean of the VAE's posterior, as the UNet sees it.

    Args:
        base: the base model.
        pixels: (3, H, W) in [-1, 1].

    Returns:
        (4, H/f, W/f) in fp32 on the CPU. One picture at a time, so that its bits never depend on its
        neighbours.
    """
    with torch.no_grad():
        mean = base.vae.encode(pixels[None].to(base.vae.device, base.vae.dtype)).latent_dist.mean
    return ((mean - _shift(base)) * _scale(base))[0].float().cpu()


def decoded_latents(base: BaseModel, latents: torch.Tensor) -> torch.Tensor:
    """Pictures (B, 3, H, W) in [0, 1], fp32 on the CPU, from latents (B, 4, h, w)."""
    with torch.no_grad():
        unscaled = latents.to(base.vae.device, base.vae.dtype) / _scale(base) + _shift(base)
        pixels = base.vae.decode(unscaled).sample
    return (pixels.float() / 2 + 0.5).clamp(0, 1).cpu()


def _scale(base: BaseModel) -> float:
    return float(base.vae.config.get("scaling_factor", base.family.latent_scale))


def _shift(base: BaseModel) -> float:
    return float(base.vae.config.get("shift_factor") or 0.0)


def token_chunks(tokenizer: Any, caption: str, chunks: int) -> torch.Tensor:
    """A caption as (chunks, L) token ids, each chunk with its own begin, end and padding, as A1111 does.

    Args:
        tokenizer: a CLIP tokenizer; L is its length.
        caption: the text; what does not fit into all chunks is cut.
        chunks: how many.
    """
    length = int(tokenizer.model_max_length)
    room = length - 2
    ids = tokenizer(caption, add_special_tokens=False, truncation=False, verbose=False).input_ids[
        : room * chunks
    ]
    rows = []
    for start in range(0, room * chunks, room):
        body = ids[start : start + room]
        padding = [tokenizer.pad_token_id] * (room - len(body))
        rows.append([tokenizer.bos_token_id, *body, tokenizer.eos_token_id, *padding])
    return torch.tensor(rows)


def text_condition(
    base: BaseModel, captions: list[str], clip_skip: int = 1, tokens: int = 75
) -> TextCondition:
    """The text encoders' hidden states of `captions`; differentiable where an adapter is in them.

    Args:
        base: the base model.
        captions: B texts.
        clip_skip: which layer counted from the last is taken; the final layer norm follows it.
        tokens: 75, 150 or 225: one, two or three chunks, joined along T.
    """
    chunks = max(1, round(tokens / 75))
    contexts = []
    for encoder in base.family.text_encoders:
        ids = torch.cat(
            [token_chunks(base.tokenizers[encoder.part], caption, chunks) for caption in captions]
        )
        contexts.append(_hidden_states(base.text_encoders[encoder.part], ids.to(base.device), clip_skip))
    context = torch.cat(contexts, dim=-1)
    return TextCondition(context.reshape(len(captions), -1, context.shape[-1]))


def _hidden_states(encoder: Any, ids: torch.Tensor, clip_skip: int) -> torch.Tensor:
    if clip_skip == 1:
        return encoder(input_ids=ids).last_hidden_state
    states = encoder(input_ids=ids, output_hidden_states=True).hidden_states
    # transformers 5.6 took the `text_model` level out of CLIPTextModel.
    return getattr(encoder, "text_model", encoder).final_layer_norm(states[-min(clip_skip, len(states))])
