"""Proposes trigger words: short words that a base hardly reacts to.

A trigger should be the LoRA's own: a word that the base knows brings its old meaning along. How much a base
reacts to a word is measured by how far its prediction moves when the word is put before a caption, relative
to how far the words of other captions move it.
"""

import functools
import random
import string
from collections.abc import Sequence
from typing import Any

import torch

from lora_core.data.audit import words_of
from lora_core.data.captions import plain_caption, split_tags
from lora_core.data.scan import ImageRecord
from lora_core.errors import DatasetError
from lora_core.evaluate.validator import (
    Encode,
    EvalImage,
    OnProgress,
    encode_eval_image,
    standard_error,
)
from lora_core.models.encode import encode_prompt
from lora_core.models.load import BaseModel
from lora_core.models.unet import PromptEmbeds

MOST_TOKENS = 3
IMAGES = 4
_POOL, _KEPT, _KNOWN = 24, 8, 4
_INVENTED = 120
# Common choices; a base that has seen their images may know some of them.
_USUAL = ("ohwx", "zwx", "uhsx", "sks")
_CONSONANTS, _VOWELS = "bdfghjklmnprtvxzq", "aeiouy"
_SHAPES = ("cvccv", "cvcvc", "vccv", "ccvcc", "cvcc", "ccvc")
_KNOWS = 1.3


def propose_triggers(
    base: BaseModel,
    records: Sequence[ImageRecord],
    given: str = "",
    draws: int = 4,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Short words by how little the base reacts to them, the least first.

    Args:
        base: with no adapter in it.
        records: images with captions, of which a few are used.
        given: the current trigger word, "" for none; it is measured too.
        draws: noise draws per image.
        seed: of the candidates and the draws.
        on_progress: called after each measured word.

    Returns:
        `usual`: how far words of other captions move the prediction (root mean square); `rows`: `word`,
        `tokens`, `reaction` as a multiple of that, its `error` over images, `given`, `sentence`.

    Raises:
        DatasetError: there is no image, or no candidate is left.
    """
    if not records:
        raise DatasetError("Proposing a trigger word needs pictures; put some in.")
    some = random.Random(seed).sample(list(records), min(IMAGES, len(records)))
    pool = trigger_candidates(base, [record.caption for record in records], seed)
    known = _known_words(records, given)
    images = [
        encode_eval_image(base, record, plain_caption(record.caption, ""), draws, seed) for record in some
    ]
    measure = _Reactions(base, images, on_progress, len(pool) + 2 * _KEPT + len(known) + 1)
    # All of them with one image first, then the best.
    first = {word: float(measure.of(word, 1).mean()) for word in pool}
    best = sorted(first, key=first.__getitem__)[: 2 * _KEPT]
    usual = _usual(measure, known)
    moved = {word: measure.of(word) / usual for word in best}
    best = sorted(moved, key=lambda word: float(moved[word].mean()))[:_KEPT]
    rows = [_row(base, word, moved[word]) for word in best]
    if given.strip():
        own = measure.of(given.strip()) / usual
        rows.append(_given_row(_row(base, given.strip(), own), rows[0], own - moved[best[0]]))
    return {"usual": usual, "rows": sorted(rows, key=lambda row: float(row["reaction"]))}


def trigger_candidates(base: BaseModel, captions: Sequence[str], seed: int) -> list[str]:
    """Invented words and a few common choices with the fewest tokens, that are in no caption.

    Rare words of the vocabulary are excluded: they are names and abbreviations, which mean something to users
    even where a base does not know them.

    Raises:
        DatasetError: none is left.
    """
    taken = frozenset().union(*(words_of(caption) for caption in captions))
    draw = random.Random(seed)
    words = [*_USUAL, *(_invented(draw) for _ in range(_INVENTED))]
    short = {word: number for word in words if (number := num_tokens(base, word)) <= MOST_TOKENS}
    found = sorted((word for word in short if word not in taken), key=short.__getitem__)[:_POOL]
    if not found:
        raise DatasetError("Every short candidate is in a caption already; choose a trigger word yourself.")
    return found


def _invented(draw: random.Random) -> str:
    kinds = {"c": _CONSONANTS, "v": _VOWELS}
    return "".join(kinds[kind][int(draw.random() * len(kinds[kind]))] for kind in _choose(_SHAPES, draw))


def _choose(values: Sequence[str], draw: random.Random) -> str:
    return values[int(draw.random() * len(values))]


def num_tokens(base: BaseModel, word: str) -> int:
    """How many tokens a word has."""
    tokenizer = next(iter(base.tokenizers.values()))
    return len(tokenizer(word, add_special_tokens=False, truncation=False, verbose=False).input_ids)


def _known_words(records: Sequence[ImageRecord], given: str) -> list[str]:
    """First tags of captions, words that surely mean something."""
    own = given.strip().casefold()
    tags = []
    for record in records:
        captions = split_tags(plain_caption(record.caption, ""))
        tags.append(next((tag for tag in captions if tag.casefold() != own), ""))
    return list(dict.fromkeys(tag.strip(string.punctuation) for tag in tags if tag))[:_KNOWN]


class _Reactions:
    """How far a word moves the prediction, on fixed draws of a few images."""

    def __init__(
        self, base: BaseModel, images: list[EvalImage], on_progress: OnProgress | None, total: int
    ) -> None:
        self._base, self._images, self._on_progress = base, images, on_progress
        self._done, self._total = 0, total
        self._embeds: Encode = functools.lru_cache(maxsize=64)(self._encoded)
        self._without = [self._predict(image, image.caption) for image in images]

    def _encoded(self, caption: str) -> PromptEmbeds:
        with torch.no_grad():
            return encode_prompt(self._base, [caption])

    def of(self, word: str, count: int = IMAGES) -> torch.Tensor:
        """The root mean square of the change for each of the first `count` images, (count,)."""
        moved = []
        for image, without in zip(self._images[:count], self._without, strict=False):
            caption = f"{word}, {image.caption}" if image.caption else word
            change = self._predict(image, caption) - without
            moved.append(change.double().square().mean().sqrt())
        self._done += 1
        if self._on_progress is not None:
            self._on_progress(min(self._done, self._total), self._total)
        return torch.stack(moved)

    def _predict(self, image: EvalImage, caption: str) -> torch.Tensor:
        base, draws = self._base, image.draws
        noise, timesteps = draws.noise.to(base.device), draws.timesteps.to(base.device)
        noisy = base.noise.add_noise(image.latents.to(base.device).expand_as(noise), noise, timesteps)
        text = self._embeds(caption).expand(len(noise))
        sizes = None if image.sizes is None else image.sizes.expand(len(noise), -1)
        with torch.no_grad():
            return base.predict_noise(noisy, timesteps, text, sizes).cpu()


def _usual(measure: _Reactions, known: list[str]) -> float:
    """How far known words move the prediction; a common word where the captions have none."""
    moved = [float(measure.of(word).mean()) for word in known or ["photo"]]
    return max(sum(moved) / len(moved), 1e-12)


def _row(base: BaseModel, word: str, reaction: torch.Tensor) -> dict[str, Any]:
    mean, tokens = float(reaction.mean()), num_tokens(base, word)
    error = standard_error(reaction)
    count = "1 token" if tokens == 1 else f"{tokens} tokens"
    sentence = (
        f"“{word}” is {count} long and moves the base {mean:.2f} times as much as words of the captions do"
        f" (± {error:.2f})."
    )
    return {
        "word": word, "tokens": tokens, "reaction": mean, "error": error, "given": False, "sentence": sentence
    }  # fmt: skip


def _given_row(row: dict[str, Any], best: dict[str, Any], apart: torch.Tensor) -> dict[str, Any]:
    """The current word beside the best of the proposed ones; `apart` is how much more it moves each image."""
    error = standard_error(apart)
    known = float(apart.mean()) > 2 * error and row["reaction"] > _KNOWS * best["reaction"]
    more = (
        f" “{best['word']}” moves it less, {best['reaction']:.2f} times: what “{row['word']}” means to the"
        " base will mix with what you teach."
        if known
        else " The proposed ones are hardly better."
    )
    return {**row, "given": True, "sentence": row["sentence"] + more}
