"""Merges adapters: the sum of their updates as one adapter, exactly or at a chosen rank.

The update of a layer is the sum over files of s (alpha/r) up @ down. Factors that are concatenated give that
sum, [u1 u2] [d1; d2] = u1 d1 + u2 d2, and ranks add; factors that are added to each other would give the
cross terms u1 d2 and u2 d1 as well. A lower rank comes from a truncated SVD of the concatenation.

Strengths can differ from layer to layer: patterns over layer names, from a TOML file or the command line.
"""

import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_core.errors import AdapterFileError, ConfigError
from lora_core.formats import detect
from lora_core.formats.layers import check_plain
from lora_core.generate.request import WeightedLora
from lora_core.lora.weights import AdapterWeights, LayerKey, LayerWeights, LoadedLora
from lora_core.model_files.families import Family
from lora_core.model_files.header import read_header
from lora_core.settings.config import load_toml, parse_toml
from lora_core.settings.schema import PatternError, compile_pattern
from lora_core.system.files import parse_json
from lora_core.tools.delta import BaseWeights, Updates, file_updates, plain_layers
from lora_core.tools.save import check_out, file_record, save_with_side_file, titles
from lora_core.tools.shrink import file_to_lora
from lora_core.tools.svd import OnLayer, Pair, TruncationLoss, adapter_from_pairs, check_rank, truncate_pair

_INLINE = re.compile(r"\s*([^=,]+?)\s*=\s*(\[[^\]]*\]|[^,\[\]]+?)\s*(?:,|$)")


@dataclass(frozen=True)
class BlockWeights:
    """Weights of layers, one for each of the merged files; of the rows that match a layer the last counts.

    Attributes:
        rows: a pattern that is searched in "part.path", and a weight for each file.
    """

    rows: tuple[tuple[Any, tuple[float, ...]], ...] = ()

    def weight(self, layer: LayerKey, file: int) -> float:
        """The weight of a layer in the file of that number; 1 where no row matches."""
        name = ".".join(layer)
        return next((weights[file] for row, weights in reversed(self.rows) if row.search(name)), 1.0)

    def check(self, layers: Iterable[LayerKey]) -> None:
        """Refuse a row that changes nothing, probably a typo.

        Raises:
            ConfigError: names the pattern that matches no layer.
        """
        names = [".".join(layer) for layer in layers]
        for row, _ in self.rows:
            if not any(map(row.search, names)):
                raise ConfigError(
                    f"The pattern {row.pattern!r} of --blocks matches no layer of these files; their layers"
                    f" are named like {names[0] if names else 'unet.mid_block...'}."
                )


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
        return BlockWeights()
    path = Path(text).expanduser()
    rows = dict(_flatten(_read_table(path))) if path.is_file() or path.suffix == ".toml" else _inline(text)
    return BlockWeights(tuple((_pattern(name), _weights(name, row, files)) for name, row in rows.items()))


def _read_table(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ConfigError(f"The table {path} of --blocks does not exist.")
    return load_toml(path)


def _flatten(table: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    """Rows of nested tables joined by dots, since TOML takes an unquoted `up_blocks.1` for a nested table."""
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _inline(text: str) -> dict[str, Any]:
    rows, position = {}, 0
    while match := _INLINE.match(text, position):
        rows[match[1]] = match[2]
        position = match.end()
    if not rows or text[position:].strip():
        raise ConfigError(
            f"--blocks {text!r} is neither a TOML file nor a table such as 'mid_block=0.5,up_blocks.1=0'."
        )
    try:
        return {
            name: parse_toml(f"value = {value}", f"--blocks {name}")["value"] for name, value in rows.items()
        }
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--blocks {text!r} holds a weight that is not a number.") from error


def _pattern(name: str) -> Any:
    try:
        return compile_pattern(name)
    except PatternError as error:
        raise ConfigError(f"The pattern {name!r} of --blocks cannot be used: {error}.") from error


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
    keys = dict.fromkeys(key for adapter in adapters for key in adapter.weights.layers)
    blocks = blocks or BlockWeights()
    blocks.check(keys)
    loss = TruncationLoss()
    pairs: dict[LayerKey, Pair] = {}
    for key in keys:
        terms = [
            (adapter.on(key[0]) * blocks.weight(key, number), adapter.weights.layers[key])
            for number, adapter in enumerate(adapters)
            if key in adapter.weights.layers
        ]
        terms = [(factor, layer) for factor, layer in terms if factor * layer.scale != 0]
        if not terms:
            continue
        pair = _concatenate(key, terms)
        if rank is not None:
            pair, norm, lost = truncate_pair(pair, rank)
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
"""Our own key of a header: what was merged, as a JSON list of {name, sha256, strength, text_strength}."""
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


@dataclass(frozen=True)
class MergeOptions:
    """How to merge.

    Attributes:
        rank: of the result; None adds the ranks.
        blocks: the text of `--blocks`, or "".
        precision: "fp32", "fp16" or "bf16".
        base: the base that a DoRA is for, or "".
    """

    rank: int | None = None
    blocks: str = ""
    precision: str = "fp32"
    base: str = ""


def merge_files(
    loras: Sequence[WeightedLora],
    out: Path,
    options: MergeOptions,
    now: float,
    on_layer: OnLayer | None = None,
) -> list[str]:
    """Write the sum of adapter files as one plain LoRA of the kohya format, and its side file.

    Args:
        loras: the files.
        out: the file to write; it must not exist.
        options: how.
        now: the time, in seconds since the epoch.
        on_layer: called for a file whose decomposition takes long.

    Returns:
        What was done and what it cost, in sentences.

    Raises:
        LoraError: one sentence on what is wrong; nothing is written then.
    """
    check_out(out)
    base = BaseWeights(options.base) if options.base else None
    files = read_files(loras, base.family if base else None)
    blocks = parse_block_weights(options.blocks, len(files))
    sentences = extras_sentences(loras)
    adapters, reduced = [], False
    for file in files:
        layers = plain_layers(file.updates)
        if layers is not None:
            weights = AdapterWeights(layers, dict(file.metadata))
        else:
            weights, loss = file_to_lora(file.path, file.updates, options.rank, base, on_layer)
            sentences.append(f"{file.path.name} as a plain LoRA: {loss.sentence(options.rank)}")
            reduced = True
        adapters.append(LoadedLora(weights, file.lora.strength, file.lora.text_strength))
    weights, loss = merge_adapters(adapters, options.rank, blocks)
    save_with_side_file(weights, files[0].family, out, options.precision, _header(files, out, now))
    ranks = sorted({layer.rank for layer in weights.layers.values()})
    span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    sentences.append(f"{len(weights.layers)} layers of {span} from {files_words(files)}.")
    if options.rank is not None and not reduced:
        sentences.append(loss.sentence(options.rank))
    elif options.rank is not None and not loss.none:
        sentences.append(f"Of the sum of these: {loss.sentence(options.rank)}")
    return sentences


def extras_sentences(loras: Sequence[WeightedLora]) -> list[str]:
    """A sentence for each file that contains something that is not merged."""
    paths = [Path(lora.file) for lora in loras]
    found = [(path.name, detect.extras_sentence(read_header(path).shapes)) for path in paths]
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
    return [LoraFile(lora, *file_updates(path, family)) for lora, path in zip(loras, paths, strict=True)]


def file_rows(files: Sequence[LoraFile]) -> list[dict[str, object]]:
    """The files for a header: {name, sha256, strength, text_strength} of each."""
    return [
        {**file_record(file.path), "strength": file.lora.strength, "text_strength": file.lora.on_text}
        for file in files
    ]


def _header(files: Sequence[LoraFile], out: Path, now: float) -> dict[str, str]:
    """The metadata of the merged file, without what `save_adapter` adds."""
    rows = file_rows(files)
    parts = " + ".join(f"{row['strength']:g} x {row['name']}" for row in rows)
    texts = {
        **titles(out, now),
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
        try:
            found = parse_json(file.metadata.get("ss_tag_frequency", "{}"))
        except ValueError:
            continue
        for name, counts in found.items() if isinstance(found, dict) else ():
            if isinstance(counts, dict):
                own = f"{file.path.stem} {name}" if name in tags else str(name)
                tags[own] = {str(tag): n for tag, n in counts.items() if isinstance(n, int)}
    return tags
