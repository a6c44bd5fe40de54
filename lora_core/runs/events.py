"""The lines of `events.jsonl`: one dataclass a kind, one writer, any number of readers.

Readers keep a byte offset and ignore a last line without its newline, so that they can read while the trainer
writes.
"""

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lora_core.system.files import check_fields, parse_json


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


@dataclass(frozen=True, kw_only=True)
class Validated(Event):
    """Gain on held-out images: base loss minus adapted loss, mean over triples, with its standard error.

    Attributes:
        best: whether this is now the best step, by the rule of `evaluate/validator.py`.
        against_best, against_best_error: the gain less that of the best step before, paired; NaN at the
            first.
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


@dataclass(frozen=True, kw_only=True)
class PreviewDone(Event):
    """Samples: `files` below the run folder, in the order of `prompts`; with an average of the adapter,
    `files` are the average's and `raw_files` those of the raw adapter."""

    files: list[str]
    prompts: list[str]
    raw_files: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class CheckpointDone(Event):
    """A checkpoint is whole on disk: `path` below the run folder."""

    path: str


@dataclass(frozen=True, kw_only=True)
class Warned(Event):
    """A warning, which does not end the run."""

    message: str


@dataclass(frozen=True, kw_only=True)
class Paused(Event):
    """The process ended, to go on later: on request, or for `reason`, as when a drive is full, with
    its `cause` as of `Failed`."""

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
    """The run ended with an error: `reason` in a sentence; `changed` names what a person may accept.

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
    """The event of a line, or None where the line is of a kind or shape that this version does not know."""
    try:
        values: dict[str, Any] = parse_json(line)
        known: dict[str, Any] = {k: math.nan if v is None else v for k, v in values.items() if k != "event"}
        return check_fields(KINDS[values["event"]], known)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def read_events(path: Path, offset: int = 0) -> tuple[list[Event], int]:
    """The whole lines from byte `offset` on, and the offset after the last of them."""
    try:
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
            f"{self._lost} {lines} about this run could not be written ({self._reason}); the training itself"
            " went on."
        )

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        """What is written inside may fail; the file is opened anew for the next line, which ends a half
        one."""
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


def write_line(handle: int, line: bytes) -> None:
    """Write all of a line; a drive that is about to be full takes a piece of it without an error.

    Raises:
        OSError: it cannot be written.
    """
    while line:
        line = line[os.write(handle, line) :]
