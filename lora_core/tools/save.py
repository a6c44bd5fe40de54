"""Saves the adapter files that the tools make, with a header that records what was done."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_core.errors import AdapterFileError
from lora_core.formats.inspect import file_format
from lora_core.formats.io import file_hashes, save_adapter
from lora_core.formats.layer_shapes import reshape_adapter
from lora_core.formats.metadata import side_file
from lora_core.lora.weights import AdapterWeights
from lora_core.model_files.families import Family
from lora_core.model_files.header import read_header
from lora_core.models.weight_files import DTYPES, PRECISIONS
from lora_core.settings.choices import FORMATS
from lora_core.system.files import write_atomically


def check_out(out: Path) -> None:
    """Refuse a path for a new adapter file before the work rather than after it.

    Raises:
        AdapterFileError: it exists, does not end in .safetensors, or is in a folder that does not exist.
    """
    if out.exists():
        raise AdapterFileError(f"{out} exists already; choose another name or remove it first.")
    if out.suffix.lower() != ".safetensors":
        raise AdapterFileError(f"--out {out} should end in .safetensors.")
    if not out.absolute().parent.is_dir():
        raise AdapterFileError(f"--out {out} cannot be written: its folder does not exist; make it first.")


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


def titles(out: Path, now: float) -> dict[str, str]:
    """The metadata that every new file has; `now` in seconds since the epoch."""
    return {
        "ss_output_name": out.stem,
        "modelspec.title": out.stem,
        "modelspec.date": datetime.fromtimestamp(now, UTC).replace(microsecond=0).isoformat(),
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
    """An adapter file to be saved anew with other weights, in its own format and with its own metadata.

    Attributes:
        source: the file that it comes from.
        out: the file to make.
        precision: "fp32", "fp16", "bf16", `io.AS_IT_IS`, or "" for that of the source.
        now: the time, in seconds since the epoch.
    """

    source: Path
    out: Path
    precision: str
    now: float

    def save(self, weights: AdapterWeights, family: Family, key: str, record: Mapping[str, Any]) -> None:
        """Save the adapter.

        Args:
            weights: with the source's metadata.
            family: of the base.
            key: of the header, for the record.
            record: what was done, for JSON.

        Raises:
            AdapterFileError: the weights are not finite or do not fit, or the file cannot be written.
        """
        named = file_format(read_header(self.source).shapes)
        done = {key: json.dumps({"from": file_record(self.source), **record})}
        save_with_side_file(
            weights,
            family,
            self.out,
            self.precision or file_precision(self.source),
            {**weights.metadata, **titles(self.out, self.now), **done},
            named if named in FORMATS else "kohya",
        )

    @property
    def times_smaller(self) -> float:
        """The size of the source over that of the saved file."""
        return self.source.stat().st_size / self.out.stat().st_size
