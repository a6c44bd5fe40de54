"""Finds problems of a dataset, and what training will pick up besides the subject.

Findings are advice, from pixels and captions, without a model. Thresholds let a sharp photo, a flat drawing
and a short caption pass, and each finding says what to do about it.

A LoRA learns what its captions do not explain. An attribute that most images share goes to the trigger word
unless captions name it, and a word in all captions is taken for the trigger. Attributes are the few that a
thumbnail shows: a plain background's colour, a frame, brightness, one colour, black and white, one
composition. Thresholds are strict: a missed attribute costs nothing, a reported one has to be plain to see.
"""

import contextlib
import io
import itertools
import json
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops

from lora_core.data.captions import count_tags, count_tokens
from lora_core.data.concepts import balance_looks, concept_of, read_concepts
from lora_core.data.dataset import Fingerprint, at_resolutions, compute_fingerprint, group_near_duplicates
from lora_core.data.images import (
    Bucket,
    Concept,
    Crop,
    Dataset,
    FileProblem,
    ImageRecord,
    choose_bucket,
    open_image,
    resize_and_crop,
)
from lora_core.errors import DatasetError
from lora_core.settings.schema import DatasetSection
from lora_core.system.files import clean_text, read_table, write_atomically

SIDE = 24
"""Side of the thumbnail, in pixels: a pixel is 4% of the side."""
BACKGROUND = " background"
"""How names of attributes end that are the colour of a plain background."""
_NEAR = 36
_APART = 48
_LOW_CHROMA, _PLAIN_CHROMA, _VIVID = 8.0, 25.0, 110.0
_DARK, _BRIGHT = 60.0, 205.0
_ALIKE = 0.7
_WEIGHTS = np.array([0.299, 0.587, 0.114])
_TABLES = read_table("attributes.toml")
_ALSO: dict[str, str] = _TABLES["colours"]
"""Other words for a colour."""
_BEHIND = re.compile(r"\b(\w+)[ -](?:background|backdrop)\b")
_FEWEST, _FEWEST_ODD = 3, 4
_MOSTLY = 0.75
MAJORITY = 0.6
"""The share of the images that is most of them."""
MIN_IMAGES = 5
"""With fewer images common attributes are not reported."""
OVERREPRESENTED = 2.0
"""An image with more than this multiple of an even share of the steps is named."""
_FEW, _NEARLY_ALL = 0.25, 0.75
_ALL_CAPTIONS = 0.8
_MOST_WORDS = 8
_WORD = re.compile(r"[^\W\d_][\w&'-]+")
STOP_WORDS = frozenset(_TABLES["stop_words"].split())
"""Words that do not describe an image."""
TOKENS_READ = 75
# The steepest edges of an image rise by this share of its contrast from one pixel to the next, or it is
# blurred. Photos measured at 0.2 to 0.7, blurred by 3 pixels at 0.07 to 0.1, flat drawings above both.
_SHARP = 0.1
_FLAT = 8.0
_COMMON_SHARE = 0.8
_FEWEST_CAPTIONS = 5
_LONGEST_PHRASE = 6
_PART = re.compile(r"[,.;:\n]")
_THREADS = 4


@dataclass(frozen=True)
class Attribute:
    """Something that images can have in common.

    Attributes:
        name: of it, which a caption could say.
        has: how a sentence says that images have it: "have a white background".
        words: any one of them in a caption says it.
    """

    name: str
    has: str
    words: frozenset[str]


def reduce_image(image: Image.Image) -> np.ndarray:
    """A thumbnail to compare images by: (24, 24, 3), 0 to 255."""
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.uint8)


def find_attributes(thumbs: Sequence[np.ndarray]) -> dict[Attribute, list[int]]:
    """Each attribute that an image has, with the indices of all images that have it."""
    found: dict[Attribute, list[int]] = {}
    for index, one in enumerate(thumbs):
        for attribute in _image_attributes(one.astype(np.float64)):
            found.setdefault(attribute, []).append(index)
    same = _same_composition(thumbs)
    if same:
        found[_attribute("composition")] = same
    return found


def _image_attributes(image: np.ndarray) -> list[Attribute]:
    chroma = image.max(-1) - image.min(-1)
    mean, luma = float(chroma.mean()), float((image @ _WEIGHTS).mean())
    hue = _dominant_hue(image, chroma) if mean >= _PLAIN_CHROMA else ""
    plain = {
        "black and white": mean < _LOW_CHROMA,
        "vivid colours": mean > _VIVID,
        "dark": luma < _DARK,
        "bright": luma > _BRIGHT,
    }
    edge = _edge_attribute(image)
    found = [edge] if edge else []
    found += [_attribute(name) for name, holds in plain.items() if holds]
    if hue:
        found.append(_attribute(f"{hue} colours", f"are mostly {hue}", f"{hue} {_ALSO.get(hue, '')}"))
    return found


def _attribute(name: str, has: str = "", words: str = "") -> Attribute:
    if not has:
        has, words = _TABLES["attributes"][name]
    return Attribute(name, has, frozenset(words.split()))


def _edge_attribute(image: np.ndarray) -> Attribute | None:
    """A frame, or a plain background, by the pixels along the edge."""
    middle = np.median(_edge_pixels(image, 0), axis=0)

    def near(depth: int, apart: float) -> float:
        return float((np.abs(_edge_pixels(image, depth) - middle).max(-1) <= apart).mean())

    if near(0, _NEAR) < 0.8:
        return None
    for depth in range(1, 4):
        if near(depth, _APART) < 0.15:
            return _attribute("frame")
    if near(1, _NEAR) < 0.8:
        return None
    colour = name_colour(middle)
    words = f"background backdrop plain blank {colour} {_ALSO.get(colour, '')}"
    return _attribute(colour + BACKGROUND, f"have {_a_or_an(colour)} background", words)


def _edge_pixels(image: np.ndarray, depth: int) -> np.ndarray:
    """The pixels that are `depth` from the edge, (n, 3)."""
    inner = image[depth : SIDE - depth, depth : SIDE - depth]
    return np.concatenate([inner[0], inner[-1], inner[1:-1, 0], inner[1:-1, -1]])


def name_colour(colour: np.ndarray) -> str:
    """The name of an RGB colour of 0 to 255."""
    value, chroma = float(colour.max()), float(colour.max() - colour.min())
    if value < 50:
        return "black"
    saturation = chroma / value
    if saturation < 0.12:
        return "white" if value > 225 else "grey"
    hue = float(_hue(colour[None])[0])
    if 15 <= hue < 70:
        if saturation < 0.45 and value > 200:
            return "beige"
        if hue < 42 and value < 140:
            return "brown"
    return _name_hue(hue)


def _name_hue(hue: float) -> str:
    return next(str(name) for most, name in _TABLES["hues"] if hue < most)


def _hue(colours: np.ndarray) -> np.ndarray:
    """Hues in degrees of (n, 3) colours; 0 for greys."""
    red, green, blue = colours.T
    top, chroma = colours.max(-1), np.maximum(colours.max(-1) - colours.min(-1), 1e-9)
    sector = np.where(
        top == red,
        (green - blue) / chroma % 6,
        np.where(top == green, (blue - red) / chroma + 2, (red - green) / chroma + 4),
    )
    hues: np.ndarray = 60 * sector % 360
    return hues


def _dominant_hue(image: np.ndarray, chroma: np.ndarray) -> str:
    """The colour that 70% of all colourfulness is within 30 degrees of, or ""."""
    weights, hues = chroma.ravel(), _hue(image.reshape(-1, 3))
    # Sums over sorted hues, once around on either side, so that each span is the difference of two.
    order = np.argsort(hues)
    turns = np.concatenate([hues[order] + turn for turn in (-360, 0, 360)])
    sums = np.concatenate([[0.0], np.tile(weights[order], 3).cumsum()])
    centres = np.arange(0, 360, 10)
    ends = np.searchsorted(turns, centres + 30, "right")
    inside = sums[ends] - sums[np.searchsorted(turns, centres - 30, "left")]
    best = int(inside.argmax())
    if inside[best] < 0.7 * weights.sum():
        return ""
    near = np.abs((hues - centres[best] + 180) % 360 - 180) <= 30
    angles = np.radians(hues[near])
    mean = (np.exp(1j * angles) * weights[near]).sum()
    return _name_hue(float(np.degrees(np.angle(mean)) % 360))


def _same_composition(thumbs: Sequence[np.ndarray]) -> list[int]:
    """The images whose light and dark are placed as in the mean of all others."""
    if len(thumbs) < 3:
        return []
    blocks = np.array([one.astype(np.float64) @ _WEIGHTS for one in thumbs]).reshape(-1, 8, 3, 8, 3)
    flat = blocks.mean((2, 4)).reshape(len(thumbs), -1)
    flat -= flat.mean(-1, keepdims=True)
    flat /= np.maximum(np.linalg.norm(flat, axis=-1, keepdims=True), 1e-9)
    total = flat.sum(0)
    return [
        index
        for index, one in enumerate(flat)
        if float(one @ (total - one)) >= _ALIKE * max(float(np.linalg.norm(total - one)), 1e-9)
    ]


def colour_of_word(word: str) -> str:
    """The colour that a word is a name of, "" where it is none."""
    names = {name for _, name in _TABLES["hues"]} | {"black", "white", "grey", "beige", "brown"}
    return word if word in names else next((n for n, also in _ALSO.items() if word in also.split()), "")


def background_colours(found: dict[Attribute, list[int]], pictures: int) -> list[str]:
    """The colour of each image's plain background, "" where it has none."""
    colours = [""] * pictures
    for attribute, members in found.items():
        if attribute.name.endswith(BACKGROUND):
            for index in members:
                colours[index] = attribute.name.removesuffix(BACKGROUND)
    return colours


def bias_finding(
    kind: str, name: str, sentence: str, records: Sequence[ImageRecord], counts: Mapping[str, float]
) -> dict[str, Any]:
    """A finding as plain values: `records` are the images to look at."""
    pictures = [clean_text(str(record.path)) for record in records]
    return {"kind": kind, "name": name, "sentence": sentence, "pictures": pictures, "counts": dict(counts)}


def check_background_captions(
    records: Sequence[ImageRecord], names: Sequence[str], colours: Sequence[str]
) -> list[dict[str, Any]]:
    """Words for a background that mean something else in these images, and captions that are odd ones out.

    Args:
        names: how each is named in sentences.
        colours: of each plain background, "" where there is none.
    """
    by_word: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        for word in set(_BEHIND.findall(record.caption.casefold())):
            if colour_of_word(word) and colours[index]:
                by_word.setdefault(word, []).append(index)
    rows = []
    for word, members in by_word.items():
        ((shown, count),) = Counter(colours[i] for i in members).most_common(1)
        if count < _MOSTLY * len(members):
            continue
        own = colour_of_word(word)
        if shown != own and count >= _FEWEST:
            sentence = (
                f"“{word} background” will come to mean {shown}: {count} of the {len(members)} images with"
                f" these words have {_a_or_an(shown)} one. Write {shown} instead, unless you want it."
            )
            meant = [records[i] for i in members if colours[i] == shown]
            counts = {"captions": len(members), "pictures": count}
            rows.append(bias_finding("meaning", word, sentence, meant, counts) | {"instead": shown})
        for i in members if len(members) >= _FEWEST_ODD else ():
            if colours[i] not in (shown, own):
                sentence = (
                    f"Check the caption of {names[i]}: it says “{word} background”, but it has"
                    f" {_a_or_an(colours[i])} one; the other {count} with these words have"
                    f" {_a_or_an(shown)} one."
                )
                rows.append(bias_finding("odd", word, sentence, [records[i]], {"pictures": count}))
    return rows


def _a_or_an(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


@dataclass(frozen=True)
class TrainingView:
    """The training settings that the report needs.

    Attributes:
        resolution: in pixels.
        multiple: what a bucket's sides are divisible by, in pixels.
        tokenizer: the base's tokenizer folder; None leaves the length of captions unchecked.
        trigger: expected in most captions.
        batch_size: images a micro-batch, all of one bucket.
        held_out: images that are kept to measure on, by path; those chosen by hand are too.
        reg: images for regularisation that are trained on too.
        rules: settings that may have several resolutions.
    """

    resolution: int
    multiple: int
    tokenizer: Path | None = None
    trigger: str = ""
    batch_size: int = 1
    held_out: Collection[Path] = field(default=frozenset())
    reg: Sequence[ImageRecord] = ()
    rules: DatasetSection = field(default_factory=DatasetSection)

    def trains_on(self, record: ImageRecord) -> bool:
        """Whether an image is not held out."""
        return not record.held_out and record.path not in self.held_out


def step_shares(records: Sequence[ImageRecord], training: TrainingView) -> list[float]:
    """The share of all samples that each image gets, on average over epochs; 0 if it is held out. As in
    `train/data`, an image is drawn as often as it repeats, and the last batch of a bucket is filled up from
    the same bucket, uniformly. So a bucket of n samples counts for ceil(n / batch) * batch, and an image for
    its part of that.
    """
    return [look.share for look in _epoch_looks(records, training)[: len(records)]]


@dataclass(frozen=True)
class _ImageLooks:
    """An image with its repeats and its share of an epoch's samples, both 0 if it is held out."""

    record: ImageRecord
    repeats: int
    share: float


def _epoch_looks(records: Sequence[ImageRecord], training: TrainingView) -> list[_ImageLooks]:
    """For `records` in order, then for the regularisation images."""
    balanced, reg = balance_looks([one for one in records if training.trains_on(one)], training.reg)
    shown = iter(balanced)
    every = [*(next(shown) if training.trains_on(one) else one for one in records), *reg]
    views = _views(every, training)
    looks: Counter[Bucket] = Counter()
    for record, bucket in views:
        looks[bucket] += record.repeats
    size = max(1, training.batch_size)
    filled = {bucket: -(-count // size) * size for bucket, count in looks.items()}
    total = max(1, sum(filled.values()))
    found = {record.path: (0, 0.0) for record in every}
    for record, bucket in views:
        repeats, share = found[record.path]
        part = record.repeats / looks[bucket] * filled[bucket] / total
        found[record.path] = repeats + record.repeats, share + part
    return [_ImageLooks(record, *found[record.path]) for record in every]


def concept_rows(dataset: Dataset, training: TrainingView) -> list[dict[str, Any]]:
    """The concepts of a dataset, as plain values; without a `dataset.toml` they are its folders.

    Returns:
        Rows {number (in the file, 0 without one), name, folder, patterns (of names, for a part of it), role,
        trigger (its own, None for the run's), images (that are trained on), num_repeats and asked (the
        share), as they are set, repeats (of its images in an epoch: least, most), share (of all looks)}.
    """
    root = dataset.root or Path()
    listed = read_concepts(root) if dataset.root else None
    groups: dict[Concept, list[_ImageLooks]] = {one: [] for one in (listed.concepts if listed else ())}
    for look in _epoch_looks(dataset.records, training):
        groups.setdefault(concept_of(look.record, root), []).append(look)
    rows = []
    for concept, looks in groups.items():
        repeats = sorted({look.repeats for look in looks if look.repeats}) or [0]
        rows.append(
            {
                "number": concept.number, "name": concept.name, "folder": concept.folder,
                "patterns": list(concept.images),
                "role": concept.role, "trigger": dict(concept.rules).get("trigger"),
                "images": sum(look.repeats > 0 for look in looks), "num_repeats": concept.repeats,
                "asked": concept.share, "repeats": [repeats[0], repeats[-1]],
                "share": sum(look.share for look in looks),
            }
        )  # fmt: skip
    return rows


def report_bias(
    records: Sequence[ImageRecord],
    names: Sequence[str],
    thumbs: Sequence[np.ndarray | None],
    training: TrainingView,
) -> list[dict[str, Any]]:
    """What training will pick up, a row each: kind, name, sentence, the `pictures` to look at, `counts`.

    Kinds: `absorbed` (most images show it, few captions say it), `named` (most show it, and captions say
        so), both of images that are not of a style; `meaning` (words for a background that mean another one
        here), `odd` (a caption that says another background than all like it), `wording` (words that some
        captions have), `share` (an image with far more steps than others), `bucket` (one image has a bucket
        for itself).

    Args:
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
    if len(used) >= MIN_IMAGES:
        seen, called, looks = (list(column) for column in zip(*used, strict=True))
        found = find_attributes(looks)
        own = [number for number, one in enumerate(seen) if not (one.concept and one.concept.role == "style")]
        # A style is what its images have in common.
        of_own = found if len(own) == len(seen) else find_attributes([looks[number] for number in own])
        if len(own) >= MIN_IMAGES:
            rows += _common_attributes([seen[number] for number in own], of_own, training.trigger)
        rows += check_background_captions(seen, called, background_colours(found, len(seen)))
        rows += _wording(seen, training.trigger)
    return [
        *rows,
        *_uneven_shares(records, names, training),
        *_single_image_buckets(records, names, training),
    ]


def _common_attributes(
    records: list[ImageRecord], found: dict[Attribute, list[int]], trigger: str
) -> list[dict[str, Any]]:
    plain = [i for i, colour in enumerate(background_colours(found, len(records))) if colour]
    most = MAJORITY * len(records)
    named = any(len(m) >= most and a.name.endswith(BACKGROUND) for a, m in found.items())
    if len(plain) >= most and not named:
        found = {**found, _attribute("plain background"): plain}
    common = sorted(((a, m) for a, m in found.items() if len(m) >= most), key=lambda pair: -len(pair[1]))
    return [
        _attribute_row(attribute, [records[i] for i in m], len(records), trigger) for attribute, m in common
    ]


def _attribute_row(
    attribute: Attribute, records: list[ImageRecord], pictures: int, trigger: str
) -> dict[str, Any]:
    silent = [record for record in records if not attribute.words & words_of(record.caption)]
    num_named = len(records) - len(silent)
    taker = f"“{trigger}”" if trigger else "the trigger word"
    shown = f"{len(records)} of {pictures} images {attribute.has}"
    counts = {"pictures": len(records), "captions": num_named, "of": pictures}
    if num_named >= _NEARLY_ALL * len(records):
        sentence = f"{shown}, and {num_named} captions say so: prompts can leave it out."
        return bias_finding("named", attribute.name, sentence, [], counts)
    part = "partly " if num_named > _FEW * len(records) else ""
    sentence = (
        f"{shown}, {len(silent)} of them without saying so in the caption: it will be {part}learned with"
        f" {taker}. Add “{attribute.name}” to these captions, unless you want it always."
    )
    return bias_finding("absorbed", attribute.name, sentence, silent, counts)


def words_of(caption: str) -> frozenset[str]:
    """The meaningful words of a caption in lower case; compounds both joined and split."""
    whole = set(_WORD.findall(caption.casefold()))
    return frozenset(whole | {part for word in whole for part in word.split("-")}) - STOP_WORDS


def _wording(records: list[ImageRecord], trigger: str) -> list[dict[str, Any]]:
    """The words that some captions have and others have not: what prompts can ask for."""
    written = [record for record in records if record.caption]
    if len(written) < MIN_IMAGES:
        return []
    own = words_of(trigger)
    counts = Counter(word for record in written for word in words_of(record.caption) - own)
    some = [
        f"{word} ({count})"
        for word, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
        if count <= _ALL_CAPTIONS * len(written)
    ]
    listed = ", ".join(some[:_MOST_WORDS])
    sentence = (
        f"Prompts can ask for, or leave out, what some captions say: {listed}."
        if some
        else "No word is in some captions and not in others: prompts can change only what the base knows by"
        " itself."
    )
    return [bias_finding("wording", listed, sentence, [], {"captions": len(written)})]


def _views(records: Sequence[ImageRecord], training: TrainingView) -> list[tuple[ImageRecord, Bucket]]:
    """See `at_resolutions`; without those that are held out."""
    used = (record for record in records if training.trains_on(record))
    views = at_resolutions(used, training.rules, training.resolution, training.multiple)
    return [(record, Bucket(bucket.width, bucket.height)) for record, bucket in views]


def _uneven_shares(
    records: Sequence[ImageRecord], names: Sequence[str], training: TrainingView
) -> list[dict[str, Any]]:
    shares = step_shares(records, training)
    even = sum(shares) / max(1, sum(share > 0 for share in shares))
    rows = []
    for record, name, share in sorted(zip(records, names, shares, strict=True), key=lambda one: -one[2]):
        if share > OVERREPRESENTED * even:
            why = f"its {record.repeats} repeats" if record.repeats > 1 else "batches that it fills up alone"
            sentence = (
                f"{name} gets {share:.0%} of all steps, {share / even:.1f} times an even share, by {why}: it"
                " is learned more strongly than the others. Lower its repeats, or add images like it."
            )
            rows.append(bias_finding("share", name, sentence, [record], {"share": share, "even": even}))
    return rows


def _single_image_buckets(
    records: Sequence[ImageRecord], names: Sequence[str], training: TrainingView
) -> list[dict[str, Any]]:
    """Buckets that one image has for itself while others share theirs."""
    members: dict[Bucket, list[ImageRecord]] = {}
    for record, bucket in _views(records, training):
        members.setdefault(bucket, []).append(record)
    called = {record.path: name for record, name in zip(records, names, strict=True)}
    if training.batch_size < 2 or len(members) < 2:
        return []
    rows = []
    for bucket, images in members.items():
        record = max(images, key=lambda one: one.repeats)
        if record.repeats * 2 <= sum(one.repeats for one in images):
            continue
        name = called[record.path]
        size = f"{bucket.width} x {bucket.height}"
        sentence = (
            f"{name} is the only image of the size {size}: each of its batches shows it"
            f" {training.batch_size} times. Crop it to the shape of others, or add images of its shape."
            if len(images) == 1
            else (
                f"{name} makes up over half of the samples of size {size}, by its {record.repeats} repeats."
            )
        )
        rows.append(bias_finding("bucket", size, sentence, [record], {"pictures": len(images)}))
    return rows


@dataclass(frozen=True, eq=False)
class _Look:
    """Measurements of an image's pixels; `print` and `thumb` are None and `sharpness` 1 if it cannot be read
    any more."""

    print: Fingerprint | None
    sharpness: float
    thumb: np.ndarray | None = None


MEASURE = 1
"""Raised with each change of a measurement, which invalidates stored ones."""
Looks = dict[tuple[str, int, int, int, int, Crop | None, str], _Look]
"""Stored measurements, by path, time and bytes of the file, resolution, multiple of sides, crop and
background."""


@contextlib.contextmanager
def kept_looks(file: Path) -> Iterator[Looks]:
    """What an earlier audit kept in a file, one that was cancelled too; kept again afterwards, 2.4 kB an
    image."""
    looks: Looks = {}
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
        with np.load(file) as kept:
            keys = json.loads(kept["keys"].tobytes()) if int(kept["measure"]) == MEASURE else []
            rows = kept["looks"][: len(keys)]
        for (path, time, size, side, multiple, crop, behind), row in zip(keys, rows, strict=True):
            key = (path, time, size, side, multiple, crop and tuple(crop), behind)
            known = Fingerprint(row["shape"], row["colours"].astype(np.float64))
            looks[key] = _Look(known, float(row["sharpness"]), row["thumb"])
    before = looks.keys() | ()
    try:
        yield looks
    finally:
        if looks.keys() != before:
            _keep_looks(file, looks)


_ROW = [
    ("shape", "f8", (64,)),
    ("colours", "u1", (48,)),
    ("sharpness", "f8"),
    ("thumb", "u1", (SIDE, SIDE, 3)),
]


def _keep_looks(file: Path, looks: Looks) -> None:
    buffer, keys = io.BytesIO(), np.frombuffer(json.dumps(list(looks)).encode(), np.uint8)
    rows = [(o.print.shape, o.print.colours, o.sharpness, o.thumb) for o in looks.values() if o.print]
    np.savez(buffer, measure=MEASURE, keys=keys, looks=np.array(rows, _ROW))
    # Without the file the images are looked at once more, nothing else.
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, buffer.getvalue())


def audit(
    dataset: Dataset,
    training: TrainingView,
    progress: Callable[[int, int], None] | None = None,
    looks_before: Looks | None = None,
) -> dict[str, Any]:
    """The findings, as plain values for JSON.

    Args:
        training: how it will be trained on.
        progress: called with (done, all) as the images are looked at; what it raises ends the audit.
        looks_before: results of earlier audits of the same files; new ones are added, and once all images
            were looked at, those of other files go.

    Returns:
        `pictures` and `captions`: how many there are; `problems`: picture (or the file that is meant; empty
        where all are), kind, sentence, and for near-duplicates the `twin` that is kept; `tags`: tag,
        images; `shares`: picture, its share of the steps; `concepts`: see `concept_rows`; `learned`: the rows
        of `report_bias`.

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
        *_image_problems(records, names, looks, training.resolution),
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
            *(
                {"picture": clean_text(str(one.path)), "kind": one.kind, "sentence": one.sentence}
                | ({"twin": clean_text(str(twins[one]))} if one in twins else {})
                for one in problems
            ),
            *(
                {"picture": "", "kind": "common phrase", "sentence": s}
                for s in phrase_sentences(captions, training.trigger)
            ),
        ],
        "tags": [{"tag": tag, "pictures": count} for tag, count in count_tags(captions).items()],
        "shares": [{"picture": clean_text(str(r.path)), "share": share} for r, share in shares],
        "concepts": concept_rows(dataset, training),
        "learned": report_bias(records, names, [look.thumb for look in looks], training),
    }


def _looks(
    records: list[ImageRecord],
    size: tuple[int, int],
    known: Looks,
    progress: Callable[[int, int], None] | None,
) -> list[_Look]:
    """The measurements of each image; `size` is the resolution and the multiple of sides."""
    looks: list[_Look] = []
    threads = ThreadPoolExecutor(_THREADS)
    try:
        for look in threads.map(lambda record: _look(record, *size, known), records):
            looks.append(look)
            if progress is not None:
                progress(len(looks), len(records))
    finally:
        threads.shutdown(cancel_futures=True)
    used = set(map(id, looks))
    for key in [key for key, look in known.items() if id(look) not in used]:
        del known[key]
    return looks


def sharpness(image: Image.Image) -> float:
    """The steepest rise between neighbouring pixels, as a share of the image's contrast; 1 for a flat
    image."""
    grey = image.convert("L")
    width, height = grey.size
    dark, bright = (_percentile(np.array(grey.histogram()), percent) for percent in (0.5, 99.5))
    if bright - dark < _FLAT:
        return 1.0
    moved = (grey.crop((x, y, width, height)) for x, y in ((0, 1), (1, 0)))
    rises = [ImageChops.difference(grey.crop((0, 0, *one.size)), one).histogram() for one in moved]
    # The very steepest could be a single broken pixel.
    return float(_percentile(np.sum(rises, axis=0), 99.9) / (bright - dark))


def _percentile(counts: np.ndarray, percent: float) -> float:
    """`np.percentile` of the values 0, 1, ..., each of which there are `counts`, without sorting them."""
    ends = counts.cumsum()
    below, part = divmod((ends[-1] - 1) * percent / 100, 1)
    low, high = np.searchsorted(ends, (below, min(below + 1, ends[-1] - 1)), side="right")
    return float(low + (high - low) * part)


def common_phrases(captions: list[str]) -> list[tuple[str, int]]:
    """Phrases of up to six words in over 80% of the captions, longest first, with their number of
    captions."""
    least = _COMMON_SHARE * len(captions)
    # A phrase is as rare as its rarest word: those of other words need not be counted.
    words = Counter(word for caption in captions for word in set(_PART.sub(" ", caption.casefold()).split()))
    frequent = {word for word, count in words.items() if count > least}
    counts = Counter(phrase for caption in captions for phrase in _phrases_of(caption, frequent))
    common = [phrase for phrase, count in counts.items() if count > least]
    longest: list[str] = []
    for phrase in sorted(common, key=lambda phrase: (-phrase.count(" "), phrase)):
        if not any(f" {phrase} " in f" {longer} " for longer in longest):
            longest.append(phrase)
    return [(phrase, counts[phrase]) for phrase in longest]


def _phrases_of(caption: str, frequent: set[str]) -> set[str]:
    """All runs of frequent words within a part of the caption that neither begin nor end with a small one:
    "photo" and "photo of a cat", not "of a"."""
    found: set[str] = set()
    for part in _PART.split(caption.casefold()) if frequent else ():
        words = part.split()
        for i in (i for i, word in enumerate(words) if word in frequent and word not in STOP_WORDS):
            run = list(itertools.takewhile(frequent.__contains__, words[i : i + _LONGEST_PHRASE]))
            found.update(" ".join(run[: j + 1]) for j, word in enumerate(run) if word not in STOP_WORDS)
    return found


def phrase_sentences(captions: list[str], trigger: str = "") -> list[str]:
    """A sentence on each phrase in over 80% of the captions that is not part of the trigger."""
    if len(captions) < _FEWEST_CAPTIONS:
        return []
    own = f" {' '.join(trigger.casefold().replace(',', ' ').split())} "
    return [
        f"“{phrase}” is in {count} of {len(captions)} captions: unless it is your trigger word, remove it"
        " from most, or it will become a trigger word."
        for phrase, count in common_phrases(captions)
        if f" {phrase} " not in own
    ]


def _look(record: ImageRecord, resolution: int, multiple: int, known: Looks) -> _Look:
    try:
        file, how = record.path.stat(), (record.crop, record.background)
        key = (str(record.path), file.st_mtime_ns, file.st_size, resolution, multiple, *how)
        if key not in known:
            image = open_image(record, 2 * resolution)
            fitted = resize_and_crop(image, choose_bucket(*image.size, resolution, multiple))
            known[key] = _Look(compute_fingerprint(image), sharpness(fitted), reduce_image(fitted))
    except (DatasetError, OSError):
        return _Look(None, 1.0)
    return known[key]


def _names(records: list[ImageRecord]) -> list[str]:
    """How images are named in sentences: the file's name, with its folder where two have the same."""
    counts = Counter(record.path.name for record in records)
    return [
        record.path.name if counts[record.path.name] == 1 else f"{record.path.parent.name}/{record.path.name}"
        for record in records
    ]


def _image_problems(
    records: list[ImageRecord], names: list[str], looks: list[_Look], resolution: int
) -> list[FileProblem]:
    tiny, blurred = [], []
    for record, name, look in zip(records, names, looks, strict=True):
        if record.width * record.height * 4 < resolution**2:
            sentence = (
                f"{name} is only {record.width} x {record.height} pixels, under a quarter of the area that is"
                f" trained at ({resolution} x {resolution}); use a larger copy if there is one."
            )
            tiny.append(FileProblem(record.path, "tiny", sentence))
        if look.sharpness < _SHARP:
            sentence = (
                f"{name} has no sharp edge at the training size; leave it out, or its blur is learned too."
            )
            blurred.append(FileProblem(record.path, "blurred", sentence))
    return tiny + blurred


def _twins(records: list[ImageRecord], names: list[str], looks: list[_Look]) -> dict[FileProblem, Path]:
    """Each image that looks the same as an earlier one, and which."""
    return {
        FileProblem(
            records[index].path,
            "twins",
            f"{names[index]} looks the same as {names[first]}; keep one, or it is learned too strongly.",
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
