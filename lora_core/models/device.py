"""Which device and which number format: what the machine has, found by accelerate."""

import contextlib
import ctypes
import sys

import torch
from accelerate import PartialState

from lora_core.models.weight_files import PRECISIONS

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of `malloc.h`."""
LARGEST = 2**31 - 1


def best_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return PartialState().device


def dtype_of(precision: str, device: torch.device) -> torch.dtype:
    """The number format that `precision` ("auto", "fp32", "bf16", "fp16") means on `device`.

    "auto" asks what the hardware can do and measures nothing, so that two runs on one machine never differ.
    """
    if precision != "auto":
        return PRECISIONS[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float32


def keep_freed_memory() -> None:
    """Have the allocator of Linux keep large blocks that are freed, for the next one that asks for them.

    It gives each back to the system otherwise, and every step touches its pages anew: 12% of a step of SD 1.5
    on a processor. The dearest thresholds that glibc takes; elsewhere nothing is done.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, LARGEST)
        mallopt(M_MMAP_THRESHOLD, LARGEST)
