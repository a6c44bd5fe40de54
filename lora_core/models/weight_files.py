"""Reading weights tensor by tensor, straight into the memory that will hold them.

Nothing is mapped and no file is read as a whole: the peak is what is held plus one tensor. Mapped pages would
count as memory of this process until the whole file is closed, which on a base in half precision nearly
doubles it. A `.ckpt` is the exception: its numbers lie in a zip that torch itself maps.
"""

import pickle
import zipfile
from pathlib import Path
from typing import Protocol

import torch

from lora_core.spec.errors import ModelFileError
from lora_core.spec.tensor_file import read_header

DTYPES = {
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
"""The number types of safetensors files."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What people choose between, for a base in memory and for a file."""
SAMPLE = 64
"""Bytes of a tensor that tell it from another."""


class WeightFile(Protocol):
    """A file with named tensors."""

    path: Path
    shapes: dict[str, list[int]]

    def tensor(self, key: str) -> torch.Tensor:
        """One tensor, as it is in the file, in memory of its own."""
        ...

    def sample(self, key: str) -> bytes:
        """A tensor's dtype and 64 bytes from its middle: another training or merge changes them."""
        ...


class SafetensorsFile:
    """A safetensors file, its header checked; each tensor is read when it is asked for."""

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            ModelFileError: one sentence on what is wrong with the file.
        """
        header = read_header(path, ModelFileError)
        self.path = path
        self.shapes = header.shapes
        self._entries = header.tensors
        self._start = header.start

    def tensor(self, key: str) -> torch.Tensor:
        """One tensor, as it is in the file, in memory of its own.

        Raises:
            ModelFileError: the file has become shorter since its header was read, or cannot be read.
        """
        entry = self._entries[key]
        first, last = entry["data_offsets"]
        buffer = torch.empty(last - first, dtype=torch.uint8)
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self._start + first)
                view = buffer.numpy().data
                while len(view):
                    count = file.readinto(view)
                    if not count:
                        raise ModelFileError(f"{self.path} has become shorter; is it still being written?")
                    view = view[count:]
        except OSError as error:
            raise ModelFileError(f"{self.path} cannot be read: {error.strerror or error}.") from error
        return buffer.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])

    def sample(self, key: str) -> bytes:
        """A tensor's dtype and 64 bytes from its middle."""
        entry = self._entries[key]
        first, last = entry["data_offsets"]
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self._start + (first + last) // 2)
                return str(entry["dtype"]).encode() + file.read(min(SAMPLE, last - (first + last) // 2))
        except OSError as error:
            raise ModelFileError(f"{self.path} cannot be read: {error.strerror or error}.") from error


class PickledFile:
    """A `.ckpt`: only plain tensors are taken from it, and no code in it is ever run."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            ModelFileError: it holds more than tensors, or is broken.
        """
        self.path = path
        try:
            _check_zip(path)
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            raise ModelFileError(
                f"{path} holds more than weights, which could run code when opened, so it is not; convert it"
                " to .safetensors with a tool that you trust."
            ) from error
        except ModelFileError:
            raise
        except Exception as error:
            # torch names no common base for what a broken file can raise.
            raise ModelFileError(f"{path} cannot be read as a .ckpt: {type(error).__name__}.") from error
        if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
            found = found["state_dict"]
        if not isinstance(found, dict):
            raise ModelFileError(f"{path} holds no table of weights.")
        self._tensors = {str(key): value for key, value in found.items() if isinstance(value, torch.Tensor)}
        for key, value in self._tensors.items():
            if not _is_plain(value):
                raise ModelFileError(
                    f"{path} is broken: the tensor {key[:200]!r} is no plain one that lies in the file."
                )
        self.shapes = {key: list(tensor.shape) for key, tensor in self._tensors.items()}

    def tensor(self, key: str) -> torch.Tensor:
        """One tensor, in memory of its own."""
        return self._tensors[key].clone()

    def sample(self, key: str) -> bytes:
        """A tensor's dtype and 64 bytes from its middle."""
        tensor = self._tensors[key]
        flat = tensor.detach().contiguous().flatten().view(torch.uint8)
        return str(tensor.dtype).encode() + flat[len(flat) // 2 :][:SAMPLE].numpy().tobytes()


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor has bytes for each of its numbers; a stride of 0 makes a large one of a few bytes."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        return False
    if tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _check_zip(path: Path) -> None:
    """Refuse a zip that unpacks to more than it is: torch packs nothing when it saves.

    Raises:
        ModelFileError: something in it is compressed.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as packed:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in packed.infolist()):
            raise ModelFileError(f"{path} is a compressed zip, which no .ckpt is; unpack it first.")


def opened_weights(path: Path) -> WeightFile:
    """The weights in a file, by its kind.

    Raises:
        ModelFileError: one sentence on what is wrong with the file.
    """
    return PickledFile(path) if path.suffix.lower() == ".ckpt" else SafetensorsFile(path)
