"""What a step took when it was tried on this machine, kept in the workspace by what decides its cost."""

import contextlib
import json
import math
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lora_core.spec.config import RunConfig
from lora_core.spec.paths import write_atomically
from lora_core.spec.untrusted import checked_fields, parsed_json

MOST_KEPT = 300
_lock = threading.Lock()


@dataclass(frozen=True)
class Measured:
    """Some steps, really taken.

    Attributes:
        step: seconds of an optimizer step.
        draw: seconds of a sampler's step of one sample.
        peak: bytes of the device's memory at the most; 0 where it does not tell.
        base: the base, as the person named it.
        device: what it was measured on.
        work: floating-point operations of the step, about; 0 where that is not known.
        time: when, in seconds since the epoch.
    """

    step: float
    draw: float
    peak: int
    base: str
    device: str
    work: float = 0.0
    time: float = field(default_factory=time.time)


def measured_file(workspace: Path) -> Path:
    """Where a workspace keeps them."""
    return workspace / "measured.json"


def cost_key(config: RunConfig, resolution: int) -> str:
    """What decides how long a step takes and how much memory.

    Args:
        config: the settings.
        resolution: the side in pixels that the base was trained at, which stands in where none is set.
    """
    optim, adapter = config.optim, config.adapter
    # All of the section, so that a setting that is added to it later counts by itself.
    train = {**asdict(config.train), "resolution": config.train.resolution or resolution}
    del train["steps"]
    trained = [optim.lr > 0, optim.text_encoder_lr > 0, optim.text_encoder_2_lr > 0]
    adapted = [adapter.targets, adapter.rank, adapter.block_ranks, adapter.init]
    return json.dumps([config.model.base, train, adapted, optim.name, trained, config.save.ema > 0])


def read_measured(workspace: Path) -> dict[str, Measured]:
    """All that was measured, by `cost_key` and device; a file that is missing or broken counts as empty."""
    found: dict[str, Measured] = {}
    try:
        rows = parsed_json(measured_file(workspace).read_bytes())["measured"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return found
    for key, row in rows:
        with contextlib.suppress(TypeError, ValueError):
            one = checked_fields(Measured, row)
            if math.isfinite(one.step) and one.step > 0 and math.isfinite(one.draw) and one.draw >= 0:
                found[key] = one
    return found


def keep_measured(workspace: Path, key: str, measured: Measured) -> None:
    """Add what was measured for a `cost_key`; the newest stay.

    Raises:
        OSError: the disk refuses.
    """
    with _lock:
        kept: dict[str, Measured] = {**read_measured(workspace), at_device(key, measured.device): measured}
        newest = sorted(kept.items(), key=lambda item: item[1].time)[-MOST_KEPT:]
        rows: dict[str, Any] = {name: asdict(one) for name, one in newest}
        write_atomically(measured_file(workspace), json.dumps({"measured": rows}, indent=1).encode())


def at_device(key: str, device: str) -> str:
    """The key of a cost on a device."""
    return f"{device} {key}"
