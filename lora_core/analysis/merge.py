"""The verb `merge`: adapter files into one file, or into a copy of a base.

The mathematics is in `combine.py`, `plain.py` and `into_base.py`; here files are read, checked against each
other, and written with a header that says what was merged.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from lora_core.adapters.inject import Strengthened
from lora_core.adapters.weights import AdapterWeights
from lora_core.analysis.base_weights import BaseWeights
from lora_core.analysis.blocks import Blocks, blocks_of
from lora_core.analysis.combine import merged
from lora_core.analysis.into_base import merge_into_base
from lora_core.analysis.plain import Note, needs_base, plain
from lora_core.analysis.rewrite import check_out
from lora_core.analysis.updates import Updates, file_updates
from lora_core.formats import kinds
from lora_core.formats.file import file_hashes, write_adapter
from lora_core.formats.forms import in_own_form
from lora_core.formats.metadata import side_file
from lora_core.spec.errors import AdapterFileError
from lora_core.spec.families import Family
from lora_core.spec.paths import write_atomically
from lora_core.spec.tensor_file import read_header
from lora_core.spec.untrusted import parsed_json

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
class Ingredient:
    """An adapter file and its strength on the UNet and on the text encoders."""

    path: Path
    strength: float = 1.0
    text_strength: float | None = None

    @property
    def on_text(self) -> float:
        """The strength on the text encoders."""
        return self.strength if self.text_strength is None else self.text_strength


@dataclass(frozen=True)
class Opened:
    """What was read of an ingredient."""

    ingredient: Ingredient
    updates: Updates
    metadata: Mapping[str, str]
    family: Family


@dataclass(frozen=True)
class Wanted:
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
    ingredients: Sequence[Ingredient], out: Path, wanted: Wanted, now: float, note: Note | None = None
) -> list[str]:
    """Write the sum of adapter files as one plain LoRA of the kohya format, and its side file.

    Args:
        ingredients: the files.
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
    opened = _opened(ingredients, base.family if base else None)
    blocks = _blocks(wanted.blocks, len(opened))
    said = _extras(ingredients)
    adapters, reduced = [], False
    for source in opened:
        weights, sentence = _plain(source, wanted.rank, base, note)
        said += [sentence] if sentence else []
        reduced |= bool(sentence)
        adapters.append(Strengthened(weights, source.ingredient.strength, source.ingredient.text_strength))
    weights, loss = merged(adapters, wanted.rank, blocks)
    family = opened[0].family
    header = _header(opened, out.stem, now)
    write_adapter(in_own_form(weights, family), out, "kohya", wanted.precision, family, header)
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
    ingredients: Sequence[Ingredient], base_name: str, out: Path, blocks: str = ""
) -> list[str]:
    """Write a copy of a base with adapter files merged into it, LoHa, LoKr and DoRA exactly.

    Args:
        ingredients: the files.
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
    opened = _opened(ingredients, base.family)
    adapters = [(o.updates, o.ingredient.strength, o.ingredient.on_text) for o in opened]
    texts = {
        MERGED_KEY: json.dumps(_rows(opened)),
        "modelspec.merged_from": ", ".join([base.path.stem, *(_title(o) for o in opened)]),
    }
    layers = merge_into_base(base, adapters, out, texts, _blocks(blocks, len(opened)))
    return [*_extras(ingredients), f"{layers} layers of the base changed by {_count(opened)}."]


def _extras(ingredients: Sequence[Ingredient]) -> list[str]:
    """What the files hold that is not merged, a sentence for each that does."""
    found = [(item.path.name, kinds.extras_sentence(read_header(item.path).shapes)) for item in ingredients]
    return [f"{name}: {sentence}" for name, sentence in found if sentence]


def _blocks(text: str, files: int) -> Blocks | None:
    return blocks_of(text, files) if text else None


def _count(opened: Sequence[Opened]) -> str:
    return "one file" if len(opened) == 1 else f"{len(opened)} files"


def _opened(ingredients: Sequence[Ingredient], known: Family | None) -> list[Opened]:
    """All files, once they are seen to be for one family.

    A file that does not say its family is taken to be of the others'; layers that do not fit come out later.
    """
    families: dict[str, tuple[Path, Family]] = {}
    for ingredient in ingredients:
        header = read_header(ingredient.path)
        family = kinds.file_family(header.shapes, header.metadata)
        if family is not None:
            families.setdefault(family.title, (ingredient.path, family))
    if len(families) > 1 and known is None:
        (one, first), (two, second), *_ = families.values()
        raise AdapterFileError(
            f"{one} is for {first.title} and {two} for {second.title}; only adapters for one kind of base can"
            " be merged."
        )
    family = known or next((family for _, family in families.values()), None)
    opened = []
    for ingredient in ingredients:
        updates, metadata, of = file_updates(ingredient.path, family)
        opened.append(Opened(ingredient, updates, metadata, of))
    return opened


def _plain(
    source: Opened, rank: int | None, base: BaseWeights | None, note: Note | None
) -> tuple[AdapterWeights, str]:
    """A file as a plain LoRA, and what that lost, in a sentence, or ""."""
    path = source.ingredient.path
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
    weights, loss = plain(source.updates, rank, base.weight if base else None, note)
    return weights, f"{path.name} as a plain LoRA: {loss.sentence(rank)}"


def _rows(opened: Sequence[Opened]) -> list[dict[str, object]]:
    return [
        {
            "name": _title(source),
            "sha256": str(file_hashes(source.ingredient.path)["sha256"])[:12],
            "strength": source.ingredient.strength,
            "text_strength": source.ingredient.on_text,
        }
        for source in opened
    ]


def _title(source: Opened) -> str:
    return source.ingredient.path.stem


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
            found = parsed_json(source.metadata.get("ss_tag_frequency", "{}"))
        except ValueError:
            continue
        for name, counts in found.items() if isinstance(found, dict) else ():
            if isinstance(counts, dict):
                own = f"{_title(source)} {name}" if name in tags else str(name)
                tags[own] = {str(tag): n for tag, n in counts.items() if isinstance(n, int)}
    return tags
