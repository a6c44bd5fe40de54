"""What people ask of a run while it trains: lines in `requests.jsonl`, and signals, which mean stop."""

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lora_core.errors import InputsChanged, LoraError, NoRoom, OutOfMemory, RunError
from lora_core.models.device import cap_memory, keep_freed_memory, out_of_memory, release_failed
from lora_core.runs import events
from lora_core.runs.events import EventWriter
from lora_core.runs.folder import RunFolder
from lora_core.runs.preflight import require_packages
from lora_core.runs.progress import Progress
from lora_core.settings.config import RunConfig
from lora_core.system.processes import StopRequest
from lora_core.train.autotune import Autotune
from lora_core.train.callbacks import EXPORT_PRECISION, Duties, ProgressReporter, TensorBoardWriter
from lora_core.train.checkpoint import CheckpointManager, CheckpointState, clear_unfinished, load_first_valid
from lora_core.train.distributed import ProcessGroup
from lora_core.train.divergence import RETURNS, DivergenceGuard, StepTimer, describe_slow_step
from lora_core.train.export import export_checkpoint
from lora_core.train.fingerprint import versions
from lora_core.train.loop import Call, Step, StepSettings, shared_parts, training_steps
from lora_core.train.oom import MemoryFallback, free_memory, next_base_fallback
from lora_core.train.setup import RuntimePlan, TrainSession, prepare


class Interrupted(BaseException):
    """Raised inside long work to leave it at once; the work done so far is kept by the conductor.

    It derives from BaseException so that no handler of ordinary errors in a library takes it for one.
    """


class RequestWatcher:
    """New requests since the last look. A look is one `stat` of a small file unless something was written."""

    def __init__(self, run: RunFolder, handled: set[str]) -> None:
        """Look at the requests of `run`; those in `handled` were acted on before."""
        self.stopping = StopRequest()
        self._run = run
        self._handled = handled
        self._seen: tuple[int, int] | None = None
        self._waiting: list[dict[str, str]] = []

    def waiting(self) -> list[dict[str, str]]:
        """Requests that nobody has acted on, in order."""
        try:
            found = os.stat(self._run.requests_file)
        except FileNotFoundError:
            return []
        now = (found.st_mtime_ns, found.st_size)
        if now != self._seen:
            self._seen = now
            self._waiting = [r for r in self._run.requests() if r["id"] not in self._handled]
        return self._waiting

    def done(self, request: dict[str, str]) -> None:
        """Note that a request was acted on."""
        self._handled.add(request["id"])
        self._waiting = [r for r in self._waiting if r["id"] != request["id"]]

    @property
    def signalled(self) -> bool:
        """Whether a signal asked for the end."""
        return self.stopping.came

    def ending(self) -> bool:
        """Whether the run is asked to end soon."""
        return self.signalled or any(r["action"] in ("stop", "pause") for r in self.waiting())

    def check(self) -> None:
        """Leave long work if the run is asked to end.

        Raises:
            Interrupted: it is.
        """
        if self.ending():
            raise Interrupted


# What the processes beside the main one do: open the same run, and compute their share of each step.
#
# They write nothing, decide nothing and keep nothing: each step begins with the weights that the main
# process sends.


@dataclass(frozen=True)
class Beginning:
    """What the main process tells before the first step: the run's folder, what was chosen for it, and to how
    many steps it goes."""

    run: Path
    plan: RuntimePlan
    goal: int


def train_as_worker(group: ProcessGroup) -> None:
    """Serve the main process until it lets this one go.

    Raises:
        RunError: it ended without a word, or the run cannot go on.
    """
    beginning: Beginning | None = group.told()
    if beginning is None:
        return
    run = RunFolder(beginning.run)
    config = beginning.plan.rated(run.config())
    session = group.agreed(lambda: _opened(run, beginning.plan))
    state = session.state
    state.group = group
    plan = StepSettings.of(config, beginning.goal)
    ladder = MemoryFallback(state, config, beginning.plan.rungs)
    keep_freed_memory()
    while (call := group.told()) is not None:
        assert isinstance(call, Call)
        ladder.reach(call.step)
        if call.scaler:
            state.scaler.load_state_dict(call.scaler)
        shared_parts(state, session.batches, session.text, plan, call.step)


def _opened(run: RunFolder, plan: RuntimePlan) -> TrainSession:
    """The run as the main process prepared it: everything is in the caches."""
    plan.set_up()
    return prepare(run, plan.rated(run.config()), plan, lambda phase, done, total: None)


# The conductor: it drives the training generator and decides when to log, do what is due, go back, pause or
# stop.


BY_HAND = (
    "The device of one of the processes ran out of memory in a step. With several processes that is not"
    " mended by itself: set train.gradient_checkpointing, train.quantize_base or train.offload, or lower"
    " train.batch_size or train.resolution, in a new run."
)

PATIENCE, POLL = 10.0, 0.5
"""Seconds that are waited for memory which another process holds, and between two looks."""
SAME = 0.98
"""The share of the memory of before that counts as all of it."""


@dataclass(frozen=True)
class Outcome:
    """How the process ended: a status of `runs --json`, the exported file if there is one, and by whose
    wish."""

    status: str
    export: Path | None = None
    signalled: bool = False


class Trainer:
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
        self.requests = RequestWatcher(run, before.handled)
        self.group: ProcessGroup | None = None
        self._run = run
        self._config = config
        self._goal = goal
        self._before = before
        self._emit = emit
        self._notes = ProgressReporter(emit, self.requests.check)
        self._health = DivergenceGuard()
        self._pace = StepTimer()
        self._enough = ""
        self._retried = -1

    def conduct(self, accept_changes: bool) -> Outcome:
        """Prepare, train, and end as asked."""
        self._plan = RuntimePlan.of(self._run, self._config, accept_changes)
        self._plan.set_up()
        rungs = self._plan.rungs
        self._plan = self._plan.within(cap_memory(torch.device(self._plan.device)))
        self._emit(
            events.Started(
                steps=self._goal,
                pid=os.getpid(),
                device=self._plan.device,
                threads=self._plan.threads,
                versions=versions(),
                precision=self._plan.precision,
            )
        )
        for sentence in [*self._run.retired_settings(), *self._plan.notes()]:
            self._warn(sentence)
        if self._plan.rungs != rungs:
            self._warn("More memory is free than before, so what was done to take less of it is tried anew.")
        self._config = self._plan.rated(self._config)
        try:
            session = self._prepare(accept_changes)
            self._make_ready(session)
        except Interrupted:
            return self._end_unprepared()
        session.state.group = self.group
        self._keeper = CheckpointManager(self._run, self._config, session.state, self._emit)
        self._duties = Duties(
            self._run, self._config, session, self._keeper, self._notes, self._plan.validate_every
        )
        try:
            self._take_up(session, accept_changes)
            return self._drive(session)
        except Interrupted:
            return self._end()

    def _prepare(self, accept_changes: bool) -> TrainSession:
        """Open the base and encode the data. A base that does not fit into memory is opened in a smaller way.

        Raises:
            OutOfMemory: it does not fit in any way.
        """
        while True:
            try:
                return prepare(self._run, self._config, self._plan, self._notes.preparing, accept_changes)
            except Exception as error:
                rung = next_base_fallback(self._config.train, self._plan.rungs)
                lacking = isinstance(error, OutOfMemory) or out_of_memory(error)
                if not lacking or rung is None or self.group:
                    raise
                release_failed(error, torch.device(self._plan.device))
            self._note_rungs([*self._plan.rungs, (rung.name, 0)])
            self._warn(f"The base does not fit into memory as it is. {rung.told}")

    def _make_ready(self, session: TrainSession) -> None:
        """Choose once, before the first step, what is chosen by trying."""
        for note in session.notes:
            self._warn(note)
        self._ladder = MemoryFallback(session.state, self._config, self._plan.rungs)
        self._ladder.reach(0)
        trial = Autotune(session, self._ladder, self._config, self._goal, self._notes.preparing)
        self._plan = trial.plan(self._plan, fresh=not self._run.checkpoint_steps())
        self._plan.write(self._run)
        self._config = self._plan.rated(self._config)
        for event in trial.found:
            self._emit(event)

    def _take_up(self, session: TrainSession, accept_changes: bool) -> None:
        """Go on from the newest whole checkpoint, if there is one, and make up for what was due there."""
        state = self._keeper.take_up()
        if state is not None:
            self._stand_at(state, DivergenceGuard() if accept_changes else DivergenceGuard(**state.health))
        self._ladder.reach(self.step)
        if self._before.started:
            self._emit(events.Resumed(step=self.step, steps=self._goal))
        validated = {event.step for event in self._duties.validations}
        sampled = {event.step for event in self._before.previews}
        self._duties.make_up(self.step, self._last, validated, sampled)
        self._look_whether_enough()

    def _stand_at(self, state: CheckpointState, health: DivergenceGuard) -> None:
        self.step, self._health = state.step, health
        self._duties.stand_at(state, self._duties.validations or self._before.validations)

    @property
    def _last(self) -> bool:
        return self.step == self._goal

    @property
    def _ending(self) -> bool:
        return self._last or bool(self._enough)

    def _drive(self, session: TrainSession) -> Outcome:
        """Step until the goal; each round is one stretch without a return or a lack of memory."""
        keep_freed_memory()
        if self.group and not self._ending:
            self.group.tell(Beginning(self._run.path, self._plan, self._goal))
            self.group.agreed(lambda: None)
        while not self._ending:
            plan = StepSettings.of(self._config, self._goal, self._health.rate)
            steps = training_steps(session.state, session.batches, session.text, plan, self.step)
            while not self._ending and (step := self._next(session, steps)) is not None:
                if not self._took(session, step):
                    break
        if not self._last and self.step not in self._run.checkpoint_steps():
            self._duties.save(self.step, self._last, set(), self._health)
        export = self._duties.export(self.step)
        if self._last:
            self._emit(events.Finished(step=self.step, export=self._below(export)))
            return Outcome("done", export)
        self._emit(events.Stopped(step=self.step, export=self._below(export), reason=self._enough))
        return Outcome("stopped", export)

    def _next(self, session: TrainSession, steps: Iterator[Step]) -> Step | None:
        """The next step, or None where it did not fit into memory and the steps have to begin anew."""
        try:
            return next(steps)
        except Exception as error:
            if not out_of_memory(error):
                raise
            if self.group:
                raise OutOfMemory(BY_HAND) from error
            half_done = session.state.applying
            free_memory(session.state, error)
        told = self._more_memory(session.state.base.device)
        if not told:
            told = self._ladder.climb(self.step)
            self._note_rungs(self._ladder.taken)
        again = f"step {self.step + 1} is done again"
        if half_done:
            # Some tensors have taken the step and some have not, so none of them can be used.
            state = self._keeper.newest()
            self._stand_at(state, DivergenceGuard(**state.health))
            again = f"it goes on from step {self.step}"
        self._warn(f"Memory ran out, so {again}. {told}")
        if half_done:
            self._emit(events.Resumed(step=self.step, steps=self._goal))
        self._pace.excuse()
        return None

    def _more_memory(self, device: torch.device) -> str:
        """Wait for memory of a card that another process may hold, once for each step.

        Returns:
            A sentence if the step is worth another try, else "".
        """
        if device.type != "cuda" or self._retried == self.step:
            return ""
        self._retried = self.step
        until = time.monotonic() + PATIENCE
        while cap_memory(device) < SAME * self._plan.cap and time.monotonic() < until:
            time.sleep(POLL)
        return "Other programs may have held the memory; it is tried as it is once more."

    def _note_rungs(self, rungs: list[tuple[str, int]]) -> None:
        """Write down the rungs, and within how much memory they were taken."""
        cap = cap_memory(torch.device(self._plan.device))
        self._plan = replace(self._plan, rungs=rungs, cap=cap)
        self._plan.write(self._run)

    def _took(self, session: TrainSession, step: Step) -> bool:
        """All that follows a step; False where the run went back, so that the steps have to begin anew."""
        self.step = step.number
        self._emit(events.StepDone(step=step.number, loss=step.loss, lr=step.lr, seconds=step.seconds))
        if step.trouble:
            self._warn(f"Step {step.number} was passed over: {step.trouble}. The adapter is as before it.")
        back = self._health.trouble_after(step.loss, step.trouble)
        asked = self._asked()
        saves = self._duties.saves(self.step, self._last, "save" in asked)
        if saves and not back and not self._keeper.finite():
            back = "the adapter itself is no longer finite"
        if back:
            self._go_back(back)
            return False
        times = self._pace.slowdown(step.seconds)
        if times is not None:
            self._warn(describe_slow_step(step.number, step.seconds, times, session.state.base.device.type))
        if self._duties.do(self.step, self._last, asked, self._health, self._pace.usual):
            self._pace.excuse()
        self._keep_rhythm()
        self._ladder.reach(self.step)
        self._look_whether_enough()
        if not self._ending:
            self.requests.check()
        return True

    def _look_whether_enough(self) -> None:
        """Whether the run ends here by itself; not if it did before and a person wanted more."""
        if not self._before.stopped_early:
            self._enough = self._duties.enough(self.step)

    def _keep_rhythm(self) -> None:
        """Write down how often validations are done, once that is known."""
        if self._duties.every != self._plan.validate_every:
            self._plan = replace(self._plan, validate_every=self._duties.every)
            self._plan.write(self._run)

    def _go_back(self, why: str) -> None:
        """Return to the last good state with half the learning rates.

        Raises:
            RunError: it did so three times before.
        """
        if self._health.returns >= RETURNS:
            lr = self._config.optimizer.lr * self._health.rate
            raise RunError(
                f"Training does not hold at step {self.step}, though the learning rate was halved"
                f" {RETURNS} times, to {lr:g}: {why}. Set a lower optimizer.lr or train.precision to fp32,"
                " look at the pictures that the notes name, and start again; the last checkpoint is whole."
            )
        at = self.step
        state, health = self._keeper.go_back(self._health)
        self._stand_at(state, health)
        self._warn(
            f"At step {at} {why}, so training goes on from step {self.step}, the last good state, with the"
            f" learning rates halved ({health.returns} of at most {RETURNS} times)."
        )
        self._emit(events.Resumed(step=self.step, steps=self._goal))
        self._pace.excuse()

    def _asked(self) -> set[str]:
        """Requests to save or to sample that came since the last step."""
        wishes = [r for r in self.requests.waiting() if r["action"] in ("save", "preview")]
        for request in wishes:
            self._handled(request)
        return {request["action"] for request in wishes}

    def _handled(self, request: dict[str, str]) -> None:
        self.requests.done(request)
        self._emit(events.Handled(step=self.step, request=request["id"]))

    def _end(self) -> Outcome:
        """Leave early, as asked: save, and for a stop export too."""
        if self.step and self._keeper.finite():
            if self.step not in self._run.checkpoint_steps():
                self._duties.save(self.step, self._last, set(), self._health)
            return self._ended(lambda: self._duties.export(self.step))
        return self._end_unprepared()

    def _end_unprepared(self) -> Outcome:
        """Leave early with the newest whole checkpoint, if there is one, as what there is."""
        found = load_first_valid(self._run, self._run.checkpoint_steps()[::-1], self._emit)
        if found is None:
            return self._ended(None)
        self.step = found[1].step
        which, how = str(self.step), ("kohya", EXPORT_PRECISION)
        return self._ended(lambda: Path(export_checkpoint(self._run, which, self._run.name, how)["file"]))

    def _ended(self, export: Callable[[], Path] | None) -> Outcome:
        request = next((r for r in self.requests.waiting() if r["action"] in ("stop", "pause")), None)
        pausing = request is not None and request["action"] == "pause" and not self.requests.signalled
        if request is not None:
            self._handled(request)
        if pausing:
            self._emit(events.Paused(step=self.step))
            return Outcome("paused")
        path = export() if export is not None else None
        self._emit(events.Stopped(step=self.step, export=self._below(path) if path else ""))
        return Outcome("stopped", path, self.requests.signalled)

    def _warn(self, message: str) -> None:
        self._emit(events.Warned(step=self.step, message=message))

    def _below(self, path: Path) -> str:
        return path.relative_to(self._run.path).as_posix()


# One process's part of a run, from the outside: it is conducted, and however it ends is said in the events.
#
# Everything that a person sees of a run goes through the events; everything that they ask for comes through
# `requests.jsonl` or a signal.


__all__ = ["Outcome", "train"]

_DRIVE = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS", "ENODEV", "ENXIO", "ESTALE", "ENOTCONN")
    if hasattr(errno, name)
}
"""Errors of a drive: full, over quota, failing, gone. They pass, so the run is paused."""


def train(
    run: RunFolder,
    steps: int | None,
    on_event: Callable[[events.Event], None],
    accept_changes: bool = False,
    stopping: StopRequest | None = None,
    group: ProcessGroup | None = None,
) -> Outcome:
    """Train a run from where it stands to its end, or until it is asked to stop. Call it with the run held.

    Args:
        run: the run.
        steps: train to so many steps in all; None for what was planned.
        on_event: called with each event after it is written.
        accept_changes: go on although pictures, settings or packages are not those that the run began with.
        stopping: takes signals already; else they are taken here.
        group: the processes that train it together with this one, which leads them.

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
    boards: list[TensorBoardWriter] = []
    writer = EventWriter(run.events_file)

    def emit(event: events.Event) -> None:
        writer.write(event)
        on_event(event)
        for board in boards:
            with contextlib.suppress(OSError):
                board.show(event)

    conductor = Trainer(run, config, goal, before, emit)
    conductor.requests.stopping = stopping or conductor.requests.stopping
    conductor.group = group
    try:
        require_packages(config)
        if config.save.tensorboard:
            boards.append(TensorBoardWriter(run, before.step))
        with conductor.requests.stopping.taken():
            return conductor.conduct(accept_changes)
    except Exception as error:
        problem = _told(run, error, conductor.step, emit)
        if problem is None or problem is error:
            raise
        raise problem from error
    finally:
        writer.close()
        for board in boards:
            board.close()


def _told(
    run: RunFolder, error: Exception, step: int, emit: Callable[[events.Event], None]
) -> LoraError | None:
    """Say in the events how an error ends the process; returns what it means, or None for a defect."""
    problem = _problem(run, error)
    if isinstance(problem, NoRoom):
        emit(events.Paused(step=step, reason=str(problem)))
    else:
        defect = f"A defect of the program: {type(error).__name__}: {error}"
        changed = problem.changed if isinstance(problem, InputsChanged) else []
        emit(events.Failed(step=step, reason=defect if problem is None else str(problem), changed=changed))
    return problem


def _problem(run: RunFolder, error: Exception) -> LoraError | None:
    """What an error means for a person, or None for a defect."""
    if isinstance(error, NoRoom):
        return error
    cause = _system_error(error)
    if cause is not None and (cause.errno in _DRIVE or not run.path.is_dir()):
        place = cause.filename or run.path
        sentence = (
            str(error) if isinstance(error, LoraError) else f"{place} cannot be written: {cause.strerror}."
        )
        return NoRoom(
            f"{sentence} The run is paused at what it saved last; resume it when the drive is well."
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


def _system_error(error: BaseException | None) -> OSError | None:
    """The error of the system that an error came from."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    return error
