"""Callbacks between two steps: events and requests, checks of losses and times, and periodic actions.

Validation, checkpoints and samples are due at fixed intervals and after the last step, or on request.
Validation and samples only observe a run: where memory is too short for them they are skipped with a warning,
and training continues.
"""

import contextlib
import hashlib
import importlib
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lora_core.data.images import abbreviate, save_png
from lora_core.errors import ConfigError
from lora_core.evaluate.validator import is_worse, reason_to_stop
from lora_core.formats.io import load_adapter
from lora_core.generate.grid import Axis, grid_settings, make_image_grid
from lora_core.generate.pipeline import infotext, sample_image
from lora_core.generate.request import WeightedLora
from lora_core.lora.inject import adapter_weights, at_strength
from lora_core.lora.layer import FlatParams
from lora_core.model_files.sizes import preview_bytes
from lora_core.models.device import out_of_memory
from lora_core.runs import events
from lora_core.runs.events import Progress, describe_average
from lora_core.runs.folder import RunFolder
from lora_core.settings.config import RunConfig, choices_of, flattened
from lora_core.settings.schema import SLIDER_STRENGTHS, SaveSection, ValidationSection
from lora_core.system.files import require_room
from lora_core.system.processes import StopRequest
from lora_core.tools.shrink import MeasuredCut, automatic_ranks
from lora_core.train.autotune import free_memory
from lora_core.train.checkpoint import ADAPTER, CheckpointManager, CheckpointState, amend_record, is_valid
from lora_core.train.distributed import ProcessGroup
from lora_core.train.export import (
    CUT,
    RAW_SUFFIX,
    changes_anything,
    cut_record,
    export_checkpoint,
    latest_sample,
    write_export,
    write_raw,
)
from lora_core.train.loop import Step, StepSettings, TrainState, sample_batch
from lora_core.train.setup import TrainSession, is_on_cpu
from lora_core.train.validation import BestStep, OnStep, Validator, evaluating

EXPORT_FORMAT = ("kohya", "fp16")
SECONDS_BETWEEN_REPORTS = 0.5
SCALARS: dict[type[events.Event], dict[str, str]] = {
    events.StepDone: {"train/loss": "loss", "train/lr": "lr", "train/s": "seconds"},
    events.Validated: {
        "validation/gain": "gain",
        "validation/standard error": "standard_error",
        "validation/loss": "adapted_loss",
        "validation/gauge": "gauge",
        "validation/prior": "prior",
        "validation/raw gain": "raw_gain",
    },
}
"""What TensorBoard and Weights & Biases show: for each kind of event, the curves and their fields."""
MAX_NONFINITE, MAX_ROLLBACKS = 3, 3
"""After this many steps in a row that are not finite, the run rolls back; so often at most."""
RECENT, EARLIER = 10, 100
RUNAWAY, STABLE = 5.0, 2.0
PREDICT_NOTHING = 1.0
"""About the loss of predicting zeros: noise and velocity have variance 1."""
TIMED_STEPS, SLOW = 20, 5.0
RANK_PASSES = 10
"""Measurements of about that many adapters choose the ranks of a file."""
NAMED = 4
"""Number of images named in a message."""


class Interrupted(BaseException):
    """Raised inside long work to leave it at once, because the run is asked to end.

    It derives from BaseException so that no handler of ordinary errors in a library catches it.
    """


class RunContext:
    """One process's part of a run: its events go out here, and what users ask of it comes in.

    Requests are lines in `requests.jsonl`, and signals, which mean stop. A look for them costs one `stat` of
    a small file unless something was written.

    Attributes:
        run: the run.
        goal: the step to train to.
        before: what earlier processes did.
        stopping: whether a signal asked for the end.
        group: the processes that train together, None for this one alone.
    """

    def __init__(
        self, run: RunFolder, goal: int, before: Progress, on_event: Callable[[events.Event], None],
        stopping: StopRequest, group: ProcessGroup | None,
    ) -> None:  # fmt: skip
        """Append to the run's events; `on_event` gets each one after it is written."""
        self.run, self.goal, self.before, self.group = run, goal, before, group
        self._writer = events.EventWriter(run.events_file)
        self._on_event = on_event
        self._boards: list[Board] = []
        self._last_report, self._last_step = 0.0, before.step
        self.stopping = stopping
        self._last_stat: tuple[int, int] | None = None
        self._pending: list[dict[str, str]] = []

    def emit(self, event: events.Event) -> None:
        """Write an event, and show it to the caller and on the boards."""
        self._last_step = event.step
        self._writer.write(event)
        self._on_event(event)
        self._on_boards(event.step, lambda board: board.show(event), "The run continues without it.")

    def open_boards(self, config: RunConfig) -> None:
        """Show events on the boards that the settings name too, from now on."""
        for board in chosen_boards(config.save):
            self._boards.append(board(self.run, self.before.step))

    def close(self) -> None:
        """Close all files."""
        self._on_boards(
            self._last_step, lambda board: board.close(), "The end of the run may be missing there."
        )
        self._writer.close()

    def _on_boards(self, step: int, act: Callable[["Board"], None], consequence: str) -> None:
        """Have each board act; one that fails is taken out with a warning, and never ends the run."""
        failed: dict[Board, Exception] = {}
        for board in self._boards:
            try:
                act(board)
            except Exception as error:  # noqa: BLE001 - wandb raises Exception itself
                failed[board] = error
        self._boards = [board for board in self._boards if board not in failed]
        for board, reason in failed.items():
            with contextlib.suppress(Exception):
                board.close()
            self.warn(step, f"{board.name} ended: {str(reason).rstrip('.')}. {consequence}")

    def warn(self, step: int, message: str) -> None:
        """Emit a warning."""
        self.emit(events.Warned(step=step, message=message))

    def preparing(self, phase: str, done: int, total: int) -> None:
        """Report work before the first step; its start and end are always reported."""
        self._report(events.Preparing(phase=phase, done=done, total=total), done in (0, total))

    def working(self, step: int, phase: str, passes: int = 1) -> OnStep:
        """A function (done, total) that reports work after `step` in percent, where it counts to `total` in
        each of `passes`."""
        passed = 0

        def report(done: int, total: int) -> None:
            nonlocal passed
            percent = min(100, int(100 * (passed + done / max(total, 1)) / max(passes, 1)))
            passed += done >= total
            self._report(events.Working(step=step, phase=phase, done=percent, total=100))

        return report

    def _report(self, event: events.Event, always: bool = False) -> None:
        now = time.monotonic()
        if always or now - self._last_report > SECONDS_BETWEEN_REPORTS:
            self._last_report = now
            self.emit(event)
        self.check()

    def pending(self, *kinds: str) -> list[dict[str, str]]:
        """Requests of these kinds that nobody has acted on, in order."""
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(self.run.requests_file)
            now = (found.st_mtime_ns, found.st_size)
            if now != self._last_stat:
                self._last_stat = now
                self._pending = [r for r in self.run.requests() if r["id"] not in self.before.handled]
        return [request for request in self._pending if request["action"] in kinds]

    def mark_handled(self, step: int, request: dict[str, str]) -> None:
        """Note that a request was acted on, for this and later processes."""
        self.before.handled.add(request["id"])
        self._pending = [each for each in self._pending if each["id"] != request["id"]]
        self.emit(events.Handled(step=step, request=request["id"]))

    def check(self) -> None:
        """Leave long work, by raising Interrupted, if the run is asked to end."""
        if self.stopping.came or self.pending("stop", "pause"):
            raise Interrupted

    def export(self, step: int) -> dict[str, Any]:
        """Write the checkpoint of `step` as the run's file, and report the cut; see `export_checkpoint`."""
        made = export_checkpoint(self.run, str(step), self.run.name, EXPORT_FORMAT)
        if made["cut"]:
            self.emit(events.RanksChosen(step=step, **made["cut"]))
        return made

    def relative(self, path: Path) -> str:
        """A path below the run's folder."""
        return path.relative_to(self.run.path).as_posix()


class NeedsRollback(Exception):
    """Training diverged and may continue from an earlier state; the message says how."""


@dataclass
class DivergenceGuard:
    """Decides when a run has to roll back.

    A loss has run away if the median of the last 10 steps is over 5 times the level before: the mean of up to
    100 steps before those, at most what predicting nothing would cost. Single losses of diffusion models vary
    by more than 5, a median does not. Its record is kept in each checkpoint, so that a resumed run decides as
    an unbroken one would have.

    Attributes:
        lr_scale: factor of the learning rates, halved at each rollback.
        rollbacks: how many there were.
        nonfinite: steps in a row that were not finite.
        losses: the last 110 that were.
        nothing: the loss of predicting nothing; a slider's is that of its prompts, so that it is not known.
    """

    lr_scale: float = 1.0
    rollbacks: int = 0
    nonfinite: int = 0
    losses: list[float] = field(default_factory=list)
    nothing: float = PREDICT_NOTHING

    def update(self, loss: float, problem: str) -> str:
        """Take in a step's loss, and what of the step was not finite, or ""; returns why the run has to roll
        back, or ""."""
        if problem:
            self.nonfinite += 1
            if self.nonfinite >= MAX_NONFINITE:
                return f"{MAX_NONFINITE} steps in a row failed, of the last {problem}"
            return ""
        self.nonfinite = 0
        self.losses = [*self.losses[1 - RECENT - EARLIER :], loss]
        if len(self.losses) < RECENT:
            return ""
        recent, level = self._recent(), self._level()
        return f"the loss has risen from {level:.3g} to {recent:.3g}" if recent > RUNAWAY * level else ""

    @property
    def stable(self) -> bool:
        """Whether the present state is one to roll back to."""
        return not self.nonfinite and (len(self.losses) < RECENT or self._recent() <= STABLE * self._level())

    def roll_back_to(self, record: dict[str, Any]) -> dict[str, Any]:
        """Halve the learning rates and continue with the losses of an earlier `record`; returns the new
        one."""
        self.lr_scale, self.rollbacks, self.nonfinite = self.lr_scale / 2, self.rollbacks + 1, 0
        self.losses = list(record.get("losses", []))
        return self.record()

    def record(self) -> dict[str, Any]:
        """As plain values, for a checkpoint."""
        counts = {"rate": self.lr_scale, "returns": self.rollbacks, "bad": self.nonfinite}
        return {**counts, "losses": self.losses}

    def restore(self, record: dict[str, Any]) -> None:
        """Take over the `record` of a checkpoint; an empty one is that of a new run."""
        self.lr_scale = float(record.get("rate", 1.0))
        self.rollbacks = int(record.get("returns", 0))
        self.nonfinite = int(record.get("bad", 0))
        self.losses = list(record.get("losses", []))

    def _recent(self) -> float:
        return statistics.median(self.losses[-RECENT:])

    def _level(self) -> float:
        before = self.losses[:-RECENT]
        known = len(before) >= RECENT
        return min(self.nothing, math.fsum(before) / len(before)) if known else self.nothing


def describe_nonfinite(session: TrainSession, settings: StepSettings, step: Step) -> str:
    """What of a step is not finite, the losses or a layer's gradient, and which images at which timesteps may
    have caused it; "" where all is. Call it before the next step."""
    if step.nonfinite is None:
        return ""
    in_loss = not math.isfinite(step.loss)
    images = []
    for number, losses in enumerate(step.nonfinite, start=(step.number - 1) * len(step.nonfinite)):
        batch, noise = sample_batch(session.state, session.batches, settings, number)
        for name, timestep, loss in zip(batch.names, noise.timesteps, losses, strict=True):
            if not in_loss or not math.isfinite(float(loss)):
                images.append(f"{name} at timestep {int(timestep)}")
    bad = (
        f"gradient of {' '.join(key)}"
        for key, layer in session.state.injected.layers.items()
        if not all(p.grad is None or bool(p.grad.isfinite().all()) for p in layer.trained())
    )
    what = "loss" if in_loss else next(bad, "gradient")
    return f"the {what} is not finite ({abbreviate(images, NAMED)})"


class StepTimer:
    """Notices, once, that steps suddenly take several times as long.

    A graphics driver that is out of memory may move some of it to the computer's own, as Windows does: no
    error, and minutes a step. Two slow steps in a row count, since anything may hold up one.
    """

    def __init__(self) -> None:
        """No step is timed yet; the first one may be slow."""
        self._times: deque[float] = deque(maxlen=TIMED_STEPS)
        self._slow = 0
        self._reported = False
        self._skip = True

    @property
    def median(self) -> float:
        """Median seconds per step, NaN before the first that counts."""
        return statistics.median(self._times) if self._times else math.nan

    def skip_next(self) -> None:
        """Do not count the next step: something else was done before it."""
        self._skip = True

    def update(self, seconds: float) -> float | None:
        """Take in a step's time; returns how many times the usual one it is, if that is to be reported."""
        if self._skip:
            self._skip = False
            return None
        usual = statistics.median_high(self._times) if len(self._times) == TIMED_STEPS else math.inf
        if seconds <= SLOW * usual:
            self._times.append(seconds)
            self._slow = 0
            return None
        self._slow += 1
        if self._slow < 2 or self._reported:
            return None
        self._reported = True
        return seconds / usual


def describe_slow_step(step: int, seconds: float, times: float, device: str) -> str:
    """What may be wrong if a step took `times` as long as those before it."""
    start = f"Step {step} took {seconds:.1f} s, {times:.0f} times as long as those before it."
    if device == "cpu":
        return f"{start} Another program may be using the processor, or memory is being written to the disk."
    return (
        f"{start} The graphics memory may be full and its driver moving some of it to the computer's own, as"
        " Windows does without an error: pause, close other programs that use the graphics card, or set"
        " train.gradient_checkpointing or a lower train.batch_size, and resume."
    )


class Callback:
    """Something that is done after a step: on schedule, or once where `requested`.

    Attributes:
        every: steps from one time to the next, 0 for never; else it is done after the last step too.
        requested: whether it is to be done after the present step in any case.
        words: what a warning calls it, and a verb for it.
    """

    words = ("", "")

    def __init__(self, context: RunContext, every: int) -> None:
        self.context = context
        self.every = every
        self.requested = False

    def scheduled(self, step: int) -> bool:
        """Whether the schedule names `step`."""
        return self.every > 0 and (step == self.context.goal or step % self.every == 0)

    def due(self, step: int) -> bool:
        """Whether it is to be done after `step`."""
        return self.requested or self.scheduled(step)

    def __call__(self, step: int) -> None:
        """Do it, after `step` optimizer steps."""
        raise NotImplementedError

    def run_if_it_fits(self, state: TrainState, step: int, work: Callable[[], None]) -> None:
        """Do `work`, with the VAE on the CPU if it does not fit otherwise, or skip it and warn."""
        for last_try in (is_on_cpu(state.base.vae), True):
            try:
                work()
                return
            except Exception as error:
                if not out_of_memory(error):
                    raise
                free_memory(state, error)
            if last_try:
                break
            state.base.put("vae", torch.device("cpu"))
        what, verb = self.words
        self.context.warn(
            step, f"{what} of step {step} did not fit into memory and {verb} left out; training continues."
        )


class Validate(Callback):
    """Validates the adapter and says when to stop early.

    Attributes:
        history: the validations of the run that count.
        limited: steps between two validations as `max_time_share` allows, 0 where that is not known yet.
        validator: measures.
    """

    words = ("The validation", "was")

    def __init__(
        self, context: RunContext, validator: Validator, section: ValidationSection, limited: int,
        seconds_per_step: Callable[[], float],
    ) -> None:  # fmt: skip
        """Nothing is validated yet; `seconds_per_step` is asked after the first validation."""
        super().__init__(context, limited or section.every)
        self.history: list[events.Validated] = []
        self.limited = limited
        self.validator = validator
        self._section = section
        self._seconds_per_step = seconds_per_step

    def due(self, step: int) -> bool:
        """Whether there is something to measure after `step`."""
        return step > 0 and self.validator.enabled and self.scheduled(step)

    def __call__(self, step: int, amend: bool = False) -> None:
        """Validate, and after the first time limit how often that is done; or `amend` a step whose checkpoint
        is written already: this learns of it first, so that a kill in between is made up for again."""
        self.run_if_it_fits(self.validator.state, step, lambda: self._validate(step, amend))
        if not amend:
            self._limit_frequency(step)

    def restore(self, state: CheckpointState, before: Sequence[events.Validated]) -> None:
        """Resume from a checkpoint; of the validations `before`, those after it no longer count."""
        self.validator.best = BestStep.from_record(state.best)
        self.history = [event for event in before if event.step <= state.step]

    def stop_reason(self, step: int) -> str:
        """Why the run should end after `step`, or ""."""
        if not self.history or self.history[-1].step != step:
            return ""
        return reason_to_stop(self.history, self._section.patience)

    def _limit_frequency(self, step: int) -> None:
        """Keep validations within their share of the time."""
        section, seconds = self._section, self.validator.seconds
        if self.limited or not self.history:
            return
        share = section.max_time_share * section.every * self._seconds_per_step()
        if share > 0 and seconds > share:
            self.every = section.every * math.ceil(seconds / share)
            self.context.warn(
                step,
                f"A validation takes {seconds:.1f} s, so it is done every {self.every:,} steps rather than"
                f" every {section.every:,}: that keeps it to {section.max_time_share:.0%} of the time"
                " (validation.max_time_share).",
            )
        self.limited = self.every

    def _validate(self, step: int, amend: bool) -> None:
        report = self.context.working(step, "Validating", self.validator.passes)
        event = self.validator.validate(step, report)
        if amend:
            amend_record(self.context.run.checkpoint(step), {"best": self.validator.best.record()})
        self.history.append(event)
        self.context.emit(event)


class Save(Callback):
    """Writes checkpoints: on schedule, on request, of the best step so far, and always of the last step."""

    def __init__(
        self, context: RunContext, checkpoints: CheckpointManager, validator: Validator,
        guard: DivergenceGuard, header: Callable[[int], dict[str, str]],
    ) -> None:  # fmt: skip
        """Write checkpoints with the records of `validator` and `guard`; `header` makes the texts for the
        adapter's file after a number of steps."""
        super().__init__(context, checkpoints.section.every)
        self._checkpoints = checkpoints
        self._validator = validator
        self._guard = guard
        self._header = header

    def certain(self, step: int) -> bool:
        """Whether a checkpoint is due after `step`, whatever a validation finds."""
        return step > 0 and (step == self.context.goal or super().due(step))

    def due(self, step: int) -> bool:
        """Whether to save after `step`."""
        is_best = self._checkpoints.section.keep_best and self._validator.best.step == step > 0
        return self.certain(step) or (is_best and self._checkpoints.is_finite())

    def __call__(self, step: int) -> None:
        """Write a checkpoint; one that was asked for is kept until the user removes it."""
        state = CheckpointState(
            step,
            {},
            best=self._validator.best.record(),
            health=self._guard.record(),
            planned=self.scheduled(step) and self._guard.stable,
            marked=self.requested,
        )
        self.requested = False
        path = self._checkpoints.save(state, self._header(step))
        self.context.emit(events.CheckpointDone(step=step, path=self.context.relative(path)))


class Sample(Callback):
    """Draws samples: on schedule and on request."""

    words = ("The samples", "were")

    def __init__(self, context: RunContext, session: TrainSession, config: RunConfig) -> None:
        super().__init__(context, config.sample.every)
        self._session = session
        self._strengths = SLIDER_STRENGTHS if config.slider.on else (1.0,)
        self._size = preview_bytes(config)

    def __call__(self, step: int) -> None:
        """Draw the samples of `step`; of step 0 with the base alone."""
        self.requested = False
        self.run_if_it_fits(self._session.state, step, lambda: self._sample(step))

    def _sample(self, step: int) -> None:
        run, session = self.context.run, self._session
        require_room(run.path, self._size, f"The samples of step {step}")
        has_raw = bool(step) and session.state.average is not None
        images = len(session.prompts) * len(self._strengths)
        report = self.context.working(step, "Sampling", images * (1 + has_raw))
        stem = run.previews / f"step-{step:06d}"
        name = run.name if step else ""
        files = draw_samples(session, stem, name, report, self._strengths)
        raw: list[Path] = []
        if has_raw:
            stem, name = stem.with_name(f"{stem.name}{RAW_SUFFIX}"), f"{name}{RAW_SUFFIX}"
            raw = draw_samples(session, stem, name, report, self._strengths, averaged=False)
        relative, relative_raw = ([self.context.relative(path) for path in paths] for paths in (files, raw))
        self.context.emit(
            events.PreviewDone(step=step, files=relative, prompts=session.prompts, raw_files=relative_raw)
        )


def draw_samples(
    session: TrainSession, stem: Path, name: str, on_step: OnStep, strengths: tuple[float, ...] = (1.0,),
    averaged: bool = True,
) -> list[Path]:  # fmt: skip
    """Draw the session's samples to `stem`-0.png, ...

    `name` of the adapter is for the images' metadata, "" for images of the base without it; `averaged` puts
    the average in the adapter's place, if there is one. With several `strengths` each is a strip of them.
    """
    state, loras = session.state, (WeightedLora(name),) if name else ()
    strengths = strengths if name else (0.0,)
    strip = Axis("strength", strengths) if len(strengths) > 1 else None
    files = []
    with evaluating(state, averaged), torch.no_grad():
        for number, sample in enumerate(session.samples):
            images = []
            for strength in strengths:
                with at_strength(state.injected, strength):
                    conditions = session.text.embed_prompts(sample.prompt, sample.negative)
                    images.append(sample_image(state.base, sample, *conditions, on_step, strict=False))
            image = make_image_grid([images], [], strip.labels()) if strip else images[0]
            path = stem.with_name(f"{stem.name}-{number}.png")
            extra = grid_settings(None, strip) if strip else {}
            save_png(image, path, infotext(state.base, replace(sample, loras=loras), extra))
            files.append(path)
    return files


def checksum(flat_params: FlatParams) -> int:
    """The sum of the bits of all parameters, to tell whether anything was written to them."""
    return int(flat_params.data.detach().view(torch.int32).sum(dtype=torch.int64))


@dataclass
class Export:
    """Writes the adapter for other tools, when a process's part of the run ends; `header` makes the texts for
    a file after a number of steps, and `start` is the checksum of the parameters before the first."""

    context: RunContext
    config: RunConfig
    state: TrainState
    validate: Validate
    header: Callable[[int], dict[str, str]]
    start: int

    def __call__(self, step: int, measure: bool = True) -> Path:
        """Write the file, and return its path.

        It has the best checkpoint if the validation of this very step says that the last is worse, else the
        last. Where an average is kept, it has that, and a second file has what is trained. With
        `adapter.auto_rank` it is cut, by measuring unless `measure` is False.
        """
        run, state, history = self.context.run, self.state, self.validate.history
        last = history[-1] if history and history[-1].step == step else None
        best = self.validate.validator.best.step
        worse = last is not None and is_worse(last.against_best, last.against_best_error)
        if last is not None and worse and is_valid(run.checkpoint(best)):
            self.context.warn(
                step,
                f"The file is that of step {best:,}, the best one: on {last.on} the last step is"
                f" {-last.against_best:.4f} worse (standard error {last.against_best_error:.4f}). Export can"
                " still write the last.",
            )
            return self._export_checkpoint(step, best, measure)
        path = run.exports / f"{run.name}.safetensors"
        weights, average = adapter_weights(state.injected), state.average
        unchanged = ""
        changed = changes_anything(weights)
        if not changed:
            unchanged = "The adapter changes nothing: all its up factors are still 0"
        elif checksum(state.flat_params) == self.start:
            unchanged = "The adapter is unchanged since the start"
        if unchanged:
            name = self.config.optimizer.name
            self.context.warn(step, f"{unchanged}. Look at optimizer.lr and optimizer.name ({name}).")
        parameters = sum(factor.numel() for factor in state.injected.parameters())
        require_room(run.path, (2 if average else 1) * 2 * parameters, "The exported file")
        if self.config.adapter.auto_rank and changed:
            return self._export_checkpoint(step, step, measure)
        family, header = state.base.family, self.header(step)
        if average:
            raw = write_raw(weights, path, EXPORT_FORMAT, family, header, latest_sample(run, step, raw=True))
            self._compare_files(step, step, str(raw))
            weights = average.weights()
        return write_export(weights, path, EXPORT_FORMAT, family, header, latest_sample(run, step))

    def _export_checkpoint(self, step: int, exported: int, measure: bool) -> Path:
        run = self.context.run
        if self.config.adapter.auto_rank:
            record = cut_record(*self._choose_ranks(step, exported, measure))
            amend_record(run.checkpoint(exported), {CUT: record})
        made = self.context.export(exported)
        self._compare_files(step, exported, made["raw"])
        return Path(made["file"])

    def _choose_ranks(self, step: int, exported: int, measure: bool) -> tuple[MeasuredCut | None, str]:
        """The ranks that keep the gain of a checkpoint; else None, and why they were not measured.

        About as many images go through the base as a tenth of the training took, a step being three times
        that; how many follows from the settings alone, so that a resumed run comes to the same ranks.
        """
        validator, train = self.validate.validator, self.config.train
        if not measure:
            return None, "the run was asked to end"
        if self.config.slider.on or not validator.enabled:
            return None, "no images are held out (validation.pictures, validation.every)"
        samples = 3 * step * train.batch_size * train.gradient_accumulation_steps // 10
        report = self.context.working(step, "Choosing ranks", RANK_PASSES)
        weights = load_adapter(self.context.run.checkpoint(exported) / ADAPTER)
        try:
            draws = samples // RANK_PASSES
            choose, confirm = (validator.measure_gains(draws, s, report) for s in ("choose", "confirm"))
            found = automatic_ranks(weights, choose, confirm)
        except Exception as error:
            if not out_of_memory(error):
                raise
            free_memory(self.state, error)
            return None, "it did not fit into memory"
        return found, "" if found else "the gain on held-out images is within two standard errors of nothing"

    def _compare_files(self, step: int, exported: int, raw: str) -> None:
        """Warn which of two files holds the average and which gains more, if there are two."""
        if not raw:
            return
        measured = next((event for event in self.validate.history if event.step == exported), None)
        compared = describe_average(measured) if measured else "Which gains more was not measured."
        name = self.context.run.name
        self.context.warn(
            step,
            f"{name}.safetensors holds the averaged adapter, {Path(raw).name} the raw one"
            f"{', which keeps all ranks' if self.config.adapter.auto_rank else ''}. {compared}",
        )


class TensorBoardWriter:
    """Writes one run's events as curves and images."""

    name = "TensorBoard"

    def __init__(self, run: RunFolder, done: int) -> None:
        """Write below the run's folder, from `done` steps on. `preflight.require_packages` comes first."""
        self._run = run
        self._writer: Any = self._open(done)

    def show(self, event: events.Event) -> None:
        """Add an event; they come in order."""
        if isinstance(event, events.Resumed):
            # Later steps of an earlier process are void.
            self.close()
            self._writer = self._open(event.step)
        for name, field_name in SCALARS.get(type(event), {}).items():
            if math.isfinite(value := getattr(event, field_name)):
                self._writer.add_scalar(name, value, event.step, walltime=event.time)
        if isinstance(event, events.PreviewDone):
            for name, files in (("samples", event.files), ("samples, raw", event.raw_files)):
                for number, file in enumerate(files):
                    with Image.open(self._run.path / file) as image:
                        pixels = np.asarray(image.convert("RGB"))
                    self._writer.add_image(f"{name}/{number}", pixels, event.step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()

    def _open(self, done: int) -> Any:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        return writer(str(self._run.tensorboard), purge_step=done + 1)


class WandbWriter:
    """Writes one run's events for Weights & Biases, below the run's folder; nothing is sent, and `wandb sync`
    does that later, unless the environment variable WANDB_MODE is `online`.

    A step that is repeated after a resume has two points: none can be removed.
    """

    name = "Weights & Biases"

    def __init__(self, run: RunFolder, done: int) -> None:
        """Begin, or continue the log of an earlier process of the run.

        Raises:
            ConfigError: it refuses, as when WANDB_MODE is `online` and nobody is logged in.
        """
        # Read at the import; without it wandb sends reports of itself even where it is offline.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self._run, self._wandb = run, importlib.import_module("wandb")
        identity = hashlib.sha256(str(run.path).encode()).hexdigest()[:16]
        numbers = {
            name: value
            for name, value in flattened(run.config().to_dict()).items()
            if isinstance(value, int | float) or choices_of(name)
        }
        # Neither paths nor its automatic data: name of the computer, packages, code, output.
        off = ("x_disable_meta", "x_disable_stats", "x_disable_machine_info", "disable_code", "disable_git",
               "disable_job_creation")  # fmt: skip
        own = self._wandb.Settings(console="off", silent=True, **dict.fromkeys(off, True))
        mode = os.environ.get("WANDB_MODE") or "offline"
        try:
            self._board = self._wandb.init(
                project="lora-easel",
                name=run.name,
                id=identity,
                resume="allow",
                dir=str(run.path),
                mode=mode,
                config=numbers,
                settings=own,
            )
        except Exception as error:
            raise ConfigError(
                f"save.wandb = true: Weights & Biases did not start: {error}. Set WANDB_MODE to offline, or"
                " turn it off."
            ) from error
        self._board.define_metric("*", step_metric="step")

    def show(self, event: events.Event) -> None:
        """Add an event; they come in order."""
        curves = SCALARS.get(type(event), {})
        shown: dict[str, Any] = {name: getattr(event, field_name) for name, field_name in curves.items()}
        shown = {name: value for name, value in shown.items() if math.isfinite(value)}
        if isinstance(event, events.PreviewDone):
            shown["samples"] = [self._wandb.Image(str(self._run.path / file)) for file in event.files]
        if shown:
            self._board.log({**shown, "step": event.step})

    def close(self) -> None:
        """Flush the log."""
        self._board.finish()


Board = TensorBoardWriter | WandbWriter


def chosen_boards(save: SaveSection) -> list[type[Board]]:
    """What a run is shown on beside its own folder."""
    return [TensorBoardWriter] * save.tensorboard + [WandbWriter] * save.wandb
