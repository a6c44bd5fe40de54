"""The dataset as HTML: a grid of lazy thumbnails that carries all that selecting a picture needs.

Selecting, filtering and the arrow keys work in the browser without asking the server, so that they are
instant with 1,000 pictures; `assets/window.js` has that half.
"""

from pathlib import Path

from app.bases import Base
from app.routes import address
from app.words import TIMES, chip, many, safe
from lora_core.dataset.buckets import bucket_of, crop_box
from lora_core.dataset.folder import Dataset, ImageRecord, Problem

MOST_SENTENCES = 12


def grid(dataset: Dataset, folder: Path, base: Base, resolution: int, meter: str = "") -> str:
    """One button a picture; `meter` changes where captions have to be counted again."""
    if not dataset.records:
        return (
            '<div class="empty"><h3>No pictures yet</h3><p class="small">15 to 30 sharp pictures of one thing'
            " or one style are plenty. Write beside each what is in it; what you do not write is what gets"
            " learned.</p></div>"
        )
    size = resolution or base.resolution
    cells = [_cell(record, folder, size, base.multiple) for record in dataset.records]
    return (
        '<div class="grid" role="group" aria-label="Pictures"'
        f' data-meter="{safe(meter)}">{"".join(cells)}</div>'
    )


def _cell(record: ImageRecord, folder: Path, resolution: int, multiple: int) -> str:
    bucket = bucket_of(record.width, record.height, resolution, multiple)
    left, top, right, bottom = crop_box(record.width, record.height, bucket)
    crop = (
        100 * left / record.width,
        100 * top / record.height,
        100 * (1 - right / record.width),
        100 * (1 - bottom / record.height),
    )
    small = record.width < bucket.width or record.height < bucket.height
    name = record.path.relative_to(folder).as_posix()
    facts = f"{record.width} {TIMES} {record.height}, trained at {bucket.width} {TIMES} {bucket.height}"
    facts += f", {record.repeats} repeats" if record.repeats > 1 else ""
    return (
        f'<button type="button" class="thumb" tabindex="-1" data-picture="{safe(name)}"'
        f' data-caption="{safe(record.caption)}" data-facts="{safe(facts)}" data-ratio="{record.width} /'
        f' {record.height}"'
        f' data-crop="{" ".join(f"{side:.2f}%" for side in crop)}" data-small="{int(small)}"'
        f' data-big="{safe(address("dataset", folder, record.path))}" aria-label="{safe(name)}">'
        '<img loading="lazy" decoding="async" alt=""'
        f' src="{safe(address("dataset", folder, record.path, "thumb"))}">'
        f"{'<em>small</em>' if small else ''}</button>"
    )


def filters(dataset: Dataset) -> str:
    """The filter buttons; their counts are kept by the browser, which knows of captions as they are typed."""
    if not dataset.records:
        return ""
    bare = sum(not record.caption for record in dataset.records)
    return (
        '<div class="seg" role="group" aria-label="Which pictures are shown"><button type="button"'
        f' data-filter="all" aria-pressed="true">All <b>{len(dataset.records)}</b></button><button'
        f' type="button" data-filter="bare" aria-pressed="false">No caption <b>{bare}</b></button><button'
        ' type="button" data-filter="small" aria-pressed="false">Small <b>0</b></button></div>'
    )


def findings(dataset: Dataset, skipped: list[Problem], demo: bool, cut: str = "") -> str:
    """Chips with counts, and a sentence for each thing that is wrong; `cut` is one on captions that are too
    long."""
    bare = sum(not record.caption for record in dataset.records)
    ready = len(dataset.records) - bare
    chips = []
    if ready:
        chips.append(chip(f"{ready} ready", "good"))
    if bare:
        chips.append(chip(f"{bare} without caption", "warn"))
    if dataset.problems:
        chips.append(chip(many(len(dataset.problems), "problem"), "bad"))
    if skipped:
        chips.append(chip(f"{len(skipped)} skipped at the last import", "warn"))
    if demo:
        chips.append('<span class="chip" data-captions-fixed>the demo\'s own, which stay as they are</span>')
    if not chips:
        return ""
    sentences = [problem.sentence for problem in [*dataset.problems, *skipped]]
    sentences = [cut, *sentences] if cut else sentences
    lines = "".join(f"<li>{safe(sentence)}</li>" for sentence in sentences[:MOST_SENTENCES])
    if len(sentences) > MOST_SENTENCES:
        lines += f"<li>And {len(sentences) - MOST_SENTENCES} more.</li>"
    listed = f'<ul class="sentences small">{lines}</ul>' if lines else ""
    return (
        f'<div class="panel tight"><div class="row" id="dataset-chips">{"".join(chips)}</div>{listed}</div>'
    )


DETAIL = """<aside class="panel detail" id="picture-detail" data-none="1">
<div class="frame" id="picture-big"><img alt="" hidden><div class="crop" hidden></div></div>
<p class="small num" id="picture-facts">Choose a picture to see it large and to write its caption.</p>
<label id="caption">Caption<textarea rows="4" disabled aria-describedby="caption-tokens"
 placeholder="What is in the picture, in words or tags"></textarea></label>
<div class="row apart"><span class="small num" id="caption-tokens"
 title="Counted with the base's own tokenizer, the trigger word in front included"></span>
<span class="chip" id="caption-state" data-state="saved" role="status"></span></div>
<p class="small" id="caption-cut" hidden></p>
<div class="row apart"><div class="row"><button type="button" class="own" data-step="-1"
disabled>Previous</button> <button type="button" class="own" data-step="1" disabled>Next</button></div>
<button type="button" class="own" id="leave-out" disabled>Leave out</button></div></aside>"""
