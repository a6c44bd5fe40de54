"""Room on a drive: what a run will need of it, and whether that is there before something is written."""

import shutil
from pathlib import Path

from lora_core.spec.choices import OPTIMIZERS, chosen
from lora_core.spec.config import RunConfig
from lora_core.spec.errors import NoRoom

MARGIN = 2**20
"""Bytes that are left free beyond what a write needs: events and requests have to go on."""
DRAWN_CAPTIONS_BYTES = 256 * 2**20
"""The most memory that encoded captions take which vary from look to look: some 800 looks of SDXL."""
_HEADERS = 64 * 1024
_USUAL_SIDE = 512
_PIXEL = 2.0
"""Bytes of a pixel of a PNG, on the safe side of what samples were seen to take."""
_HALF, _FULL = 2, 4


def checkpoint_bytes(config: RunConfig, numbers: int) -> int:
    """About how large one checkpoint is.

    Args:
        config: the run's settings.
        numbers: how many are trained.
    """
    state = chosen(OPTIMIZERS, config.optim.name, "optim.name").state
    copies = 1.0 + state + (1.0 if config.save.ema else 0.0)
    return int(copies * numbers * _FULL) + _HEADERS


def adapters_used(config: RunConfig) -> int:
    """How many adapters a run samples and exports: its own, and the average where one is kept."""
    return 2 if config.save.ema else 1


def preview_bytes(config: RunConfig) -> int:
    """About how much one round of samples takes."""
    side = config.train.resolution or _USUAL_SIDE
    return int(max(2, len(config.preview.prompts)) * side * side * _PIXEL) * adapters_used(config)


def needed_bytes(config: RunConfig, export: int) -> int:
    """About how much a whole run takes on its drive, at the moment when it takes most.

    Args:
        config: the run's settings.
        export: size of the exported file, as `sizes.export_bytes` says; half of that is how many numbers are
            trained.
    """
    numbers = export // _HALF
    save = config.save
    # Those that stay, the best, the one to go back to, and the new one before an old one goes.
    count = save.keep_last + (1 if save.keep_best else 0) + 2 if save.every else 2
    rounds = config.train.steps // config.preview.every + 2 if config.preview.every else 0
    return (
        count * checkpoint_bytes(config, numbers)
        + export * adapters_used(config)
        + rounds * preview_bytes(config)
        + MARGIN
    )


def free_bytes(path: Path) -> int:
    """What is free on the drive that holds `path`, which need not exist yet.

    Raises:
        OSError: the drive is gone.
    """
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def require_room(path: Path, need: int, what: str) -> None:
    """Refuse to begin a write that the drive could not take.

    Args:
        path: the folder that is written to.
        need: bytes.
        what: is to be written, for the sentence: "The checkpoint of step 500".

    Raises:
        NoRoom: there is too little room, or the folder is gone.
    """
    if not path.exists():
        raise NoRoom(f"{what} cannot be written: {path} is gone. Connect its drive again and resume.")
    free = free_bytes(path)
    if free < need + MARGIN:
        raise NoRoom(
            f"{what} needs {_megabytes(need + MARGIN)}, and the drive of {path} has {_megabytes(free)} free."
            " What is saved is whole; make room and resume."
        )


def _megabytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MB"
