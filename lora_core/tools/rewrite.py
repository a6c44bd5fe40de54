"""An adapter file written anew with other weights: in the format, the number type and with the header that it
had, and a line more that says what was done to it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_core.errors import AdapterFileError
from lora_core.formats.inspect import file_format
from lora_core.formats.io import AS_IT_IS, file_hashes, save_adapter
from lora_core.formats.layer_shapes import reshape_adapter
from lora_core.formats.metadata import side_file
from lora_core.lora.weights import AdapterWeights
from lora_core.model_files.families import Family
from lora_core.model_files.header import read_header
from lora_core.models.weight_files import DTYPES, PRECISIONS
from lora_core.settings.choices import FORMATS
from lora_core.system.paths import write_atomically

__all__ = ["AS_IT_IS", "Rewrite", "check_out", "file_precision"]


def check_out(out: Path) -> None:
    """Refuse a place for a new adapter file before the work rather than after it.

    Raises:
        AdapterFileError: something is there already, or it has another ending.
    """
    if out.exists():
        raise AdapterFileError(f"{out} exists already; choose another name or remove it first.")
    if out.suffix.lower() != ".safetensors":
        raise AdapterFileError(f"--out {out} should end in .safetensors.")
    if not out.absolute().parent.is_dir():
        raise AdapterFileError(f"--out {out} cannot be written: its folder does not exist; make it first.")


def file_precision(path: Path) -> str:
    """The number type of a file's factors, or fp32 where they differ or are of a type that is not written."""
    entries = read_header(path).tensors
    found = {DTYPES[entry["dtype"]] for key, entry in entries.items() if not key.endswith(".alpha")}
    if len(found) != 1:
        return "fp32"
    return next((name for name, dtype in PRECISIONS.items() if dtype in found), "fp32")


@dataclass(frozen=True)
class Rewrite:
    """How to write the new file.

    Attributes:
        source: the file that it comes from.
        out: the file to make.
        precision: "fp32", "fp16", "bf16", `AS_IT_IS`, or "" for what the source has.
        now: the time, in seconds since the epoch.
    """

    source: Path
    out: Path
    precision: str
    now: float

    def write(self, weights: AdapterWeights, family: Family, key: str, record: Mapping[str, Any]) -> None:
        """Write the adapter, and the side file that A1111 reads if none is there.

        Args:
            weights: with the source's header in `metadata`.
            family: whose names to use.
            key: of the header, for what was done.
            record: what was done, for JSON.

        Raises:
            AdapterFileError: the weights are not finite or do not fit, or the file cannot be written.
        """
        named = file_format(read_header(self.source).shapes)
        source = {"name": self.source.stem, "sha256": str(file_hashes(self.source)["sha256"])[:12]}
        header = {
            **weights.metadata,
            "ss_output_name": self.out.stem,
            "modelspec.title": self.out.stem,
            "modelspec.date": datetime.fromtimestamp(self.now, UTC).replace(microsecond=0).isoformat(),
            key: json.dumps({"from": source, **record}),
        }
        save_adapter(
            reshape_adapter(weights, family),
            self.out,
            family,
            format=named if named in FORMATS else "kohya",
            dtype=self.precision or file_precision(self.source),
            metadata=header,
        )
        beside = self.out.with_suffix(".json")
        if not beside.exists():
            write_atomically(beside, side_file(header.get("modelspec.trigger_phrase", "")))

    @property
    def times_smaller(self) -> float:
        """By which factor the file that was written is smaller than its source."""
        return self.source.stat().st_size / self.out.stat().st_size
