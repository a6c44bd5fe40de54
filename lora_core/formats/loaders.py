"""What the loaders of six tools take from an adapter file: one function a tool, to be read beside its source.

Loaders decide by names, shapes, alphas and the header; none looks at a factor's values before it has taken
the file, so nothing here does either. Each function returns the layers that the tool changes and at which
scale, or raises `LoadError` where it loads nothing. All were checked by running the real loaders
(`tests/formats/loader_runs.json`).
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

from lora_core.errors import AdapterFileError
from lora_core.formats.layers import ldm_family, norm_layers
from lora_core.formats.peft import HEADER_KEY, read_lora_config
from lora_core.lora.weights import LayerKey
from lora_core.model_files.detect import Layout
from lora_core.model_files.families import Family, is_text_encoder
from lora_core.model_files.ldm_names import ldm_unet_path


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
    "OFT": (".oft_blocks",),
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

    def names(self, *rows: tuple[str, ...], norms: bool = False) -> dict[str, LayerKey]:
        """Name to layer.

        Args:
            *rows: (part, template of its names, see `_fill`), and a regular expression where only some paths
                have such a name.
            norms: the norm layers in place of linear layers and convolutions.
        """
        layers = tuple(norm_layers(self.layout) if norms else self.layout)
        found: dict[str, LayerKey] = {}
        for part, template, *only in rows:
            found |= _names(layers, part, template, *only or [".*"], tuple(self.family.attention_levels))
        return found


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
    """The keys at one name of a layer, by what follows the name; and what a tool applies there: the pair that
    it takes, a key of `LYCORIS`, or None."""

    layer: LayerKey
    keys: dict[str, str] = field(default_factory=dict)
    kind: Pair | str | None = None

    @property
    def first_key(self) -> str:
        """The first of them in the file."""
        return next(iter(self.keys.values()))


def match_keys(
    keys: Iterable[str],
    names: Mapping[str, LayerKey],
    pairs: Sequence[Pair],
    norms: Mapping[str, LayerKey] | None = None,
    others: Iterable[str] = (),
) -> list[Module]:
    """The keys at names that a tool knows: of layers, or of `norms`.

    Of the `pairs` that the tool reads, the first counts at one name. `others` are keys of `LYCORIS` that it
    reads, before any pair.
    """
    modules: dict[str, Module] = {}
    for key in keys:
        for suffix in filter(key.endswith, _SUFFIXES):
            known = (norms or {}) if suffix in (".w_norm", ".b_norm") else names
            name = key.removesuffix(suffix)
            if name in known:
                modules.setdefault(name, Module(known[name])).keys[suffix] = key
                break
    for module in modules.values():
        kinds = [kind for kind in others if any(suffix in module.keys for suffix in LYCORIS[kind])]
        pair = next((pair for pair in pairs if module.keys.keys() >= {pair.up, pair.down}), None)
        module.kind = pair if pair and kinds in ([], ["bias"]) else next(iter(kinds), None)
    return list(modules.values())


@dataclass(frozen=True)
class AppliedLayer:
    """What a tool does to one layer.

    Attributes:
        keys: that it takes for the layer; of a LoRA the down half first.
        scale: of the product of the factors; None for kinds other than LoRA.
        rank: of the factors; 0 for kinds other than LoRA.
        kind: "LoRA", "DoRA", or a key of `LYCORIS`.
        dora_norm: the divisor of DoRA magnitudes, as in `lycoris.dora_update`, or "base rows where rows"; ""
            if it applies none.
        failed: the wrong thing that it does, "{layers}" for how many; or "".
    """

    keys: tuple[str, ...]
    scale: float | None
    rank: int = 0
    kind: str = "LoRA"
    dora_norm: str = ""
    failed: str = ""


Applied = dict[LayerKey, AppliedLayer]
"""The layers that a tool changes."""


@dataclass(frozen=True)
class Loaded:
    """What a tool takes from a file: the layers that it changes, keys that it takes without changing a layer,
    such as embeddings, those of all these keys that have no effect, and what to say beside."""

    layers: Applied
    other_keys: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    note: str = ""


def apply_layers(
    file: AdapterFile, modules: Iterable[Module], dora_norm: str = "", diff_b: bool = False,
    zero_is_rank: bool = False, exact: bool = False,
) -> Applied:  # fmt: skip
    """The layers whose weights the factors fit, each at its own alpha / rank; at 1 without an alpha.

    `diff_b`: whether the tool takes the change of a bias beside a LoRA. `zero_is_rank`: whether it takes
    alpha 0 for "as the rank".

    Raises:
        LoadError: with `exact`, factors are not 2-D for a linear layer or not 4-D for a convolution.
    """
    applied: Applied = {}
    for module in modules:
        magnitude = ".lora_magnitude_vector" if dora_norm == "rows" else ".dora_scale"
        norm = dora_norm if magnitude in module.keys else ""
        if isinstance(module.kind, str):
            applied[module.layer] = AppliedLayer(tuple(module.keys.values()), None, 0, module.kind, norm)
        elif module.kind and _fits(file, module, module.kind, exact):
            suffixes = (*module.kind, magnitude if norm else "", ".diff_b" if diff_b else "")
            alpha = file.alphas.get(module.keys.get(module.kind.alpha, ""))
            rank = file.shapes[module.keys[module.kind.down]][0]
            scale = 1.0 if alpha is None or (alpha == 0 and zero_is_rank) else alpha / rank
            keys = tuple(module.keys[suffix] for suffix in suffixes if suffix in module.keys)
            applied[module.layer] = AppliedLayer(keys, scale, rank, "DoRA" if norm else "LoRA", norm)
    return applied


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


IN_ENCODER = r"text_model\..+"
NO_BIAS_KINDS = ("LoHa", "LoKr", "full difference", "norm")
TUCKER_FAILS = "skips {layers} of Tucker form with an error in its log, since "
OFT_LIMIT = "turns {layers} less than the file means, since it takes alpha for the limit of an entire layer"
KRON = "it passes PyTorch's kron a tensor that is not contiguous (fails with 2.13; other versions may differ)"
"""Why Forge and ComfyUI cannot use a LoKr of Tucker form."""


def a1111(file: AdapterFile) -> Loaded:
    """AUTOMATIC1111/stable-diffusion-webui 1.10.1: extensions-builtin/Lora/networks.py (`load_network`),
    network_*.py.

    It fails at a layer that it knows with nothing that it knows. It counts blocks as SD1 has them, where the
    coarsest level has no attention. It changes the attention of an OpenCLIP text encoder only entirely.
    Bundled embeddings become textual inversions.
    """
    open_clip = {encoder.part: encoder.open_clip for encoder in file.family.text_encoders}
    skipped = r"add_embedding|up_blocks\.0\.upsamplers" if file.ldm_named else "add_embedding"
    names = file.names(
        ("unet", "lora_unet_{ldm_flat}"),
        ("unet", "lora_unet_{flat}", rf"(?!{skipped}).+"),
        *_kohya_text_names(file),
    )
    norms = file.names(
        ("unet", "lora_unet_{ldm_flat}"), ("unet", "lora_unet_{flat}", "(?!conv_norm_out).+"), norms=True
    )
    if len(open_clip) == 2:
        norms |= file.names(("text_encoder", "lora_te1_{flat}"), norms=True)
    elif not open_clip["text_encoder"]:
        names |= file.names(("text_encoder", "lora_te1_{flat}", IN_ENCODER))
        norms |= file.names(("text_encoder", "lora_te_{flat}", r"text_model\.encoder\..+"), norms=True)
    bundled = tuple(key for key in file.shapes if key.startswith("bundle_emb."))
    keys = (key for key in file.shapes if key not in bundled)
    modules = match_keys(keys, names, (KOHYA, PEFT._replace(alpha="")), norms, (*NO_BIAS_KINDS, "OFT"))
    for module in modules:
        if module.kind is None:
            raise LoadError(f"it fails at {module.first_key!r}, which has no pair that it knows")
    for module in modules:
        if module.kind == "norm" and ".b_norm" not in module.keys:
            raise LoadError(f"it fails at {module.first_key!r}, a norm layer without b_norm")
    layers = apply_layers(file, modules, "columns", diff_b=True)
    for part, path in list(layers):
        attention = path.rpartition(".")[0]
        whole = [(part, f"{attention}.{name}_proj") for name in ("q", "k", "v", "out")]
        if open_clip.get(part) and attention.endswith(".self_attn") and not layers.keys() >= {*whole}:
            for layer in whole:
                layers.pop(layer, None)
    return Loaded(layers, bundled, _unused_biases(layers))


def forge(file: AdapterFile) -> Loaded:
    """lllyasviel/stable-diffusion-webui-forge dfdcbab6: packages_3rdparty/comfyui_lora_collection/lora.py,
    backend/patcher/lora.py.

    It rejects a file with more than 12 unknown keys, such as those of an OFT, and fails at a LoKr of Tucker
    form.
    """
    names, norms = _comfyui_names(file)
    others = [kind for kind in LYCORIS if kind != "OFT"]
    modules = match_keys(file.shapes, names, COMFYUI_PAIRS, norms, others)
    known = {key for m in modules for suffix, key in m.keys.items() if suffix not in LYCORIS["OFT"]}
    unknown = [key for key in file.shapes if key not in known]
    if len(unknown) > 12:
        raise LoadError(
            f"it rejects the file, as any with more than 12 unknown keys; here are"
            f" {len(unknown)}, such as {unknown[0]!r}"
        )
    for module in modules:
        if module.kind == "LoKr" and ".lokr_t2" in module.keys:
            raise LoadError(f"it fails at {module.first_key!r}, a LoKr of Tucker form: {KRON}")
    return Loaded(apply_layers(file, modules, "base rows", diff_b=True))


def comfyui(file: AdapterFile) -> Loaded:
    """comfyanonymous/ComfyUI 0.3.64 (0.8 and 0.12 agree): comfy/lora.py (`load_lora`, `model_lora_keys_*`),
    comfy/weight_adapter.

    It takes known keys and logs the rest; a LoKr of Tucker form fails in its log, layer by layer. It
    multiplies the change of an OFT by the strength twice.
    """
    names, norms = _comfyui_names(file)
    clips = (("text_encoder", "clip_l"), ("text_encoder", "clip_h"), ("text_encoder_2", "clip_g"))
    names |= file.names(
        *((part, f"text_encoders.{clip}.transformer.{{path}}", IN_ENCODER) for part, clip in clips)
    )
    pairs = (*COMFYUI_PAIRS, PEFT_DEFAULT)
    layers = apply_layers(
        file, match_keys(file.shapes, names, pairs, norms, LYCORIS), "base rows", diff_b=True
    )
    for key, layer in layers.items():
        if layer.scale is None and any(name.endswith(".lokr_t2") for name in layer.keys):
            layers[key] = replace(layer, failed=TUCKER_FAILS + KRON)
        if layer.kind == "OFT" and any(file.alphas.get(name, 0.0) > 0 for name in layer.keys):
            layers[key] = replace(layer, failed=OFT_LIMIT)
    turned = any(layer.kind == "OFT" for layer in layers.values())
    return Loaded(layers, note="if that is 1; it takes the square of any other" if turned else "")


COMFYUI_PAIRS = (
    KOHYA, ATTENTION_PROCESSOR, PEFT, LORA_DOT, LORA_LINEAR,
)  # fmt: skip


def _comfyui_names(file: AdapterFile) -> tuple[dict[str, LayerKey], dict[str, LayerKey]]:
    """Names of layers and of norm layers in ComfyUI, from which Forge has them."""
    both = [
        ("unet", template)
        for template in (
            "lora_unet_{ldm_flat}", "lora_unet_{flat}", "diffusion_model.{ldm}", "lycoris_{flat}"
        )
    ]  # fmt: skip
    names = file.names(
        *both,
        ("unet", "{processor}"),
        ("unet", "unet.{processor}"),
        ("text_encoder", "lora_te_{flat}", IN_ENCODER),
        ("text_encoder", "lora_te1_{flat}", IN_ENCODER),
        ("text_encoder", "text_encoder.{path}", IN_ENCODER),
        ("text_encoder_2", "lora_te2_{flat}"),
        ("text_encoder_2", "text_encoder_2.{path}", IN_ENCODER),
    )
    return names, file.names(*both, norms=True)


def invokeai(file: AdapterFile) -> Loaded:
    """invoke-ai/InvokeAI 8e71a8a5: invokeai/backend/model_manager/configs/lora.py,
    backend/patches/lora_conversions/sd_lora_conversion_utils.py, sdxl_lora_conversion_utils.py.

    It recognizes the base by widths and refuses unknown ones. Each name in the file must have something that
    it knows, on a layer of the base or not. For SDXL all UNet names must be of one sort.
    """
    unet = [("unet", "lora_unet_{ldm_flat}")] if file.ldm_named else []
    unet.append(("unet", "lora_unet_{flat}"))
    names = file.names(*unet, *_kohya_text_names(file, projection=True))
    norms = file.names(
        *unet,
        ("text_encoder", "lora_te_{flat}"),
        ("text_encoder", "lora_te1_{flat}"),
        ("text_encoder_2", "lora_te2_{flat}"),
        norms=True,
    )
    bundled = tuple(key for key in file.shapes if key.startswith("bundle_emb"))
    keys = [key for key in file.shapes if key not in bundled]
    modules = match_keys(keys, names, (KOHYA,), norms, NO_BIAS_KINDS)
    if file.family.portable:
        # The first width that the keys show, in the file's order, decides the base.
        width = _invokeai_width(file.shapes)
        if width is None and any(_DEEP_TRANSFORMER.match(key) for key in keys):
            width = ldm_family().context_width
        if width is None:
            hint = "" if any(map(_CROSS_ATTENTION.match, keys)) else "; adapt attn2.to_k too"
            raise LoadError(
                "it cannot tell which base the file is for, since no key of the UNet's cross-attention says"
                f" it{hint}"
            )
        if file.full_size and _CONTEXT_WIDTHS.get(width, width) != file.family.context_width:
            raise LoadError(
                f"it takes the file, by a width of {width}, for another base than {file.family.title}"
            )
    if file.ldm_named:
        stray = next((key for key in keys if not key.startswith(("lora_unet_", *_TEXT_STARTS[1:]))), None)
        if stray:
            raise LoadError(f"it fails at {stray!r}, which does not begin as {file.family.title} files do")
        if len({_LDM_NAME.match(key) is None for key in keys if key.startswith("lora_unet_")}) > 1:
            raise LoadError("it fails where some UNet keys have original block names and others do not")
    others = {suffix for kind in NO_BIAS_KINDS for suffix in LYCORIS[kind]}
    for prefix, suffixes in _by_prefix(keys).items():
        if not (suffixes >= {KOHYA.down, KOHYA.up} or suffixes & others):
            raise LoadError(f"it refuses files with a key such as {prefix + min(suffixes)!r}")
    for module in modules:
        no_bias = re.search(r"\.attn[12]\.to_[qkv]$|^text_projection$", module.layer[1])
        if module.kind == "full difference" and ".diff_b" in module.keys and no_bias:
            raise LoadError(f"it fails at {module.keys['.diff_b']!r}, since that layer has no bias")
        if module.kind in ("LoHa", "LoKr") and ".dora_scale" in module.keys:
            dora = module.keys[".dora_scale"]
            raise LoadError(f"it fails at {dora!r}, since it knows DoRA of a plain LoRA only")
    layers = apply_layers(file, modules, "columns", diff_b=True)
    return Loaded(layers, bundled, (*bundled, *_unused_biases(layers)))


_LDM_NAME = re.compile(
    r"lora_unet_(?:input_blocks_\d+_\d+|middle_block_\d|output_blocks_\d+_\d|time_embed_[02]|label_emb_0_[02]"
    r"|out_[02])(?=[._])"
)
_CROSS_ATTENTION = re.compile(r"lora_unet_.*_attn2_to_[kv]\.")
_DEEP_TRANSFORMER = re.compile(
    r"lora_unet_(?:(?:down|up)_blocks_\d+_attentions_\d+|mid_block_attentions_\d+"
    r"|(?:in|out)put_blocks_\d+_\d+|middle_block_\d+)_transformer_blocks_(?:[2-9]|\d\d+)_"
)
_CONTEXT_WIDTHS = {1280: 2048}
"""The width of SDXL's second text encoder, to the width of its text context."""


def _invokeai_width(shapes: Mapping[str, Sequence[int]]) -> int | None:
    """The text width that InvokeAI reads off a file, or None.

    It forgets the width of a text encoder at each alpha and up half, so that the two widths of a family with
    two text encoders meet only by luck.
    """
    first = second = None
    for key, shape in shapes.items():
        prefix, _, suffix = key.partition(".")
        width = shape[1] if suffix in _INPUT_LAST and len(shape) > 1 else None
        if suffix.startswith("lokr_"):
            factors = [shapes.get(f"{prefix}.lokr_w{n}", ()) for n in "12"]
            width = factors[0][1] * factors[1][1] if all(len(factor) > 1 for factor in factors) else None
        if key.startswith("lora_te") and "_self_attn_" in key:
            first = width if key.startswith("lora_te1_") else first
            second = width if key.startswith("lora_te2_") else second
            width = width if key.startswith("lora_te_") else None
        elif not (_CROSS_ATTENTION.match(key) or (key.startswith("lora_unet_") and _TIME_DOWN in key)):
            continue
        if first is not None and second is not None:
            return first + second
        if width is not None:
            return width
    return None


_INPUT_LAST = ("lora_down.weight", "hada_w1_b", "hada_w2_b", "diff")
"""Tensors whose second axis is the input of their layer."""
_TIME_DOWN = "time_emb_proj.lora_down"


def kohya(file: AdapterFile) -> Loaded:
    """kohya-ss/sd-scripts 48d368fa: networks/lora.py (`create_network_from_weights`).

    It takes known keys and ignores the rest, has no `lora_mid`, and reads alpha 0 as the rank. Factors must
    have the dimensions of their layer. It translates diffusers' block names in SDXL files, for which it must
    know the first one.
    """
    in_blocks = r".*(?:attentions|resnets|downsamplers|upsamplers)\..+"
    own = "lora_unet_{ldm_flat}" if file.ldm_named else "lora_unet_{flat}"
    names = file.names(("unet", own, in_blocks), *_kohya_text_names(file))
    if file.ldm_named and any(re.search("down_blocks|up_blocks", key) for key in file.shapes):
        names |= file.names(("unet", "lora_unet_{flat}", in_blocks))
        prefixes = [key.partition(".")[0] for key in file.shapes if key.startswith("lora_unet_")]
        translated = any(re.search("down_blocks|up_blocks", prefix) for prefix in prefixes)
        if translated and prefixes[0] not in file.names(("unet", "lora_unet_{flat}")):
            raise LoadError(
                f"it fails at {prefixes[0]!r}, for it cannot translate it to the original block names"
            )
    modules = match_keys(file.shapes, names, (KOHYA_NO_MID,))
    return Loaded(apply_layers(file, modules, zero_is_rank=True, exact=True))


def diffusers(file: AdapterFile) -> Loaded:
    """huggingface/diffusers 0.42.1 with transformers 5.24 and peft 0.21: loaders/lora_conversion_utils.py,
    lora_pipeline.py, lora_base.py, utils/state_dict_utils.py.

    A file with kohya's names alone is translated; any other is taken for one of diffusers' or PEFT's names.
    Both drop `dora_scale`.
    """
    keys = [key for key in file.shapes if not key.endswith(".dora_scale")]
    if not all(key.startswith(("lora_unet_", *_TEXT_STARTS)) for key in keys):
        return Loaded(_diffusers_peft(file, keys))
    if file.ldm_named and any(re.search("down_blocks|mid_block|up_blocks", key) for key in keys):
        keys = [key for key in keys if not re.search("input_blocks|middle_block|output_blocks", key)]
    return Loaded(_diffusers_kohya(file, keys))


def _diffusers_kohya(file: AdapterFile, keys: Sequence[str]) -> Applied:
    """`_convert_non_diffusers_lora_to_diffusers`: each key must be of a known pair; most layers get the most
    frequent alpha of their component."""
    names = file.names(
        ("unet", "lora_unet_{ldm_flat}", ".*" if file.ldm_named else r"conv_in|conv_out|time_embedding\..+"),
        ("unet", "lora_unet_{flat}", "(?!add_embedding).+" if file.ldm_named else ".*"),
        *(("text_encoder", f"lora_te{n}_{{{name}}}") for n in ("", "1") for name in ("flat", "bare_flat")),
        ("text_encoder_2", "lora_te2_{flat}"),
    )
    pair = KOHYA_NO_MID
    for prefix, suffixes in _by_prefix(keys).items():
        extra = suffixes - {*pair} if suffixes >= {pair.down, pair.up} else suffixes
        if extra:
            raise LoadError(f"it refuses files with a key such as {prefix + min(extra)!r}")
    layers = apply_layers(file, match_keys(keys, names, (pair,)), exact=True)
    keys_of = {part: [key for key in keys if key.startswith(_STARTS[part])] for part in file.family.parts}
    for part in file.family.parts[1:]:
        out = any("_out_proj." in key for key in keys_of[part])
        if keys_of[part] and not out and not any("_mlp_" in key for key in keys_of[part]):
            raise LoadError(
                f"it fails at {part}, for which it needs out_proj, fc1 or fc2 among the adapted layers"
            )
        if not out:
            lost = {(p, path) for p, path in layers if p == part and ".self_attn." in path}
            layers = {key: layer for key, layer in layers.items() if key not in lost}
    _check_parts(keys_of, layers)
    if file.metadata.get(HEADER_KEY):
        if file.alphas:
            raise LoadError("it refuses files that have alphas both among the tensors and in the header")
        return _apply_header(file, layers, keys_of)
    _check_projection_rank(file, layers)
    common = {part: _common_alpha(file, part, keys_of[part]) for part in file.family.parts}
    for (part, path), layer in layers.items():
        alpha, own = common[part], any(key.endswith(".alpha") for key in layer.keys)
        if alpha is not None and not (own and _keeps_alpha(file, part, path, layer.keys[0])):
            layers[part, path] = replace(layer, scale=alpha / layer.rank)
    return layers


def _keeps_alpha(file: AdapterFile, part: str, path: str, key: str) -> bool:
    """Whether diffusers gives a layer its own alpha: outside of attention, if the file's names have the
    `text_model` level where the model has it."""
    if not is_text_encoder(part):
        return re.search(r"\.attn[12]\.to_", path) is None
    if path.startswith("text_model.") and ("text_model" in key) != _has_text_level(file, part):
        return False
    return re.search(r"\.mlp\.fc[12]$|^text_projection$", path) is not None


def _has_text_level(file: AdapterFile, part: str) -> bool:
    """Whether transformers still has the `text_model.` level: only in encoders with a projection."""
    return (part, "text_projection") in file.layout


def _common_alpha(file: AdapterFile, part: str, keys: Sequence[str]) -> float | None:
    """The most frequent alpha of a component; of equally frequent ones the first that diffusers meets."""
    prefixes = [key.partition(".")[0] for key in keys if key.endswith(".lora_down.weight")]
    if not is_text_encoder(part) and file.ldm_named:
        prefixes = _by_block(prefixes)
    alphas = [file.alphas[f"{prefix}.alpha"] for prefix in prefixes if f"{prefix}.alpha" in file.alphas]
    return Counter(alphas).most_common(1)[0][0] if alphas else None


_BLOCK = re.compile(r"lora_unet_(?!input_blocks_0_0)(input_blocks|middle_block|output_blocks)_(\d+)_")


def _by_block(prefixes: Sequence[str]) -> list[str]:
    """Prefixes with original names in the order in which diffusers translates them.

    Names outside of blocks come first, conv_in included; then the blocks, in the order in which Python's set
    has their numbers: not always ascending.
    """
    blocks = [(found[1], int(found[2])) if (found := _BLOCK.match(p)) else None for p in prefixes]
    order: list[tuple[str, int] | None] = [None]
    for kind in ("input_blocks", "middle_block", "output_blocks"):
        numbers = {block[1] for block in blocks if block and block[0] == kind}
        order += [(kind, number) for number in numbers]
    pairs = zip(map(order.index, blocks), prefixes, strict=True)
    return [prefix for _, prefix in sorted(pairs, key=lambda pair: pair[0])]


def _diffusers_peft(file: AdapterFile, keys: Sequence[str]) -> Applied:
    """Alpha is in the header, without which it is the rank.

    A UNet whose first key is PEFT's is not translated, so its older spellings are lost.
    """
    foreign = next((key for key in keys if "lora" not in key), None)
    if foreign:
        raise LoadError(f"it refuses files with a key such as {foreign!r}, which lacks 'lora'")
    names = file.names(
        *((part, f"{part}.{{{name}}}") for part, names in _DIFFUSERS_TEMPLATES.items() for name in names)
    )
    pairs = [pair._replace(alpha="") for pair in _DIFFUSERS_PAIRS]
    modules = match_keys(keys, names, pairs)
    layers = apply_layers(file, modules, "rows", exact=True)
    keys_of = {part: [key for key in keys if key.startswith(f"{part}.")] for part in file.family.parts}
    lost = {part: set[Pair | str | None]() for part in file.family.parts}
    if "lora_A" in next(iter(keys_of["unet"]), ""):
        lost["unet"] = set(pairs[1:])
    for part in file.family.parts[1:]:
        _check_spelling(part, keys_of[part])
        old = any("to_out_lora" in key for key in keys_of[part])
        lost[part] = {pairs[3]} if old else {pairs[1], pairs[3]}
    kept = {module.layer for module in modules if module.kind not in lost[module.layer[0]]}
    layers = {key: layer for key, layer in layers.items() if key in kept}
    _check_parts(keys_of, layers)
    if file.metadata.get(HEADER_KEY):
        return _apply_header(file, layers, keys_of)
    _check_projection_rank(file, layers)
    return layers


_DIFFUSERS_TEMPLATES = {
    "unet": ("path", "processor", "older"),
    "text_encoder": ("path", "bare", "older", "older_bare"),
    "text_encoder_2": ("path", "older"),
}
_DIFFUSERS_PAIRS = (PEFT, ATTENTION_PROCESSOR, LORA_LINEAR, LORA_DOT)


def _check_spelling(part: str, keys: Sequence[str]) -> None:
    """diffusers tells the spelling of a text encoder from some of its keys; the others lose q, k and v."""
    old = any("to_out_lora" in key for key in keys)
    linear = any("lora_linear_layer" in key or "_mlp_" in key for key in keys)
    peft = any(".lora_A.weight" in key for key in keys)
    attention = any(re.search(r"\.(?:q|k|v|out)_proj\.lora_[AB]", key) for key in keys)
    if keys and not (old or linear) and not (peft and attention):
        needed = "a layer of its attention" if peft else "out_proj, fc1 or fc2"
        raise LoadError(f"it fails at {part}, for which it needs {needed} among the adapted layers")


def _check_parts(keys_of: Mapping[str, Sequence[str]], layers: Applied) -> None:
    for part, keys in keys_of.items():
        if keys and not any(layer[0] == part for layer in layers):
            raise LoadError(f"it fails, for it knows no layer of {part} by a name such as {keys[0]!r}")


def _check_projection_rank(file: AdapterFile, layers: Applied) -> None:
    """diffusers overlooks the rank of a text projection and takes the most frequent one of its encoder."""
    for part in file.family.parts[1:]:
        ranks = {key: layers[key].rank for key in file.layout if key[0] == part and key in layers}
        own = ranks.pop((part, "text_projection"), None)
        if own is not None and ranks and own != Counter(ranks.values()).most_common(1)[0][0]:
            raise LoadError(
                f"it fails at {part}.text_projection, whose rank {own} is not its encoder's usual one"
            )


def _apply_header(file: AdapterFile, found: Applied, keys_of: Mapping[str, Sequence[str]]) -> Applied:
    """Each layer as a PEFT LoraConfig in the header has it: r, lora_alpha, their patterns, use_rslora."""
    try:
        values = read_lora_config(file.metadata)
    except AdapterFileError as error:
        raise LoadError(f"it fails at the header: {str(error).rstrip('.')}") from error
    for part, keys in keys_of.items():
        if keys and not values.get(f"{part}.target_modules"):
            raise LoadError(f"it fails at {part}, about which the header says nothing")
    layers: Applied = {}
    for (part, path), layer in found.items():
        name = path if _has_text_level(file, part) else path.removeprefix("text_model.")
        targets = values.get(f"{part}.target_modules")
        meant = not isinstance(targets, list) or any(_ends(name, str(target)) for target in targets)
        if is_text_encoder(part) and not meant:
            continue
        if _header_number(values, part, name, "r", "rank_pattern") != layer.rank:
            raise LoadError(
                f"it fails at {part}.{path}, whose rank {layer.rank} is not the one in the header"
            )
        alpha = _header_number(values, part, name, "lora_alpha", "alpha_pattern")
        root = layer.rank**0.5 if values.get(f"{part}.use_rslora") is True else layer.rank
        layers[part, path] = replace(layer, scale=alpha / root)
    for part, keys in keys_of.items():
        if keys and not any(layer[0] == part for layer in layers):
            raise LoadError(f"it fails at {part}, of which it finds none of the header's target_modules")
    return layers


def _ends(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}")


def _header_number(values: Mapping[str, Any], part: str, name: str, key: str, patterns: str) -> float:
    """A layer's rank or alpha: of the first pattern that matches, else of its part, else PEFT's default 8."""
    number, own_numbers = values.get(f"{part}.{key}", 8), values.get(f"{part}.{patterns}") or {}
    if not isinstance(own_numbers, dict):
        raise LoadError(f"it fails at the header's {part}.{patterns}, which is not a table")
    for pattern, own in own_numbers.items():
        plain = pattern.removesuffix("$").replace("\\.", ".")
        if name == plain[1:] if plain.startswith("^") else _ends(name, plain):
            number = own
            break
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise LoadError(f"it fails at the header's {part}.{key}, which is not a number")
    return float(number)


_TEXT_STARTS = ("lora_te_", "lora_te1_", "lora_te2_")
_STARTS = {"unet": ("lora_unet_",), "text_encoder": _TEXT_STARTS[:2], "text_encoder_2": _TEXT_STARTS[2:]}


def _kohya_text_names(file: AdapterFile, projection: bool = False) -> list[tuple[str, ...]]:
    """Rows for `names`: `lora_te_` of the only text encoder, `lora_te1_` and `lora_te2_` of two."""
    if len(file.family.text_encoders) == 1:
        return [("text_encoder", "lora_te_{flat}", IN_ENCODER)]
    second = ("text_encoder_2", "lora_te2_{flat}", ".*" if projection else IN_ENCODER)
    return [("text_encoder", "lora_te1_{flat}", IN_ENCODER), second]


def _by_prefix(keys: Sequence[str]) -> dict[str, set[str]]:
    """The keys' part before the first dot, to the parts after it."""
    prefixes: dict[str, set[str]] = {}
    for key in keys:
        prefix, _, suffix = key.partition(".")
        prefixes.setdefault(prefix, set()).add(f".{suffix}")
    return prefixes


def _unused_biases(layers: Mapping[LayerKey, AppliedLayer]) -> tuple[str, ...]:
    """The changes of biases beside a LoRA, which some tools read and pass over."""
    low = [layer for layer in layers.values() if layer.kind in ("LoRA", "DoRA")]
    return tuple(key for layer in low for key in layer.keys if key.endswith(".diff_b"))


LOADERS: dict[str, Callable[[AdapterFile], Loaded]] = {
    "A1111": a1111,
    "Forge": forge,
    "ComfyUI": comfyui,
    "InvokeAI": invokeai,
    "kohya": kohya,
    "diffusers": diffusers,
}
