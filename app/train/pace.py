"""How long a run will take: from runs of the same cost, else from other runs, else from the machine's
speed."""

import functools
import itertools
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from app.hardware import Card
from app.moment import Moment
from app.train.bases import chosen_base
from lora_core.spec.config import RunConfig
from lora_core.spec.progress import Progress

LONGEST_GAP = 600.0
"""Seconds between two steps beyond which the run was not going on, but paused or broken off."""
LOOKED_AT = 200
SHARE_OF_PIXELS = 0.085
"""What a UNet computes: 2 numbers for each weight at so many of its latent pixels. SD 1.5 (0.68 TFLOP, 0.86 G
weights, 64 x 64) and SDXL (6.0 TFLOP, 2.57 G weights, 128 x 128) give 0.096 and 0.071."""
UNET_SHARE = 0.75
FORWARDS, CHECKPOINTING = 3.0, 4.0
"""A step costs as much as so many passes; with checkpointing one more."""
PROCESSOR_SHARE = 0.4
"""What training reaches of the speed of a plain product of matrices, seen with the embedded base."""
CARD_SHARE = 0.3
TFLOPS_A_WATT = ((9.0, 1.2), (8.9, 0.35), (8.1, 0.2), (8.0, 0.7), (7.0, 0.2), (0.1, 0.03))
"""NVIDIA's data sheets, half precision with tensor cores: from which generation on, and how much a watt."""

MEASURED, SCALED, GUESSED = "measured", "scaled", "guessed"


@dataclass(frozen=True)
class Forecast:
    """Seconds a step, samples and validation included, and where the number comes from."""

    seconds: float
    source: str


def forecast(moment: Moment, config: RunConfig) -> Forecast | None:
    """What a step of `config` will take, or None where nothing is known to tell it from."""
    wanted = cost_key(config)
    others = []
    for watch, _ in moment.runs:
        pace, other = wall_pace(watch.progress), watch.config()
        if pace is None or other is None:
            continue
        if cost_key(other) == wanted:
            return Forecast(pace, MEASURED)
        others.append((pace, other))
    work = work_a_step(config)
    if work is None:
        return None
    for pace, other in others:
        known = work_a_step(other)
        if known:
            return Forecast(pace * work / known, SCALED)
    hardware = moment.desk.hardware
    card = hardware.card()
    speed = card_speed(card) if card is not None else processor_speed() if not hardware.has_gpu else None
    return Forecast(work / speed, GUESSED) if speed else None


def cost_key(config: RunConfig) -> tuple[object, ...]:
    """What decides how long a step takes."""
    train, optim = config.train, config.optim
    trained = (optim.lr > 0, optim.text_encoder_lr > 0, optim.text_encoder_2_lr > 0)
    side = train.resolution or chosen_base(config.model.base).resolution
    size = (side, train.batch_size, train.accumulate, train.checkpointing, train.precision)
    return (config.model.base, *size, config.adapter.targets, *trained)


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
