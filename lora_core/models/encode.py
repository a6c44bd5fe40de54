"""Captions and prompts to prompt embeddings: tokens in chunks, the text encoders, and weights."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from lora_core.data.captions import (
    BREAK,
    CHUNK,
    COMMA,
    Prompt,
    check_prompt,
    parse_prompt,
    split_chunks,
)
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


def token_chunks(tokenizer: Any, caption: str | Prompt, chunks: int) -> torch.Tensor:
    """A caption as (chunks, 77) token ids, each chunk with its own begin, end and padding; what does not fit
    is dropped."""
    bodies = [ids for ids, _ in _bodies(tokenizer, caption, chunks)]
    bodies += [[]] * (chunks - len(bodies))
    begin, end, padding = tokenizer.bos_token_id, tokenizer.eos_token_id, [tokenizer.pad_token_id]
    return torch.tensor([[begin, *body, end, *padding * (CHUNK - len(body))] for body in bodies])


def token_weights(tokenizer: Any, caption: str | Prompt, chunks: int) -> torch.Tensor:
    """The weights (chunks, 77) of `token_chunks`, 1 for begin, end and padding."""
    weights = torch.ones(chunks, CHUNK + 2)
    for row, (_, own) in zip(weights, _bodies(tokenizer, caption, chunks), strict=False):
        row[1 : 1 + len(own)] = torch.tensor(own)
    return weights


def _bodies(tokenizer: Any, caption: str | Prompt, chunks: int) -> list[tuple[list[int], list[float]]]:
    """The token ids and weights of each chunk: at most `chunks` of a caption, all of a prompt."""
    comma = tokenizer.convert_tokens_to_ids(COMMA)
    if isinstance(caption, str):
        return [(ids, [1.0] * len(ids)) for ids in split_chunks(_tokens(tokenizer, caption), comma, chunks)]
    parts: list[tuple[list[int], list[float]]] = [([], [])]
    for words, weight in caption:
        if (words, weight) == BREAK:
            parts.append(([], []))
            continue
        ids = _tokens(tokenizer, words)
        parts[-1][0].extend(ids)
        parts[-1][1].extend([weight] * len(ids))
    if len(parts) > 1 and not parts[-1][0]:
        parts.pop()
    found = []
    for ids, weights in parts:
        for row in split_chunks(ids, comma, len(ids) + 1):
            found.append((row, weights[: len(row)]))
            weights = weights[len(row) :]
    return found


def encode_prompt(
    base: BaseModel, captions: Sequence[str | Prompt], clip_skip: int = 1, tokens: int = 75
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
    base: BaseModel, batches: Sequence[Sequence[str | Prompt]], clip_skip: int = 1, tokens: int = 75
) -> list[PromptEmbeds]:
    """`encode_prompt` of each batch, with the weights that prompts have; each text encoder is moved to the
    device once for all of them."""
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
                if not all(isinstance(caption, str) for caption in captions):
                    weights = torch.cat([token_weights(tokenizer, caption, chunks) for caption in captions])
                    hidden = apply_weights(hidden, *to_device(base.device, weights))
                contexts[number].append(hidden)
                if projected is not None:
                    pooled[number] = projected.reshape(len(captions), chunks, -1)[:, 0]
    joined = [torch.cat(found, dim=-1) for found in contexts]
    return [
        PromptEmbeds(context.reshape(len(captions), -1, context.shape[-1]), first)
        for captions, context, first in zip(batches, joined, pooled, strict=True)
    ]


def apply_weights(hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Hidden states (chunks, T, D) times the weights (chunks, T) of their tokens, scaled back to the mean of
    each chunk.

    Source: A1111's `sd_emphasis.py`, its default "Original". The pooled projection has no weights there.
    """
    plain = hidden.float()
    weighted = plain * weights[..., None]
    wanted, given = (each.mean((1, 2), keepdim=True) for each in (plain, weighted))
    return (weighted * (wanted / given)).to(hidden.dtype)


def parse_prompts(base: BaseModel, prompts: Sequence[str], tokens: int) -> tuple[list[str | Prompt], int]:
    """The prompts of one image, parsed, and the length that holds all of them: `tokens`, or where weights or
    BREAK need more chunks, as many as the longest has.

    Shorter ones get empty chunks, as with A1111's option to pad both prompts to the same length.
    """
    parsed = [parse_prompt(prompt) for prompt in prompts]
    weighted = [prompt for prompt in parsed if not isinstance(prompt, str)]
    needed = [len(_bodies(one, prompt, 0)) for one in base.tokenizers.values() for prompt in weighted]
    return parsed, CHUNK * max(1, round(tokens / CHUNK), *needed)


def encode_prompts(
    base: BaseModel, prompt: str, negative: str = "", clip_skip: int = 1, tokens: int = 75
) -> tuple[PromptEmbeds, PromptEmbeds]:
    """The prompt and the negative prompt of an image, with the syntax of `parse_prompt`, B = 1 and of one
    length.

    Raises:
        ConfigError: something in them cannot be read.
    """
    check_prompt(prompt)
    check_prompt(negative)
    parsed, length = parse_prompts(base, (prompt, negative), tokens)
    text, without = encode_batches(base, [[one] for one in parsed], clip_skip, length)
    return text, as_negative_prompt(base, negative, without)


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
