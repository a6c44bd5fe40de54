"""The form that a family's layers have: linear, or a convolution of a certain size.

Some tools write a 1 x 1 convolution as a linear layer, which means the same and which others refuse; and some
kinds of adapters flatten convolutions, so that their files do not say the size.
"""

import contextlib
import hashlib
import importlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lora_core.errors import AdapterFileError
from lora_core.formats import detect
from lora_core.formats.layers import Tensors, check_finite
from lora_core.formats.layout import family_layout
from lora_core.formats.peft import with_config_beside
from lora_core.lora.weights import AdapterWeights, LayerKey, LayerWeights
from lora_core.model_files.families import Family
from lora_core.model_files.header import Header, read_header
from lora_core.model_files.unsupported import other_family
from lora_core.models.weight_files import DTYPES, PRECISIONS, SafetensorsFile
from lora_core.settings.choices import FORMATS, chosen
from lora_core.system.paths import sync_folder


def kernel_of(layer: LayerKey, family: Family) -> tuple[int, ...] | None:
    """(height, width) of a layer's kernel, () of a linear one, None for a layer that the family lacks."""
    shape = family_layout(family).get(layer)
    return None if shape is None else tuple(shape[2:])


def in_own_form(weights: AdapterWeights, family: Family) -> AdapterWeights:
    """The adapter with its 1 x 1 convolutions and linear layers as the family has them; no number changes."""
    layers = {key: _formed(layer, kernel_of(key, family)) for key, layer in weights.layers.items()}
    return AdapterWeights(layers, weights.metadata)


def _formed(layer: LayerWeights, kernel: tuple[int, ...] | None) -> LayerWeights:
    if layer.down.dim() == 2 and kernel == (1, 1):
        return replace(layer, down=layer.down[..., None, None], up=layer.up[..., None, None])
    if layer.down.dim() == 4 and kernel == () and layer.down.shape[2:] == (1, 1):
        return replace(layer, down=layer.down.flatten(1), up=layer.up.flatten(1))
    return layer


# The safetensors container: read without trust, written so that equal contents give equal bytes.
#
# The header is written here and not by the safetensors package, whose order of metadata differs from one
# save to the next. `model_files/header.py` checks each claim of a header before a tensor is read.


_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors and the metadata of a safetensors file. Nothing in a file is ever executed.

    Raises:
        AdapterFileError: one sentence on what is wrong with the file.
    """
    header = read_header(path)
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in header.tensors}, header.metadata
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise AdapterFileError(f"{path} cannot be read: {error}.") from error


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's numbers as they stand in a file, as a flat tensor of bytes."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def encoded_header(entries: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a safetensors file: its length, then the header, padded so that tensors are
    aligned."""
    header: dict[str, Any] = {}
    if metadata:
        # A lone surrogate, as from a badly decoded file name, would make the header unreadable for other
        # tools.
        header["__metadata__"] = {
            key: metadata[key].encode("utf-8", "replace").decode("utf-8") for key in sorted(metadata)
        }
    raw = json.dumps(header | dict(entries), separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def pieces(tensors: Tensors, metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """A safetensors file piece by piece, the header first; the same contents always give the same bytes.

    Tensors are ordered by the size of their numbers and then by name, so that each is aligned.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    entries, end = {}, 0
    for name in order:
        tensor = tensors[name]
        offsets = [end, end + tensor.numel() * tensor.dtype.itemsize]
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        end = offsets[1]
    yield encoded_header(entries, metadata)
    for name in order:
        yield as_bytes(tensors[name]).numpy().data


def write_pieces(path: Path, data: Iterable[bytes | memoryview]) -> None:
    """Write a file and see it onto the disk; for drafts, which are renamed once they have been checked."""
    with open(path, "wb") as file:
        for piece in data:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def header_hashes(tensors: Tensors, metadata: Mapping[str, str]) -> dict[str, str]:
    """The two hashes that tools expect in a file's header.

    `sshs_model_hash` is the SHA-256 of the tensor bytes alone. `sshs_legacy_hash` is A1111's old one: 64 KiB
    from 1 MiB on, of the file with nothing but `ss_` keys in its header (so that later edits do not change
    it).
    """
    whole, window, start = hashlib.sha256(), hashlib.sha256(), 0
    kept = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    for number, piece in enumerate(pieces(tensors, kept)):
        if number:
            whole.update(piece)
        window.update(piece[max(0, 0x100000 - start) : max(0, 0x110000 - start)])
        start += len(piece)
    return {"sshs_model_hash": whole.hexdigest(), "sshs_legacy_hash": window.hexdigest()[:8]}


def file_hashes(path: Path) -> dict[str, Any]:
    """The hashes by which people and sites know a file.

    Returns:
        `sha256` of the whole file, `autov2` (its first 10 digits), `autov3` (the first 12 of the tensor
        bytes' hash), and `hash_matches`: whether the header's own hash is right, None if it has none.

    Raises:
        AdapterFileError: one sentence on what is wrong with the file.
    """
    header = read_header(path)
    whole, data = hashlib.sha256(), hashlib.sha256()
    try:
        with open(path, "rb") as file:
            whole.update(file.read(header.start))
            while chunk := file.read(2**20):
                whole.update(chunk)
                data.update(chunk)
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be read: {error.strerror or error}.") from error
    claimed = header.metadata.get("sshs_model_hash")
    return {
        "sha256": whole.hexdigest(),
        "autov2": whole.hexdigest()[:10],
        "autov3": data.hexdigest()[:12],
        "hash_matches": None if claimed is None else claimed.lower().removeprefix("0x") == data.hexdigest(),
    }


# Adapter files on disk: reading one of any known format, and writing one whole or not at all.


__all__ = ["file_hashes", "read_adapter", "read_tensors", "write_adapter"]

AS_IT_IS = "as it is"
"""In place of a precision: each tensor keeps its own."""

TURNED_PLAIN = ("LoHa", "LoKr", "DoRA")
"""Kinds of adapters that `tools/combine.py` makes plain LoRAs of."""

_OWN_KEYS = {
    "lora_adapter_metadata",
    "sshs_model_hash",
    "sshs_legacy_hash",
    "modelspec.hash_sha256",
    "format",
}
"""What the writer alone decides on, whatever the header that it is given says."""


def read_adapter(path: Path, family: Family | None = None) -> AdapterWeights:
    """The adapter in a file of any known format.

    Args:
        path: a .safetensors file.
        family: the base's, if the adapter is to be used with one.

    Raises:
        AdapterFileError: the file is broken, holds no plain LoRA, holds numbers that are not finite, or is
            for another family.
    """
    header = read_header(path)
    shapes = header.shapes
    kind = detect.kind_of(shapes)
    if kind != "unknown":
        check_family(path, header)
    if kind not in (detect.LORA, detect.LOCON):
        what = detect.called(kind, shapes) + ("" if kind == "unknown" else ", not a plain LoRA")
        raise AdapterFileError(f"{path} cannot be used: it is {what}.{merge_offer(path, kind)}")
    tensors, texts = read_tensors(path)
    metadata = with_config_beside(path, tensors, texts)
    translator = next((m for m in map(_translator, FORMATS) if m.matches(tensors)), None)
    if translator is None:
        raise AdapterFileError(f"{path} cannot be used: its tensors are named like no known format.")
    other = detect.mismatch(shapes, metadata, family) if family else ""
    if family and other:
        raise AdapterFileError(f"{path} is for {other}, the base is the {family.title}.")
    try:
        weights = translator.from_file(tensors, metadata)
        check_finite(weights)
    except AdapterFileError as error:
        raise AdapterFileError(f"{path} cannot be used. {error}") from error
    extra = [part for part in weights.parts() if family and part not in family.parts]
    if family and extra:
        raise AdapterFileError(f"{path} adapts {', '.join(extra)}, which the {family.title} does not have.")
    assert isinstance(weights, AdapterWeights)
    return weights


def check_family(path: Path, header: Header) -> None:
    """Refuse an adapter of a family that cannot be used here, by its name.

    Raises:
        AdapterFileError: it is of such a family.
    """
    other = other_family(header.shapes, header.metadata)
    if other:
        raise AdapterFileError(
            f"{path} is for {other}, which cannot be used here: only Stable Diffusion 1.x, 2.x and XL can."
        )


def merge_offer(path: Path, kind: str) -> str:
    """What to do with a file of a kind that can become a plain LoRA, as a sentence, or "" for the others."""
    if kind not in TURNED_PLAIN:
        return ""
    base = " --base BASE" if kind == "DoRA" else ""
    return f" `lora-easel merge {path.name} --out NEW.safetensors --rank 32{base}` makes a plain LoRA of it."


def _translator(name: str) -> ModuleType:
    """The module behind a row of `FORMATS`: to_file, header, from_file and matches."""
    return importlib.import_module(FORMATS[name].load.partition(":")[0])


def write_adapter(
    weights: AdapterWeights,
    path: Path,
    format: str,
    precision: str,
    family: Family,
    header: Mapping[str, str],
    keep_alphas: bool = False,
) -> None:
    """Write an adapter file, whole or not at all, and read it back before calling it done.

    Args:
        weights: what to write.
        path: the file; an existing one is replaced.
        format: a row of `FORMATS`.
        precision: "fp32", "fp16", "bf16" or `AS_IT_IS`.
        family: whose names to use.
        header: texts for the header, as from `metadata.export_metadata`; what follows from the weights is
        added.
        keep_alphas: see `kohya.to_file`.

    Raises:
        AdapterFileError: the weights are not finite or do not fit the precision, the file cannot be written,
            or what was read back differs from what was meant.
    """
    chosen(FORMATS, format, "format")
    if precision not in (*PRECISIONS, AS_IT_IS):
        raise AdapterFileError(
            f"{precision!r} is no precision of a file; choose one of {', '.join(PRECISIONS)}."
        )
    check_finite(weights)
    translator = _translator(format)
    tensors = {
        name: tensor if name.endswith(".alpha") else _cast(name, tensor, precision)
        for name, tensor in translator.to_file(weights, family, keep_alphas).items()
    }
    texts = {key: value for key, value in header.items() if key not in _OWN_KEYS}
    texts |= translator.header(weights, family)
    texts |= header_hashes(tensors, texts)
    path = Path(path)
    # Beside the final name until it has been read back, so that a good file is never replaced by a bad one.
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        write_pieces(draft, pieces(tensors, texts))
        _check_written(draft, tensors)
        os.replace(draft, path)
        sync_folder(path.parent)
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def _cast(name: str, tensor: torch.Tensor, precision: str) -> torch.Tensor:
    cast = tensor.detach().cpu().to(PRECISIONS.get(precision, tensor.dtype))
    if not torch.isfinite(cast).all():
        largest = float(tensor.abs().max())
        raise AdapterFileError(
            f"{name} holds {largest:.4g}, which is more than {precision} can hold; export as fp32 or bf16."
        )
    return cast


def _check_written(path: Path, meant: Tensors) -> None:
    file = SafetensorsFile(path)
    if file.shapes.keys() != meant.keys():
        raise AdapterFileError(
            f"{path} was read back with other tensors than were written; is the disk failing?"
        )
    for name, tensor in meant.items():
        found = file.tensor(name)
        same = found.dtype == tensor.dtype and found.shape == tensor.shape
        # As bytes, since NaN is unlike itself and -0.0 equals 0.0.
        if not same or not torch.equal(as_bytes(found), as_bytes(tensor)):
            raise AdapterFileError(f"{name} was read back from {path} changed; is the disk failing?")
