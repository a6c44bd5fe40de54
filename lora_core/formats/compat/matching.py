"""An adapter file as loaders see it, and the steps that they share: names to layers, keys to factors.

Loaders decide by names, shapes, alphas and the header; none looks at a factor's values before it has taken
the file, so nothing here does either.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from lora_core.formats.layer_shapes import Layout, norm_layers
from lora_core.lora.weights import LayerKey
from lora_core.model_files.families import Family, ldm_unet_path


class LoadError(Exception):
    """A tool loads nothing of a file; the text says why, after "loads nothing:"."""


class Pair(NamedTuple):
    """What follows a layer's name in the keys of a LoRA; "" for what a tool does not read."""

    down: str
    up: str
    mid: str = ""
    alpha: str = ".alpha"


KOHYA = Pair(".lora_down.weight", ".lora_up.weight", ".lora_mid.weight")
KOHYA_NO_MID = Pair(".lora_down.weight", ".lora_up.weight")
PEFT = Pair(".lora_A.weight", ".lora_B.weight")
PEFT_DEFAULT = Pair(".lora_A.default.weight", ".lora_B.default.weight")
ATTENTION_PROCESSOR = Pair("_lora.down.weight", "_lora.up.weight")
LORA_DOT = Pair(".lora.down.weight", ".lora.up.weight")
LORA_LINEAR = Pair(".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
LYCORIS = {
    "LoHa": (".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".hada_t1", ".hada_t2"),
    "LoKr": (".lokr_w1", ".lokr_w1_a", ".lokr_w1_b", ".lokr_w2", ".lokr_w2_a", ".lokr_w2_b", ".lokr_t2"),
    "full difference": (".diff",),
    "norm": (".w_norm",),
    "bias": (".diff_b",),
}
"""Kinds of changes besides LoRA: what follows a layer's name."""
_PAIRS = (KOHYA, PEFT, PEFT_DEFAULT, ATTENTION_PROCESSOR, LORA_DOT, LORA_LINEAR)
_SUFFIXES = (
    *sorted({suffix for pair in _PAIRS for suffix in pair if suffix}, key=len, reverse=True),
    *(suffix for suffixes in LYCORIS.values() for suffix in suffixes),
    *(".diff_b", ".b_norm", ".dora_scale", ".lora_magnitude_vector"),
)


@dataclass(frozen=True)
class AdapterFile:
    """What loaders look at.

    Attributes:
        shapes: of each tensor by name, in the order of their bytes, in which loaders see them.
        alphas: of each alpha tensor by name.
        metadata: of the header.
        family: of the base.
        layout: the base's layers.
        full_size: whether the file's layers are as wide as the layout's; if not, widths are not compared.
    """

    shapes: Mapping[str, Sequence[int]]
    alphas: Mapping[str, float]
    metadata: Mapping[str, str]
    family: Family
    layout: Layout
    full_size: bool

    @property
    def ldm_named(self) -> bool:
        """Whether kohya files of the family use the original block names."""
        return self.family.kohya_block_names == "ldm"

    def names(self, part: str, template: str, only: str = ".*", norms: bool = False) -> dict[str, LayerKey]:
        """Name to layer, for the layers of a part; none if the family lacks the part.

        Args:
            part: "unet", "text_encoder" or "text_encoder_2".
            template: of the name: see `_fill`.
            only: a regular expression for the paths that have such a name.
            norms: the norm layers in place of linear layers and convolutions.
        """
        layers = norm_layers(self.layout) if norms else self.layout
        if part not in self.family.parts:
            return {}
        return dict(_names(tuple(layers), part, template, only, tuple(self.family.attention_levels)))


@lru_cache(maxsize=256)
def _names(
    layers: tuple[LayerKey, ...], part: str, template: str, only: str, attention_levels: tuple[bool, ...]
) -> dict[str, LayerKey]:
    pattern = re.compile(only)
    paths = [path for layer_part, path in layers if layer_part == part and pattern.fullmatch(path)]
    names = {path: _fill(template, path, attention_levels) for path in paths}
    return {name: (part, path) for path, name in names.items() if name}


def _fill(template: str, path: str, attention_levels: tuple[bool, ...]) -> str | None:
    """A layer's name, or None where it has no original one.

    {path} is diffusers', {flat} the same with underscores; {ldm} and {ldm_flat} the original one; {bare} and
    {bare_flat} lack `text_model.`; {older} has q_proj as to_q and to_out.0 as to_out; {processor} is below
    `.processor.`.
    """
    ldm = ldm_unet_path(path, attention_levels) if "{ldm" in template else ""
    if ldm is None:
        return None
    older = re.sub(r"\.self_attn\.(q|k|v|out)_proj$", r".self_attn.to_\1", path)
    older = older.removesuffix(".0") if older.endswith(".to_out.0") else older
    bare = path.removeprefix("text_model.")
    return template.format(
        path=path,
        flat=path.replace(".", "_"),
        ldm=ldm,
        ldm_flat=ldm.replace(".", "_"),
        bare=bare,
        bare_flat=bare.replace(".", "_"),
        older=older,
        older_bare=older.removeprefix("text_model."),
        processor=older.replace(".to_", ".processor.to_"),
    )


@dataclass
class Module:
    """The keys at one name of a layer.

    Attributes:
        layer: that has the name.
        keys: by what follows the name.
        kind: what a tool applies here: the pair that it takes, a key of `LYCORIS`, or None.
    """

    layer: LayerKey
    keys: dict[str, str] = field(default_factory=dict)
    kind: Pair | str | None = None

    @property
    def first_key(self) -> str:
        """The one that stands first in the file."""
        return next(iter(self.keys.values()))


def match_keys(
    keys: Iterable[str],
    names: Mapping[str, LayerKey],
    pairs: Sequence[Pair],
    norms: Mapping[str, LayerKey] | None = None,
    others: Iterable[str] = (),
) -> list[Module]:
    """The keys at names that a tool knows.

    Args:
        keys: of the file.
        names: of layers.
        pairs: that the tool reads; at one name the first counts.
        norms: names of norm layers.
        others: keys of `LYCORIS` that it reads, before any pair.
    """
    modules: dict[str, Module] = {}
    for key in keys:
        for suffix in _SUFFIXES:
            known = (norms or {}) if suffix in (".w_norm", ".b_norm") else names
            name = key.removesuffix(suffix)
            if name != key and name in known:
                modules.setdefault(name, Module(known[name])).keys[suffix] = key
                break
    for module in modules.values():
        kinds = [kind for kind in others if any(suffix in module.keys for suffix in LYCORIS[kind])]
        pair = next((pair for pair in pairs if module.keys.keys() >= {pair.up, pair.down}), None)
        module.kind = pair if pair and kinds in ([], ["bias"]) else next(iter(kinds), None)
    return list(modules.values())


Matched = dict[LayerKey, Module]
"""The layers that a tool changes."""


def match_layers(file: AdapterFile, modules: Iterable[Module], exact: bool = False) -> Matched:
    """The layers whose weights the factors fit.

    Args:
        file: to be loaded.
        modules: of the file.
        exact: whether factors must be 2-D for a linear layer and 4-D for a convolution.

    Raises:
        LoadError: factors are not `exact`.
    """
    return {
        module.layer: module
        for module in modules
        if isinstance(module.kind, str) or (module.kind and _fits(file, module, module.kind, exact))
    }


def _fits(file: AdapterFile, module: Module, pair: Pair, exact: bool) -> bool:
    """Whether the product of the factors has the shape of the layer's weight."""
    down, up = (file.shapes[module.keys[suffix]] for suffix in (pair.down, pair.up))
    mid = file.shapes[module.keys[pair.mid]] if pair.mid in module.keys else down
    found, weight = (up[0], *down[1:2], *mid[2:]), file.layout[module.layer]
    same_kernel = (found[2:] or (1, 1)) == (weight[2:] or (1, 1))
    same = same_kernel and len(found) == len(weight) and (found == weight or not file.full_size)
    if exact and not same:
        raise LoadError(
            f"it fails at {module.keys[pair.down]!r}, which is for a weight of shape {list(found)} where the"
            f" layer's has {list(weight) if file.full_size else f'{len(weight)} dimensions'}"
        )
    return same_kernel and (not file.full_size or math.prod(found) == math.prod(weight))


@dataclass(frozen=True)
class AppliedLayer:
    """What a tool does to one layer.

    Attributes:
        keys: that it takes for the layer.
        scale: of the product of the factors; None for kinds other than LoRA.
        kind: "LoRA", "DoRA", or a key of `LYCORIS`.
        dora_norm: what it divides DoRA magnitudes by, as in `layers.dora_update`, or "base rows where rows";
            "" if it applies none.
        failed: whether it fails at the layer and leaves it as it is.
    """

    keys: tuple[str, ...]
    scale: float | None
    kind: str = "LoRA"
    dora_norm: str = ""
    failed: bool = False


@dataclass(frozen=True)
class Loaded:
    """What a tool takes from a file.

    Attributes:
        layers: that it changes.
        other_keys: that it takes without changing a layer, such as embeddings.
        unused: of all these keys, those without effect.
    """

    layers: dict[LayerKey, AppliedLayer]
    other_keys: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


def apply_layers(
    file: AdapterFile, matched: Matched, dora_norm: str = "", diff_b: bool = False, zero_is_rank: bool = False
) -> dict[LayerKey, AppliedLayer]:
    """Each layer at its own alpha / rank; at 1 without an alpha.

    Args:
        file: to be loaded.
        matched: its layers.
        dora_norm: see `AppliedLayer`.
        diff_b: whether the tool takes the change of a bias beside a LoRA.
        zero_is_rank: whether it takes alpha 0 for "as the rank".
    """
    applied: dict[LayerKey, AppliedLayer] = {}
    for layer, module in matched.items():
        norm = dora_norm if ".dora_scale" in module.keys else ""
        if not isinstance(module.kind, Pair):
            applied[layer] = AppliedLayer(tuple(module.keys.values()), None, str(module.kind), norm)
            continue
        suffixes = (*module.kind, ".dora_scale" if norm else "", ".diff_b" if diff_b else "")
        alpha = file.alphas.get(module.keys.get(module.kind.alpha, ""))
        rank = file.shapes[module.keys[module.kind.down]][0]
        scale = 1.0 if alpha is None or (alpha == 0 and zero_is_rank) else alpha / rank
        keys = tuple(module.keys[suffix] for suffix in suffixes if suffix in module.keys)
        applied[layer] = AppliedLayer(keys, scale, "DoRA" if norm else "LoRA", norm)
    return applied
