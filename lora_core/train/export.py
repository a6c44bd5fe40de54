"""The file for other tools: factors, everything that is known about the run in the header, and the side
file."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

from lora_core.data.captions import plain_caption
from lora_core.errors import RunError
from lora_core.formats import metadata
from lora_core.formats.io import file_hashes, load_adapter, read_tensors, save_adapter
from lora_core.formats.verify import verify_adapter
from lora_core.lora.weights import AdapterWeights
from lora_core.model_files.families import FAMILIES, Family
from lora_core.model_files.header import read_header
from lora_core.models.load import BaseModel
from lora_core.runs.folder import RunFolder, check_run_name
from lora_core.settings.config import RunConfig
from lora_core.system.files import write_atomically
from lora_core.train.checkpoint import FACTORS, STATE, verify_checkpoint
from lora_core.train.data import TrainImage

RAW_SUFFIX = "-raw"
"""Ends the name of the file with the raw adapter, where the one without it holds the average."""


def export_header(
    config: RunConfig, base: BaseModel, items: list[TrainImage], steps: int, started_at: float
) -> dict[str, str]:
    """The texts of a file's header."""
    captions = [plain_caption(item.record.caption, config.dataset.trigger) for item in items]
    buckets = Counter((item.bucket.width, item.bucket.height) for item in items)
    return metadata.export_metadata(config, base, captions, buckets, steps, (started_at, time.time()))


def write_export(
    weights: AdapterWeights,
    path: Path,
    how: tuple[str, str],
    family: Family,
    header: dict[str, str],
    picture: Path | None = None,
) -> Path:
    """Write the adapter, and beside it the side file with its trigger word, a model card and `picture`, a PNG
    that was drawn with the adapter, if there is one.

    `how` is (format, precision): a key of `choices.FORMATS`, and "fp32", "fp16" or "bf16"; `header` are texts
    for the file's header.

    Raises:
        AdapterFileError: the file cannot be written, or read back as it was meant.
    """
    kind, precision = how
    if picture is not None:
        try:
            header = header | {metadata.THUMBNAIL_KEY: metadata.thumbnail_uri(metadata.thumbnail(picture))}
        except OSError:
            # A damaged sample is no reason to lose what was trained.
            picture = None
    save_adapter(weights, path, family, format=kind, dtype=precision, metadata=header)
    write_atomically(
        path.with_suffix(".json"), metadata.side_file(header.get("modelspec.trigger_phrase", ""))
    )
    metadata.write_beside(path, read_header(path).metadata, picture)
    return path


def write_raw(
    weights: AdapterWeights, beside: Path, how: tuple[str, str], family: Family, header: dict[str, str],
    picture: Path | None,
) -> Path:  # fmt: skip
    """Write the raw adapter as `NAME-raw.safetensors` beside `NAME.safetensors`, which holds its average;
    arguments and errors as of `write_export`."""
    path = beside.with_name(f"{beside.stem}{RAW_SUFFIX}.safetensors")
    names = dict.fromkeys(("ss_output_name", "modelspec.title"), path.stem)
    return write_export(weights, path, how, family, header | names, picture)


def latest_sample(run: RunFolder, step: int, raw: bool = False) -> Path | None:
    """The first of the images drawn last up to a step, with the raw adapter if asked; none of step 0, which
    the base drew alone."""
    drawn = [
        event.raw_files if raw else event.files for event in run.progress().previews if 0 < event.step <= step
    ]
    picture = next((run.path / files[0] for files in reversed(drawn) if files), None)
    return picture if picture is not None and picture.is_file() else None


def export_checkpoint(run: RunFolder, which: str, name: str, how: tuple[str, str]) -> dict[str, Any]:
    """Export a checkpoint of a run, "last", "best" or a step, as `name` in the run's export folder; where an
    average is kept, the raw adapter too. `how` is (format, precision).

    Returns:
        {file, raw, bytes, modules, sha256, works_in}: `raw` is the path of the raw adapter's file, or "", and
        `works_in` what `verify_adapter` says of the file against the checkpoint: {ok, tools: [{tool, keys,
        matched, dropped, max_delta_error, note}], ...}.

    Raises:
        RunError: there is no such checkpoint, it is not whole, or the name cannot be a file's.
        AdapterFileError: the file cannot be written.
    """
    step = run.step_of(which)
    folder = run.checkpoint(step)
    record = verify_checkpoint(folder) if (folder / STATE).exists() else {}
    header = dict(read_tensors(folder / "adapter.safetensors")[1])
    weights = load_adapter(folder / "adapter.safetensors")
    family = next(
        (f for f in FAMILIES.values() if f.base_version == header.get("ss_base_model_version")), None
    )
    if family is None:
        raise RunError(f"The checkpoint {folder} does not say which family of base it is for.")
    stem = check_run_name(name)
    header["ss_output_name"] = header["modelspec.title"] = stem
    target = run.exports / f"{stem}.safetensors"
    raw: Path | None = None
    if record.get("average"):
        factors = load_adapter(folder / FACTORS)
        raw = write_raw(factors, target, how, family, header, latest_sample(run, step, raw=True))
    path = write_export(weights, target, how, family, header, latest_sample(run, step))
    return {
        "file": str(path),
        "raw": str(raw or ""),
        "bytes": path.stat().st_size,
        "modules": len(weights.layers),
        "sha256": file_hashes(path)["sha256"],
        "works_in": verify_adapter(path, family, live=weights),
    }
