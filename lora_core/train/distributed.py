"""Data-parallel training: every process holds the same state and all-reduces gradients.

Each process computes its rows of each micro-batch. Gradients and losses are summed over all processes, and
each takes the same optimizer step with the same bits, as in DDP. The main process alone writes files, decides
and keeps the events; before each step it says whether to continue, and it sends its state at the start and
after a rollback. All communication goes through accelerate, which chooses the backend.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env, reduce, send_to_device

from lora_core.errors import LoraError, ProcessLost, RunError
from lora_core.models.device import keep_freed_memory, out_of_memory
from lora_core.runs.folder import RunFolder
from lora_core.train import loop
from lora_core.train.autotune import MemoryFallback
from lora_core.train.setup import RuntimePlan, prepare

TIMEOUT = timedelta(days=1)
"""For how long a process waits for the main one, which encodes, validates and samples alone. A process that
dies is noticed at once; this is for a machine that vanishes."""
LOST = (
    "Another process of this run ended, so the run cannot continue; its message is above. The last"
    " checkpoint is complete: resume the run from there."
)


class ProcessGroup(loop.SingleProcess):
    """This process among the `world_size` of the run; the main one has `rank` 0."""

    def __init__(self) -> None:
        """Connect to the others; ProcessLost if they cannot be reached."""
        cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
        self._closed = True
        with self._connected():
            state = PartialState(cpu=cpu, timeout=TIMEOUT)
        self._closed = False
        self.rank: int = state.process_index
        self.world_size: int = state.num_processes
        self._device = state.device

    @property
    def is_main(self) -> bool:
        """Whether this is the main process."""
        return self.rank == 0

    def local_rows(self, count: int) -> slice:
        """Which of the `count` rows of a micro-batch this process computes; none where there are too few.

        The main process never has fewer than another, so that the memory that it measures suffices for all.
        """
        size = -(-count // self.world_size)
        return slice(min(self.rank * size, count), min((self.rank + 1) * size, count))

    def broadcast_object(self, value: object = None) -> Any:
        """The `value` of the main process, in every process."""
        message = [value]
        with self._connected():
            broadcast_object_list(message)
        return message[0]

    def all_reduce(self, *tensors: torch.Tensor) -> None:
        """Sum each tensor over all processes, in place.

        Raises:
            LoraError, RuntimeError: another process failed before this call.
        """
        self.barrier()
        with self._connected():
            for tensor, total in zip(tensors, reduce(list(tensors), "sum"), strict=True):
                tensor.copy_(total)

    def barrier(self, error: BaseException | None = None) -> None:
        """Wait for all processes; `error` tells them that this one failed, and then all leave the group.

        Raises:
            LoraError: another process failed, with its message.
            RuntimeError: another process failed by a defect, and this is the main one.
            MemoryError: another process ran out of memory, and this is the main one.
        """
        if self._closed:
            return
        with self._connected():
            failed = reduce(torch.tensor([float(error is not None)], device=self._device), "sum")
        if not failed:
            return
        with self._connected():
            errors: list[Exception] = gather_object([] if error is None else [self._as_message(error)])
        self._closed = True
        if error is None:
            raise errors[0] if self.is_main or isinstance(errors[0], LoraError) else RunError(str(errors[0]))

    def _as_message(self, error: BaseException) -> Exception:
        """An error that can be sent: of the same meaning, with the rank in its text."""
        if isinstance(error, LoraError):
            return RunError(f"Process {self.rank}: {error}")
        kind = MemoryError if out_of_memory(error) else RuntimeError
        return kind(f"Process {self.rank}: {type(error).__name__}: {error}")

    def close(self) -> None:
        """Let the other processes end, and leave the group; nothing where it is left already."""
        if self._closed:
            return
        if self.is_main:
            self.broadcast_object(None)
        with self._connected():
            PartialState().destroy_process_group()

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """For one collective; if it fails, the group is closed, and ProcessLost is raised if a process is
        gone."""
        try:
            yield
        except BaseException as error:
            self._closed = True
            if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
                raise ProcessLost(LOST) from error
            raise


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """The processes of this run; the main one lets the others end, however its own part ends."""
    group = ProcessGroup()
    try:
        yield group
    finally:
        group.close()


TAKE_A_STEP = "step"


@dataclass(frozen=True)
class WorkerStart:
    """Sent once: the run's folder, its plan, and the step to train to."""

    run: Path
    plan: RuntimePlan
    goal: int


@dataclass(frozen=True)
class SharedState:
    """Sent at the start and after a rollback: the state of the main process after `step` steps."""

    step: int
    lr_scale: float
    parameters: torch.Tensor
    optimizer: dict[str, Any]
    scaler: dict[str, Any]

    @classmethod
    def of(cls, state: loop.TrainState, step: int, lr_scale: float) -> "SharedState":
        """A copy of `state` in the CPU's memory."""
        parameters = state.flat_params.data.detach().cpu()
        optimizer = send_to_device(state.optimizer.state_dict(), torch.device("cpu"))
        return cls(step, lr_scale, parameters, optimizer, state.scaler.state_dict())

    def restore(self, state: loop.TrainState) -> None:
        """Make `state` equal to that of the main process."""
        with state.flat_params.mutate() as live:
            live.copy_(self.parameters)
        state.optimizer.load_state_dict(copy.deepcopy(self.optimizer))
        if self.scaler:
            state.scaler.load_state_dict(self.scaler)


def train_as_worker(group: ProcessGroup) -> None:
    """Take the same steps as the main process until it ends; everything is encoded and cached by then.

    Raises:
        RunError: the main process is gone, or the run cannot continue.
    """
    start: WorkerStart | None = group.broadcast_object()
    if start is None:
        return
    run, plan = RunFolder(start.run), start.plan
    config = plan.with_lr(run.config())
    try:
        plan.set_up()
        session = prepare(run, config, plan, lambda phase, done, total: None)
    except BaseException as error:
        group.barrier(error)
        raise
    group.barrier()
    session.state.group = group
    memory = MemoryFallback(session.state, config.train.batch_size, plan.rungs, session.offload_folder)
    keep_freed_memory()
    step = 0
    steps: Iterator[loop.Step] = iter(())
    while (message := group.broadcast_object()) is not None:
        if isinstance(message, SharedState):
            step = message.step
            memory.apply_until(step)
            message.restore(session.state)
            settings = loop.StepSettings(config, start.goal, message.lr_scale)
            steps = loop.training_steps(session.state, session.batches, session.text, settings, step)
            continue
        memory.apply_until(step)
        try:
            step = next(steps).number
        except loop.PartialUpdate:
            raise
        except Exception as error:
            group.barrier(error)
            raise
