"""Captions to prompt embeddings: tokens in chunks, and the text encoders."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from lora_core.data.captions import CHUNK, COMMA, split_chunks
from lora_core.model_files.families import TextEncoder
from lora_core.models.load import BaseModel
from lora_core.models.unet import PromptEmbeds, to_device

PENULTIMATE = 2
"""The layer before the last, counted from the last."""


@lru_cache(maxsize=4096)
def _tokens(tokenizer: Any, caption: str) -> list[int]:
    """Token ids; cached, since each caption is encoded many times."""
    found: list[int] = tokenizer(caption, add_special_tokens=False, truncation=False, verbose=False).input_ids
    return found


def token_chunks(tokenizer: Any, caption: str, chunks: int) -> torch.Tensor:
    """A caption as (chunks, 77) token ids, each chunk with its own begin, end and padding; what does not fit
    is dropped."""
    bodies = split_chunks(_tokens(tokenizer, caption), tokenizer.convert_tokens_to_ids(COMMA), chunks)
    bodies += [[]] * (chunks - len(bodies))
    begin, end, padding = tokenizer.bos_token_id, tokenizer.eos_token_id, [tokenizer.pad_token_id]
    return torch.tensor([[begin, *body, end, *padding * (CHUNK - len(body))] for body in bodies])


def encode_prompt(base: BaseModel, captions: list[str], clip_skip: int = 1, tokens: int = 75) -> PromptEmbeds:
    """The text encoders' hidden states of `captions`; differentiable where an adapter is in them.

    Longer captions go through the encoders in chunks whose hidden states are joined along T; the pooled
    projection is the first chunk's, as in A1111.

    Args:
        captions: B texts.
        clip_skip: which layer, counted from the last. Families conditioned on the last one apply the final
            layer norm; those conditioned on the penultimate, number 2, do not, and never take a later one.
        tokens: 75, 150 or 225: one, two or three chunks, joined along T.
    """
    return encode_batches(base, [captions], clip_skip, tokens)[0]


def encode_batches(
    base: BaseModel, batches: Sequence[list[str]], clip_skip: int = 1, tokens: int = 75
) -> list[PromptEmbeds]:
    """`encode_prompt` of each batch; each text encoder is moved to the device once for all of them."""
    chunks = max(1, round(tokens / CHUNK))
    contexts: list[list[torch.Tensor]] = [[] for _ in batches]
    pooled: list[torch.Tensor | None] = [None] * len(batches)
    for encoder in base.family.text_encoders:
        module, tokenizer = base.text_encoders[encoder.part], base.tokenizers[encoder.part]
        with base.on_device(encoder.part):
            for number, captions in enumerate(batches):
                ids = torch.cat([token_chunks(tokenizer, caption, chunks) for caption in captions])
                (ids,) = to_device(base.device, ids)
                hidden, projected = _hidden_states(module, encoder, ids, clip_skip)
                contexts[number].append(hidden)
                if projected is not None:
                    pooled[number] = projected.reshape(len(captions), chunks, -1)[:, 0]
    joined = [torch.cat(found, dim=-1) for found in contexts]
    return [
        PromptEmbeds(context.reshape(len(captions), -1, context.shape[-1]), first)
        for captions, context, first in zip(batches, joined, pooled, strict=True)
    ]


def encode_negative_prompt(base: BaseModel, words: str, clip_skip: int = 1, tokens: int = 75) -> PromptEmbeds:
    """Encode a negative prompt; an empty one to zeros, where the family was trained so."""
    return as_negative_prompt(base, words, encode_prompt(base, [words], clip_skip, tokens))


def as_negative_prompt(base: BaseModel, words: str, embeds: PromptEmbeds) -> PromptEmbeds:
    """`embeds` of `words` as a negative prompt."""
    if words.strip() or not base.family.zero_negative:
        return embeds
    pooled = None if embeds.pooled is None else torch.zeros_like(embeds.pooled)
    return PromptEmbeds(torch.zeros_like(embeds.context), pooled)


def _hidden_states(
    module: Any, encoder: TextEncoder, ids: torch.Tensor, clip_skip: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hidden states (B, T, D) of the chosen layer, and the pooled projection (B, P) or None."""
    if encoder.hidden == "last" and clip_skip == 1:
        output = module(input_ids=ids)
        return output.last_hidden_state, output.text_embeds if encoder.pooled else None
    output = module(input_ids=ids, output_hidden_states=True)
    states = output.hidden_states
    least = PENULTIMATE if encoder.hidden == "penultimate" else 1
    hidden = states[-min(max(clip_skip, least), len(states))]
    if encoder.hidden == "last":
        # transformers 5.6 took the `text_model` level out of CLIPTextModel.
        hidden = getattr(module, "text_model", module).final_layer_norm(hidden)
    return hidden, output.text_embeds if encoder.pooled else None
