"""What an adapter file is, and what six tools make of it: keys that they drop, layers at the wrong strength.

To verify a file, it is read back and passed to `loaders.py`. What a tool would add to a weight is compared
with what the adapter means through the factors alone: no update is formed, except those of a DoRA, which need
the base.
"""

import contextlib
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from lora_core.errors import AdapterFileError
from lora_core.formats import kinds, kohya, peft
from lora_core.formats.io import file_hashes, read_tensors
from lora_core.formats.kinds import check_lycoris_factors, limit_oft, magnitude_from_tensor
from lora_core.formats.layers import (
    LYCORIS_ROLES,
    PAIR_ROLES,
    Tensors,
    check_finite,
    first_few,
    is_finite,
    layer_from_tensors,
    layer_of_module,
    read_alpha,
    reshape_adapter,
    split_key,
)
from lora_core.formats.loaders import LOADERS, AdapterFile, AppliedLayer, Loaded, LoadError
from lora_core.lora.lycoris import dora_update
from lora_core.lora.weights import AdapterWeights, LayerKey, LayerWeights
from lora_core.model_files.detect import Layout, family_layout
from lora_core.model_files.families import Family
from lora_core.model_files.header import INPAINTING_CHANNELS, Header, check_family, read_header
from lora_core.model_files.starting_settings import CONFIG_KEY
from lora_core.system.files import parse_object

MOST_TAGS = 12
WRITERS = (
    (CONFIG_KEY, "LoRA Easel"),
    ("ot_branch", "OneTrainer"),
    ("ot_revision", "OneTrainer"),
    ("ss_sd_scripts_commit_hash", "kohya sd-scripts"),
    ("ss_network_module", "kohya sd-scripts"),
    (peft.HEADER_KEY, "diffusers or PEFT"),
)
"""Texts of a header that only one program writes, and its name; the more specific first."""
FIRST: LayerKey = ("unet", "conv_in")
"""The convolution that has more inputs in an inpainting base."""


def inspect_file(path: Path) -> dict[str, Any]:
    """Describe an adapter file of any kind, LoHa, LoKr, OFT and DoRA included.

    Returns:
        `family`: a row of `FAMILIES`, else a title, else "unknown"; `format`: "kohya", "diffusers" or
        "unknown"; `kind`: "LoRA", "LoCon", "LoHa", ...; `ranks` and `alphas`: the distinct values, ascending;
        `modules`: how many are adapted; `parameters`: how many, without alphas; `bytes`;
        `sha256`, `autov2`, `autov3`; `hash_matches`: whether the header's own hash is right, None if it has
        none; `problem`: a sentence on values that are not finite, factors that do not fit or a file without
        tensors, "" if there is none; `extras`: a sentence on what of the file is not used here, or "";
        `new_tokens`: how many vectors each has; `writer`: the program that wrote it, "" if it does not say;
        `triggers`: its trigger phrase, else the tags of its captions, most frequent first; `metadata`: the
        header's texts.

    Raises:
        AdapterFileError: one sentence on the problem.
    """
    path = Path(path)
    header = read_header(path)
    shapes, kind = header.shapes, kinds.detect_kind(header.shapes)
    inner = [s for key, s in shapes.items() if split_key(key)[1] in ("down", "hada_w1_b", "lokr_w2_b")]
    inner += [shape[1:] for key, shape in shapes.items() if key.endswith(".oft_blocks")]
    ranks = sorted({shape[0] for shape in inner if len(shape) > 1 and shape[0]})
    weights = [shape for key, shape in shapes.items() if not key.endswith(".alpha")]
    return {
        "family": kinds.detect_family_name(shapes, header.metadata),
        "format": kinds.file_format(shapes),
        "kind": kind,
        "ranks": ranks,
        "alphas": _alphas(path, header, ranks),
        "modules": len(kinds.keys_by_module(shapes)),
        "parameters": sum(math.prod(shape) for shape in weights),
        "bytes": path.stat().st_size,
        **file_hashes(path, header),
        "problem": _problem(path, header, kind),
        "extras": kinds.extras_sentence(shapes, with_tokens=True),
        "new_tokens": kinds.token_counts(shapes),
        "writer": _writer(header.metadata),
        "triggers": _trigger_words(header.metadata),
        "metadata": header.metadata,
    }


def _writer(metadata: Mapping[str, str]) -> str:
    software = parse_object(metadata.get("software", ""))
    if software.get("name"):
        return f"{software['name']} {software.get('version') or ''}".strip()
    return next((name for key, name in WRITERS if key in metadata), "")


def _trigger_words(metadata: Mapping[str, str]) -> list[str]:
    phrase = metadata.get("modelspec.trigger_phrase", "").strip()
    if phrase:
        return [phrase]
    counts: Counter[str] = Counter()
    for table in parse_object(metadata.get("ss_tag_frequency", "")).values():
        for tag, count in table.items() if isinstance(table, dict) else ():
            if isinstance(count, int):
                counts[str(tag).strip()] += count
    return [tag for tag, _ in counts.most_common(MOST_TAGS)]


def _alphas(path: Path, header: Header, ranks: list[int]) -> list[float]:
    """The distinct finite alphas: among the tensors, else in a diffusers header, else the ranks."""
    stored = read_tensors(path, ".alpha", header)[0].values()
    alphas = [read_alpha(tensor) for tensor in stored if tensor.numel() == 1]
    if not alphas:
        texts = peft.add_peft_config(path, header.tensors, header.metadata)
        with contextlib.suppress(AdapterFileError):
            for name, value in peft.read_lora_config(texts).items():
                if name.endswith(".lora_alpha"):
                    alphas.append(value)
                elif name.endswith(".alpha_pattern") and isinstance(value, dict):
                    alphas += value.values()
    numbers = [n for n in alphas or ranks if isinstance(n, int | float) and not isinstance(n, bool)]
    return sorted({float(n) for n in numbers if math.isfinite(n)})


def _problem(path: Path, header: Header, kind: str) -> str:
    """What is wrong with the tensors of a file whose header is fine, whatever its layers are called."""
    if not header.tensors:
        return f"{path} holds no tensors; it is not an adapter."
    if kind not in kinds.ADAPTERS:
        return ""
    tensors, _ = read_tensors(path, header=header)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            return f"{path} is broken: {name!r} holds numbers that are not finite (NaN or infinity)."
    extras = kinds.extra_keys(tensors)
    modules = kinds.keys_by_module(key for key in tensors if key not in extras)
    for module, keys in modules.items():
        roles = {split_key(key)[1]: tensors[key] for key in keys}
        factors = {role: roles[role] for role in roles if role.startswith(LYCORIS_ROLES)}
        pair = {role: roles[role] for role in PAIR_ROLES if role in roles}
        try:
            if factors:
                check_lycoris_factors(module, factors)
            if pair.keys() - {"alpha"}:
                layer_from_tensors(module, pair)
            elif not factors and len(keys) == len(roles) and roles.keys() <= {"alpha", "magnitude"}:
                what = "DoRA magnitudes" if "magnitude" in roles else "an alpha"
                return f"{path} is broken. {module!r} has {what}, but no weights."
        except AdapterFileError as error:
            return f"{path} is broken. {error}"
    return ""


# What other tools would do with it.

WeightOf = Callable[[LayerKey], torch.Tensor]
"""The frozen weight of a layer of a base, in fp32."""

MEANT_FOR = {"kohya": tuple(LOADERS), "diffusers": ("diffusers",)}
"""The tools that a format is meant for."""
TOLERANCES = {torch.float32: 2e-3, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative error of an update that rounding to a dtype explains; 5e-2 for the 8-bit ones."""


def verify_adapter(
    path: Path,
    family: Family | None = None,
    live: AdapterWeights | None = None,
    layout: Layout | None = None,
    weight_of: WeightOf | None = None,
) -> dict[str, Any]:
    """What each tool would do with an adapter file.

    Args:
        path: a .safetensors file of the kohya or diffusers format.
        family: of the base that it is for; None to tell it from the file.
        live: the adapter that it was written from; None to compare with what the file itself means.
        layout: the base's layers and the shapes of their weights; None for the family's own.
        weight_of: returns the base's weights, for the errors of a DoRA; None leaves them unknown.

    Returns:
        `ok`: whether each tool that the format is meant for takes every key at the right strength; `tools`:
        for each `tool` whether it is `ok`, how many `keys` the file has, how many are `matched` and how many
        `dropped`, which those are (`dropped_keys`), which matched ones have no effect there (`unused_keys`),
        the largest relative error of an update (`max_delta_error`; 1.0 where one is missing, None where it is
        unknown), and a `note` for users; `family`, `format`, `kind` and `extras` as in `inspect_file`.

    Raises:
        AdapterFileError: the file is broken, or its family is unknown.
    """
    path = Path(path)
    header = read_header(path)
    format, kind = kinds.file_format(header.shapes), kinds.detect_kind(header.shapes)
    if kind not in kinds.ADAPTERS:
        raise AdapterFileError(
            f"{path} cannot be verified: it is {kinds.describe_kind(kind, header.shapes)}."
        )
    check_family(path, header)
    if format not in MEANT_FOR:
        names = first_few(header.shapes, 1)
        raise AdapterFileError(
            f"{path} cannot be verified: its tensors are named like no known format, {names}."
        )
    family = _check_base(path, header.shapes, header.metadata, family)
    outcomes = run_loaders(path, family, live, layout, weight_of)
    meant = next(iter(outcomes.values())).meant
    fixed = cache(lambda: _no_conversion_helps(header.shapes, meant, family, format))
    return {
        "ok": all(outcomes[name].fine for name in MEANT_FOR[format]),
        "family": family.name,
        "format": format,
        "kind": kind,
        "extras": kinds.extras_sentence(header.shapes, with_tokens=True),
        "tools": [
            {
                "tool": tool,
                **one.row(),
                "note": _note(one, partial(_advice, one, tool in MEANT_FOR[format], format, fixed), family),
            }
            for tool, one in outcomes.items()
        ],
    }


@dataclass(frozen=True)
class Outcome:
    """What a tool makes of a file.

    Attributes:
        refused: why it loads nothing, or "".
        keys: how many the file has.
        dropped: unused keys.
        loaded: the loaded update.
        meant: the intended one.
        errors: relative error of each layer's update; None where it is unknown.
        tolerance: up to which an error is rounding.
    """

    refused: str
    keys: int
    dropped: list[str]
    loaded: Loaded
    meant: AdapterWeights
    errors: dict[LayerKey, float | None]
    tolerance: float

    @property
    def unknown(self) -> bool:
        """Whether the error of a layer is unknown."""
        return any(error is None for error in self.errors.values())

    @property
    def max_error(self) -> float | None:
        """The largest error; None where it is unknown."""
        known = [error for error in self.errors.values() if error is not None]
        if self.unknown and max(known, default=0.0) <= self.tolerance:
            return None
        return max(known, default=None if self.loaded.layers else 1.0)

    @property
    def wrong(self) -> list[LayerKey]:
        """The layers that are applied, but at a wrong strength."""
        applied = [layer for layer, found in self.loaded.layers.items() if not found.failed]
        return [layer for layer in applied if (self.errors.get(layer) or 0.0) > self.tolerance]

    @property
    def fine(self) -> bool:
        """Whether the tool takes every key at the right strength."""
        missing = any(error is not None and error > self.tolerance for error in self.errors.values())
        return not (self.refused or self.dropped or missing or self.unknown)

    def row(self) -> dict[str, Any]:
        """The numbers for JSON, see `verify_adapter`."""
        return {
            "ok": self.fine, "keys": self.keys, "matched": self.keys - len(self.dropped),
            "dropped": len(self.dropped), "dropped_keys": self.dropped,
            "unused_keys": list(self.loaded.unused), "max_delta_error": self.max_error,
        }  # fmt: skip


def run_loaders(
    path: Path,
    family: Family,
    live: AdapterWeights | None = None,
    layout: Layout | None = None,
    weight_of: WeightOf | None = None,
) -> dict[str, Outcome]:
    """What each tool makes of an adapter file, by tool; arguments and errors of `verify_adapter`."""
    header = read_header(path)
    tensors, metadata = read_tensors(path)
    # In the order of their bytes, in which loaders see them: some rules depend on it.
    order = sorted(tensors, key=lambda name: header.tensors[name]["data_offsets"])
    tensors = {name: tensors[name] for name in order}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        texts = peft.add_peft_config(path, tensors, metadata)
        kind = kinds.detect_kind(shapes)
        meant, magnitudes = _meant(tensors, texts, kind, family)
        check_finite(meant)
    except AdapterFileError as error:
        raise AdapterFileError(f"{path} cannot be used. {error}") from error
    layout = layout or _layout_of(meant, family)
    alphas = {
        name: read_alpha(t) for name, t in tensors.items() if name.endswith(".alpha") and t.numel() == 1
    }
    for name, alpha in alphas.items():
        blocks = tensors.get(name.removesuffix("alpha") + "oft_blocks")
        if blocks is not None and limit_oft(blocks, alpha) is blocks:
            # A limit that is not reached is none.
            alphas[name] = 0.0
    known = [(layer, layout[key]) for key, layer in meant.layers.items() if key in layout]
    # Toys of the same layout are compared by names.
    wide = sum(layer.weight_shape[:2] == tuple(shape[:2]) for layer, shape in known)
    file = AdapterFile(shapes, alphas, metadata, family, layout, 2 * wide >= len(known))
    # Of the file itself only the scales matter.
    products: Products = {key: (1.0, layer.scale, layer.scale**2) for key, layer in meant.layers.items()}
    if live is not None:
        # Layers of other kinds were compared when they were written; what counts is how a tool reads them.
        others = {key: products[key] for key in live.others if key in products}
        products = {key: _inner_products(meant.layers.get(key), own) for key, own in live.layers.items()}
        products |= others
    expected = Expected(meant, products, magnitudes, weight_of)
    return {tool: _run(loader, file, expected) for tool, loader in LOADERS.items()}


def _layout_of(weights: AdapterWeights, family: Family) -> Layout:
    """The layers of the base that an adapter is for: the family's, or those of its inpainting checkpoint if
    the adapter has its inputs."""
    layout, own = family_layout(family), weights.layers.get(FIRST)
    if own is None or own.weight_shape[1] != INPAINTING_CHANNELS or FIRST not in layout:
        return layout
    out, _, *kernel = layout[FIRST]
    return {**layout, FIRST: (out, INPAINTING_CHANNELS, *kernel)}


def _run(loader: Callable[[AdapterFile], Loaded], file: AdapterFile, expected: "Expected") -> Outcome:
    refused = ""
    try:
        loaded = loader(file)
    except LoadError as reason:
        loaded, refused = Loaded({}), str(reason)
    matched = {*loaded.other_keys, *(key for layer in loaded.layers.values() for key in layer.keys)}
    dropped = [key for key in file.shapes if key not in matched]
    failed = [layer for layer, found in loaded.layers.items() if found.failed]
    errors = {
        layer: expected.error(layer, loaded.layers.get(layer)) for layer in (*expected.products, *failed)
    }
    dtypes = {layer.up.dtype for layer in expected.meant.layers.values()} or {torch.float32}
    tolerance = max(TOLERANCES.get(dtype, 2e-3 if dtype.itemsize > 1 else 5e-2) for dtype in dtypes)
    return Outcome(refused, len(file.shapes), dropped, loaded, expected.meant, errors, tolerance)


def _check_base(path: Path, shapes: kinds.Shapes, metadata: Mapping[str, str], base: Family | None) -> Family:
    """The family to verify for: the base's, unless the file is for another one."""
    if base is None:
        return kinds.require_family(path, shapes, metadata, "it cannot be verified")
    found = kinds.detect_family(shapes, metadata)
    signs = kinds.family_evidence(shapes, metadata)
    if found is not None and not any(base.title in titles for titles in signs):
        raise AdapterFileError(f"{path} is for {found.title}, the base is the {base.title}.")
    return base


def _meant(
    tensors: Tensors, metadata: Mapping[str, str], kind: str, family: Family
) -> tuple[AdapterWeights, dict[LayerKey, torch.Tensor]]:
    """What the file means, as far as its names are known: plain pairs (none for other kinds), and the DoRA
    magnitudes."""
    found: dict[LayerKey, Tensors] = {}
    magnitudes = {}
    for key, tensor in tensors.items():
        module, role = split_key(key)
        with contextlib.suppress(AdapterFileError):
            if role == "magnitude":
                magnitudes[layer_of_module(module, family)] = magnitude_from_tensor(module, tensor)
            elif role in PAIR_ROLES:
                found.setdefault(layer_of_module(module, family), {}).setdefault(role, tensor)
    if kind not in (kinds.LORA, kinds.LOCON, kinds.DORA):
        return AdapterWeights({}), magnitudes
    layers = {
        layer: layer_from_tensors(".".join(layer), roles)
        for layer, roles in found.items()
        if roles.keys() != {"alpha"}
    }
    own = {layer for layer, roles in found.items() if "alpha" in roles}
    return peft.apply_header_alphas(layers, metadata, own), magnitudes


Products = dict[LayerKey, tuple[float, float, float] | None]
"""For each layer that should be there: |BA|^2 of the file, its product with the right one, |right|^2."""


def _inner_products(file: LayerWeights | None, right: LayerWeights) -> tuple[float, float, float] | None:
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


@dataclass
class Expected:
    """What a file should do to each layer, to compare with what a tool does.

    Attributes:
        meant: by the file, magnitudes aside.
        products: what errors of plain layers are worked out from.
        magnitudes: of the layers that are a DoRA.
        weight_of: returns the base's weights; None if they are not at hand.
    """

    meant: AdapterWeights
    products: Products
    magnitudes: Mapping[LayerKey, torch.Tensor]
    weight_of: WeightOf | None = None
    _dora_errors: dict[tuple[LayerKey, str, float], float] = field(default_factory=dict)

    def error(self, layer: LayerKey, applied: AppliedLayer | None) -> float | None:
        """|update - right| / |right| of a layer; 1.0 where a tool leaves it out, None where it is unknown."""
        if applied is None or (applied.failed and applied.kind != "OFT"):
            return 1.0
        if applied.scale is None:
            return None
        if layer in self.magnitudes:
            return self._dora_error(layer, applied.scale, applied.dora_norm)
        products = self.products[layer]
        if products is None:
            return 1.0
        square, mixed, own = products
        if own == 0:
            return 0.0 if square * applied.scale == 0 else 1.0
        return math.sqrt(max(square * applied.scale**2 - 2 * mixed * applied.scale + own, 0.0) / own)

    def _dora_error(self, layer: LayerKey, scale: float, norm: str) -> float | None:
        rows = self.magnitudes[layer].shape[1] == 1
        norm = "columns" if norm == "base rows" and not rows else norm
        if norm == ("rows" if rows else "columns") and scale == self.meant.layers[layer].scale:
            return 0.0
        if self.weight_of is None:
            return None
        key = layer, norm, scale
        if key not in self._dora_errors:
            self._dora_errors[key] = self._measure_dora_error(layer, self.weight_of(layer), scale, norm)
        return self._dora_errors[key]

    def _measure_dora_error(self, layer: LayerKey, weight: torch.Tensor, scale: float, norm: str) -> float:
        weights, magnitude = self.meant.layers[layer], self.magnitudes[layer]
        delta = weights.delta()
        if weight.numel() != delta.numel() or magnitude.numel() not in weight.shape[:2]:
            raise AdapterFileError(
                f"{'.'.join(layer)} has the shape {list(delta.shape)} in the file and {list(weight.shape)} in"
                " the base; the file is for another base."
            )
        right = dora_update(weight, delta, magnitude)
        product = replace(weights, alpha=scale * weights.rank).delta().reshape(weight.shape)
        got = dora_update(weight, product, magnitude, norm) if norm else product
        return float((got - right).norm() / right.norm()) if right.any() else float(got.any())


def _no_conversion_helps(shapes: kinds.Shapes, meant: AdapterWeights, family: Family, format: str) -> bool:
    """Whether `convert` would write the names and shapes that a file has."""
    if not meant.layers:
        return False
    translator = peft if format == "diffusers" else kohya
    written = translator.to_tensors(reshape_adapter(meant, family), family, keep_alphas=True)
    pairs = {name: tuple(shape) for name, shape in shapes.items() if not name.endswith(".alpha")}
    return pairs == {name: tuple(t.shape) for name, t in written.items() if not name.endswith(".alpha")}


def _note(outcome: Outcome, advice: Callable[[], str], family: Family) -> str:
    """What a tool makes of a file and what to do, in one sentence."""
    layers = outcome.loaded.layers
    failed = [layer.failed for layer in layers.values() if layer.failed]
    if outcome.refused:
        return f"loads nothing: {outcome.refused}; {advice()}"
    if not layers:
        return f"loads nothing and says nothing, for it knows none of the {outcome.keys} keys; {advice()}"
    if outcome.dropped:
        wrong = f" and applies {_wrong_strength(outcome)}" if outcome.wrong else ""
        share = f"{len(outcome.dropped)} of {outcome.keys} keys, such as {first_few(outcome.dropped, 1)},"
        return f"drops {share} without a word{wrong}; {advice()}"
    if failed:
        number = f"{len(failed)} {'layer' if len(failed) == 1 else 'layers'}"
        return f"reads every key, but {failed[0].format(layers=number)}; {advice()}"
    if any(layer in layers and layers[layer].dora_norm and e != 0 for layer, e in outcome.errors.items()):
        error = outcome.max_error
        off = "--base measures how far off" if error is None else f"{error:.2g} of the update off"
        return f"norms the DoRA magnitudes in another way than the file means, {off}; {advice()}"
    if outcome.wrong:
        return f"applies {_wrong_strength(outcome)}; {advice()}"
    if not outcome.fine:
        return "reads every key, but the file lacks layers of the adapter; export it again"
    if not family.portable:
        return f"reads every key; the file is of use only with the {family.title.lower()}"
    conv_in = outcome.meant.layers.get(FIRST)
    if conv_in is not None and conv_in.weight_shape[1] == INPAINTING_CHANNELS:
        return f"reads every key at the right strength, with an inpainting checkpoint of {family.title} alone"
    if outcome.loaded.unused:
        unused = first_few(outcome.loaded.unused, 1)
        return f"reads every key at the right strength, but makes no use of {unused}"
    return f"reads every key at the right strength {outcome.loaded.note}".strip()


def _wrong_strength(outcome: Outcome) -> str:
    """How many layers are how far off, in words."""
    worst = max(outcome.wrong, key=lambda layer: outcome.errors[layer] or 0.0)
    used, right = outcome.loaded.layers[worst].scale, outcome.meant.layers[worst].scale
    layers = f"{len(outcome.wrong)} of {len(outcome.errors)} layers at the wrong strength"
    ratio = 0.0 if used is None or right == 0 else used / right
    if ratio <= 0 or abs(ratio - 1) <= outcome.tolerance:
        return layers
    return f"{layers}, up to {max(ratio, 1 / ratio):.3g} times too {'strong' if ratio > 1 else 'weak'}"


_MERGEABLE = re.compile(r"\.(?:hada|lokr|oft)_|\.dora_scale$|\.lora_magnitude_vector")
"""Tensors of the kinds that `merge --rank` turns into a plain LoRA."""


def _advice(outcome: Outcome, meant_for: bool, format: str, fixed: Callable[[], bool]) -> str:
    if not meant_for:
        return "export as kohya for it"
    dora = any(layer.kind == "DoRA" for layer in outcome.loaded.layers.values())
    if dora or any(map(_MERGEABLE.search, outcome.dropped)):
        return "merge it into a plain LoRA with --rank"
    extras = kinds.extra_keys(outcome.dropped)
    if any(map(kinds.TOKEN_KEY.fullmatch, extras)) and len(extras) < outcome.keys:
        if not outcome.loaded.layers:
            return "convert it to diffusers, which leaves new tokens to files of their own"
        if len(extras) == len(outcome.dropped):
            return "give it the new tokens in files of their own, which export and convert write"
    if extras and len(extras) == outcome.keys:
        return "no plain LoRA can hold it"
    refused = any(repr(key) in outcome.refused for key in extras)
    if refused or (extras and len(extras) == len(outcome.dropped)):
        return "only a file without them suits it; convert leaves them out"
    if outcome.wrong and not outcome.dropped:
        return "convert it to kohya, which gives all layers one alpha"
    if fixed():
        return "no conversion changes that"
    return f"convert it to {format}, which writes the names that all tools know"
