"""The conductor: it drives the training generator and decides when to log, validate, sample, save, pause or
stop.

Everything that a person sees of a run goes through the events that it writes; everything that they ask for
comes through `requests.jsonl` or a signal.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_core.adapters.inject import adapter_weights, load_weights
from lora_core.formats.metadata import export_metadata
from lora_core.spec import events
from lora_core.spec.config import RunConfig
from lora_core.spec.errors import LoraError, OutOfMemory, RunError
from lora_core.spec.progress import Progress
from lora_core.spec.run_folder import RunFolder
from lora_core.training.between import HeldOut, drawn_samples, due
from lora_core.training.checkpoint import (
    TrainState,
    clear_unfinished,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from lora_core.training.export import export_facts, exported_checkpoint, newest_sample, write_export
from lora_core.training.inputs import versions
from lora_core.training.loop import StepPlan, training_steps
from lora_core.training.prepare import Plan, Session, prepared
from lora_core.training.requests import Interrupted, Requests

EXPORT_PRECISION = "fp16"
SECONDS_BETWEEN_NOTES = 0.5
"""Long work between steps says how far it is this often."""


@dataclass(frozen=True)
class Outcome:
    """How the process ended: a status of `runs --json`, the exported file if there is one, and by whose
    wish."""

    status: str
    export: Path | None = None
    signalled: bool = False


def train(
    run: RunFolder,
    steps: int | None,
    on_event: Callable[[events.Event], None],
    accept_changes: bool = False,
) -> Outcome:
    """Train a run from where it stands to its end, or until it is asked to stop. Call it with the run held.

    Args:
        run: the run.
        steps: train to so many steps in all; None for what was planned.
        on_event: called with each event after it is written.
        accept_changes: go on although pictures, settings or packages are not those that the run began with.

    Raises:
        LoraError: what went wrong, in a sentence; it is in the events too.
    """
    before = run.progress()
    config = run.config()
    goal = steps or before.steps or config.train.steps
    if steps is not None and steps <= before.step:
        raise RunError(
            f"The run {run.name} has done {before.step} steps; ask for more than that with --steps."
        )
    if before.ending == "done" and steps is None:
        return Outcome("done", run.path / before.export)
    clear_unfinished(run)
    writer = events.EventWriter(run.events_file)

    def emit(event: events.Event) -> None:
        writer.write(event)
        on_event(event)

    conductor = Conductor(run, config, goal, before, emit)
    try:
        with conductor.requests.signals():
            return conductor.conduct(accept_changes)
    except torch.OutOfMemoryError as error:
        problem = OutOfMemory(
            "The device ran out of memory; lower train.batch_size or train.resolution, or set"
            " train.checkpointing."
        )
        emit(events.Failed(step=conductor.step, reason=str(problem)))
        raise problem from error
    except LoraError as error:
        emit(events.Failed(step=conductor.step, reason=str(error)))
        raise
    except OSError as error:
        named = RunError(f"{error.filename or run.path} cannot be used: {error.strerror or error}.")
        emit(events.Failed(step=conductor.step, reason=str(named)))
        raise named from error
    except Exception as error:
        emit(
            events.Failed(
                step=conductor.step, reason=f"A defect of the program: {type(error).__name__}: {error}"
            )
        )
        raise
    finally:
        writer.close()


class Conductor:
    """One process's part of a run: from its start, or from the last whole checkpoint, to an ending."""

    def __init__(
        self,
        run: RunFolder,
        config: RunConfig,
        goal: int,
        before: Progress,
        emit: Callable[[events.Event], None],
    ) -> None:
        """Conduct `run` to `goal` steps; `before` is what earlier processes did."""
        self.step = 0
        self.requests = Requests(run, before.handled)
        self._run = run
        self._config = config
        self._goal = goal
        self._resuming = before.started
        self._emit = emit
        self._best: dict[str, float] = {}
        self._held_out = HeldOut()
        self._noted = 0.0
        self._started_at = run.config_file.stat().st_mtime

    def conduct(self, accept_changes: bool) -> Outcome:
        """Prepare, train, and end as asked."""
        plan = Plan.of(self._run, self._config)
        torch.set_num_threads(plan.threads)
        self._emit(
            events.Started(
                steps=self._goal,
                pid=os.getpid(),
                device=plan.device,
                threads=plan.threads,
                versions=versions(),
            )
        )
        try:
            session = prepared(self._run, self._config, plan, self._prepare_note, accept_changes)
        except Interrupted:
            return self._end(None)
        for note in session.notes:
            self._emit(events.Warned(step=self.step, message=note))
        self._take_up(session)
        try:
            if self.step == 0 and self._config.preview.every:
                self._preview(session)
            return self._drive(session)
        except Interrupted:
            return self._end(session)

    def _take_up(self, session: Session) -> None:
        """Go on from the newest whole checkpoint, if there is one; a broken one is passed over with a
        warning."""
        for step in reversed(self._run.checkpoint_steps()):
            try:
                weights, state = load_checkpoint(self._run.checkpoint(step))
            except RunError as error:
                self._emit(events.Warned(step=step, message=f"{error} The one before it is used."))
                continue
            load_weights(session.trainee.injected, weights)
            session.trainee.optimizer.load_state_dict(state.optimizer)
            if state.scaler:
                session.trainee.scaler.load_state_dict(state.scaler)
            self.step, self._best = state.step, state.best
            break
        if self._resuming:
            self._emit(events.Resumed(step=self.step, steps=self._goal))

    def _drive(self, session: Session) -> Outcome:
        config = self._config
        plan = StepPlan.of(config, self._goal)
        for step in training_steps(session.trainee, session.batches, session.text, plan, self.step):
            self.step = step.number
            self._emit(events.StepDone(step=step.number, loss=step.loss, lr=step.lr, seconds=step.seconds))
            last = step.number == self._goal
            asked = self._asked()
            if session.held_out and due(step.number, config.validation.every, last):
                self._validate(session)
            if last or "save" in asked or due(step.number, config.save.every, last):
                self._save(session)
            if "preview" in asked or due(step.number, config.preview.every, last):
                self._preview(session)
            if not last:
                self.requests.check()
        return self._finish(session)

    def _asked(self) -> set[str]:
        """Requests to save or to sample that came since the last step."""
        wishes = [r for r in self.requests.waiting() if r["do"] in ("save", "preview")]
        for request in wishes:
            self._handled(request)
        return {request["do"] for request in wishes}

    def _handled(self, request: dict[str, str]) -> None:
        self.requests.done(request)
        self._emit(events.Handled(step=self.step, request=request["id"]))

    def _end(self, session: Session | None) -> Outcome:
        """Leave early, as asked: save, and for a stop export too."""
        request = next((r for r in self.requests.waiting() if r["do"] in ("stop", "pause")), None)
        pausing = request is not None and request["do"] == "pause" and not self.requests.signalled
        kept = self._run.checkpoint_steps()
        if session is not None and self.step and self.step not in kept:
            self._save(session)
        if session is None and kept:
            self.step = kept[-1]
        if request is not None:
            self._handled(request)
        if pausing:
            self._emit(events.Paused(step=self.step))
            return Outcome("paused")
        export = None
        if self.step and session is None:
            how = ("kohya", EXPORT_PRECISION)
            export = Path(exported_checkpoint(self._run, "last", self._run.name, how)["file"])
        elif self.step and session is not None:
            export = self._export(session)
        self._emit(events.Stopped(step=self.step, export=self._below(export) if export else ""))
        return Outcome("stopped", export, self.requests.signalled)

    def _finish(self, session: Session) -> Outcome:
        export = self._export(session)
        self._emit(events.Finished(step=self.step, export=self._below(export)))
        return Outcome("done", export)

    def _validate(self, session: Session) -> None:
        gain = self._held_out.gain(session, self._note("Validating"))
        best = not self._best or gain.gain > self._best["gain"]
        if best:
            self._best = {"step": self.step, "gain": gain.gain}
        self._emit(events.Validated(step=self.step, best=best, **vars(gain)))

    def _preview(self, session: Session) -> None:
        stem = self._run.previews / f"step-{self.step:06d}"
        name = self._run.name if self.step else ""
        paths = drawn_samples(session, self._config.preview, stem, name, self._note("Sampling"))
        files = [self._below(path) for path in paths]
        self._emit(events.PreviewDone(step=self.step, files=files, prompts=session.prompts))

    def _save(self, session: Session) -> None:
        trainee = session.trainee
        state = TrainState(
            self.step, trainee.optimizer.state_dict(), trainee.scaler.state_dict(), dict(self._best)
        )
        weights = adapter_weights(trainee.injected)
        path = save_checkpoint(self._run, weights, state, trainee.base.family, self._header(session))
        self._emit(events.CheckpointDone(step=self.step, path=self._below(path)))
        keep = self._config.save
        best_step = int(self._best["step"]) if self._best and keep.keep_best else None
        prune_checkpoints(self._run, keep.keep_last, best_step)

    def _export(self, session: Session) -> Path:
        path = self._run.exports / f"{self._run.name}.safetensors"
        weights = adapter_weights(session.trainee.injected)
        how = ("kohya", EXPORT_PRECISION)
        picture = newest_sample(self._run, self.step)
        return write_export(weights, path, how, session.trainee.base.family, self._header(session), picture)

    def _header(self, session: Session) -> dict[str, str]:
        base = session.trainee.base
        return export_metadata(
            export_facts(self._config, base, session.train_items, self.step, self._started_at)
        )

    def _prepare_note(self, phase: str, done: int, total: int) -> None:
        if done in (0, total) or time.monotonic() - self._noted > SECONDS_BETWEEN_NOTES:
            self._noted = time.monotonic()
            self._emit(events.Preparing(phase=phase, done=done, total=total))
        self.requests.check()

    def _note(self, phase: str) -> Callable[[int, int], None]:
        """A callback that says now and then how far work between two steps is, and ends it when asked to."""

        def note(done: int, total: int) -> None:
            if time.monotonic() - self._noted > SECONDS_BETWEEN_NOTES:
                self._noted = time.monotonic()
                self._emit(events.Working(step=self.step, phase=phase, done=done, total=total))
            self.requests.check()

        return note

    def _below(self, path: Path) -> str:
        return path.relative_to(self._run.path).as_posix()
