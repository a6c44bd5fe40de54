"""Which pictures and captions make up the n-th micro-batch: a pure function of (seed, n).

Nothing here has a state, so that a resume at any step sees the pictures, captions and mirrorings of an
unbroken run.
"""

import random
from dataclasses import dataclass

import torch

from lora_core.dataset.buckets import Bucket, bucket_of, size_conditioning
from lora_core.dataset.captions import CaptionRules, drawn_caption
from lora_core.dataset.folder import ImageRecord
from lora_core.spec.errors import DatasetError
from lora_core.training.cache import LatentCache


@dataclass(frozen=True)
class Item:
    """A picture with the bucket that it is trained in."""

    record: ImageRecord
    bucket: Bucket

    @property
    def sizes(self) -> torch.Tensor:
        """(6,), see `size_conditioning`."""
        return torch.tensor(
            size_conditioning(self.record.width, self.record.height, self.bucket), dtype=torch.float32
        )


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        latents: (B, 4, h, w) on the CPU.
        captions: B texts as drawn for this look.
        names: B file names, for messages.
        sizes: (B, 6) on the CPU: original height and width, top and left of the crop, height and width, in
        pixels.
    """

    latents: torch.Tensor
    captions: list[str]
    names: list[str]
    sizes: torch.Tensor


@dataclass(frozen=True)
class Looks:
    """How pictures are looked at.

    Attributes:
        batch_size: pictures a micro-batch, all of one bucket.
        flip: whether half of the looks are mirrored.
        captions: how captions are drawn.
        seed: of all draws.
    """

    batch_size: int
    flip: bool
    captions: CaptionRules
    seed: int


def items_of(records: list[ImageRecord], resolution: int, multiple: int) -> list[Item]:
    """Each picture with its bucket.

    Raises:
        DatasetError: there is no picture.
    """
    if not records:
        raise DatasetError("No picture is left to train on; add pictures or hold fewer of them out.")
    return [Item(r, bucket_of(r.width, r.height, resolution, multiple)) for r in records]


class Batches:
    """All micro-batches of a run, by number."""

    def __init__(self, items: list[Item], looks: Looks, cache: LatentCache) -> None:
        """Draw from `items` as `looks` says, latents from `cache`."""
        self._items = items
        self._looks = looks
        self._cache = cache
        self._epoch: tuple[int, list[list[int]]] = (-1, [])
        self._an_epoch = len(self._epoch_batches(0))

    def batch(self, number: int) -> Batch:
        """Micro-batch `number`, counted from 0 over the whole run."""
        rows = [self._look(number, row, index) for row, index in enumerate(self._indices(number))]
        latents, captions, items = zip(*rows, strict=True)
        names, sizes = [item.record.path.name for item in items], [item.sizes for item in items]
        return Batch(torch.stack(latents), list(captions), names, torch.stack(sizes))

    def heaviest(self) -> int:
        """The number of a micro-batch of the largest bucket."""
        epoch = self._epoch_batches(0)
        sizes = [self._items[indices[0]].bucket for indices in epoch]
        return max(range(len(epoch)), key=lambda number: sizes[number].width * sizes[number].height)

    def _indices(self, number: int) -> list[int]:
        epoch, place = divmod(number, self._an_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._epoch_batches(epoch))
        return self._epoch[1][place]

    def _look(self, number: int, row: int, index: int) -> tuple[torch.Tensor, str, Item]:
        draw = random.Random(f"{self._looks.seed}/look/{number}/{row}")
        item = self._items[index]
        flip = self._looks.flip and draw.random() < 0.5
        caption = drawn_caption(item.record.caption, self._looks.captions, draw)
        return self._cache.latents(item.record, item.bucket, flip), caption, item

    def _epoch_batches(self, epoch: int) -> list[list[int]]:
        """One epoch: each picture as often as it repeats, cut into batches of one bucket in random order.

        A last batch that is short is filled from the start of its bucket, so that all steps weigh the same.
        """
        draw = random.Random(f"{self._looks.seed}/epoch/{epoch}")
        by_bucket: dict[Bucket, list[int]] = {}
        for index, item in enumerate(self._items):
            by_bucket.setdefault(item.bucket, []).extend([index] * item.record.repeats)
        batches = []
        size = self._looks.batch_size
        for indices in by_bucket.values():
            draw.shuffle(indices)
            for start in range(0, len(indices), size):
                rows = indices[start : start + size]
                batches.append([rows[i] if i < len(rows) else indices[i % len(indices)] for i in range(size)])
        draw.shuffle(batches)
        return batches


def looks_in_all(items: list[Item], flip: bool) -> list[tuple[Item, bool]]:
    """Every (item, flip) that a run can ask for: what to encode before the first step."""
    return [(item, mirrored) for item in items for mirrored in ((False, True) if flip else (False,))]
