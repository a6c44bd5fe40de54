"""Reading weights tensor by tensor, locating each parameter of a component in its files, and a cache on disk.

Nothing is mapped and no file is read in one piece: the peak is the result plus one tensor. Mapped pages would
count as memory of this process until the file is closed, which nearly doubles it for a base in half
precision. A `.ckpt` is the exception: torch maps the zip that it is.
"""

import hashlib
import io
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lora_core.errors import ModelFileError, wrap_os_errors
from lora_core.model_files.detect import UNET, VAE, weight_paths
from lora_core.model_files.families import Family, TextEncoder, is_text_encoder
from lora_core.model_files.header import DTYPE_NAMES, read_header
from lora_core.model_files.ldm_names import ldm_unet_path, ldm_vae_path, open_clip_path
from lora_core.system.files import write_atomically

DTYPES = {name: getattr(torch, dtype) for name, dtype in DTYPE_NAMES.items()}
"""The dtypes of safetensors files."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What users choose from, for a base in memory and for a file."""
SAMPLE = 64
"""Bytes of a tensor that identify it."""


class SafetensorsFile:
    """A safetensors file, its header checked; each tensor is read when it is asked for."""

    def __init__(self, path: Path) -> None:
        """Read the header; raises ModelFileError."""
        header = read_header(path, ModelFileError)
        self.path = path
        self.shapes = header.shapes
        self._entries = header.tensors
        self._start = header.start

    def tensor(self, key: str) -> torch.Tensor:
        """One tensor, as it is in the file, in memory of its own; ModelFileError if it cannot be read."""
        entry = self._entries[key]
        first, last = entry["data_offsets"]
        buffer = torch.empty(last - first, dtype=torch.uint8)
        with self._open() as file:
            file.seek(self._start + first)
            view = buffer.numpy().data
            while len(view):
                count = file.readinto(view)
                if not count:
                    raise ModelFileError(f"{self.path} has become shorter; is it still being written?")
                view = view[count:]
        return buffer.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])

    def samples(self, keys: Iterable[str]) -> dict[str, bytes]:
        """Each tensor's dtype and 64 bytes from its middle, which training or merging changes; the file
        is opened once."""
        found = {}
        with self._open() as file:
            for key in keys:
                entry = self._entries[key]
                first, last = entry["data_offsets"]
                middle = (first + last) // 2
                file.seek(self._start + middle)
                found[key] = str(entry["dtype"]).encode() + file.read(min(SAMPLE, last - middle))
        return found

    @contextmanager
    def _open(self) -> Iterator[io.FileIO]:
        with (
            wrap_os_errors(ModelFileError, f"{self.path} cannot be read"),
            open(self.path, "rb", buffering=0) as file,
        ):
            yield file


class PickledFile:
    """A `.ckpt`: only plain tensors are read from it, and no code in it is run."""

    def __init__(self, path: Path) -> None:
        """Open the file; ModelFileError if it holds more than tensors, or is broken."""
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
            raise ModelFileError(f"{path} has no table of weights.")
        self._tensors = {str(key): value for key, value in found.items() if isinstance(value, torch.Tensor)}
        for key, value in self._tensors.items():
            if not _is_plain(value):
                raise ModelFileError(
                    f"{path} is broken: the tensor {key[:200]!r} is not a plain one stored in the file."
                )
        self.shapes = {key: list(tensor.shape) for key, tensor in self._tensors.items()}

    def tensor(self, key: str) -> torch.Tensor:
        """One tensor, in memory of its own."""
        return self._tensors[key].clone()

    def samples(self, keys: Iterable[str]) -> dict[str, bytes]:
        """Each tensor's dtype and 64 bytes from its middle."""
        found = {}
        for key in keys:
            flat = self._tensors[key].detach().contiguous().flatten().view(torch.uint8)
            sample = flat[len(flat) // 2 :][:SAMPLE].numpy().tobytes()
            found[key] = str(self._tensors[key].dtype).encode() + sample
        return found


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor has bytes for each element; a stride of 0 makes a large one of a few bytes."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        return False
    if tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _check_zip(path: Path) -> None:
    """Refuse a zip that unpacks to more than its size: torch compresses nothing when it saves."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as packed:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in packed.infolist()):
            raise ModelFileError(f"{path} is a compressed zip, which no .ckpt is; unpack it first.")


WeightFile = SafetensorsFile | PickledFile
"""A file of named tensors."""


def open_weights(path: Path) -> WeightFile:
    """Open a file of weights by its extension; raises ModelFileError."""
    return PickledFile(path) if path.suffix.lower() == ".ckpt" else SafetensorsFile(path)


_OLD_VAE_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
"""Attention in VAEs that older diffusers wrote."""
THIRDS = 3


@dataclass(frozen=True)
class TensorSource:
    """One parameter on disk: the tensor `key` of `file`, or a `third` of it along its first axis, or its
    transpose. Loading reads through it; merging into a base writes through it."""

    file: WeightFile
    key: str
    third: int | None = None
    transposed: bool = False

    @property
    def shape(self) -> torch.Size:
        """The shape of the parameter."""
        first, *others = self.file.shapes[self.key] or [1]
        shape = [first if self.third is None else first // THIRDS, *others]
        return torch.Size(shape[::-1] if self.transposed else shape)

    def read(self) -> torch.Tensor:
        """The parameter, in the dtype and shape of the file."""
        tensor = self.file.tensor(self.key)
        if self.third is not None:
            tensor = tensor.chunk(THIRDS)[self.third].clone()
        return tensor.t().contiguous() if self.transposed else tensor

    def identify(self, sample: bytes) -> str:
        """Identifies the parameter without reading all of it, by the sample of its tensor."""
        return f"{self.third} {self.transposed} {self.file.shapes[self.key]} {sample.hex()}"


WeightLocator = Callable[[str], TensorSource | None]
"""From a parameter's name in a component to its source, or None where the files lack it."""


def _locator(files: Sequence[WeightFile], spell: Callable[[str], Iterable[str]]) -> WeightLocator:
    """Finds the first of a parameter's spellings that one of the files has."""

    def find(name: str) -> TensorSource | None:
        found = (TensorSource(file, key) for key in spell(name) for file in files if key in file.shapes)
        return next(found, None)

    return find


def unet_in_file(file: WeightFile, family: Family) -> WeightLocator:
    """The UNet of a single-file checkpoint."""
    return _locator([file], lambda name: [f"{UNET}{ldm_unet_path(name, family.attention_levels)}"])


def vae_in_file(file: WeightFile, levels: int) -> WeightLocator:
    """The VAE of a single-file checkpoint, or a VAE alone in a file, in original or in diffusers' names."""

    def spell(name: str) -> Iterable[str]:
        original = ldm_vae_path(name, levels)
        return (VAE + original, original, *_vae_spellings(name))

    return _locator([file], spell)


def text_encoder_in_file(file: WeightFile, encoder: TextEncoder) -> WeightLocator:
    """A text encoder of a single-file checkpoint, in OpenCLIP's or in transformers' names."""
    if not encoder.open_clip:
        return _locator([file], lambda name: [encoder.single_file + one for one in _text_spellings(name)])

    def find(name: str) -> TensorSource | None:
        path, third = open_clip_path(name)
        key = encoder.single_file + path
        return TensorSource(file, key, third, path == "text_projection") if key in file.shapes else None

    return find


def component_in_folder(folder: Path, part: str) -> WeightLocator:
    """A component of a diffusers folder, in one file or sharded; ModelFileError if there is none or one is
    broken."""
    files = [SafetensorsFile(path) for path in weight_paths(folder, part)]
    return _locator(files, _text_spellings if is_text_encoder(part) else _vae_spellings)


def _text_spellings(name: str) -> Iterable[str]:
    """Names of one parameter with and without the `text_model.` level, which newer transformers dropped."""
    bare = name.removeprefix("text_model.")
    return (f"text_model.{bare}", bare)


def _vae_spellings(name: str) -> Iterable[str]:
    yield name
    for new, old in _OLD_VAE_NAMES.items():
        if f".attentions.0.{new}." in name:
            yield name.replace(f".{new}.", f".{old}.")


# Tensors that are computed once.


def load_or_compute(path: Path, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Read the tensors of a cache file; if it is missing or damaged, it is written first. `make` computes the
    tensors, one of them named "value"."""
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a dict
            if "value" in found and (file.metadata() or {}).get("sha256") == _hash_tensors(found):
                return found
    except (OSError, SafetensorError):
        pass
    made = {name: tensor.contiguous() for name, tensor in make().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save(made, {"sha256": _hash_tensors(made)}))
    return made


def _hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def short_digest(*values: object) -> str:
    """A file name for what depends on `values`."""
    return hashlib.sha256("\n".join(map(str, values)).encode()).hexdigest()[:32]
