"""How a tool would read an adapter file: which keys change which layer, with which scale.

A small interpreter of the rows of `tools.py`. It looks at names, shapes and alphas only, never at a factor.
What can refuse a whole file is in `rules.py`, what a layer is multiplied by in `scales.py`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from lora_core.formats.compat.dialects import Dialect, Leaves, Names, Tool
from lora_core.formats.compat.tools import OTHER_LEAVES, SUFFIXES
from lora_core.formats.layout import Layout, norm_layers
from lora_core.lora.weights import LayerKey
from lora_core.model_files.families import Family
from lora_core.model_files.key_names import ldm_unet_path

ORIGINAL = re.compile(
    r"lora_unet_(?:input_blocks_\d+_\d+|middle_block_\d|output_blocks_\d+_\d|time_embed_[02]|label_emb_0_[02]"
    r"|out_[02])(?=[._])"
)
"""A UNet key with an original block name."""
_NORM_LEAVES = (".w_norm", ".b_norm")
_ORIGINAL_WORD = re.compile("input_blocks|middle_block|output_blocks")
_DIFFUSERS_WORD = re.compile("down_blocks|mid_block|up_blocks")


class Refused(Exception):
    """Why a tool loads nothing of a file, in a sentence."""


@dataclass(frozen=True)
class FileFacts:
    """What the tools' rules look at.

    Attributes:
        shapes: name of each tensor to its shape, in the order of their bytes, in which loaders see them.
        alphas: name of each alpha tensor to its number.
        metadata: the header's texts.
    """

    shapes: Mapping[str, Sequence[int]]
    alphas: Mapping[str, float]
    metadata: Mapping[str, str]


@dataclass
class Group:
    """The keys at one name of a known layer, by what follows the name."""

    layer: LayerKey
    keys: dict[str, str] = field(default_factory=dict)

    def kind(self, dialect: Dialect) -> "Leaves | str | None":
        """The pair that the tool takes here, or the other kind of adapter that it applies, or None."""
        kinds = [
            kind for kind in dialect.others if any(f".{leaf}" in self.keys for leaf in OTHER_LEAVES[kind])
        ]
        pair = next((p for p in dialect.leaves if p.up in self.keys and p.down in self.keys), None)
        return pair if pair and kinds in ([], ["bias"]) else next(iter(kinds), None)


@dataclass(frozen=True)
class Case:
    """A file before a tool.

    Attributes:
        dialect: the tool's rules for such files.
        facts: of the file.
        family: of the base.
        layout: the base's layers.
        wide: whether the file's layers are as wide as the layout's; if not, widths are not compared.
        keys: those of the file that the tool does not pass over.
    """

    dialect: Dialect
    facts: FileFacts
    family: Family
    layout: Layout
    wide: bool
    keys: tuple[str, ...]

    @property
    def originals(self) -> bool:
        """Whether the family's own kohya files have the original block names."""
        return self.family.kohya_block_names == "ldm"

    def keys_of(self, part: str) -> list[str]:
        """The keys that are meant for a part, known or not."""
        if self.dialect.alphas == "header":
            return [key for key in self.keys if key.startswith(f"{part}.")]
        starts = {"unet": ("lora_unet_",), "text_encoder": ("lora_te_", "lora_te1_")}
        return [key for key in self.keys if key.startswith(starts.get(part, ("lora_te2_",)))]


Taken = dict[LayerKey, tuple[Group, Leaves | str]]
"""Each layer that a tool changes, with its keys and what they are."""


def case_of(tool: Tool, facts: FileFacts, family: Family, layout: Layout, wide: bool) -> Case:
    """The file before the first of the tool's dialects that is for such files; arguments as in `Case`."""
    for dialect in tool.dialects:
        keys = tuple(
            key
            for key in facts.shapes
            if not key.endswith(dialect.ignores) and not key.startswith(dialect.beside)
        )
        if not dialect.starts or all(key.startswith(dialect.starts) for key in keys):
            break
    words = (_ORIGINAL_WORD, _DIFFUSERS_WORD)
    mixed = family.kohya_block_names == "ldm" and all(any(w.search(key) for key in keys) for w in words)
    if mixed and dialect.one_naming == "drop":
        keys = tuple(key for key in keys if not _ORIGINAL_WORD.search(key))
    return Case(dialect, facts, family, layout, wide, keys)


def groups_of(case: Case) -> dict[str, Group]:
    """The file's keys at the names that the tool knows."""
    known: dict[str, LayerKey] = {}
    for row in case.dialect.names:
        if _holds(row, case):
            known |= _known(row, tuple(case.layout), case.family.attention_levels)
    norms: dict[str, LayerKey] = {}
    for row in case.dialect.norms:
        if _holds(row, case):
            norms |= _known(row, tuple(norm_layers(case.layout)), case.family.attention_levels)
    groups: dict[str, Group] = {}
    for key in case.keys:
        for suffix in SUFFIXES:
            names = norms if suffix in _NORM_LEAVES else known
            if key.endswith(suffix) and (layer := names.get(key[: -len(suffix)])):
                groups.setdefault(key[: -len(suffix)], Group(layer)).keys[suffix] = key
                break
    return groups


def _holds(row: Names, case: Case) -> bool:
    encoders = {encoder.part: encoder for encoder in case.family.text_encoders}
    return (
        (row.part == "unet" or row.part in encoders)
        and row.encoders in (0, len(encoders))
        and row.blocks in ("", case.family.kohya_block_names)
        and (row.open_clip is None or encoders[row.part].open_clip == row.open_clip)
        and (not row.given or any(re.search(row.given, key) for key in case.keys))
    )


@lru_cache(maxsize=256)
def _known(
    row: Names, layers: tuple[LayerKey, ...], attention_levels: tuple[bool, ...]
) -> dict[str, LayerKey]:
    """The layers that a row names, by name."""
    pattern = re.compile(row.paths or ".*")
    return {
        name: (part, path)
        for part, path in layers
        if part == row.part and pattern.fullmatch(path) and (name := _named(row.form, path, attention_levels))
    }


def _named(form: str, path: str, attention_levels: tuple[bool, ...]) -> str | None:
    """`path` in a row's form, or None where it has no such name."""
    bare = path.removeprefix("text_model.")
    older = re.sub(r"\.self_attn\.(q|k|v|out)_proj$", r".self_attn.to_\1", path)
    older = older.removesuffix(".0") if older.endswith(".to_out.0") else older
    original = ldm_unet_path(path, attention_levels) if "{ldm" in form else ""
    if original is None:
        return None
    return form.format(
        path=path,
        flat=path.replace(".", "_"),
        bare=bare,
        bare_flat=bare.replace(".", "_"),
        older=older,
        older_bare=older.removeprefix("text_model."),
        processor=older.replace(".to_", ".processor.to_"),
        ldm=original,
        ldm_flat=original.replace(".", "_"),
    )


def taken_layers(case: Case, groups: Mapping[str, Group]) -> Taken:
    """The layers that the tool changes, from their keys and shapes.

    Raises:
        Refused: a shape makes the tool fail.
    """
    taken: Taken = {}
    unet_is_peft = case.dialect.alphas == "header" and "lora_A" in next(iter(case.keys_of("unet")), "")
    for group in groups.values():
        kind = group.kind(case.dialect)
        if kind is None or (isinstance(kind, Leaves) and not _fits(case, group, kind)):
            continue
        # diffusers translates the UNet's older spellings only if its first key is of one.
        older = isinstance(kind, Leaves) and kind.spelling != "peft"
        if group.layer[0] == "unet" and unet_is_peft and older:
            continue
        taken[group.layer] = (group, kind)
    return taken


def _fits(case: Case, group: Group, pair: Leaves) -> bool:
    """Whether the factors have the form of the layer's weight."""
    down, up = (case.facts.shapes[group.keys[leaf]] for leaf in (pair.down, pair.up))
    mid = case.facts.shapes[group.keys[pair.mid]] if pair.mid in group.keys else down
    found, weight = (up[0], *down[1:2], *mid[2:]), case.layout[group.layer]
    kernels_agree = (found[2:] or (1, 1)) == (weight[2:] or (1, 1))
    same = kernels_agree and len(found) == len(weight) and (found == weight or not case.wide)
    if case.dialect.exact_shapes and not same:
        raise Refused(
            f"it fails at {group.keys[pair.down]!r}, which is for a weight of shape {list(found)} where the"
            f" layer's has {list(weight) if case.wide else f'{len(weight)} dimensions'}"
        )
    return kernels_agree and (not case.wide or math.prod(found) == math.prod(weight))
