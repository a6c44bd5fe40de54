"""What the losses of a base and of a run's adapter say of captions, of trigger words and of each image.

All captions of an image are measured on the same draws, so that differences are paired.
"""

import functools
import itertools
import json
import random
import statistics
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora_core.data.audit import TrainingView, step_shares, words_of
from lora_core.data.captions import plain_caption, plain_record_caption, split_tags
from lora_core.data.dataset import apply_settings, measured_dataset
from lora_core.data.images import ImageRecord, hash_file
from lora_core.errors import DatasetError
from lora_core.evaluate.validator import (
    Encode,
    EvalImage,
    EvalNoise,
    OnProgress,
    encode_eval_image,
    eval_losses,
    eval_noise,
    standard_error,
)
from lora_core.formats.io import load_adapter
from lora_core.lora.inject import merged
from lora_core.lora.weights import AdapterWeights, LoadedLora, Merger
from lora_core.models.encode import encode_prompt
from lora_core.models.load import BaseModel, load_model
from lora_core.models.unet import PromptEmbeds
from lora_core.runs.folder import RunFolder
from lora_core.settings.config import RunConfig
from lora_core.settings.schema import ModelSection
from lora_core.system.files import write_atomically


def _counter(on_progress: OnProgress | None, total: int) -> Callable[..., None]:
    """Counts each call, whatever its arguments, as one of `total`."""
    done = itertools.count(1)

    def advance(*_: int) -> None:
        if on_progress is not None:
            on_progress(min(next(done), total), total)

    return advance


def _encoder(base: BaseModel, cached: int, clip_skip: int = 1, tokens: int = 75) -> Encode:
    """The base's text encoders as they are now; the last embeddings are cached."""

    @functools.lru_cache(maxsize=cached)
    def encode(caption: str) -> PromptEmbeds:
        with torch.no_grad():
            return encode_prompt(base, [caption], clip_skip, tokens)

    return encode


# How well captions fit. An image is compared with a few captions of other images first; only where its own is
# not an outlier are all of them tried, and the best of those is measured again on fresh draws, because the
# best of many is partly luck.

OTHERS = 6
"""Captions of other images that every image is compared with."""
MOST_OTHERS = 100
_LEAST_TRIED, _MOST_TRIED, _TRIED_SHARE = 2, 24, 0.15
_STANDS_OUT = 0.5
"""Of the median: a caption that fits less than this is compared with all others."""
_CLEARLY = 2.0
_MATTERS, _VAGUE = 0.25, 0.15
_QUOTED = 60
Losses = Callable[[EvalImage, Iterable[str]], torch.Tensor]
"""From an image and captions to the losses, (captions, K)."""


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
    different = len(set(captions))
    if different < 2:
        raise DatasetError(
            "Checking captions needs at least two images with different captions; write some first."
        )
    tried = max(_LEAST_TRIED, min(_MOST_TRIED, round(_TRIED_SHARE * len(records))))
    again = tried * (min(MOST_OTHERS, different) + 1)
    advance = _counter(on_progress, len(records) * (3 + min(OTHERS, different - 1)) + again)
    encode = _encoder(base, 128)

    def losses(image: EvalImage, captions: Iterable[str]) -> torch.Tensor:
        return eval_losses(base, [replace(image, caption=one) for one in captions], encode, advance)

    def others(number: int) -> list[str]:
        found = [one for one in dict.fromkeys(captions) if one != captions[number]]
        random.Random(f"{seed}/{number}").shuffle(found)
        return found

    images, rows = [], []
    for number, (record, caption) in enumerate(zip(records, captions, strict=True)):
        images.append(encode_eval_image(base, record, caption, draws, seed))
        advance()
        found = losses(images[-1], [caption, "", *others(number)[:OTHERS]])
        rows.append(_score_row(record, caption, found))
    givers = dict(zip(reversed(captions), reversed(records), strict=True))
    for number in _doubtful([row["fits"] for row in rows], tried):
        tries, name = others(number)[:MOST_OTHERS], hash_file(records[number].path)
        draw = functools.partial(eval_noise, name, seed=seed + 1, num_timesteps=base.noise.num_timesteps)
        better = _better_caption(images[number], tries, losses, draw)
        rows[number]["better"] = better | {"picture": str(givers[better["caption"]].path)}
    _explain(rows)
    helped, helped_error = _difference(torch.tensor([row["helped"] for row in rows], dtype=torch.float64))
    rows.sort(key=_suspects_first)
    return {"triples": draws, "helped": helped, "standard_error": helped_error, "rows": rows}


def _score_row(record: ImageRecord, caption: str, losses: torch.Tensor) -> dict[str, Any]:
    """What losses with its own caption, none, and others, (2 + n, K), say of an image."""
    own, none, *rest = losses
    helped, helped_error = _difference(none - own)
    fits, fits_error = _difference(torch.stack(rest).mean(0) - own)
    return {
        "picture": str(record.path), "caption": caption, "loss": float(own.mean()), "helped": helped,
        "helped_error": helped_error, "fits": fits, "fits_error": fits_error, "better": None,
        "suspect": False, "sentence": "",
    }  # fmt: skip


def _better_caption(
    image: EvalImage, tries: list[str], losses: Losses, draw: Callable[..., EvalNoise]
) -> dict[str, Any]:
    """The other caption that fits best, and how much better than its own it fits on fresh draws."""
    best = tries[int(losses(image, tries).mean(1).argmin())]
    fresh = draw(latents=image.latents, count=2 * len(image.draws.timesteps))
    own, other = losses(replace(image, draws=fresh), [image.caption, best])
    by, error = _difference(own - other)
    return {"caption": best, "by": by, "error": error}


def _suspects_first(row: dict[str, Any]) -> tuple[bool, float, float]:
    """The order of rows; those that another caption fits much better come before the others."""
    return not row["suspect"], -row["better"]["by"] if row["better"] else 0.0, row["fits"]


def _difference(values: torch.Tensor) -> tuple[float, float]:
    """The mean of independent values (n,), and its standard error."""
    return float(values.mean()), standard_error(values)


def _doubtful(fits: list[float], tried: int) -> list[int]:
    """The captions that fit worst: a share of all, and those far below the median."""
    order = sorted(range(len(fits)), key=fits.__getitem__)
    low = _STANDS_OUT * statistics.median(fits)
    return [i for place, i in enumerate(order) if place < tried or (fits[i] < low and place < _MOST_TRIED)]


def _explain(rows: list[dict[str, Any]]) -> None:
    """Add a sentence to each row, and drop the other captions that are not clearly better."""
    usual = statistics.median(row["fits"] for row in rows)
    helps = statistics.median(row["helped"] for row in rows)
    for row in rows:
        name, other = Path(row["picture"]).name, row["better"]
        if other and not (other["by"] > _CLEARLY * other["error"] and other["by"] > _MATTERS * abs(usual)):
            row["better"] = other = None
        vague = row["fits"] < _CLEARLY * row["fits_error"] and row["fits"] < _VAGUE * usual
        row["suspect"] = bool(other) or vague
        if other:
            row["sentence"] = (
                f"The base predicts {name} better with the caption of {Path(other['picture']).name},"
                f" “{_quoted(other['caption'])}”, than with its own, “{_quoted(row['caption'])}” (the"
                f" loss is lower by {other['by']:.3f} ± {other['error']:.3f}): its own is likely wrong."
            )
        elif vague:
            row["sentence"] = (
                f"The caption of {name} fits it no better than captions of other images do (the loss is"
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


# Trigger words. A trigger should be the LoRA's own: a word that the base knows brings its old meaning along.
# How much a base reacts to a word is measured by how far its prediction moves when the word is put before a
# caption, relative to how far the words of other captions move it.

MOST_TOKENS = 3
TRIGGER_IMAGES = 4
_POOL, _KEPT, _KNOWN_WORDS = 24, 8, 4
_INVENTED = 120
# Common choices; a base that has seen their images may know some of them.
_USUAL = ("ohwx", "zwx", "uhsx", "sks")
_LETTERS = {"c": "bdfghjklmnprtvxzq", "v": "aeiouy"}
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
        seed: of the candidates and the draws.
        on_progress: called after each measured word.

    Returns:
        `usual`: how far words of other captions move the prediction (root mean square); `rows`: `word`,
        `tokens`, `reaction` as a multiple of that, its `error` over images, `given`, `sentence`.

    Raises:
        DatasetError: no image, or no candidate is left.
    """
    if not records:
        raise DatasetError("Proposing a trigger word needs images; put some in.")
    given = given.strip()
    some = random.Random(seed).sample(list(records), min(TRIGGER_IMAGES, len(records)))
    pool = trigger_candidates(base, [record.caption for record in records], seed)
    known = _known_words(records, given)
    advance = _counter(on_progress, len(pool) + 2 * _KEPT + len(known) + 1)
    encode = _encoder(base, 64)
    images = [
        encode_eval_image(base, record, plain_caption(record.caption, ""), draws, seed) for record in some
    ]
    without = [_predict(base, image, encode(image.caption)) for image in images]

    def reaction(word: str, count: int = TRIGGER_IMAGES) -> torch.Tensor:
        """The root mean square of the change for each of the first `count` images, (count,)."""
        moved = []
        for image, unmoved in zip(images[:count], without, strict=False):
            caption = f"{word}, {image.caption}" if image.caption else word
            change = _predict(base, image, encode(caption)) - unmoved
            moved.append(change.double().square().mean().sqrt())
        advance()
        return torch.stack(moved)

    # All of them with one image first, then the best.
    first = {word: float(reaction(word, 1).mean()) for word in pool}
    best = sorted(first, key=first.__getitem__)[: 2 * _KEPT]
    # A common word where the captions have none.
    usual = max(statistics.fmean(float(reaction(word).mean()) for word in known or ["photo"]), 1e-12)
    moved = {word: reaction(word) / usual for word in best}
    best = sorted(moved, key=lambda word: float(moved[word].mean()))[:_KEPT]
    rows = [_trigger_row(base, word, moved[word]) for word in best]
    if given:
        own = reaction(given) / usual
        rows.append(_given_row(_trigger_row(base, given, own), rows[0], own - moved[best[0]]))
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

    def choose(values: Sequence[str]) -> str:
        return values[int(draw.random() * len(values))]

    words = [*_USUAL, *("".join(choose(_LETTERS[c]) for c in choose(_SHAPES)) for _ in range(_INVENTED))]
    short = {word: number for word in words if (number := num_tokens(base, word)) <= MOST_TOKENS}
    found = sorted((word for word in short if word not in taken), key=short.__getitem__)[:_POOL]
    if not found:
        raise DatasetError("Every short candidate is in a caption already; choose a trigger word yourself.")
    return found


def num_tokens(base: BaseModel, word: str) -> int:
    """How many tokens a word has."""
    tokenizer = next(iter(base.tokenizers.values()))
    return len(tokenizer(word, add_special_tokens=False, truncation=False, verbose=False).input_ids)


def _known_words(records: Sequence[ImageRecord], given: str) -> list[str]:
    """First tags of captions, words that surely mean something."""
    tags = []
    for record in records:
        captions = split_tags(plain_caption(record.caption, ""))
        tags.append(next((tag for tag in captions if tag.casefold() != given.casefold()), ""))
    return list(dict.fromkeys(tag.strip(string.punctuation) for tag in tags if tag))[:_KNOWN_WORDS]


def _predict(base: BaseModel, image: EvalImage, text: PromptEmbeds) -> torch.Tensor:
    """The base's prediction for each draw of an image, on the CPU."""
    noise, timesteps = image.draws.noise.to(base.device), image.draws.timesteps.to(base.device)
    noisy = base.noise.add_noise(image.latents.to(base.device).expand_as(noise), noise, timesteps)
    sizes = None if image.sizes is None else image.sizes.expand(len(noise), -1)
    with torch.no_grad():
        return base.predict_noise(noisy, timesteps, text.expand(len(noise)), sizes).cpu()


def _trigger_row(base: BaseModel, word: str, reaction: torch.Tensor) -> dict[str, Any]:
    tokens, (mean, error) = num_tokens(base, word), _difference(reaction)
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
    more, error = _difference(apart)
    known = more > 2 * error and row["reaction"] > _KNOWS * best["reaction"]
    end = (
        f" “{best['word']}” moves it less, {best['reaction']:.2f} times: what “{row['word']}” means to the"
        " base will mix with what you teach."
        if known
        else " The proposed ones are hardly better."
    )
    return {**row, "given": True, "sentence": row["sentence"] + end}


# What a run has learned of each of its images, held-out ones too. A wrong caption does not show in the gain:
# the loss with it is high before, so there is much to gain. It shows in the adapted model, which predicts
# such an image no better with its caption than without one, while the captions of the others help.

IMAGES_FILE = "pictures.json"
OUTLIER = 2.5
"""An image is an outlier from this many spreads below the median, its own error included."""
_FEWEST = 5
_LITTLE = 0.25
OpenBase = Callable[[ModelSection], BaseModel]
"""From the model settings to the base with no adapter in it."""


def measure_run_images(
    run: RunFolder,
    which: str = "best",
    draws: int = 8,
    on_progress: OnProgress | None = None,
    open_base: OpenBase | None = None,
) -> dict[str, Any]:
    """Measure a run's adapter on each of its images, and write the result to `pictures.json` of the run.

    Args:
        run: with at least one checkpoint.
        which: `best` (the last one where none was the best), `last`, or a step.
        on_progress: called in each of four passes over the images.
        open_base: None to load the base here.

    Returns:
        `step`, `triples` (the draws), and `rows`, see `image_rows`.

    Raises:
        RunError: no such checkpoint. DatasetError, ModelFileError, AdapterFileError: the images, the base or
        the adapter cannot be read.
    """
    config, step = run.config(), run.step_of(which)
    dataset = measured_dataset(config, run.path.parent.parent / "cache" / "datasets")
    base = (open_base or load_model)(config.model)
    weights = load_adapter(run.checkpoint(step) / "adapter.safetensors", base.family, plain=False)
    reg = dataset.reg if config.dataset.reg_weight else []
    held = {record.path for record in run.held_out(dataset.records, config)}
    records = [replace(record, held_out=record.path in held) for record in dataset.records]
    rows = image_rows(base, records, weights, config, draws, on_progress, reg)
    found = {"step": step, "triples": draws, "rows": rows}
    write_atomically(run.path / IMAGES_FILE, json.dumps(found, ensure_ascii=False).encode())
    return found


def image_rows(
    base: BaseModel,
    records: Sequence[ImageRecord],
    weights: AdapterWeights,
    config: RunConfig,
    draws: int = 8,
    on_progress: OnProgress | None = None,
    reg: Sequence[ImageRecord] = (),
) -> list[dict[str, Any]]:
    """The gain on each image: outliers first, then the smallest.

    Args:
        base: with no adapter in it, before and after.
        records: all images of the run; those marked as held out were not trained on.
        reg: its images for regularisation.
        on_progress: called in each of four passes over the images.

    Returns:
        Rows {picture, gain, standard_error, base_loss, adapted_loss, learned (the gain as a share of the
        base's loss), helps (how much lower the adapted loss is with the caption than without; None without a
        caption), helps_error, share (of the training steps), held_out, suspect, sentence}.
    """
    train, size = config.train, config.resolution(base.resolution)
    held_out = frozenset(record.path for record in records if record.held_out)
    advance = _counter(on_progress, 4 * len(records))
    images = []
    for record in apply_settings(records, config):
        caption = plain_record_caption(record, config.dataset)
        images.append(encode_eval_image(base, record, caption, draws, config.seed, size))
        advance()

    def losses(images: list[EvalImage]) -> torch.Tensor:
        # A new cache each time: the adapter may be in the text encoder too.
        return eval_losses(base, images, _encoder(base, 1, train.clip_skip, train.max_token_length), advance)

    before = losses(images)
    with merged(base, Merger(base.modules), [LoadedLora(weights)]):
        after, bare = losses(images), losses([replace(one, caption="") for one in images])
    shape = (size, base.size_multiple, None, "", train.batch_size)
    training = TrainingView(*shape, held_out, reg, config.dataset)
    rows: list[dict[str, Any]] = []
    for number, (record, share) in enumerate(zip(records, step_shares(records, training), strict=True)):
        gain, error = _difference(before[number] - after[number])
        captioned, base_loss = plain_caption(record.full_caption, ""), float(before[number].mean())
        helps, helps_error = _difference(bare[number] - after[number]) if captioned else (None, None)
        rows.append(
            {
                "picture": str(record.path), "gain": gain, "standard_error": error,
                "base_loss": base_loss, "adapted_loss": float(after[number].mean()),
                "learned": gain / max(base_loss, 1e-12), "helps": helps, "helps_error": helps_error,
                "share": share, "held_out": record.path in held_out, "suspect": False, "sentence": "",
            }
        )  # fmt: skip
    mark_outliers(rows)
    return sorted(rows, key=lambda row: (not row["suspect"], row["learned"]))


def mark_outliers(rows: list[dict[str, Any]]) -> None:
    """Mark images whose caption does not help, or of which far less was learned than of the others."""
    captioned = [(row, row["helps"], row["helps_error"]) for row in rows if row["helps"] is not None]
    trained = [
        (row, row["learned"], row["standard_error"] / max(row["base_loss"], 1e-12))
        for row in rows
        if not row["held_out"]
    ]
    no_help = (
        "The caption of {name} does not help the trained model to predict it ({value:+.3f} ± {error:.3f}, for"
        " most {usual:+.3f}): it is likely wrong."
    )
    not_learned = (
        "{name} was learned far less than the others ({value:.0%} of the base's loss, for most {usual:.0%}):"
        " its caption is wrong, or it is of another style."
    )
    for found, little, sentence in ((captioned, _LITTLE, no_help), (trained, 0.5, not_learned)):
        values = [value for _, value, _ in found]
        apart = _below(values, [error for _, _, error in found])
        for (row, value, error), low in zip(found, apart, strict=True):
            usual = statistics.median(values)
            if low > OUTLIER and value < little * usual and not row["suspect"]:
                name = Path(row["picture"]).name
                row["suspect"] = True
                row["sentence"] = sentence.format(name=name, value=value, error=error, usual=usual)


def _below(values: list[float], errors: list[float]) -> list[float]:
    """How far each value is below the median, in units of the spread of all (from the median deviation) and
    its own error; zeros for too few values."""
    if len(values) < _FEWEST:
        return [0.0] * len(values)
    middle = statistics.median(values)
    spread = 1.4826 * statistics.median(abs(value - middle) for value in values)
    return [
        (middle - value) / max((spread**2 + error**2) ** 0.5, 1e-12)
        for value, error in zip(values, errors, strict=True)
    ]
