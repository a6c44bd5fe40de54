"""Captions to prompt embeddings: tokens in chunks, and the text encoders."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch

from lora_core.data.captions import CHUNK, COMMA, split_chunks
from lora_core.model_files.families import TextEncoder
from lora_core.models.load import BaseModel
from lora_core.models.unet import PromptEmbeds, to_device

PENULTIMATE = 2
"""The layer before the last, counted from the last."""

Encode = Callable[[BaseModel, TextEncoder, Sequence[Any], int, int], tuple[torch.Tensor, torch.Tensor | None]]
"""As `encode_captions`."""


@lru_cache(maxsize=4096)
def tokenize(tokenizer: Any, caption: str) -> list[int]:
    """Token ids; cached, since each caption is encoded many times."""
    found: list[int] = tokenizer(caption, add_special_tokens=False, truncation=False, verbose=False).input_ids
    return found


def token_chunks(tokenizer: Any, caption: str, chunks: int) -> torch.Tensor:
    """A caption as (chunks, 77) token ids; what does not fit is dropped."""
    comma = tokenizer.convert_tokens_to_ids(COMMA)
    return pad_chunks(tokenizer, split_chunks(tokenize(tokenizer, caption), comma, chunks), chunks)


def pad_chunks(tokenizer: Any, bodies: Sequence[list[int]], chunks: int) -> torch.Tensor:
    """At least (chunks, 77) token ids, each of `bodies` with its own begin, end and padding."""
    bodies = [*bodies, *[[]] * (chunks - len(bodies))]
    begin, end, padding = tokenizer.bos_token_id, tokenizer.eos_token_id, [tokenizer.pad_token_id]
    return torch.tensor([[begin, *body, end, *padding * (CHUNK - len(body))] for body in bodies])


def encode_prompt(
    base: BaseModel, captions: Sequence[str], clip_skip: int = 1, tokens: int = 75
) -> PromptEmbeds:
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
    base: BaseModel, batches: Sequence[Sequence[Any]], clip_skip: int = 1, tokens: int = 75,
    encode: Encode | None = None,
) -> list[PromptEmbeds]:  # fmt: skip
    """`encode_prompt` of each batch; each text encoder is moved to the device once for all of them. Prompts
    with weights bring a function in place of `encode_captions`."""
    chunks = max(1, round(tokens / CHUNK))
    contexts: list[list[torch.Tensor]] = [[] for _ in batches]
    pooled: list[torch.Tensor | None] = [None] * len(batches)
    for encoder in base.family.text_encoders:
        with base.on_device(encoder.part):
            for number, captions in enumerate(batches):
                hidden, projected = (encode or encode_captions)(base, encoder, captions, clip_skip, chunks)
                contexts[number].append(hidden)
                if projected is not None:
                    pooled[number] = projected.reshape(len(captions), chunks, -1)[:, 0]
    joined = [torch.cat(found, dim=-1) for found in contexts]
    return [
        PromptEmbeds(context.reshape(len(captions), -1, context.shape[-1]), first)
        for captions, context, first in zip(batches, joined, pooled, strict=True)
    ]


def encode_captions(
    base: BaseModel, encoder: TextEncoder, captions: Sequence[str], clip_skip: int, chunks: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The `hidden_states` of one text encoder for captions of `chunks` chunks each."""
    tokenizer = base.tokenizers[encoder.part]
    ids = torch.cat([token_chunks(tokenizer, caption, chunks) for caption in captions])
    return hidden_states(base, encoder, ids, clip_skip)


def hidden_states(
    base: BaseModel, encoder: TextEncoder, ids: torch.Tensor, clip_skip: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hidden states (B, 77, D) of the chosen layer for token ids (B, 77) on the CPU, and the pooled
    projection (B, P) or None."""
    module: Any = base.text_encoders[encoder.part]
    (ids,) = to_device(base.device, ids)
    if encoder.hidden == "last" and clip_skip == 1:
        output = module(input_ids=ids)
        return output.last_hidden_state, output.text_embeds if encoder.pooled else None
    output = module(input_ids=ids, output_hidden_states=True)
    least = PENULTIMATE if encoder.hidden == "penultimate" else 1
    hidden = output.hidden_states[-min(max(clip_skip, least), len(output.hidden_states))]
    if encoder.hidden == "last":
        # transformers 5.6 took the `text_model` level out of CLIPTextModel.
        hidden = getattr(module, "text_model", module).final_layer_norm(hidden)
    return hidden, output.text_embeds if encoder.pooled else None
