"""Merges adapters into a base on disk: a diffusers folder or a single file, copied with its weights changed.

A file is copied tensor by tensor. Where adapters change a tensor it becomes W0 + sum of s delta, summed in
fp32 as `lora/inject.Merger` does and rounded once to the tensor's own dtype; everything else, names, order
and offsets in the file included, is copied byte for byte. At most one tensor is in memory at a time.
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

from lora_core.errors import AdapterFileError, ModelFileError
from lora_core.formats.io import as_bytes, encode_header
from lora_core.generate.request import WeightedLora
from lora_core.lora.weights import LayerKey
from lora_core.model_files.header import Header, read_header
from lora_core.models.weight_files import THIRDS, SafetensorsFile, TensorSource
from lora_core.system.files import sync_folder
from lora_core.tools.delta import BaseWeights, Update
from lora_core.tools.merge import (
    MERGED_KEY,
    BlockWeights,
    LoraFile,
    extras_sentences,
    file_rows,
    files_words,
    parse_block_weights,
    read_files,
)

Term = tuple[float, Update]
"""A strength, and the update that it multiplies."""
STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
"""Metadata that is no longer true once a tensor has changed."""
_OTHER_WEIGHTS = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".onnx", ".h5")
_TEXTS = (".json", ".md", ".txt")
_CHUNK = 2**22


@dataclass(frozen=True)
class TensorEdit:
    """A change of one tensor, or of a part of it."""

    source: TensorSource
    terms: list[Term]


TensorEdits = dict[Path, dict[str, list[TensorEdit]]]
"""File to tensor name to its changes."""


def merge_files_into_base(
    loras: Sequence[WeightedLora], base_name: str, out: Path, blocks: str = ""
) -> list[str]:
    """Write a copy of a base with adapter files merged into it, LoHa, LoKr and DoRA exactly.

    Args:
        loras: the files.
        base_name: a folder, a file or a hub id.
        out: the file or folder to make; it must not exist.
        blocks: the text of `--blocks`, or "".

    Returns:
        What was done, in sentences.

    Raises:
        AdapterFileError: a layer is not in this base or has another shape, or nothing would change.
        ModelFileError: the base cannot be read, the result overflows its dtype, or `out` cannot be written.
    """
    base = BaseWeights(base_name)
    if out.exists():
        raise AdapterFileError(f"{out} exists already; choose another name or remove it first.")
    if base.single != (out.suffix.lower() == ".safetensors"):
        kind = (
            "file, so --out should end in .safetensors"
            if base.single
            else "folder, so --out should be one too"
        )
        raise AdapterFileError(f"The base {base.path} is a {kind}; {out} does not fit.")
    files = read_files(loras, base.family)
    texts = {
        MERGED_KEY: json.dumps(file_rows(files)),
        "modelspec.merged_from": ", ".join([base.path.stem, *(file.path.stem for file in files)]),
    }
    terms = _terms(files, parse_block_weights(blocks, len(files)))
    _write(base, _edits(base, terms), out, texts)
    return [*extras_sentences(loras), f"{len(terms)} layers of the base changed by {files_words(files)}."]


def _write(base: BaseWeights, edits: TensorEdits, out: Path, texts: Mapping[str, str]) -> None:
    """Write the copy, completely or not at all."""
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


def _terms(files: Sequence[LoraFile], blocks: BlockWeights) -> dict[LayerKey, list[Term]]:
    blocks.check(dict.fromkeys(key for file in files for key in file.updates))
    terms: dict[LayerKey, list[Term]] = {}
    for number, file in enumerate(files):
        for key, update in file.updates.items():
            strength = file.lora.on(key[0]) * blocks.weight(key, number)
            if strength != 0:
                terms.setdefault(key, []).append((strength, update))
    if not terms:
        raise AdapterFileError("With these strengths and weights nothing of the base would change.")
    return terms


def _edits(base: BaseWeights, terms: Mapping[LayerKey, list[Term]]) -> TensorEdits:
    """The changes of each tensor, once all layers have been found and fit."""
    missing = [key for key in terms if not base.places(key)]
    if missing:
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise AdapterFileError(
            f"The adapter has layers that the base {base.path} lacks, {'.'.join(missing[0])}{more}; it is"
            " for another base."
        )
    edits: TensorEdits = {}
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
            tensors = edits.setdefault(source.file.path, {})
            tensors.setdefault(source.key, []).append(TensorEdit(source, changes))
    return edits


def _shape(source: TensorSource) -> torch.Size:
    shape = list(source.file.shapes[source.key])
    if source.third is not None:
        shape[0] //= THIRDS
    return torch.Size(shape[::-1] if source.transposed else shape)


def _write_file(
    source: Path, target: Path, edits: Mapping[str, list[TensorEdit]], texts: Mapping[str, str]
) -> None:
    """Copy a safetensors file with some tensors changed, flush it to the disk, and read it back."""
    header = read_header(source, ModelFileError)
    metadata = {key: text for key, text in header.metadata.items() if key not in STALE} | dict(texts)
    start = encode_header(header.tensors, metadata)
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


def _pieces(
    source: Path, header: Header, edits: Mapping[str, list[TensorEdit]]
) -> Iterator[bytes | memoryview]:
    """The tensor bytes of a file in their order, changed where there is an edit."""
    weights = SafetensorsFile(source)
    with open(source, "rb") as file:
        for name in sorted(header.tensors, key=lambda name: header.tensors[name]["data_offsets"]):
            if name in edits:
                changed = _edit_tensor(weights.tensor(name), edits[name], f"{source}: the tensor {name}")
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


def _edit_tensor(tensor: torch.Tensor, edits: Sequence[TensorEdit], name: str) -> torch.Tensor:
    """W0 + sum of s delta in fp32, rounded to the tensor's own dtype."""
    if not tensor.is_floating_point():
        raise ModelFileError(f"{name} has an integer dtype, into which nothing can be merged.")
    full = tensor.float().clone()
    for edit in edits:
        rows = full if edit.source.third is None else full.chunk(THIRDS)[edit.source.third]
        weight = rows.t() if edit.source.transposed else rows
        merged = weight
        for strength, update in edit.terms:
            merged = merged + strength * update.delta(weight).reshape(weight.shape)
        weight.copy_(merged)
    rounded = full.to(tensor.dtype)
    if not torch.isfinite(rounded.float()).all():
        reason = "more than its dtype can" if torch.isfinite(full).all() else "NaN or infinity"
        raise ModelFileError(
            f"{name} would hold {reason}; lower the strength, or take a base in fp32 or bf16."
        )
    return rounded


def _write_folder(source: Path, target: Path, edits: TensorEdits, texts: Mapping[str, str]) -> None:
    """Copy a diffusers folder with some weight files changed.

    At the top only what `model_index.json` lists is copied, and texts. In changed parts, weights in other
    formats would be those of the unchanged base, and are left out.
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
    """Copy the wanted files of a folder. Unlike `shutil.copytree`, it stops at the first error."""
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
