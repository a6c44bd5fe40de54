"""Merges adapters: the sum of their updates as one adapter, exactly or at a chosen rank.

The update of a layer is the sum over files of s (alpha/r) up @ down. Factors that are concatenated give that
sum, [u1 u2] [d1; d2] = u1 d1 + u2 d2, and ranks add; factors that are added to each other would give the
cross terms u1 d2 and u2 d1 as well. A lower rank comes from a truncated SVD of the concatenation.

Strengths can differ from layer to layer: patterns over layer names, from a TOML file or the command line.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from lora_core.errors import AdapterFileError, ConfigError, ModelFileError, count_words, wrap_os_errors
from lora_core.formats import kinds
from lora_core.formats.io import as_bytes, encode_header
from lora_core.formats.layers import check_plain
from lora_core.generate.request import WeightedLora
from lora_core.lora.lycoris import LycorisUpdate
from lora_core.lora.weights import AdapterWeights, LayerKey, LayerWeights, LoadedLora
from lora_core.model_files.families import Family
from lora_core.model_files.header import Header, read_header
from lora_core.models.weight_files import THIRDS, SafetensorsFile, TensorSource
from lora_core.settings.config import leaves, load_toml, parse_toml
from lora_core.settings.schema import PatternError, compile_pattern, last_matches
from lora_core.system.files import expand_home, parse_object, read_object, sync_folder
from lora_core.tools.delta import (
    BaseWeights,
    Updates,
    check_out,
    file_record,
    file_updates,
    save_with_side_file,
    shared_family,
    titles,
)
from lora_core.tools.shrink import plain_lora, rank_words
from lora_core.tools.svd import OnLayer, Pair, TruncationLoss, adapter_from_pairs, check_rank, truncate_pair

BlockWeights = dict[str, tuple[float, ...]]
"""A pattern that is searched in "part.path", to a weight for each merged file; the last match counts."""


T = TypeVar("T")


def strengths_by_layer(
    adapters: Sequence[tuple[WeightedLora | LoadedLora, Mapping[LayerKey, T]]], blocks: BlockWeights
) -> dict[LayerKey, list[tuple[float, T]]]:
    """For each layer what changes it, of adapters with what each has for a layer, and at which strength: that
    of the adapter times the weight in `blocks`.

    Raises:
        ConfigError: names a pattern that matches no layer, probably a typo.
    """
    names = [".".join(key) for key in dict.fromkeys(key for _, layers in adapters for key in layers)]
    for text in blocks:
        if not any(map(compile_pattern(text).search, names)):
            raise ConfigError(
                f"The pattern {text!r} of --blocks matches no layer of these files; their layers"
                f" are named like {names[0] if names else 'unet.mid_block...'}."
            )
    weights, found = last_matches(blocks, names), dict[LayerKey, list[tuple[float, T]]]()
    for number, (adapter, layers) in enumerate(adapters):
        for key, layer in layers.items():
            own = weights.get(".".join(key))
            if strength := adapter.on(key[0]) * (own[number] if own else 1.0):
                found.setdefault(key, []).append((strength, layer))
    return found


def parse_block_weights(text: str, files: int) -> BlockWeights:
    """The table that `--blocks` gives; an empty text gives an empty one.

    Args:
        text: a TOML file of `pattern = weight` and `pattern = [weight, ...]`, or the same rows inline with
            commas between.
        files: how many are merged; a list has one weight for each.

    Raises:
        ConfigError: a row cannot be parsed.
    """
    if not text:
        return {}
    path = expand_home(text)
    if path.suffix == ".toml" and not path.exists():
        raise ConfigError(f"The table {path} of --blocks does not exist.")
    table = dict(leaves(load_toml(path))) if path.is_file() or path.suffix == ".toml" else _inline(text)
    for name in table:
        try:
            compile_pattern(name)
        except PatternError as error:
            raise ConfigError(f"The pattern {name!r} of --blocks cannot be used: {error}.") from error
    return {name: _weights(name, value, files) for name, value in table.items()}


def _inline(text: str) -> dict[str, Any]:
    """Rows with commas between; a value is a number, or a list with commas of its own."""
    rows = [row.rpartition("=") for row in re.split(r",(?![^\[]*\])", text.strip().removesuffix(","))]
    if not all(name.strip() and value.strip() for name, _, value in rows):
        raise ConfigError(
            f"--blocks {text!r} is neither a TOML file nor a table such as 'mid_block=0.5,up_blocks.1=0'."
        )
    try:
        return {n.strip(): parse_toml(f"value = {v}", f"--blocks {n}")["value"] for n, _, v in rows}
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--blocks {text!r} holds a weight that is not a number.") from error


def _weights(name: str, value: Any, files: int) -> tuple[float, ...]:
    values = value if isinstance(value, list) else [value] * files
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e6]
    if len(numbers) != len(values):
        raise ConfigError(f"{name} = {value!r} of --blocks should be a number, or a list of numbers.")
    if len(numbers) != files:
        raise ConfigError(
            f"{name} of --blocks lists {len(numbers)} weights for {files} files; give one number for all or"
            " one for each file."
        )
    return tuple(float(number) for number in numbers)


# The sum.


def merge_adapters(
    adapters: Sequence[LoadedLora], rank: int | None = None, blocks: BlockWeights | None = None
) -> tuple[AdapterWeights, TruncationLoss]:
    """The sum of plain adapters, each times its strength, as one adapter in fp32 with one alpha.

    Args:
        adapters: what to add up, all for one family.
        rank: of the result; None adds the ranks and loses nothing.
        blocks: weights of layers on top of the strengths.

    Returns:
        The adapter, and what the rank lost.

    Raises:
        AdapterFileError: two adapters give a layer different shapes, or no layer changes anything.
        ConfigError: the rank is out of range, or a row of `blocks` matches nothing.
    """
    if rank is not None:
        check_rank(rank)
    for adapter in adapters:
        check_plain(adapter.weights)
    found = strengths_by_layer([(one, one.weights.layers) for one in adapters], blocks or {})
    loss = TruncationLoss()
    pairs: dict[LayerKey, Pair] = {}
    for key, all_terms in found.items():
        terms = [(factor, layer) for factor, layer in all_terms if factor * layer.scale != 0]
        if not terms:
            continue
        pair = _concatenate(key, terms)
        if rank is not None:
            largest = float(pair[0].double().norm() * pair[1].double().norm())
            pair, norm, lost = truncate_pair(pair, rank)
            if math.sqrt(norm) <= 1e-12 * largest:
                continue  # They cancel each other, up to rounding.
            loss.layers[key] = (norm, lost)
        pairs[key] = pair
    if not pairs:
        raise AdapterFileError("With these strengths and weights nothing is left of any layer.")
    return adapter_from_pairs(pairs), loss


def _concatenate(key: LayerKey, terms: Sequence[tuple[float, LayerWeights]]) -> Pair:
    """The sum of the terms as one pair: up (out, R) or (out, R, 1, 1), down (R, in) or (R, in, k, k)."""
    # A 1 x 1 convolution and a linear layer are the same; where files differ, the longer shape can be both.
    template = max((layer.down.shape for _, layer in terms), key=len)
    ups, downs = [], []
    for factor, layer in terms:
        inner = layer.down.shape[1:]
        same = inner == template[1:] or (inner.numel() == inner[0] == template[1:].numel() == template[1])
        if not same or layer.up.shape[0] != terms[0][1].up.shape[0]:
            raise AdapterFileError(
                f"The files give {'.'.join(key)} different shapes, {_size(terms[0][1])} and {_size(layer)};"
                " they are for different bases."
            )
        ups.append(factor * layer.scale * layer.up.double().flatten(1))
        downs.append(layer.down.float().reshape(-1, *template[1:]))
    up = torch.cat(ups, dim=1)
    return up.reshape(*up.shape, *(1 for _ in template[2:])), torch.cat(downs)


def _size(layer: LayerWeights) -> str:
    return f"{list(layer.down.shape[1:])} to {layer.up.shape[0]}"


# Files.

MERGED_KEY = "lora_easel.merged"
"""Our own key of a header: the merged files, as a JSON list of {name, sha256, strength, text_strength}."""
_AGREED = (
    "ss_sd_model_name",
    "ss_clip_skip",
    "ss_resolution",
    "modelspec.resolution",
    "modelspec.prediction_type",
)
"""Metadata that is kept where all files agree."""


@dataclass(frozen=True)
class LoraFile:
    """An adapter file of any kind, read."""

    lora: WeightedLora
    updates: Updates
    metadata: Mapping[str, str]
    family: Family

    @property
    def path(self) -> Path:
        """Where it is."""
        return Path(self.lora.file)


def merge_files(
    loras: Sequence[WeightedLora],
    out: Path,
    rank: int | None = None,
    blocks: str = "",
    precision: str = "fp32",
    base_name: str = "",
    on_layer: OnLayer | None = None,
) -> list[str]:
    """Write the sum of adapter files as one plain LoRA of the kohya format, and its side file.

    Args:
        out: the file to write; it must not exist.
        rank: of the result; None adds the ranks.
        blocks: the text of `--blocks`, or "".
        precision: "fp32", "fp16" or "bf16".
        base_name: the base that a DoRA is for, or "".
        on_layer: called for a file whose decomposition takes long.

    Returns:
        The operation and its cost, in sentences.

    Raises:
        LoraError: one sentence on the problem; nothing is written then.
    """
    check_out(out)
    base = BaseWeights(base_name) if base_name else None
    files = read_files(loras, base.family if base else None)
    weights_of = parse_block_weights(blocks, len(files))
    sentences = extras_sentences(loras)
    adapters, reduced = [], False
    for file in files:
        weights, lost = plain_lora(file.path, file.updates, rank, base, on_layer)
        if lost:
            sentences.append(f"{file.path.name} as a plain LoRA: {lost.sentence(rank)}")
            reduced = True
        adapters.append(LoadedLora(weights, file.lora.strength, file.lora.text_strength))
    weights, loss = merge_adapters(adapters, rank, weights_of)
    save_with_side_file(weights, files[0].family, out, precision, _header(files, out))
    span = rank_words(layer.rank for layer in weights.layers.values())
    sentences.append(f"{count_words(len(weights.layers), 'layer')} of {span} from {files_words(files)}.")
    if rank is not None and not reduced:
        sentences.append(loss.sentence(rank))
    elif rank is not None and not loss.none:
        sentences.append(f"Of the sum of these: {loss.sentence(rank)}")
    return sentences


def extras_sentences(loras: Sequence[WeightedLora]) -> list[str]:
    """A sentence for each file that contains something that is not merged."""
    paths = [Path(lora.file) for lora in loras]
    found = [(path.name, kinds.extras_sentence(read_header(path).shapes)) for path in paths]
    return [f"{name}: {sentence}" for name, sentence in found if sentence]


def files_words(files: Sequence[LoraFile]) -> str:
    """How many files, in words."""
    return "one file" if len(files) == 1 else f"{len(files)} files"


def read_files(loras: Sequence[WeightedLora], known: Family | None) -> list[LoraFile]:
    """Read all files, once their headers agree on the family.

    A file that does not name its family is taken to be of the others'; its layers are checked later.

    Raises:
        AdapterFileError: they are for different families, or one is broken.
    """
    paths = [Path(lora.file) for lora in loras]
    family = known or shared_family(paths, "only adapters for one kind of base can be merged")
    return [LoraFile(lora, *file_updates(path, family)) for lora, path in zip(loras, paths, strict=True)]


def file_rows(files: Sequence[LoraFile]) -> list[dict[str, object]]:
    """The files for a header: {name, sha256, strength, text_strength} of each."""
    return [
        {**file_record(file.path), "strength": file.lora.strength, "text_strength": file.lora.on_text}
        for file in files
    ]


def _header(files: Sequence[LoraFile], out: Path) -> dict[str, str]:
    """The metadata of the merged file, without what `save_adapter` adds."""
    rows = file_rows(files)
    parts = " + ".join(f"{row['strength']:g} x {row['name']}" for row in rows)
    texts = {
        **titles(out),
        "modelspec.implementation": "diffusers",
        "modelspec.description": f"Sum of LoRA adapters: {parts}, made with LoRA Easel",
        "modelspec.merged_from": ", ".join(str(row["name"]) for row in rows),
        "ss_tag_frequency": json.dumps(_tag_counts(files)),
        MERGED_KEY: json.dumps(rows),
    }
    for key in _AGREED:
        values = {file.metadata.get(key) for file in files}
        if len(values) == 1 and (value := values.pop()):
            texts[key] = value
    words = [file.metadata.get("modelspec.trigger_phrase", "").strip() for file in files]
    trigger = ", ".join(dict.fromkeys(word for word in words if word))
    return texts | ({"modelspec.trigger_phrase": trigger} if trigger else {})


def _tag_counts(files: Sequence[LoraFile]) -> dict[str, dict[str, int]]:
    """The tags of all files by dataset, for A1111's list of trained words; broken entries are left out."""
    tags: dict[str, dict[str, int]] = {}
    for file in files:
        for name, counts in parse_object(file.metadata.get("ss_tag_frequency", "")).items():
            if isinstance(counts, dict):
                own = f"{file.path.stem} {name}" if name in tags else str(name)
                tags[own] = {str(tag): n for tag, n in counts.items() if isinstance(n, int)}
    return tags


# Merges adapters into a base on disk: a diffusers folder or a single file, copied with its weights changed.
#
# A file is copied tensor by tensor. Where adapters change a tensor it becomes W0 + sum of s delta, summed
# in fp32 as `lora/weights.Merger` does and rounded once to the tensor's own dtype; everything else, names,
# order and offsets in the file included, is copied byte for byte. At most one tensor is in memory at a
# time.


Term = tuple[float, LycorisUpdate]
"""A strength, and the update that it multiplies."""
STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
"""Metadata that is no longer true once a tensor has changed."""
_OTHER_WEIGHTS = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".onnx", ".h5")
_TEXTS = (".json", ".md", ".txt")
_CHUNK = 2**22


TensorEdit = tuple[TensorSource, list[Term]]
"""A change of one tensor, or of a part of it."""
TensorEdits = dict[Path, dict[str, list[TensorEdit]]]
"""File to tensor name to its changes."""


def merge_files_into_base(
    loras: Sequence[WeightedLora], base_name: str, out: Path, blocks: str = "", note: OnLayer | None = None
) -> list[str]:
    """Write a copy of a base with adapter files merged into it, LoHa, LoKr, OFT and DoRA exactly.

    Args:
        base_name: a folder, a file or a hub id.
        out: the file or folder to make; it must not exist.
        blocks: the text of `--blocks`, or "".
        note: called with (done, all) as the changed tensors are written.

    Returns:
        A summary, in sentences.

    Raises:
        AdapterFileError: a layer is not in this base or has another shape, or nothing would change.
        ModelFileError: the base cannot be read, the result overflows its dtype, or `out` cannot be written.
    """
    base = BaseWeights(base_name)
    if out.exists():
        raise AdapterFileError(f"{out} already exists; choose another name or remove it first.")
    if base.single != (out.suffix.lower() == ".safetensors"):
        kind = (
            "file, so --out should end in .safetensors"
            if base.single
            else "folder, so --out should be one too"
        )
        raise AdapterFileError(f"The base {base.path} is a {kind}; {out} does not fit.")
    files = read_files(loras, base.family)
    texts = {
        MERGED_KEY: json.dumps(file_rows(files)),
        "modelspec.merged_from": ", ".join([base.path.stem, *(file.path.stem for file in files)]),
    }
    weights = parse_block_weights(blocks, len(files))
    terms = strengths_by_layer([(file.lora, file.updates) for file in files], weights)
    if not terms:
        raise AdapterFileError("With these strengths and weights nothing of the base would change.")
    _write(base, _edits(base, terms), out, texts, note)
    return [
        *extras_sentences(loras),
        f"{count_words(len(terms), 'layer')} of the base changed by {files_words(files)}.",
    ]


def _write(
    base: BaseWeights, edits: TensorEdits, out: Path, texts: Mapping[str, str], note: OnLayer | None
) -> None:
    """Write the copy, completely or not at all."""
    done, total = itertools.count(1), sum(map(len, edits.values()))

    def written() -> None:
        if note is not None:
            note(next(done), total)

    draft = out.with_name(f".{out.name}.{os.getpid()}.draft")
    try:
        with wrap_os_errors(ModelFileError, f"{out} cannot be written"):
            if base.single:
                _write_file(base.path, draft, edits.get(base.path, {}), texts, written)
            else:
                _write_folder(base.path, draft, edits, texts, written)
            os.rename(draft, out)
            sync_folder(out.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def _edits(base: BaseWeights, terms: Mapping[LayerKey, list[Term]]) -> TensorEdits:
    """The changes of each tensor, once all layers have been found and fit."""
    missing = [key for key in terms if not base.places(key)]
    if missing:
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise AdapterFileError(
            f"The adapter has layers that the base {base.path} lacks, {'.'.join(missing[0])}{more}; it is"
            " for another base."
        )
    edits: TensorEdits = {}
    for key, changes in terms.items():
        for source in base.places(key):
            for _, update in changes:
                update.check_base(source.shape)
            tensors = edits.setdefault(source.file.path, {})
            tensors.setdefault(source.key, []).append((source, changes))
    return edits


def _write_file(
    source: Path, target: Path, edits: Mapping[str, list[TensorEdit]], texts: Mapping[str, str],
    written_one: Callable[[], None],
) -> None:  # fmt: skip
    """Copy a safetensors file with some tensors changed, flush it to the disk, and read it back."""
    header = read_header(source, ModelFileError)
    metadata = {key: text for key, text in header.metadata.items() if key not in STALE} | dict(texts)
    start = encode_header(header.tensors, metadata)
    written = hashlib.sha256(start)
    with open(target, "wb") as file:
        file.write(start)
        for piece in _pieces(source, header, edits, written_one):
            file.write(piece)
            written.update(piece)
        file.flush()
        os.fsync(file.fileno())
    with open(target, "rb") as file:
        found = hashlib.file_digest(file, "sha256")
    if found.digest() != written.digest() or read_header(target, ModelFileError).tensors != header.tensors:
        raise ModelFileError(f"{target} was read back changed; is the disk failing?")


def _pieces(
    source: Path, header: Header, edits: Mapping[str, list[TensorEdit]], written: Callable[[], None]
) -> Iterator[bytes | memoryview]:
    """The tensor bytes of a file in their order, changed where there is an edit."""
    weights = SafetensorsFile(source)
    with open(source, "rb") as file:
        for name in sorted(header.tensors, key=lambda name: header.tensors[name]["data_offsets"]):
            if name in edits:
                changed = _edit_tensor(weights.tensor(name), edits[name], f"{source}: the tensor {name}")
                yield as_bytes(changed).numpy().data
                written()
                continue
            first, last = header.tensors[name]["data_offsets"]
            file.seek(header.start + first)
            while first < last:
                chunk = file.read(min(_CHUNK, last - first))
                if not chunk:
                    raise ModelFileError(f"{source} has become shorter; is it still being written?")
                first += len(chunk)
                yield chunk


def _edit_tensor(tensor: torch.Tensor, edits: Sequence[TensorEdit], name: str) -> torch.Tensor:
    """W0 + sum of s delta in fp32, rounded to the tensor's own dtype."""
    if not tensor.is_floating_point():
        raise ModelFileError(f"{name} has an integer dtype, into which nothing can be merged.")
    full = tensor.float().clone()
    for source, terms in edits:
        rows = full if source.third is None else full.chunk(THIRDS)[source.third]
        weight = rows.t() if source.transposed else rows
        merged = weight
        for strength, update in terms:
            merged = merged + strength * update.delta(weight).reshape(weight.shape)
        weight.copy_(merged)
    rounded = full.to(tensor.dtype)
    if not torch.isfinite(rounded.float()).all():
        reason = "more than its dtype can" if torch.isfinite(full).all() else "NaN or infinity"
        raise ModelFileError(
            f"{name} would hold {reason}; lower the strength, or take a base in fp32 or bf16."
        )
    return rounded


def _write_folder(
    source: Path, target: Path, edits: TensorEdits, texts: Mapping[str, str], written: Callable[[], None]
) -> None:
    """Copy a diffusers folder with some weight files changed.

    At the top only what `model_index.json` lists is copied, and texts. In changed parts, weights in other
    formats would be those of the unchanged base, and are left out.
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
        _write_file(path, target / path.relative_to(source), changes, texts, written)


def _copy_tree(source: Path, target: Path, wanted: Callable[[Path], bool]) -> None:
    """Copy the wanted files of a folder. Unlike `shutil.copytree`, it stops at the first error."""
    target.mkdir()
    for path in filter(wanted, source.iterdir()):
        if path.is_dir():
            _copy_tree(path, target / path.name, wanted)
        else:
            shutil.copyfile(path, target / path.name)


def _parts(folder: Path) -> set[str]:
    """The components that a diffusers folder lists."""
    try:
        index = read_object(folder / "model_index.json")
    except (OSError, ValueError) as error:
        raise ModelFileError(
            f"{folder} has no readable model_index.json, so what to copy is unknown."
        ) from error
    return {"model_index.json", *index}
