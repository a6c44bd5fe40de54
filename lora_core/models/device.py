"""Which device and which number format: what the machine has, found by accelerate."""

import torch
from accelerate import PartialState

from lora_core.models.weight_files import PRECISIONS


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
