"""Trains a run: prepares it, drives the loop, and reports how it ended.

All that a user sees of a run goes through its events; all that they ask for comes through `requests.jsonl` or
a signal. `Trainer` owns the decisions: which callbacks run after a step, when to roll back, to take less
memory, to pause or to stop. With several processes the main one runs a `Trainer`, and the others
`distributed.train_as_worker`.
"""

import errno
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lora_core.errors import Diverged, InputsChanged, LoraError, NoRoom, OutOfMemory, RunError
from lora_core.model_files.sizes import FALLBACKS as DESCRIPTIONS
from lora_core.model_files.sizes import checkpoint_bytes
from lora_core.models.device import cap_memory, keep_freed_memory, out_of_memory, release_failed
from lora_core.runs import events
from lora_core.runs.folder import RunFolder
from lora_core.runs.preflight import require_packages
from lora_core.settings.config import RunConfig
from lora_core.system.processes import StopRequest
from lora_core.train import callbacks
from lora_core.train.autotune import MemoryFallback, autotune, free_memory, next_base_fallback
from lora_core.train.checkpoint import CheckpointManager, CheckpointState, clear_unfinished, load_first_valid
from lora_core.train.distributed import TAKE_A_STEP, ProcessGroup, SharedState, WorkerStart
from lora_core.train.export import export_header
from lora_core.train.loop import PartialUpdate, Step, StepSettings, training_steps
from lora_core.train.setup import RuntimePlan, TrainSession, prepare, versions
from lora_core.train.validation import Validator

OUT_OF_MEMORY_IN_A_PROCESS = (
    "The device of one of the processes ran out of memory in a step. With several processes there is no "
    "automatic fallback: set train.gradient_checkpointing, train.quantize_base or train.offload, or lower"
    " train.batch_size or train.resolution, in a new run."
)
PATIENCE, POLL = 10.0, 0.5
"""Seconds to wait for memory that another process holds, and between two looks."""
SAME = 0.98
"""The share of the memory of before that counts as all of it."""
DRIVE_ERRORS = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS", "ENODEV", "ENXIO", "ESTALE", "ENOTCONN")
    if hasattr(errno, name)
}
"""Errors of a drive: full, over quota, failing, gone. They pass, so the run is paused."""


@dataclass(frozen=True)
class Outcome:
    """How a process ended: a status of `runs --json`, the exported file if there is one, and whether a signal
    asked for it."""

    status: str
    export: Path | None = None
    signalled: bool = False


def set_up(
    context: callbacks.RunContext, config: RunConfig, accept_changes: bool
) -> tuple[RunConfig, RuntimePlan, TrainSession, MemoryFallback]:
    """Choose what the machine decides, load the base, encode the data, try a step where memory is limited.

    Returns:
        The config with the learning rates found, the choices for this machine, the run ready to train, and
        the fallbacks applied to fit it into memory.

    Raises:
        LoraError: it cannot train.
        Interrupted: it is asked to end.
    """
    run, goal = context.run, context.goal
    plan = RuntimePlan.of(run, config, accept_changes)
    plan.set_up()
    fallbacks = plan.rungs
    plan = plan.within(cap_memory(torch.device(plan.device)))
    context.emit(
        events.Started(
            steps=goal, pid=os.getpid(), device=plan.device, threads=plan.threads, versions=versions(),
            precision=plan.precision,
        )
    )  # fmt: skip
    notes = [*run.retired_settings(), *plan.notes()]
    if plan.rungs != fallbacks:
        notes.append("More memory is free than before, so the memory fallbacks are chosen again.")
    for note in notes:
        context.warn(0, note)
    config = plan.with_lr(config)
    while True:
        try:
            session = prepare(run, config, plan, context.preparing, accept_changes)
            break
        except Exception as error:
            fallback = next_base_fallback(config.train, plan.rungs)
            lacking = isinstance(error, OutOfMemory) or out_of_memory(error)
            if not lacking or not fallback or context.group:
                raise
            release_failed(error, torch.device(plan.device))
        plan = plan.with_fallbacks([*plan.rungs, (fallback, 0)])
        plan.write(run)
        context.warn(0, f"The base does not fit into memory as it is. {DESCRIPTIONS[fallback]}")
    if session.fallbacks:
        plan = plan.with_fallbacks([*((name, 0) for name in session.fallbacks), *plan.rungs])
        plan.write(run)
    apart = [
        f"The base does not fit into memory as it is. {DESCRIPTIONS[name]}" for name in session.fallbacks
    ]
    for note in (*session.notes, *apart):
        context.warn(0, note)
    memory = MemoryFallback(session.state, config.train.batch_size, plan.rungs, session.offload_folder)
    memory.apply_until(0)
    plan, found = autotune(
        session, memory, StepSettings(config, goal), plan, not run.checkpoint_steps(), context.preparing
    )
    plan.write(run)
    for event in found:
        context.emit(event)
    return plan.with_lr(config), plan, session, memory


class Trainer:
    """One process's part of a run, from its start or the last valid checkpoint to an ending; `step` counts
    the optimizer steps done."""

    def __init__(
        self, context: callbacks.RunContext, config: RunConfig, plan: RuntimePlan, session: TrainSession,
        memory: MemoryFallback,
    ) -> None:  # fmt: skip
        """Nothing is trained yet; see `set_up` for the arguments."""
        run, state = context.run, session.state
        self.step = 0
        self._context = context
        self._config = config
        self._plan = plan
        self._session = session
        self._state = state
        self._memory = memory
        self._guard = callbacks.DivergenceGuard(
            nothing=math.inf if config.slider.on else callbacks.PREDICT_NOTHING
        )
        timer = self._timer = callbacks.StepTimer()
        self._stop_reason = ""
        self._retried_at = -1
        if context.group is not None:
            state.group = context.group
        started = run.config_file.stat().st_mtime

        # Does not hold the trainer: a cycle would keep the card's memory until the garbage collector runs.
        def header(step: int) -> dict[str, str]:
            return export_header(config, state.base, session.train_items, step, started)

        parameters = sum(tensor.numel() for tensor in state.injected.parameters())
        self._checkpoints = CheckpointManager(
            run, config.save, state, context.emit, checkpoint_bytes(config, parameters)
        )
        validator = Validator(state, session.text, session.validation_sets)
        self._validate = callbacks.Validate(
            context, validator, config.validation, plan.validate_every, lambda: timer.median
        )
        self._save = callbacks.Save(context, self._checkpoints, validator, self._guard, header)
        self._sample = callbacks.Sample(context, session, config)
        self._export = callbacks.Export(
            context, config, state, self._validate, header, callbacks.checksum(state.flat_params)
        )

    def fit(self, accept_changes: bool) -> Outcome:
        """Resume from the newest valid checkpoint, train, and end as asked."""
        try:
            self._resume(accept_changes)
            keep_freed_memory()
            self._start_workers()
            while not self._ending:
                # Each round is one stretch without a rollback or a lack of memory.
                for step in self._steps():
                    try:
                        self._after_step(step)
                    except callbacks.NeedsRollback as error:
                        self._roll_back(str(error))
                        break
                    if self._ending:
                        break
                    self._context.check()
            return self._finish()
        except callbacks.Interrupted:
            if self.step and self._checkpoints.is_finite():
                self._save_if_missing()
                return finish_early(self._context, self.step, lambda: self._export(self.step, measure=False))
            return finish_unprepared(self._context)

    @property
    def _ending(self) -> bool:
        return self.step == self._context.goal or bool(self._stop_reason)

    def _resume(self, accept_changes: bool) -> None:
        """Restore the newest valid checkpoint, and run the callbacks due at its step."""
        state = self._checkpoints.load_latest()
        if state is not None:
            self._restore(state)
            self._guard.restore({} if accept_changes else state.health)
        self._memory.apply_until(self.step)
        before = self._context.before
        if before.started:
            self._report_resumed()
        if self._validate.due(self.step) and self.step not in {e.step for e in self._validate.history}:
            self._validate(self.step, amend=True)
        if self._sample.due(self.step) and self.step not in {e.step for e in before.previews}:
            self._sample(self.step)
        self._update_stop_reason()

    def _restore(self, state: CheckpointState) -> None:
        self.step = state.step
        self._validate.restore(state, self._validate.history or self._context.before.validations)

    def _steps(self) -> Iterator[Step]:
        """The steps from here on, until one does not fit into memory and the stretch has to start over."""
        settings = StepSettings(self._config, self._context.goal, self._guard.lr_scale)
        group, session = self._context.group, self._session
        if group is not None:
            group.broadcast_object(SharedState.of(self._state, self.step, self._guard.lr_scale))
        steps = training_steps(self._state, session.batches, session.text, settings, self.step)
        while True:
            if group is not None:
                group.broadcast_object(TAKE_A_STEP)
            try:
                step = next(steps, None)
            except Exception as error:
                if group is not None and not isinstance(error, PartialUpdate):
                    group.barrier(error)
                if not out_of_memory(_original(error)):
                    raise
                self._take_less_memory(error)
                return
            if step is None:
                return
            yield step

    def _take_less_memory(self, error: Exception) -> None:
        """After a step that did not fit; if the optimizer failed midway, go back to the last checkpoint."""
        if self._context.group is not None:
            raise OutOfMemory(OUT_OF_MEMORY_IN_A_PROCESS) from error
        partial = isinstance(error, PartialUpdate)
        free_memory(self._state, error)
        done = self._wait_for_memory()
        if not done:
            done = self._memory.apply_next(self.step)
            self._plan = self._plan.with_fallbacks(self._memory.applied)
            self._plan.write(self._context.run)
        again = f"step {self.step + 1} is done again"
        if partial:
            state = self._checkpoints.load_latest_or_start()
            self._restore(state)
            self._guard.restore(state.health)
            again = f"it continues from step {self.step}"
        self._context.warn(self.step, f"Memory ran out, so {again}. {done}")
        if partial:
            self._report_resumed()
        self._timer.skip_next()

    def _wait_for_memory(self) -> str:
        """Wait for memory of a card that another process may hold, once for each step; returns a sentence if
        the step is worth another try, else ""."""
        device = self._state.base.device
        if device.type != "cuda" or self._retried_at == self.step:
            return ""
        self._retried_at = self.step
        until = time.monotonic() + PATIENCE
        while cap_memory(device) < SAME * self._plan.cap and time.monotonic() < until:
            time.sleep(POLL)
        return "Other programs may have held the memory; it is tried as it is once more."

    def _after_step(self, step: Step) -> None:
        """Log a step and run the callbacks due; raises NeedsRollback if training diverged."""
        context, number = self._context, step.number
        self.step = number
        context.emit(events.StepDone(step=number, loss=step.loss, lr=step.lr, seconds=step.seconds))
        problem = callbacks.describe_nonfinite(self._session, StepSettings(self._config, context.goal), step)
        if problem:
            context.warn(number, f"Step {number} skipped: {problem}. The adapter is as before it.")
        diverged = self._guard.update(step.loss, problem)
        for request in context.pending("save", "preview"):
            context.mark_handled(number, request)
            (self._save if request["action"] == "save" else self._sample).requested = True
        if not diverged and self._save.certain(number) and not self._checkpoints.is_finite():
            diverged = "the adapter itself is no longer finite"
        if diverged:
            raise callbacks.NeedsRollback(diverged)
        if (times := self._timer.update(step.seconds)) is not None:
            device = self._state.base.device.type
            context.warn(number, callbacks.describe_slow_step(number, step.seconds, times, device))
        scheduled: tuple[callbacks.Callback, ...] = (self._validate, self._save, self._sample)
        for callback in scheduled:
            if callback.due(number):
                callback(number)
                self._timer.skip_next()
        if self._validate.limited != self._plan.validate_every:
            self._plan = replace(self._plan, validate_every=self._validate.limited)
            self._plan.write(context.run)
        self._memory.apply_until(number)
        self._update_stop_reason()

    def _update_stop_reason(self) -> None:
        """Stop early if validation says so; not if the run did so before and the user wanted more."""
        if not self._context.before.stopped_early:
            self._stop_reason = self._validate.stop_reason(self.step)

    def _roll_back(self, why: str) -> None:
        """Return to the last good state with half the learning rates, three times at most."""
        guard, at = self._guard, self.step
        if guard.rollbacks >= callbacks.MAX_ROLLBACKS:
            lr = self._config.optimizer.lr * guard.lr_scale
            raise Diverged(
                f"Training diverged at step {at} even after halving the learning rate {guard.rollbacks}"
                f" times, to {lr:g}: {why}. Set a lower optimizer.lr or train.precision to fp32, look at the"
                " images that the notes name, and start again; the last checkpoint is intact."
            )
        self._restore(self._checkpoints.roll_back(guard.roll_back_to))
        self._context.warn(
            self.step,
            f"At step {at} {why}, so training continues from step {self.step}, the last good state, with the"
            f" learning rates halved ({guard.rollbacks} of at most {callbacks.MAX_ROLLBACKS} times).",
        )
        self._report_resumed()
        self._timer.skip_next()

    def _finish(self) -> Outcome:
        """Export; the run is done, or stopped early."""
        done = self.step == self._context.goal
        if not done:
            self._save_if_missing()
        export = self._export(self.step)
        path = self._context.relative(export)
        if done:
            self._context.emit(events.Finished(step=self.step, export=path))
            return Outcome("done", export)
        self._context.emit(events.Stopped(step=self.step, export=path, reason=self._stop_reason))
        return Outcome("stopped", export)

    def _save_if_missing(self) -> None:
        if self.step not in self._context.run.checkpoint_steps():
            self._save(self.step)

    def _report_resumed(self) -> None:
        self._context.emit(events.Resumed(step=self.step, steps=self._context.goal))

    def _start_workers(self) -> None:
        """Have the other processes prepare the run as this one did."""
        group = self._context.group
        if group is not None and not self._ending:
            group.broadcast_object(WorkerStart(self._context.run.path, self._plan, self._context.goal))
            group.barrier()


def finish_early(context: callbacks.RunContext, step: int, export: Callable[[], Path] | None) -> Outcome:
    """End as asked: paused, or stopped with an export if there is something to export."""
    request = next(iter(context.pending("stop", "pause")), None)
    pausing = request is not None and request["action"] == "pause" and not context.stopping.came
    if request is not None:
        context.mark_handled(step, request)
    if pausing:
        context.emit(events.Paused(step=step))
        return Outcome("paused")
    path = export() if export is not None else None
    context.emit(events.Stopped(step=step, export=context.relative(path) if path else ""))
    return Outcome("stopped", path, context.stopping.came)


def finish_unprepared(context: callbacks.RunContext) -> Outcome:
    """End as asked before training began: with the newest valid checkpoint, if there is one."""
    run = context.run
    found = load_first_valid(run, run.checkpoint_steps()[::-1], context.emit)
    if found is None:
        return finish_early(context, 0, None)
    step = found[1].step
    return finish_early(context, step, lambda: Path(context.export(step)["file"]))


def train(
    run: RunFolder,
    steps: int | None,
    on_event: Callable[[events.Event], None],
    accept_changes: bool = False,
    stopping: StopRequest | None = None,
    group: ProcessGroup | None = None,
) -> Outcome:
    """Train a run from where it is to its end, or until it is asked to stop. Call it with the run held.

    Args:
        run: the run.
        steps: train to this many steps in all; None for the config's.
        on_event: called with each event after it is written.
        accept_changes: continue although images, settings or packages are not those that the run began with.
        stopping: takes signals already; else they are taken here.
        group: the processes that train it together, of which this is the main one.

    Raises:
        LoraError: what went wrong, in a sentence; it is in the events too.
    """
    before, config = run.progress(), run.config()
    goal = steps or before.steps or config.train.steps
    if steps is not None and steps <= before.step:
        raise RunError(
            f"The run {run.name} has done {before.step} steps; ask for more than that with --steps."
        )
    if before.ending == "done" and steps is None:
        return Outcome("done", run.path / before.export)
    clear_unfinished(run)
    stopping = stopping or StopRequest()
    trainer: Trainer | None = None
    context = callbacks.RunContext(run, goal, before, on_event, stopping, group)
    try:
        require_packages(config)
        context.open_boards(config)
        with stopping.taken():
            try:
                trainer = Trainer(context, *set_up(context, config, accept_changes))
            except callbacks.Interrupted:
                return finish_unprepared(context)
            return trainer.fit(accept_changes)
    except Exception as error:
        problem = _to_lora_error(run, _original(error))
        context.emit(_failure(trainer.step if trainer else 0, problem, _original(error)))
        if problem is None or problem is error:
            raise
        raise problem from error
    finally:
        context.close()


def _failure(step: int, problem: LoraError | None, error: BaseException) -> events.Event:
    """The event that tells of an error; `problem` is its user error, None for a defect."""
    if problem is None:
        reason = f"A defect of the program: {type(error).__name__}: {error}"
        return events.Failed(step=step, reason=reason, cause="defect")
    if isinstance(problem, NoRoom):
        return events.Paused(step=step, reason=str(problem), cause=problem.cause)
    changed = problem.changed if isinstance(problem, InputsChanged) else []
    return events.Failed(step=step, reason=str(problem), cause=problem.cause, changed=changed)


def _to_lora_error(run: RunFolder, error: BaseException) -> LoraError | None:
    """What an error means for a user, or None for a defect."""
    if isinstance(error, NoRoom):
        return error
    cause = _os_error(error)
    if cause is not None and (cause.errno in DRIVE_ERRORS or not run.path.is_dir()):
        place = cause.filename or run.path
        sentence = (
            str(error) if isinstance(error, LoraError) else f"{place} cannot be written: {cause.strerror}."
        )
        return NoRoom(
            f"{sentence} The run is paused at its last checkpoint; resume it when the drive works again."
        )
    if isinstance(error, LoraError):
        return error
    if out_of_memory(error):
        return OutOfMemory(
            "The device ran out of memory; lower train.batch_size or train.resolution, or set"
            " train.gradient_checkpointing."
        )
    if isinstance(error, OSError):
        return RunError(f"{error.filename or run.path} cannot be used: {error.strerror or error}.")
    return None


def _original(error: BaseException) -> BaseException:
    """The error that made the optimizer fail midway, or the error itself."""
    return error.__cause__ or error if isinstance(error, PartialUpdate) else error


def _os_error(error: BaseException | None) -> OSError | None:
    """The operating system's error that an error came from."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    return error
