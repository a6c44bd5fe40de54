"""Latents and text conditions, encoded once and kept on disk by the hash of everything that they follow from.

A changed picture, VAE, bucket or caption has another key, so nothing is ever stale. Each file holds the hash
of its numbers; one that is broken in any way is made anew. Captions that are drawn at random (shuffled tags,
tag dropout, alternatives) rarely come again: they are encoded as they come and kept in memory only, up to a
limit.
"""

import hashlib
import random
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lora_core.data.buckets import Bucket, choose_bucket, size_conditioning
from lora_core.data.captions import CHUNK, CaptionRules, sample_caption
from lora_core.data.images import hash_file
from lora_core.data.scan import ImageRecord
from lora_core.errors import DatasetError
from lora_core.model_files.sizes import DRAWN_CAPTIONS_BYTES
from lora_core.models.encode import (
    as_negative_prompt,
    encode_image,
    encode_prompt,
    load_pixels,
    token_chunks,
)
from lora_core.models.load import BaseModel
from lora_core.models.unet import PromptEmbeds
from lora_core.system.paths import write_atomically

DIGEST = "sha256"
"""The name in a file's header of the hash of its numbers."""


class LatentCache:
    """Latents of (picture, bucket, flip), in memory for this run and on disk for the next."""

    def __init__(self, base: BaseModel, folder: Path) -> None:
        """Keep files below `folder`."""
        self._base = base
        self._folder = folder
        self._vae = base.digest("vae")
        self._memory: dict[tuple[Path, Bucket, bool], torch.Tensor] = {}

    def latents(self, record: ImageRecord, bucket: Bucket, flip: bool) -> torch.Tensor:
        """(4, h, w) in fp32 on the CPU.

        Raises:
            DatasetError: the picture is not cached and cannot be read.
        """
        key = (record.path, bucket, flip)
        if key not in self._memory:
            # Devices round differently, so that each has latents of its own.
            device = self._base.vae.device.type
            name = short_digest(hash_file(record.path), self._vae, bucket.width, bucket.height, flip, device)
            self._memory[key] = load_or_compute(
                self._folder / f"{name}.safetensors",
                lambda: {"value": encode_image(self._base, load_pixels(record, bucket, flip))},
            )["value"]
        return self._memory[key]


class PromptCache:
    """Text conditions of captions: live while the text encoder is trained, else encoded once and cached."""

    def __init__(self, base: BaseModel, folder: Path, trained: bool, clip_skip: int, tokens: int) -> None:
        """Keep files below `folder` where the encoder is not `trained`."""
        self._base = base
        self._folder = folder
        self._trained = trained
        self._how = (clip_skip, tokens)
        self._fixed: dict[str, PromptEmbeds] = {}
        self._drawn: OrderedDict[str, PromptEmbeds] = OrderedDict()
        self._room = DRAWN_CAPTIONS_BYTES
        self._encoders = "" if trained else "/".join(map(base.digest, base.text_encoders))

    def conditions(self, captions: list[str]) -> PromptEmbeds:
        """The condition of B captions as they were drawn for a micro-batch, on the base's device."""
        if self._trained:
            return encode_prompt(self._base, captions, *self._how)
        return PromptEmbeds.cat([self._of_drawn(caption) for caption in captions]).to(self._base.device)

    def condition(self, caption: str) -> PromptEmbeds:
        """The condition of one caption that comes again, B = 1, on the base's device; it is kept on disk."""
        if self._trained:
            return encode_prompt(self._base, [caption], *self._how)
        if caption not in self._fixed:
            path = self._folder / f"{self._key(caption)}.safetensors"
            found = load_or_compute(path, lambda: _tensors(self._encoded(caption)))
            self._fixed[caption] = PromptEmbeds(found["value"], found.get("pooled"))
        return self._fixed[caption].to(self._base.device)

    def negative(self) -> PromptEmbeds:
        """The condition of an empty negative prompt, B = 1."""
        return as_negative_prompt(self._base, "", self.condition(""))

    def release(self) -> None:
        """Free the text encoders: every caption that can come up is in memory now."""
        self._base.text_encoders.clear()

    def _of_drawn(self, caption: str) -> PromptEmbeds:
        if caption in self._fixed:
            return self._fixed[caption]
        found = self._drawn.pop(caption, None)
        if found is None:
            found = self._encoded(caption)
            self._room -= found.nbytes
        self._drawn[caption] = found
        while self._room < 0 and len(self._drawn) > 1:
            self._room += self._drawn.popitem(last=False)[1].nbytes
        return found

    def _key(self, caption: str) -> str:
        """All that a condition follows from; token ids stand for the tokenizers and their padding."""
        clip_skip, tokens = self._how
        encoders = self._base.family.text_encoders
        tokenizers = (self._base.tokenizers[encoder.part] for encoder in encoders)
        ids = [token_chunks(tokenizer, caption, tokens // CHUNK).tolist() for tokenizer in tokenizers]
        numbers = (self._base.device.type, self._base.dtype)
        return short_digest(self._encoders, encoders, ids, clip_skip, *numbers)

    def _encoded(self, caption: str) -> PromptEmbeds:
        """One at a time, on the CPU, so that its bits never depend on its neighbours."""
        with torch.no_grad():
            return encode_prompt(self._base, [caption], *self._how).to(torch.device("cpu"))


def _tensors(condition: PromptEmbeds) -> dict[str, torch.Tensor]:
    pooled = {} if condition.pooled is None else {"pooled": condition.pooled}
    return {"value": condition.context, **pooled}


def load_or_compute(path: Path, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors of a cache file, which is made where it is not there or not whole.

    Args:
        path: the file.
        make: gives the tensors, one of them named "value".
    """
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            if "value" in found and (file.metadata() or {}).get(DIGEST) == _tensors_hash(found):
                return found
    except (OSError, SafetensorError):
        pass
    made = {name: tensor.contiguous() for name, tensor in make().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save(made, {DIGEST: _tensors_hash(made)}))
    return made


def _tensors_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def short_digest(*values: object) -> str:
    """A short text that differs where any of the values does, as a name for what follows from them."""
    return hashlib.sha256("\n".join(map(str, values)).encode()).hexdigest()[:32]


# Which pictures and captions make up the n-th micro-batch: a pure function of (seed, n).
#
# Nothing here has a state, so that a resume at any step sees the pictures, captions and mirrorings of an
# unbroken run.


@dataclass(frozen=True)
class TrainImage:
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
class BatchSettings:
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


def assign_buckets(records: list[ImageRecord], resolution: int, multiple: int) -> list[TrainImage]:
    """Each picture with its bucket.

    Raises:
        DatasetError: there is no picture.
    """
    if not records:
        raise DatasetError("No picture is left to train on; add pictures or hold fewer of them out.")
    return [TrainImage(r, choose_bucket(r.width, r.height, resolution, multiple)) for r in records]


class Batches:
    """All micro-batches of a run, by number."""

    def __init__(self, items: list[TrainImage], looks: BatchSettings, cache: LatentCache) -> None:
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

    def _look(self, number: int, row: int, index: int) -> tuple[torch.Tensor, str, TrainImage]:
        draw = random.Random(f"{self._looks.seed}/look/{number}/{row}")
        item = self._items[index]
        flip = self._looks.flip and draw.random() < 0.5
        caption = sample_caption(item.record.caption, self._looks.captions, draw)
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


def all_views(items: list[TrainImage], flip: bool) -> list[tuple[TrainImage, bool]]:
    """Every (item, flip) that a run can ask for: what to encode before the first step."""
    return [(item, mirrored) for item in items for mirrored in ((False, True) if flip else (False,))]
