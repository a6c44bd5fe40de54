"""Reading the header of an untrusted safetensors file, without torch.

Each claim of the header is checked first, so that a broken file gets a clear error and never more memory
than its own size. Format: https://github.com/huggingface/safetensors#format
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_core.errors import AdapterFileError, LoraError
from lora_core.system.untrusted import parse_json

MAX_HEADER = 16 * 2**20
"""Bytes. Real headers stay under 3 MB, even with the tags of a large dataset."""

LONGEST_NAME = 1000
"""Characters of a tensor's name; real ones stay under 200."""

ITEM_SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Supported dtypes, and bytes an element."""

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
        metadata: the texts in the file.
        start: offset of the tensor data, in bytes.
    """

    tensors: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    start: int

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Name to shape."""
        return {name: entry["shape"] for name, entry in self.tensors.items()}


def read_header(path: Path, error: type[LoraError] = AdapterFileError) -> Header:
    """The header of a safetensors file, with each of its claims checked against the file.

    Args:
        path: the file.
        error: the class to raise for a broken file: `AdapterFileError` or `ModelFileError`.

    Raises:
        LoraError: of the class `error`: what is wrong with the file.
    """
    try:
        return _checked_header(Path(path))
    except _Broken as broken:
        raise error(str(broken)) from broken.__cause__


class _Broken(Exception):
    """What is wrong with a file."""


def _checked_header(path: Path) -> Header:
    if path.is_dir():
        raise _Broken(f"{path} is a folder; give the .safetensors file in it.")
    if not path.is_file():
        raise _Broken(f"{path} does not exist.")
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(32)
            length = _header_length(path, start, size)
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise _Broken(f"{path} cannot be read: {error.strerror or error}.") from error
    try:
        values = parse_json(raw)
    except ValueError as error:
        raise _Broken(f"{path} is not a safetensors file: its header is not JSON.") from error
    if not isinstance(values, dict):
        raise _Broken(f"{path} is not a safetensors file: its header is not a table.")
    metadata = values.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Broken(f"{path} is broken: the metadata in its header is not a table of texts.")
    _check_entries(path, values, size - 8 - length)
    return Header(values, metadata, 8 + length)


def _header_length(path: Path, start: bytes, size: int) -> int:
    if size == 0:
        raise _Broken(f"{path} is empty.")
    # A valid header starts with a brace at byte 8; its length before that can look like any magic number.
    for magic, what in _NOT_SAFETENSORS if start[8:9] != b"{" else ():
        if start.lstrip().startswith(magic):
            raise _Broken(f"{path} is not a safetensors file but {what}.")
    if size < 8:
        raise _Broken(f"{path} is not a safetensors file: it has only {size} bytes.")
    length = int.from_bytes(start[:8], "little")
    if length > size - 8:
        raise _Broken(
            f"{path} is cut short or no safetensors file: it claims a header of {length:,} bytes, but has"
            f" {size:,} in all."
        )
    if length > MAX_HEADER:
        raise _Broken(
            f"{path} claims a header of {length:,} bytes; no real file has more than {MAX_HEADER:,}."
        )
    return length


def _check_entries(path: Path, entries: dict[str, Any], available: int) -> None:
    """Check that each tensor is within the file, has the bytes of its shape, and overlaps no other."""
    end = 0
    spans = []
    for name, entry in entries.items():
        problem = _entry_problem(entry) if len(name) <= LONGEST_NAME else "a name that no real file has"
        if problem:
            raise _Broken(f"{path} is broken: the tensor {name[:200]!r} has {problem}.")
        spans.append((*entry["data_offsets"], name))
    for first, last, name in sorted(spans):
        if last > available:
            raise _Broken(
                f"{path} is cut short: the tensor {name[:200]!r} should end at byte {last:,} of the data,"
                f" which has only {available:,}."
            )
        if first != end:
            what = "overlaps another" if first < end else "leaves a gap before it"
            raise _Broken(f"{path} is broken: the tensor {name[:200]!r} {what}.")
        end = last
    if end != available:
        raise _Broken(f"{path} is broken: {available - end:,} bytes follow after its last tensor.")


def _entry_problem(entry: Any) -> str:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return "no dtype, shape or offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        return f"the unknown number type {str(dtype)[:40]!r}"
    whole = all(isinstance(v, list) and all(_is_size(n) for n in v) for v in (shape, offsets))
    if not whole or len(offsets) != 2 or offsets[1] < offsets[0]:
        return "an impossible shape or offsets"
    if len(shape) > 8 or math.prod(shape) * ITEM_SIZES[dtype] != offsets[1] - offsets[0]:
        return f"the shape {str(shape)[:60]}, which does not fit its {offsets[1] - offsets[0]:,} bytes"
    return ""


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number < 2**63
