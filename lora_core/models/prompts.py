"""Prompts of images, beside captions: their weights and BREAK, as A1111 has them, the negative prompt, and
words that no vocabulary has."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from lora_core.data.captions import BREAK, CHUNK, COMMA, Prompt, check_prompt, parse_prompt, split_chunks
from lora_core.model_files.families import TextEncoder
from lora_core.models.encode import encode_batches, hidden_states, pad_chunks, token_chunks, tokenize
from lora_core.models.load import BaseModel
from lora_core.models.unet import PromptEmbeds, to_device


class TokenizerWithTokens:
    """A tokenizer that knows words beside its vocabulary, each as a row of negative ids, one for each vector.

    A word is found by the ids that the tokenizer has for it, as A1111 finds embeddings, so that it needs no
    place in the vocabulary and is found in any case. Negative ids leave the end mark the highest one, by
    which old CLIP configs find it.
    """

    def __init__(self, plain: Any, vectors: Mapping[str, int]) -> None:
        """`plain` is the base's tokenizer, `vectors` how many each word has; their ids are -1, -2, ..."""
        self.plain = plain
        self._found: list[tuple[list[int], list[int]]] = []
        last = 0
        for word, count in vectors.items():
            self._found.append((self._plain_ids(word), list(range(last - 1, last - 1 - count, -1))))
            last -= count
        self._found.sort(key=lambda pair: -len(pair[0]))

    def __getattr__(self, name: str) -> Any:
        """All else is the plain tokenizer's."""
        return getattr(self.plain, name)

    def __call__(self, text: str, **options: Any) -> SimpleNamespace:
        """The `input_ids` of a text without marks of begin and end; more is not read here."""
        left, ids = self._plain_ids(text), []
        while left:
            pairs = ((own, new) for own, new in self._found if own and left[: len(own)] == own)
            own, new = next(pairs, (left[:1], left[:1]))
            ids += new
            left = left[len(own) :]
        return SimpleNamespace(input_ids=ids)

    def _plain_ids(self, text: str) -> list[int]:
        found: list[int] = self.plain(
            text, add_special_tokens=False, truncation=False, verbose=False
        ).input_ids
        return list(found)


def weighted_chunks(
    tokenizer: Any, prompt: str | Prompt, chunks: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A prompt as at least (chunks, 77) token ids, and their weights, 1 for begin, end and padding; None for
    text without any."""
    if isinstance(prompt, str):
        return token_chunks(tokenizer, prompt, chunks), None
    bodies = _bodies(tokenizer, prompt)
    ids = pad_chunks(tokenizer, [body for body, _ in bodies], chunks)
    weights = torch.ones(chunks, CHUNK + 2)
    for row, (_, own) in zip(weights, bodies, strict=False):
        row[1 : 1 + len(own)] = torch.tensor(own)
    return ids, weights


def _bodies(tokenizer: Any, prompt: Prompt) -> list[tuple[list[int], list[float]]]:
    """The token ids and weights of each chunk."""
    comma = tokenizer.convert_tokens_to_ids(COMMA)
    parts: list[tuple[list[int], list[float]]] = [([], [])]
    for words, weight in prompt:
        if (words, weight) == BREAK:
            parts.append(([], []))
            continue
        ids = tokenize(tokenizer, words)
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


def encode_weighted(
    base: BaseModel, prompts: Sequence[str | Prompt], clip_skip: int = 1, tokens: int = 75
) -> PromptEmbeds:
    """`encode_prompt` of prompts, which may have weights."""
    return encode_batches(base, [prompts], clip_skip, tokens, _encode)[0]


def _encode(
    base: BaseModel, encoder: TextEncoder, prompts: Sequence[str | Prompt], clip_skip: int, chunks: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    found = [weighted_chunks(base.tokenizers[encoder.part], prompt, chunks) for prompt in prompts]
    hidden, pooled = hidden_states(base, encoder, torch.cat([ids for ids, _ in found]), clip_skip)
    if all(weights is None for _, weights in found):
        return hidden, pooled
    weights = [torch.ones(ids.shape) if given is None else given for ids, given in found]
    return apply_weights(hidden, *to_device(base.device, torch.cat(weights))), pooled


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
    needed = [len(_bodies(one, prompt)) for one in base.tokenizers.values() for prompt in weighted]
    return parsed, CHUNK * max(1, round(tokens / CHUNK), *needed)


@torch.no_grad()
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
    text, without = encode_batches(base, [[one] for one in parsed], clip_skip, length, _encode)
    return text, as_negative_prompt(base, negative, without)


def as_negative_prompt(base: BaseModel, words: str, embeds: PromptEmbeds) -> PromptEmbeds:
    """`embeds` of `words` as a negative prompt."""
    if words.strip() or not base.family.zero_negative:
        return embeds
    pooled = None if embeds.pooled is None else torch.zeros_like(embeds.pooled)
    return PromptEmbeds(torch.zeros_like(embeds.context), pooled)
