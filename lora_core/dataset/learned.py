"""What a run on these pictures will learn beside its subject: what most pictures show and few captions say,
what all captions say, and which pictures the steps are spent on.

A LoRA learns what its captions do not explain, and ties the rest to the words that stand there. So an
attribute that most pictures have goes to the trigger unless captions name it, and a word in all captions
cannot be told from the trigger.
"""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lora_core.dataset.buckets import Bucket, bucket_of
from lora_core.dataset.records import ImageRecord
from lora_core.dataset.said import finding, said_of_backgrounds
from lora_core.dataset.seen import BACKGROUND, Attribute, attributes, background_colours

MOST = 0.6
"""The share of the pictures that is most of them."""
FEWEST = 5
"""With fewer pictures nothing is said of what they have in common."""
OFTEN = 2.0
"""A picture with so many times an even share of the steps is named."""
_FEW, _NEARLY_ALL = 0.25, 0.75
_ALL_CAPTIONS = 0.8
_MOST_WORDS = 8
_WORD = re.compile(r"[^\W\d_][\w&'-]+")
_SMALL = "a an the of in on at by to for from with and or as is are its it this that his her their very"
SMALL_WORDS = frozenset(_SMALL.split())
"""Words that say nothing of a picture."""


@dataclass(frozen=True)
class Training:
    """How pictures will be trained on, as far as a look at them needs to know it.

    Attributes:
        resolution: in pixels.
        multiple: what a bucket's sides are divisible by, in pixels.
        tokenizer: the base's tokenizer folder; None leaves the length of captions unchecked.
        trigger: which should stand in most captions.
        batch_size: pictures a micro-batch, all of one bucket.
        held_out: pictures that are kept to measure on, by path; those chosen by hand are too.
    """

    resolution: int
    multiple: int
    tokenizer: Path | None = None
    trigger: str = ""
    batch_size: int = 1
    held_out: Collection[Path] = field(default=frozenset())

    def trains_on(self, record: ImageRecord) -> bool:
        """Whether a picture is not held out."""
        return not record.held_out and record.path not in self.held_out


def step_shares(records: Sequence[ImageRecord], training: Training) -> list[float]:
    """The share of all looks that each picture gets, on average over epochs; 0 for one that is held out.

    As `training/batches` does it: a picture comes as often as it repeats; the last batch of a bucket is
    filled up from the same bucket, where every place is as likely to be taken. So a bucket of n looks counts
    for ceil(n / batch) * batch, and a picture for its part of that.
    """
    buckets = _buckets(records, training)
    looks: Counter[Bucket] = Counter()
    for record, bucket in zip(records, buckets, strict=True):
        if bucket is not None:
            looks[bucket] += record.repeats
    size = max(1, training.batch_size)
    filled = {bucket: -(-count // size) * size for bucket, count in looks.items()}
    total = max(1, sum(filled.values()))
    return [
        0.0 if bucket is None else record.repeats / looks[bucket] * filled[bucket] / total
        for record, bucket in zip(records, buckets, strict=True)
    ]


def learned(
    records: Sequence[ImageRecord],
    names: Sequence[str],
    thumbs: Sequence[np.ndarray | None],
    training: Training,
) -> list[dict[str, Any]]:
    """What will be learned, a row each: kind, name, sentence, the `pictures` to look at, and `counts`.

    Kinds: `absorbed` (most pictures show it, few captions say it), `named` (most show it, and captions say
        so), `meaning` (words for a background that mean another one here), `odd` (a caption that says another
        background than all like it), `wording` (words that some captions have), `share` (a picture with far
        more steps than others), `bucket` (one picture has a bucket for itself).

    Args:
        records: all pictures.
        names: how each is named in sentences.
        thumbs: what `seen.thumb` gives; None for one that cannot be read.
        training: how they are trained on.
    """
    used = [
        (record, name, one)
        for record, name, one in zip(records, names, thumbs, strict=True)
        if one is not None and training.trains_on(record)
    ]
    rows: list[dict[str, Any]] = []
    if len(used) >= FEWEST:
        seen, called, looks = (list(column) for column in zip(*used, strict=True))
        found = attributes(looks)
        rows += _in_common(seen, found, training.trigger)
        rows += said_of_backgrounds(seen, called, background_colours(found, len(seen)))
        rows += _wording(seen, training.trigger)
    return [*rows, *_by_share(records, names, training), *_lone_in_bucket(records, names, training)]


def _in_common(
    records: list[ImageRecord], found: dict[Attribute, list[int]], trigger: str
) -> list[dict[str, Any]]:
    plain = [i for i, colour in enumerate(background_colours(found, len(records))) if colour]
    most = MOST * len(records)
    named = any(len(m) >= most and a.name.endswith(BACKGROUND) for a, m in found.items())
    if len(plain) >= most and not named:
        words = frozenset(["background", "backdrop", "plain", "simple", "blank"])
        found = {**found, Attribute("plain background", "have a plain background", words): plain}
    common = sorted(((a, m) for a, m in found.items() if len(m) >= most), key=lambda pair: -len(pair[1]))
    return [
        _attribute_row(attribute, [records[i] for i in m], len(records), trigger) for attribute, m in common
    ]


def _attribute_row(
    attribute: Attribute, records: list[ImageRecord], pictures: int, trigger: str
) -> dict[str, Any]:
    silent = [record for record in records if not attribute.words & words_of(record.caption)]
    said = len(records) - len(silent)
    taker = f"“{trigger}”" if trigger else "the trigger word"
    shown = f"{len(records)} of {pictures} pictures {attribute.has}"
    kind = "absorbed"
    if said >= _NEARLY_ALL * len(records):
        kind = "named"
        sentence = (
            f"{shown}, and {said} of their captions say so: it is learned with these words, and prompts"
            " without them can be free of it."
        )
    elif said > _FEW * len(records):
        sentence = (
            f"{shown}, but only {said} of their captions say so: part of it will be learned with {taker}. Say"
            f" it in all of them ({attribute.name}), or in none if it belongs to what you teach."
        )
    else:
        told = "no caption says so" if not said else f"only {said} of their captions say so"
        sentence = (
            f"{shown} and {told}: it will be learned with {taker}. Write “{attribute.name}” into their"
            " captions, unless it belongs to what you teach."
        )
    counts = {"pictures": len(records), "captions": said, "of": pictures}
    return finding(kind, attribute.name, sentence, [] if kind == "named" else silent, counts)


def words_of(caption: str) -> frozenset[str]:
    """The words of a caption that say something, in small letters; joined ones as a whole and in parts."""
    whole = set(_WORD.findall(caption.casefold()))
    return frozenset(whole | {part for word in whole for part in word.split("-")}) - SMALL_WORDS


def _wording(records: list[ImageRecord], trigger: str) -> list[dict[str, Any]]:
    """The words that some captions have and others have not: what prompts can ask for."""
    written = [record for record in records if record.caption]
    if len(written) < FEWEST:
        return []
    own = words_of(trigger)
    counts = Counter(word for record in written for word in words_of(record.caption) - own)
    some = [
        (word, count)
        for word, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
        if count <= _ALL_CAPTIONS * len(written)
    ][:_MOST_WORDS]
    if not some:
        sentence = (
            "No word stands in some captions and not in others, so that prompts can move nothing but what the"
            " base knows by itself."
        )
        return [finding("wording", "", sentence, [], {"captions": len(written)})]
    listed = ", ".join(f"{word} ({count})" for word, count in some)
    sentence = f"Prompts can ask for, or leave out, what some captions say: {listed}."
    return [finding("wording", listed, sentence, [], {"captions": len(written)})]


def _buckets(records: Sequence[ImageRecord], training: Training) -> list[Bucket | None]:
    """Where each picture is trained; None for one that is held out."""
    size = (training.resolution, training.multiple)
    return [bucket_of(r.width, r.height, *size) if training.trains_on(r) else None for r in records]


def _by_share(
    records: Sequence[ImageRecord], names: Sequence[str], training: Training
) -> list[dict[str, Any]]:
    shares = step_shares(records, training)
    even = 1 / max(1, sum(share > 0 for share in shares))
    rows = []
    for record, name, share in sorted(zip(records, names, shares, strict=True), key=lambda one: -one[2]):
        if share > OFTEN * even:
            why = f"its {record.repeats} repeats" if record.repeats > 1 else "batches that it fills up alone"
            sentence = (
                f"{name} gets {share:.0%} of all steps, {share / even:.1f} times an even share, by {why}: it"
                " is learned more strongly than the others."
            )
            rows.append(finding("share", name, sentence, [record], {"share": share, "even": even}))
    return rows


def _lone_in_bucket(
    records: Sequence[ImageRecord], names: Sequence[str], training: Training
) -> list[dict[str, Any]]:
    """Buckets that one picture has for itself while others share theirs."""
    members: dict[Bucket, list[int]] = {}
    for index, bucket in enumerate(_buckets(records, training)):
        if bucket is not None:
            members.setdefault(bucket, []).append(index)
    if training.batch_size < 2 or len(members) < 2:
        return []
    rows = []
    for bucket, indices in members.items():
        repeats = [records[i].repeats for i in indices]
        top = max(range(len(indices)), key=lambda i: repeats[i])
        if repeats[top] * 2 <= sum(repeats):
            continue
        record, name = records[indices[top]], names[indices[top]]
        size = f"{bucket.width} x {bucket.height}"
        sentence = (
            f"{name} is the only picture of the size {size}: each of its batches shows it"
            f" {training.batch_size} times. Crop it to the shape of others, or add pictures of its shape."
            if len(indices) == 1
            else (
                f"{name} is over half of what is looked at in the size {size}, by its {repeats[top]} repeats."
            )
        )
        rows.append(finding("bucket", size, sentence, [record], {"pictures": len(indices)}))
    return rows
