"""Checkpoints: all that a step depends on and that does not follow from (seed, step).

A checkpoint is a folder that appears complete, by one rename, and disappears by another. Its adapter is a
kohya-format file that any tool can load, the average where one is kept; where that differs from the trained
state, a second file has the exact factors. The optimizer's tensors are beside it, and `state.json` names the
SHA-256 of each file, so that damage is detected. `CheckpointManager` saves, resumes from and rolls back to
checkpoints of one run.
"""

import contextlib
import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from lora_core.errors import AdapterFileError, RunError, wrap_os_errors
from lora_core.formats.io import load_adapter, save_adapter
from lora_core.lora.inject import adapter_weights, load_weights
from lora_core.lora.weights import AdapterWeights
from lora_core.model_files.families import Family
from lora_core.runs import events
from lora_core.runs.folder import RunFolder
from lora_core.settings.schema import SaveSection
from lora_core.system.files import (
    clear_abandoned,
    folder_bytes,
    patiently,
    require_room,
    sync_folder,
    unused_path,
    write_atomically,
)
from lora_core.train.loop import TrainState

ADAPTER, OPTIMIZER, STATE = "adapter.safetensors", "optimizer.safetensors", "state.json"
FACTORS = "factors.safetensors"
"""The trained state, beside an adapter that is an average or whose layers have different alphas: a kohya file
has one alpha for all, which costs a rounding."""
AVERAGE = "average.safetensors"
"""The exact average, where layers have different alphas."""
SET_ASIDE = "set-aside"


@dataclass
class CheckpointState:
    """What a run is at a step, besides its adapter.

    Attributes:
        step: optimizer steps done.
        optimizer: the optimizer's `state_dict`.
        scaler: the loss scaler's `state_dict`, empty where none is used.
        best: the best validation so far, see `validation.BestStep`, or empty.
        average: the running average of the adapter, if one is kept.
        health: the record of a `DivergenceGuard`.
        planned: whether it was written on schedule by a stable run: a run rolls back to such states, because
            an unbroken one has the same ones.
        marked: whether the user asked for it: it is never removed.
    """

    step: int
    optimizer: dict[str, Any]
    scaler: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    average: AdapterWeights | None = None
    health: dict[str, Any] = field(default_factory=dict)
    planned: bool = False
    marked: bool = False


def save_checkpoint(
    run: RunFolder, weights: AdapterWeights, state: CheckpointState, family: Family, header: dict[str, str]
) -> Path:
    """Write the checkpoint of `state.step` and read its files back.

    Raises:
        RunError: the disk does not take it; earlier checkpoints are untouched.
        AdapterFileError: the adapter is not finite.
    """
    final = run.checkpoint(state.step)
    making = final.with_name(f".{final.name}.making")
    failed = f"The checkpoint of step {state.step} cannot be written to {final.parent}"
    with wrap_os_errors(RunError, failed, ". The one before it is intact; free some space and resume."):
        try:
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir(parents=True)
            average, one_alpha = state.average, len({layer.alpha for layer in weights.layers.values()}) <= 1
            save_adapter(average or weights, making / ADAPTER, family, metadata=header)
            if not one_alpha or average is not None:
                save_adapter(weights, making / FACTORS, family, metadata=header, keep_alphas=True)
            if not one_alpha and average is not None:
                save_adapter(average, making / AVERAGE, family, metadata=header, keep_alphas=True)
            tensors, plain = _split(state.optimizer)
            _write_checked(making / OPTIMIZER, save(tensors))
            digests = {file.name: _sha256(file) for file in sorted(making.glob("*.safetensors"))}
            record = vars(state) | {"optimizer": plain, "average": average is not None, "sha256": digests}
            _write_checked(making / STATE, json.dumps(record).encode())
            remove_checkpoint(final)
            patiently(os.rename, making, final)
            sync_folder(final.parent)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return final


def load_checkpoint(path: Path) -> tuple[AdapterWeights, CheckpointState]:
    """What `save_checkpoint` wrote, bit for bit.

    Raises:
        RunError: a file is missing or has changed.
    """
    record = verify_checkpoint(path)
    names = record["sha256"]
    try:
        weights = load_adapter(path / (FACTORS if FACTORS in names else ADAPTER), plain=False)
        averaged = path / (AVERAGE if AVERAGE in names else ADAPTER)
        average = load_adapter(averaged, plain=False) if record.get("average") else None
        optimizer = _joined(load_file(path / OPTIMIZER), record["optimizer"])
        return weights, CheckpointState(
            record["step"], optimizer, record["scaler"], record["best"], average, record.get("health", {}),
            bool(record.get("planned")), bool(record.get("marked")),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, SafetensorError, AdapterFileError) as error:
        raise RunError(f"The checkpoint {path} is broken: {error}.") from error


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint's `state.json`, after its files were verified.

    Raises:
        RunError: one has changed, or is missing.
    """
    try:
        record = read_record(path)
        for name, digest in record["sha256"].items():
            if _sha256(path / name) != digest:
                raise RunError(f"The checkpoint {path} is broken: {name} has changed since it was written.")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise RunError(f"The checkpoint {path} is broken: {error}.") from error
    return record


def is_valid(path: Path) -> bool:
    """Whether a checkpoint exists and is unchanged."""
    try:
        return bool(verify_checkpoint(path))
    except RunError:
        return False


def read_record(path: Path) -> dict[str, Any]:
    """What `state.json` of a checkpoint says; OSError or ValueError if it is missing or broken."""
    found = json.loads((path / STATE).read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{STATE} holds no table")
    return found


def amend_record(path: Path, changes: dict[str, Any]) -> None:
    """Change `state.json` of a checkpoint atomically; errors as of `read_record`."""
    write_atomically(path / STATE, json.dumps(read_record(path) | changes).encode())


def has_flag(path: Path, word: str) -> bool:
    """Whether a checkpoint is `planned` or `marked`; a broken one is neither."""
    try:
        return bool(read_record(path).get(word))
    except (OSError, ValueError):
        return False


def clear_unfinished(run: RunFolder) -> None:
    """Remove what a killed process left half-written, in the run and in the caches."""
    caches = run.path.parent.parent / "cache"
    for folder in (run.path, run.checkpoints, run.exports, run.previews, *caches.glob("*")):
        clear_abandoned(folder)
    for folder in run.checkpoints.glob("step-*"):
        clear_abandoned(folder)


def prune_checkpoints(run: RunFolder, keep_last: int, keep: Collection[int]) -> None:
    """Remove all but the newest `keep_last` that were planned, the newest of all, those of the steps in
    `keep`, and those that are marked."""
    steps = run.checkpoint_steps()
    planned = [step for step in steps if has_flag(run.checkpoint(step), "planned")]
    staying = {*planned[-keep_last:], *steps[-1:], *keep}
    for step in steps:
        if step not in staying and not has_flag(run.checkpoint(step), "marked"):
            remove_checkpoint(run.checkpoint(step))


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, if it is there; a kill leaves it complete or hidden."""
    going = path.with_name(f".{path.name}.going.making")
    shutil.rmtree(going, ignore_errors=True)
    # Where a reader holds a file of it open, as on Windows, it stays for the next time.
    with contextlib.suppress(OSError):
        patiently(os.rename, path, going)
    shutil.rmtree(going, ignore_errors=True)


def set_aside(path: Path) -> None:
    """Rename a checkpoint so that no run resumes from it, and the user still has its files."""
    os.rename(path, unused_path(path.parent, f"{path.name}-{SET_ASIDE}", ""))


def _write_checked(path: Path, data: bytes) -> None:
    write_atomically(path, data)
    if _sha256(path) != hashlib.sha256(data).hexdigest():
        raise RunError(f"{path} was read back changed; is the disk failing?")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _split(value: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Split a nested structure into its tensors by path and the rest with the paths in their places."""
    tensors: dict[str, torch.Tensor] = {}

    def plain(item: Any, path: str) -> Any:
        if isinstance(item, torch.Tensor):
            tensors[path] = item.detach().cpu().contiguous().clone()
            return {"tensor": path}
        if isinstance(item, dict):
            return {"dict": [[key, plain(v, f"{path}.{key}")] for key, v in item.items()]}
        if isinstance(item, list | tuple):
            kind = "list" if isinstance(item, list) else "tuple"
            return {kind: [plain(v, f"{path}.{i}") for i, v in enumerate(item)]}
        return {"value": item}

    return tensors, plain(value, "state")


def _joined(tensors: dict[str, torch.Tensor], plain: Any) -> Any:
    (kind, item), *_ = plain.items()
    if kind == "tensor":
        return tensors[item]
    if kind == "dict":
        return {key: _joined(tensors, v) for key, v in item}
    if kind in ("list", "tuple"):
        values = [_joined(tensors, v) for v in item]
        return values if kind == "list" else tuple(values)
    return item


def _joined_factors(saved: dict[str, Any], optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    """A copy of an optimizer's `state_dict` for the groups of `optimizer`; in those of earlier versions each
    factor is a tensor of its own, in the order of today's flat groups.

    Raises:
        RunError: it is of other groups.
    """
    saved, own = copy.deepcopy(saved), [group["params"] for group in optimizer.param_groups]
    groups, states = saved["param_groups"], saved["state"]
    if [len(group["params"]) for group in groups] == [len(tensors) for tensors in own]:
        return saved
    state, found = {}, []
    for number, group in enumerate(groups):
        rows = [states[key] for key in group["params"] if key in states]
        state[number] = {name: _end_to_end([row[name] for row in rows]) for name in (rows[0] if rows else {})}
        found.append({one.numel() for one in state[number].values() if torch.is_tensor(one) and one.dim()})
        group["params"] = [number]
    if found != [{one.numel() for one in tensors} for tensors in own]:
        raise RunError(
            f"The optimizer's state at step {step} is of an earlier version and cannot be read; start a new"
            " run from the adapter of that checkpoint (adapter.init)."
        )
    return {**saved, "state": state}


def _end_to_end(values: list[Any]) -> Any:
    first = values[0]
    if not torch.is_tensor(first) or not first.dim():
        return first
    return torch.cat([one.flatten() for one in values])


class CheckpointManager:
    """Saves, resumes from and rolls back to checkpoints of one run."""

    def __init__(
        self, run: RunFolder, section: SaveSection, train_state: TrainState,
        emit: Callable[[events.Event], None], size: int,
    ) -> None:  # fmt: skip
        """Keep the untrained state to roll back to until there is a checkpoint.

        `train_state` is as before the first step; `emit` is called with warnings; `size` is the estimated
        size of the first checkpoint in bytes.
        """
        self.section = section
        self._run = run
        self._train_state = train_state
        self._emit = emit
        self._size = size
        optimizer, scaler = copy.deepcopy(train_state.optimizer.state_dict()), train_state.scaler.state_dict()
        self._start: tuple[AdapterWeights, CheckpointState] | None = (
            adapter_weights(train_state.injected), CheckpointState(0, optimizer, scaler),
        )  # fmt: skip

    def save(self, state: CheckpointState, header: dict[str, str]) -> Path:
        """Write a checkpoint and remove old ones.

        Args:
            state: step, best, health, planned and marked; the rest is filled in.
            header: texts for the adapter's file.

        Raises:
            NoRoom: the drive has too little room for it.
            RunError: it cannot be written; those before it are intact.
        """
        require_room(self._run.path, self._next_size(), f"The checkpoint of step {state.step}")
        current = self._train_state
        state.optimizer = current.optimizer.state_dict()
        state.scaler = current.scaler.state_dict()
        state.average = current.average.weights() if current.average is not None else None
        weights = adapter_weights(current.injected)
        path = save_checkpoint(self._run, weights, state, current.base.family, header)
        best = {int(state.best["step"])} if state.best and self.section.keep_best else set()
        anchor = self._rollback_steps()[:1]
        prune_checkpoints(self._run, self.section.keep_last, best.union(anchor))
        if anchor:
            self._start = None
        return path

    def load_latest(self) -> CheckpointState | None:
        """Restore the newest valid checkpoint, if there is one; broken ones are skipped with a warning."""
        return self._load_first_valid(self._run.checkpoint_steps()[::-1])

    def load_latest_or_start(self) -> CheckpointState:
        """Restore the newest valid checkpoint, else the untrained state; RunError if there is neither."""
        return self.load_latest() or self._load_start()

    def roll_back(self, next_health: Callable[[dict[str, Any]], dict[str, Any]]) -> CheckpointState:
        """Restore the last state that an unbroken run has too.

        Later checkpoints are removed, as they may be spoiled already; what a user asked for is set aside.
        `next_health` makes the guard's record after the rollback from that of the checkpoint, which gets it
        last: a kill anywhere in here leaves a run that comes to the same rollback by itself.

        Raises:
            RunError: no such state.
        """
        state = self._load_first_valid(self._rollback_steps()) or self._load_start()
        health = next_health(state.health)
        for step in self._run.checkpoint_steps():
            path = self._run.checkpoint(step)
            if step > state.step:
                set_aside(path) if has_flag(path, "marked") else remove_checkpoint(path)
        if state.step:
            amend_record(self._run.checkpoint(state.step), {"health": health})
        return state

    def is_finite(self) -> bool:
        """Whether adapter and optimizer are finite; waits once for each device."""
        live: list[object] = [self._train_state.flat_params.data.detach()]
        for values in self._train_state.optimizer.state.values():
            live += values.values() if isinstance(values, dict) else []
        finite: dict[torch.device, list[torch.Tensor]] = {}
        for value in live:
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                finite.setdefault(value.device, []).append(value.isfinite().all())
        return all(bool(torch.stack(found).all()) for found in finite.values())

    def _rollback_steps(self) -> list[int]:
        """Steps of the checkpoints that a run can roll back to, the newest first."""
        steps = reversed(self._run.checkpoint_steps())
        return [step for step in steps if has_flag(self._run.checkpoint(step), "planned")]

    def _load_first_valid(self, steps: list[int]) -> CheckpointState | None:
        anew = "There is no other one to resume from, so training starts over."
        found = load_first_valid(self._run, steps, self._emit, anew)
        return self._restore(*found) if found else None

    def _load_start(self) -> CheckpointState:
        if self._start is None:
            raise RunError(
                f"No checkpoint of the run {self._run.name} is intact; start a new run with its settings."
            )
        return self._restore(*self._start)

    def _restore(self, weights: AdapterWeights, state: CheckpointState) -> CheckpointState:
        current = self._train_state
        load_weights(current.injected, weights)
        current.optimizer.load_state_dict(_joined_factors(state.optimizer, current.optimizer, state.step))
        for group in current.optimizer.param_groups:
            # `load_state_dict` moves the state to the device, and not what an optimizer keeps in its groups.
            kept = {key: one for key, one in group.items() if isinstance(one, torch.Tensor)}
            group.update({key: one.to(current.flat_params.data.device) for key, one in kept.items()})
        if state.scaler:
            current.scaler.load_state_dict(state.scaler)
        if current.average is not None:
            current.average.load(state.average or weights)
        return state

    def _next_size(self) -> int:
        """Bytes of the next checkpoint: those of the last one, else the estimate."""
        steps = self._run.checkpoint_steps()
        return folder_bytes(self._run.checkpoint(steps[-1])) if steps else self._size


def load_first_valid(
    run: RunFolder,
    steps: list[int],
    emit: Callable[[events.Event], None],
    after_all: str = "There is no other one.",
) -> tuple[AdapterWeights, CheckpointState] | None:
    """The first valid checkpoint of `steps`; broken ones are skipped with a warning, which for the last of
    them ends with `after_all`."""
    for step in steps:
        try:
            return load_checkpoint(run.checkpoint(step))
        except RunError as error:
            rest = after_all if step == steps[-1] else "The one before it is used."
            emit(events.Warned(step=step, message=f"{error} {rest}"))
    return None
