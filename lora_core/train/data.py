"""Micro-batches of a run, and the latents and prompt embeddings that they need.

Which images and captions make up micro-batch n is a pure function of (seed, n), so a resume sees what an
unbroken run would. Latents and the embeddings of fixed captions are encoded once and kept on disk under a
hash of everything that they depend on, so nothing is ever stale; a damaged file is computed again. Captions
that are drawn at random rarely come again: their embeddings are kept in memory only, up to a limit.
"""

import random
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lora_core.data.captions import CHUNK, Prompt, rules_of, sample_record_caption
from lora_core.data.images import Bucket, ImageRecord, hash_file, size_conditioning
from lora_core.evaluate.validator import encode_view, identify_view
from lora_core.model_files.sizes import DRAWN_CAPTIONS_BYTES
from lora_core.models.encode import encode_batches, encode_prompt
from lora_core.models.load import BaseModel
from lora_core.models.prompts import as_negative_prompt, encode_weighted, parse_prompts, weighted_chunks
from lora_core.models.unet import PromptEmbeds
from lora_core.models.weight_files import load_or_compute, short_digest
from lora_core.settings.schema import DatasetSection

AHEAD = 64
"""Captions that are encoded together where text encoders have to be moved to the device for it."""


@dataclass(frozen=True)
class TrainImage:
    """An image with the bucket that it is trained in, what each of its latents counts in the loss, (1, h, w),
    or None for 1, and the variants of which each look shows one, if it is not always the same."""

    record: ImageRecord
    bucket: Bucket
    weights: torch.Tensor | None = field(default=None, compare=False)
    variants: "tuple[TrainImage, ...]" = field(default=(), compare=False)

    def sizes(self, mirrored: bool = False) -> torch.Tensor:
        """(6,), see `size_conditioning`."""
        sizes = size_conditioning(self.record.width, self.record.height, self.bucket, mirrored)
        return torch.tensor(sizes, dtype=torch.float32)


@dataclass(frozen=True)
class Batch:
    """One micro-batch: `latents` (B, 4, h, w), B drawn captions, B file names for messages, `sizes` (B, 6),
    see `size_conditioning`, and `weights` of the latents in the loss, (B, 1, h, w), or None for 1; tensors
    are on the CPU."""

    latents: torch.Tensor
    captions: list[str]
    names: list[str]
    sizes: torch.Tensor
    weights: torch.Tensor | None = field(default=None, kw_only=True)


class Batches:
    """All micro-batches of a run, by number."""

    def __init__(
        self, images: list[TrainImage], cache: "LatentCache", rules: DatasetSection, batch_size: int,
        seed: int,
    ) -> None:  # fmt: skip
        """Draw `batch_size` images of one bucket, mirrored or not, and a caption for each, by the settings
        `rules` and what the images' concepts have in their place; all draws follow from `seed`."""
        self._images = images
        self._cache = cache
        self._rules = rules
        self._batch_size = batch_size
        self._seed = seed
        self._epoch: tuple[int, list[list[int]]] = (-1, [])
        self._batches_per_epoch = len(self._epoch_batches(0))

    def batch(self, number: int) -> Batch:
        """Micro-batch `number`, counted from 0 over the run."""
        rows = self._rows(number)
        latents = [self._cache.latents(item.record, item.bucket, flip) for item, flip, _ in rows]
        names, captions = ([item.record.path.name for item, _, _ in rows], [caption for *_, caption in rows])
        sizes = torch.stack([item.sizes(flip) for item, flip, _ in rows])
        weights = None
        if any(item.weights is not None for item, _, _ in rows):
            all_count = torch.ones_like(latents[0][:1])
            given = [(all_count if item.weights is None else item.weights, flip) for item, flip, _ in rows]
            weights = torch.stack([one.flip(-1) if flip else one for one, flip in given])
        return Batch(torch.stack(latents), captions, names, sizes, weights=weights)

    def captions(self, number: int) -> list[str]:
        """The captions of micro-batch `number`."""
        return [caption for _, _, caption in self._rows(number)]

    def heaviest(self) -> int:
        """The number of a micro-batch of the largest bucket."""
        epoch = self._epoch_batches(0)
        sizes = [self._images[indices[0]].bucket for indices in epoch]
        return max(range(len(epoch)), key=lambda number: sizes[number].width * sizes[number].height)

    def _rows(self, number: int) -> list[tuple[TrainImage, bool, str]]:
        """(image, mirrored, caption) for each row of a micro-batch."""
        epoch, place = divmod(number, self._batches_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._epoch_batches(epoch))
        rows = []
        for row, index in enumerate(self._epoch[1][place]):
            draw = random.Random(f"{self._seed}/look/{number}/{row}")
            item = self._images[index]
            flip = rules_of(item.record, self._rules).flip and draw.random() < 0.5
            caption = sample_record_caption(item.record, self._rules, draw)
            rows.append((draw.choice(item.variants) if item.variants else item, flip, caption))
        return rows

    def _epoch_batches(self, epoch: int) -> list[list[int]]:
        """One epoch: each image as often as it repeats, cut into batches of one bucket in random order. A
        short last batch is filled from the start of its bucket, so that all steps weigh the same."""
        draw = random.Random(f"{self._seed}/epoch/{epoch}")
        by_bucket: dict[tuple[int, int], list[int]] = {}
        for index, item in enumerate(self._images):
            sides = item.bucket.width, item.bucket.height
            by_bucket.setdefault(sides, []).extend([index] * item.record.repeats)
        batches = []
        size = self._batch_size
        for indices in by_bucket.values():
            draw.shuffle(indices)
            for start in range(0, len(indices), size):
                rows = indices[start : start + size]
                batches.append([rows[i] if i < len(rows) else indices[i % len(indices)] for i in range(size)])
        draw.shuffle(batches)
        return batches


class LatentCache:
    """Latents of (image, bucket, flip), in memory for this run and on disk for the next."""

    def __init__(self, base: BaseModel, folder: Path) -> None:
        """Keep files below `folder`."""
        self._base = base
        self._folder = folder
        self._vae = base.digest("vae")
        self._memory: dict[tuple[object, ...], torch.Tensor] = {}

    def latents(self, record: ImageRecord, bucket: Bucket, flip: bool, mask: int = 0) -> torch.Tensor:
        """(4, h, w) in fp32 on the CPU, or what an inpainting base sees of an image with a mask, see
        `encode_view`.

        Raises:
            DatasetError: the image is not cached and cannot be read.
        """
        key = (record.path, record.crop, bucket, flip, mask)
        if key not in self._memory:
            # Devices round differently, so each has latents of its own.
            sizes = (bucket.width, bucket.height, flip, self._base.vae.device.type)
            name = short_digest(
                hash_file(record.path), self._vae, *sizes, *identify_view(record, bucket, mask)
            )
            self._memory[key] = load_or_compute(
                self._folder / f"{name}.safetensors",
                lambda: {"value": encode_view(self._base, record, bucket, flip, mask)},
            )["value"]
        return self._memory[key]


class PromptCache:
    """Embeddings of captions: computed each time while a text encoder is trained, else once and cached."""

    def __init__(self, base: BaseModel, folder: Path, trained: bool, clip_skip: int, tokens: int) -> None:
        """Keep files below `folder` where the encoder is not `trained`."""
        self._base = base
        self._folder = folder
        self._trained = trained
        self._options = (clip_skip, tokens)
        self._fixed: dict[object, PromptEmbeds] = {}
        self._random: OrderedDict[str, PromptEmbeds] = OrderedDict()
        self._room = DRAWN_CAPTIONS_BYTES
        self._encoders = "" if trained else "/".join(map(base.digest, base.text_encoders))

    def embed_batch(self, captions: list[str]) -> PromptEmbeds:
        """Embed the B captions of a micro-batch, on the base's device."""
        if self._trained:
            return encode_prompt(self._base, captions, *self._options)
        return PromptEmbeds.cat([self._embed_random(caption) for caption in captions]).to(self._base.device)

    def embed_ahead(self, batches: Batches, number: int) -> None:
        """Where the text encoders wait on the CPU: embed the captions of micro-batch `number` and of some
        after it, moving each encoder once."""
        kind = self._base.device.type
        if all(next(one.parameters()).device.type == kind for one in self._base.text_encoders.values()):
            return
        wanted = self._unknown(batches.captions(number))
        if not wanted:
            return
        for ahead in range(number + 1, number + AHEAD):
            if len(wanted) < AHEAD:
                wanted |= self._unknown(batches.captions(ahead))
        with torch.no_grad():
            found = encode_batches(self._base, [[caption] for caption in wanted], *self._options)
        for caption, embeds in zip(wanted, found, strict=True):
            self._keep_random(caption, embeds.to(torch.device("cpu")))

    def embed(self, caption: str) -> PromptEmbeds:
        """Embed one fixed caption, B = 1, on the base's device; kept on disk."""
        return self._embed_fixed(caption, self._options[1])

    def embed_prompts(self, prompt: str, negative: str = "") -> tuple[PromptEmbeds, PromptEmbeds]:
        """Embed the prompts of a sample, which may have weights, as `embed` does."""
        parsed, length = parse_prompts(self._base, (prompt, negative), self._options[1])
        text, without = (self._embed_fixed(one, length) for one in parsed)
        return text, as_negative_prompt(self._base, negative, without)

    def embed_negative(self) -> PromptEmbeds:
        """Embed the empty negative prompt, B = 1."""
        return as_negative_prompt(self._base, "", self.embed(""))

    def _embed_fixed(self, caption: str | Prompt, tokens: int) -> PromptEmbeds:
        options = (self._options[0], tokens)
        if self._trained:
            return encode_weighted(self._base, [caption], *options)
        known = caption if options == self._options else (caption, tokens)
        if known not in self._fixed:
            path = self._folder / f"{self._key(caption, *options)}.safetensors"
            found = load_or_compute(path, lambda: _tensors(self._encode(caption, *options)))
            self._fixed[known] = PromptEmbeds(found["value"], found.get("pooled"))
        return self._fixed[known].to(self._base.device)

    def release(self) -> None:
        """Free the text encoders: every caption that can come up is in memory now."""
        self._base.text_encoders.clear()

    def _embed_random(self, caption: str) -> PromptEmbeds:
        if caption in self._fixed:
            return self._fixed[caption]
        if caption not in self._random:
            self._keep_random(caption, self._encode(caption, *self._options))
        self._random.move_to_end(caption)
        return self._random[caption]

    def _keep_random(self, caption: str, embeds: PromptEmbeds) -> None:
        self._random[caption] = embeds
        self._room -= embeds.nbytes
        while self._room < 0 and len(self._random) > 1:
            self._room += self._random.popitem(last=False)[1].nbytes

    def _unknown(self, captions: list[str]) -> dict[str, None]:
        return {one: None for one in captions if one not in self._fixed and one not in self._random}

    def _key(self, caption: str | Prompt, clip_skip: int, tokens: int) -> str:
        """A hash of all that embeddings depend on; token ids represent the tokenizers and their padding."""
        encoders = self._base.family.text_encoders
        tokenizers = [self._base.tokenizers[encoder.part] for encoder in encoders]
        chunks = tokens // CHUNK
        found = [weighted_chunks(tokenizer, caption, chunks) for tokenizer in tokenizers]
        ids = [each.tolist() for each, _ in found]
        numbers = (self._base.device.type, self._base.dtype)
        weights = [] if found[0][1] is None else [found[0][1].tolist()]
        return short_digest(self._encoders, encoders, ids, clip_skip, *numbers, *weights)

    def _encode(self, caption: str | Prompt, clip_skip: int, tokens: int) -> PromptEmbeds:
        """One at a time, so that its bits never depend on its neighbours."""
        with torch.no_grad():
            if isinstance(caption, str):
                found = encode_prompt(self._base, [caption], clip_skip, tokens)
            else:
                found = encode_weighted(self._base, [caption], clip_skip, tokens)
        return found.to(torch.device("cpu"))


def _tensors(embeds: PromptEmbeds) -> dict[str, torch.Tensor]:
    return {"value": embeds.context} | ({} if embeds.pooled is None else {"pooled": embeds.pooled})
