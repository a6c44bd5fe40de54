"""What six tools would make of an adapter file: keys that one of them drops, layers at a wrong strength.

The file is read back and mapped by each tool's rules (`tools.py`). What a tool would add to a weight is then
compared with what the adapter means, through the factors alone: where they are the same, by their scales.
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lora_core.errors import AdapterFileError
from lora_core.formats import detect, kohya, peft
from lora_core.formats.compat.dialects import Dialect, Tool
from lora_core.formats.compat.notes import Outcome, note
from lora_core.formats.compat.reading import FileFacts, Refused, case_of, groups_of, taken_layers
from lora_core.formats.compat.rules import (
    check_components,
    check_keys,
    drop_misspelled,
    drop_partial_attention,
)
from lora_core.formats.compat.scales import Used, used_layers
from lora_core.formats.compat.tools import MEANT_FOR, TOOLS
from lora_core.formats.inspect import file_format
from lora_core.formats.io import check_family, read_tensors
from lora_core.formats.layers import (
    MAGNITUDE,
    Tensors,
    alpha_number,
    check_finite,
    checked_layer,
    checked_magnitude,
    dora_update,
)
from lora_core.formats.layout import Layout, family_layout
from lora_core.formats.names import first_few, layer_of_stem
from lora_core.formats.peft import with_config_beside
from lora_core.lora.weights import AdapterWeights, LayerKey, LayerWeights
from lora_core.model_files.families import Family
from lora_core.model_files.header import read_header

WeightOf = Callable[[LayerKey], torch.Tensor]
"""The frozen weight of a layer of a base, in fp32."""

TOLERANCE = 2e-3
"""Relative error of an update up to which it counts as the same; the same as for pictures' noise."""
_COARSE = {torch.bfloat16: 1e-2}
"""Of files with fewer digits, whose rounding alone is more than that; fp8 files have 5e-2."""


def verified(
    path: Path,
    family: Family | None = None,
    live: AdapterWeights | None = None,
    modules: Layout | None = None,
    weight_of: WeightOf | None = None,
) -> dict[str, Any]:
    """What each tool would do with an adapter file.

    Args:
        path: a .safetensors file of the kohya or diffusers format.
        family: of the base that it is for; None if the file shall tell.
        live: the adapter that it was written from; None to compare with what the file itself means.
        modules: the base's layers and the shapes of their weights; None for the family's own.
        weight_of: gives the base's weights, for the errors of a DoRA; None leaves them open.

    Returns:
        `ok`: whether each tool that the format is meant for takes every key at the right strength; `tools`:
            for each `tool` whether it is `ok`, how many `keys` the file has, how many are `matched` and how
            many `dropped`, which those are (`dropped_keys`), which matched ones have no effect there
            (`unused_keys`), the largest relative error of an update (`max_delta_error`; 1.0 where one is
            missing, None where it is unknown), and a `note` for people; `family`, `format`, `kind` and
            `extras` as in `inspect_file`.

    Raises:
        AdapterFileError: one sentence on what is wrong with the file, or that it does not say its family.
    """
    path = Path(path)
    header = read_header(path)
    format, kind = file_format(header.shapes), detect.kind_of(header.shapes)
    if kind in detect.ADAPTERS:
        check_family(path, header)
    if kind not in detect.ADAPTERS:
        raise AdapterFileError(f"{path} cannot be verified: it is {detect.called(kind, header.shapes)}.")
    if format not in MEANT_FOR:
        names = first_few(header.shapes, 1)
        raise AdapterFileError(
            f"{path} cannot be verified: its tensors are named like no known format, {names}."
        )
    family = _family(path, header.shapes, header.metadata, family)
    outcomes = tool_outcomes(path, family, live, modules, weight_of)
    return {
        "ok": all(outcomes[name].fine for name in MEANT_FOR[format]),
        "family": family.name,
        "format": format,
        "kind": kind,
        "extras": detect.extras_sentence(header.shapes),
        "tools": [_row(name, outcome, format, family) for name, outcome in outcomes.items()],
    }


def tool_outcomes(
    path: Path,
    family: Family,
    live: AdapterWeights | None = None,
    modules: Layout | None = None,
    weight_of: WeightOf | None = None,
) -> dict[str, Outcome]:
    """What each tool makes of an adapter file, by the tool's name; arguments and errors as in `verified`."""
    layout = modules or family_layout(family)
    header = read_header(path)
    tensors, metadata = read_tensors(path)
    # In the order of their bytes, in which loaders see them: some rules depend on it.
    order = sorted(tensors, key=lambda name: header.tensors[name]["data_offsets"])
    tensors = {name: tensors[name] for name in order}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        texts = with_config_beside(path, tensors, metadata)
        meant = _meant(tensors, texts, file_format(shapes), detect.kind_of(shapes), family)
        check_finite(meant)
        magnitudes = _magnitudes(tensors, family)
    except AdapterFileError as error:
        raise AdapterFileError(f"{path} cannot be used. {error}") from error
    alphas = {
        name: alpha_number(t) for name, t in tensors.items() if name.endswith(".alpha") and t.numel() == 1
    }
    facts = FileFacts(shapes, alphas, metadata)
    base = _Base(family, layout, _wide(meant, layout))
    right = Right(meant, _products(meant, live), magnitudes, weight_of)
    return {tool.name: _outcome(tool, facts, base, right) for tool in TOOLS}


@dataclass(frozen=True)
class _Base:
    family: Family
    layout: Layout
    wide: bool


def _family(path: Path, shapes: detect.Shapes, metadata: Mapping[str, str], base: Family | None) -> Family:
    """The family to verify for: the base's, unless the file is told to be for another one."""
    told = detect.file_family(shapes, metadata)
    if base is not None:
        signs = detect.family_evidence(shapes, metadata)
        if told is not None and not any(base.title in titles for titles in signs):
            raise AdapterFileError(f"{path} is for {told.title}, the base is the {base.title}.")
        return base
    if told is None:
        name = detect.family_name(shapes, metadata)
        if name != "unknown":
            raise AdapterFileError(f"{path} is for {name}, so it cannot be verified.")
        raise AdapterFileError(
            f"{path} does not say which family of base it is for, so it cannot be verified; name its base"
            " with --base."
        )
    return told


def _meant(
    tensors: Tensors, metadata: Mapping[str, str], format: str, kind: str, family: Family
) -> AdapterWeights:
    """What the file means, as far as its names are known; nothing for kinds whose layers are no plain
    pairs."""
    if kind not in (detect.LORA, detect.LOCON, detect.DORA):
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
        return peft.with_header_alphas(layers, metadata)
    return AdapterWeights(layers)


def _layer_and_role(key: str, format: str, family: Family) -> tuple[LayerKey, str]:
    if format == "diffusers":
        return peft.layer_and_role(key, family)
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


Products = dict[LayerKey, tuple[float, float, float] | None]
"""For each layer that should be there: |up down|^2 of the file, its product with what is right, |right|^2."""


def _products(meant: AdapterWeights, live: AdapterWeights | None) -> Products:
    """What the errors are worked out from, once for all tools: of the file itself only the scales matter."""
    if live is None:
        return {key: (1.0, layer.scale, layer.scale**2) for key, layer in meant.layers.items()}
    return {key: _inner(meant.layers.get(key), right) for key, right in live.layers.items()}


def _inner(file: LayerWeights | None, right: LayerWeights) -> tuple[float, float, float] | None:
    """Inner products of two updates without forming them: <B A, B' A'> = <B^T B', A A'^T>, r x r matrices.

    In double precision, since the error is a small difference of them. None if the shapes differ.
    """
    if file is None:
        return None
    down, up = file.down.flatten(1).double(), file.up.flatten(1).double()
    own_down, own_up = right.down.flatten(1).double(), right.up.flatten(1).double()
    if down.shape[1] != own_down.shape[1] or up.shape[0] != own_up.shape[0]:
        return None
    square = ((up.T @ up) * (down @ down.T)).sum()
    mixed = ((up.T @ own_up) * (down @ own_down.T)).sum() * right.scale
    own = ((own_up.T @ own_up) * (own_down @ own_down.T)).sum() * right.scale**2
    return float(square), float(mixed), float(own)


def _magnitudes(tensors: Tensors, family: Family) -> dict[LayerKey, torch.Tensor]:
    """The DoRA magnitudes in a file, by layer, as far as its names are known."""
    found = {}
    for key, tensor in tensors.items():
        if match := MAGNITUDE.fullmatch(key):
            with contextlib.suppress(AdapterFileError):
                layer, _ = _layer_and_role(
                    f"{match[1]}.alpha", "kohya" if "." not in match[1] else "diffusers", family
                )
                found[layer] = checked_magnitude(match[1], tensor)
    return found


@dataclass
class Right:
    """What a file should do to each layer, to compare with what a tool does.

    Attributes:
        meant: what the file says, magnitudes aside.
        products: what errors of plain layers are worked out from.
        magnitudes: of the layers that are a DoRA.
        weight_of: gives the base's weights; None if they are not at hand.
    """

    meant: AdapterWeights
    products: Products
    magnitudes: Mapping[LayerKey, torch.Tensor]
    weight_of: WeightOf | None = None
    _known: dict[tuple[LayerKey, str, float], float] = field(default_factory=dict)

    def error(self, layer: LayerKey, used: Used | None) -> float | None:
        """|update - right| / |right| of a layer; 1.0 where a tool leaves it out, None where it is unknown."""
        if used is None or used.lost:
            return 1.0
        if used.scale is None:
            return None
        if layer in self.magnitudes:
            return self._dora_error(layer, used.scale, used.norm)
        return _plain_error(used.scale, self.products[layer])

    def _dora_error(self, layer: LayerKey, scale: float, norm: str) -> float | None:
        rows = self.magnitudes[layer].shape[1] == 1
        norm = "columns" if norm == "base rows" and not rows else norm
        if norm == ("rows" if rows else "columns") and scale == self.meant.layers[layer].scale:
            return 0.0
        if self.weight_of is None:
            return None
        if (layer, norm, scale) not in self._known:
            self._known[layer, norm, scale] = self._measured(layer, scale, norm)
        return self._known[layer, norm, scale]

    def _measured(self, layer: LayerKey, scale: float, norm: str) -> float:
        assert self.weight_of is not None
        weights, magnitude = self.meant.layers[layer], self.magnitudes[layer]
        weight, delta = self.weight_of(layer), weights.delta()
        if weight.numel() != delta.numel() or magnitude.numel() not in weight.shape[:2]:
            raise AdapterFileError(
                f"{'.'.join(layer)} has the shape {list(delta.shape)} in the file and {list(weight.shape)} in"
                " the base; the file is for another base."
            )
        right = dora_update(weight, delta, magnitude)
        product = replace(weights, alpha=scale * weights.rank).delta().reshape(weight.shape)
        got = dora_update(weight, product, magnitude, norm) if norm else product
        return float((got - right).norm() / right.norm()) if right.any() else float(got.any())


def _plain_error(scale: float, products: tuple[float, float, float] | None) -> float:
    """|s B A - right| / |right| of a layer without magnitudes, from inner products."""
    if products is None:
        return 1.0
    square, mixed, own = products
    if own == 0:
        return 0.0 if square * scale == 0 else 1.0
    return math.sqrt(max(square * scale**2 - 2 * mixed * scale + own, 0.0) / own)


def _outcome(tool: Tool, facts: FileFacts, base: _Base, right: Right) -> Outcome:
    used: dict[LayerKey, Used] = {}
    beside: list[str] = []
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
        beside = [key for key in facts.shapes if key.startswith(case.dialect.beside)]
    except Refused as reason:
        refused = str(reason)
    matched = {*beside, *(key for layer in used.values() for key in layer.keys)}
    dropped = [key for key in facts.shapes if key not in matched]
    unused = [] if refused else _unused(case.dialect, beside, used)
    lost = {layer for layer, use in used.items() if use.lost}
    errors = {layer: right.error(layer, used.get(layer)) for layer in (*right.products, *lost)}
    factors = {layer.up.dtype for layer in right.meant.layers.values()}
    tolerance = max(
        (_COARSE.get(t, TOLERANCE if t.itemsize > 1 else 5e-2) for t in factors), default=TOLERANCE
    )
    return Outcome(refused, len(facts.shapes), dropped, used, right.meant, errors, tolerance, unused)


def _unused(dialect: Dialect, beside: list[str], used: Mapping[LayerKey, Used]) -> list[str]:
    """The keys that a tool reads without effect."""
    pairs = [key for use in used.values() if use.kind in ("LoRA", "DoRA") for key in use.keys]
    return [key for key in beside if key.startswith(dialect.unused)] + [
        key for key in pairs if key.endswith(dialect.unused)
    ]


def _row(tool: str, outcome: Outcome, format: str, family: Family) -> dict[str, Any]:
    return {
        "tool": tool,
        "ok": outcome.fine,
        "keys": outcome.keys,
        "matched": outcome.keys - len(outcome.dropped),
        "dropped": len(outcome.dropped),
        "dropped_keys": outcome.dropped,
        "unused_keys": list(outcome.unused),
        "max_delta_error": outcome.max_error,
        "note": note(outcome, tool in MEANT_FOR[format], format, family),
    }
