"""Words that a base hardly reacts to, proposed as trigger words.

A trigger should be the LoRA's own: a word that the base knows brings its old meaning along. How much a base
reacts to a word is told by how far its prediction moves when the word is put before a caption, next to how
far the words of other captions move it.
"""

import functools
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from lora_core.data.captions import split_tags
from lora_core.data.scan import ImageRecord
from lora_core.data.statistics import words_of
from lora_core.errors import DatasetError
from lora_core.evaluate.caption_scores import OnProgress, plain_caption
from lora_core.evaluate.validator import EvalImage, encode_eval_images
from lora_core.models.encode import encode_prompt
from lora_core.models.load import BaseModel
from lora_core.models.unet import PromptEmbeds

MOST_TOKENS = 3
PICTURES = 4
_POOL, _KEPT, _KNOWN = 24, 8, 4
_INVENTED = 120
# What many people take; a base that has seen their pictures may know some of them.
_USUAL = ("ohwx", "zwx", "uhsx", "sks")
_CONSONANTS, _VOWELS = "bdfghjklmnprtvxzq", "aeiouy"
_SHAPES = ("cvccv", "cvcvc", "vccv", "ccvcc", "cvcc", "ccvc")
_KNOWS = 1.3


def propose_triggers(
    base: BaseModel,
    records: Sequence[ImageRecord],
    given: str = "",
    triples: int = 4,
    seed: int = 0,
    said: OnProgress | None = None,
) -> dict[str, Any]:
    """Short words by how little the base reacts to them, the least first.

    Args:
        base: with no adapter in it.
        records: pictures with captions, of which the first few are used.
        given: the trigger word that is used now, "" for none; it is measured too.
        triples: looks a picture.
        seed: of the candidates and the looks.
        said: told how far it is.

    Returns:
        `usual`: how far words of other captions move the prediction (root mean square); `rows`: `word`,
        `tokens`, `reaction` as a multiple of that, its `error` over pictures, `given`, `sentence`.

    Raises:
        DatasetError: there is no picture, or no candidate is left.
    """
    if not records:
        raise DatasetError("Proposing a trigger word needs pictures; put some in.")
    some = random.Random(seed).sample(list(records), min(PICTURES, len(records)))
    pool = trigger_candidates(base, [record.caption for record in records], seed)
    known = _known_words(records, given)
    shots = [
        replace(one, caption=plain_caption(record.caption))
        for record in some
        for one in encode_eval_images(base, [record], triples, seed)
    ]
    measure = _Reactions(base, shots, said, len(pool) + 2 * _KEPT + len(known) + 1)
    # A first look at all of them with one picture, a second at the best.
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
    """Invented words and a few that many people use, of the fewest tokens, in no caption.

    Rare words of a vocabulary are no choice: they are names and abbreviations, and those mean something to
    people even where a base does not know them.

    Raises:
        DatasetError: none is left.
    """
    taken = frozenset().union(*(words_of(caption) for caption in captions))
    draw = random.Random(seed)
    words = [*_USUAL, *(_invented(draw) for _ in range(_INVENTED))]
    short = {word: number for word in words if (number := num_tokens(base, word)) <= MOST_TOKENS}
    found = sorted((word for word in short if word not in taken), key=short.__getitem__)[:_POOL]
    if not found:
        raise DatasetError("No short word is left that stands in no caption; choose a trigger word yourself.")
    return found


def _invented(draw: random.Random) -> str:
    kinds = {"c": _CONSONANTS, "v": _VOWELS}
    return "".join(kinds[kind][int(draw.random() * len(kinds[kind]))] for kind in _one(_SHAPES, draw))


def _one(values: Sequence[str], draw: random.Random) -> str:
    return values[int(draw.random() * len(values))]


def num_tokens(base: BaseModel, word: str) -> int:
    """How many tokens the base reads for a word."""
    tokenizer = next(iter(base.tokenizers.values()))
    return len(tokenizer(word, add_special_tokens=False, truncation=False, verbose=False).input_ids)


def _known_words(records: Sequence[ImageRecord], given: str) -> list[str]:
    """First tags of captions: words that surely mean something; "" where there are none."""
    own = given.strip().casefold()
    tags = [
        next((t for t in split_tags(plain_caption(r.caption)) if t.casefold() != own), "") for r in records
    ]
    return list(dict.fromkeys(tag.strip(string.punctuation) for tag in tags if tag))[:_KNOWN]


class _Reactions:
    """How far a word moves the prediction, on fixed looks at a few pictures."""

    def __init__(self, base: BaseModel, shots: list[EvalImage], said: OnProgress | None, total: int) -> None:
        self._base, self._shots, self._said = base, shots, said
        self._done, self._total = 0, total
        self._condition: Callable[[str], PromptEmbeds] = functools.lru_cache(maxsize=64)(self._encoded)
        self._without = [self._prediction(shot, shot.caption) for shot in shots]

    def _encoded(self, caption: str) -> PromptEmbeds:
        with torch.no_grad():
            return encode_prompt(self._base, [caption])

    def of(self, word: str, pictures: int = PICTURES) -> torch.Tensor:
        """Root mean square of the change for each of the first pictures, (P,)."""
        moved = []
        for shot, without in zip(self._shots[:pictures], self._without, strict=False):
            caption = f"{word}, {shot.caption}" if shot.caption else word
            change = self._prediction(shot, caption) - without
            moved.append(change.double().square().mean().sqrt())
        self._done += 1
        if self._said is not None:
            self._said(min(self._done, self._total), self._total)
        return torch.stack(moved)

    def _prediction(self, shot: EvalImage, caption: str) -> torch.Tensor:
        base, looks = self._base, shot.looks
        noise, timesteps = looks.noise.to(base.device), looks.timesteps.to(base.device)
        noisy = base.noise.add_noise(shot.latents.to(base.device).expand_as(noise), noise, timesteps)
        text = self._condition(caption).expand(len(noise))
        sizes = None if shot.sizes is None else shot.sizes.expand(len(noise), -1)
        with torch.no_grad():
            return base.predict_noise(noisy, timesteps, text, sizes).cpu()


def _usual(measure: _Reactions, known: list[str]) -> float:
    """How far known words move it; a plain one where the captions have none."""
    moved = [float(measure.of(word).mean()) for word in known or ["photo"]]
    return max(sum(moved) / len(moved), 1e-12)


def _row(base: BaseModel, word: str, reaction: torch.Tensor) -> dict[str, Any]:
    mean, tokens = float(reaction.mean()), num_tokens(base, word)
    error = float(reaction.std() / len(reaction) ** 0.5) if len(reaction) > 1 else 0.0
    count = "1 token" if tokens == 1 else f"{tokens} tokens"
    sentence = (
        f"“{word}” is {count} long and moves the base {mean:.2f} times as much as words of the captions do"
        f" (± {error:.2f})."
    )
    return {
        "word": word, "tokens": tokens, "reaction": mean, "error": error, "given": False, "sentence": sentence
    }  # fmt: skip


def _given_row(row: dict[str, Any], best: dict[str, Any], apart: torch.Tensor) -> dict[str, Any]:
    """The word that is used now, beside the best of the proposed ones; `apart` is by how much it moves each
    picture more."""
    error = float(apart.std() / len(apart) ** 0.5) if len(apart) > 1 else 0.0
    known = float(apart.mean()) > 2 * error and row["reaction"] > _KNOWS * best["reaction"]
    more = (
        f" “{best['word']}” moves it less, {best['reaction']:.2f} times: what “{row['word']}” means to the"
        " base will mix with what you teach."
        if known
        else " The proposed ones are hardly better."
    )
    return {**row, "given": True, "sentence": row["sentence"] + more}
