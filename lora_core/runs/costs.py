"""What a run will take, before it starts. Time: from a run of the same cost, else from a few steps that were
tried on this machine, scaled where only other settings of the base were. Memory: from the sizes of base and
adapter. What was tried is kept in the workspace's `measured.json`.

And what runs of different settings took and gained: the comparison of a sweep.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import statistics
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from lora_core.data.images import ImageRecord, remember_latest
from lora_core.errors import LoraError
from lora_core.model_files import sizes
from lora_core.model_files.detect import BaseFacts, base_of
from lora_core.runs.events import Progress, best_of, known_error
from lora_core.runs.folder import RunFolder
from lora_core.runs.preflight import ADAPTER_COPIES, at_largest, caption_bytes, captions_vary
from lora_core.settings.config import FIELDS, RunConfig, sample_fields
from lora_core.settings.schema import AUTO, SLIDER_IMAGES, SLIDER_STRENGTHS
from lora_core.system.files import check_fields, file_bytes, read_json, write_atomically
from lora_core.system.hardware import Gpu

MOST_KEPT = 300
USUAL_PROMPTS = 2
"""How many captions are sampled where no prompts are given."""
FORWARDS, CHECKPOINTING = 3.0, 4.0
"""Cost of a step in forward passes; gradient checkpointing adds one."""
MEASURED, PROBED, SCALED = "measured", "probed", "scaled"

PROGRAM = 0.6e9
"""Bytes of torch and its libraries before a model is loaded."""
ACTIVATIONS = 0.7e6
"""Bytes a latent pixel keeps for the backward pass of a UNet of SD 1.x's size, half precision, on the CPU."""
USUAL_PARAMETERS = 1.07e9
"""Weights of all of SD 1.x, which ACTIVATIONS was measured with."""
CHECKPOINTING_KEEPS = 0.2
_lock = threading.Lock()


@dataclass(frozen=True)
class StepCost:
    """Some steps, really taken.

    Attributes:
        step: seconds of an optimizer step.
        draw: seconds of a sampler's step of one sample.
        peak: bytes of the device's memory at the most; 0 where it does not tell.
        base: the base, as the user named it.
        device: of the measurement.
        passes: `step_passes` of the settings; 0 where an earlier version measured.
        time: when, in seconds since the epoch.
    """

    step: float
    draw: float
    peak: int
    base: str
    device: str
    passes: float = 0.0
    time: float = field(default_factory=time.time)


@dataclass(frozen=True)
class RunForecast:
    """What a run will take; None where it is not known.

    Attributes:
        pictures, captions: how many there are, and how many have a caption.
        looks: how often each image is trained on.
        steps: of the run.
        seconds: of all steps, samples and validation included.
        source: of the time: measured, probed, scaled or "".
        memory_bytes: at the peak, with `fallbacks`.
        fallbacks: what will be done to fit into a card's free memory, in order; keys of `sizes.FALLBACKS`.
        memory_as_set: bytes at the peak without them.
        file_bytes: of the exported file.
        learning_rate: the effective one.
        held_out: images that were chosen for validation.
    """

    pictures: int
    captions: int
    looks: float
    steps: int
    seconds: float | None
    source: str
    memory_bytes: int | None
    file_bytes: int | None
    learning_rate: float | None
    fallbacks: list[str] = field(default_factory=list)
    memory_as_set: int | None = None
    held_out: int = 0

    @property
    def seconds_a_step(self) -> float | None:
        """Samples and validation included."""
        return self.seconds / self.steps if self.seconds else None


def costs_file(workspace: Path) -> Path:
    """Where a workspace keeps measurements."""
    return workspace / "measured.json"


def cost_key(config: RunConfig) -> str:
    """All settings that decide the time and memory of a step."""
    optim, adapter, base = config.optimizer, config.adapter, config.model.base
    # All of the section, so that a setting that is added to it later counts by itself.
    train = config.train.model_dump(exclude={"steps", "epochs"})
    train["resolution"] = config.resolution(base_of(config.model).resolution)
    trained = [optim.lr > 0, optim.text_encoder_lr > 0, optim.text_encoder_2_lr > 0]
    adapted = [adapter.targets, adapter.rank, adapter.block_ranks, adapter.init]
    if (more := [adapter.kind, adapter.conv_rank]) != ["lora", 0]:
        # Not for these, so that older measurements still count.
        adapted += more
    if adapter.new_tokens:
        adapted.append("tokens")
    own: list[Any] = ["prior"] * config.keeps_prior
    if config.slider.on:
        own = [["slider", config.slider.passes()]]
    elif len(several := config.dataset.resolutions) > 1:
        own.append(["sizes", *several])
    return json.dumps([base, train, adapted, optim.name, trained, config.save.ema > 0, *own])


def read_costs(workspace: Path, device: str) -> dict[str, StepCost]:
    """The measurements on a device, by `cost_key`; a file that is missing or broken counts as empty."""
    rows = _read_all(workspace).items()
    return {key.removeprefix(f"{device} "): cost for key, cost in rows if cost.device == device}


def keep_cost(workspace: Path, config: RunConfig, cost: StepCost) -> None:
    """Add the measurement of some settings; the newest are kept.

    Raises:
        OSError: the disk refuses.
    """
    with _lock:
        kept = {**_read_all(workspace), f"{cost.device} {cost_key(config)}": cost}
        newest = sorted(kept.items(), key=lambda item: item[1].time)[-MOST_KEPT:]
        document = {"measured": {key: asdict(one) for key, one in newest}}
        write_atomically(costs_file(workspace), json.dumps(document, indent=1).encode())


def _read_all(workspace: Path) -> dict[str, StepCost]:
    found: dict[str, StepCost] = {}
    rows = read_json(costs_file(workspace)).get("measured")
    known = {field.name for field in dataclasses.fields(StepCost)}
    for key, row in rows.items() if isinstance(rows, dict) else ():
        with contextlib.suppress(TypeError, ValueError, AttributeError):
            cost = check_fields(StepCost, {k: v for k, v in row.items() if k in known})
            if math.isfinite(cost.step) and cost.step > 0 and math.isfinite(cost.draw) and cost.draw >= 0:
                found[key] = cost
    return found


def step_passes(config: RunConfig) -> float:
    """Cost of a step in forward passes of one pixel: to compare settings of the same base."""
    side = config.resolution(base_of(config.model).resolution)
    images = config.train.batch_size * config.train.gradient_accumulation_steps
    passes = CHECKPOINTING if config.train.gradient_checkpointing else FORWARDS
    passes += config.slider.passes() if config.slider.on else 0
    passes += (1 + passes) * config.keeps_prior
    return passes * images * float(side) ** 2


def forecast_run(
    config: RunConfig,
    facts: BaseFacts | None,
    records: Sequence[ImageRecord],
    runs: Iterable[tuple[Progress, RunConfig | None]],
    costs: Mapping[str, StepCost],
    gpu: Gpu | None,
) -> RunForecast:
    """What a run will take.

    Args:
        config: its settings.
        facts: of its base, None where that cannot be read.
        records: its images.
        runs: of this machine, the newest first.
        costs: measurements on this device, from `read_costs`.
        gpu: that it trains on; None for the processor.
    """
    step, source = _forecast_step(config, runs, costs, len(records)) or (None, "")
    largest = at_largest(config, records, base_of(config.model).resolution)
    tried = costs.get(cost_key(largest))
    as_set: float | None = tried.peak if tried and tried.peak else None
    memory, fallbacks = as_set, list[str]()
    if memory is None and facts and gpu and facts.family:
        varied, full = captions_vary(records, config), gpu.auto_is_fp32 and config.train.precision == AUTO
        own = largest.changed({"train.precision": "fp32"}) if full else largest
        as_set = (sizes.fit_on_card(own, facts, varied) or (None,))[0]
        memory, fallbacks = sizes.fit_on_card(own, facts, varied, gpu.free) or (None, [])
    elif memory is None and facts:
        memory = as_set = memory_needed(largest, facts)
        if memory and not gpu:
            memory += sum(caption_bytes(records, config, facts))
    shown, captions, held_out = _count(records)
    draws = config.train.steps * config.train.batch_size * config.train.gradient_accumulation_steps
    return RunForecast(
        pictures=len(records),
        captions=captions,
        held_out=held_out,
        looks=draws / shown if shown else 0.0,
        steps=config.train.steps,
        seconds=step * config.train.steps if step else None,
        source=source,
        memory_bytes=round(memory) if memory else None,
        file_bytes=sizes.export_bytes(facts, config) if facts else None,
        learning_rate=None if config.optimizer.range_test else config.optimizer.lr * config.adapter.scale,
        fallbacks=fallbacks,
        memory_as_set=round(as_set) if as_set else None,
    )


@remember_latest
def _count(records: Sequence[ImageRecord]) -> tuple[int, int, int]:
    """Looks in an epoch, images with a caption, and those chosen for validation."""
    captions = sum(bool(record.caption) for record in records)
    return sum(one.repeats for one in records), captions, sum(one.held_out for one in records)


def _forecast_step(
    config: RunConfig,
    runs: Iterable[tuple[Progress, RunConfig | None]],
    costs: Mapping[str, StepCost],
    images: int,
) -> tuple[float, str] | None:
    """Seconds of a step with what comes between steps, and their source; None where nothing of the base was
    timed yet."""
    key, base, passes = cost_key(config), config.model.base, step_passes(config)
    scaled: float | None = None
    for progress, other in runs:
        pace = progress.wall_pace()
        if pace is not None and other is not None and other.model.base == base:
            if cost_key(other) == key:
                return pace, MEASURED
            scaled = scaled or pace / step_passes(other) * passes
    if cost := costs.get(key):
        return cost.step + seconds_between_steps(config, cost.step, cost.draw, images), PROBED
    for cost in sorted(costs.values(), key=lambda one: -one.time):
        if cost.passes and cost.base == base:
            step = cost.step * passes / cost.passes
            return step + seconds_between_steps(config, step, cost.draw, images), SCALED
    return (scaled, SCALED) if scaled else None


def seconds_between_steps(config: RunConfig, step: float, draw: float, images: int) -> float:
    """Seconds a step of samples and validation.

    Args:
        config: the settings.
        step: seconds of a step, of which validation may take a share.
        draw: seconds of a sampler's step of one sample, which is two passes at the base's own size.
        images: how many there are.
    """
    steps, preview, validation = config.train.steps, config.sample, config.validation
    slider, own = config.slider.on, base_of(config.model).resolution
    lines = preview.prompts or [""] * min(USUAL_PROMPTS, USUAL_PROMPTS if slider else images)
    drawn: float = sum(
        sample_fields(preview, line)["steps"] * each / own**2
        for line, each in zip(lines, sizes.sample_pixels(config, own), strict=False)
    )
    drawn *= len(SLIDER_STRENGTHS) if slider else 1
    sampling = num_rounds(steps, preview.every) * drawn * draw * sizes.num_adapters(config)
    held = validation.pictures if validation.pictures >= 1 else validation.pictures * images
    rated = sizes.num_adapters(config) + (1 if validation.memorization else 0)
    if slider:  # at strength 1 and -1
        held, rated = max(SLIDER_IMAGES, len(config.slider.target)), 2 * sizes.num_adapters(config)
    passes = round(held) * validation.draws_per_image * rated
    passes += validation.forgetting * validation.draws_per_image if held else 0
    share = (config.resolution(own) / own) ** 2
    measuring = num_rounds(steps, validation.every) * passes * draw / 2 * share / steps
    if validation.max_time_share:
        measuring = min(measuring, validation.max_time_share * step)
    return sampling / steps + measuring


def num_rounds(steps: int, every: int) -> int:
    """How often something is done in a run, its beginning and its end included."""
    return math.ceil(steps / every) + 1 if every else 0


def memory_needed(config: RunConfig, known: BaseFacts) -> float | None:
    """About how many bytes a run on a processor takes at its peak, within a factor of two at best."""
    parameters, export = parameters_of(base_of(config.model)), sizes.export_bytes(known, config)
    if not parameters or not export:
        return None
    asked = config.train.precision
    width = 4 if asked in ("fp32", "auto") else 2
    side = config.resolution(known.resolution)
    kept = CHECKPOINTING_KEEPS if config.train.gradient_checkpointing else 1.0
    pixels = (side / 8) ** 2 * config.train.batch_size
    activations = pixels * ACTIVATIONS * math.sqrt(parameters / USUAL_PARAMETERS) * width / 2 * kept
    weights = parameters * width
    if not (config.train.offload or config.train.quantize_base != "none"):
        # A processor's run takes more where there is more, because that is faster.
        room = psutil.virtual_memory().available - sizes.PREPACKED_SPARE
        most = sizes.WINOGRAD_COPIES if width == 4 else sizes.PREPACKED_COPIES
        copies = next((n for n in (most, sizes.PREPACKED_COPIES) if room > (1 + n) * weights), 0)
        weights *= 1 + copies
    return PROGRAM + weights + export / 2 * 4 * ADAPTER_COPIES + activations


def parameters_of(base: BaseFacts) -> int | None:
    """How many weights a base has; None where its files do not tell."""
    try:
        return sizes.count_base_parameters(base.facts) if base.facts else None
    except (LoraError, OSError):
        return None


# The comparison of a sweep.

_SAME_DRAWS = (
    "model", "dataset", "slider", "loss.unmasked_weight", "train.resolution", "validation.pictures",
    "validation.draws_per_image",
)  # fmt: skip
"""Settings and sections that, with the seed, decide on which images, parts of them and noise a gain is
measured, or on which change of a slider."""
_ALIKE = 0.95
"""Files and times of which the smaller is at least this share of the larger count as equal."""
_BETTER = 2.0
"""Standard errors from which a difference is one."""


@dataclass(frozen=True)
class Trial:
    """A run, its settings, and its events so far."""

    run: RunFolder
    config: RunConfig
    progress: Progress

    @property
    def gain(self) -> float:
        """Of the best step on held-out images, NaN where nothing was measured."""
        best = best_of(self.progress.validations)
        return best.gain if best is not None else math.nan

    @property
    def kept(self) -> float:
        """The share of the gain that the exported file keeps, where it was cut and that was measured."""
        ranks = self.progress.ranks
        return ranks.kept if ranks is not None and math.isfinite(ranks.kept) else 1.0

    def losses(self) -> list[list[float]]:
        """The best step's losses on held-out images, (images, draws); empty where there are none."""
        for step in reversed(self.run.checkpoint_steps()):
            file = self.run.checkpoint(step) / "state.json"
            if file.is_file() and (losses := _best_losses(file, file.stat().st_mtime_ns)):
                return losses
        return []


@functools.lru_cache(maxsize=4 * MOST_KEPT)
def _best_losses(file: Path, changed_at: int) -> list[list[float]]:
    """Of a checkpoint's record that was last changed then."""
    return list((read_json(file).get("best") or {}).get("losses") or [])


def compare_trials(trials: Sequence[Trial]) -> dict[str, Any]:
    """Gain and cost of runs, a row for each combination of settings, best first.

    Returns:
        settings: the names of those that differ, but for name and seed; rows: {settings: values by name,
        runs: names, done, gain, standard_error, forgetting, forgetting_error, seconds, bytes, against: gain
        less that of the first row, against_error, paired}, means over seeds, None where not known; sentence.
    """
    configs = [trial.config for trial in trials]
    varied = [name for name in FIELDS if name not in ("name", "seed")]
    varied = [name for name in varied if any(c.get(name) != configs[0].get(name) for c in configs)]
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(repr([trial.config.get(name) for name in varied]), []).append(trial)
    found = [(_trial_row(group, varied), group) for group in groups.values()]
    found.sort(key=lambda one: -math.inf if one[0]["gain"] is None else one[0]["gain"], reverse=True)
    first = found[0][1] if found else []
    for row, group in found[1:]:
        if row["gain"] is not None:
            row |= dict(zip(("against", "against_error", "paired"), _difference(group, first), strict=True))
    rows = [row for row, _ in found]
    return {"settings": varied, "rows": rows, "sentence": _describe_trials(rows)}


def _trial_row(group: Sequence[Trial], varied: Sequence[str]) -> dict[str, Any]:
    bests = [(trial, best) for trial in group if (best := best_of(trial.progress.validations)) is not None]
    gains, errors = [t.kept * best.gain for t, best in bests], [best.standard_error for _, best in bests]
    files = [file_bytes(t.run.path / t.progress.export) for t in group if t.progress.export]
    lost = [(-best.prior, known_error(best.prior_error)) for _, best in bests if math.isfinite(best.prior)]
    seconds = [trial.progress.train_seconds for trial in group if trial.progress.losses]
    return {
        "settings": {name: group[0].config.get(name) for name in varied},
        "runs": [trial.run.name for trial in group],
        "done": sum(trial.progress.ending in ("done", "stopped") for trial in group),
        "gain": _mean(gains), "standard_error": _mean_error(gains, errors),
        "forgetting": _mean([value for value, _ in lost]),
        "forgetting_error": _mean_error([value for value, _ in lost], [error for _, error in lost]),
        "seconds": _mean(seconds), "bytes": _mean(files), "against": None, "against_error": None,
        "paired": None,
    }  # fmt: skip


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _mean_error(values: Sequence[float], errors: Sequence[float]) -> float | None:
    """The standard error of a mean over seeds: of their own errors, or of their spread if that is more."""
    if not values:
        return None
    own = math.sqrt(math.fsum(known_error(error) ** 2 for error in errors)) / len(errors)
    return max(own, _error_of(values))


def _error_of(values: Sequence[float]) -> float:
    """The standard error of the mean of independent values; 0 for fewer than two."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _difference(group: Sequence[Trial], other: Sequence[Trial]) -> tuple[float, float, bool]:
    """The gain of a combination less that of another, its standard error, and whether both were measured on
    the same images and noise: then what makes these hard cancels out, seed by seed."""
    means: list[float] = []
    images: dict[tuple[str, int], list[float]] = {}
    draws: list[float] = []
    same = [name for name in FIELDS if name in _SAME_DRAWS or name.partition(".")[0] in _SAME_DRAWS]
    for one, two in ((one, two) for one in group for two in other if one.config.seed == two.config.seed):
        ours, theirs = one.losses(), two.losses()
        same_settings = all(one.config.get(name) == two.config.get(name) for name in same)
        if not ours or not same_settings or list(map(len, ours)) != list(map(len, theirs)):
            continue
        cut = [(1.0 - trial.kept) * trial.gain for trial in (one, two)]
        less = [
            [b - a - cut[0] + cut[1] for a, b in zip(*rows, strict=True)]
            for rows in zip(ours, theirs, strict=True)
        ]
        draws += itertools.chain(*less)
        # The same images in another seed, as where they are held out by hand, tell nothing of others.
        held = str(read_json(one.run.held_out_file).get("files", one.config.seed))
        for number, row in enumerate(less):
            images.setdefault((held, number), []).append(statistics.fmean(row))
        means.append(statistics.fmean(itertools.chain(*less)))
    if means:
        # Few images may agree by chance: their draws, taken for independent, give a floor.
        by_image = [statistics.fmean(seeds) for seeds in images.values()]
        error = max(_error_of(means), _error_of(by_image), _error_of(draws))
        return statistics.fmean(means), error, True
    rows = [_trial_row(each, ()) for each in (group, other)]
    return rows[0]["gain"] - rows[1]["gain"], math.hypot(*(row["standard_error"] for row in rows)), False


def _describe_trials(rows: Sequence[Mapping[str, Any]]) -> str:
    """A sentence on the significant differences."""
    known = [row for row in rows if row["gain"] is not None]
    if len(known) < 2:
        return "Fewer than two of these settings have a measured gain, so there is nothing to compare yet."
    best, *others = known
    worse = [row for row in others if -row["against"] > _BETTER * row["against_error"]]
    tied = [row for row in others if row not in worse]
    words = f"{_describe_settings(best)} gains most, {best['gain']:+.4f}"
    if worse:
        than = (f"{_describe_settings(r)} by {-r['against']:.4f} ± {r['against_error']:.4f}" for r in worse)
        words += f"; it is better beyond two standard errors than {', '.join(than)}"
    if tied:
        words += f"; within the error {', '.join(map(_describe_settings, tied))} gained as much"
        cheap: dict[str, list[str]] = {}
        for key, what in (("bytes", "makes the smallest file"), ("seconds", "is fastest")):
            row, *_, most = sorted((best, *tied), key=lambda row: row[key] or 0.0)
            if 0.0 < (row[key] or 0.0) < _ALIKE * most[key]:
                cheap.setdefault(_describe_settings(row), []).append(what)
        found = (f"{settings} {' and '.join(what)}" for settings, what in cheap.items())
        words += f"; of these {' and '.join(found)}" if cheap else ""
    paired = all(row["paired"] for row in others)
    return f"{words} ({'' if paired else 'not all '}on the same held-out images and noise)."


def _describe_settings(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in row["settings"].items()) or "all"
