"""What a run will take, before it starts. Time: from a run of the same cost, else from a few steps that were
tried on this machine, scaled where only other settings of the base were. Memory: from the sizes of base and
adapter. What was tried is kept in the workspace's `measured.json`.
"""

import contextlib
import dataclasses
import json
import math
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from lora_core.data.images import ImageRecord
from lora_core.errors import LoraError
from lora_core.model_files import sizes
from lora_core.model_files.detect import BaseFacts, lookup_base
from lora_core.runs.events import Progress
from lora_core.runs.preflight import ADAPTER_COPIES, caption_bytes, captions_vary
from lora_core.settings.config import RunConfig
from lora_core.settings.schema import AUTO
from lora_core.system.files import check_fields, read_json, write_atomically
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
        device: what it was measured on.
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

    @property
    def seconds_a_step(self) -> float | None:
        """Samples and validation included."""
        return self.seconds / self.steps if self.seconds else None


def costs_file(workspace: Path) -> Path:
    """Where a workspace keeps what was measured."""
    return workspace / "measured.json"


def cost_key(config: RunConfig) -> str:
    """All settings that decide the time and memory of a step."""
    optim, adapter, base = config.optimizer, config.adapter, config.model.base
    # All of the section, so that a setting that is added to it later counts by itself.
    train = config.train.model_dump(exclude={"steps"})
    train["resolution"] = train["resolution"] or lookup_base(base).resolution
    trained = [optim.lr > 0, optim.text_encoder_lr > 0, optim.text_encoder_2_lr > 0]
    adapted = [adapter.targets, adapter.rank, adapter.block_ranks, adapter.init]
    return json.dumps([base, train, adapted, optim.name, trained, config.save.ema > 0])


def read_costs(workspace: Path, device: str) -> dict[str, StepCost]:
    """What was measured on a device, by `cost_key`; a file that is missing or broken counts as empty."""
    rows = _read_all(workspace).items()
    return {key.removeprefix(f"{device} "): cost for key, cost in rows if cost.device == device}


def keep_cost(workspace: Path, config: RunConfig, cost: StepCost) -> None:
    """Add what was measured for some settings; the newest stay.

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
    side = config.train.resolution or lookup_base(config.model.base).resolution
    images = config.train.batch_size * config.train.gradient_accumulation_steps
    return (CHECKPOINTING if config.train.gradient_checkpointing else FORWARDS) * images * float(side) ** 2


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
        costs: what was measured on this device, as `read_costs` returns it.
        gpu: that it trains on; None for the processor.
    """
    step, source = _forecast_step(config, runs, costs, len(records)) or (None, "")
    tried = costs.get(cost_key(config))
    as_set: float | None = tried.peak if tried and tried.peak else None
    memory, fallbacks = as_set, list[str]()
    if memory is None and facts and gpu and facts.family:
        varied, full = captions_vary(records, config), gpu.auto_is_fp32 and config.train.precision == AUTO
        own = config.changed({"train.precision": "fp32"}) if full else config
        as_set = (sizes.fit_on_card(own, facts, varied) or (None,))[0]
        memory, fallbacks = sizes.fit_on_card(own, facts, varied, gpu.free) or (None, [])
    elif memory is None and facts:
        memory = as_set = memory_needed(config, facts)
        if memory and not gpu:
            memory += sum(caption_bytes(records, config, facts))
    shown = sum(record.repeats for record in records)
    draws = config.train.steps * config.train.batch_size * config.train.gradient_accumulation_steps
    return RunForecast(
        pictures=len(records),
        captions=sum(bool(record.caption) for record in records),
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
    prompts = len(preview.prompts) or min(USUAL_PROMPTS, images)
    sampling = num_rounds(steps, preview.every) * prompts * preview.steps * draw * sizes.num_adapters(config)
    held = validation.pictures if validation.pictures >= 1 else validation.pictures * images
    rated = sizes.num_adapters(config) + (1 if validation.memorization else 0)
    passes = round(held) * validation.draws_per_image * rated
    passes += validation.forgetting * validation.draws_per_image if held else 0
    own = lookup_base(config.model.base).resolution
    share = ((config.train.resolution or own) / own) ** 2
    measuring = num_rounds(steps, validation.every) * passes * draw / 2 * share / steps
    if validation.max_time_share:
        measuring = min(measuring, validation.max_time_share * step)
    return sampling / steps + measuring


def num_rounds(steps: int, every: int) -> int:
    """How often something is done in a run, its beginning and its end included."""
    return math.ceil(steps / every) + 1 if every else 0


def memory_needed(config: RunConfig, known: BaseFacts) -> float | None:
    """About how many bytes a run on a processor takes at its peak, within a factor of two at best."""
    parameters, export = parameters_of(lookup_base(config.model.base)), sizes.export_bytes(known, config)
    if not parameters or not export:
        return None
    asked = config.train.precision
    width = 4 if asked in ("fp32", "auto") else 2
    side = config.train.resolution or known.resolution
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
