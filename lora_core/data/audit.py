"""Finds what is wrong with a dataset and, with `learned`, what training on it will pick up.

Findings are advice. Thresholds let a sharp photo, a flat drawing and a short caption pass, and each finding
says what to do about it.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lora_core.data.buckets import choose_bucket, resize_and_crop
from lora_core.data.captions import count_tags, count_tokens
from lora_core.data.images import open_rgb_reduced
from lora_core.data.near_duplicates import Fingerprint, compute_fingerprint, group_near_duplicates
from lora_core.data.scan import Dataset, FileProblem, ImageRecord
from lora_core.data.statistics import STOP_WORDS, TrainingView, reduce_image, report_bias, step_shares
from lora_core.errors import DatasetError
from lora_core.system.files import clean_text

TOKENS_READ = 75
# The steepest edges of a picture rise by this share of its contrast from one pixel to the next, or it is
# blurred. Photos measured at 0.2 to 0.7, blurred by 3 pixels at 0.07 to 0.1, flat drawings above both.
_SHARP = 0.1
_FLAT = 8.0
_COMMON_SHARE = 0.8
_FEWEST_CAPTIONS = 5
_LONGEST_PHRASE = 6
_THREADS = 4


@dataclass(frozen=True, eq=False)
class _Look:
    """What is measured on a picture's pixels; `print` and `thumb` are None and `sharpness` 1 where it cannot
    be read any more."""

    print: Fingerprint | None
    sharpness: float
    thumb: np.ndarray | None = None


Looks = dict[tuple[str, int, int], _Look]
"""What was measured before, by path, time of the file and resolution."""


def audit(
    dataset: Dataset,
    training: TrainingView,
    progress: Callable[[int, int], None] | None = None,
    looks_before: Looks | None = None,
) -> dict[str, Any]:
    """The findings, as plain values for JSON.

    Args:
        dataset: what was scanned.
        training: how it will be trained on.
        said: called with (done, all) as the pictures are looked at; what it raises ends the audit.
        looks_before: results of earlier audits of the same files; new ones are added.

    Returns:
        `pictures` and `captions`: how many there are; `problems`: picture (or the file that is meant; empty
        where all are), kind, sentence, and for near-duplicates the `twin` that is kept; `tags`: tag,
        pictures; `shares`:
        picture, its share of the training steps; `learned`: the rows of `report_bias`.

    Raises:
        ModelFileError: the tokenizer folder holds no tokenizer.
    """
    records = dataset.records
    known = {} if looks_before is None else looks_before
    looks = _looks(records, (training.resolution, training.multiple), known, progress)
    names = _names(records)
    twins = _twins(records, names, looks)
    problems = [
        *dataset.problems,
        *_size_problems(records, names, training.resolution),
        *_blurred(records, names, looks),
        *twins,
        *_caption_problems(records, names, training.tokenizer),
        *dataset.notes,
    ]
    captions = [record.caption for record in records if record.caption]
    shares = zip(records, step_shares(records, training), strict=True)
    return {
        "pictures": len(records),
        "captions": len(captions),
        "problems": [
            *(_row(p, twins.get(p)) for p in problems),
            *(
                {"picture": "", "kind": "common phrase", "sentence": s}
                for s in phrase_sentences(captions, training.trigger)
            ),
        ],
        "tags": [{"tag": tag, "pictures": count} for tag, count in count_tags(captions).items()],
        "shares": [{"picture": clean_text(str(r.path)), "share": share} for r, share in shares],
        "learned": report_bias(records, names, [look.thumb for look in looks], training),
    }


def _looks(
    records: list[ImageRecord],
    size: tuple[int, int],
    known: Looks,
    progress: Callable[[int, int], None] | None,
) -> list[_Look]:
    """What is measured on each picture; `size` is the resolution and what sides are divisible by."""
    looks: list[_Look] = []
    threads = ThreadPoolExecutor(_THREADS)
    try:
        for look in threads.map(lambda record: _look(record, *size, known), records):
            looks.append(look)
            if progress is not None:
                progress(len(looks), len(records))
    finally:
        threads.shutdown(cancel_futures=True)
    return looks


def _row(problem: FileProblem, twin: Path | None) -> dict[str, str]:
    row = {"picture": clean_text(str(problem.path)), "kind": problem.kind, "sentence": problem.sentence}
    return row if twin is None else {**row, "twin": clean_text(str(twin))}


def sharpness(image: Image.Image) -> float:
    """The steepest rise between neighbouring pixels, as a share of the picture's contrast; 1 for a flat
    picture."""
    grey = np.asarray(image.convert("L"), dtype=np.float64)
    dark, bright = np.percentile(grey, (0.5, 99.5))
    if bright - dark < _FLAT:
        return 1.0
    rises = np.concatenate([np.abs(np.diff(grey, axis=0)).ravel(), np.abs(np.diff(grey, axis=1)).ravel()])
    # The very steepest could be a single broken pixel.
    return float(np.percentile(rises, 99.9) / (bright - dark))


def common_phrases(captions: list[str]) -> list[tuple[str, int]]:
    """Phrases of up to six words that stand in over 80% of the captions, longest first, with how many have
    them."""
    counts: Counter[str] = Counter()
    for caption in captions:
        counts.update(_phrases_of(caption))
    common = [phrase for phrase, count in counts.items() if count > _COMMON_SHARE * len(captions)]
    common.sort(key=lambda phrase: (-phrase.count(" "), phrase))
    longest: list[str] = []
    for phrase in common:
        if not any(f" {phrase} " in f" {longer} " for longer in longest):
            longest.append(phrase)
    return [(phrase, counts[phrase]) for phrase in longest]


@functools.lru_cache(maxsize=4096)
def _phrases_of(caption: str) -> frozenset[str]:
    return frozenset(phrase for part in re.split(r"[,.;:\n]", caption) for phrase in _phrases(part))


def _phrases(part: str) -> set[str]:
    """All runs of words that neither begin nor end with a small one: "photo" and "photo of a cat", not "of
    a"."""
    words = part.casefold().split()
    runs = (
        words[i:j] for i in range(len(words)) for j in range(i + 1, min(len(words), i + _LONGEST_PHRASE) + 1)
    )
    return {" ".join(run) for run in runs if run[0] not in STOP_WORDS and run[-1] not in STOP_WORDS}


def phrase_sentences(captions: list[str], trigger: str = "") -> list[str]:
    """A sentence on each phrase in over 80% of the captions that is not part of the trigger."""
    if len(captions) < _FEWEST_CAPTIONS:
        return []
    own = f" {' '.join(trigger.casefold().replace(',', ' ').split())} "
    return [
        f"“{phrase}” is in {count} of {len(captions)} captions: unless it is your trigger word, remove it"
        " from most, or it will stand for what you teach."
        for phrase, count in common_phrases(captions)
        if f" {phrase} " not in own
    ]


def _look(record: ImageRecord, resolution: int, multiple: int, known: Looks) -> _Look:
    try:
        key = (str(record.path), record.path.stat().st_mtime_ns, resolution)
        if key not in known:
            image = open_rgb_reduced(record.path, 2 * resolution)
            fitted = resize_and_crop(image, choose_bucket(*image.size, resolution, multiple))
            known[key] = _Look(compute_fingerprint(image), sharpness(fitted), reduce_image(fitted))
    except (DatasetError, OSError):
        return _Look(None, 1.0)
    return known[key]


def _names(records: list[ImageRecord]) -> list[str]:
    """How pictures are named in sentences: the file's name, with its folder where two have the same."""
    counts = Counter(record.path.name for record in records)
    return [
        record.path.name if counts[record.path.name] == 1 else f"{record.path.parent.name}/{record.path.name}"
        for record in records
    ]


def _size_problems(records: list[ImageRecord], names: list[str], resolution: int) -> list[FileProblem]:
    return [
        FileProblem(
            record.path,
            "tiny",
            f"{name} is only {record.width} x {record.height} pixels, under a quarter of the area that is"
            f" trained at ({resolution} x {resolution}); use a larger copy if there is one.",
        )
        for record, name in zip(records, names, strict=True)
        if record.width * record.height * 4 < resolution**2
    ]


def _blurred(records: list[ImageRecord], names: list[str], looks: list[_Look]) -> list[FileProblem]:
    return [
        FileProblem(
            record.path,
            "blurred",
            f"{name} has no sharp edge at the training size; leave it out, or its blur is learned too.",
        )
        for record, name, look in zip(records, names, looks, strict=True)
        if look.sharpness < _SHARP
    ]


def _twins(records: list[ImageRecord], names: list[str], looks: list[_Look]) -> dict[FileProblem, Path]:
    """Each picture that looks the same as an earlier one, and which."""
    return {
        FileProblem(
            records[index].path,
            "twins",
            f"{names[index]} looks the same as {names[first]}; keep one, or what they show is learned too"
            " strongly.",
        ): records[first].path
        for index, first in enumerate(group_near_duplicates([look.print for look in looks]))
        if first != index
    }


def _caption_problems(
    records: list[ImageRecord], names: list[str], tokenizer_folder: Path | None
) -> list[FileProblem]:
    problems = []
    for record, name in zip(records, names, strict=True):
        if not record.caption:
            sentence = f"{name} has no caption; describe in {record.path.stem}.txt what it shows."
            problems.append(FileProblem(record.path, "no caption", sentence))
        elif tokenizer_folder is not None:
            tokens = max(count_tokens(line, tokenizer_folder) for line in record.caption.splitlines())
            if tokens > TOKENS_READ:
                sentence = (
                    f"The caption of {name} has {tokens} tokens, and the model reads {TOKENS_READ}; shorten"
                    " it, or raise train.max_token_length."
                )
                problems.append(FileProblem(record.path, "long caption", sentence))
    return problems
