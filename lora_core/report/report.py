"""The report of a run: one HTML file that holds its images and plots, runs nothing and requests nothing.

Paths of this computer and names of images do not appear in it, since the page may be passed on.
"""

import base64
import importlib.metadata
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from lora_core.errors import RunError
from lora_core.report.collect import OnPhase, ReportData, collect_data
from lora_core.report.plots import (
    Bar,
    Curve,
    Mark,
    bars_plot,
    curves_plot,
    downsample,
    figure,
    folded,
    paragraph,
    table_html,
    templates,
)
from lora_core.report.rank_plots import intrinsic_html, rate_html, spectrum_html, strength_html
from lora_core.runs.events import PreviewDone, Validated
from lora_core.runs.folder import RunFolder
from lora_core.runs.progress import (
    SURE,
    best_of,
    describe_average,
    describe_forgetting,
    describe_memorization,
    known_error,
    smooth,
    with_gain,
)
from lora_core.settings.config import FIELDS, RunConfig, label_of
from lora_core.system.files import ASSETS, write_atomically

FILE_NAME = "report.html"
STYLE = ASSETS / "report.css"


def write_report(run: RunFolder, out: Path, measure: bool, on_phase: OnPhase, now: float) -> int:
    """Write the report of a run.

    Args:
        run: the run.
        out: the file to write; an older one is replaced.
        measure: whether to load the base and measure intrinsic rank and strength on the held-out images.
        on_phase: called with the progress; an exception from it leaves no file.
        now: the time, in seconds since the epoch.

    Returns:
        Its size in bytes.

    Raises:
        LoraError: the run's settings are broken, or the file cannot be written.
    """
    check_report_out(out)
    page = report_html(collect_data(run, measure, on_phase), now).encode()
    try:
        write_atomically(out, page)
    except OSError as error:
        raise RunError(f"The report {out} cannot be written: {error.strerror or error}.") from error
    return len(page)


def check_report_out(out: Path) -> None:
    """Refuse a path for a report before the work rather than after it.

    Raises:
        RunError: its folder does not exist, or it does not end in .html.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise RunError(f"--out {out} should end in .html.")
    if not out.absolute().parent.is_dir():
        raise RunError(f"--out {out} cannot be written: its folder does not exist; make it first.")


def report_html(data: ReportData, now: float) -> str:
    """The page."""
    changed, unchanged = _settings(data.config)
    rate = data.progress.rate
    return (
        templates()
        .get_template("report.html.j2")
        .render(
            data=data,
            name=data.run.name,
            style=STYLE.read_text(encoding="utf-8"),
            summary=summary(data),
            tiles=_tiles(data),
            samples=_samples(data),
            learned=[
                gain_html(data),
                loss_html(data),
                rate_html(rate) if rate else "",
                bands_html(data),
                images_html(data),
            ],
            rank=intrinsic_html(data.rank) if data.rank else "",
            spectrum=spectrum_html(data.spectrum) if data.spectrum else "",
            strengths=[strength_html(fit, fit["part"]) for fit in (data.strength or {}).get("fits", [])],
            changed=changed,
            unchanged=unchanged,
            version=importlib.metadata.version("lora-easel"),
            made=datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d"),
        )
    )


def _tiles(data: ReportData) -> list[tuple[str, str]]:
    """(value, what it is) of the most important figures."""
    best = best_of(data.progress.validations)
    done, planned = data.progress.step, data.progress.steps
    adapter, trigger = data.config.adapter, data.config.dataset.trigger
    tiles = [
        (f"{done:,}" + (f" of {planned:,}" if planned > done else ""), "steps"),
        (base_name(data.config.model.base), "base model"),
        (f"{adapter.rank}, alpha {adapter.alpha:g}", "rank"),
    ]
    if trigger:
        tiles.append((trigger, "trigger word"))
    if best is not None:
        tiles.append((f"{best.gain:+.4f}", f"best gain, \N{PLUS-MINUS SIGN} {2 * best.standard_error:.4f}"))
    if data.size:
        tiles.append((f"{data.size / 1e6:.1f} MB", "file"))
    return tiles


# Settings.

HIDDEN = ("name",)
PLACES = ("model.base", "model.vae", "dataset.path", "adapter.init")


def _settings(config: RunConfig) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Changed settings as (label, value, default, name), and the others as (label, value, name)."""
    changed: list[tuple[str, ...]] = []
    unchanged: list[tuple[str, ...]] = []
    defaults = RunConfig()
    for name in FIELDS:
        if name in HIDDEN:
            continue
        value, default = config.get(name), defaults.get(name)
        if value != default:
            changed.append((label_of(name), shown(name, value), shown(name, default), name))
        else:
            unchanged.append((label_of(name), shown(name, value), name))
    return changed, unchanged


def shown(name: str, value: Any) -> str:
    """A value as text; of a path, its last part."""
    if name in PLACES:
        return base_name(str(value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{pattern} = {number:g}" for pattern, number in value.items()) or "none"
    if isinstance(value, list):
        return " | ".join(map(str, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) or "none"


def base_name(text: str) -> str:
    """The last part of a path or of a hub id."""
    return text.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] or "none"


# The summary.

STATES = {
    "queued": "It has not started.",
    "preparing": "It is being prepared.",
    "running": "It is still running.",
    "paused": "It is paused.",
    "stopped": "It was stopped early.",
    "interrupted": "It was interrupted and can be resumed.",
    "failed": "It failed.",
    "done": "",
}


def summary(data: ReportData) -> list[str]:
    """Sentences, the most important first."""
    found = with_gain(data.progress.validations)
    sentences = [_learned_sentence(data, found)]
    if found:
        sentences += [
            describe_memorization(found[-1]),
            describe_forgetting(found[-1]),
            describe_average(found[-1]),
        ]
    sentences.append(_rank_sentence(data))
    state = STATES.get(data.state, "")
    if state:
        sentences.append(f"{state} {data.ending}".strip())
    return [sentence for sentence in sentences if sentence]


def _learned_sentence(data: ReportData, found: list[Validated]) -> str:
    if not found:
        return (
            "Whether it learned was not measured: no picture was held out."
            if data.progress.step
            else "Nothing was trained yet."
        )
    best, last = best_of(found), found[-1]
    if best is None or best.gain < SURE * known_error(best.standard_error):
        if last.gain < -SURE * known_error(last.standard_error):
            return "It did not learn: held-out pictures are predicted worse than by the base."
        return "The gain on held-out pictures is within noise."
    share = best.gain / best.base_loss if best.base_loss > 0 else math.nan
    much = f"{share:.0%} better than by the base" if math.isfinite(share) else "better than by the base"
    at = "at the end" if best.step == data.progress.step else f"at best at step {best.step:,}"
    sentence = f"It learned: held-out pictures are predicted {much}, {at}."
    return f"{sentence} {_overcooked(best, last, data.best)}".strip()


def _overcooked(best: Validated, last: Validated, kept: bool) -> str:
    """Whether it became worse after the best step, and which file to use."""
    if last.step <= best.step or not last.against_best < -SURE * known_error(last.against_best_error):
        return ""
    take = f"; take the file of step {best.step:,}" if kept else ""
    return f"After that it became worse{take}."


def _rank_sentence(data: ReportData) -> str:
    if data.rank is None or data.rank["rank"] >= data.rank["trained"]:
        return ""
    return (
        f"Trained at rank {data.rank['trained']}, it needs {data.rank['rank']}: the file can be"
        f" {data.rank['times_smaller']:.1f} times smaller."
    )


# Samples.

RAW = ", raw adapter (above: its average)"
MOST_STEPS, MOST_PROMPTS = 7, 4
ROOM = 1_600_000
"""Bytes that all samples may take as base64; the page stays below 3 MB with the rest."""
SIDES = (320, 256, 192, 128, 96)
QUALITY = 80


@dataclass(frozen=True)
class SampleFile:
    """One sample: the step that it was drawn at, and its file."""

    step: int
    file: Path


def _samples(data: ReportData) -> list[dict[str, Any]]:
    """The samples for the template: rows of `prompt` and `samples` with `title` and `data` (webp, base64)."""
    rows = sample_rows(data)
    images = _encode_all([sample.file for _, samples in rows for sample in samples])

    def title(step: int) -> str:
        best = ", best" if step and step == data.progress.best_step else ""
        return f"step {step:,}{best}" if step else "base"

    return [
        {
            "prompt": prompt,
            "samples": [{"title": title(one.step), "data": images.get(one.file, "")} for one in samples],
        }
        for prompt, samples in rows
    ]


def sample_rows(data: ReportData) -> list[tuple[str, list[SampleFile]]]:
    """(prompt, its samples over the steps), of a few prompts and a few steps."""
    done = _chosen(data.progress.previews, data.progress.best_step)
    if not done:
        return []
    rows = []
    for number, prompt in enumerate(done[-1].prompts[:MOST_PROMPTS]):
        same = [one for one in done if number < len(one.prompts) and one.prompts[number] == prompt]
        for words, drawn in (("", [one.files for one in same]), (RAW, [one.raw_files for one in same])):
            samples = [
                SampleFile(one.step, data.run.path / files[number])
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


def _encode_all(files: Sequence[Path]) -> dict[Path, str]:
    """The images as base64, at the largest size at which all of them fit into `ROOM`."""
    found: dict[Path, str] = {}
    for side in SIDES:
        found = {file: data for file in files if (data := encode_thumbnail(file, side))}
        if sum(map(len, found.values())) <= ROOM:
            return found
    # Even the smallest thumbnails take too much: the first ones are kept.
    total, kept = 0, {}
    for file, data in found.items():
        total += len(data)
        if total <= ROOM:
            kept[file] = data
    return kept


def encode_thumbnail(file: Path, side: int) -> str:
    """An image as a webp of at most `side` pixels, in base64; "" where it cannot be read."""
    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError):
        return ""
    image.thumbnail((side, side))
    data = io.BytesIO()
    image.save(data, format="WEBP", quality=QUALITY, method=4)
    return base64.b64encode(data.getvalue()).decode()


# Plots of what was measured during the run.

MOST_PICTURES = 40


def loss_html(data: ReportData) -> str:
    """Training loss, raw and smoothed."""
    points = [(float(e.step), e.loss) for e in data.progress.losses if math.isfinite(e.loss)]
    if len(points) < 2:
        return paragraph("Too few steps for a curve.")
    means = smooth([y for _, y in points])
    curve = downsample([(x, y) for (x, _), y in zip(points, means, strict=True)])
    raw = downsample(points)
    ys = sorted(y for _, y in raw)
    # A single outlier must not flatten the rest of the curve.
    top = max(ys[int(0.98 * (len(ys) - 1))], max(y for _, y in curve))
    curves = [Curve("each step", raw, (), "raw"), Curve("smoothed", curve)]
    plot = curves_plot(f"Training loss, at the end {curve[-1][1]:.4f} smoothed", curves, highest=top)
    note = "It says little by itself, since noise and timesteps are random; the gain says more."
    return figure("Training loss", plot, note)


def gain_html(data: ReportData) -> str:
    """Gain on held-out images with its error, on training images, and on the base's own."""
    found = with_gain(data.progress.validations)
    if not found:
        return paragraph("No picture was held out, so no gain was measured.")
    best = best_of(data.progress.validations)
    curves = [
        _curve("held-out pictures", found, "smooth", lambda e: (e.gain, e.standard_error)),
        _curve("training pictures", found, "second", lambda e: (e.train_gain, math.nan)),
        _curve("the base's own pictures", found, "third", lambda e: (e.prior, e.prior_error)),
    ]
    shown = [curve for curve in curves if curve.points]
    mark = Mark(float(best.step), best.gain, f"best, step {best.step:,}") if best else None
    words = f", best {best.gain:+.4f} at step {best.step}" if best else ""
    start = Curve("", [(0.0, 0.0)], (), "raw")
    plot = curves_plot(f"Gain over the base{words}", [start, *shown], mark)
    note = (
        "The base's loss less the adapter's, on the same pictures, noise and timesteps; the bands are two"
        " standard errors. Above 0 is better than the base."
    )
    return figure("Gain", plot, note) + _gauge(found) + folded("As a table", _gain_table(found))


def _curve(
    name: str, found: Sequence[Validated], style: str, value: Callable[[Validated], tuple[float, float]]
) -> Curve:
    rows = [(float(e.step), *value(e)) for e in found]
    rows = [row for row in rows if math.isfinite(row[1])]
    errors = [SURE * error if math.isfinite(error) else 0.0 for _, _, error in rows]
    return Curve(name, [(x, y) for x, y, _ in rows], errors if any(errors) else (), style)


def _gauge(found: Sequence[Validated]) -> str:
    last = next((e for e in reversed(found) if math.isfinite(e.gauge)), None)
    if last is None:
        return ""
    return paragraph(
        f"Memorisation gauge at step {last.step:,}: training pictures gain {last.gauge:+.4f} (standard error"
        f" {known_error(last.gauge_error):.4f}) more than held-out ones."
    )


def _gain_table(found: Sequence[Validated]) -> str:
    gains = [(e.gain, e.train_gain, e.gauge, e.prior, e.raw_gain) for e in found]
    heads = ("Step", "Held out", "Training", "Gauge", "Base's own", "Held out, raw")
    width = len(heads) if any(math.isfinite(e.raw_gain) for e in found) else len(heads) - 1
    rows = [(f"{e.step:,}", *map(_signed, own))[:width] for e, own in zip(found, gains, strict=True)]
    return table_html(heads[:width], rows, "Gain by step")


def _signed(value: float) -> str:
    return f"{value:+.4f}" if math.isfinite(value) else "-"


def bands_html(data: ReportData) -> str:
    """The gain of the best step by noise level."""
    best = best_of(data.progress.validations)
    rows = best.bands if best is not None else []
    if not rows:
        return ""
    bars = [
        Bar(
            f"timesteps {row['from']:.0f} to {row['to'] - 1:.0f}", row["gain"],
            SURE * row.get("standard_error", 0.0), f"{row['gain']:+.4f}", row["gain"] < 0,
        )
        for row in rows
    ]  # fmt: skip
    assert best is not None
    note = (
        "Low timesteps are little noise, where detail is decided; high ones are much, where composition is."
    )
    plot = bars_plot(f"Gain by noise level at step {best.step}", bars)
    return figure("By noise level", plot, note)


def images_html(data: ReportData) -> str:
    """The gain of each image, by number instead of name, as the page may be passed on."""
    rows = data.images
    if not rows:
        return ""
    half = MOST_PICTURES // 2
    shown = rows if len(rows) <= MOST_PICTURES else [*rows[:half], *rows[-half:]]
    places = {id(row): place for place, row in enumerate(rows, 1)}
    bars = [
        Bar(
            f"{'held out' if row.get('held_out') else 'trained on'}, {places[id(row)]}", row["gain"],
            SURE * row["standard_error"], f"{row['gain']:+.3f}", not row.get("held_out"),
        )
        for row in shown
    ]  # fmt: skip
    less = len(rows) - len(shown)
    more = f" {less} between them are left out." if less else ""
    note = f"Numbered by gain; the page contains neither their names nor the pictures.{more}"
    return figure("Gain of each picture", bars_plot("Gain of each picture, the highest first", bars), note)
