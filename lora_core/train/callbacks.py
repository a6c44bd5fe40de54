"""TensorBoard, for those who like it: the events of a run as its curves, and its samples as pictures.

It shows what `events.jsonl` says and decides nothing; a run that cannot write it goes on without.
"""

import importlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lora_core.evaluate.early_stopping import is_worse, reason_to_stop
from lora_core.lora.inject import adapter_weights
from lora_core.model_files.sizes import preview_bytes
from lora_core.models.device import out_of_memory
from lora_core.runs import events
from lora_core.runs.folder import RunFolder
from lora_core.runs.verdict import describe_average
from lora_core.settings.config import RunConfig
from lora_core.system.disk_space import require_room
from lora_core.train.checkpoint import CheckpointManager, CheckpointState, amend_record, is_valid
from lora_core.train.divergence import DivergenceGuard
from lora_core.train.export import (
    RAW_SUFFIX,
    export_checkpoint,
    export_header,
    latest_sample,
    write_export,
    write_raw,
)
from lora_core.train.oom import free_memory
from lora_core.train.setup import TrainSession, on_processor
from lora_core.train.validation import BestStep, Validator, draw_samples, due

FOLDER = "tensorboard"


class TensorBoardWriter:
    """Writes one run's curves; feed it events in their order."""

    def __init__(self, run: RunFolder, done: int) -> None:
        """Write below the run's folder, from `done` steps on. `preflight.require_packages` comes first."""
        self._run = run
        self._writer: Any = self._opened(done)

    def show(self, event: events.Event) -> None:
        """Add what an event says."""
        match event:
            case events.Resumed():
                # Later steps of an earlier process are void.
                self._writer.close()
                self._writer = self._opened(event.step)
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
                drawn = {"samples": event.files, "samples, raw": event.raw_files}
                for name, number, file in (
                    (n, *row) for n, files in drawn.items() for row in enumerate(files)
                ):
                    with Image.open(self._run.path / file) as picture:
                        pixels = np.asarray(picture.convert("RGB"))
                    self._writer.add_image(f"{name}/{number}", pixels, event.step, dataformats="HWC")

    def close(self) -> None:
        """Write out what waits."""
        self._writer.close()

    def _add(self, event: events.Event, values: dict[str, float]) -> None:
        for name, value in values.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, event.step, walltime=event.time)

    def _opened(self, done: int) -> Any:
        made = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        return made(str(self._run.path / FOLDER), purge_step=done + 1)


# What is due between two steps: validation, checkpoint and samples, and the export at the end.
#
# Validation and samples look at a run and are no part of it: where memory is too short for them, they are
# left out with a word, and training goes on.


EXPORT_PRECISION = "fp16"
SECONDS_BETWEEN_NOTES = 0.5
"""Long work says how far it is this often."""


class ProgressReporter:
    """Says now and then how far long work is."""

    def __init__(self, emit: Callable[[events.Event], None], check: Callable[[], None]) -> None:
        """`check` is called each time, and may end the work by what it raises."""
        self.emit = emit
        self._check = check
        self._noted = 0.0

    def preparing(self, phase: str, done: int, total: int) -> None:
        """Of work before the first step; its beginning and end are always said."""
        if done in (0, total) or self._due():
            self._noted = time.monotonic()
            self.emit(events.Preparing(phase=phase, done=done, total=total))
        self._check()

    def working(self, step: int, phase: str) -> Callable[[int, int], None]:
        """A callback for work after `step`, called with (done, all)."""

        def note(done: int, total: int) -> None:
            if self._due():
                self._noted = time.monotonic()
                self.emit(events.Working(step=step, phase=phase, done=done, total=total))
            self._check()

        return note

    def _due(self) -> bool:
        return time.monotonic() - self._noted > SECONDS_BETWEEN_NOTES


class Duties:
    """Does for one run what is due after a step."""

    def __init__(
        self,
        run: RunFolder,
        config: RunConfig,
        session: TrainSession,
        keeper: CheckpointManager,
        notes: ProgressReporter,
        every: int,
    ) -> None:
        """Nothing is measured yet.

        Args:
            run, config, session: the run.
            keeper: of its checkpoints.
            notes: where events go.
            every: steps between two validations as `Plan.validate_every` has it, 0 where that is not known.
        """
        self.validations: list[events.Validated] = []
        self.judge = Validator(session)
        self.every = every
        self._run = run
        self._config = config
        self._session = session
        self._keeper = keeper
        self._emit = notes.emit
        self._notes = notes
        self._started_at = run.config_file.stat().st_mtime

    def saves(self, step: int, last: bool, asked: bool) -> bool:
        """Whether a checkpoint is written after `step`."""
        return step > 0 and (last or asked or due(step, self._config.save.every, last))

    def do(self, step: int, last: bool, asked: set[str], health: DivergenceGuard, pace: float) -> bool:
        """What is due after a step, in the order validation, checkpoint, samples; whether anything was.

        Args:
            step: steps done.
            last: whether it was the last.
            asked: "save" and "preview" as people asked for them.
            health: of the run, for the checkpoint.
            pace: usual seconds of a step.
        """
        validates = self._validates(step, last)
        saves = self.saves(step, last, "save" in asked)
        samples = "preview" in asked or due(step, self._config.sample.every, last)
        if validates:
            self._aside(step, "The validation was", self._validate)
            self._keep_to_budget(step, pace)
            # The best step is worth keeping, whether or not a checkpoint is due.
            saves = saves or (self._config.save.keep_best and self._is_best(step) and self._keeper.finite())
        if saves:
            self.save(step, last, asked, health)
        if samples:
            self._aside(step, "The samples were", self._preview)
        return validates or saves or samples

    def make_up(self, step: int, last: bool, validated: set[int], sampled: set[int]) -> None:
        """What was due at the step that a run is gone on from and did not come about: a stop came first.

        Args:
            step, last: as of `do`.
            validated, sampled: steps after which that was done.
        """
        if self._validates(step, last) and step not in validated:
            self._aside(step, "The validation was", self._validate_late)
        if due(step, self._config.sample.every, last) and step not in sampled:
            self._aside(step, "The samples were", self._preview)

    def enough(self, step: int) -> str:
        """Why the run should end after `step`, for its validations, or ""."""
        if not self.validations or self.validations[-1].step != step:
            return ""
        return reason_to_stop(self.validations, self._config.validation.patience)

    def stand_at(self, state: CheckpointState, before: Sequence[events.Validated]) -> None:
        """Go on from a checkpoint.

        Args:
            state: of it.
            before: the validations of the run; those after the checkpoint no longer count.
        """
        self.judge.best = BestStep.from_record(state.best)
        self.validations = [event for event in before if event.step <= state.step]

    def save(self, step: int, last: bool, asked: set[str], health: DivergenceGuard) -> None:
        """Write a checkpoint; arguments as of `do`."""
        planned = due(step, self._config.save.every, last) and health.calm
        state = CheckpointState(
            step,
            {},
            best=self.judge.best.record(),
            health=health.record(),
            planned=planned,
            marked="save" in asked,
        )
        path = self._keeper.save(state, self._header(step))
        self._emit(events.CheckpointDone(step=step, path=self._below(path)))

    def export(self, step: int) -> Path:
        """Write the file for other tools.

        It has the best checkpoint where the validation of this very step speaks against the last; else what
        is trained. Where an average is kept, it has that, and a second file has what is trained.
        """
        last = self.validations[-1] if self.validations else None
        best = self.judge.best.step
        spoiled = (
            last is not None and last.step == step and is_worse(last.against_best, last.against_best_error)
        )
        if last is not None and spoiled and is_valid(self._run.checkpoint(best)):
            self._emit(events.Warned(step=step, message=_of_the_best(best, last)))
            made = export_checkpoint(self._run, str(best), self._run.name, ("kohya", EXPORT_PRECISION))
            self._say_which(step, best, made["raw"])
            return Path(made["file"])
        path = self._run.exports / f"{self._run.name}.safetensors"
        state = self._session.state
        weights = adapter_weights(state.injected)
        numbers = sum(layer.down.numel() + layer.up.numel() for layer in weights.layers.values())
        files = 2 if state.average else 1
        require_room(self._run.path, files * 2 * numbers, "The exported file")
        how, family, header = ("kohya", EXPORT_PRECISION), state.base.family, self._header(step)
        if state.average:
            picture = latest_sample(self._run, step, raw=True)
            raw = write_raw(weights, path, how, family, header, picture)
            self._say_which(step, step, str(raw))
            weights = state.average.weights()
        return write_export(weights, path, how, family, header, latest_sample(self._run, step))

    def _say_which(self, step: int, exported: int, raw: str) -> None:
        """Which of two files holds the average, and which gains more; nothing where there is only one."""
        if not raw:
            return
        measured = next((event for event in self.validations if event.step == exported), None)
        compared = describe_average(measured) if measured else "Which gains more was not measured."
        names = f"{self._run.name}.safetensors holds the averaged adapter, {Path(raw).name} the raw one."
        self._emit(events.Warned(step=step, message=f"{names} {compared}"))

    def _validates(self, step: int, last: bool) -> bool:
        every = self.every or self._config.validation.every
        return step > 0 and bool(self._session.held_out) and due(step, every, last)

    def _is_best(self, step: int) -> bool:
        return self.judge.best.step == step

    def _aside(self, step: int, what: str, work: Callable[[int], None]) -> None:
        """Do `work`, with the VAE on the processor if it does not fit otherwise, or leave it out."""
        base = self._session.state.base
        for last_try in (on_processor(base.vae), True):
            try:
                work(step)
                return
            except Exception as error:
                if not out_of_memory(error):
                    raise
                free_memory(self._session.state, error)
            if last_try:
                break
            base.put("vae", torch.device("cpu"))
        thing, _, verb = what.rpartition(" ")
        message = f"{thing} of step {step} did not fit into memory and {verb} left out; training goes on."
        self._emit(events.Warned(step=step, message=message))

    def _validate(self, step: int) -> None:
        event = self.judge.validated(step, self._notes.working(step, "Validating"))
        self.validations.append(event)
        self._emit(event)

    def _validate_late(self, step: int) -> None:
        """Of a step whose checkpoint is written already: that is told first, so that a kill in between is
        made up for again."""
        event = self.judge.validated(step, self._notes.working(step, "Validating"))
        amend_record(self._run.checkpoint(step), {"best": self.judge.best.record()})
        self.validations.append(event)
        self._emit(event)

    def _keep_to_budget(self, step: int, pace: float) -> None:
        """After the first validation: how many steps have to lie between two of them."""
        section = self._config.validation
        if self.every or not self.validations:
            return
        self.every = section.every
        share = section.max_time_share * section.every * pace
        if share > 0 and self.judge.seconds > share:
            self.every = section.every * math.ceil(self.judge.seconds / share)
            self._emit(
                events.Warned(
                    step=step,
                    message=(
                        f"A validation takes {self.judge.seconds:.1f} s, so it is done every"
                        f" {self.every:,} steps rather than every {section.every:,}: that keeps it to"
                        f" {section.max_time_share:.0%} of the time (validation.max_time_share)."
                    ),
                )
            )

    def _preview(self, step: int) -> None:
        require_room(self._run.path, preview_bytes(self._config), f"The samples of step {step}")
        stem = self._run.previews / f"step-{step:06d}"
        name = self._run.name if step else ""
        note = self._notes.working(step, "Sampling")
        paths = draw_samples(self._session, self._config.sample, stem, name, note)
        raw: list[Path] = []
        if step and self._session.state.average is not None:
            stem = stem.with_name(f"{stem.name}{RAW_SUFFIX}")
            raw = draw_samples(
                self._session, self._config.sample, stem, f"{name}{RAW_SUFFIX}", note, averaged=False
            )
        files, raw_files = ([self._below(path) for path in drawn] for drawn in (paths, raw))
        prompts = self._session.prompts
        self._emit(events.PreviewDone(step=step, files=files, prompts=prompts, raw_files=raw_files))

    def _header(self, step: int) -> dict[str, str]:
        session = self._session
        return export_header(self._config, session.state.base, session.train_items, step, self._started_at)

    def _below(self, path: Path) -> str:
        return path.relative_to(self._run.path).as_posix()


def _of_the_best(best: int, last: events.Validated) -> str:
    return (
        f"The file is that of step {best:,}, the best one: on held-out pictures the last step is"
        f" {-last.against_best:.4f} worse (standard error {last.against_best_error:.4f}). Export can still"
        " write the last."
    )
