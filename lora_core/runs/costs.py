"""What a step took when it was tried on this machine, kept in the workspace by what decides its cost."""

import contextlib
import functools
import itertools
import json
import math
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from lora_core.errors import LoraError
from lora_core.model_files.detect import Base, BaseFacts, chosen_base
from lora_core.model_files.families import Family
from lora_core.model_files.sizes import (
    PREPACKED_COPIES,
    PREPACKED_SPARE,
    WINOGRAD_COPIES,
    adapters_used,
    count_base_parameters,
    export_bytes,
)
from lora_core.runs.preflight import ADAPTER_COPIES
from lora_core.runs.progress import Progress
from lora_core.settings.choices import OPTIMIZERS
from lora_core.settings.config import RunConfig
from lora_core.system.hardware import Card, Hardware
from lora_core.system.paths import write_atomically
from lora_core.system.untrusted import checked_fields, parsed_json

MOST_KEPT = 300
_lock = threading.Lock()


@dataclass(frozen=True)
class Measured:
    """Some steps, really taken.

    Attributes:
        step: seconds of an optimizer step.
        draw: seconds of a sampler's step of one sample.
        peak: bytes of the device's memory at the most; 0 where it does not tell.
        base: the base, as the person named it.
        device: what it was measured on.
        work: floating-point operations of the step, about; 0 where that is not known.
        time: when, in seconds since the epoch.
    """

    step: float
    draw: float
    peak: int
    base: str
    device: str
    work: float = 0.0
    time: float = field(default_factory=time.time)


def measured_file(workspace: Path) -> Path:
    """Where a workspace keeps them."""
    return workspace / "measured.json"


def cost_key(config: RunConfig, resolution: int) -> str:
    """What decides how long a step takes and how much memory.

    Args:
        config: the settings.
        resolution: the side in pixels that the base was trained at, which stands in where none is set.
    """
    optim, adapter = config.optim, config.adapter
    # All of the section, so that a setting that is added to it later counts by itself.
    train = {**config.train.model_dump(), "resolution": config.train.resolution or resolution}
    del train["steps"]
    trained = [optim.lr > 0, optim.text_encoder_lr > 0, optim.text_encoder_2_lr > 0]
    adapted = [adapter.targets, adapter.rank, adapter.block_ranks, adapter.init]
    return json.dumps([config.model.base, train, adapted, optim.name, trained, config.save.ema > 0])


def read_measured(workspace: Path) -> dict[str, Measured]:
    """All that was measured, by `cost_key` and device; a file that is missing or broken counts as empty."""
    found: dict[str, Measured] = {}
    try:
        rows = parsed_json(measured_file(workspace).read_bytes())["measured"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return found
    for key, row in rows:
        with contextlib.suppress(TypeError, ValueError):
            one = checked_fields(Measured, row)
            if math.isfinite(one.step) and one.step > 0 and math.isfinite(one.draw) and one.draw >= 0:
                found[key] = one
    return found


def keep_measured(workspace: Path, key: str, measured: Measured) -> None:
    """Add what was measured for a `cost_key`; the newest stay.

    Raises:
        OSError: the disk refuses.
    """
    with _lock:
        kept: dict[str, Measured] = {**read_measured(workspace), at_device(key, measured.device): measured}
        newest = sorted(kept.items(), key=lambda item: item[1].time)[-MOST_KEPT:]
        rows: dict[str, Any] = {name: asdict(one) for name, one in newest}
        write_atomically(measured_file(workspace), json.dumps({"measured": rows}, indent=1).encode())


def at_device(key: str, device: str) -> str:
    """The key of a cost on a device."""
    return f"{device} {key}"


# What a run will take before it starts. Time: from runs of the same cost or steps that were tried, else
# from others, else from the machine's speed. Memory: from the sizes of base and adapter.


LONGEST_GAP = 600.0
"""Seconds between two steps beyond which the run was not going on, but paused or broken off."""
LOOKED_AT = 200
USUAL_PROMPTS = 2
"""So many captions are sampled where no prompts are given."""
PROCESSOR_SHARE = 0.4
"""What training reaches of the speed of a plain product of matrices, seen with the embedded base."""
CARD_SHARE = 0.3
TFLOPS_A_WATT = ((9.0, 1.2), (8.9, 0.35), (8.1, 0.2), (8.0, 0.7), (7.0, 0.2), (0.1, 0.03))
"""NVIDIA's data sheets, half precision with tensor cores: from which generation on, and how much a watt."""

SHARE_OF_PIXELS = 0.085
"""What a UNet computes: 2 numbers for each weight at so many of its latent pixels. SD 1.5 (0.68 TFLOP, 0.86 G
weights, 64 x 64) and SDXL (6.0 TFLOP, 2.57 G weights, 128 x 128) give 0.096 and 0.071."""
UNET_SHARE = 0.75
FORWARDS, CHECKPOINTING = 3.0, 4.0
"""A step costs as much as so many passes; with checkpointing one more."""
PROGRAM = 0.6e9
"""Bytes that torch and its libraries take before a model is loaded."""
ACTIVATIONS = 0.7e6
"""Bytes that one latent pixel keeps for the way back through a UNet of SD 1.x's size, in half precision, on a
processor."""
USUAL_NUMBERS = 1.07e9
"""Weights of all of SD 1.x, which that was seen with."""
CHECKPOINTING_KEEPS = 0.2
CONTEXT = 0.8e9
"""Bytes of a card that its driver's context and the libraries' workspaces take."""
BUFFERS, LOOKS = 3, 4
"""Weights of an offloaded base that are on the card at once, and looks that are measured at once."""
MEASURED, PROBED, SCALED, GUESSED = "measured", "probed", "scaled", "guessed"


@dataclass(frozen=True)
class Forecast:
    """Seconds a step, samples and validation included, and where the number comes from."""

    seconds: float
    source: str


def forecast(
    config: RunConfig,
    runs: Iterable[tuple[Progress, RunConfig | None]],
    measured: Mapping[str, Measured],
    pictures: int,
    hardware: Hardware,
) -> Forecast | None:
    """What a step of `config` will take, or None where nothing is known to tell it from.

    Args:
        config: of the run to come.
        runs: of this machine, the newest first.
        measured: what was measured on this device, as `measured.read_measured` has it.
        pictures: how many there are.
        hardware: the machine.
    """
    wanted = _key(config)
    others = []
    for progress, other in runs:
        pace = wall_pace(progress)
        if pace is None or other is None:
            continue
        if _key(other) == wanted:
            return Forecast(pace, MEASURED)
        others.append((pace, other))
    tried = measured.get(at_device(wanted, hardware.device))
    if tried is not None:
        return Forecast(tried.step + between_steps(config, tried.step, tried.draw, pictures), PROBED)
    work = work_a_step(config)
    if work is None:
        return None
    for one in sorted(measured.values(), key=lambda one: -one.time):
        if one.work and one.base == config.model.base:
            step = one.step * work / one.work
            return Forecast(step + between_steps(config, step, one.draw, pictures), SCALED)
    for pace, other in others:
        known = work_a_step(other)
        if known:
            return Forecast(pace * work / known, SCALED)
    card = hardware.card()
    speed = card_speed(card) if card is not None else processor_speed() if not hardware.has_gpu else None
    return Forecast(work / speed, GUESSED) if speed else None


def between_steps(config: RunConfig, step: float, draw: float, pictures: int) -> float:
    """Seconds a step for what comes between steps: samples, and the measuring on held-out pictures.

    Args:
        config: the settings.
        step: seconds of a step, of which the measuring may take a share.
        draw: seconds of a sampler's step of one sample, which is two passes at the base's own size.
        pictures: how many there are.
    """
    steps, preview, validation = config.train.steps, config.preview, config.validation
    prompts = len(preview.prompts) or min(USUAL_PROMPTS, pictures)
    spent = how_often(steps, preview.every) * prompts * preview.steps * draw * adapters_used(config)
    held = validation.pictures if validation.pictures >= 1 else validation.pictures * pictures
    looks = round(held) * validation.triples * (adapters_used(config) + (1 if validation.gauge else 0))
    looks += validation.prior * validation.triples if held else 0
    base = chosen_base(config.model.base)
    share = ((config.train.resolution or base.resolution) / base.resolution) ** 2
    measuring = how_often(steps, validation.every) * looks * draw / 2 * share / steps
    if validation.budget:
        measuring = min(measuring, validation.budget * step)
    return spent / steps + measuring


def how_often(steps: int, every: int) -> int:
    """How often something is done in a run, its beginning and its end included."""
    return math.ceil(steps / every) + 1 if every else 0


def _key(config: RunConfig) -> str:
    return cost_key(config, chosen_base(config.model.base).resolution)


def wall_pace(progress: Progress) -> float | None:
    """Seconds from one step to the next, with all that happened between them."""
    times = [event.time for event in progress.losses[-LOOKED_AT:]]
    if len(times) < 3:
        return None
    gaps = [after - before for before, after in itertools.pairwise(times)]
    gaps = [gap for gap in gaps if 0.0 <= gap < LONGEST_GAP]
    steps = progress.seconds_a_step() or 0.0
    return max(steps, sum(gaps) / len(gaps)) if gaps else steps or None


def seconds_left(progress: Progress) -> float | None:
    """Time to the last step; the median of the last steps, raised by what comes between them."""
    pace = wall_pace(progress) or progress.seconds_a_step()
    return None if pace is None else pace * max(0, progress.steps - progress.step)


@functools.lru_cache(maxsize=1)
def processor_speed() -> float:
    """Operations a second that training reaches here: measured once, in some hundredths of a second."""
    side = 768
    a = np.random.default_rng(0).standard_normal((side, side), dtype=np.float32)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best * PROCESSOR_SHARE


def card_speed(card: Card) -> float | None:
    """Operations a second that training reaches on a card, by its generation and the power that it may
    draw."""
    share = next((a_watt for since, a_watt in TFLOPS_A_WATT if card.generation >= since), 0.0)
    return card.watts * share * 1e12 * CARD_SHARE or None


def work_a_step(config: RunConfig) -> float | None:
    """Floating-point operations of a step; None where the base cannot be read."""
    base = chosen_base(config.model.base)
    if base.facts is None:
        return None
    weights = _unet_weights(base.facts.path, _changed_at(base.facts.path))
    side = config.train.resolution or base.resolution
    passes = CHECKPOINTING if config.train.checkpointing else FORWARDS
    pictures = config.train.batch_size * config.train.accumulate
    return weights * 2 * (side / 8) ** 2 * SHARE_OF_PIXELS * passes * pictures or None


def _changed_at(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


@functools.lru_cache(maxsize=16)
def _unet_weights(path: Path, changed_at: int) -> float:
    """About how many weights the UNet has, from the size of its files in half precision."""
    try:
        if path.is_file():
            return path.stat().st_size / 2 * UNET_SHARE
        sizes = sorted(file.stat().st_size for file in (path / "unet").glob("*.safetensors"))
        shards = sum(sizes) if len(sizes) > 2 else sizes[0]
        return shards / 2
    except (OSError, IndexError):
        return 0.0


def memory_needed(config: RunConfig, known: BaseFacts, on_card: bool) -> float | None:
    """About how many bytes the run takes at its peak.

    On a card within a quarter of what the simulated card counts, where no fallback is needed; on a processor
    within a factor of two at best.
    """
    numbers, export = _numbers(config.model.base, _changed_at(known.path)), export_bytes(known, config)
    if not numbers or not export:
        return None
    if on_card and known.family is not None:
        return _card_memory(config, known.family, known.resolution, (numbers, export // 2))
    asked = config.train.precision
    width = 4 if asked in ("fp32", "auto") else 2
    side = config.train.resolution or known.resolution
    kept = CHECKPOINTING_KEEPS if config.train.checkpointing else 1.0
    pixels = (side / 8) ** 2 * config.train.batch_size
    activations = pixels * ACTIVATIONS * math.sqrt(numbers / USUAL_NUMBERS) * width / 2 * kept
    weights = numbers * width
    if not (config.train.offload or config.train.quantise != "none"):
        # A processor's run takes more where there is more, because that is faster.
        room = psutil.virtual_memory().available - PREPACKED_SPARE
        most = WINOGRAD_COPIES if width == 4 else PREPACKED_COPIES
        copies = next((n for n in (most, PREPACKED_COPIES) if room > (1 + n) * weights), 0)
        weights *= 1 + copies
    return PROGRAM + weights + export / 2 * 4 * ADAPTER_COPIES + activations


def _card_memory(config: RunConfig, family: Family, resolution: int, counts: tuple[int, int]) -> float:
    """The peak of a run on a card; `counts` are the numbers of the base's weights and of the trained ones."""
    row, train = family.footprint, config.train
    weights, trained = counts
    larger = weights / (row.unet + row.text + row.vae)
    width = 4 if train.precision == "fp32" else 2
    kept = 1 if train.quantise != "none" else width
    blocks = BUFFERS * row.largest if train.offload else row.blocks
    unet = (row.unet - row.blocks) * width + blocks * kept
    made = row.largest * width if train.quantise != "none" else 0
    optim, dataset = config.optim, config.dataset
    encoding = optim.text_encoder_lr or optim.text_encoder_2_lr or dataset.shuffle_tags or dataset.tag_dropout
    text = row.text * width if encoding else 0
    copies = 2 + OPTIMIZERS[optim.name].state + (1 if width == 2 else 0) + (1 if config.save.ema else 0)
    # Activations grow with the width of the layers, weights with its square.
    activation = math.sqrt(larger) * width / 2
    pixels, own_pixels = (((side or resolution) / 8) ** 2 for side in (train.resolution, resolution))
    plain, of_rank, checkpointed = row.steps.get(config.adapter.targets, row.steps["kohya"])
    step = checkpointed if train.checkpointing else plain + of_rank * (config.adapter.rank - 16)
    passing = [step * train.batch_size * pixels * activation]
    if config.validation.every and config.validation.pictures:
        passing.append(min(LOOKS, config.validation.triples) * row.guided * pixels * activation)
    # A sample can be asked for at any time.
    passing += [2 * row.guided * own_pixels * activation, row.decode * own_pixels * math.sqrt(larger)]
    vae = row.vae * 4 * larger
    training = (unet + made + text) * larger + vae + trained * 4 * copies + max(passing)
    return CONTEXT + max(training, vae + row.encode * pixels * math.sqrt(larger), row.text * width * larger)


def numbers_of(base: Base) -> int | None:
    """How many weights a base has, None where its files do not tell."""
    return _numbers(base.name, _changed_at(base.facts.path)) if base.facts else None


@functools.lru_cache(maxsize=16)
def _numbers(base: str, changed_at: int) -> int | None:
    """Kept, as pages ask each second, and a header may hold a megabyte."""
    known = chosen_base(base).facts
    try:
        return count_base_parameters(known) if known else None
    except (LoraError, OSError):
        return None
