"""What six tools would make of an adapter file: keys that one of them drops, layers at a wrong strength.

The file is read back and mapped by each tool's rules (`tools.py`). What a tool would add to a weight is then
compared with what the adapter means, through the factors alone: where they are the same, by their scales.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_core.adapters.weights import AdapterWeights, LayerKey, LayerWeights
from lora_core.formats import diffusers, kinds, kohya
from lora_core.formats.container import read_tensors
from lora_core.formats.inspect import file_format
from lora_core.formats.layers import Tensors, alpha_number, check_finite, checked_layer
from lora_core.formats.layout import Layout, family_layout
from lora_core.formats.names import layer_of_stem
from lora_core.formats.notes import Outcome, note
from lora_core.formats.reading import FileFacts, Refused, case_of, groups_of, taken_layers
from lora_core.formats.rules import check_components, check_keys, drop_misspelled, drop_partial_attention
from lora_core.formats.scales import Used, used_layers
from lora_core.formats.tools import MEANT_FOR, TOOLS, Tool
from lora_core.spec.errors import AdapterFileError
from lora_core.spec.families import Family

TOLERANCE = 2e-3
"""Relative error of an update up to which it counts as the same; the same as for pictures' noise."""
_COARSE = {torch.bfloat16: 1e-2}
"""Of files with fewer digits, whose rounding alone is more than that; fp8 files have 5e-2."""


def verified(
    path: Path,
    family: Family | None = None,
    live: AdapterWeights | None = None,
    modules: Layout | None = None,
) -> dict[str, Any]:
    """What each tool would do with an adapter file.

    Args:
        path: a .safetensors file of the kohya or diffusers format.
        family: of the base that it is for; None if the file shall tell.
        live: the adapter that it was written from; None to compare with what the file itself means.
        modules: the base's layers and the shapes of their weights; None for the family's own.

    Returns:
        `ok`: whether each tool that the format is meant for takes every key at the right strength; `tools`:
        for each `tool` how many `keys` the file has, how many are `matched`, which are `dropped`, the largest
        relative error of an update (`max_delta_error`; 1.0 where one is missing, None where the kind of
        adapter leaves it open), and a `note` for people; `family`, `format` and `kind` as in `inspect_file`.

    Raises:
        AdapterFileError: one sentence on what is wrong with the file, or that it does not say its family.
    """
    path = Path(path)
    tensors, metadata = read_tensors(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    format, kind = file_format(shapes), kinds.kind_of(shapes)
    if format not in MEANT_FOR or kind not in kinds.ADAPTERS:
        raise AdapterFileError(f"{path} cannot be verified: it is {kinds.called(kind)}.")
    family = family or _told_family(path, shapes, metadata)
    layout = modules or family_layout(family)
    try:
        meant = _meant(tensors, metadata, format, kind, family)
        check_finite(meant)
    except AdapterFileError as error:
        raise AdapterFileError(f"{path} cannot be used. {error}") from error
    alphas = {
        name: alpha_number(t) for name, t in tensors.items() if name.endswith(".alpha") and t.numel() == 1
    }
    facts = FileFacts(shapes, alphas, metadata)
    wide = _wide(meant, layout)
    rows = []
    for tool in TOOLS:
        outcome = _outcome(tool, facts, _Base(family, layout, wide), meant, live)
        rows.append((outcome.fine, _row(tool, outcome, format, family)))
    return {
        "ok": all(fine for fine, row in rows if row["tool"] in MEANT_FOR[format]),
        "family": family.name,
        "format": format,
        "kind": kind,
        "tools": [row for _, row in rows],
    }


@dataclass(frozen=True)
class _Base:
    family: Family
    layout: Layout
    wide: bool


def _told_family(path: Path, shapes: kinds.Shapes, metadata: Mapping[str, str]) -> Family:
    family = kinds.file_family(shapes, metadata)
    if family is None:
        told = kinds.family_name(shapes, metadata)
        what = "does not say which family of base it is for" if told == "unknown" else f"is for {told}"
        raise AdapterFileError(f"{path} {what}, so it cannot be verified; name its base with --base.")
    return family


def _meant(
    tensors: Tensors, metadata: Mapping[str, str], format: str, kind: str, family: Family
) -> AdapterWeights:
    """What the file means, as far as its names are known; nothing for kinds whose layers are no plain
    pairs."""
    if kind not in (kinds.LORA, kinds.LOCON, kinds.DORA):
        return AdapterWeights({})
    found: dict[LayerKey, Tensors] = {}
    for key, tensor in tensors.items():
        try:
            layer, role = _layer_and_role(key, format, family)
        except AdapterFileError:
            continue
        found.setdefault(layer, {}).setdefault(role, tensor)
    layers: dict[LayerKey, LayerWeights] = {}
    for layer, roles in found.items():
        if roles.keys() == {"alpha"}:
            continue
        layers[layer] = checked_layer(".".join(layer), roles)
    if format == "diffusers":
        return diffusers.with_header_alphas(layers, metadata)
    return AdapterWeights(layers)


def _layer_and_role(key: str, format: str, family: Family) -> tuple[LayerKey, str]:
    if format == "diffusers":
        return diffusers.layer_and_role(key)
    stem, _, leaf = key.partition(".")
    if leaf not in kohya.ROLES:
        raise AdapterFileError(f"The file holds {key!r}, which belongs to no plain LoRA.")
    return layer_of_stem(stem, family), kohya.ROLES[leaf]


def _wide(meant: AdapterWeights, layout: Layout) -> bool:
    """Whether the file is for a base as wide as the layout: toys of the same layout are compared by names."""
    known = [key for key in meant.layers if key in layout]
    fitting = sum(
        meant.layers[key].up.shape[0] == layout[key][0] and meant.layers[key].down.shape[1] == layout[key][1]
        for key in known
    )
    return 2 * fitting >= len(known)


def _outcome(
    tool: Tool, facts: FileFacts, base: _Base, meant: AdapterWeights, live: AdapterWeights | None
) -> Outcome:
    used: dict[LayerKey, Used] = {}
    refused = ""
    try:
        case = case_of(tool, facts, base.family, base.layout, base.wide)
        groups = groups_of(case)
        check_keys(case, groups)
        taken = taken_layers(case, groups)
        drop_misspelled(case, taken)
        drop_partial_attention(case, taken)
        check_components(case, taken)
        used = used_layers(case, taken)
    except Refused as reason:
        refused = str(reason)
    matched = {key for layer in used.values() for key in layer.keys}
    dropped = [key for key in facts.shapes if key not in matched]
    reference = (live or meant).layers
    errors = {
        layer: _error(used.get(layer), meant.layers.get(layer), reference[layer], live is not None)
        for layer in reference
    }
    factors = [layer.up.dtype for layer in meant.layers.values()]
    coarse = max((_COARSE.get(t, TOLERANCE if t.itemsize > 1 else 5e-2) for t in factors), default=TOLERANCE)
    return Outcome(refused, len(facts.shapes), dropped, used, meant, errors, coarse)


def _error(
    used: Used | None, file: LayerWeights | None, right: LayerWeights, other_factors: bool
) -> float | None:
    """Relative error of the update that a tool applies to a layer, None where the adapter's kind leaves it
    open."""
    if used is None or file is None:
        return 1.0
    if used.scale is None:
        return None
    if other_factors:
        return _difference(used.scale, file, right)
    if right.scale == 0:
        return 0.0 if used.scale == 0 else 1.0
    return abs(used.scale / right.scale - 1)


def _difference(scale: float, file: LayerWeights, right: LayerWeights) -> float:
    """|s B A - s' B' A'| / |s' B' A'| from the factors' Gram matrices, r x r, in double precision.

    |s B A|^2 = s^2 <B^T B, A A^T>, and so for the mixed term.
    """
    down, up = file.down.flatten(1).double(), file.up.flatten(1).double()
    own_down, own_up = right.down.flatten(1).double(), right.up.flatten(1).double()
    if down.shape[1] != own_down.shape[1] or up.shape[0] != own_up.shape[0]:
        return 1.0
    mixed = float(((up.T @ own_up) * (down @ own_down.T)).sum()) * scale * right.scale
    square = float(((up.T @ up) * (down @ down.T)).sum()) * scale**2
    own = float(((own_up.T @ own_up) * (own_down @ own_down.T)).sum()) * right.scale**2
    if own == 0:
        return 0.0 if square == 0 else 1.0
    return (max(square - 2 * mixed + own, 0.0) / own) ** 0.5


def _row(tool: Tool, outcome: Outcome, format: str, family: Family) -> dict[str, Any]:
    return {
        "tool": tool.name,
        "keys": outcome.keys,
        "matched": outcome.keys - len(outcome.dropped),
        "dropped": outcome.dropped,
        "max_delta_error": outcome.max_error,
        "note": note(outcome, tool.name in MEANT_FOR[format], format, family),
    }
