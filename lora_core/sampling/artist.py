"""A base that stays open and draws one shot after the other; what changes between two is merged, never
reloaded.

How an adapter is cut to a rank is handed in: that is analysis, which stands right of here.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from lora_core.adapters.inject import Merger, Strengthened
from lora_core.adapters.weights import AdapterWeights
from lora_core.formats.file import read_adapter
from lora_core.models.encode import negative_condition, text_condition
from lora_core.models.load import BaseModel
from lora_core.sampling.generate import OnClean, OnStep, Picture, generated, infotext
from lora_core.sampling.look import colour_matrix
from lora_core.spec.shots import LoraAt, Shot

MOST_ADAPTERS = 8
"""Kept in memory after use."""
Reduce = Callable[[AdapterWeights, int], AdapterWeights]
FileKey = tuple[str, int, int, int]
"""Path, time, size, and the rank that it is cut to."""


class Artist:
    """A base with its merged adapters."""

    def __init__(self, base: BaseModel, reduce: Reduce) -> None:
        """Draw with `base`; `reduce` cuts an adapter to a rank."""
        self.base = base
        self._reduce = reduce
        self._merger = Merger(base.modules)
        self._adapters: OrderedDict[FileKey, AdapterWeights] = OrderedDict()
        self._mixed: tuple[object, ...] | None = ()
        self._matrix: torch.Tensor | None = None
        self.ready_in = 0.0
        """Seconds from the last shot to the first step of its sampler: merging and reading the prompt."""

    @property
    def matrix(self) -> torch.Tensor:
        """Latents to colours, fitted at the first use."""
        if self._matrix is None:
            self._matrix = colour_matrix(self.base)
        return self._matrix

    def drawn(
        self, shot: Shot, on_step: OnStep | None = None, on_clean: OnClean | None = None
    ) -> Image.Image:
        """The picture, RGB.

        Raises:
            LoraError: an adapter does not fit, or the base cannot make such a picture.
        """
        began = time.monotonic()
        how = picture_of(shot)
        self.mix(shot.loras)
        with torch.no_grad():
            text = text_condition(self.base, [shot.prompt], shot.clip_skip, shot.tokens)
            unwanted = negative_condition(self.base, shot.negative, shot.clip_skip, shot.tokens)
        self.ready_in = time.monotonic() - began
        return generated(self.base, how, text, unwanted, on_step, on_clean)

    def infotext(self, shot: Shot, extra: dict[str, str] | None = None) -> str:
        """What the PNG of a shot says of it."""
        more = {"Clip skip": str(shot.clip_skip)} if shot.clip_skip > 1 else {}
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
        self._merger.apply(
            [Strengthened(w, lora.strength, lora.text_strength) for lora, _, w in read if lora.acts]
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
