"""The verb `merge`: adapter files into one file, or into a copy of a base.

The mathematics is in `combine.py`, `plain.py` and `into_base.py`; here files are read, checked against each
other, and written with a header that says what was merged.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from lora_core.errors import AdapterFileError, ModelFileError
from lora_core.formats import detect
from lora_core.formats.io import as_bytes, encode_header, file_hashes, save_adapter
from lora_core.formats.layer_shapes import reshape_adapter
from lora_core.formats.metadata import side_file
from lora_core.generate.request import WeightedLora
from lora_core.lora.inject import LoadedLora
from lora_core.lora.weights import AdapterWeights, LayerKey
from lora_core.model_files.families import Family
from lora_core.model_files.header import Header, read_header
from lora_core.models.weight_files import THIRDS, SafetensorsFile, TensorSource
from lora_core.system.paths import sync_folder, write_atomically
from lora_core.system.untrusted import parse_json
from lora_core.tools.base_weights import BaseWeights
from lora_core.tools.combine import (
    BlockWeights,
    Note,
    merge_adapters,
    needs_base,
    parse_block_weights,
    to_lora,
)
from lora_core.tools.delta import Update, Updates, file_updates
from lora_core.tools.rewrite import check_out

MERGED_KEY = "lora_easel.merged"
"""Our own key of a header: what was merged, as a JSON list of {name, sha256, strength, text_strength}."""
_AGREED = (
    "ss_sd_model_name",
    "ss_clip_skip",
    "ss_resolution",
    "modelspec.resolution",
    "modelspec.prediction_type",
)
"""Texts that are kept where all files say the same."""


@dataclass(frozen=True)
class Opened:
    """An adapter file, read."""

    lora: WeightedLora
    updates: Updates
    metadata: Mapping[str, str]
    family: Family


@dataclass(frozen=True)
class MergeOptions:
    """How to merge.

    Attributes:
        rank: of the result; None adds the ranks.
        blocks: the text of `--blocks`, or "".
        precision: "fp32", "fp16" or "bf16".
        base: what `--base` names, or "".
    """

    rank: int | None = None
    blocks: str = ""
    precision: str = "fp32"
    base: str = ""


def merge_files(
    loras: Sequence[WeightedLora], out: Path, wanted: MergeOptions, now: float, note: Note | None = None
) -> list[str]:
    """Write the sum of adapter files as one plain LoRA of the kohya format, and its side file.

    Args:
        loras: the files.
        out: the file to write; it must not be there yet.
        wanted: how.
        now: the time, in seconds since the epoch.
        note: called with (done, all) layers of a file whose decomposition takes long.

    Returns:
        What was done and what it cost, in sentences.

    Raises:
        LoraError: one sentence on what is wrong; nothing is written then.
    """
    check_out(out)
    base = BaseWeights(wanted.base) if wanted.base else None
    opened = _opened(loras, base.family if base else None)
    blocks = _blocks(wanted.blocks, len(opened))
    said = _extras(loras)
    adapters, reduced = [], False
    for source in opened:
        weights, sentence = _plain(source, wanted.rank, base, note)
        said += [sentence] if sentence else []
        reduced |= bool(sentence)
        adapters.append(LoadedLora(weights, source.lora.strength, source.lora.text_strength))
    weights, loss = merge_adapters(adapters, wanted.rank, blocks)
    family = opened[0].family
    header = _header(opened, out.stem, now)
    save_adapter(reshape_adapter(weights, family), out, family, dtype=wanted.precision, metadata=header)
    beside = out.with_suffix(".json")
    if not beside.exists():
        write_atomically(beside, side_file(header.get("modelspec.trigger_phrase", "")))
    ranks = sorted({layer.rank for layer in weights.layers.values()})
    span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    said.append(f"{len(weights.layers)} layers of {span} from {_count(opened)}.")
    if wanted.rank is not None and not reduced:
        said.append(loss.sentence(wanted.rank))
    elif wanted.rank is not None and not loss.none:
        said.append(f"Of the sum of these: {loss.sentence(wanted.rank)}")
    return said


def merge_files_into_base(
    loras: Sequence[WeightedLora], base_name: str, out: Path, blocks: str = ""
) -> list[str]:
    """Write a copy of a base with adapter files merged into it, LoHa, LoKr and DoRA exactly.

    Args:
        loras: the files.
        base_name: what `--into-base` names.
        out: the file or folder to make; it must not be there yet.
        blocks: the text of `--blocks`, or "".

    Returns:
        What was done, in sentences.

    Raises:
        LoraError: one sentence on what is wrong; nothing is written then.
    """
    base = BaseWeights(base_name)
    if out.exists():
        raise AdapterFileError(f"{out} exists already; choose another name or remove it first.")
    if base.single != (out.suffix.lower() == ".safetensors"):
        kind = (
            "file, so --out should end in .safetensors"
            if base.single
            else "folder, so --out should be one too"
        )
        raise AdapterFileError(f"The base {base.path} is a {kind}; {out} does not fit.")
    opened = _opened(loras, base.family)
    adapters = [(o.updates, o.lora.strength, o.lora.on_text) for o in opened]
    texts = {
        MERGED_KEY: json.dumps(_rows(opened)),
        "modelspec.merged_from": ", ".join([base.path.stem, *(_title(o) for o in opened)]),
    }
    layers = merge_into_base(base, adapters, out, texts, _blocks(blocks, len(opened)))
    return [*_extras(loras), f"{layers} layers of the base changed by {_count(opened)}."]


def _extras(loras: Sequence[WeightedLora]) -> list[str]:
    """What the files hold that is not merged, a sentence for each that does."""
    found = [
        (Path(item.file).name, detect.extras_sentence(read_header(Path(item.file)).shapes)) for item in loras
    ]
    return [f"{name}: {sentence}" for name, sentence in found if sentence]


def _blocks(text: str, files: int) -> BlockWeights | None:
    return parse_block_weights(text, files) if text else None


def _count(opened: Sequence[Opened]) -> str:
    return "one file" if len(opened) == 1 else f"{len(opened)} files"


def _opened(loras: Sequence[WeightedLora], known: Family | None) -> list[Opened]:
    """All files, once they are seen to be for one family.

    A file that does not say its family is taken to be of the others'; layers that do not fit come out later.
    """
    paths = [Path(lora.file) for lora in loras]
    families: dict[str, tuple[Path, Family]] = {}
    for path in paths:
        header = read_header(path)
        family = detect.detect_family(header.shapes, header.metadata)
        if family is not None:
            families.setdefault(family.title, (path, family))
    if len(families) > 1 and known is None:
        (one, first), (two, second), *_ = families.values()
        raise AdapterFileError(
            f"{one} is for {first.title} and {two} for {second.title}; only adapters for one kind of base can"
            " be merged."
        )
    family = known or next((family for _, family in families.values()), None)
    opened = []
    for lora, path in zip(loras, paths, strict=True):
        updates, metadata, of = file_updates(path, family)
        opened.append(Opened(lora, updates, metadata, of))
    return opened


def _plain(
    source: Opened, rank: int | None, base: BaseWeights | None, note: Note | None
) -> tuple[AdapterWeights, str]:
    """A file as a plain LoRA, and what that lost, in a sentence, or ""."""
    path = Path(source.lora.file)
    low = {key: u.low for key, u in source.updates.items() if u.low is not None and u.magnitude is None}
    if len(low) == len(source.updates):
        return AdapterWeights(low, dict(source.metadata)), ""
    dora = needs_base(source.updates)
    kind = "DoRA" if dora else "LoHa or LoKr"
    if rank is None:
        raise AdapterFileError(
            f"{path} is a {kind}, which is a plain LoRA only to a rank: give --rank, such as 32."
        )
    if dora and base is None:
        raise AdapterFileError(
            f"{path} is a DoRA, whose update depends on the weights of its base: give --base, the model that"
            " it was made for."
        )
    weights, loss = to_lora(source.updates, rank, base.weight if base else None, note)
    return weights, f"{path.name} as a plain LoRA: {loss.sentence(rank)}"


def _rows(opened: Sequence[Opened]) -> list[dict[str, object]]:
    return [
        {
            "name": _title(source),
            "sha256": str(file_hashes(Path(source.lora.file))["sha256"])[:12],
            "strength": source.lora.strength,
            "text_strength": source.lora.on_text,
        }
        for source in opened
    ]


def _title(source: Opened) -> str:
    return Path(source.lora.file).stem


def _date(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).replace(microsecond=0).isoformat()


def _header(opened: Sequence[Opened], stem: str, now: float) -> dict[str, str]:
    """What the merged file's header says; what follows from its weights is added when it is written."""
    rows = _rows(opened)
    parts = " + ".join(f"{row['strength']:g} x {row['name']}" for row in rows)
    texts = {
        "ss_output_name": stem,
        "modelspec.title": stem,
        "modelspec.date": _date(now),
        "modelspec.implementation": "diffusers",
        "modelspec.description": f"Sum of LoRA adapters: {parts}, made with LoRA Easel",
        "modelspec.merged_from": ", ".join(str(row["name"]) for row in rows),
        "ss_tag_frequency": json.dumps(_tags(opened)),
        MERGED_KEY: json.dumps(rows),
    }
    for key in _AGREED:
        values = {source.metadata.get(key) for source in opened}
        if len(values) == 1 and (value := values.pop()):
            texts[key] = value
    words = [source.metadata.get("modelspec.trigger_phrase", "").strip() for source in opened]
    trigger = ", ".join(dict.fromkeys(word for word in words if word))
    return texts | ({"modelspec.trigger_phrase": trigger} if trigger else {})


def _tags(opened: Sequence[Opened]) -> dict[str, dict[str, int]]:
    """The tags of all files by dataset, for A1111's list of trained words; what cannot be read is left
    out."""
    tags: dict[str, dict[str, int]] = {}
    for source in opened:
        try:
            found = parse_json(source.metadata.get("ss_tag_frequency", "{}"))
        except ValueError:
            continue
        for name, counts in found.items() if isinstance(found, dict) else ():
            if isinstance(counts, dict):
                own = f"{_title(source)} {name}" if name in tags else str(name)
                tags[own] = {str(tag): n for tag, n in counts.items() if isinstance(n, int)}
    return tags


# Adapters merged into a base on disk: a diffusers folder or a single file, written anew beside the old one.
#
# A file is copied tensor by tensor. Where adapters change a tensor it becomes W0 + sum of s delta, summed
# in fp32 as `lora/inject.Merger` does and rounded once to the tensor's own number type; everything
# else, names, order and places in the file included, is copied byte for byte. At most one tensor is in
# memory at a time.


Term = tuple[float, Update]
"""A strength, and what it multiplies."""

STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
"""Texts of a header that are no longer true once a tensor has changed."""
_OTHER_WEIGHTS = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".onnx", ".h5")
_TEXTS = (".json", ".md", ".txt")
_CHUNK = 2**22


@dataclass(frozen=True)
class TensorEdit:
    """A change of one tensor, or of a part of it."""

    source: TensorSource
    terms: list[Term]


TensorEdits = dict[Path, dict[str, list[TensorEdit]]]
"""File to tensor name to what is done to it."""


def merge_into_base(
    base: BaseWeights,
    adapters: Sequence[tuple[Updates, float, float]],
    out: Path,
    texts: Mapping[str, str],
    blocks: BlockWeights | None = None,
) -> int:
    """Write a copy of a base with adapters merged into it, whole or not at all.

    Args:
        base: where to merge.
        adapters: (updates, strength on the UNet, strength on the text encoders) for each.
        out: the file or the folder to make; it must not be there yet.
        texts: what the header of each changed file says in addition.
        blocks: weights of layers on top of the strengths.

    Returns:
        How many layers were changed.

    Raises:
        AdapterFileError: a layer is not in this base or has another shape, or nothing would change.
        ModelFileError: the result holds more than the base's number type can, or cannot be written.
    """
    terms = _terms(adapters, blocks or BlockWeights())
    edits = _edits(base, terms)
    draft = out.with_name(f".{out.name}.{os.getpid()}.draft")
    try:
        if base.single:
            _write_file(base.path, draft, edits.get(base.path, {}), texts)
        else:
            _write_folder(base.path, draft, edits, texts)
        os.rename(draft, out)
        sync_folder(out.parent)
    except OSError as error:
        raise ModelFileError(f"{out} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
    return len(terms)


def _terms(
    adapters: Sequence[tuple[Updates, float, float]], blocks: BlockWeights
) -> dict[LayerKey, list[Term]]:
    blocks.check(dict.fromkeys(key for updates, *_ in adapters for key in updates))
    terms: dict[LayerKey, list[Term]] = {}
    for number, (updates, on_unet, on_text) in enumerate(adapters):
        for key, update in updates.items():
            strength = (on_unet if key[0] == "unet" else on_text) * blocks.weight(key, number)
            if strength != 0:
                terms.setdefault(key, []).append((strength, update))
    if not terms:
        raise AdapterFileError("With these strengths and weights nothing of the base would change.")
    return terms


def _edits(base: BaseWeights, terms: Mapping[LayerKey, list[Term]]) -> TensorEdits:
    """What to do to each tensor, once all layers have been found and fit."""
    missing = [key for key in terms if not base.places(key)]
    if missing:
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise AdapterFileError(
            f"The adapter has layers that the base {base.path} has not, {'.'.join(missing[0])}{more}; it is"
            " for another base."
        )
    edits: TensorEdits = {}
    for key, changes in terms.items():
        for source in base.places(key):
            shape = _shape(source)
            for _, update in changes:
                size = torch.Size(update.size)
                if size.numel() != shape.numel() or size[0] != shape[0]:
                    raise AdapterFileError(
                        f"The adapter's layer {update.name} has the shape {list(size)}, the base's"
                        f" {list(shape)}; it is for another base."
                    )
            edits.setdefault(source.file.path, {}).setdefault(source.key, []).append(
                TensorEdit(source, changes)
            )
    return edits


def _shape(source: TensorSource) -> torch.Size:
    shape = list(source.file.shapes[source.key])
    if source.third is not None:
        shape[0] //= THIRDS
    return torch.Size(shape[::-1] if source.transposed else shape)


def _write_file(
    source: Path, target: Path, edits: Mapping[str, list[TensorEdit]], texts: Mapping[str, str]
) -> None:
    """Copy a safetensors file with some tensors changed, see it onto the disk, and read it back."""
    header = read_header(source, ModelFileError)
    metadata = {key: text for key, text in header.metadata.items() if key not in STALE} | dict(texts)
    start = encode_header(header.tensors, metadata)
    written = hashlib.sha256(start)
    with open(target, "wb") as file:
        file.write(start)
        for piece in _pieces(source, header, edits):
            file.write(piece)
            written.update(piece)
        file.flush()
        os.fsync(file.fileno())
    found = hashlib.sha256()
    with open(target, "rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    if found.digest() != written.digest() or read_header(target, ModelFileError).tensors != header.tensors:
        raise ModelFileError(f"{target} was read back changed; is the disk failing?")


def _pieces(
    source: Path, header: Header, edits: Mapping[str, list[TensorEdit]]
) -> Iterator[bytes | memoryview]:
    """The tensor bytes of a file in their order, changed where there is an edit."""
    weights = SafetensorsFile(source)
    with open(source, "rb") as file:
        for name in sorted(header.tensors, key=lambda name: header.tensors[name]["data_offsets"]):
            if name in edits:
                changed = _changed(weights.tensor(name), edits[name], f"{source}: the tensor {name}")
                yield as_bytes(changed).numpy().data
                continue
            first, last = header.tensors[name]["data_offsets"]
            file.seek(header.start + first)
            while first < last:
                chunk = file.read(min(_CHUNK, last - first))
                if not chunk:
                    raise ModelFileError(f"{source} has become shorter; is it still being written?")
                first += len(chunk)
                yield chunk


def _changed(tensor: torch.Tensor, edits: Sequence[TensorEdit], name: str) -> torch.Tensor:
    """W0 + sum of s delta in fp32, rounded to the tensor's own type."""
    if not tensor.is_floating_point():
        raise ModelFileError(f"{name} holds whole numbers, into which nothing can be merged.")
    whole = tensor.float().clone()
    for edit in edits:
        rows = whole if edit.source.third is None else whole.chunk(THIRDS)[edit.source.third]
        weight = rows.t() if edit.source.transposed else rows
        merged = weight
        for strength, update in edit.terms:
            merged = merged + strength * update.delta(weight).reshape(weight.shape)
        weight.copy_(merged)
    rounded = whole.to(tensor.dtype)
    if not torch.isfinite(rounded.float()).all():
        reason = "more than its number type can" if torch.isfinite(whole).all() else "NaN or infinity"
        raise ModelFileError(
            f"{name} would hold {reason}; lower the strength, or take a base in fp32 or bf16."
        )
    return rounded


def _write_folder(source: Path, target: Path, edits: TensorEdits, texts: Mapping[str, str]) -> None:
    """Copy a diffusers folder with some files of weights changed.

    At the top only what `model_index.json` lists is copied, and texts. In changed parts, weights in other
    formats would be those of the unchanged base, and stay behind.
    """
    changed = {path.parent for path in edits}
    parts = _parts(source) | {path.parent.name for path in edits}

    def wanted(path: Path) -> bool:
        if path.parent == source:
            return path.name in parts or path.suffix.lower() in _TEXTS
        if path.parent in changed:
            return path not in edits and not path.name.endswith(_OTHER_WEIGHTS)
        return True

    _copy_tree(source, target, wanted)
    for path, changes in edits.items():
        _write_file(path, target / path.relative_to(source), changes, texts)


def _copy_tree(source: Path, target: Path, wanted: Callable[[Path], bool]) -> None:
    """Copy what is wanted of a folder. Unlike `shutil.copytree`, it stops at the first error."""
    target.mkdir()
    for path in filter(wanted, source.iterdir()):
        if path.is_dir():
            _copy_tree(path, target / path.name, wanted)
        else:
            shutil.copyfile(path, target / path.name)


def _parts(folder: Path) -> set[str]:
    """The components that a diffusers folder lists."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFileError(
            f"{folder} has no readable model_index.json, so what to copy is unknown."
        ) from error
    return {"model_index.json", *index}
