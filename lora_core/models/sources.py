"""Where each parameter of a component lies on disk: in a diffusers folder, or under its original name in a
single file.

A `Source` says which tensor of which file, and what part of it. Loading reads through it, merging into a base
writes through it.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_core.models.weight_files import SafetensorsFile, WeightFile
from lora_core.spec.base_facts import UNET, VAE
from lora_core.spec.errors import ModelFileError
from lora_core.spec.families import Family, TextEncoder
from lora_core.spec.ldm_names import ldm_unet_path, ldm_vae_path, open_clip_path

WEIGHT_FILES = {
    "unet": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"),
    "vae": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"),
    "text": ("model.safetensors", "model.fp16.safetensors"),
}
"""What the weights of a diffusers folder's components are called, the first found counting."""
_OLD_VAE_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
"""Attention in VAEs that older diffusers wrote."""
THIRDS = 3


@dataclass(frozen=True)
class Source:
    """One parameter on disk.

    Attributes:
        file: the file that it lies in.
        key: the tensor's name there.
        third: which third of the tensor along its first axis, or None for all of it.
        transposed: whether the tensor is the parameter's transpose.
    """

    file: WeightFile
    key: str
    third: int | None = None
    transposed: bool = False

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        total = 1
        for side in self.file.shapes[self.key]:
            total *= side
        return total if self.third is None else total // THIRDS

    def read(self) -> torch.Tensor:
        """The parameter, in the file's number format, shaped as in the file."""
        tensor = self.file.tensor(self.key)
        if self.third is not None:
            tensor = tensor.chunk(THIRDS)[self.third].clone()
        return tensor.t().contiguous() if self.transposed else tensor


Finder = Callable[[str], Source | None]
"""From a parameter's name in a component to its place, or None where the files lack it."""


def unet_in_file(file: WeightFile, family: Family) -> Finder:
    """The UNet of a single-file checkpoint."""

    def find(name: str) -> Source | None:
        path = ldm_unet_path(name, family.attention_levels)
        key = f"{UNET}{path}"
        return Source(file, key) if path is not None and key in file.shapes else None

    return find


def vae_in_file(file: WeightFile, levels: int) -> Finder:
    """The VAE of a single-file checkpoint, or a VAE alone in a file, in original or in diffusers' names."""

    def find(name: str) -> Source | None:
        original = ldm_vae_path(name, levels)
        for key in (VAE + original, original, *_vae_spellings(name)):
            if key in file.shapes:
                return Source(file, key)
        return None

    return find


def text_encoder_in_file(file: WeightFile, encoder: TextEncoder) -> Finder:
    """A text encoder of a single-file checkpoint, in OpenCLIP's or in transformers' names."""

    def find(name: str) -> Source | None:
        if encoder.open_clip:
            path, third = open_clip_path(name)
            transposed = path == "text_projection"
            keys = [(encoder.single_file + path, third, transposed)]
        else:
            keys = [(encoder.single_file + spelling, None, False) for spelling in _text_spellings(name)]
        return next((Source(file, *place) for place in keys if place[0] in file.shapes), None)

    return find


def component_in_folder(folder: Path, part: str) -> Finder:
    """A component of a diffusers folder, whole or sharded.

    Raises:
        ModelFileError: there is no file of weights in the folder, or one is broken.
    """
    files = [SafetensorsFile(path) for path in weight_paths(folder, part)]

    def find(name: str) -> Source | None:
        spellings = _vae_spellings(name) if part == "vae" else _text_spellings(name)
        for key in spellings if part != "unet" else (name,):
            for file in files:
                if key in file.shapes:
                    return Source(file, key)
        return None

    return find


def weight_paths(folder: Path, part: str) -> list[Path]:
    """The files that hold a component's weights; several where they are sharded.

    Raises:
        ModelFileError: there is none, or the table of the shards cannot be used.
    """
    names = WEIGHT_FILES.get(part, WEIGHT_FILES["text"])
    for name in names:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _shards(index)
    other = " It holds weights in another format; only .safetensors can be used." if _others(folder) else ""
    raise ModelFileError(f"The folder {folder} lacks {names[0]}.{other}")


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFileError(f"{index} is no table of weight files.") from error
    # A table must not lead out of its folder.
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ModelFileError(f"{index} is no table of weight files.")
    return [index.parent / name for name in names]


def _others(folder: Path) -> bool:
    return any(folder.glob("*.bin")) or any(folder.glob("*.msgpack"))


def _text_spellings(name: str) -> tuple[str, ...]:
    """Names of one parameter with and without the `text_model.` level, which newer transformers dropped."""
    bare = name.removeprefix("text_model.")
    return (f"text_model.{bare}", bare)


def _vae_spellings(name: str) -> Iterable[str]:
    yield name
    for new, old in _OLD_VAE_NAMES.items():
        if f".attentions.0.{new}." in name:
            yield name.replace(f".{new}.", f".{old}.")
