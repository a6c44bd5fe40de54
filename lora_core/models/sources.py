"""Where each parameter of a component lies on disk: in a diffusers folder, or under its original name in a
single file.

A `Source` says which tensor of which file, and what part of it. Loading reads through it, merging into a base
writes through it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_core.models.weight_files import SafetensorsFile, WeightFile
from lora_core.spec.base_facts import UNET, VAE, weight_paths
from lora_core.spec.families import Family, TextEncoder
from lora_core.spec.ldm_names import ldm_unet_path, ldm_vae_path, open_clip_path

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

    def sample(self) -> str:
        """What tells the parameter from another, without reading all of it."""
        shape, sample = self.file.shapes[self.key], self.file.sample(self.key).hex()
        return f"{self.third} {self.transposed} {shape} {sample}"


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


def _text_spellings(name: str) -> tuple[str, ...]:
    """Names of one parameter with and without the `text_model.` level, which newer transformers dropped."""
    bare = name.removeprefix("text_model.")
    return (f"text_model.{bare}", bare)


def _vae_spellings(name: str) -> Iterable[str]:
    yield name
    for new, old in _OLD_VAE_NAMES.items():
        if f".attentions.0.{new}." in name:
            yield name.replace(f".{new}.", f".{old}.")
