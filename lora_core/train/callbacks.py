"""What happens between two steps: callbacks, each with a schedule and an action `(step) -> None`.

Validation, checkpoints and samples are due every so many steps and after the last one, or on request.
Validation and samples only observe a run: where memory is too short for them they are skipped with a warning,
and training goes on. `TensorBoardWriter` follows a run's events and decides nothing.
"""

import importlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from lora_core.evaluate.early_stopping import is_worse, reason_to_stop
from lora_core.generate.pipeline import infotext, sample_image, save_png
from lora_core.generate.request import GenerationRequest, WeightedLora
from lora_core.lora.inject import adapter_weights
from lora_core.models.device import out_of_memory
from lora_core.runs import events
from lora_core.runs.folder import RunFolder
from lora_core.runs.progress import describe_average
from lora_core.settings.schema import SampleSection, ValidationSection
from lora_core.system.files import require_room
from lora_core.train.checkpoint import CheckpointManager, CheckpointState, amend_record, is_valid
from lora_core.train.divergence import DivergenceGuard
from lora_core.train.export import RAW_SUFFIX, export_checkpoint, latest_sample, write_export, write_raw
from lora_core.train.loop import TrainState
from lora_core.train.oom import free_memory
from lora_core.train.setup import TrainSession, is_on_cpu
from lora_core.train.validation import BestStep, OnStep, Validator, at_strength, evaluating

EXPORT_FORMAT = ("kohya", "fp16")
SECONDS_BETWEEN_REPORTS = 0.5
TENSORBOARD = "tensorboard"


class Callback(Protocol):
    """Something that is done between two steps."""

    def due(self, step: int) -> bool:
        """Whether it is to be done after `step`."""
        ...

    def __call__(self, step: int) -> None:
        """Do it, after `step` optimizer steps."""
        ...


@dataclass(frozen=True)
class Schedule:
    """Every `every` steps, 0 for never, and after step `last` if it is not never."""

    every: int
    last: int

    def due(self, step: int) -> bool:
        """Whether it is due after `step`."""
        return self.every > 0 and (step == self.last or step % self.every == 0)


class ProgressReporter:
    """Throttled progress events."""

    def __init__(self, emit: Callable[[events.Event], None], check: Callable[[], None]) -> None:
        """`check` is called at each report; what it raises ends the work."""
        self.emit = emit
        self._check = check
        self._last = 0.0

    def warn(self, step: int, message: str) -> None:
        """Emit a warning."""
        self.emit(events.Warned(step=step, message=message))

    def preparing(self, phase: str, done: int, total: int) -> None:
        """Report work before the first step; its start and end are always reported."""
        if done in (0, total) or self._due():
            self._last = time.monotonic()
            self.emit(events.Preparing(phase=phase, done=done, total=total))
        self._check()

    def working(self, step: int, phase: str, passes: int = 1) -> OnStep:
        """A function (done, total) that reports work after `step` in percent, where it counts to `total` in
        each of `passes`."""
        passed = 0

        def report(done: int, total: int) -> None:
            nonlocal passed
            percent = min(100, int(100 * (passed + done / max(total, 1)) / max(passes, 1)))
            passed += done >= total
            if self._due():
                self._last = time.monotonic()
                self.emit(events.Working(step=step, phase=phase, done=percent, total=100))
            self._check()

        return report

    def _due(self) -> bool:
        return time.monotonic() - self._last > SECONDS_BETWEEN_REPORTS


def skip_if_out_of_memory(
    state: TrainState, reporter: ProgressReporter, step: int, what: str, work: Callable[[int], None]
) -> None:
    """Do `work(step)`, with the VAE on the CPU if it does not fit otherwise, or skip it with a warning.

    `what` begins the warning, such as "The samples were".
    """
    for last_try in (is_on_cpu(state.base.vae), True):
        try:
            work(step)
            return
        except Exception as error:
            if not out_of_memory(error):
                raise
            free_memory(state, error)
        if last_try:
            break
        state.base.put("vae", torch.device("cpu"))
    thing, _, verb = what.rpartition(" ")
    reporter.warn(
        step, f"{thing} of step {step} did not fit into memory and {verb} left out; training goes on."
    )


class Validate:
    """Validates the adapter and says when to stop early.

    Attributes:
        history: the validations of the run that count.
        every: steps between two validations as `max_time_share` allows, 0 where that is not known yet.
    """

    def __init__(
        self,
        validator: Validator,
        section: ValidationSection,
        run: RunFolder,
        last: int,
        every: int,
        seconds_per_step: Callable[[], float],
        reporter: ProgressReporter,
    ) -> None:
        """Nothing is validated yet.

        Args:
            validator: measures.
            section: how often, and when to stop.
            run: the run.
            last: its last step.
            every: see the attribute.
            seconds_per_step: asked after the first validation.
            reporter: gets progress and results.
        """
        self.history: list[events.Validated] = []
        self.every = every
        self._validator = validator
        self._seconds_per_step = seconds_per_step
        self._section = section
        self._run = run
        self._last = last
        self._reporter = reporter

    def due(self, step: int) -> bool:
        """Whether there is something to measure after `step`."""
        schedule = Schedule(self.every or self._section.every, self._last)
        return step > 0 and self._validator.enabled and schedule.due(step)

    def __call__(self, step: int) -> None:
        """Validate, and after the first time limit how often that is done."""
        self._try(step, self._validate)
        self._limit_frequency(step)

    def catch_up(self, step: int) -> None:
        """Validate a step whose checkpoint is written already.

        The checkpoint learns of it first, so that a kill in between is made up for again.
        """

        def validate(step: int) -> None:
            self._validate(step, lambda best: amend_record(self._run.checkpoint(step), {"best": best}))

        self._try(step, validate)

    def restore(self, state: CheckpointState, before: Sequence[events.Validated]) -> None:
        """Go on from a checkpoint; of the validations `before`, those after it no longer count."""
        self._validator.best = BestStep.from_record(state.best)
        self.history = [event for event in before if event.step <= state.step]

    @property
    def best_step(self) -> int:
        """The best step so far, 0 for none."""
        return self._validator.best.step

    def stop_reason(self, step: int) -> str:
        """Why the run should end after `step`, or ""."""
        if not self.history or self.history[-1].step != step:
            return ""
        return reason_to_stop(self.history, self._section.patience)

    def _try(self, step: int, validate: Callable[[int], None]) -> None:
        skip_if_out_of_memory(self._validator.state, self._reporter, step, "The validation was", validate)

    def _limit_frequency(self, step: int) -> None:
        """Keep validations within their share of the time."""
        section, seconds = self._section, self._validator.seconds
        if self.every or not self.history:
            return
        self.every = section.every
        share = section.max_time_share * section.every * self._seconds_per_step()
        if share > 0 and seconds > share:
            self.every = section.every * math.ceil(seconds / share)
            self._reporter.warn(
                step,
                f"A validation takes {seconds:.1f} s, so it is done every {self.every:,} steps rather than"
                f" every {section.every:,}: that keeps it to {section.max_time_share:.0%} of the time"
                " (validation.max_time_share).",
            )

    def _validate(self, step: int, before_event: Callable[[dict[str, Any]], None] | None = None) -> None:
        validator = self._validator
        event = validator.validate(step, self._reporter.working(step, "Validating", validator.passes))
        if before_event is not None:
            before_event(self._validator.best.record())
        self.history.append(event)
        self._reporter.emit(event)


class Save:
    """Writes checkpoints: on schedule, on request, of the best step so far, and always of the last step."""

    def __init__(
        self,
        checkpoints: CheckpointManager,
        schedule: Schedule,
        keep_best: bool,
        validator: Validator,
        guard: DivergenceGuard,
        header: Callable[[int], dict[str, str]],
        on_saved: Callable[[int, Path], None],
    ) -> None:
        """Write checkpoints through `checkpoints`.

        Args:
            checkpoints: of the run.
            schedule: when to write one.
            keep_best: whether a new best step gets one too.
            validator: knows the best step.
            guard: its record is kept in the checkpoint.
            header: texts for the adapter's file after so many steps.
            on_saved: called with the step and the checkpoint's path.
        """
        self._checkpoints = checkpoints
        self._schedule = schedule
        self._keep_best = keep_best
        self._validator = validator
        self._guard = guard
        self._header = header
        self._on_saved = on_saved
        self._requested = False

    def request(self) -> None:
        """Save after the present step; such a checkpoint is kept until the user removes it."""
        self._requested = True

    def scheduled(self, step: int) -> bool:
        """Whether a checkpoint is due after `step`, whatever a validation finds."""
        return step > 0 and (step == self._schedule.last or self._requested or self._schedule.due(step))

    def due(self, step: int) -> bool:
        """Whether to save after `step`."""
        is_best = self._keep_best and self._validator.best.step == step > 0
        return self.scheduled(step) or (is_best and self._checkpoints.is_finite())

    def __call__(self, step: int) -> None:
        """Write a checkpoint."""
        state = CheckpointState(
            step,
            {},
            best=self._validator.best.record(),
            health=self._guard.record(),
            planned=self._schedule.due(step) and self._guard.stable,
            marked=self._requested,
        )
        self._requested = False
        self._on_saved(step, self._checkpoints.save(state, self._header(step)))


class Sample:
    """Draws samples: on schedule and on request."""

    def __init__(
        self,
        session: TrainSession,
        section: SampleSection,
        run: RunFolder,
        last: int,
        size: int,
        reporter: ProgressReporter,
    ) -> None:
        """Nothing is drawn yet.

        Args:
            session: what is trained, and the prompts.
            section: how to sample, and when.
            run: where files go.
            last: the last step of the run.
            size: estimated bytes of the files of one call.
            reporter: gets progress and the files.
        """
        self._session = session
        self._section = section
        self._run = run
        self._schedule = Schedule(section.every, last)
        self._size = size
        self._reporter = reporter
        self._requested = False

    def request(self) -> None:
        """Draw samples after the present step."""
        self._requested = True

    def due(self, step: int) -> bool:
        """Whether to sample after `step`."""
        return self._requested or self._schedule.due(step)

    def __call__(self, step: int) -> None:
        """Draw the samples of `step`; of step 0 with the base alone."""
        self._requested = False
        skip_if_out_of_memory(self._session.state, self._reporter, step, "The samples were", self._sample)

    def _sample(self, step: int) -> None:
        require_room(self._run.path, self._size, f"The samples of step {step}")
        has_raw = bool(step) and self._session.state.average is not None
        passes = len(self._session.prompts) * (1 + has_raw)
        report = self._reporter.working(step, "Sampling", passes)
        stem = self._run.previews / f"step-{step:06d}"
        name = self._run.name if step else ""
        files = draw_samples(self._session, self._section, stem, name, report)
        raw: list[Path] = []
        if has_raw:
            stem = stem.with_name(f"{stem.name}{RAW_SUFFIX}")
            raw = draw_samples(
                self._session, self._section, stem, f"{name}{RAW_SUFFIX}", report, averaged=False
            )
        relative, relative_raw = (
            [path.relative_to(self._run.path).as_posix() for path in paths] for paths in (files, raw)
        )
        prompts = self._session.prompts
        self._reporter.emit(
            events.PreviewDone(step=step, files=relative, prompts=prompts, raw_files=relative_raw)
        )


def draw_samples(
    session: TrainSession,
    section: SampleSection,
    stem: Path,
    name: str,
    on_step: OnStep,
    averaged: bool = True,
) -> list[Path]:
    """Draw one image for each of the session's prompts, all with the section's seed.

    Args:
        session: what is trained.
        section: how to sample.
        stem: where to write, `-0.png`, `-1.png`, ... appended.
        name: of the adapter, for the images' metadata; "" for images of the base without it.
        on_step: called as each image is denoised.
        averaged: with the average in the adapter's place, if there is one.
    """
    state = session.state
    request = GenerationRequest(
        seed=section.seed, steps=section.steps, cfg=section.cfg, cfg_rescale=section.cfg_rescale,
        sampler=section.sampler, loras=(WeightedLora(name),) if name else (),
    )  # fmt: skip
    files = []
    strength = 1.0 if name else 0.0
    with evaluating(state, averaged), torch.no_grad(), at_strength(state.injected, strength):
        negative = session.text.embed_negative()
        for number, prompt in enumerate(session.prompts):
            image = sample_image(state.base, request, session.text.embed(prompt), negative, on_step)
            path = stem.with_name(f"{stem.name}-{number}.png")
            save_png(image, path, infotext(state.base, replace(request, prompt=prompt)))
            files.append(path)
    return files


class Export:
    """Writes the adapter for other tools, when a process's part of the run ends."""

    def __init__(
        self,
        state: TrainState,
        run: RunFolder,
        validate: Validate,
        header: Callable[[int], dict[str, str]],
        reporter: ProgressReporter,
    ) -> None:
        """Nothing is written yet; `header` makes the texts for a file after so many steps."""
        self._state = state
        self._run = run
        self._validate = validate
        self._header = header
        self._reporter = reporter

    def __call__(self, step: int) -> Path:
        """Write the file, and return its path.

        It has the best checkpoint if the validation of this very step says that the last is worse, else what
        is trained. Where an average is kept, it has that, and a second file has what is trained.
        """
        history, best = self._validate.history, self._validate.best_step
        last = history[-1] if history and history[-1].step == step else None
        if (
            last is not None
            and is_worse(last.against_best, last.against_best_error)
            and is_valid(self._run.checkpoint(best))
        ):
            self._reporter.warn(
                step,
                f"The file is that of step {best:,}, the best one: on held-out pictures the last step is"
                f" {-last.against_best:.4f} worse (standard error {last.against_best_error:.4f}). Export can"
                " still write the last.",
            )
            made = export_checkpoint(self._run, str(best), self._run.name, EXPORT_FORMAT)
            self._compare_files(step, best, made["raw"])
            return Path(made["file"])
        path = self._run.exports / f"{self._run.name}.safetensors"
        weights, average = adapter_weights(self._state.injected), self._state.average
        parameters = sum(layer.down.numel() + layer.up.numel() for layer in weights.layers.values())
        require_room(self._run.path, (2 if average else 1) * 2 * parameters, "The exported file")
        family, header = self._state.base.family, self._header(step)
        if average:
            sample = latest_sample(self._run, step, raw=True)
            raw = write_raw(weights, path, EXPORT_FORMAT, family, header, sample)
            self._compare_files(step, step, str(raw))
            weights = average.weights()
        return write_export(weights, path, EXPORT_FORMAT, family, header, latest_sample(self._run, step))

    def _compare_files(self, step: int, exported: int, raw: str) -> None:
        """Warn which of two files holds the average and which gains more, if there are two."""
        if not raw:
            return
        measured = next((event for event in self._validate.history if event.step == exported), None)
        compared = describe_average(measured) if measured else "Which gains more was not measured."
        name = self._run.name
        self._reporter.warn(
            step,
            f"{name}.safetensors holds the averaged adapter, {Path(raw).name} the raw one. {compared}",
        )


class TensorBoardWriter:
    """Writes one run's events as curves and images."""

    def __init__(self, run: RunFolder, done: int) -> None:
        """Write below the run's folder, from `done` steps on. `preflight.require_packages` comes first."""
        self._run = run
        self._writer: Any = self._open(done)

    def show(self, event: events.Event) -> None:
        """Add an event; they come in order."""
        match event:
            case events.Resumed():
                # Later steps of an earlier process are void.
                self._writer.close()
                self._writer = self._open(event.step)
            case events.StepDone():
                self._add(event, {"train/loss": event.loss, "train/lr": event.lr, "train/s": event.seconds})
            case events.Validated():
                self._add(
                    event,
                    {
                        "validation/gain": event.gain,
                        "validation/standard error": event.standard_error,
                        "validation/loss": event.adapted_loss,
                        "validation/gauge": event.gauge,
                        "validation/prior": event.prior,
                        "validation/raw gain": event.raw_gain,
                    },
                )
            case events.PreviewDone():
                for name, files in (("samples", event.files), ("samples, raw", event.raw_files)):
                    for number, file in enumerate(files):
                        with Image.open(self._run.path / file) as image:
                            pixels = np.asarray(image.convert("RGB"))
                        self._writer.add_image(f"{name}/{number}", pixels, event.step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()

    def _add(self, event: events.Event, values: dict[str, float]) -> None:
        for name, value in values.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, event.step, walltime=event.time)

    def _open(self, done: int) -> Any:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        return writer(str(self._run.path / TENSORBOARD), purge_step=done + 1)
