"""A run's samples as small pictures inside the page, the base's own at the left."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from lora_core.report.story import Story
from lora_core.spec.events import PreviewDone
from lora_core.spec.plot import safe

RAW = ", raw adapter (above: its average)"
MOST_STEPS, MOST_PROMPTS = 7, 4
ROOM = 1_600_000
"""Bytes that all samples may take as base64; the page stays below 3 MB with the rest."""
SIDES = (320, 256, 192, 128, 96)
QUALITY = 80


@dataclass(frozen=True)
class Sample:
    """One picture.

    Attributes:
        step: at which it was drawn.
        file: where it lies.
    """

    step: int
    file: Path


def samples_html(story: Story) -> str:
    """A row a prompt, a column a step."""
    rows = sample_rows(story)
    if not rows:
        return "<p>No samples were drawn.</p>"
    pictures = _fitting([sample.file for _, samples in rows for sample in samples])
    parts = []
    for prompt, samples in rows:
        shots = "".join(_figure(sample, pictures.get(sample.file, ""), story) for sample in samples)
        parts.append(
            f'<p class="prompt">{safe(prompt)}</p><div class="strip" tabindex="0" role="group"'
            f' aria-label="Samples of: {safe(prompt)}" style="--count: {len(samples)}">{shots}</div>'
        )
    return "".join(parts)


def sample_rows(story: Story) -> list[tuple[str, list[Sample]]]:
    """(prompt, its samples over the steps), of a few prompts and a few steps."""
    done = _chosen(story.progress.previews, story.progress.best_step)
    if not done:
        return []
    rows = []
    for number, prompt in enumerate(done[-1].prompts[:MOST_PROMPTS]):
        same = [one for one in done if number < len(one.prompts) and one.prompts[number] == prompt]
        for words, drawn in (("", [one.files for one in same]), (RAW, [one.raw_files for one in same])):
            samples = [
                Sample(one.step, story.run.path / files[number])
                for one, files in zip(same, drawn, strict=True)
                if number < len(files)
            ]
            if samples:
                rows.append((f"{prompt}{words}", samples))
    return rows


def _chosen(previews: Sequence[PreviewDone], best: int | None) -> list[PreviewDone]:
    """The first, the last, and a few between them, the best among those."""
    by_step = {one.step: one for one in previews if one.files}
    steps = sorted(by_step)
    if len(steps) > MOST_STEPS:
        places = {round(i * (len(steps) - 1) / (MOST_STEPS - 1)) for i in range(MOST_STEPS)}
        kept = [steps[place] for place in sorted(places)]
        if best in by_step and best not in kept:
            nearest = min(range(1, len(kept) - 1), key=lambda i: abs(kept[i] - best))
            kept[nearest] = best
        steps = sorted(set(kept))
    return [by_step[step] for step in steps]


def _figure(sample: Sample, data: str, story: Story) -> str:
    title = "base" if sample.step == 0 else f"step {sample.step:,}"
    best = ", best" if sample.step and sample.step == story.progress.best_step else ""
    words = f"{title}{best}"
    image = (
        f'<img src="data:image/webp;base64,{data}" alt="{words}">' if data else '<div class="gone">gone</div>'
    )
    return f"<figure>{image}<figcaption>{words}</figcaption></figure>"


def _fitting(files: Sequence[Path]) -> dict[Path, str]:
    """The pictures as base64, at the largest size at which all of them have room."""
    found: dict[Path, str] = {}
    for side in SIDES:
        found = {file: data for file in files if (data := small(file, side))}
        if sum(map(len, found.values())) <= ROOM:
            return found
    # So many prompts and steps that even thumbnails take too much: the first ones stay.
    total, kept = 0, {}
    for file, data in found.items():
        total += len(data)
        if total <= ROOM:
            kept[file] = data
    return kept


def small(file: Path, side: int) -> str:
    """A picture as a webp of at most `side` pixels, in base64; "" where it cannot be read."""
    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError):
        return ""
    image.thumbnail((side, side))
    data = io.BytesIO()
    image.save(data, format="WEBP", quality=QUALITY, method=4)
    return base64.b64encode(data.getvalue()).decode()
