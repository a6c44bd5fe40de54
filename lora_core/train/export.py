"""The file for other tools: factors, everything that is known about the run in the header, and the side
file. With `adapter.auto_rank` it is cut to the ranks that the run found at its end; checkpoints keep all.
"""

import json
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_core.data.captions import plain_record_caption, triggers_of
from lora_core.errors import RunError
from lora_core.formats import metadata
from lora_core.formats.io import file_hashes, load_adapter, read_tensors, save_adapter, write_tokens
from lora_core.formats.verify import verify_adapter
from lora_core.lora.weights import AdapterWeights, LayerWeights
from lora_core.model_files.families import Family, family_of_version
from lora_core.model_files.header import read_header
from lora_core.models.load import BaseModel
from lora_core.runs.folder import RunFolder, check_run_name
from lora_core.settings.config import RunConfig
from lora_core.settings.schema import parse_new_tokens
from lora_core.system.files import tokens_folder, write_atomically
from lora_core.tools.shrink import (
    KEEP,
    SHRUNK_KEY,
    MeasuredCut,
    decompose,
    rank_words,
    shrink_adapter,
    truncate_to_ranks,
)
from lora_core.train.checkpoint import FACTORS, STATE, verify_checkpoint
from lora_core.train.data import TrainImage

RAW_SUFFIX = "-raw"
"""Ends the name of the file with the raw adapter, where the one without it holds the average."""
CUT = "cut"
"""What `adapter.auto_rank` found, in the record of the checkpoint: see `cut_record`."""


def export_header(
    config: RunConfig, base: BaseModel, items: list[TrainImage], steps: int, started_at: float
) -> dict[str, str]:
    """The texts of a file's header."""
    records = {item.record.path: item.record for item in items}.values()
    captions = [plain_record_caption(record, config.dataset) for record in records]
    buckets = Counter((item.bucket.width, item.bucket.height) for item in items)
    header = metadata.export_metadata(config, base, captions, buckets, steps, (started_at, time.time()))
    # The concepts' own, where there are some.
    triggers = list(triggers_of(records, config.dataset))
    names = (token.name for token in parse_new_tokens(config.adapter.new_tokens))
    triggers += [name for name in names if name not in triggers]
    return header | ({"modelspec.trigger_phrase": ", ".join(triggers)} if triggers else {})


def write_export(
    weights: AdapterWeights,
    path: Path,
    how: tuple[str, str],
    family: Family,
    header: dict[str, str],
    picture: Path | None = None,
) -> Path:
    """Write the adapter, and beside it the side file with its trigger word, a model card, its new tokens, and
    `picture`, a PNG that was drawn with the adapter, if there is one.

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
            # A damaged sample must not lose the export.
            picture = None
    save_adapter(weights, path, family, format=kind, dtype=precision, metadata=header)
    write_atomically(
        path.with_suffix(".json"), metadata.side_file(header.get("modelspec.trigger_phrase", ""))
    )
    metadata.write_beside(path, read_header(path).metadata, picture)
    write_tokens(weights, path)
    return path


def changes_anything(weights: AdapterWeights) -> bool:
    """Whether any up factor is not 0; True for other kinds than LoRA."""
    return bool(weights.others) or any(layer.up.count_nonzero() for layer in weights.layers.values())


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


def cut_record(found: MeasuredCut | None, why: str) -> dict[str, Any]:
    """The measurement, as plain values for a checkpoint's record; `why` nothing was, if so."""
    if found is None:
        return {"why": why}
    rows = [{"part": part, "module": module, "rank": rank} for (part, module), rank in found.ranks.items()]
    return {"ranks": rows, "kept": found.kept, "standard_error": found.standard_error}


def cut_adapter(weights: AdapterWeights, record: Mapping[str, Any]) -> tuple[AdapterWeights, dict[str, Any]]:
    """An adapter cut as a `cut_record` says: to the ranks that were measured, else to those that keep 99% of
    the energy; and the cut, as the fields of `RanksChosen`."""
    parts, trained = decompose(weights), weights.highest_rank
    measured = {key: record[key] for key in ("kept", "standard_error") if key in record}
    if measured:
        ranks = {(str(row["part"]), str(row["module"])): int(row["rank"]) for row in record["ranks"]}
        cut = truncate_to_ranks(parts, ranks)[0]
        how = (
            f" and keeps {record['kept']:.1%} of the gain on held-out images (standard error"
            f" {record['standard_error']:.1%}, on other noise than the choice of ranks)."
        )
    else:
        cut = shrink_adapter(parts, energy=KEEP)[0]
        how = f", those with {KEEP:.0%} of the energy; their gain was not measured: {record['why']}."
    gone, numbers = len(weights.layers) - len(cut.layers), sum(map(_numbers, cut.layers.values()))
    share = numbers / parts.own_parameters()
    left = f", {gone} of {len(weights.layers)} layers are left out" if gone else ""
    needs = rank_words(layer.rank for layer in cut.layers.values())
    sentence = f"Trained at rank {trained}; {needs} will do{left}: the file has {share:.0%} of the numbers"
    words = record.get("sentence") or sentence + how
    report = {"sentence": words, "trained": trained, "rank": cut.highest_rank, "parameters": share}
    return cut, report | measured


def _numbers(layer: LayerWeights) -> int:
    return layer.up.numel() + layer.down.numel()


def export_checkpoint(
    run: RunFolder, which: str, name: str, how: tuple[str, str],
    full_rank: bool = False, measured_rank: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Export a checkpoint of a run, "last", "best" or a step, as `name` in the run's export folder; where an
    average is kept, the raw adapter too. `how` is (format, precision).

    With `adapter.auto_rank` the file is cut, but for `full_rank` and for the raw adapter; with
    `measured_rank` to the ranks that the run's report measured.

    Returns:
        {file, raw, tokens, bytes, modules, sha256, cut, works_in}: `raw` is the path of the raw adapter's
        file, or "", `tokens` the folder of its new tokens' own files, or "", `cut` the fields of
        `RanksChosen`, or {}, and `works_in` the result of `verify_adapter` against the adapter in memory:
        {ok, tools: [{tool, keys, matched, dropped, max_delta_error, note}], ...}.

    Raises:
        RunError: no such checkpoint, it is incomplete or not measured, or the name cannot be a file's.
        AdapterFileError: the file cannot be written.
    """
    step = run.step_of(which)
    folder = run.checkpoint(step)
    record = verify_checkpoint(folder) if (folder / STATE).exists() else {}
    header = dict(read_tensors(folder / "adapter.safetensors")[1])
    weights = load_adapter(folder / "adapter.safetensors", plain=False)
    family = family_of_version(header.get("ss_base_model_version", ""))
    if family is None:
        raise RunError(f"The checkpoint {folder} does not say which family of base it is for.")
    cut: dict[str, Any] = {}
    config = run.config_or_none()
    if measured_rank:
        found = run.analysis(step)
        if found is None or not found.rank:
            raise RunError(
                f"The rank that step {step:,} of {run.name} needs was not measured; make its report first."
            )
        weights, cut = cut_adapter(weights, found.model_dump())
        header[SHRUNK_KEY] = json.dumps(cut)
    elif config and config.adapter.auto_rank and not full_rank and changes_anything(weights):
        other = {"why": f"that is done at the end of a run, for the step of its file, which was not {step:,}"}
        weights, cut = cut_adapter(weights, record.get(CUT) or other)
        header[SHRUNK_KEY] = json.dumps(cut)
    stem = check_run_name(name)
    header["ss_output_name"] = header["modelspec.title"] = stem
    target = run.exports / f"{stem}.safetensors"
    raw: Path | None = None
    if record.get("average"):
        factors = load_adapter(folder / FACTORS, plain=False)
        raw = write_raw(factors, target, how, family, header, latest_sample(run, step, raw=True))
    path = write_export(weights, target, how, family, header, latest_sample(run, step))
    return {
        "file": str(path),
        "raw": str(raw or ""),
        "tokens": str(tokens_folder(path)) if weights.tokens else "",
        "bytes": path.stat().st_size,
        "modules": len(weights.every_layer()),
        "sha256": file_hashes(path)["sha256"],
        "cut": cut,
        "works_in": verify_adapter(path, family, live=weights),
    }
