"""The dataset as the page draws it: pictures as data, findings as HTML.

The grid is drawn in the browser (`assets/dataset.js`), where choosing, filtering and the arrow keys are
instant with 1,000 pictures; the server sends each picture's facts once, and again only when they change.
"""

import functools
from pathlib import Path
from typing import Any
from urllib.parse import quote

from app.dataset.meter import meter_version, warn_of_long_captions
from app.formatting import chip, pluralize, safe
from app.train.form import Plan
from lora_core.data.audit import phrase_sentences
from lora_core.data.buckets import choose_bucket, crop_box
from lora_core.data.dataset import AUDIT_ONLY, UNUSED, summarize_notes
from lora_core.data.scan import Dataset, FileProblem, ImageRecord
from lora_core.projects.project import Project, left_out, relative_name

MOST_SENTENCES = 12


def gallery_data(project: Project, plan: Plan) -> dict[str, Any]:
    """All that the page shows of the pictures, as plain values.

    Returns:
        `mark`: what these values belong to; `fixed`: whether they are the demo's; `pictures` and `left_out`:
        each as `cell` gives it.
    """
    dataset, folder = project.dataset(), project.dataset_folder
    side, multiple = _size(plan)
    return {
        "mark": gallery_version(project, plan),
        "revision": project.revision,
        "fixed": project.uses_demo,
        "pictures": [image_facts(record, folder, side, multiple) for record in dataset.records],
        "left_out": [image_facts(record, project.aside, side, multiple) for record in left_out(project)],
    }


def gallery_version(project: Project, plan: Plan) -> str:
    """What a page compares to know that its pictures are no longer those on disk."""
    return f"{project.revision} {_size(plan)}"


def _size(plan: Plan) -> tuple[int, int]:
    return plan.config.train.resolution or plan.base.resolution, plan.base.multiple


def image_facts(record: ImageRecord, folder: Path, resolution: int, multiple: int) -> dict[str, Any]:
    """One picture's facts: name, caption, size, bucket, crop in percent from each side, repeats, time."""
    bucket, crop = _crop(record.width, record.height, resolution, multiple)
    try:
        version = record.path.stat().st_mtime_ns
    except OSError:
        version = 0
    name = relative_name(record.path, folder)
    return {
        "name": name,
        "url": f"{quote(name)}?v={version}",
        "caption": record.caption,
        "size": [record.width, record.height],
        "bucket": bucket,
        "crop": crop,
        "small": record.width < bucket[0]
        or record.height < bucket[1]
        or _is_much_smaller(record, resolution),
        "repeats": record.repeats,
        "held": record.held_out,
    }


def _is_much_smaller(record: ImageRecord, resolution: int) -> bool:
    """Under a quarter of the area that is trained at, as the check says it."""
    return record.width * record.height * 4 < resolution**2


@functools.lru_cache(maxsize=4096)
def _crop(width: int, height: int, resolution: int, multiple: int) -> tuple[list[int], list[float]]:
    bucket = choose_bucket(width, height, resolution, multiple)
    left, top, right, bottom = crop_box(width, height, bucket)
    shares = (left / width, top / height, 1 - right / width, 1 - bottom / height)
    return [bucket.width, bucket.height], [round(100 * share, 2) for share in shares]


def version_marker(project: Project, plan: Plan) -> str:
    """The hidden piece that tells pages when to ask for the pictures again, and to count captions anew."""
    project.dataset()
    return (
        f'<span id="dataset-mark" hidden data-mark="{safe(gallery_version(project, plan))}"'
        f' data-meter="{safe(meter_version(plan))}" data-project="{safe(project.path.name)}"'
        f' data-trigger="{safe(plan.trigger)}"></span>'
    )


def findings_html(dataset: Dataset, skipped: list[FileProblem], demo: bool, advice: list[str]) -> str:
    """Chips with counts, and a sentence for each thing that is wrong.

    Args:
        dataset: the pictures.
        skipped: what the last import left out.
        demo: whether they are the demo's.
        advice: sentences on the captions as a whole.
    """
    bare = sum(not record.caption for record in dataset.records)
    held = sum(record.held_out for record in dataset.records)
    ready = len(dataset.records) - bare
    chips = []
    if ready:
        chips.append(chip(f"{ready} ready", "good"))
    if bare:
        chips.append(chip(f"{bare} without caption", "warn"))
    if held:
        chips.append(chip(f"{held} held out for validation"))
    if dataset.problems:
        chips.append(chip(pluralize(len(dataset.problems), "problem"), "bad"))
    if unused := sum(note.kind in UNUSED for note in dataset.notes):
        chips.append(chip(f"{pluralize(unused, 'file')} not used", "warn"))
    if skipped:
        chips.append(chip(f"{len(skipped)} skipped at the last import", "warn"))
    if demo:
        chips.append('<span class="chip" data-captions-fixed>the demo\'s own, which stay as they are</span>')
    if not chips:
        return ""
    said = [*dataset.problems, *summarize_notes(dataset.notes, AUDIT_ONLY), *skipped]
    sentences = [*advice, *(problem.sentence for problem in said)]
    lines = "".join(f"<li>{safe(sentence)}</li>" for sentence in sentences[:MOST_SENTENCES])
    if len(sentences) > MOST_SENTENCES:
        lines += f"<li>And {len(sentences) - MOST_SENTENCES} more.</li>"
    listed = f'<ul class="sentences small">{lines}</ul>' if lines else ""
    onward = (
        '<button type="button" class="own" data-tab="Train">Next: Train</button>' if dataset.records else ""
    )
    return (
        '<div class="panel tight"><div class="row apart"><div class="row"'
        f' id="dataset-chips">{"".join(chips)}</div>{onward}</div>{listed}</div>'
    )


class FindingsView:
    """The findings of the open project, worked out again only where something changed."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._known: tuple[object, str] | None = None

    def html(self, project: Project, plan: Plan) -> str:
        """As `findings`."""
        dataset, skipped = project.dataset(), [] if project.uses_demo else project.notes
        key = (project.revision, meter_version(plan), tuple(problem.sentence for problem in skipped))
        if self._known is None or self._known[0] != key:
            cut = warn_of_long_captions(dataset, plan)
            captions = [record.caption for record in dataset.records if record.caption]
            phrases = [] if project.uses_demo else phrase_sentences(captions, plan.trigger)[:3]
            advice = [*([cut] if cut else []), *phrases]
            self._known = (key, findings_html(dataset, skipped, project.uses_demo, advice))
        return self._known[1]
