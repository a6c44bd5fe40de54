"""Adapters merged into a base on disk: a diffusers folder or a single file, written anew beside the old one.

A file is copied tensor by tensor. Where adapters change a tensor it becomes W0 + sum of s delta, summed in
fp32 as `adapters/inject.Merger` does and rounded once to the tensor's own number type; everything else,
names, order and places in the file included, is copied byte for byte. At most one tensor is in memory at a
time.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_core.adapters.weights import LayerKey
from lora_core.analysis.base_weights import BaseWeights
from lora_core.analysis.blocks import Blocks
from lora_core.analysis.updates import Update, Updates
from lora_core.formats.container import as_bytes, encoded_header
from lora_core.models.sources import THIRDS, Source
from lora_core.models.weight_files import SafetensorsFile
from lora_core.spec.errors import AdapterFileError, ModelFileError
from lora_core.spec.paths import sync_folder
from lora_core.spec.tensor_file import Header, read_header

Term = tuple[float, Update]
"""A strength, and what it multiplies."""

STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
"""Texts of a header that are no longer true once a tensor has changed."""
_OTHER_WEIGHTS = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".onnx", ".h5")
_TEXTS = (".json", ".md", ".txt")
_CHUNK = 2**22


@dataclass(frozen=True)
class Edit:
    """A change of one tensor, or of a part of it."""

    source: Source
    terms: list[Term]


Edits = dict[Path, dict[str, list[Edit]]]
"""File to tensor name to what is done to it."""


def merge_into_base(
    base: BaseWeights,
    adapters: Sequence[tuple[Updates, float, float]],
    out: Path,
    texts: Mapping[str, str],
    blocks: Blocks | None = None,
) -> int:
    """Write a copy of a base with adapters merged into it, whole or not at all.

    Args:
        base: where to merge.
        adapters: (updates, strength on the UNet, strength on the text encoders) for each.
        out: the file or the folder to make; it must not be there yet.
        texts: what the header of each changed file says in addition.
        blocks: weights of layers on top of the strengths.

    Returns:
        How many layers were changed.

    Raises:
        AdapterFileError: a layer is not in this base or has another shape, or nothing would change.
        ModelFileError: the result holds more than the base's number type can, or cannot be written.
    """
    terms = _terms(adapters, blocks or Blocks())
    edits = _edits(base, terms)
    draft = out.with_name(f".{out.name}.{os.getpid()}.draft")
    try:
        if base.single:
            _write_file(base.path, draft, edits.get(base.path, {}), texts)
        else:
            _write_folder(base.path, draft, edits, texts)
        os.rename(draft, out)
        sync_folder(out.parent)
    except OSError as error:
        raise ModelFileError(f"{out} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
    return len(terms)


def _terms(adapters: Sequence[tuple[Updates, float, float]], blocks: Blocks) -> dict[LayerKey, list[Term]]:
    blocks.check(dict.fromkeys(key for updates, *_ in adapters for key in updates))
    terms: dict[LayerKey, list[Term]] = {}
    for number, (updates, on_unet, on_text) in enumerate(adapters):
        for key, update in updates.items():
            strength = (on_unet if key[0] == "unet" else on_text) * blocks.weight(key, number)
            if strength != 0:
                terms.setdefault(key, []).append((strength, update))
    if not terms:
        raise AdapterFileError("With these strengths and weights nothing of the base would change.")
    return terms


def _edits(base: BaseWeights, terms: Mapping[LayerKey, list[Term]]) -> Edits:
    """What to do to each tensor, once all layers have been found and fit."""
    missing = [key for key in terms if not base.places(key)]
    if missing:
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise AdapterFileError(
            f"The adapter has layers that the base {base.path} has not, {'.'.join(missing[0])}{more}; it is"
            " for another base."
        )
    edits: Edits = {}
    for key, changes in terms.items():
        for source in base.places(key):
            shape = _shape(source)
            for _, update in changes:
                size = torch.Size(update.size)
                if size.numel() != shape.numel() or size[0] != shape[0]:
                    raise AdapterFileError(
                        f"The adapter's layer {update.name} has the shape {list(size)}, the base's"
                        f" {list(shape)}; it is for another base."
                    )
            edits.setdefault(source.file.path, {}).setdefault(source.key, []).append(Edit(source, changes))
    return edits


def _shape(source: Source) -> torch.Size:
    shape = list(source.file.shapes[source.key])
    if source.third is not None:
        shape[0] //= THIRDS
    return torch.Size(shape[::-1] if source.transposed else shape)


def _write_file(
    source: Path, target: Path, edits: Mapping[str, list[Edit]], texts: Mapping[str, str]
) -> None:
    """Copy a safetensors file with some tensors changed, see it onto the disk, and read it back."""
    header = read_header(source, ModelFileError)
    metadata = {key: text for key, text in header.metadata.items() if key not in STALE} | dict(texts)
    start = encoded_header(header.tensors, metadata)
    written = hashlib.sha256(start)
    with open(target, "wb") as file:
        file.write(start)
        for piece in _pieces(source, header, edits):
            file.write(piece)
            written.update(piece)
        file.flush()
        os.fsync(file.fileno())
    found = hashlib.sha256()
    with open(target, "rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    if found.digest() != written.digest() or read_header(target, ModelFileError).tensors != header.tensors:
        raise ModelFileError(f"{target} was read back changed; is the disk failing?")


def _pieces(source: Path, header: Header, edits: Mapping[str, list[Edit]]) -> Iterator[bytes | memoryview]:
    """The tensor bytes of a file in their order, changed where there is an edit."""
    weights = SafetensorsFile(source)
    with open(source, "rb") as file:
        for name in sorted(header.tensors, key=lambda name: header.tensors[name]["data_offsets"]):
            if name in edits:
                changed = _changed(weights.tensor(name), edits[name], f"{source}: the tensor {name}")
                yield as_bytes(changed).numpy().data
                continue
            first, last = header.tensors[name]["data_offsets"]
            file.seek(header.start + first)
            while first < last:
                chunk = file.read(min(_CHUNK, last - first))
                if not chunk:
                    raise ModelFileError(f"{source} has become shorter; is it still being written?")
                first += len(chunk)
                yield chunk


def _changed(tensor: torch.Tensor, edits: Sequence[Edit], name: str) -> torch.Tensor:
    """W0 + sum of s delta in fp32, rounded to the tensor's own type."""
    if not tensor.is_floating_point():
        raise ModelFileError(f"{name} holds whole numbers, into which nothing can be merged.")
    whole = tensor.float().clone()
    for edit in edits:
        rows = whole if edit.source.third is None else whole.chunk(THIRDS)[edit.source.third]
        weight = rows.t() if edit.source.transposed else rows
        merged = weight
        for strength, update in edit.terms:
            merged = merged + strength * update.delta(weight).reshape(weight.shape)
        weight.copy_(merged)
    rounded = whole.to(tensor.dtype)
    if not torch.isfinite(rounded.float()).all():
        reason = "more than its number type can" if torch.isfinite(whole).all() else "NaN or infinity"
        raise ModelFileError(
            f"{name} would hold {reason}; lower the strength, or take a base in fp32 or bf16."
        )
    return rounded


def _write_folder(source: Path, target: Path, edits: Edits, texts: Mapping[str, str]) -> None:
    """Copy a diffusers folder with some files of weights changed.

    At the top only what `model_index.json` lists is copied, and texts. In changed parts, weights in other
    formats would be those of the unchanged base, and stay behind.
    """
    changed = {path.parent for path in edits}
    parts = _parts(source) | {path.parent.name for path in edits}

    def wanted(path: Path) -> bool:
        if path.parent == source:
            return path.name in parts or path.suffix.lower() in _TEXTS
        if path.parent in changed:
            return path not in edits and not path.name.endswith(_OTHER_WEIGHTS)
        return True

    _copy_tree(source, target, wanted)
    for path, changes in edits.items():
        _write_file(path, target / path.relative_to(source), changes, texts)


def _copy_tree(source: Path, target: Path, wanted: Callable[[Path], bool]) -> None:
    """Copy what is wanted of a folder. Unlike `shutil.copytree`, it stops at the first error."""
    target.mkdir()
    for path in filter(wanted, source.iterdir()):
        if path.is_dir():
            _copy_tree(path, target / path.name, wanted)
        else:
            shutil.copyfile(path, target / path.name)


def _parts(folder: Path) -> set[str]:
    """The components that a diffusers folder lists."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFileError(
            f"{folder} has no readable model_index.json, so what to copy is unknown."
        ) from error
    return {"model_index.json", *index}
