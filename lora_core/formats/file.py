"""Adapter files on disk: reading one of any known format, and writing one whole or not at all."""

import contextlib
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch

from lora_core.adapters.weights import AdapterWeights
from lora_core.formats import kinds
from lora_core.formats.container import (
    as_bytes,
    file_hashes,
    header_hashes,
    pieces,
    read_tensors,
    write_pieces,
)
from lora_core.formats.layers import Tensors, check_finite
from lora_core.formats.peft_folder import with_config_beside
from lora_core.models.weight_files import PRECISIONS, SafetensorsFile
from lora_core.spec.choices import FORMATS, chosen
from lora_core.spec.errors import AdapterFileError
from lora_core.spec.families import Family
from lora_core.spec.other_models import other_family
from lora_core.spec.paths import sync_folder
from lora_core.spec.tensor_file import Header, read_header

__all__ = ["file_hashes", "read_adapter", "read_tensors", "write_adapter"]

AS_IT_IS = "as it is"
"""In place of a precision: each tensor keeps its own."""

TURNED_PLAIN = ("LoHa", "LoKr", "DoRA")
"""Kinds of adapters that `analysis/plain.py` makes plain LoRAs of."""

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
    kind = kinds.kind_of(shapes)
    if kind != "unknown":
        check_family(path, header)
    if kind not in (kinds.LORA, kinds.LOCON):
        what = kinds.called(kind, shapes) + ("" if kind == "unknown" else ", not a plain LoRA")
        raise AdapterFileError(f"{path} cannot be used: it is {what}.{merge_offer(path, kind)}")
    tensors, texts = read_tensors(path)
    metadata = with_config_beside(path, tensors, texts)
    translator = next((m for m in map(_translator, FORMATS) if m.matches(tensors)), None)
    if translator is None:
        raise AdapterFileError(f"{path} cannot be used: its tensors are named like no known format.")
    other = kinds.mismatch(shapes, metadata, family) if family else ""
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
