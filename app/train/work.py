"""How much a step computes, about: from the base's size, the pictures' and what is done twice."""

import functools
from pathlib import Path

from app.train.bases import chosen_base
from lora_core.spec.config import RunConfig

SHARE_OF_PIXELS = 0.085
"""What a UNet computes: 2 numbers for each weight at so many of its latent pixels. SD 1.5 (0.68 TFLOP, 0.86 G
weights, 64 x 64) and SDXL (6.0 TFLOP, 2.57 G weights, 128 x 128) give 0.096 and 0.071."""
UNET_SHARE = 0.75
FORWARDS, CHECKPOINTING = 3.0, 4.0
"""A step costs as much as so many passes; with checkpointing one more."""


def work_a_step(config: RunConfig) -> float | None:
    """Floating-point operations of a step; None where the base cannot be read."""
    base = chosen_base(config.model.base)
    if base.facts is None:
        return None
    weights = _unet_weights(base.facts.path, _changed_at(base.facts.path))
    side = config.train.resolution or base.resolution
    passes = CHECKPOINTING if config.train.checkpointing else FORWARDS
    pictures = config.train.batch_size * config.train.accumulate
    return weights * 2 * (side / 8) ** 2 * SHARE_OF_PIXELS * passes * pictures or None


def _changed_at(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


@functools.lru_cache(maxsize=16)
def _unet_weights(path: Path, changed_at: int) -> float:
    """About how many weights the UNet has, from the size of its files in half precision."""
    try:
        if path.is_file():
            return path.stat().st_size / 2 * UNET_SHARE
        sizes = sorted(file.stat().st_size for file in (path / "unet").glob("*.safetensors"))
        shards = sum(sizes) if len(sizes) > 2 else sizes[0]
        return shards / 2
    except (OSError, IndexError):
        return 0.0
