"""The lines of `events.jsonl`, one dataclass a kind, and the state of a run that is folded from them.

There is one writer and any number of readers, who keep a byte offset and ignore a last line without its
newline, so that they can read while the trainer writes. What validations mean is worded here for command
line, report and window.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any, ClassVar

from lora_core.settings.config import RunConfig
from lora_core.system.files import check_fields, parse_json

LONGEST_GAP = 600.0
"""Seconds between two steps beyond which the run was paused or broken off."""
PACE_STEPS = 200
SURE = 2.0
"""Standard errors beyond which a difference counts."""
MEMORIZED = 0.25
"""Share of the gain on training images; where less is missing on others, that is usual."""
A_LITTLE = 0.1
"""Share of the gain; forgetting less is hardly seen."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Fields of all lines: `time` in seconds since the epoch, `step` in optimizer steps done."""

    kind: ClassVar[str] = "Event"
    time: float = field(default_factory=time.time)
    step: int = 0

    def __init_subclass__(cls) -> None:
        """Register the kind under the class's own name."""
        cls.kind = cls.__name__
        KINDS[cls.kind] = cls


KINDS: dict[str, type[Event]] = {}


@dataclass(frozen=True, kw_only=True)
class Started(Event):
    """The trainer started; `steps` is where it will end, `precision` the dtype of the frozen base."""

    steps: int
    pid: int
    device: str
    threads: int
    versions: dict[str, str]
    precision: str = ""


@dataclass(frozen=True, kw_only=True)
class Preparing(Event):
    """Work before the first step: `phase` in words, `done` of `total`."""

    phase: str
    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Working(Event):
    """Long work between two steps: `phase` in words, `done` of `total`."""

    phase: str
    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class RateFound(Event):
    """Result of the range test: the denoiser's learning rate, and the curve behind it: the
    `shares` of the base's loss removed at `rates`."""

    rate: float
    rates: list[float]
    shares: list[float]


@dataclass(frozen=True, kw_only=True)
class StepDone(Event):
    """One optimizer step: its loss, the learning rate of the denoiser, and its seconds."""

    loss: float
    lr: float
    seconds: float


HELD_OUT, WANTED_CHANGE = "held-out images", "the wanted change"
"""What a gain is measured on: see `Validated`."""


@dataclass(frozen=True, kw_only=True)
class Validated(Event):
    """Gain on held-out images: base loss minus adapted loss, mean over triples, with its standard error.

    A concept slider has none. Its loss is the squared distance of the adapter's predictions at strength 1 and
    -1 from the wanted ones, so that the gain is the share of `base_loss` that it has learned to add.

    Attributes:
        on: the images of the measurement, in words.
        best: whether this is now the best step, by the rule of `evaluate/validator.py`.
        against_best, against_best_error: the gain over the former best step, paired; NaN at the first.
        train_gain, gauge, gauge_error: the gain on training images; how much more that is than `gain`, the
            memorisation gauge, with its error. NaN where it was not measured.
        prior, prior_error: the gain on what should not change, the base's own images: below 0 it is
            being forgotten. NaN where it was not measured.
        raw_gain: where an average of the adapter is kept, `gain` is the average's and this that of the raw
            adapter; NaN elsewhere.
        raw_against, raw_against_error: `raw_gain` less `gain`, paired, with its error.
        bands: the gain by noise level, {from, to, gain, standard_error}, timesteps in [from, to).
    """

    gain: float
    standard_error: float
    base_loss: float
    adapted_loss: float
    best: bool
    against_best: float = math.nan
    against_best_error: float = math.nan
    train_gain: float = math.nan
    gauge: float = math.nan
    gauge_error: float = math.nan
    prior: float = math.nan
    prior_error: float = math.nan
    raw_gain: float = math.nan
    raw_against: float = math.nan
    raw_against_error: float = math.nan
    bands: list[dict[str, float]] = field(default_factory=list)
    on: str = HELD_OUT


@dataclass(frozen=True, kw_only=True)
class RanksChosen(Event):
    """The exported file is cut (`adapter.auto_rank`); the checkpoint of `step` keeps all.

    Attributes:
        sentence: the cut and its cost.
        trained: the rank of the checkpoint.
        rank: the highest of the file.
        parameters: the share of the checkpoint's that the file has.
        kept, standard_error: the share of the gain on held-out images that it keeps; NaN where the energy of
            the layers decided.
    """

    sentence: str
    trained: int
    rank: int
    parameters: float
    kept: float = math.nan
    standard_error: float = math.nan


@dataclass(frozen=True, kw_only=True)
class PreviewDone(Event):
    """Samples: `files` below the run folder, in the order of `prompts`; with an average of the adapter,
    `files` are the average's and `raw_files` those of the raw adapter."""

    files: list[str]
    prompts: list[str]
    raw_files: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class CheckpointDone(Event):
    """A checkpoint is complete on disk: `path` below the run folder."""

    path: str


@dataclass(frozen=True, kw_only=True)
class Warned(Event):
    """A warning, which does not end the run."""

    message: str


@dataclass(frozen=True, kw_only=True)
class Paused(Event):
    """The process ended, to be resumed later: on request, or for `reason`, as when a drive is full, with its
    `cause` as of `Failed`."""

    reason: str = ""
    cause: str = ""


@dataclass(frozen=True, kw_only=True)
class Stopped(Event):
    """The run ended early, its work kept: on request, or for `reason`, as when nothing was gained any more.

    `export` is the file, below the run folder.
    """

    export: str
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Resumed(Event):
    """The run continues from `step`; later steps written before this line are void."""

    steps: int


@dataclass(frozen=True, kw_only=True)
class Failed(Event):
    """The run ended with an error: `reason` in a sentence; `changed` names what the user may accept.

    Attributes:
        cause: `LoraError.cause` ("out_of_memory", "disk_full", "diverged", "data", "base", ...), "defect" for
            a defect of the program, "" in events of earlier versions.
    """

    reason: str
    changed: list[str] = field(default_factory=list)
    cause: str = ""


@dataclass(frozen=True, kw_only=True)
class Handled(Event):
    """A request was acted on; `request` is its id."""

    request: str


@dataclass(frozen=True, kw_only=True)
class Finished(Event):
    """All steps are done; `export` is the file, below the run folder."""

    export: str


def to_line(event: Event) -> str:
    """One line of JSON, newline included.

    Numbers that are not finite become null: JSON has no word for them.
    """
    values = {"event": event.kind, **dataclasses.asdict(event)}
    values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(values, ensure_ascii=False) + "\n"


def from_line(line: str) -> Event | None:
    """The event of a line; None where it is of a kind or shape that this version does not know, or names a
    file that is not below the run folder: a run may be a stranger's, and its images go into reports."""
    try:
        values: dict[str, Any] = parse_json(line)
        known: dict[str, Any] = {k: math.nan if v is None else v for k, v in values.items() if k != "event"}
        event = check_fields(KINDS[values["event"]], known)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    paths = (getattr(event, name, ()) for name in ("export", "files", "path", "raw_files"))
    named = itertools.chain.from_iterable([one] if isinstance(one, str) else one for one in paths)
    return None if any(path.anchor or ".." in path.parts for path in map(Path, named)) else event


def read_events(path: Path, offset: int = 0) -> tuple[list[Event], int]:
    """The complete lines from byte `offset` on, and the offset after them; none if `path` is not a file."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return [], offset
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return [], offset
    whole = data[: data.rfind(b"\n") + 1]
    lines = whole.decode("utf-8", errors="replace").split("\n")
    return [event for event in map(from_line, lines) if event is not None], offset + len(whole)


def warn_on_stderr(sentence: str) -> None:
    """A line on stderr, if it can be written there."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{sentence}\n")
        sys.stderr.flush()


class EventWriter:
    """The one writer of an events file.

    Each line is one write, so that a kill leaves at most one half line. A line that cannot be written is lost
    and reported through `say`: no run ends because of its log. Once lines can be written again, a warning
    says how many are missing.
    """

    def __init__(self, path: Path, say: Callable[[str], None] = warn_on_stderr) -> None:
        """Append to `path`; what goes wrong with it is given to `say`."""
        self._path = path
        self._say = say
        self._handle: int | None = None
        self._lost = 0
        self._reason = ""
        with self._surviving():
            self._handle = open_for_append(path)

    def write(self, event: Event) -> None:
        """Append one line."""
        lost = self._lost
        with self._surviving():
            if lost:
                self._append(Warned(step=event.step, message=self._hole()))
                self._lost = 0
            self._append(event)

    def close(self) -> None:
        """Close the file."""
        if self._handle is not None:
            handle, self._handle = self._handle, None
            with contextlib.suppress(OSError):
                os.close(handle)

    def _append(self, event: Event) -> None:
        if self._handle is None:
            self._handle = open_for_append(self._path)
        write_line(self._handle, to_line(event).encode())

    def _hole(self) -> str:
        lines = "line" if self._lost == 1 else "lines"
        return (
            f"{self._lost} {lines} about this run could not be written ({self._reason}); the training "
            f"itself continued."
        )

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        """Writes inside may fail; the file is reopened for the next line, which ends a half one."""
        try:
            yield
        except OSError as error:
            self.close()
            self._reason = error.strerror or str(error)
            if not self._lost:
                self._say(f"The events cannot be written to {self._path}: {self._reason}. The run continues.")
            self._lost += 1


def open_for_append(path: Path) -> int:
    """The file, open for appending; a half line left by a killed writer is ended first.

    Raises:
        OSError: it cannot be opened or written.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o644)
    try:
        size = os.fstat(handle).st_size
        if size:
            os.lseek(handle, size - 1, os.SEEK_SET)
            if os.read(handle, 1) != b"\n":
                os.write(handle, b"\n")
    except OSError:
        os.close(handle)
        raise
    return handle


def append_line(path: Path, line: str) -> None:
    """Append a line to a file that anyone may append to.

    Raises:
        OSError: it cannot be written; half of it may be there, which the next line does not join.
    """
    handle = open_for_append(path)
    try:
        write_line(handle, f"{line}\n".encode())
    finally:
        os.close(handle)


def write_line(handle: int, line: bytes) -> None:
    """Write all of a line; a drive that is about to be full takes a piece of it without an error.

    Raises:
        OSError: it cannot be written.
    """
    while line:
        line = line[os.write(handle, line) :]


@dataclass
class Progress:
    """The state of a run, updated with new events as they come.

    Attributes:
        phases: the share done of each phase of the present work between two steps; it never falls.
        spans: when each phase before the first step began and was last heard of.
        took: seconds of the last validation and of the last round of samples, by the name of their event.
        finished: the steps of a run that is done, until a trainer resumes it.
        train_seconds: time taken by the steps so far, those that were gone back from left out.
        idle_since: when the last step, or the last work between two steps, ended.
        handled: the requests acted on, ever.
        answered: those of them that the present process acted on.
        furthest: the latest step of the present process, also after it went back.
    """

    step: int = 0
    furthest: int = 0
    steps: int = 0
    started: bool = False
    stepping: bool = False
    phase: str = ""
    phase_total: int = 0
    phases: dict[str, float] = field(default_factory=dict)
    spans: dict[str, tuple[float, float]] = field(default_factory=dict)
    took: dict[str, float] = field(default_factory=dict)
    train_seconds: float = 0.0
    idle_since: float = 0.0
    ending: str = ""
    finished: int = 0
    reason: str = ""
    cause: str = ""
    changed: list[str] = field(default_factory=list)
    stopped_early: bool = False
    export: str = ""
    best_step: int | None = None
    rate: RateFound | None = None
    ranks: RanksChosen | None = None
    losses: list[StepDone] = field(default_factory=list)
    validations: list[Validated] = field(default_factory=list)
    previews: list[PreviewDone] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    handled: set[str] = field(default_factory=set)
    answered: set[str] = field(default_factory=set)

    def update(self, new: Iterable[Event]) -> None:
        """Fold in events in the order of the file."""
        for event in new:
            self._fold(event)
            if isinstance(event, Validated | PreviewDone) and self.idle_since:
                self.took[event.kind] = max(0.0, event.time - self.idle_since)
            if not isinstance(event, Working | Warned | Handled):
                self.idle_since = event.time

    def _fold(self, event: Event) -> None:
        match event:
            case Started():
                self.expect_start()
                self.started, self.steps = True, event.steps
                self.ending, self.reason, self.cause, self.changed = "", "", "", []
            case Resumed():
                self._forget_after(event.step)
                self.steps, self.finished = event.steps, 0
            case Preparing():
                self.stepping = False
                self._work(event)
            case Working():
                self._work(event)
            case RateFound():
                self.rate = event
            case StepDone():
                self.stepping, self.step, self.phase = True, event.step, ""
                self.furthest = max(self.furthest, self.step)
                self.phases.clear()
                self.losses.append(event)
                self.train_seconds += event.seconds
            case Validated():
                self.validations.append(event)
                if event.best:
                    self.best_step = event.step
            case RanksChosen():
                self.ranks = event
            case PreviewDone():
                self.previews.append(event)
            case Warned():
                self.warnings.append(event.message)
            case Handled():
                self.handled.add(event.request)
                self.answered.add(event.request)
            case Paused():
                self.ending, self.reason, self.cause = "paused", event.reason, event.cause
            case Stopped():
                self.ending, self.export, self.reason = "stopped", event.export, event.reason
                self.stopped_early = self.stopped_early or bool(event.reason)
            case Finished():
                self.ending, self.export, self.finished = "done", event.export, self.steps
            case Failed() if self.finished:
                # It was to be trained further, and was refused.
                self.ending, self.steps = "done", self.finished
            case Failed():
                self.ending, self.reason, self.changed = "failed", event.reason, event.changed
                self.cause = event.cause

    def expect_start(self) -> None:
        """A new process trains from here on: what the last one did says nothing of it."""
        self.stepping, self.phase, self.ranks, self.furthest = False, "", None, 0
        for kept in (self.phases, self.spans, self.answered):
            kept.clear()

    def _work(self, event: Preparing | Working) -> None:
        self.phase, self.phase_total = event.phase, event.total
        share = min(1.0, event.done / event.total) if event.total > 0 else 0.0
        self.phases[event.phase] = max(share, self.phases.get(event.phase, 0.0))
        if not self.stepping:
            self.spans[event.phase] = (self.spans.get(event.phase, (event.time,))[0], event.time)

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
        section, took = config.validation, self.took.get(Validated.kind)
        # Validations that cost more than their share of the time are done less often.
        most = section.max_time_share * left if section.max_time_share else math.inf
        measuring = min(most, math.inf if took is None else took * self._rounds_left(section.every))
        left += measuring if section.every and math.isfinite(measuring) else 0.0
        return left + self.took.get(PreviewDone.kind, 0.0) * self._rounds_left(config.sample.every)

    def _rounds_left(self, every: int) -> int:
        """How many times a periodic action, also due after the last step, is still to come."""
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


def has_fallen(found: Sequence[Validated]) -> bool:
    """Whether the last validation is worse than the best beyond chance. The best is the luckiest of all, so
    the more there are, the more standard errors it takes: Bonferroni's bound, `SURE` for two validations."""
    chance = 1 - NormalDist().cdf(SURE)
    sure = NormalDist().inv_cdf(1 - chance / max(len(found) - 1, 1))
    return found[-1].against_best < -sure * known_error(found[-1].against_best_error)


def _describe_gain(found: Sequence[Validated]) -> str:
    last, best = found[-1], best_of(found)
    if best is None or best.gain < SURE * known_error(best.standard_error):
        if last.gain < -SURE * known_error(last.standard_error):
            return f"At step {last.step:,} it predicts {last.on} worse than the base does."
        return f"No significant gain up to step {last.step:,}."
    if last.step == best.step:
        return "Still gaining." if len(found) > 1 else f"It gains on {best.on}: {best.gain:+.4f}."
    if has_fallen(found):
        return f"It has become worse since step {best.step:,}; the file of that step is better."
    return f"No further gain since step {best.step:,}."


def describe_memorization(last: Validated) -> str:
    """Whether it memorizes its images, in a sentence; "" where it does not or was not measured."""
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
    """Whether the averaged adapter or the raw one gains more, in a sentence; "" without an average."""
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
