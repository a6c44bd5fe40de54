"""Which device and which number format: what the machine has, found by accelerate."""

import contextlib
import ctypes
import math
import sys
import time

import torch
from accelerate import PartialState

from lora_core.models.weight_files import PRECISIONS

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of `malloc.h`."""
LARGEST = 2**31 - 1
WORTH_IT = 0.7
"""The largest share of fp32's time that bf16's lost digits are worth."""


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


def bf16_is_faster() -> bool:
    """Whether this processor multiplies matrices in bf16 in well under the time of fp32.

    Some have instructions for it and take a half or less, others take longer than in fp32. The two are timed,
    in a tenth of a second; they lie so far apart that the answer is always the same.
    """
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    fp32, bf16 = (_seconds(dtype) for dtype in (torch.float32, torch.bfloat16))
    return bf16 < WORTH_IT * fp32


def _seconds(dtype: torch.dtype) -> float:
    """The fastest of some products of the size of a transformer's."""
    rows, weight = torch.ones(512, 1280, dtype=dtype), torch.ones(1280, 1280, dtype=dtype)
    best = math.inf
    for _ in range(8):
        began = time.perf_counter()
        torch.mm(rows, weight)
        best = min(best, time.perf_counter() - began)
    return best


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
