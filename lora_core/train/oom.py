"""Out of memory: an ordered list of fallbacks that take less of it.

Each costs time, or nothing, and all but one change a gradient by rounding alone: a base in 8 bits is another
base, by a little. What was applied, and after which step, is kept in `plan.json`, so that a resumed run does
the same at the same steps.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from lora_core.backends.compact import (
    WeightPolicy,
    is_offloaded,
    is_quantized,
    offload_store_for,
    quantize_int8,
)
from lora_core.backends.onednn import is_prepacked, undo_prepack
from lora_core.errors import OutOfMemory
from lora_core.model_files.families import is_text_encoder
from lora_core.model_files.sizes import (
    BITSANDBYTES,
    CHECKPOINTING,
    HALVES,
    INT8,
    OFFLOAD,
    OFFLOAD_SPARE,
    OPTIMIZER_8BIT,
    PLAIN_LAYOUT,
    TEXT_ON_CPU,
    VAE_ON_CPU,
)
from lora_core.model_files.sizes import FALLBACKS as DESCRIPTIONS
from lora_core.models.device import release_failed
from lora_core.settings.schema import TrainSection
from lora_core.system.files import free_bytes
from lora_core.train.loop import TrainState
from lora_core.train.setup import enable_checkpointing, is_on_cpu


@dataclass(frozen=True)
class Fallback:
    """One way to take less memory: its name in `plan.json`, whether it can be applied now, what applies it,
    and whether gradients stay the same but for rounding."""

    name: str
    possible: "Callable[[MemoryFallback], bool]"
    apply: "Callable[[MemoryFallback], None]"
    exact: bool = True

    @property
    def description(self) -> str:
        """A sentence on what is done and what it costs."""
        return DESCRIPTIONS[self.name]


@dataclass
class MemoryFallback:
    """Applies fallbacks to the training of one run.

    Attributes:
        state: what trains.
        batch_size: images per micro-batch.
        applied: names of fallbacks with the steps that they were applied after; the list is added to.
        offload_folder: on whose drive the base may be offloaded to.
    """

    state: TrainState
    batch_size: int
    applied: list[tuple[str, int]]
    offload_folder: Path | None = None
    _count: int = 0
    _step: int = 0

    def apply_until(self, step: int) -> None:
        """Apply what an earlier process applied after `step` steps or fewer."""
        self._step = step
        while self._count < len(self.applied) and self.applied[self._count][1] <= step:
            name = self.applied[self._count][0]
            self._count += 1
            fallback = next((each for each in FALLBACKS if each.name == name), None)
            if fallback is not None and fallback.possible(self):
                fallback.apply(self)

    @property
    def next(self) -> Fallback | None:
        """The fallback that `apply_next` would apply."""
        order = FALLBACKS_WITHIN_A_RUN if self._step else FALLBACKS
        return next((each for each in order if each.possible(self)), None)

    def apply_next(self, step: int) -> str:
        """Apply the next fallback, from the step after `step` on; returns its description.

        Raises:
            OutOfMemory: there is none left.
        """
        self.apply_until(step)
        fallback = self.next
        if fallback is None:
            raise OutOfMemory(self._nothing_left())
        # What was planned for later steps no longer applies.
        del self.applied[self._count :]
        self.applied.append((fallback.name, step))
        self.apply_until(step)
        return fallback.description

    def _nothing_left(self) -> str:
        unet = self.state.base.denoiser
        tried = ["checkpointing is on"]
        tried += ["images go through one at a time"] if self.state.chunks > 1 else []
        tried += ["the base is kept in 8 bits"] if is_quantized(unet) else []
        tried += ["the base waits outside of the device's memory"] if is_offloaded(unet) else []
        listed = " and ".join((", ".join(tried[:-1]), tried[-1]) if tried[1:] else tried)
        others = []
        if any(map(is_text_encoder, self.state.injected.parts())):
            others.append(" or train no text encoder, so that they can leave the device,")
        if not is_offloaded(unet):
            others.append(" or make room on the workspace's drive, where the base could wait,")
        if not importlib.util.find_spec(BITSANDBYTES):
            others.append(f" or install {BITSANDBYTES} for an 8-bit optimizer,")
        return (
            f"The device ran out of memory although {listed}; lower train.resolution or adapter.rank,"
            f"{''.join(others)} or close other programs that use the device. Everything saved is complete."
        )


def _can_move_text_encoders(memory: MemoryFallback) -> bool:
    encoders = memory.state.base.text_encoders.values()
    trained = any(is_text_encoder(part) for part in memory.state.injected.parts())
    return not trained and any(not is_on_cpu(encoder) for encoder in encoders)


def _move_text_encoders(memory: MemoryFallback) -> None:
    for part in memory.state.base.text_encoders:
        memory.state.base.put(part, torch.device("cpu"))


def _undo_prepacking(memory: MemoryFallback) -> None:
    for module in memory.state.base.modules.values():
        undo_prepack(module)


def _halve_chunks(memory: MemoryFallback) -> None:
    memory.state.chunks *= 2


def _can_use_8bit_adamw(memory: MemoryFallback) -> bool:
    optimizer = memory.state.optimizer
    fresh = type(optimizer) is torch.optim.AdamW and not optimizer.state
    return fresh and importlib.util.find_spec(BITSANDBYTES) is not None


def _use_8bit_adamw(memory: MemoryFallback) -> None:
    known = ("params", "lr", "initial_lr", "until", "betas", "eps", "weight_decay")
    groups = [{key: group[key] for key in known} for group in memory.state.optimizer.param_groups]
    memory.state.optimizer = importlib.import_module(f"{BITSANDBYTES}.optim").AdamW8bit(groups)


def _can_quantize(memory: MemoryFallback) -> bool:
    # An offloaded base leaves nothing to save.
    unet = memory.state.base.denoiser
    return not is_quantized(unet) and not is_offloaded(unet)


def _can_offload(memory: MemoryFallback) -> bool:
    unet, device, folder = memory.state.base.denoiser, memory.state.base.device, memory.offload_folder
    if is_offloaded(unet) or folder is None:
        return False
    need = sum(tensor.nbytes for tensor in (*unet.parameters(), *unet.buffers()))
    room = psutil.virtual_memory().available if device.type == "cuda" else free_bytes(folder)
    return room > need + OFFLOAD_SPARE


def _offload(memory: MemoryFallback) -> None:
    assert memory.offload_folder is not None
    store = offload_store_for(memory.state.base.device, memory.offload_folder)
    WeightPolicy(None, store).apply_to(memory.state.base.denoiser)


FALLBACKS = (
    Fallback(
        VAE_ON_CPU,
        lambda memory: not is_on_cpu(memory.state.base.vae),
        lambda memory: memory.state.base.put("vae", torch.device("cpu")),
    ),
    Fallback(TEXT_ON_CPU, _can_move_text_encoders, _move_text_encoders),
    Fallback(
        PLAIN_LAYOUT,
        lambda memory: any(map(is_prepacked, memory.state.base.modules.values())),
        _undo_prepacking,
    ),
    Fallback(
        CHECKPOINTING,
        lambda memory: not memory.state.base.denoiser.is_gradient_checkpointing,
        lambda memory: enable_checkpointing(memory.state.base),
    ),
    Fallback(HALVES, lambda memory: memory.state.chunks < memory.batch_size, _halve_chunks),
    Fallback(OPTIMIZER_8BIT, _can_use_8bit_adamw, _use_8bit_adamw),
    Fallback(
        INT8,
        _can_quantize,
        lambda memory: WeightPolicy(quantize_int8).apply_to(memory.state.base.denoiser),
        exact=False,
    ),
    Fallback(OFFLOAD, _can_offload, _offload),
)
"""In the order in which they are applied before the first step."""
FALLBACKS_WITHIN_A_RUN = tuple(sorted(FALLBACKS, key=lambda each: not each.exact))
"""The order after the first step. The adapter fits its base by then, so the base changes last; before the
first step 8 bits come before offloading, because they cost far less time."""


def free_memory(state: TrainState, error: BaseException | None = None) -> None:
    """Release all that a failed step holds."""
    state.flat_params.zero_grad()
    release_failed(error, state.base.device)


def next_base_fallback(train: TrainSection, applied: list[tuple[str, int]]) -> Fallback | None:
    """The next fallback that makes the base itself smaller, for one that does not fit when loaded."""
    done = {name for name, _ in applied}
    done |= {INT8} if train.quantize_base != "none" else set()
    done |= {OFFLOAD} if train.offload else set()
    return next((each for each in FALLBACKS if each.name in (INT8, OFFLOAD) and each.name not in done), None)
