"""Devices, dtypes and memory: what the machine has, and what the settings choose from it."""

import contextlib
import ctypes
import gc
import math
import os
import sys
import time
import traceback
from typing import Any

import torch
from accelerate import PartialState
from torch.overrides import TorchFunctionMode

from lora_core.backends.onednn import supports_bf16
from lora_core.errors import ConfigError
from lora_core.model_files.sizes import CARD_SPARE
from lora_core.models.unet import to_device
from lora_core.models.weight_files import PRECISIONS
from lora_core.settings.schema import AUTO
from lora_core.system.hardware import has_tensor_cores

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of `malloc.h`."""
LARGEST = 2**31 - 1
LIBRARY_ERRORS = ("STATUS_NOT_INITIALIZED", "CUDNN_STATUS_INTERNAL_ERROR", "unable to find an engine")
"""Words of cuBLAS and cuDNN that mean that memory ran out, where there is `ALMOST_NONE` left."""
ALMOST_NONE = 0.05
"""Share of a card's memory."""
WORTH_IT = 0.7
"""bf16 is taken where it needs at most this share of fp32's time."""


_device: list[torch.device] = []
"""Set by `use_device`; empty: the best one."""


def use_device(name: str) -> torch.device:
    """Compute on the device that `train.device` names from now on: auto, cpu, mps, xpu, cuda, or a card.

    Raises:
        ConfigError: no such device, or accelerate gives each of several processes its own.
    """
    _device.clear()
    if name == AUTO:
        return best_device()
    if PartialState().num_processes > 1:
        raise ConfigError(
            f"train.device = {name} is for one process; with several, accelerate gives each its own. Set it"
            " to auto."
        )
    device = torch.device(name)
    there = devices()
    if not any(name in (one["device"], one["device"].partition(":")[0]) for one in there):
        listed = ", ".join(
            f"{one['device']} ({one['name']})" if one["name"] else one["device"] for one in there
        )
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        hides = "" if hidden is None else f" CUDA_VISIBLE_DEVICES = {hidden!r} hides all other NVIDIA cards."
        raise ConfigError(
            f"train.device = {name} does not exist; PyTorch sees {listed}.{hides} Choose one of these, or "
            f"auto."
        )
    if device.type == "cuda":
        # A plan stores "cuda" without a number, which means this one from now on.
        torch.cuda.set_device(device if device.index is not None else best_card())
        device = torch.device("cuda", torch.cuda.current_device())
    elif device.type == "xpu" and device.index is not None:
        torch.xpu.set_device(device)
    _device.append(device)
    return device


def best_device() -> torch.device:
    """The device of `use_device`, else a GPU that this PyTorch has code for, else the CPU."""
    if _device:
        return _device[0]
    device = PartialState().device
    if device.type != "cuda" or torch.version.cuda is None or PartialState().num_processes > 1:
        return device
    if not any(has_code(number) for number in range(torch.cuda.device_count())):
        return torch.device("cpu")
    if torch.cuda.device_count() > 1:
        torch.cuda.set_device(best_card())
    return device


def best_card() -> int:
    """The index of the newest CUDA device; of several alike, of the one with the most memory."""

    def rank(number: int) -> tuple[bool, tuple[int, int], int]:
        total = torch.cuda.get_device_properties(number).total_memory
        return has_code(number), torch.cuda.get_device_capability(number), total

    return max(range(torch.cuda.device_count()), key=rank)


def has_code(number: int) -> bool:
    """Whether this PyTorch has kernels for a CUDA device, or PTX to compile for it."""
    if torch.version.cuda is None:
        return True
    mine = torch.cuda.get_device_capability(number)
    for arch in torch.cuda.get_arch_list():
        kind, _, digits = arch.partition("_")
        digits = digits.rstrip("af")
        if digits.isdigit():
            theirs = int(digits[:-1]), int(digits[-1])
            # Kernels run on later minor versions, except for "sm_90a"; "compute" (PTX) on all later ones.
            same = theirs[0] == mine[0] and not arch.endswith("a")
            if theirs == mine or (theirs <= mine and (same or kind == "compute")):
                return True
    return False


def build_of_torch() -> str:
    """The build of PyTorch: "CUDA 13.0", "ROCm 6.4", "XPU", "Metal" or "CPU"."""
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    if torch.version.hip:
        return "ROCm " + ".".join(torch.version.hip.split(".")[:2])
    if getattr(torch.version, "xpu", None):
        return "XPU"
    return "Metal" if torch.backends.mps.is_built() else "CPU"


def devices() -> list[dict[str, Any]]:
    """All devices that PyTorch sees, by the names of `train.device`, the CPU first: `device`, `name`,
    `capability` ("8.6", or ""), and `usable`, false for a card that this PyTorch has no code for."""
    found = [("cpu", "", "", True)]
    if torch.backends.mps.is_available():
        found.append(("mps", "Apple graphics", "", True))
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(number)
        name = torch.cuda.get_device_name(number)
        found.append((f"cuda:{number}", name, f"{major}.{minor}", has_code(number)))
    for number in range(torch.xpu.device_count() if torch.xpu.is_available() else 0):
        found.append((f"xpu:{number}", torch.xpu.get_device_name(number), "", True))
    return [dict(zip(("device", "name", "capability", "usable"), row, strict=True)) for row in found]


def free_memory(name: str) -> tuple[int, int] | None:
    """Free and total bytes of a CUDA device, by its name in `devices`; None for other devices.

    Takes some hundred MB of the card until this process ends.
    """
    if not name.startswith("cuda"):
        return None
    try:
        free, total = torch.cuda.mem_get_info(torch.device(name))
    except RuntimeError:  # not even that much is free
        return 0, torch.cuda.get_device_properties(torch.device(name)).total_memory
    return free, total


def describe_torch() -> dict[str, str]:
    """`device` (its type), `torch` (version), `build`, `capability` of the card, and `lacks_code`, the
    capability of a card that PyTorch has no kernels for."""
    device = best_device()
    cards = {one["device"]: one for one in devices() if one["device"].startswith("cuda")}
    mine = f"cuda:{torch.cuda.current_device()}" if device.type == "cuda" else ""
    return {
        "device": device.type,
        "torch": torch.__version__,
        "build": build_of_torch(),
        "capability": cards[mine]["capability"] if mine else "",
        "lacks_code": next((one["capability"] for one in cards.values() if not one["usable"]), ""),
    }


def available_memory(device: torch.device) -> int | None:
    """Bytes of a card that this process can still allocate, less `CARD_SPARE` for the driver and the desktop;
    None for other devices."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0, free + cached - CARD_SPARE)


def cap_memory(device: torch.device) -> int:
    """Limit this process to the card's memory that no other process holds, less `CARD_SPARE`; returns the cap
    in bytes, 0 where the device has none.

    Beyond it the allocator raises, which the memory fallbacks handle. Without a cap, the Windows driver moves
    memory to RAM instead, and steps take many times as long without an error.
    """
    available = available_memory(device)
    if available is None:
        return 0
    cap = available + torch.cuda.memory_allocated(device)
    _, total = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total), device)
    return cap


def compute_deterministically(device: torch.device) -> None:
    """Make a CUDA device compute the same bits each time, for the rest of the process.

    Call it before the first kernel. Strict mode makes the backward passes of flash and memory-efficient
    attention deterministic; `warn_only` does not. cuDNN's attention has no such mode. No effect on other
    devices.
    """
    if device.type != "cuda":
        return
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Filling each new tensor costs a kernel, and no result depends on the contents of an empty tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def dtype_of(precision: str, device: torch.device) -> torch.dtype:
    """The dtype that `precision` ("auto", "fp32", "bf16", "fp16") means on `device`.

    "auto" follows from the hardware and measures nothing, so that two runs on one machine never differ.

    Raises:
        ConfigError: the system has no bf16 for its graphics card.
    """
    if precision == "bf16" and device.type == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0):
        raise ConfigError("On a Mac bf16 needs macOS 14 or later; choose fp32 or fp16 as train.precision.")
    if precision != "auto":
        return PRECISIONS[precision]
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        major, minor = torch.cuda.get_device_capability(device)
        half = has_tensor_cores(torch.cuda.get_device_name(device), major + minor / 10)
        return torch.float16 if half else torch.float32
    return torch.float32


def without_tf32() -> contextlib.AbstractContextManager[None]:
    """Convolutions in full fp32: by default cuDNN uses TF32, with 10 bits of mantissa."""
    cudnn = torch.backends.cudnn
    return cudnn.flags(
        enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
    )


def bf16_is_faster() -> bool:
    """Whether this processor multiplies matrices in bf16 in well under the time of fp32: with instructions
    for it half or less, else longer, so far apart that timing both always gives the same answer."""
    if not supports_bf16():
        return False
    fp32, bf16 = (_seconds(dtype) for dtype in (torch.float32, torch.bfloat16))
    return bf16 < WORTH_IT * fp32


def _seconds(dtype: torch.dtype) -> float:
    """The fastest of some matrix products of a transformer's size."""
    rows, weight = torch.ones(512, 1280, dtype=dtype), torch.ones(1280, 1280, dtype=dtype)
    best = math.inf
    for _ in range(8):
        began = time.perf_counter()
        torch.mm(rows, weight)
        best = min(best, time.perf_counter() - began)
    return best


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks for the next allocation; no effect elsewhere. By default it returns
    each to the system, and every step touches its pages again: 12% of a step of SD 1.5 on a CPU."""
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, LARGEST)
        mallopt(M_MMAP_THRESHOLD, LARGEST)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that an allocation failed, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    words = (
        "can't allocate memory",
        "out of memory",
        "ALLOC_FAILED",
        "bad_alloc",
        "cudaErrorMemoryAllocation",
    )
    if any(word in str(error) for word in words):
        return True
    if any(word in str(error) for word in LIBRARY_ERRORS) and torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return free < ALMOST_NONE * total
    # oneDNN's message when its allocation fails; without a limit it means something else.
    return "could not create a primitive" in str(error) and limited(torch.device("cpu"))


def release_failed(error: BaseException | None, device: torch.device) -> None:
    """Free what the frames of a failure hold, and the allocator's cache. The error loses its traceback: a
    cleared frame still refers to its function, and a closure to its variables."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__context__
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def limited(device: torch.device) -> bool:
    """Whether running out of memory raises an error here.

    A CPU's memory is swapped to disk, and then the system kills the process, without an error; only a limit
    on the address space raises one.
    """
    if device.type != "cpu":
        return True
    try:
        import resource
    except ImportError:
        return False
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def memory_of(device: torch.device) -> str:
    """The memory of `device` in messages."""
    return "memory" if device.type in ("cpu", "mps") else "graphics memory"


class WithoutWaiting(TorchFunctionMode):
    """Lets a scheduler copy coefficients and noise to a card asynchronously, and solve UniPC's systems of two
    equations without reading back whether they are singular. The results are the same."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do what `func` does."""
        if func is torch.linalg.solve:
            return torch.linalg.solve_ex(*args, **(kwargs or {})).result
        tensor, device = args if func is torch.Tensor.to and not kwargs and len(args) == 2 else (None, None)
        if isinstance(tensor, torch.Tensor) and isinstance(device, torch.device) and not tensor.is_cuda:
            return to_device(device, tensor)[0]
        return func(*args, **(kwargs or {}))
