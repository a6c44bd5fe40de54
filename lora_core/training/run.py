"""One process's part of a run, from the outside: it is conducted, and however it ends is said in the events.

Everything that a person sees of a run goes through the events; everything that they ask for comes through
`requests.jsonl` or a signal.
"""

import contextlib
import errno
from collections.abc import Callable

from lora_core.models.device import out_of_memory
from lora_core.spec import events
from lora_core.spec.errors import InputsChanged, LoraError, NoRoom, OutOfMemory, RunError
from lora_core.spec.event_file import EventWriter
from lora_core.spec.preflight import require_packages
from lora_core.spec.run_folder import RunFolder
from lora_core.spec.stopping import Stopping
from lora_core.training.board import Board
from lora_core.training.checkpoint import clear_unfinished
from lora_core.training.conductor import Conductor, Outcome
from lora_core.training.fellows import Fellows

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
    stopping: Stopping | None = None,
    fellows: Fellows | None = None,
) -> Outcome:
    """Train a run from where it stands to its end, or until it is asked to stop. Call it with the run held.

    Args:
        run: the run.
        steps: train to so many steps in all; None for what was planned.
        on_event: called with each event after it is written.
        accept_changes: go on although pictures, settings or packages are not those that the run began with.
        stopping: takes signals already; else they are taken here.
        fellows: the processes that train it together with this one, which leads them.

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
    boards: list[Board] = []
    writer = EventWriter(run.events_file)

    def emit(event: events.Event) -> None:
        writer.write(event)
        on_event(event)
        for board in boards:
            with contextlib.suppress(OSError):
                board.show(event)

    conductor = Conductor(run, config, goal, before, emit)
    conductor.requests.stopping = stopping or conductor.requests.stopping
    conductor.fellows = fellows
    try:
        require_packages(config)
        if config.save.tensorboard:
            boards.append(Board(run, before.step))
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
            " train.checkpointing."
        )
    if isinstance(error, OSError):
        return RunError(f"{error.filename or run.path} cannot be used: {error.strerror or error}.")
    return None


def _system_error(error: BaseException | None) -> OSError | None:
    """The error of the system that an error came from."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    return error
