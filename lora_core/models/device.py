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
SPARE = 300 * 2**20
"""Bytes of a card that this program leaves free."""
WORTH_IT = 0.7
"""The largest share of fp32's time that bf16's lost digits are worth."""


def best_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return PartialState().device


def cap_memory(device: torch.device) -> None:
    """Keep this process within the card's free memory, less `SPARE` for the driver and the desktop.

    Beyond it the allocator raises, which the memory fallbacks handle. Without a cap, the driver of Windows
    moves memory to the computer's own instead, and steps take many times as long without an error.
    """
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    mine = free + torch.cuda.memory_reserved(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, mine - SPARE) / total), device)


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


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, of whichever kind."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    if any(
        word in str(error) for word in ("can't allocate memory", "out of memory", "ALLOC_FAILED", "bad_alloc")
    ):
        return True
    # What oneDNN says when its allocation fails; without a limit it would mean something else.
    return "could not create a primitive" in str(error) and limited(torch.device("cpu"))


def limited(device: torch.device) -> bool:
    """Whether running out of memory would be an error here that can be caught.

    A processor's memory gives way to the disk, and then to the system's end of the process, without one;
    only a limit on the address space makes an error of it.
    """
    if device.type != "cpu":
        return True
    try:
        import resource
    except ImportError:
        return False
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def memory_of(device: torch.device) -> str:
    """What people call the memory that computing on `device` takes."""
    return "memory" if device.type in ("cpu", "mps") else "graphics memory"
