"""How well captions fit by the base's own loss: it predicts an image better with a caption that fits.

All captions are measured on the same draws of an image, so that differences are paired. An image is compared
with a few captions of other images first; only where its own does not stand out are all of them tried, and
the best of those is measured again on fresh draws, because the best of many is partly luck.
"""

import functools
import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lora_core.data.captions import plain_caption
from lora_core.data.images import hash_file
from lora_core.data.scan import ImageRecord
from lora_core.errors import DatasetError
from lora_core.evaluate.validator import (
    EvalImage,
    OnProgress,
    encode_eval_image,
    eval_losses,
    eval_noise,
    standard_error,
)
from lora_core.models.encode import encode_prompt
from lora_core.models.load import BaseModel
from lora_core.models.unet import PromptEmbeds

OTHERS = 6
"""Captions of other images that every image is compared with."""
MOST_OTHERS = 100
_LEAST_TRIED, _MOST_TRIED, _TRIED_SHARE = 2, 24, 0.15
_STANDS_OUT = 0.5
"""Of the median: a caption that fits less than this is compared with all others."""
_CLEARLY = 2.0
_MATTERS, _VAGUE = 0.25, 0.15
_QUOTED = 60


@dataclass(frozen=True)
class _Difference:
    """A mean difference of losses on the same draws, and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, worse: torch.Tensor, own: torch.Tensor) -> "_Difference":
        """Of losses on the same draws, (K,) each, or (n, K) that are averaged."""
        values = worse.reshape(-1, len(own)).mean(0) - own
        return cls(float(values.mean()), standard_error(values))


def score_captions(
    base: BaseModel,
    records: Sequence[ImageRecord],
    draws: int = 4,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """How well each caption fits its image by the base's own loss, the worst first.

    Args:
        base: with no adapter in it.
        records: images; those without a caption are left out.
        draws: noise draws per image; doubtful ones are measured again with twice as many.
        seed: of the draws and of which captions are compared.
        on_progress: called after each measured caption.

    Returns:
        `triples`; `helped` and `standard_error`: how much lower the loss is with captions than without, over
        all images; `rows`: `picture`, `caption`, `loss`, `helped` (by its caption) with `helped_error`,
        `fits` (how much lower the loss is than with others' captions) with `fits_error`, `suspect`,
        `sentence`, and, where another caption fits better, `better`: its image, `caption`, `by`, `error`.

    Raises:
        DatasetError: fewer than two images have captions, or all have the same one.
    """
    records = [record for record in records if plain_caption(record.caption, "")]
    captions = [plain_caption(record.caption, "") for record in records]
    if len(set(captions)) < 2:
        raise DatasetError(
            "Checking captions needs at least two pictures with different captions; write some first."
        )
    tried = max(_LEAST_TRIED, min(_MOST_TRIED, round(_TRIED_SHARE * len(records))))
    ahead = tried * (min(MOST_OTHERS, len(set(captions))) + 1)
    counter = _Counter(on_progress, len(records) * (3 + min(OTHERS, len(set(captions)) - 1)) + ahead)
    images = []
    for record, caption in zip(records, captions, strict=True):
        images.append(encode_eval_image(base, record, caption, draws, seed))
        counter()
    losses = _Losses(base, counter)
    first = []
    for number, image in enumerate(images):
        others = _others(captions, captions[number], random.Random(f"{seed}/{number}"))[:OTHERS]
        first.append(_First(image, losses.of(image, [image.caption, "", *others])))
    doubtful = _doubtful([one.fits.mean for one in first], tried)
    rows = []
    for number, (record, one) in enumerate(zip(records, first, strict=True)):
        row = _row(record, one)
        if number in doubtful:
            others = _others(captions, captions[number], random.Random(f"{seed}/{number}"))[:MOST_OTHERS]
            row["better"] = _better(record, one.image, others, losses, seed)
        rows.append(row)
    _explain(rows, dict(zip(reversed(captions), reversed(records), strict=True)))
    helped = torch.tensor([one.helped.mean for one in first], dtype=torch.float64)
    return {
        "triples": draws,
        "helped": float(helped.mean()),
        "standard_error": standard_error(helped),
        "rows": sorted(rows, key=_rank),
    }


def _rank(row: dict[str, Any]) -> tuple[bool, float, float]:
    """Suspects first, those that another caption fits much better before the others."""
    return not row["suspect"], -row["better"]["by"] if row["better"] else 0.0, row["fits"]


class _Counter:
    """Counts measured captions over several rounds."""

    def __init__(self, on_progress: OnProgress | None, total: int) -> None:
        self._on_progress = on_progress
        self.done, self.total = 0, total

    def __call__(self, done: int = 0, total: int = 0) -> None:
        self.done += 1
        if self._on_progress is not None:
            self._on_progress(min(self.done, self.total), self.total)


@dataclass(frozen=True)
class _First:
    """The first measurement of an image: `losses` with its own caption, none, and others, (2 + n, K)."""

    image: EvalImage
    losses: torch.Tensor

    @property
    def helped(self) -> _Difference:
        return _Difference.of(self.losses[1], self.losses[0])

    @property
    def fits(self) -> _Difference:
        return _Difference.of(self.losses[2:], self.losses[0])


class _Losses:
    """Measures images with captions; the last embeddings are cached."""

    def __init__(self, base: BaseModel, counter: _Counter) -> None:
        self._base, self._counter = base, counter
        self.timesteps = base.noise.num_timesteps
        self._condition = functools.lru_cache(maxsize=128)(self._encoded)

    def _encoded(self, caption: str) -> PromptEmbeds:
        with torch.no_grad():
            return encode_prompt(self._base, [caption])

    def of(self, image: EvalImage, captions: Iterable[str]) -> torch.Tensor:
        """(captions, K)."""
        asked = [replace(image, caption=caption) for caption in captions]
        return eval_losses(self._base, asked, self._condition, self._counter)


def _others(captions: Sequence[str], own: str, draw: random.Random) -> list[str]:
    """All other captions once, in random order."""
    others = [caption for caption in dict.fromkeys(captions) if caption != own]
    draw.shuffle(others)
    return others


def _doubtful(fits: list[float], tried: int) -> set[int]:
    """The captions that fit worst: a share of all, and those far below the median."""
    order = sorted(range(len(fits)), key=fits.__getitem__)
    low = _STANDS_OUT * statistics.median(fits)
    return {i for place, i in enumerate(order) if place < tried or (fits[i] < low and place < _MOST_TRIED)}


def _row(record: ImageRecord, one: _First) -> dict[str, Any]:
    return {
        "picture": str(record.path), "caption": one.image.caption, "loss": float(one.losses[0].mean()),
        "helped": one.helped.mean, "helped_error": one.helped.error, "fits": one.fits.mean,
        "fits_error": one.fits.error, "better": None, "suspect": False, "sentence": "",
    }  # fmt: skip


def _better(
    record: ImageRecord, image: EvalImage, others: list[str], losses: _Losses, seed: int
) -> dict[str, Any]:
    """The other caption that fits best, and how much better than its own it fits on fresh draws."""
    best = others[int(losses.of(image, others).mean(1).argmin())]
    count = 2 * len(image.draws.timesteps)
    fresh = eval_noise(hash_file(record.path), image.latents, count, seed + 1, losses.timesteps)
    own, other = losses.of(replace(image, draws=fresh), [image.caption, best])
    found = _Difference.of(own, other)
    return {"caption": best, "by": found.mean, "error": found.error}


def _explain(rows: list[dict[str, Any]], givers: dict[str, ImageRecord]) -> None:
    """Add a sentence to each row; `givers` has an image of each caption."""
    usual = statistics.median(row["fits"] for row in rows)
    helps = statistics.median(row["helped"] for row in rows)
    for row in rows:
        name, other = Path(row["picture"]).name, row["better"]
        if other is not None:
            other["picture"] = str(givers[other["caption"]].path)
            clear = other["by"] > _CLEARLY * other["error"] and other["by"] > _MATTERS * abs(usual)
            if clear:
                row["suspect"] = True
                row["sentence"] = (
                    f"The base predicts {name} better with the caption of {Path(other['picture']).name},"
                    f" “{_quoted(other['caption'])}”, than with its own, “{_quoted(row['caption'])}” (the"
                    f" loss is lower by {other['by']:.3f} ± {other['error']:.3f}): its own is likely wrong."
                )
                continue
            row["better"] = None
        if row["fits"] < _CLEARLY * row["fits_error"] and row["fits"] < _VAGUE * usual:
            row["suspect"] = True
            row["sentence"] = (
                f"The caption of {name} fits it no better than captions of other pictures do (the loss is"
                f" lower by {row['fits']:.3f} ± {row['fits_error']:.3f}, for most by {usual:.3f}): it is"
                " wrong, or names something that the base does not know."
            )
        elif row["helped"] < _VAGUE * max(helps, 0.0):
            row["sentence"] = (
                f"The caption of {name} helps the base hardly more than an empty one (by {row['helped']:.3f},"
                f" for most by {helps:.3f})."
            )
        else:
            row["sentence"] = f"The caption of {name} fits."


def _quoted(caption: str) -> str:
    return caption if len(caption) <= _QUOTED else f"{caption[:_QUOTED].rstrip()}..."
