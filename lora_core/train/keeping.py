"""Checkpoints in the course of a run: when the state is saved, gone on from, and gone back to."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch

from lora_core.errors import RunError
from lora_core.lora.inject import adapter_weights, load_weights
from lora_core.lora.weights import AdapterWeights
from lora_core.model_files.sizes import checkpoint_bytes
from lora_core.runs import events
from lora_core.runs.folder import RunFolder
from lora_core.settings.config import RunConfig
from lora_core.system.disk_space import require_room
from lora_core.train.checkpoint import (
    TrainState,
    amend_record,
    discard,
    has,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    set_aside,
)
from lora_core.train.divergence import Health
from lora_core.train.loop import Trainee


class Keeper:
    """Saves and brings back one run's trainee."""

    def __init__(
        self, run: RunFolder, config: RunConfig, trainee: Trainee, emit: Callable[[events.Event], None]
    ) -> None:
        """`trainee` is as it starts: that is what a run goes back to before its first checkpoint."""
        self._run = run
        self._config = config
        self._trainee = trainee
        self._emit = emit
        self._numbers = sum(tensor.numel() for tensor in trainee.injected.parameters())
        self._start: tuple[AdapterWeights, TrainState] | None = (
            adapter_weights(trainee.injected),
            TrainState(0, copy.deepcopy(trainee.optimizer.state_dict()), trainee.scaler.state_dict()),
        )

    def save(self, state: TrainState, header: dict[str, str]) -> Path:
        """Write a checkpoint and remove those that have had their time.

        Args:
            state: what is not the trainee's: step, best, health, planned, marked.
            header: texts for the adapter's file.

        Raises:
            NoRoom: the drive has too little room for it.
            RunError: it cannot be written; those before it are whole.
        """
        what = f"The checkpoint of step {state.step}"
        require_room(self._run.path, self._size(), what)
        trainee = self._trainee
        state.optimizer = trainee.optimizer.state_dict()
        state.scaler = trainee.scaler.state_dict()
        state.average = trainee.average.weights() if trainee.average is not None else None
        weights = adapter_weights(trainee.injected)
        path = save_checkpoint(self._run, weights, state, trainee.base.family, header)
        best = {int(state.best["step"])} if state.best and self._config.save.keep_best else set()
        anchor = self._anchors()[:1]
        prune_checkpoints(self._run, self._config.save.keep_last, best.union(anchor))
        if anchor:
            self._start = None
        return path

    def take_up(self) -> TrainState | None:
        """Bring back the newest whole checkpoint, if there is one; a broken one is passed over with a
        warning."""
        return self._first_whole(self._run.checkpoint_steps()[::-1])

    def newest(self) -> TrainState:
        """The newest state that is whole: a checkpoint, or the start.

        Raises:
            RunError: there is none.
        """
        return self.take_up() or self._from_start()

    def go_back(self, health: Health) -> tuple[TrainState, Health]:
        """Bring back the last state that an unbroken run has too, with the learning rates halved.

        What was saved since goes, as it may be spoiled already; what a person asked for is set aside. The
        halved rates are noted in the checkpoint that is gone back to. A kill anywhere in here leaves a run
        that comes to the same return by itself.

        Args:
            health: as it stands now.

        Raises:
            RunError: there is nothing to go back to.
        """
        state = self._first_whole(self._anchors()) or self._from_start()
        after = health.returned(Health(**state.health))
        for step in self._run.checkpoint_steps():
            path = self._run.checkpoint(step)
            if step > state.step:
                set_aside(path) if has(path, "marked") else discard(path)
        if state.step:
            amend_record(self._run.checkpoint(state.step), {"health": after.record()})
        return state, after

    def finite(self) -> bool:
        """Whether all that a checkpoint would hold is finite; each device is waited for once."""
        trainee = self._trainee
        live: list[object] = [trainee.storage.data.detach()]
        for values in trainee.optimizer.state.values():
            live += values.values() if isinstance(values, dict) else []
        finite: dict[torch.device, list[torch.Tensor]] = {}
        for value in live:
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                finite.setdefault(value.device, []).append(value.isfinite().all())
        return all(bool(torch.stack(found).all()) for found in finite.values())

    def _anchors(self) -> list[int]:
        """Steps of the checkpoints that can be gone back to, the newest first."""
        steps = reversed(self._run.checkpoint_steps())
        return [step for step in steps if has(self._run.checkpoint(step), "planned")]

    def _first_whole(self, steps: list[int]) -> TrainState | None:
        anew = "There is no other one to go on from, so training begins anew."
        found = first_whole(self._run, steps, self._emit, anew)
        if found is None:
            return None
        self._bring_back(*found)
        return found[1]

    def _from_start(self) -> TrainState:
        if self._start is None:
            raise RunError(
                f"No checkpoint of the run {self._run.name} is whole; start a new run with its settings."
            )
        weights, state = self._start
        self._bring_back(weights, state)
        return state

    def _bring_back(self, weights: AdapterWeights, state: TrainState) -> None:
        trainee = self._trainee
        load_weights(trainee.injected, weights)
        trainee.optimizer.load_state_dict(copy.deepcopy(state.optimizer))
        if state.scaler:
            trainee.scaler.load_state_dict(state.scaler)
        if trainee.average is not None:
            trainee.average.load(state.average or weights)
        trainee.applying = False

    def _size(self) -> int:
        """Bytes of the next checkpoint: those of the last one, else an estimate."""
        for step in reversed(self._run.checkpoint_steps()):
            return sum(file.stat().st_size for file in self._run.checkpoint(step).iterdir())
        return checkpoint_bytes(self._config, self._numbers)


def first_whole(
    run: RunFolder,
    steps: list[int],
    emit: Callable[[events.Event], None],
    after_all: str = "There is no other one.",
) -> tuple[AdapterWeights, TrainState] | None:
    """The first whole one of the checkpoints of `steps`; broken ones are passed over with a warning, which
    for the last of them ends with `after_all`."""
    for step in steps:
        try:
            return load_checkpoint(run.checkpoint(step))
        except RunError as error:
            rest = after_all if step == steps[-1] else "The one before it is used."
            emit(events.Warned(step=step, message=f"{error} {rest}"))
    return None
