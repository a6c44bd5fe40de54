"""Latents and text conditions, encoded once and kept on disk by the hash of everything that they follow from.

A changed picture, VAE, bucket or caption has another key, so nothing is ever stale. Each file holds the hash
of its numbers; one that is broken in any way is made anew. Captions that are drawn at random (shuffled tags,
tag dropout, alternatives) rarely come again: they are encoded as they come and kept in memory only, up to a
limit.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lora_core.dataset.buckets import Bucket
from lora_core.dataset.captions import CHUNK
from lora_core.dataset.folder import ImageRecord
from lora_core.dataset.pictures import content_hash
from lora_core.models.encode import (
    TextCondition,
    as_negative,
    encoded_picture,
    text_condition,
    token_chunks,
)
from lora_core.models.images import picture_pixels
from lora_core.models.load import BaseModel
from lora_core.spec.paths import write_atomically
from lora_core.spec.room import DRAWN_CAPTIONS_BYTES

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
            name = digest_of(content_hash(record.path), self._vae, bucket.width, bucket.height, flip, device)
            self._memory[key] = from_disk_or(
                self._folder / f"{name}.safetensors",
                lambda: {"value": encoded_picture(self._base, picture_pixels(record, bucket, flip))},
            )["value"]
        return self._memory[key]


class TextSource:
    """Text conditions of captions: live while the text encoder is trained, else encoded once and cached."""

    def __init__(self, base: BaseModel, folder: Path, trained: bool, clip_skip: int, tokens: int) -> None:
        """Keep files below `folder` where the encoder is not `trained`."""
        self._base = base
        self._folder = folder
        self._trained = trained
        self._how = (clip_skip, tokens)
        self._fixed: dict[str, TextCondition] = {}
        self._drawn: OrderedDict[str, TextCondition] = OrderedDict()
        self._room = DRAWN_CAPTIONS_BYTES
        self._encoders = "" if trained else "/".join(map(base.digest, base.text_encoders))

    def conditions(self, captions: list[str]) -> TextCondition:
        """The condition of B captions as they were drawn for a micro-batch, on the base's device."""
        if self._trained:
            return text_condition(self._base, captions, *self._how)
        return TextCondition.cat([self._of_drawn(caption) for caption in captions]).to(self._base.device)

    def condition(self, caption: str) -> TextCondition:
        """The condition of one caption that comes again, B = 1, on the base's device; it is kept on disk."""
        if self._trained:
            return text_condition(self._base, [caption], *self._how)
        if caption not in self._fixed:
            path = self._folder / f"{self._key(caption)}.safetensors"
            found = from_disk_or(path, lambda: _tensors(self._encoded(caption)))
            self._fixed[caption] = TextCondition(found["value"], found.get("pooled"))
        return self._fixed[caption].to(self._base.device)

    def negative(self) -> TextCondition:
        """The condition of an empty negative prompt, B = 1."""
        return as_negative(self._base, "", self.condition(""))

    def release(self) -> None:
        """Free the text encoders: every caption that can come up is in memory now."""
        self._base.text_encoders.clear()

    def _of_drawn(self, caption: str) -> TextCondition:
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
        return digest_of(self._encoders, encoders, ids, clip_skip, *numbers)

    def _encoded(self, caption: str) -> TextCondition:
        """One at a time, on the CPU, so that its bits never depend on its neighbours."""
        with torch.no_grad():
            return text_condition(self._base, [caption], *self._how).to(torch.device("cpu"))


def _tensors(condition: TextCondition) -> dict[str, torch.Tensor]:
    pooled = {} if condition.pooled is None else {"pooled": condition.pooled}
    return {"value": condition.context, **pooled}


def from_disk_or(path: Path, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
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


def digest_of(*values: object) -> str:
    """A short text that differs where any of the values does, as a name for what follows from them."""
    return hashlib.sha256("\n".join(map(str, values)).encode()).hexdigest()[:32]
