"""How long a run will take: from runs of the same cost or steps that were tried, else from others, else from
the machine's speed."""

import functools
import itertools
import math
import time
from dataclasses import dataclass

import numpy as np

from app.hardware import Card
from app.moment import Moment
from app.train.bases import chosen_base
from app.train.work import work_a_step
from lora_core.spec.config import RunConfig
from lora_core.spec.measured import cost_key
from lora_core.spec.progress import Progress
from lora_core.spec.room import adapters_used

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

MEASURED, PROBED, SCALED, GUESSED = "measured", "probed", "scaled", "guessed"


@dataclass(frozen=True)
class Forecast:
    """Seconds a step, samples and validation included, and where the number comes from."""

    seconds: float
    source: str


def forecast(moment: Moment, config: RunConfig) -> Forecast | None:
    """What a step of `config` will take, or None where nothing is known to tell it from."""
    wanted = _key(config)
    others = []
    for watch, _ in moment.runs:
        pace, other = wall_pace(watch.progress), watch.config()
        if pace is None or other is None:
            continue
        if _key(other) == wanted:
            return Forecast(pace, MEASURED)
        others.append((pace, other))
    pictures = len(moment.desk.project.dataset().records)
    tried = moment.desk.prober.known(config)
    if tried is not None:
        return Forecast(tried.step + between_steps(config, tried.step, tried.draw, pictures), PROBED)
    work = work_a_step(config)
    if work is None:
        return None
    for one in sorted(moment.desk.prober.all().values(), key=lambda one: -one.time):
        if one.work and one.base == config.model.base:
            step = one.step * work / one.work
            return Forecast(step + between_steps(config, step, one.draw, pictures), SCALED)
    for pace, other in others:
        known = work_a_step(other)
        if known:
            return Forecast(pace * work / known, SCALED)
    hardware = moment.desk.hardware
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
