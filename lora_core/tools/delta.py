"""The updates that adapter files make to a base: LoRA, LoCon, LoHa, LoKr and OFT, and DoRA on each.

Files are read here and nothing is approximated; see `shrink.to_lora` for that. The weights of a base are read
layer by layer, without opening the base. New files are saved here, with a record of the operation in the
header.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from lora_core.errors import AdapterFileError, ModelFileError
from lora_core.formats import kinds
from lora_core.formats.io import file_hashes, load_adapter, save_adapter
from lora_core.formats.layers import reshape_adapter
from lora_core.formats.metadata import side_file
from lora_core.lora.lycoris import LycorisUpdate, as_update
from lora_core.lora.weights import AdapterWeights, LayerKey
from lora_core.model_files.detect import read_base_facts
from lora_core.model_files.families import Family
from lora_core.model_files.header import read_header
from lora_core.models.weight_files import (
    DTYPES,
    PRECISIONS,
    SafetensorsFile,
    TensorSource,
    WeightLocator,
    text_encoder_in_file,
    unet_in_file,
)
from lora_core.settings.schema import FORMATS
from lora_core.system.files import write_atomically

Updates = dict[LayerKey, LycorisUpdate]


def shared_family(paths: Iterable[Path], why: str) -> Family | None:
    """The family that adapter files are for, None where none of them says it.

    Raises:
        AdapterFileError: they are for different ones; `why` ends the sentence.
    """
    families: dict[str, tuple[Path, Family]] = {}
    for path in paths:
        header = read_header(path)
        family = kinds.detect_family(header.shapes, header.metadata)
        if family is not None:
            families.setdefault(family.title, (path, family))
    if len(families) > 1:
        (one, first), (two, second), *_ = families.values()
        raise AdapterFileError(f"{one} is for {first.title} and {two} for {second.title}; {why}.")
    return next((family for _, family in families.values()), None)


def file_updates(path: Path, known: Family | None = None) -> tuple[Updates, dict[str, str], Family]:
    """The updates in an adapter file of any of these kinds, its metadata, and the family that it is for: the
    `known` one of the base that it is used with, if there is one.

    Raises:
        AdapterFileError: the file is broken, of another kind, for another family, or does not name its own.
    """
    weights, header = load_adapter(path, known, plain=False), read_header(path)
    family = known or kinds.require_family(path, header.shapes, header.metadata, "it cannot be used")
    layers = reshape_adapter(weights, family).layers | weights.others
    return {key: as_update(key, layer) for key, layer in layers.items()}, weights.metadata, family


class BaseWeights:
    """The weights of a base on disk, by the layers that adapters name.

    A folder may hold a layer twice, in full and in half precision.
    """

    def __init__(self, name: str | Path) -> None:
        """Read the headers of the base's files.

        Args:
            name: "demo", a diffusers folder, a `.safetensors` file, or a hub id that is in the local cache.

        Raises:
            ModelFileError: nothing usable is there; a `.ckpt` is not read.
        """
        facts = read_base_facts(name)
        if facts.family is None:
            raise ModelFileError(
                f"The base {name} is a .ckpt; this needs a .safetensors file or a diffusers folder, so"
                " convert it first."
            )
        self.path: Path = facts.path
        self.family: Family = facts.family
        self.single = facts.single_file
        self._finders = self._in_file() if self.single else {}
        self._files: dict[str, list[SafetensorsFile]] = {}

    def _in_file(self) -> dict[str, WeightLocator]:
        file = SafetensorsFile(self.path)
        encoders = {e.part: text_encoder_in_file(file, e) for e in self.family.text_encoders}
        return {self.family.denoiser: unet_in_file(file, self.family), **encoders}

    def places(self, layer: LayerKey) -> list[TensorSource]:
        """The tensors that hold a layer's weight; none, if the base has no such layer."""
        part, path = layer
        if self.single:
            source = self._finders[part](f"{path}.weight") if part in self._finders else None
            return [source] if source else []
        if part not in self._files:
            paths = sorted((self.path / part).glob("*.safetensors"))
            self._files[part] = [SafetensorsFile(found) for found in paths]
        # Newer transformers save text encoders without this level.
        names = dict.fromkeys((f"{path}.weight", f"{path.removeprefix('text_model.')}.weight"))
        return [TensorSource(file, key) for file in self._files[part] for key in names if key in file.shapes]

    def weight(self, layer: LayerKey) -> torch.Tensor:
        """A layer's weight in fp32.

        Raises:
            ModelFileError: the base has no such layer.
        """
        places = self.places(layer)
        if not places:
            raise ModelFileError(
                f"The base {self.path} has no layer {'.'.join(layer)}; the file is for another."
            )
        return places[0].read().float()


# New files.


def check_out(out: Path, option: str = "--out ") -> None:
    """Refuse a path for a new adapter file before the work rather than after it.

    Raises:
        AdapterFileError: it exists, does not end in .safetensors, or is in a folder that does not exist.
    """
    if out.exists():
        raise AdapterFileError(f"{out} already exists; choose another name or remove it first.")
    if out.suffix.lower() != ".safetensors":
        raise AdapterFileError(f"{option}{out} should end in .safetensors.")
    if not out.absolute().parent.is_dir():
        raise AdapterFileError(f"{option}{out} cannot be written: its folder does not exist; make it first.")


def file_precision(path: Path) -> str:
    """The dtype of a file's factors; fp32 where they differ or have one that is not written here."""
    entries = read_header(path).tensors
    found = {DTYPES[entry["dtype"]] for key, entry in entries.items() if not key.endswith(".alpha")}
    if len(found) != 1:
        return "fp32"
    return next((name for name, dtype in PRECISIONS.items() if dtype in found), "fp32")


def file_record(path: Path) -> dict[str, str]:
    """How a header refers to a file: its name and the first 12 digits of its sha256."""
    return {"name": path.stem, "sha256": str(file_hashes(path)["sha256"])[:12]}


def titles(out: Path) -> dict[str, str]:
    """The metadata that every new file has."""
    return {
        "ss_output_name": out.stem,
        "modelspec.title": out.stem,
        "modelspec.date": datetime.now(UTC).replace(microsecond=0).isoformat(),
    }


def save_with_side_file(
    weights: AdapterWeights,
    family: Family,
    out: Path,
    precision: str,
    header: Mapping[str, str],
    file_format: str = "kohya",
) -> None:
    """Write an adapter file, and the side file that A1111 reads if there is none.

    Raises:
        AdapterFileError: the weights are not finite or do not fit, or the file cannot be written.
    """
    save_adapter(
        reshape_adapter(weights, family),
        out,
        family,
        format=file_format,
        dtype=precision,
        metadata=dict(header),
    )
    beside = out.with_suffix(".json")
    if not beside.exists():
        write_atomically(beside, side_file(header.get("modelspec.trigger_phrase", "")))


@dataclass(frozen=True)
class Rewrite:
    """An adapter file to be saved again with other weights, in its format and with its metadata.

    Attributes:
        precision: "fp32", "fp16", "bf16", `io.AS_IT_IS`, or "" for that of the source, see `file_precision`.
    """

    source: Path
    out: Path
    precision: str = ""

    def save(self, weights: AdapterWeights, family: Family, key: str, record: Mapping[str, Any]) -> None:
        """Save the adapter.

        Args:
            weights: with the source's metadata.
            key: of the header, for the record.

        Raises:
            AdapterFileError: the weights are not finite or do not fit, or the file cannot be written.
        """
        named = kinds.file_format(read_header(self.source).shapes)
        done = {key: json.dumps({"from": file_record(self.source), **record})}
        save_with_side_file(
            weights,
            family,
            self.out,
            self.precision or file_precision(self.source),
            {**weights.metadata, **titles(self.out), **done},
            named if named in FORMATS else "kohya",
        )

    @property
    def times_smaller(self) -> float:
        """The size of the source over that of the saved file."""
        return self.source.stat().st_size / self.out.stat().st_size

    @property
    def size_sentence(self) -> str:
        """The size of the saved file beside the source's; other kinds may be smaller than a plain LoRA."""
        times = self.times_smaller
        factor = f"{max(times, 1 / times):.1f}"
        if factor == "1.0":
            return "The file is about as large."
        return f"The file is {factor} times {'smaller' if times >= 1 else 'larger'}."
