"""The safetensors container: read without trust, written so that equal contents give equal bytes.

The header is written here and not by the safetensors package, whose order of metadata differs from one save
to the next. Reading checks each claim of the header first, so that a broken file gets one sentence and no
more memory than it has bytes. Format: https://github.com/huggingface/safetensors#format
"""

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lora_core.formats.layers import Tensors
from lora_core.spec.errors import AdapterFileError

MAX_HEADER = 16 * 2**20
"""Bytes. Real headers stay under 3 MB, even with the tags of a large dataset."""

_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_NOT_SAFETENSORS = (
    (b"PK\x03\x04", "a pickled torch file or a zip"),
    *((bytes((0x80, version)), "a pickled torch file, which can run code") for version in range(2, 6)),
    (b"<", "a web page: the download went wrong"),
    (b"version https://git-lfs", "a Git LFS pointer: the download went wrong"),
)


@dataclass(frozen=True)
class Header:
    """The checked header of a safetensors file.

    Attributes:
        tensors: name to dtype, shape and offsets, as in the file.
        metadata: the texts that the file carries.
        start: where the tensor bytes begin, in bytes.
    """

    tensors: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    start: int

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Name to shape."""
        return {name: entry["shape"] for name, entry in self.tensors.items()}


def read_header(path: Path) -> Header:
    """The header of a safetensors file, with each of its claims checked against the file.

    Raises:
        AdapterFileError: one sentence on what is wrong with the file.
    """
    path = Path(path)
    if path.is_dir():
        raise AdapterFileError(f"{path} is a folder; give the .safetensors file in it.")
    if not path.is_file():
        raise AdapterFileError(f"{path} does not exist.")
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(32)
            length = _header_length(path, start, size)
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be read: {error.strerror or error}.") from error
    try:
        values = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} is no safetensors file: its header is not JSON.") from error
    if not isinstance(values, dict):
        raise AdapterFileError(f"{path} is no safetensors file: its header is not a table.")
    metadata = values.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterFileError(f"{path} is broken: the metadata in its header is not a table of texts.")
    _check_entries(path, values, size - 8 - length)
    return Header(values, metadata, 8 + length)


def _header_length(path: Path, start: bytes, size: int) -> int:
    if size == 0:
        raise AdapterFileError(f"{path} is empty.")
    # A good header starts with a brace at byte 8; its length before that can look like any magic number.
    for magic, what in _NOT_SAFETENSORS if start[8:9] != b"{" else ():
        if start.lstrip().startswith(magic):
            raise AdapterFileError(f"{path} is no safetensors file but {what}.")
    if size < 8:
        raise AdapterFileError(f"{path} is no safetensors file: it has only {size} bytes.")
    length = int.from_bytes(start[:8], "little")
    if length > size - 8:
        raise AdapterFileError(
            f"{path} is cut short or no safetensors file: it claims a header of {length:,} bytes, but has"
            f" {size:,} in all."
        )
    if length > MAX_HEADER:
        raise AdapterFileError(
            f"{path} claims a header of {length:,} bytes; no adapter has more than {MAX_HEADER:,}."
        )
    return length


def _check_entries(path: Path, entries: dict[str, Any], available: int) -> None:
    """Each tensor lies within the file, has as many bytes as its shape says, and overlaps no other."""
    end = 0
    spans = []
    for name, entry in entries.items():
        problem = _entry_problem(entry)
        if problem:
            raise AdapterFileError(f"{path} is broken: the tensor {name[:200]!r} has {problem}.")
        spans.append((*entry["data_offsets"], name))
    for first, last, name in sorted(spans):
        if last > available:
            raise AdapterFileError(
                f"{path} is cut short: the tensor {name[:200]!r} should end at byte {last:,} of the data,"
                f" which has only {available:,}."
            )
        if first != end:
            what = "overlaps another" if first < end else "leaves a gap before it"
            raise AdapterFileError(f"{path} is broken: the tensor {name[:200]!r} {what}.")
        end = last
    if end != available:
        raise AdapterFileError(f"{path} is broken: {available - end:,} bytes follow after its last tensor.")


def _entry_problem(entry: Any) -> str:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return "no dtype, shape or offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _TYPES:
        return f"the unknown number type {str(dtype)[:40]!r}"
    whole = all(isinstance(v, list) and all(type(n) is int and n >= 0 for n in v) for v in (shape, offsets))
    if not whole or len(offsets) != 2 or offsets[1] < offsets[0]:
        return "an impossible shape or offsets"
    if len(shape) > 8 or math.prod(shape) * _TYPES[dtype].itemsize != offsets[1] - offsets[0]:
        return f"the shape {str(shape)[:60]}, which does not fit its {offsets[1] - offsets[0]:,} bytes"
    return ""


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


def serialised(tensors: Tensors, metadata: Mapping[str, str]) -> bytes:
    """A whole safetensors file; the same contents always give the same bytes.

    Tensors are ordered by the size of their numbers and then by name, so that each is aligned.
    """
    header: dict[str, Any] = {}
    if metadata:
        # A lone surrogate, as from a badly decoded file name, would make the header unreadable for other
        # tools.
        header["__metadata__"] = {
            key: metadata[key].encode("utf-8", "replace").decode("utf-8") for key in sorted(metadata)
        }
    chunks, end = [], 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):
        tensor = tensors[name].detach().cpu().contiguous()
        chunks.append(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        offsets = [end, end + len(chunks[-1])]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        end = offsets[1]
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return b"".join((struct.pack("<Q", len(raw)), raw, *chunks))


def header_hashes(tensors: Tensors, metadata: Mapping[str, str]) -> dict[str, str]:
    """The two hashes that tools expect in a file's header.

    `sshs_model_hash` is the SHA-256 of the tensor bytes alone. `sshs_legacy_hash` is A1111's old one: 64 KiB
    from 1 MiB on, of the file with nothing but `ss_` keys in its header (so that later edits do not change
    it).
    """
    data = serialised(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    start = 8 + int.from_bytes(data[:8], "little")
    return {
        "sshs_model_hash": hashlib.sha256(memoryview(data)[start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8],
    }


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
