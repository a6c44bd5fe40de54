"""The safetensors container: read without trust, written so that equal contents give equal bytes.

The header is written here and not by the safetensors package, whose order of metadata differs from one save
to the next. `spec/tensor_file.py` checks each claim of a header before a tensor is read.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lora_core.formats.layers import Tensors
from lora_core.models.weight_files import DTYPES
from lora_core.spec.errors import AdapterFileError
from lora_core.spec.tensor_file import read_header

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
