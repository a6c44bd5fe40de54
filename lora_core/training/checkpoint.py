"""Checkpoints: all that a step depends on and that does not follow from (seed, step).

A checkpoint is a folder that appears whole, by one rename. Its adapter is a kohya-format file that any tool
can load, with a second one for exact factors where layers differ in alpha; the optimizer's tensors lie beside
it, and `state.json` names the SHA-256 of both, so that a broken
one is known.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from lora_core.adapters.weights import AdapterWeights
from lora_core.formats.file import read_adapter, write_adapter
from lora_core.spec.errors import AdapterFileError, RunError
from lora_core.spec.families import Family
from lora_core.spec.paths import sync_folder, write_atomically
from lora_core.spec.run_folder import RunFolder

ADAPTER, OPTIMIZER, STATE = "adapter.safetensors", "optimizer.safetensors", "state.json"
FACTORS = "factors.safetensors"
"""Beside an adapter whose layers have different alphas: its own file has one for all, which costs a
rounding."""


@dataclass
class TrainState:
    """What a run is at a step, besides its adapter.

    Attributes:
        step: optimizer steps done.
        optimizer: the optimizer's `state_dict`.
        scaler: the loss scaler's `state_dict`, empty where none is used.
        best: the best validation so far, as {"step", "gain"}, or empty.
    """

    step: int
    optimizer: dict[str, Any]
    scaler: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    run: RunFolder, weights: AdapterWeights, state: TrainState, family: Family, header: dict[str, str]
) -> Path:
    """Write the checkpoint of `state.step` and read its files back.

    Raises:
        RunError: the disk does not take it; earlier checkpoints are untouched.
        AdapterFileError: the adapter is not finite.
    """
    final = run.checkpoint(state.step)
    making = final.with_name(f".{final.name}.making")
    try:
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        write_adapter(weights, making / ADAPTER, "kohya", "fp32", family, header)
        if len({layer.alpha for layer in weights.layers.values()}) > 1:
            write_adapter(weights, making / FACTORS, "kohya", "fp32", family, header, keep_alphas=True)
        tensors, plain = _split(state.optimizer)
        write_atomically(making / OPTIMIZER, save(tensors))
        record = {
            "step": state.step,
            "optimizer": plain,
            "scaler": state.scaler,
            "best": state.best,
            "sha256": {file.name: _sha256(file) for file in sorted(making.glob("*.safetensors"))},
        }
        write_atomically(making / STATE, json.dumps(record).encode())
        if final.exists():
            shutil.rmtree(final)
        os.rename(making, final)
        sync_folder(final.parent)
    except OSError as error:
        raise RunError(
            f"The checkpoint of step {state.step} cannot be written to {final.parent}:"
            f" {error.strerror or error}. The one before it is whole; make room and resume."
        ) from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return final


def load_checkpoint(path: Path) -> tuple[AdapterWeights, TrainState]:
    """What `save_checkpoint` wrote, bit for bit.

    Raises:
        RunError: a file is missing or is not what was written.
    """
    try:
        record = json.loads((path / STATE).read_text(encoding="utf-8"))
        for name, digest in record["sha256"].items():
            if _sha256(path / name) != digest:
                raise RunError(f"The checkpoint {path} is broken: {name} is not what was written.")
        weights = read_adapter(path / (FACTORS if FACTORS in record["sha256"] else ADAPTER))
        optimizer = _joined(load_file(path / OPTIMIZER), record["optimizer"])
    except (OSError, ValueError, KeyError, SafetensorError, AdapterFileError) as error:
        raise RunError(f"The checkpoint {path} is broken: {error}.") from error
    return weights, TrainState(record["step"], optimizer, record["scaler"], record["best"])


def clear_unfinished(run: RunFolder) -> None:
    """Remove what a killed process left half-written."""
    for folder in (run.path, run.checkpoints, run.exports, run.previews):
        for leftover in (*folder.glob(".*.making"), *folder.glob(".*.tmp")):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def prune_checkpoints(run: RunFolder, keep_last: int, best_step: int | None) -> None:
    """Remove all but the newest `keep_last` and the best."""
    steps = run.checkpoint_steps()
    for step in steps[:-keep_last]:
        if step != best_step:
            shutil.rmtree(run.checkpoint(step), ignore_errors=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _split(value: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """A nested structure as (its tensors by path, the rest with the paths in their places)."""
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
