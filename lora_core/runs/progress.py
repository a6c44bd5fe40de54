"""The state of a run, folded from its events: where it is, how fast, how good.

What its validations mean is worded here for command line, report and window.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lora_core.runs import events
from lora_core.runs.events import Validated
from lora_core.settings.config import RunConfig

LONGEST_GAP = 600.0
"""Seconds between two steps beyond which the run was paused or broken off."""
PACE_STEPS = 200
SURE = 2.0
"""Standard errors beyond which a difference counts."""
MEMORIZED = 0.25
"""Share of the gain on training images; where less is missing on others, that is usual."""
A_LITTLE = 0.1
"""Share of the gain; forgetting less is hardly seen."""


@dataclass
class Progress:
    """The state of a run, updated with new events as they come.

    Attributes:
        phases: the share done of each phase of the present work between two steps; it never falls.
        took: seconds of the last validation and of the last round of samples, by the name of their event.
        train_seconds: time taken by the steps so far, those that were gone back from left out.
        idle_since: when the last step, or the last work between two steps, ended.
        handled: the requests acted on, ever.
        answered: those of them that the present process acted on.
    """

    step: int = 0
    steps: int = 0
    started: bool = False
    stepping: bool = False
    phase: str = ""
    phase_done: int = 0
    phase_total: int = 0
    phases: dict[str, float] = field(default_factory=dict)
    took: dict[str, float] = field(default_factory=dict)
    train_seconds: float = 0.0
    idle_since: float = 0.0
    ending: str = ""
    reason: str = ""
    cause: str = ""
    changed: list[str] = field(default_factory=list)
    stopped_early: bool = False
    export: str = ""
    best_step: int | None = None
    rate: events.RateFound | None = None
    losses: list[events.StepDone] = field(default_factory=list)
    validations: list[events.Validated] = field(default_factory=list)
    previews: list[events.PreviewDone] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    handled: set[str] = field(default_factory=set)
    answered: set[str] = field(default_factory=set)

    def update(self, new: Iterable[events.Event]) -> None:
        """Fold in events in the order of the file."""
        for event in new:
            self._fold(event)
            if isinstance(event, events.Validated | events.PreviewDone) and self.idle_since:
                self.took[event.kind] = max(0.0, event.time - self.idle_since)
            if not isinstance(event, events.Working | events.Warned | events.Handled):
                self.idle_since = event.time

    def _fold(self, event: events.Event) -> None:
        match event:
            case events.Started():
                self.expect_start()
                self.started, self.steps = True, event.steps
                self.ending, self.reason, self.cause, self.changed = "", "", "", []
            case events.Resumed():
                self._forget_after(event.step)
                self.steps = event.steps
            case events.Preparing():
                self.stepping = False
                self._work(event)
            case events.Working():
                self._work(event)
            case events.RateFound():
                self.rate = event
            case events.StepDone():
                self.stepping, self.step, self.phase = True, event.step, ""
                self.phases.clear()
                self.losses.append(event)
                self.train_seconds += event.seconds
            case events.Validated():
                self.validations.append(event)
                if event.best:
                    self.best_step = event.step
            case events.PreviewDone():
                self.previews.append(event)
            case events.Warned():
                self.warnings.append(event.message)
            case events.Handled():
                self.handled.add(event.request)
                self.answered.add(event.request)
            case events.Paused():
                self.ending, self.reason, self.cause = "paused", event.reason, event.cause
            case events.Stopped():
                self.ending, self.export, self.reason = "stopped", event.export, event.reason
                self.stopped_early = self.stopped_early or bool(event.reason)
            case events.Finished():
                self.ending, self.export = "done", event.export
            case events.Failed():
                self.ending, self.reason, self.changed = "failed", event.reason, event.changed
                self.cause = event.cause

    def expect_start(self) -> None:
        """A new process trains from here on: what the last one did says nothing of it."""
        self.stepping, self.phase = False, ""
        self.phases.clear()
        self.answered.clear()

    def _work(self, event: events.Preparing | events.Working) -> None:
        self.phase, self.phase_done, self.phase_total = event.phase, event.done, event.total
        share = min(1.0, event.done / event.total) if event.total > 0 else 0.0
        self.phases[event.phase] = max(share, self.phases.get(event.phase, 0.0))

    def _forget_after(self, step: int) -> None:
        self.step = step
        self.losses = [e for e in self.losses if e.step <= step]
        self.train_seconds = sum(e.seconds for e in self.losses)
        self.validations = [e for e in self.validations if e.step <= step]
        self.previews = [e for e in self.previews if e.step <= step]
        self.best_step = next((e.step for e in reversed(self.validations) if e.best), None)

    def smoothed_loss(self) -> float | None:
        """Exponential mean of the loss over about 50 steps, or None before the first step."""
        curve = smooth([e.loss for e in self.losses[-300:]])
        return curve[-1] if curve else None

    def seconds_a_step(self) -> float | None:
        """Median seconds of the last 30 steps."""
        recent = sorted(e.seconds for e in self.losses[-30:])
        return recent[len(recent) // 2] if recent else None

    def wall_pace(self) -> float | None:
        """Seconds from one step to the next, with all that happened between them."""
        times = [event.time for event in self.losses[-PACE_STEPS:]]
        gaps = [after - before for before, after in itertools.pairwise(times)]
        gaps = [gap for gap in gaps if 0.0 <= gap < LONGEST_GAP]
        if len(times) < 3:
            return None
        steps = self.seconds_a_step() or 0.0
        return max(steps, sum(gaps) / len(gaps)) if gaps else steps or None

    def seconds_left(self, config: RunConfig | None = None) -> float | None:
        """Time to the last step: at the pace so far, or with the settings of the run the usual time of a step
        and the samples and validations that are still to come."""
        ahead = max(0, self.steps - self.step)
        step = self.seconds_a_step()
        if config is None or step is None:
            pace = self.wall_pace() or step
            return None if pace is None else pace * ahead
        times = [event.time for event in self.losses[-30:]]
        gaps = sorted(after - before for before, after in itertools.pairwise(times))
        left = max(step, gaps[len(gaps) // 2] if gaps else 0.0) * ahead
        section, took = config.validation, self.took.get(events.Validated.kind)
        # Validations that cost more than their share of the time are done less often.
        most = section.max_time_share * left if section.max_time_share else math.inf
        measuring = min(most, math.inf if took is None else took * self._rounds_left(section.every))
        left += measuring if section.every and math.isfinite(measuring) else 0.0
        return left + self.took.get(events.PreviewDone.kind, 0.0) * self._rounds_left(config.sample.every)

    def _rounds_left(self, every: int) -> int:
        """How often what is done every so many steps and after the last one is still to come."""
        return math.ceil(self.steps / every) - self.step // every if every else 0


def smooth(values: list[float], memory: float = 50.0) -> list[float]:
    """Exponential mean with the bias of the start taken out; values that are not finite are passed over."""
    decay = math.exp(-1.0 / memory)
    total = weight = 0.0
    curve = []
    for value in values:
        if math.isfinite(value):
            total = decay * total + value
            weight = decay * weight + 1.0
        curve.append(total / weight if weight else math.nan)
    return curve


def verdict(validations: Sequence[Validated]) -> str:
    """A few sentences, the most important first; "" where nothing was measured."""
    found = with_gain(validations)
    if not found:
        return ""
    return " ".join([_describe_gain(found), *describe_costs(found[-1])])


def describe_costs(last: Validated) -> list[str]:
    """What a validation says beside the gain: memorization, forgetting, and what averaging does."""
    sentences = (describe_memorization(last), describe_forgetting(last), describe_average(last))
    return [sentence for sentence in sentences if sentence]


def with_gain(validations: Sequence[Validated]) -> list[Validated]:
    """The validations that have a number."""
    return [one for one in validations if math.isfinite(one.gain)]


def best_of(validations: Sequence[Validated]) -> Validated | None:
    """The best step: the newest that was called so when it was measured, which is not always the highest."""
    return next((one for one in reversed(with_gain(validations)) if one.best), None)


def known_error(value: float) -> float:
    """A standard error, 0 where it is not known."""
    return value if math.isfinite(value) else 0.0


def _describe_gain(found: Sequence[Validated]) -> str:
    last, best = found[-1], best_of(found)
    if best is None or best.gain < SURE * known_error(best.standard_error):
        if last.gain < -SURE * known_error(last.standard_error):
            return f"At step {last.step:,} it predicts held-out images worse than the base does."
        return f"No significant gain up to step {last.step:,}."
    if last.step == best.step:
        return "Still gaining." if len(found) > 1 else f"It gains on held-out images: {best.gain:+.4f}."
    if last.against_best < -SURE * known_error(last.against_best_error):
        return f"It has become worse since step {best.step:,}; the file of that step is better."
    return f"No further gain since step {best.step:,}."


def describe_memorization(last: Validated) -> str:
    """Whether it learns its images by heart, in a sentence; "" where it does not or was not measured."""
    if not (math.isfinite(last.gauge) and last.train_gain > 0):
        return ""
    share = last.gauge / last.train_gain
    if last.gauge <= SURE * known_error(last.gauge_error) or share < MEMORIZED:
        return ""
    if share >= 1:
        return "Memorization: its gain on training images does not carry over to others at all."
    return f"Memorization: {share:.0%} of its gain on training images does not carry over to others."


def describe_forgetting(last: Validated) -> str:
    """Whether it forgets what the base knew, in a sentence; "" where it does not or was not measured."""
    if not math.isfinite(last.prior) or last.prior >= -SURE * known_error(last.prior_error):
        return ""
    if last.gain <= 0:
        return "Forgetting: it gets worse on the base's own images."
    share = -last.prior / last.gain
    if share < A_LITTLE:
        return "Forgetting: it gets slightly worse on the base's own images."
    if share < 1:
        return f"Forgetting: it loses {share:.0%} as much on the base's own images as it gains on new ones."
    return "Forgetting: it loses more on the base's own images than it gains on new ones."


def describe_average(last: Validated) -> str:
    """Whether the averaged adapter or the raw one gains more, in a sentence; "" where there is no average."""
    if not math.isfinite(last.raw_gain):
        return ""
    gains = f"{last.gain:+.4f} and {last.raw_gain:+.4f}"
    error = known_error(last.raw_against_error)
    if abs(last.raw_against) <= SURE * error:
        return f"The averaged adapter and the raw one gain the same within the error: {gains}."
    gap = f"{abs(last.raw_against):.4f} (standard error {error:.4f})"
    if last.raw_against < 0:
        return f"The averaged adapter gains more than the raw one, by {gap}: {gains}."
    return (
        f"The raw adapter gains more than its average, by {gap}: {last.raw_gain:+.4f} and {last.gain:+.4f}."
    )
