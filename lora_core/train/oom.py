"""Memory: a ladder of ways to take less of it, and what an error of it looks like.

Each rung costs time, or nothing, and all but one change a gradient by rounding alone: a base in 8 bits is
another base, by a little. What was taken from which step on is in `plan.json`, so that a resume takes the
same rungs at the same steps.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

from lora_core.backends.int8 import WeightPolicy, is_offloaded, is_quantized, quantize_int8
from lora_core.backends.offload import offload_store_for
from lora_core.backends.onednn import is_prepacked, undo_prepack
from lora_core.errors import OutOfMemory
from lora_core.models.device import release_failed
from lora_core.settings.config import RunConfig
from lora_core.settings.schema import TrainSection
from lora_core.system.disk_space import free_bytes
from lora_core.train.loop import TrainState
from lora_core.train.setup import INT8, OFFLOAD, enable_checkpointing

EIGHT_BIT = "bitsandbytes"
VAE_ASIDE = "vae aside"
PLAIN = "plain layout"
SPARE = 2**30
"""Bytes that are left free where weights are put aside."""


@dataclass(frozen=True)
class Fallback:
    """One way to take less memory.

    Attributes:
        name: in `plan.json`.
        told: what is done and what it costs, a sentence.
        possible: whether it can be taken now.
        take: does it.
        exact: whether gradients stay as they are but for rounding.
    """

    name: str
    told: str
    possible: Callable[[TrainState, RunConfig], bool]
    take: Callable[[TrainState], None]
    exact: bool = True


def _eight_bit_possible(state: TrainState, config: RunConfig) -> bool:
    plain = type(state.optimizer) is torch.optim.AdamW and not state.optimizer.state
    return plain and importlib.util.find_spec(EIGHT_BIT) is not None


def _take_eight_bit(state: TrainState) -> None:
    known = ("params", "lr", "initial_lr", "until", "betas", "eps", "weight_decay")
    groups = [{key: group[key] for key in known} for group in state.optimizer.param_groups]
    state.optimizer = importlib.import_module(f"{EIGHT_BIT}.optim").AdamW8bit(groups)


def _put_vae_aside(state: TrainState) -> None:
    state.base.put("vae", torch.device("cpu"))


def _take_plain(state: TrainState) -> None:
    for module in state.base.modules.values():
        undo_prepack(module)


def _int8_possible(state: TrainState, config: RunConfig) -> bool:
    # A base that waits elsewhere leaves nothing to save.
    return not is_quantized(state.base.denoiser) and not is_offloaded(state.base.denoiser)


def _take_int8(state: TrainState) -> None:
    WeightPolicy(quantize_int8).apply_to(state.base.denoiser)


def _offload_possible(state: TrainState, config: RunConfig) -> bool:
    unet, device = state.base.denoiser, state.base.device
    if is_offloaded(unet) or state.aside is None:
        return False
    need = sum(tensor.nbytes for tensor in (*unet.parameters(), *unet.buffers()))
    room = psutil.virtual_memory().available if device.type == "cuda" else free_bytes(state.aside)
    return room > need + SPARE


def _take_offload(state: TrainState) -> None:
    assert state.aside is not None
    WeightPolicy(None, offload_store_for(state.base.device, state.aside)).apply_to(state.base.denoiser)


def _take_half(state: TrainState) -> None:
    state.split *= 2


FALLBACKS = (
    Fallback(
        VAE_ASIDE,
        "The VAE waits in the computer's own memory; samples take some seconds longer.",
        lambda state, config: state.base.vae.device.type != "cpu",
        _put_vae_aside,
    ),
    Fallback(
        PLAIN,
        "The base's weights are kept once, as they are, instead of laid out for the processor too: steps take"
        " up to a quarter longer.",
        lambda state, config: any(map(is_prepacked, state.base.modules.values())),
        _take_plain,
    ),
    Fallback(
        "checkpointing",
        "Gradient checkpointing is on: steps take about a third longer.",
        lambda state, config: not state.base.denoiser.is_gradient_checkpointing,
        lambda state: enable_checkpointing(state.base),
    ),
    Fallback(
        "half",
        "Batches go through in parts of half the size that add up to the same gradient: steps take up to"
        " twice as long on a graphics card, and no longer on a processor.",
        lambda state, config: state.split < config.train.batch_size,
        _take_half,
    ),
    Fallback(
        "8-bit optimizer",
        "AdamW keeps its state in 8 bits, a quarter of the memory, at about the same speed.",
        _eight_bit_possible,
        _take_eight_bit,
    ),
    Fallback(
        INT8,
        "The base's weights are rounded to 8 bits, a half or a quarter of their memory: steps take up to a"
        " third longer, and the base that the LoRA is trained beside is off by one or two percent.",
        _int8_possible,
        _take_int8,
        exact=False,
    ),
    Fallback(
        OFFLOAD,
        "The base's weights wait outside of the device's memory and are fetched as they are used: the numbers"
        " stay the same, and steps may take twice as long or more.",
        _offload_possible,
        _take_offload,
    ),
)
"""In the order in which they are taken before the first step; the first that is possible comes next. Text
encoders are dropped after caching in any case."""
WITHIN = tuple(sorted(FALLBACKS, key=lambda rung: not rung.exact))
"""The order once steps are done. What is trained fits its base, so that this changes last: before the first
step 8 bits come before fetching, because they cost far less time; later fetching comes first."""


class MemoryFallback:
    """Where a run stands on the ladder."""

    def __init__(self, state: TrainState, config: RunConfig, taken: list[tuple[str, int]]) -> None:
        """`taken` names rungs with the steps that they were taken after; the list is added to."""
        self._state = state
        self._config = config
        self.taken = taken
        self._reached = 0
        self._done = 0

    def reach(self, step: int) -> None:
        """Take what was taken after `step` steps or earlier by the process that did them."""
        self._done = step
        while self._reached < len(self.taken) and self.taken[self._reached][1] <= step:
            name = self.taken[self._reached][0]
            self._reached += 1
            rung = next((rung for rung in FALLBACKS if rung.name == name), None)
            if rung is not None and rung.possible(self._state, self._config):
                rung.take(self._state)

    @property
    def next(self) -> Fallback | None:
        """The rung that would be taken next."""
        order = WITHIN if self._done else FALLBACKS
        return next((rung for rung in order if rung.possible(self._state, self._config)), None)

    def climb(self, step: int) -> str:
        """Take the next rung, from the step after `step` on; returns what that means.

        Raises:
            OutOfMemory: there is none left.
        """
        self.reach(step)
        rung = self.next
        if rung is None:
            raise OutOfMemory(self._nothing_left())
        # Rungs noted for later steps are no longer what will happen.
        del self.taken[self._reached :]
        self.taken.append((rung.name, step))
        self.reach(step)
        return rung.told

    def _nothing_left(self) -> str:
        state, unet = self._state, self._state.base.denoiser
        tried = ["checkpointing is on"]
        tried += ["pictures go through one at a time"] if state.split > 1 else []
        tried += ["the base is kept in 8 bits"] if is_quantized(unet) else []
        tried += ["the base waits outside of the device's memory"] if is_offloaded(unet) else []
        listed = " and ".join((", ".join(tried[:-1]), tried[-1]) if tried[1:] else tried)
        others = []
        if not is_offloaded(unet):
            others.append(" or make room on the workspace's drive, where the base could wait,")
        if not importlib.util.find_spec(EIGHT_BIT):
            others.append(f" or install {EIGHT_BIT} for an 8-bit optimizer,")
        return (
            f"The device ran out of memory although {listed}; lower train.resolution or adapter.rank,"
            f"{''.join(others)} or close other programs that use the device. What is saved is whole."
        )


def free_memory(state: TrainState, error: BaseException | None = None) -> None:
    """Let go of all that a failed step holds."""
    state.storage.zero_grad()
    release_failed(error, state.base.device)


def next_base_fallback(train: TrainSection, taken: list[tuple[str, int]]) -> Fallback | None:
    """The next rung that makes the base itself smaller, for a base that does not fit as it is opened."""
    done = {name for name, _ in taken}
    done |= {INT8} if train.quantize_base != "none" else set()
    done |= {OFFLOAD} if train.offload else set()
    return next((rung for rung in FALLBACKS if rung.name in (INT8, OFFLOAD) and rung.name not in done), None)
