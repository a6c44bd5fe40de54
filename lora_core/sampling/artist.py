"""A base that stays open and draws one shot after the other; what changes between two is merged, never
reloaded.

On a card with too little memory, the text encoders wait in the computer's memory and are on the card only
while they read a new prompt; where that is not enough, the UNet is kept in 8 bits. How an adapter is cut to a
rank is handed in: that is analysis, which stands right of here.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lora_core.adapters.inject import Merger, Strengthened
from lora_core.adapters.weights import AdapterWeights
from lora_core.formats.file import read_adapter
from lora_core.models.device import (
    available_memory,
    best_device,
    cap_memory,
    dtype_of,
    memory_of,
    out_of_memory,
    release_failed,
)
from lora_core.models.encode import TextCondition, decoded_latents, negative_condition, text_condition
from lora_core.models.load import BaseModel, open_base
from lora_core.models.thin import Thinner, int8
from lora_core.sampling.generate import OnClean, OnStep, Picture, image_of, infotext, sampled_latents
from lora_core.sampling.look import colour_matrix
from lora_core.spec.errors import OutOfMemory
from lora_core.spec.shots import LoraAt, Shot

MOST_ADAPTERS = 8
"""Kept in memory after use."""
MOST_PROMPTS = 32
RESIDENT, ASIDE, INT8 = range(3)
"""How a base is kept: all on the device; without the text encoders; the UNet in 8 bits, too."""
DECODING = 24
"""Bytes a pixel for each channel of the VAE's first level: the peak of its decoder in fp32."""
SAMPLING = 2**29
"""Bytes that a step of the sampler takes beside the UNet, SDXL at 1024 px with guidance."""
IN_8_BITS = (
    "The UNet is kept in 8 bits, as it does not fit into the graphics memory; pictures differ slightly."
)
Reduce = Callable[[AdapterWeights, int], AdapterWeights]
FileKey = tuple[str, int, int, int]
"""Path, time, size, and the rank that it is cut to."""


def open_artist(shot: Shot, reduce: Reduce, precision: str = "auto") -> "Artist":
    """The artist of a shot's base, on the best device, kept so that its pictures fit into the memory.

    Raises:
        ModelFileError: the base cannot be used.
        OutOfMemory: it does not fit in any way.
    """
    device = best_device()
    cap_memory(device)
    least = RESIDENT
    while True:
        thin = Thinner()
        base = open_base(
            shot.base, device, dtype_of(precision, device), shot.prediction, shot.vae, thin,
            shot.zero_terminal_snr,
        )  # fmt: skip
        kept = max(least, _fitting(base))
        thin.how = int8 if kept == INT8 else None
        try:
            base.load("unet")
            for part in base.text_encoders:
                base.load(part)
                if kept != RESIDENT:
                    base.put(part, torch.device("cpu"))
            base.load("vae")
            return Artist(base, reduce, kept)
        except OutOfMemory as error:
            if device.type == "cpu":
                raise
            if kept == INT8:
                raise OutOfMemory(
                    f"The base {shot.base} does not fit into the {memory_of(device)} that is free, even with"
                    " its UNet in 8 bits; close other programs that use it, or wait for the end of a run."
                ) from error
            release_failed(error, device)
            least = kept + 1


def _fitting(base: BaseModel) -> int:
    """How a base that is not loaded yet should be kept, by its size and the memory that is free."""
    room = available_memory(base.device)
    if room is None:
        return RESIDENT
    unet, *encoders = (
        sum(tensor.numel() for tensor in module.parameters()) * base.dtype.itemsize
        for module in base.modules.values()
    )
    config: Any = base.vae.config
    decoding = DECODING * config.block_out_channels[0] * base.resolution**2
    vae = sum(tensor.nbytes for tensor in base.vae.parameters())
    if unet + sum(encoders) + vae + max(decoding, SAMPLING) <= room:
        return RESIDENT
    return ASIDE if unet + max(*encoders, vae + SAMPLING) <= room else INT8


class Artist:
    """A base with its merged adapters."""

    def __init__(self, base: BaseModel, reduce: Reduce, kept: int = RESIDENT) -> None:
        """Draw with `base`, kept in one of three ways; `reduce` cuts an adapter to a rank."""
        self.base = base
        self.kept = kept
        self._reduce = reduce
        self._merger = Merger(base.modules)
        self._adapters: OrderedDict[FileKey, AdapterWeights] = OrderedDict()
        self._mixed: tuple[object, ...] | None = ()
        self._text_mixed: tuple[object, ...] = ()
        self._conditions: OrderedDict[object, tuple[TextCondition, TextCondition]] = OrderedDict()
        self._matrix: torch.Tensor | None = None
        self.ready_in = 0.0
        """Seconds from the last shot to the first step of its sampler: merging and reading the prompt."""

    @property
    def note(self) -> str:
        """What the user should know of how the base is kept, or ""."""
        return IN_8_BITS if self.kept == INT8 else ""

    @property
    def matrix(self) -> torch.Tensor:
        """Latents to colours, fitted at the first use."""
        if self._matrix is None:
            self._matrix = colour_matrix(self.base)
        return self._matrix

    def drawn(
        self, shot: Shot, on_step: OnStep | None = None, on_clean: OnClean | None = None
    ) -> Image.Image:
        """The picture, RGB. Where a card runs out of memory, the base is kept in a smaller way from then on.

        Raises:
            LoraError: an adapter does not fit, or the base cannot make such a picture.
        """
        while True:
            try:
                return self._drawn(shot, on_step, on_clean)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or self.kept == INT8 or self.base.device.type == "cpu":
                    raise
                release_failed(error, self.base.device)
            self._shrink()

    def _drawn(self, shot: Shot, on_step: OnStep | None, on_clean: OnClean | None) -> Image.Image:
        began = time.monotonic()
        how = picture_of(shot)
        self.mix(shot.loras)
        text, unwanted = self._condition(shot)
        self.ready_in = time.monotonic() - began
        latents = sampled_latents(self.base, how, text, unwanted, on_step, on_clean)
        return image_of(decoded_latents(self.base, latents))

    def _shrink(self) -> None:
        """Keep the base in the next smaller way."""
        self.kept += 1
        if self.kept == INT8:
            Thinner(int8).every(self.base.unet)
            return
        for part in self.base.text_encoders:
            self.base.put(part, torch.device("cpu"))

    def _condition(self, shot: Shot) -> tuple[TextCondition, TextCondition]:
        """What the text encoders make of both prompts, kept for as long as no adapter changes them."""
        asked = (shot.prompt, shot.negative, shot.clip_skip, shot.tokens, self._text_mixed)
        if asked not in self._conditions:
            if self.kept != RESIDENT:
                # The largest text encoder takes more than the VAE.
                self.base.put("vae", torch.device("cpu"))
            with torch.no_grad():
                text = text_condition(self.base, [shot.prompt], shot.clip_skip, shot.tokens)
                unwanted = negative_condition(self.base, shot.negative, shot.clip_skip, shot.tokens)
            self.base.put("vae", self.base.device)
            self._conditions[asked] = text, unwanted
        self._conditions.move_to_end(asked)
        while len(self._conditions) > MOST_PROMPTS:
            self._conditions.popitem(last=False)
        return self._conditions[asked]

    def infotext(self, shot: Shot, extra: dict[str, str] | None = None) -> str:
        """What the PNG of a shot says of it."""
        more = {"Clip skip": str(shot.clip_skip)} if shot.clip_skip > 1 else {}
        more |= {"UNet": "8 bits"} if self.kept == INT8 else {}
        more |= {f"LoRA rank of {lora.name}": str(lora.rank) for lora in shot.loras if lora.rank}
        uses = [(lora.name, lora.strength, lora.text_strength) for lora in shot.loras if lora.acts]
        return infotext(self.base, picture_of(shot), shot.prompt, shot.negative, uses, more | (extra or {}))

    def mix(self, loras: tuple[LoraAt, ...]) -> None:
        """Make the base act as with exactly these adapters; nothing is done where it does already."""
        read = [(lora, *self._adapter(lora)) for lora in loras]
        wanted = tuple((key, lora.strength, lora.text_strength) for lora, key, _ in read if lora.acts)
        if wanted == self._mixed:
            return
        # If this breaks off halfway, what the weights are is not known.
        self._mixed = None
        acting = [
            (key, Strengthened(w, lora.strength, lora.text_strength)) for lora, key, w in read if lora.acts
        ]
        self._merger.apply([one for _, one in acting])
        self._text_mixed = tuple(
            (key, one.on("text")) for key, one in acting if one.on("text") and one.weights.parts() != ["unet"]
        )
        self._mixed = wanted

    def _adapter(self, lora: LoraAt) -> tuple[FileKey, AdapterWeights]:
        """The adapter in a file, read again where the file has changed."""
        path = Path(lora.file)
        status = path.stat() if path.is_file() else None
        whole = (str(path), status.st_mtime_ns if status else 0, status.st_size if status else 0)
        key = (*whole, lora.rank)
        if key not in self._adapters:
            if lora.rank:
                _, weights = self._adapter(LoraAt(lora.file))
                self._adapters[key] = self._reduce(weights, lora.rank)
            else:
                self._adapters[key] = read_adapter(path, self.base.family)
        self._adapters.move_to_end(key)
        while len(self._adapters) > MOST_ADAPTERS:
            self._adapters.popitem(last=False)
        return key, self._adapters[key]


def picture_of(shot: Shot) -> Picture:
    """How a shot is sampled."""
    return Picture(shot.seed, shot.steps, shot.cfg, shot.sampler, shot.width, shot.height, shot.cfg_rescale)
