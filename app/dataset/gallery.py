"""The images as the page shows them: thumbnails, token counts, facts per image, and the summary below the
grid.

`assets/dataset.js` draws the grid, so that selecting and filtering 1,000 images is instant; the server sends
each image's facts once, and again when they change. Thumbnails are made on first request by two threads,
because each may hold a decoded image of 90 million pixels, and cached on disk. Tokens are counted with the
base's own tokenizer, on the longest text that training may use: trigger word, one line, longest alternative.
"""

import asyncio
import contextlib
import functools
import hashlib
import typing
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from app.templates import _, pluralize
from app.train.form import Plan
from lora_core.data.audit import phrase_sentences
from lora_core.data.captions import (
    CHUNK,
    MOST_CAPTIONS,
    WRAP,
    choose_parts,
    count_all_tokens,
    rules_of,
    truncated_part,
    with_trigger,
)
from lora_core.data.dataset import AUDIT_ONLY, UNUSED, summarize_notes
from lora_core.data.images import (
    Crop,
    Dataset,
    FileProblem,
    ImageRecord,
    choose_buckets,
    crop_box,
    cut_at_focus,
    make_thumbnail,
)
from lora_core.errors import LoraError
from lora_core.projects.project import Project, list_left_out, relative_name
from lora_core.settings.config import FIELDS
from lora_core.system.files import clean_text, write_atomically

KEPT_SIDE = 256
_THREADS = 2


class Thumbnails:
    """A cache folder of thumbnails, named by the image's path, time and size; safe to delete."""

    def __init__(self, folder: Path) -> None:
        """Cache in `folder`, created when needed."""
        self.folder = folder
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="thumbs")

    async def webp(self, file: Path, side: int) -> bytes:
        """The image as WebP, fitted into a square of `side` pixels.

        Raises:
            DatasetError: it cannot be read as an image.
        """
        return await asyncio.get_running_loop().run_in_executor(self._pool, self.made, file, side)

    def made(self, file: Path, side: int) -> bytes:
        """As `webp`, in this thread."""
        if side > KEPT_SIDE:
            return make_thumbnail(file, side)
        stamp = file.stat()
        key = hashlib.sha256(f"{file}\n{stamp.st_mtime_ns}\n{stamp.st_size}\n{side}".encode()).hexdigest()
        kept = self.folder / key[:2] / f"{key[2:34]}.webp"
        with contextlib.suppress(OSError):
            data = kept.read_bytes()
            if _whole(data):
                return data
        data = make_thumbnail(file, side)
        # A full disk must not blank the page. Nothing waits for the disk either: what a power cut spoils is
        # seen by its length and made again.
        with contextlib.suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(kept, data, sync=False)
        return data

    def prepare(self, files: list[Path], side: int = KEPT_SIDE) -> None:
        """Make the first ones in advance; failures are left to the request that needs the file."""

        def quietly(file: Path) -> None:
            with contextlib.suppress(LoraError, OSError):
                self.made(file, side)

        list(self._pool.map(quietly, files))

    def close(self) -> None:
        """Stop making thumbnails."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _whole(data: bytes) -> bool:
    """Whether a WebP has the length that its RIFF header states (bytes 4 to 8, plus 8)."""
    return data[:4] == b"RIFF" and int.from_bytes(data[4:8], "little") + 8 == len(data)


LIMITS: tuple[int, ...] = typing.get_args(FIELDS["train.max_token_length"].annotation)


@dataclass(frozen=True)
class TokenCount:
    """One caption against the limit.

    Attributes:
        tokens: of the longest text that is drawn from it; None where the base's tokenizer cannot be used.
        limit: how many are read.
        cut: what of that text is not read.
    """

    tokens: int | None
    limit: int
    cut: str = ""


def count_caption_tokens(caption: str, plan: Plan, trigger: str | None = None) -> TokenCount:
    """Count a caption's tokens as the planned run would read it, with its own `trigger` if given."""
    trigger = plan.trigger if trigger is None else trigger
    return _counted(clean_text(caption), trigger, *_limits(plan))


def _limits(plan: Plan) -> tuple[int, Path]:
    """The limit, and the tokenizer, which is looked for on the disk."""
    return plan.config.train.max_token_length, plan.base.tokenizer


_UNCOUNTED = (LoraError, OSError, NotImplementedError)
"""What counting raises where there is no such tokenizer."""


@functools.lru_cache(MOST_CAPTIONS)
def _counted(caption: str, trigger: str, limit: int, tokenizer: Path) -> TokenCount:
    texts = _longest_texts(caption, trigger)
    try:
        counts = count_all_tokens(texts, tokenizer)
        most = max(counts)
        return TokenCount(most, limit, truncated_part(texts[counts.index(most)], limit, tokenizer))
    except _UNCOUNTED:
        return TokenCount(None, limit)


def _longest_texts(caption: str, trigger: str) -> list[str]:
    """The longest text that training may draw from each line."""
    lines = [line for line in caption.splitlines() if line.strip()] or [""]
    return [with_trigger(_longest(line), trigger) for line in lines]


def _longest(line: str) -> str:
    """The line with the longest of each group of alternatives."""
    return choose_parts(line, lambda parts: max(parts, key=len))


def warn_of_long_captions(dataset: Dataset, plan: Plan) -> str:
    """A sentence about truncated captions, "" if there are none."""
    rules, limits = plan.config.dataset, _limits(plan)
    captions = [(clean_text(r.full_caption), rules_of(r, rules).trigger) for r in dataset.records]
    texts = [_longest_texts(*caption) for caption in captions]
    every = [text for several in texts for text in several]
    try:
        counts = dict(zip(every, count_all_tokens(every, limits[1]), strict=True))
    except _UNCOUNTED:
        return ""
    # Of longer ones it matters at which commas the chunks end.
    surely_read = limits[0] - (limits[0] // CHUNK - 1) * WRAP
    cut = [
        record.path.name
        for record, caption, several in zip(dataset.records, captions, texts, strict=True)
        if max(counts[text] for text in several) > surely_read and _counted(*caption, *limits).cut
    ]
    if not cut:
        return ""
    limit, most = limits[0], LIMITS[-1]
    advice = (
        _("shorten them") if limit == most else _("shorten them, or raise Caption tokens to up to {}", most)
    )
    named = ", ".join(cut[:3]) + (_(" and others") if len(cut) > 3 else "")
    num_long = pluralize(len(cut), "caption")
    return _("{} longer than the {} tokens that are read ({}): {}.", num_long, limit, named, advice)


def meter_version(plan: Plan) -> str:
    """Changes when captions have to be counted again."""
    return f"{plan.config.train.max_token_length} {plan.base.tokenizer} {plan.trigger}"


MOST_SENTENCES = 12


def gallery_data(project: Project, plan: Plan) -> dict[str, Any]:
    """All that the page shows of the images, as plain values.

    Returns:
        `mark`: what these values belong to; `fixed`: whether they are the demo's; `pictures` and `left_out`:
        each as `cell` gives it.
    """
    dataset, folder = project.dataset(), project.dataset_folder
    sizes = _sizes(plan)
    return {
        "mark": gallery_version(project, plan),
        "project": project.path.name,
        "revision": project.revision,
        "fixed": project.uses_demo,
        "pictures": [image_facts(record, folder, *sizes) for record in dataset.records],
        "left_out": [
            image_facts(record, project.left_out_folder, *sizes) for record in list_left_out(project)
        ],
    }


def gallery_version(project: Project, plan: Plan) -> str:
    """Changes when the page's images are no longer those on disk."""
    return f"{project.revision} {_sizes(plan)}"


def _sizes(plan: Plan) -> tuple[tuple[int, ...], int]:
    """The run's resolutions, and what a bucket's sides are divisible by, in pixels."""
    several = plan.config.dataset.resolutions or [plan.config.resolution(plan.base.resolution)]
    return tuple(several), plan.base.multiple


def image_facts(
    record: ImageRecord, folder: Path, resolutions: tuple[int, ...], multiple: int
) -> dict[str, Any]:
    """An image's name, mask, caption, size, buckets (the largest first), repeats and time, what training cuts
    off in percent per side, and the `box` that the user chose, with its focus point."""
    own = dict(record.concept.rules).get("resolutions") if record.concept else None
    size, name = (record.width, record.height), relative_name(record.path, folder)
    return {
        "name": name,
        "url": versioned(record.path, name),
        "mask": record.mask and versioned(record.mask, relative_name(record.mask, folder)),
        "caption": record.caption,
        **_shape_facts(size, record.crop, record.focus, tuple(own or resolutions), multiple),
        "repeats": record.repeats,
        "held": record.held_out,
    }


def versioned(path: Path, name: str) -> str:
    """The part of an image's URL after its kind; it contains the file's time."""
    try:
        version = path.stat().st_mtime_ns
    except OSError:
        version = 0
    return f"{quote(name)}?v={version}"


@functools.lru_cache(maxsize=4096)
def _shape_facts(
    size: tuple[int, int], own: Crop | None, point: tuple[float, float] | None,
    resolutions: tuple[int, ...], multiple: int,
) -> dict[str, Any]:  # fmt: skip
    """Of `image_facts` what follows from size, own crop and focus point: most images of a set share it."""
    width, height = size
    buckets = choose_buckets(width, height, resolutions, multiple)[::-1]
    least = buckets[0]
    cut = crop_box(width, height, cut_at_focus(width, height, least, point))
    left, top, right, bottom = own or (0.0, 0.0, 1.0, 1.0)
    wide, high = right - left, bottom - top
    focus = (left + wide * point[0] / width, top + high * point[1] / height) if point else ()
    # What the user's crop leaves out, and then the bucket of it.
    outside = (left, top, 1 - right, 1 - bottom)
    inside = (cut[0] / width, cut[1] / height, 1 - cut[2] / width, 1 - cut[3] / height)
    sides = (wide, high) * 2
    return {
        "size": [width, height],
        "whole": [round(width / wide), round(height / high)],
        "buckets": [[one.width, one.height] for one in buckets],
        "crop": [
            round(100 * (out + part * side), 2)
            for out, part, side in zip(outside, inside, sides, strict=True)
        ],
        "box": (left, top, right, bottom, *focus) if own or focus else None,
        # Less than a quarter of the area that is trained at.
        "small": width < least.width or height < least.height or 4 * width * height < max(resolutions) ** 2,
    }


def page_versions(project: Project, plan: Plan) -> dict[str, str]:
    """What tells pages when to reload images and recount captions."""
    project.dataset()
    return {
        "mark": gallery_version(project, plan), "meter": meter_version(plan), "project": project.path.name,
        "trigger": plan.trigger,
    }  # fmt: skip


def summarize(dataset: Dataset, skipped: list[FileProblem], demo: bool, advice: list[str]) -> dict[str, Any]:
    """The counts of the summary as (text, tone), and a sentence for each thing worth knowing.

    Args:
        dataset: the images.
        skipped: what the last import left out.
        demo: whether they are the demo's.
        advice: sentences on all captions.
    """
    bare = sum(not record.caption for record in dataset.records)
    held = sum(record.held_out for record in dataset.records)
    masked = sum(record.mask is not None for record in dataset.records)
    concepts = len({record.concept for record in (*dataset.records, *dataset.reg)} - {None})
    unused = sum(note.kind in UNUSED for note in dataset.notes)
    counts = [
        (len(dataset.records) - bare, _("{} ready", pluralize(len(dataset.records) - bare, "image")), "good"),
        (bare, _("{count} without caption", count=bare), "warn"),
        (held, _("{count} for validation", count=held), ""),
        (masked, _("{count} with a mask", count=masked), ""),
        (concepts, pluralize(concepts, "concept"), ""),
        (len(dataset.reg), _("{count} for regularisation", count=len(dataset.reg)), ""),
        (len(dataset.problems), pluralize(len(dataset.problems), "problem"), "bad"),
        (unused, _("{files} not used", files=pluralize(unused, "file")), "warn"),
        (demo, _("Demo images (read-only)"), ""),
    ]
    notes = [*summarize_notes(dataset.notes, AUDIT_ONLY), *summarize_notes(skipped)]
    return {
        "pictures": len(dataset.records),
        "chips": [(text, tone) for count, text, tone in counts if count],
        "sentences": [one.sentence for one in dataset.problems] + advice + [one.sentence for one in notes],
        "most": MOST_SENTENCES,
    }


class DatasetSummary:
    """Caches `summarize` until its inputs change."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._known: tuple[object, dict[str, Any]] | None = None

    def read(self, project: Project, plan: Plan) -> dict[str, Any]:
        """See `summarize`."""
        dataset, skipped = project.dataset(), [] if project.uses_demo else project.notes
        key = (project.revision, meter_version(plan), tuple(problem.sentence for problem in skipped))
        if self._known is None or self._known[0] != key:
            cut = warn_of_long_captions(dataset, plan)
            captions = [record.caption for record in dataset.records if record.caption]
            phrases = [] if project.uses_demo else phrase_sentences(captions, plan.trigger)[:3]
            advice = [*([cut] if cut else []), *phrases]
            self._known = (key, summarize(dataset, skipped, project.uses_demo, advice))
        return self._known[1]
