"""All that stands in the way of a run, its pictures and captions included: what is looked at before Start."""

import math
from collections.abc import Callable
from pathlib import Path

from lora_core.dataset.captions import CHUNK, CaptionRules, part_beyond, varies, with_trigger
from lora_core.dataset.folder import AUDIT_ONLY, open_dataset, summaries
from lora_core.dataset.records import Dataset, ImageRecord
from lora_core.dataset.split import held_out, wished_pictures
from lora_core.spec.base_facts import BaseFacts
from lora_core.spec.config import RunConfig
from lora_core.spec.disk import folder_bytes
from lora_core.spec.errors import DatasetError, ModelFileError
from lora_core.spec.preflight import Encoded, base_of, gpu_free_bytes, problems_of
from lora_core.spec.problems import Problem
from lora_core.spec.room import DRAWN_CAPTIONS_BYTES

SHOWN = 5
"""So many of a kind are named one by one."""
_EXCERPT = 60
_LATENT_BYTES = 4 * 4 / 64
"""A pixel: four channels in fp32, one latent for 8 x 8 pixels."""
_FILE = 4096
_MEASURED = 16
"""So many training pictures are measured where none can be held out."""


def preflight(
    config: RunConfig,
    workspace: Path,
    dataset: Dataset | None = None,
    card: Callable[[], int | None] = gpu_free_bytes,
) -> list[Problem]:
    """Everything that is wrong with a run before it starts, and what a person should know.

    Args:
        config: of the run; a name that is empty is given later and not looked at.
        workspace: where it would lie.
        dataset: what was read already of its pictures; else they are read.
        card: asked for the free bytes of the graphics card; None where there is none.

    Returns:
        Problems that block first; empty where all is well.
    """
    facts, found = base_of(config)
    records: list[ImageRecord] = []
    try:
        if dataset is None:
            dataset = open_dataset(config.dataset.path, workspace / "cache" / "datasets")
        records = dataset.records
        found = [*_pictures(dataset), *_split(records, config), *found]
    except DatasetError as error:
        found = [Problem("dataset", str(error)), *found]
    if facts is not None:
        found += _captions(records, config, facts)
    room = Encoded(0, 0)
    if facts is not None and facts.family is not None:
        cache = workspace / "cache"
        again, drawn = caption_bytes(records, config, facts)
        lacking = (
            (_picture_bytes(records, config, facts), folder_bytes(cache / "latents")),
            (again, folder_bytes(cache / "text")),
        )
        room = Encoded(sum(max(0, need - there) for need, there in lacking), again + drawn)
    found += problems_of(config, workspace, facts, room, card)
    return sorted(found, key=lambda problem: not problem.blocking)


def _pictures(dataset: Dataset) -> list[Problem]:
    found = [Problem("picture", problem.sentence) for problem in dataset.problems[:SHOWN]]
    more = len(dataset.problems) - SHOWN
    if not dataset.records and not found:
        found.append(Problem("dataset", "There are no pictures yet; put some in."))
    if more > 0:
        found.append(Problem("picture", f"And {more} more."))
    notes = summaries(dataset.notes, AUDIT_ONLY)
    return [*found, *(Problem(note.kind, note.sentence, False) for note in notes)]


def _split(records: list[ImageRecord], config: RunConfig) -> list[Problem]:
    try:
        if any(record.held_out for record in records):
            held_out(records, config.validation.pictures, config.seed)
        else:  # counting is enough, and pictures need not be read for it
            wished_pictures(len(records), config.validation.pictures)
    except DatasetError as error:
        return [Problem("validation", str(error))] if records else []
    return []


def _captions(records: list[ImageRecord], config: RunConfig, facts: BaseFacts) -> list[Problem]:
    """Captions of which the end is not read."""
    limit = config.train.tokens
    cut: list[tuple[str, str]] = []
    try:
        for record in records:
            lines = with_trigger(record.caption, config.dataset.trigger).splitlines()
            beyond = max((part_beyond(line, limit, facts.tokenizer) for line in lines), key=len, default="")
            if beyond:
                cut.append((record.path.name, beyond))
    except ModelFileError as error:
        return [Problem("caption", f"The length of the captions could not be checked. {error}", False)]
    if not cut:
        return []
    name, beyond = max(cut, key=lambda one: len(one[1]))
    excerpt = beyond if len(beyond) <= _EXCERPT else f"{beyond[:_EXCERPT]}..."
    count = "1 caption is" if len(cut) == 1 else f"{len(cut)} captions are"
    sentence = (
        f"{count} longer than the {limit} tokens that are read; of {name}, “{excerpt}” is not. Shorten it, or"
        " raise train.tokens."
    )
    return [Problem("caption", sentence, False)]


def caption_bytes(records: list[ImageRecord], config: RunConfig, facts: BaseFacts) -> tuple[int, int]:
    """About what a run's encoded captions take where no text encoder is trained, else nothing.

    Returns:
        Bytes of those that come again, which are kept on disk and in memory, and of those that vary from look
        to look, which are kept in memory up to a limit.
    """
    if facts.family is None or config.optim.text_encoder_lr or config.optim.text_encoder_2_lr:
        return 0, 0
    width = 2 if config.train.precision in ("bf16", "fp16") else 4
    one = config.train.tokens // CHUNK * (CHUNK + 2) * facts.family.context_width * width + _FILE
    rules, validation = CaptionRules.of(config.dataset), config.validation
    fixed = sum(not varies(record.caption, rules) for record in records)
    # Those that vary are measured without chance: the held-out ones, and about as many of the others.
    held = validation.pictures * (1 if validation.pictures >= 1 else len(records))
    again = min(len(records), fixed + _MEASURED + math.ceil(2 * held)) if records else 0
    again += len(config.preview.prompts) + validation.prior + 1
    looks = config.train.steps * config.train.batch_size * config.train.accumulate
    return again * one, min(DRAWN_CAPTIONS_BYTES, looks * one) if fixed < len(records) else 0


def _picture_bytes(records: list[ImageRecord], config: RunConfig, facts: BaseFacts) -> int:
    """Bytes of encoded pictures on disk."""
    side = config.train.resolution or facts.resolution
    looks = 2 if config.dataset.flip else 1
    return sum(int(min(r.width * r.height, side**2) * _LATENT_BYTES) + _FILE for r in records) * looks
