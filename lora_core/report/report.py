"""The report of a run: one HTML file that holds its images and charts, and requests nothing.

Everything is read or measured before it is rendered; a gap is a sentence instead. Paths of this computer and
names of images do not appear in it, since the page may be passed on.
"""

import base64
import contextlib
import functools
import importlib.metadata
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError

from lora_core.data.captions import plain_record_caption
from lora_core.data.dataset import apply_settings, measured_dataset
from lora_core.data.images import encode_file
from lora_core.errors import DatasetError, LoraError, RunError, wrap_os_errors
from lora_core.evaluate.caption_scores import IMAGES_FILE
from lora_core.evaluate.validator import Evaluator, OnProgress
from lora_core.models.encode import encode_prompt
from lora_core.models.load import BaseModel, load_model
from lora_core.models.unet import PromptEmbeds
from lora_core.report import plots
from lora_core.runs import events
from lora_core.runs.folder import Analysis, RunFolder
from lora_core.settings.config import FIELDS, RunConfig, label_of
from lora_core.system.files import ASSETS, file_bytes, read_json, write_atomically
from lora_core.tools.analysis import measure_strength
from lora_core.tools.shrink import measure_rank
from lora_core.tools.svd import file_spectrum
from lora_core.train.setup import input_hashes

FEWEST_DRAWS = 8
CHANGED = (
    "The images have changed since the run started, so some of those that are measured may have been"
    " trained on."
)


@dataclass(frozen=True)
class RunEvaluator:
    """An evaluator with its base, the number of images it measures on, and a note about these, or ""."""

    evaluator: Evaluator
    base: BaseModel
    pictures: int
    note: str = ""


def run_evaluator(
    run: RunFolder,
    config: RunConfig,
    on_phase: Callable[[str], None] | None = None,
    on_image: OnProgress | None = None,
) -> RunEvaluator:
    """Load a run's base in fp32 and encode the images that it held out.

    Args:
        on_phase: called with the name of the measurement.
        on_image: called within each measurement.

    Raises:
        DatasetError: the images are gone, or none was held out.
        ModelFileError: the base is gone.
    """
    dataset = measured_dataset(config, run.path.parent.parent / "cache" / "datasets")
    every = apply_settings(dataset.records, config)
    held = run.held_out(every, config)
    if not held:
        raise DatasetError(f"{run.name} held no image out, so there is nothing to measure it on.")
    known, now = read_json(run.inputs_file), input_hashes(run, every)
    pictures = {name for name in (*known, *now) if name.startswith("the picture ")}
    changed = bool(known) and any(known.get(name) != now.get(name) for name in pictures)
    rules, base = config.dataset, load_model(config.model, "fp32")
    records = [replace(one, caption=plain_record_caption(one, rules), concept=None) for one in held]
    base = replace(base, facts=replace(base.facts, resolution=config.resolution(base.resolution)))

    def encode(caption: str) -> PromptEmbeds:
        return encode_prompt(base, [caption], config.train.clip_skip, config.train.max_token_length)

    draws = max(FEWEST_DRAWS, config.validation.draws_per_image)
    evaluator = Evaluator(base, records, draws, config.seed, on_phase, on_image, encode)
    return RunEvaluator(evaluator, base, len(records), CHANGED if changed else "")


# The data of a report.

NOT_ASKED = "It was not measured for this report."
OnPhase = Callable[[str, int, int], None]
"""Called with (phase, done, total); an exception from it ends the work."""


@dataclass
class ReportData:
    """What a report shows of a run.

    Attributes:
        run, config, progress, state: the run.
        ending: why it ended early, in a sentence, or "".
        step: of the adapter that is analysed, 0 for none.
        best: whether that is the best step by validation, rather than the last.
        size: of the exported file, or of the checkpoint's, in bytes.
        spectrum, rank, strength: the documents of the analyses, or None.
        problems: by those names, why there is none.
        measured_on: how many held-out images rank and strength were measured on.
        note: about the measurements, or "".
        images: rows of gains by image.
    """

    run: RunFolder
    config: RunConfig
    progress: events.Progress
    state: str
    ending: str = ""
    step: int = 0
    best: bool = False
    size: int = 0
    spectrum: dict[str, Any] | None = None
    rank: dict[str, Any] | None = None
    strength: dict[str, Any] | None = None
    problems: dict[str, str] = field(default_factory=dict)
    measured_on: int = 0
    note: str = ""
    images: list[dict[str, Any]] = field(default_factory=list)

    @property
    def adapter(self) -> Path:
        """The adapter that is analysed."""
        return self.run.checkpoint(self.step) / "adapter.safetensors"


def collect_data(run: RunFolder, measure: bool, on_phase: OnPhase) -> ReportData:
    """Read a run, and measure what needs its base and its images.

    Args:
        measure: whether to load the base and measure intrinsic rank and strength.

    Raises:
        ConfigError: its settings were edited into something illegal.
    """
    config, progress = run.config(), run.progress()
    data = ReportData(run, config, progress, run.status(progress), without_paths(progress.reason, run))
    data.images = saved_image_rows(run.path / IMAGES_FILE)
    steps = run.checkpoint_steps()
    if not steps:
        why = "The run has no checkpoint yet, so there is no adapter to analyse."
        data.problems = dict.fromkeys(("spectrum", "rank", "strength"), why)
        return data
    data.best = progress.best_step in steps
    data.step = progress.best_step if data.best and progress.best_step is not None else steps[-1]
    data.size = file_bytes(run.path / progress.export) if progress.export else 0
    data.size = data.size or file_bytes(data.adapter)
    _analyse(data, "spectrum", lambda: file_spectrum(data.adapter, functools.partial(on_phase, "spectrum")))
    if not measure:
        data.problems |= dict.fromkeys(("rank", "strength"), NOT_ASKED)
        return data
    phase = ["the base"]
    try:
        found = run_evaluator(run, config, phase.append, lambda *done: on_phase(phase[-1], *done))
    except LoraError as error:
        words = f"It can no longer be measured. {without_paths(str(error), run)}"
        data.problems |= dict.fromkeys(("rank", "strength"), words)
        return data
    data.measured_on, data.note = found.pictures, found.note
    on = (data.adapter, found.base.family, found.evaluator.gains)
    _analyse(data, "strength", lambda: measure_strength(*on))
    _analyse(data, "rank", lambda: measure_rank(*on))
    return data


def _analyse(data: ReportData, name: str, work: Callable[[], dict[str, Any]]) -> None:
    """Put in the document of an analysis, or why there is none."""
    try:
        setattr(data, name, work())
    except LoraError as error:
        data.problems[name] = without_paths(str(error), data.run)


def without_paths(text: str, run: RunFolder) -> str:
    """A sentence without the paths of this computer: each becomes its last part.

    A page that is passed on must not reveal where it was made, and for whom.
    """
    for place in (run.path, run.path.parent.parent, Path.home()):
        text = text.replace(str(place), "~" if place == Path.home() else place.name)
    words = []
    for word in text.split(" "):
        parts = word.replace("\\", "/").rstrip("/").split("/")
        words.append(parts[-1] if len(parts) > 2 or (len(parts) == 2 and not parts[0]) else word)
    return " ".join(words)


def saved_image_rows(file: Path) -> list[dict[str, Any]]:
    """Gains by image, the highest first; a file that is missing or broken counts as empty."""
    rows = read_json(file).get("rows", [])
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    good = [row for row in rows if all(_is_number(row.get(key)) for key in ("gain", "standard_error"))]
    return sorted(good, key=lambda row: -row["gain"])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# The page.

FILE_NAME = "report.html"
STYLES = ("report.css", "charts.css")


def write_report(run: RunFolder, out: Path, measure: bool, on_phase: OnPhase, now: float) -> int:
    """Write the report of a run.

    Args:
        out: the file to write; an older one is replaced.
        measure: whether to load the base and measure intrinsic rank and strength on the held-out images; the
            run keeps them (`RunFolder.analysis`), where its drive takes them.
        on_phase: called with the progress; an exception from it leaves no file.

    Returns:
        Its size in bytes.

    Raises:
        LoraError: the run's settings are broken, or the file cannot be written.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise RunError(f"--out {out} should end in .html.")
    if not out.absolute().parent.is_dir():
        raise RunError(f"--out {out} cannot be written: its folder does not exist; make it first.")
    data = collect_data(run, measure, on_phase)
    page = report_html(data, now).encode()
    with wrap_os_errors(RunError, f"The report {out} cannot be written"):
        write_atomically(out, page)
    # A run on a drive that takes nothing more has its report all the same.
    with contextlib.suppress(OSError):
        if data.rank or data.strength:
            best = data.strength["strengths"][0] if data.strength else None
            found = Analysis(step=data.step, strength=best, **(data.rank or {}))
            write_atomically(run.analysis_file, found.model_dump_json().encode())
    return len(page)


def report_html(data: ReportData, now: float) -> str:
    """The page."""
    samples, found = sample_rows(data), plots.rate_html(data.progress.rate) if data.progress.rate else ""
    changed, unchanged = _settings(data.config)
    page = plots.templates().get_template("report.html.j2")
    return page.render(
        data=data, style="".join((ASSETS / name).read_text(encoding="utf-8") for name in STYLES),
        scripts=plots.load_scripts(), policy=plots.content_policy(), summary=summary(data),
        tiles=_tiles(data), learned=[curves_html(data), found, bands_html(data), images_html(data)],
        samples=samples, images=encode_samples([one.file for _, row in samples for one in row]),
        rank=plots.intrinsic_html(data.rank) if data.rank else "",
        spectrum=plots.spectrum_html(data.spectrum) if data.spectrum else "",
        strengths=[plots.strength_html(fit, fit["part"]) for fit in (data.strength or {}).get("fits", [])],
        changed=changed, unchanged=unchanged, version=importlib.metadata.version("lora-easel"),
        made=datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d"),
    )  # fmt: skip


def _tiles(data: ReportData) -> list[tuple[str, str]]:
    """(value, label) of the most important figures."""
    best = events.best_of(data.progress.validations)
    done, planned, adapter = data.progress.step, data.progress.steps, data.config.adapter
    gain, error = (f"{best.gain:+.4f}", f"{2 * best.standard_error:.4f}") if best else ("", "")
    tiles = [
        (f"{done:,}" + (f" of {planned:,}" if planned > done else ""), "steps"),
        (base_name(data.config.model.base), "base model"),
        (f"{adapter.rank}, alpha {adapter.alpha:g}", "rank"),
        (data.config.dataset.trigger, "trigger word"),
        (gain, f"best gain, \N{PLUS-MINUS SIGN} {error}"),
        (f"{data.size / 1e6:.1f} MB" if data.size else "", "file"),
    ]
    return [(value, words) for value, words in tiles if value]


# Settings.

HIDDEN = ("name",)
PLACES = ("model.base", "model.vae", "dataset.path", "adapter.init")


def _settings(config: RunConfig) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Changed settings as (label, value, default, name), and the others as (label, value, name)."""
    changed: list[tuple[str, ...]] = []
    unchanged: list[tuple[str, ...]] = []
    defaults = RunConfig()
    for name in FIELDS:
        value, default = config.get(name), defaults.get(name)
        first = (label_of(name), shown(name, value))
        if name not in HIDDEN:
            same = value == default
            (unchanged if same else changed).append((*first, *([] if same else [shown(name, default)]), name))
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
    found = events.with_gain(data.progress.validations)
    sentences = [_learned_sentence(data, found)]
    if found:
        sentences += events.describe_costs(found[-1])
    sentences.append(_rank_sentence(data))
    state = STATES.get(data.state, "")
    if state:
        sentences.append(f"{state} {data.ending}".strip())
    return [sentence for sentence in sentences if sentence]


def _learned_sentence(data: ReportData, found: list[events.Validated]) -> str:
    if not found:
        return (
            "Whether it learned was not measured: no image was held out."
            if data.progress.step
            else "Nothing was trained yet."
        )
    best, last = events.best_of(found), found[-1]
    what = f"{last.on} {'are' if last.on == events.HELD_OUT else 'is'} predicted"
    if best is None or best.gain < events.SURE * events.known_error(best.standard_error):
        if last.gain < -events.SURE * events.known_error(last.standard_error):
            return f"It did not learn: {what} worse than by the base."
        return f"The gain on {last.on} is within noise."
    share = best.gain / best.base_loss if best.base_loss > 0 else math.nan
    much = f"{share:.0%} better than by the base" if math.isfinite(share) else "better than by the base"
    at = "at the end" if best.step == data.progress.step else f"at best at step {best.step:,}"
    sentence = f"It learned: {what} {much}, {at}."
    if last.step <= best.step or not events.has_fallen(found):
        return sentence
    take = f"; take the file of step {best.step:,}" if data.best else ""
    return f"{sentence} After that it became worse{take}."


def _rank_sentence(data: ReportData) -> str:
    if data.progress.ranks is not None:
        return data.progress.ranks.sentence
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


class SampleFile(NamedTuple):
    """One sample: the step that it was drawn at, and its file."""

    step: int
    file: Path


def sample_rows(data: ReportData) -> list[tuple[str, list[SampleFile]]]:
    """(prompt, its samples over the steps), of a few prompts and a few steps."""
    done = _chosen(data.progress.previews, data.progress.best_step)
    rows = []
    for number, prompt in enumerate(done[-1].prompts[:MOST_PROMPTS] if done else ()):
        same = [one for one in done if one.prompts[number : number + 1] == [prompt]]
        for words, kind in (("", "files"), (RAW, "raw_files")):
            drawn = [(one.step, file) for one in same for file in getattr(one, kind)[number : number + 1]]
            if drawn:
                samples = [SampleFile(step, data.run.path / file) for step, file in drawn]
                rows.append((f"{prompt}{words}", samples))
    return rows


def _chosen(previews: Sequence[events.PreviewDone], best: int | None) -> list[events.PreviewDone]:
    """The first, the last, and a few between them, the best among those."""
    by_step = {one.step: one for one in previews if one.files}
    steps = sorted(by_step)
    if len(steps) > MOST_STEPS:
        kept = [steps[round(i * (len(steps) - 1) / (MOST_STEPS - 1))] for i in range(MOST_STEPS)]
        if best in by_step and best not in kept:
            kept[min(range(1, len(kept) - 1), key=lambda i: abs(kept[i] - best))] = best
        steps = sorted(kept)
    return [by_step[step] for step in steps]


def encode_samples(files: Sequence[Path]) -> dict[Path, str]:
    """The images as base64, at the largest size at which all of them fit into `ROOM`; "" for broken ones."""
    found: dict[Path, str] = {}
    for side in SIDES:
        found = {file: encode_thumbnail(file, side) for file in files}
        if sum(map(len, found.values())) <= ROOM:
            break
    return found


def encode_thumbnail(file: Path, side: int) -> str:
    """An image as a webp of at most `side` pixels, in base64; "" where it cannot be read."""
    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError):
        return ""
    image.thumbnail((side, side))
    return base64.b64encode(encode_file(image, "WEBP", quality=QUALITY, method=4)).decode()


# Plots of measurements during the run.

MOST_PICTURES = 40


def curves_html(data: ReportData) -> str:
    """Improvement and training loss by step, and how much more training images gain than held-out ones."""
    found = events.with_gain(data.progress.validations)
    missing = [] if found else [plots.paragraph("No image was held out, so no gain was measured.")]
    charts = plots.run_charts({data.run.name: data.progress})
    if not any(chart.title == "Loss" for chart in charts):
        missing.append(plots.paragraph("Too few steps for a curve."))
    note = (
        "Improvement: the base's loss less the adapter's on the same images, noise and timesteps, in"
        " percent of the base's; the band is two standard errors of the difference to the best step."
        " The loss says little by itself, since noise and timesteps are random."
    )
    shown = plots.figure("Improvement and loss", plots.charts_html(charts), note) if charts else ""
    return "".join(missing) + shown + _gauge(found)


def _gauge(found: Sequence[events.Validated]) -> str:
    last = next((e for e in reversed(found) if math.isfinite(e.gauge)), None)
    if last is None:
        return ""
    return plots.paragraph(
        f"Memorisation gauge at step {last.step:,}: training images gain {last.gauge:+.4f} (standard error"
        f" {events.known_error(last.gauge_error):.4f}) more than held-out ones."
    )


def bands_html(data: ReportData) -> str:
    """The gain of the best step by noise level."""
    best = events.best_of(data.progress.validations)
    rows = best.bands if best is not None else []
    if not rows:
        return ""
    bars = [
        plots.Bar(
            f"timesteps {row['from']:.0f} to {row['to'] - 1:.0f}", row["gain"],
            events.SURE * row.get("standard_error", 0.0), f"{row['gain']:+.4f}", row["gain"] < 0,
        )
        for row in rows
    ]  # fmt: skip
    assert best is not None
    note = (
        "Low timesteps are little noise, where detail is decided; high ones are much, where composition is."
    )
    plot = plots.bars_plot(f"Gain by noise level at step {best.step}", bars)
    return plots.figure("By noise level", plot, note)


def images_html(data: ReportData) -> str:
    """The gain of each image, by number instead of name, as the page may be passed on."""
    rows = data.images
    if not rows:
        return ""
    half = MOST_PICTURES // 2
    shown = rows if len(rows) <= MOST_PICTURES else [*rows[:half], *rows[-half:]]
    places = {id(row): place for place, row in enumerate(rows, 1)}
    bars = [
        plots.Bar(
            f"{'held out' if row.get('held_out') else 'trained on'}, {places[id(row)]}", row["gain"],
            events.SURE * row["standard_error"], f"{row['gain']:+.3f}", not row.get("held_out"),
        )
        for row in shown
    ]  # fmt: skip
    less = len(rows) - len(shown)
    more = f" {less} between them are left out." if less else ""
    note = f"Numbered by gain; the page contains neither their names nor the images.{more}"
    plot = plots.bars_plot("Gain of each image, the highest first", bars)
    return plots.figure("Gain of each image", plot, note)
