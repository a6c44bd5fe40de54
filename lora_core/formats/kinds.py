"""The kind of an adapter file and the family that it is for, from names, shapes and header alone; and the
tensors of the kinds beside LoRA."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lora_core.errors import AdapterFileError
from lora_core.formats.layers import (
    Tensors,
    is_finite,
    is_kohya_key,
    kernel_of,
    ldm_family,
    read_alpha,
    split_key,
)
from lora_core.lora.lycoris import LycorisUpdate
from lora_core.lora.weights import LayerKey
from lora_core.model_files.families import FAMILIES, Family
from lora_core.model_files.header import first_match, kind_tables, not_an_adapter, other_family

Shapes = Mapping[str, Sequence[int]]

LORA, LOCON, DORA = "LoRA", "LoCon", "DoRA"
_FACTOR = re.compile(
    r"[._]lora_(?:down|up|A|B)\.|[._]lora\.(?:down|up)\.|\.lora_linear_layer\.|\.(?:hada_w|lokr_w|oft_)"
)
_DOWN = r"[._](?:lora[_.](?:down|A|linear_layer\.down)|hada_w1_b)"
_CONTEXT = re.compile(r"attn2[._](?:processor\.)?to_[kv]" + _DOWN)
_TEXT = re.compile(
    r"^(?:base_model\.model\.)?(?:lora_te1?_|text_encoder\.|text_model\.).*"
    r"(?:(?:[qkv]|out)_proj|self_attn\.to_(?:[qkv]|out)|mlp[._]fc1)" + _DOWN
)
_TEXT_2 = re.compile(r"^(?:lora_te2_|text_encoder_2\.)")
_LDM = re.compile(r"^(?:lora_unet_|unet\.|diffusion_model\.)?(?:input_blocks|middle_block|output_blocks)[._]")
_DEEP = re.compile(r"[._]transformer_blocks[._][2-9][._]")
_PREDICTIONS = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}

_LARGEST = 2**25
"""Elements of a weight. The largest of Stable Diffusion XL has 29.5 million; a broken file can claim more."""

ADAPTERS = (LORA, LOCON, DORA, "LoHa", "LoKr", "OFT", "full difference")
"""The kinds that `compat/` knows how tools read."""


def describe_kind(kind: str, shapes: Shapes) -> str:
    """How to name a file of a kind in a sentence, after "it is"."""
    return not_an_adapter(shapes) if kind == "unknown" else f"of the kind {kind!r}"


def detect_kind(shapes: Shapes) -> str:
    """The kind of a file, such as "LoRA" or "whole checkpoint", else "unknown".

    A LoRA that adapts convolutions larger than 1 x 1 is a LoCon.
    """
    if kind := first_match("adapters", shapes):
        convolutions = any(len(shape) == 4 and shape[2] > 1 for shape in shapes.values())
        return LOCON if kind == LORA and convolutions else kind
    only = next(iter(shapes.values()), ())
    if (
        len(shapes) == 1
        and len(only) == 2
        and only[1] in {e.width for f in FAMILIES.values() for e in f.text_encoders}
    ):
        return "textual-inversion embedding"
    return "unknown"


def extra_keys(keys: Iterable[str]) -> dict[str, str]:
    """The tensors that do not fit into a plain LoRA, each with its kind.

    The alpha of a module that has only such tensors is one of them.
    """
    found: dict[str, str] = {}
    for pattern, what in kind_tables()["extras"]:
        found |= dict.fromkeys(filter(re.compile(pattern).search, keys), what)
    extras = {key: found[key] for key in keys if key in found}
    for names in (keys_by_module(keys) if extras else {}).values():
        own = [extras[name] for name in names if name in extras]
        if own and all(name in extras or name.endswith(".alpha") for name in names):
            extras |= dict.fromkeys(names, own[0])
    return extras


TOKEN_KEY = re.compile(r"bundle_emb\.([^.]+)\.(?!clip_[lg]_out$)(.+)")
"""A new token's vectors in a LoRA file. Source: `load_networks` of A1111, which takes `clip_l` with `clip_g`
for SDXL and else one tensor of any name, such as `string_to_param.*`; OneTrainer writes these two.
Its `clip_l_out` is added behind the text encoder, which no other tool knows."""
TOKEN_PARTS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


def bundled_tokens(tensors: Tensors) -> dict[str, dict[str, torch.Tensor]]:
    """The vectors (n, width) of the new tokens in a file, by part and token, in fp32.

    Raises:
        AdapterFileError: a tensor holds no vectors.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if match := TOKEN_KEY.fullmatch(key):
            if tensor.dim() not in (1, 2) or not tensor.numel():
                raise AdapterFileError(
                    f"{key!r} of the shape {list(tensor.shape)} holds no vectors of a token."
                )
            part = "text_encoder_2" if match[2] == TOKEN_PARTS["text_encoder_2"] else "text_encoder"
            found.setdefault(part, {})[match[1]] = tensor.float().reshape(-1, tensor.shape[-1])
    return found


def token_counts(shapes: Shapes) -> dict[str, int]:
    """How many vectors each new token of a file has."""
    named = ((TOKEN_KEY.fullmatch(key), shape) for key, shape in shapes.items())
    return {match[1]: shape[0] if len(shape) > 1 else 1 for match, shape in named if match}


def extras_sentence(shapes: Shapes, with_tokens: bool = False) -> str:
    """The tensors of an adapter file that are left out here, in a sentence; "" if none are. New tokens are
    not left out `with_tokens`."""
    extras = extra_keys([key for key in shapes if not (with_tokens and TOKEN_KEY.fullmatch(key))])
    if not extras or not any(_FACTOR.search(key) for key in shapes):
        return ""
    counts = Counter(extras.values())
    parts = [f"{what} ({number} {'tensor' if number == 1 else 'tensors'})" for what, number in counts.items()]
    return (
        f"Left out, since a plain LoRA cannot hold them: {', '.join(parts)}, such as {next(iter(extras))!r}."
    )


def family_evidence(
    shapes: Shapes, metadata: Mapping[str, str], rows: Sequence[Family] = tuple(FAMILIES.values())
) -> list[set[str]]:
    """Each sign of the family that a file is for, as the set of titles that it allows; the header's first."""
    other = other_family(shapes, metadata)
    if other:
        return [{other}]
    version = metadata.get("ss_base_model_version", "")
    old_v2 = not version and metadata.get("ss_v2") == "True"
    architecture = metadata.get("modelspec.architecture", "")
    evidence = [
        {f.title for f in rows if f.base_version == version},
        {f.title for f in rows if old_v2 and f.base_version.startswith("sd_v2")},
        {f.title for f in rows if f.modelspec == architecture},
    ]
    if width := _width(shapes, _CONTEXT):
        titles = {f.title for f in rows if f.context_width == width}
        evidence.append(titles or {f"a base whose text context is {width} channels wide"})
    if width := _width(shapes, _TEXT):
        firsts = [(f.title, e) for f in rows for e in f.text_encoders if e.part == "text_encoder"]
        titles = {title for title, encoder in firsts if encoder.width == width}
        evidence.append(titles or {f"a base whose text encoder is {width} channels wide"})
    if any(_TEXT_2.search(key) for key in shapes):
        evidence.append({f.title for f in rows if len(f.text_encoders) > 1})
    return [titles for titles in evidence if titles]


def _width(shapes: Shapes, pattern: re.Pattern[str]) -> int:
    """The second side of the first tensor with such a name; 0 for none."""
    return next((shape[1] for key, shape in shapes.items() if pattern.search(key) and len(shape) > 1), 0)


def mismatch(shapes: Shapes, metadata: Mapping[str, str], family: Family) -> str:
    """The title of the family that a file is for, if that is not `family`; else ""."""
    for titles in family_evidence(shapes, metadata, (*FAMILIES.values(), family)):
        if family.title not in titles:
            return " or ".join(sorted(titles))
    return ""


def detect_family_name(shapes: Shapes, metadata: Mapping[str, str]) -> str:
    """The name of the first row with the family's title, else the title itself, else "unknown"."""
    title = _title(shapes, metadata)
    return next((name for name, family in FAMILIES.items() if family.title == title), title)


def detect_family(shapes: Shapes, metadata: Mapping[str, str]) -> Family | None:
    """The row that a file is for, or None.

    If several rows share a title: by the header's version, architecture or prediction, else the first.
    """
    title = _title(shapes, metadata)
    rows = [family for family in FAMILIES.values() if family.title == title]
    prediction = _PREDICTIONS.get(metadata.get("modelspec.prediction_type", ""))
    return next(
        (
            family
            for key, value in (
                ("base_version", metadata.get("ss_base_model_version")),
                ("modelspec", metadata.get("modelspec.architecture")),
                ("prediction", prediction),
            )
            for family in rows
            if getattr(family, key) == value
        ),
        rows[0] if rows else None,
    )


def require_family(
    path: Path,
    shapes: Shapes,
    metadata: Mapping[str, str],
    lost: str,
    hint: str = "; name its base with --base",
) -> Family:
    """The row that a file is for.

    Args:
        lost: what cannot be done otherwise, for the error, which begins with the path.
        hint: what to do where nothing says the family.

    Raises:
        AdapterFileError: no row here is for it, or nothing says which.
    """
    family = detect_family(shapes, metadata)
    if family is None:
        name = detect_family_name(shapes, metadata)
        unknown = f"does not say which family of base it is for, so {lost}{hint}"
        raise AdapterFileError(f"{path} {unknown if name == 'unknown' else f'is for {name}, so {lost}'}.")
    return family


def _title(shapes: Shapes, metadata: Mapping[str, str]) -> str:
    evidence = family_evidence(shapes, metadata)
    common = set.intersection(*evidence) or evidence[-1] if evidence else set()
    if len(common) > 1:
        # Two families share their first text encoder, but not how kohya files call it.
        starts = {key.partition("_text_model")[0] for key in shapes if key.startswith("lora_te")}
        common &= {f.title for f in FAMILIES.values() if f.text_encoders[0].kohya_prefix in starts}
    if len(common) == 1:
        return common.pop()
    # Without widths or a header, names of blocks and depths of transformers tell.
    large = any(_LDM.search(key) or _DEEP.search(key) for key in shapes)
    return ldm_family().title if large else "unknown"


def keys_by_module(keys: Iterable[str]) -> dict[str, list[str]]:
    """Tensor names grouped by the module that they adapt, in any format."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        module = key.partition(".")[0] if key.startswith("lora_") else split_key(key)[0]
        groups.setdefault(module, []).append(key)
    return groups


def file_format(keys: Iterable[str]) -> str:
    """The format of a file by its tensors' names: a row of `FORMATS`, or "unknown"."""
    keys = list(keys)
    if any(map(is_kohya_key, keys)):
        return "kohya"
    pairs = (key for key in keys if split_key(key)[1] in ("down", "up", "mid"))
    return "diffusers" if any(not key.startswith("lora_") for key in pairs) else "unknown"


def check_lycoris_factors(name: str, roles: Tensors) -> None:
    """Refuse a LoHa or a LoKr that lacks a tensor, and blocks that are not those of an OFT.

    Args:
        name: of the layer, for errors.
        roles: its tensors by LyCORIS' names, such as "hada_w1_a" or "lokr_w2".

    Raises:
        AdapterFileError: a factor is missing, empty, of an integer dtype or of an impossible shape.
    """
    blocks = roles.get("oft_blocks")
    if blocks is not None and (blocks.dim() != 3 or blocks.shape[1] != blocks.shape[2]):
        raise AdapterFileError(
            f"{name!r} has oft_blocks of the shape {list(blocks.shape)}; those of an OFT are square matrices,"
            " and no other kind (such as BOFT) is known."
        )
    needed: set[str] = set()
    if any(role.startswith("hada") for role in roles):
        needed = {f"hada_w{n}_{half}" for n in "12" for half in "ab"}
        needed |= {"hada_t1", "hada_t2"} if roles.keys() & {"hada_t1", "hada_t2"} else set()
    elif blocks is None:
        for n in "12":
            needed |= {f"lokr_w{n}"} if f"lokr_w{n}" in roles else {f"lokr_w{n}_a", f"lokr_w{n}_b"}
    missing = sorted(needed - roles.keys())
    if missing:
        raise AdapterFileError(f"{name!r} lacks {', '.join(missing)}.")
    if any(not t.is_floating_point() or t.numel() == 0 for t in roles.values()):
        raise AdapterFileError(f"{name!r} holds tensors that are empty or of integers.")


def lycoris_update(
    name: str, layer: LayerKey, roles: Tensors, alpha: torch.Tensor | None, family: Family
) -> LycorisUpdate:
    """The update in the tensors of a LoHa, a LoKr or an OFT; arguments as of `check_lycoris_factors`.

    The alpha of an OFT limits the norm of its Q to alpha for each output, as in LyCORIS and kohya's trainer.

    Raises:
        AdapterFileError: one is missing, a value is impossible, or shapes do not fit together.
    """
    if alpha is None and "." in name and "oft_blocks" not in roles:
        raise AdapterFileError(
            f"{name!r} is a LoHa or a LoKr under PEFT's names, where the strength is in no file; convert it"
            " with PEFT first."
        )
    check_lycoris_factors(name, roles)
    update = LycorisUpdate(".".join(layer), None, roles, kernel=kernel_of(layer, family) or ())
    # Without a rank, as in a LoKr of two full matrices, alpha means nothing.
    scale = 1.0
    if alpha is not None and update.rank:
        if alpha.numel() != 1:
            raise AdapterFileError(
                f"{name!r} has an alpha of shape {list(alpha.shape)}; it must be one number."
            )
        scale = read_alpha(alpha) / update.rank
    update = replace(update, scale=scale)
    if not (math.isfinite(scale) and all(map(is_finite, roles.values()))):
        raise AdapterFileError(f"{name!r} holds numbers that are not finite (NaN or infinity).")
    if "oft_blocks" in roles:
        most = scale * update.rank * update.weight_shape[0] if alpha is not None else 0.0
        return replace(update, roles={"oft_blocks": limit_oft(roles["oft_blocks"], most)}, scale=1.0)
    try:
        size = update.weight_shape
    except RuntimeError as error:
        shapes = ", ".join(f"{role} {list(tensor.shape)}" for role, tensor in roles.items())
        raise AdapterFileError(f"{name!r} has shapes that do not fit together: {shapes}.") from error
    if len(size) not in (2, 4) or torch.Size(size).numel() > _LARGEST:
        raise AdapterFileError(
            f"{name!r} claims a weight of the shape {list(size)}, which no layer here has."
        )
    return update


def limit_oft(blocks: torch.Tensor, most: float) -> torch.Tensor:
    """The blocks of an OFT whose |Q| is at most `most`; as they are where that is 0 or less, or never
    reached. Source: constrained OFT, Qiu et al. 2023, section 3.3, for all blocks together as in LyCORIS."""
    norm = float((blocks.float() - blocks.float().mT).norm())
    return blocks.float() * (most / norm) if 0 < most < norm else blocks


def magnitude_from_tensor(name: str, stored: torch.Tensor) -> torch.Tensor:
    """A layer's DoRA magnitudes, (out, 1) where rows are normed, (1, in) where columns are.

    In kohya's files the shape tells which; PEFT always has one for each row.

    Raises:
        AdapterFileError: the shape is impossible, or a value is not finite.
    """
    if stored.numel() == 0 or stored.numel() != max(stored.shape, default=0):
        raise AdapterFileError(f"{name!r} has DoRA magnitudes of the impossible shape {list(stored.shape)}.")
    if not is_finite(stored):
        raise AdapterFileError(f"{name!r} holds numbers that are not finite (NaN or infinity).")
    columns = "." not in name and stored.dim() > 1 and stored.shape[0] == 1
    return stored.reshape(1, -1) if columns else stored.reshape(-1, 1)
