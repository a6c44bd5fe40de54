"""Reading the header of an untrusted safetensors file, without torch.

The safetensors library checks each claim of the header first, so that a broken file gets an error and never
more memory than its own size. Format: https://github.com/huggingface/safetensors#format
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lora_core.errors import AdapterFileError, LoraError
from lora_core.system.untrusted import parse_json

MAX_HEADER = 16 * 2**20
"""Bytes. Real headers stay under 3 MB, even with the tags of a large dataset."""
LONGEST_NAME = 1000
"""Characters of a tensor's name; real ones stay under 200."""
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8", "BOOL")
"""Supported dtypes."""

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
    path = Path(path)
    if not path.is_file():
        there = "is a folder; give the .safetensors file in it" if path.is_dir() else "does not exist"
        raise error(f"{path} {there}.")
    try:
        with open(path, "rb") as file:
            start = file.read(32)
            length = int.from_bytes(start[:8], "little")
            if refusal := _refusal(start, length, path.stat().st_size):
                raise error(f"{path} {refusal}.")
            with safe_open(str(path), framework="np"):  # raises unless each claim holds
                file.seek(8)
                values = parse_json(file.read(length))
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror or problem}.") from problem
    except (SafetensorError, ValueError) as problem:
        reason = str(problem).removeprefix("Error while deserializing header: ")[:120]
        raise error(f"{path} is cut short, broken or no safetensors file: {reason}.") from problem
    metadata = values.pop("__metadata__", None) or {}
    for name, entry in values.items():
        if len(name) > LONGEST_NAME or len(entry["shape"]) > 8 or entry["dtype"] not in DTYPES:
            what = f"{entry['dtype']} {str(entry['shape'])[:60]}"
            raise error(
                f"{path} holds the tensor {name[:200]!r} ({what}), which no tool writes into a model."
            )
    return Header(values, metadata, 8 + length)


def _refusal(start: bytes, length: int, size: int) -> str:
    if size == 0:
        return "is empty"
    # A valid header starts with a brace at byte 8; its length before that can look like any magic number.
    for magic, what in _NOT_SAFETENSORS if start[8:9] != b"{" else ():
        if start.lstrip().startswith(magic):
            return f"is not a safetensors file but {what}"
    if MAX_HEADER < length <= size - 8:
        return f"claims a header of {length:,} bytes; no real file has more than {MAX_HEADER:,}"
    return ""
