"""The rules by which a tool refuses a whole file, or loses part of it, for reasons beyond single layers.

Each raises `Refused` with the reason in words; which of them hold for a tool stands in `tools.py`.
"""

import re
from collections.abc import Mapping, Sequence

from lora_core.formats.compat.dialects import Leaves
from lora_core.formats.compat.reading import ORIGINAL, Case, Group, Refused, Taken
from lora_core.formats.compat.tools import OTHER_LEAVES, SAME_BASE
from lora_core.lora.weights import LayerKey
from lora_core.model_files.families import FAMILIES

_KOHYA_OUT = re.compile(r"^lora_te.*_out_proj\.")
_PEFT_ATTENTION = re.compile(r"\.(?:q|k|v|out)_proj\.lora_[AB]")
_DIFFUSERS_BLOCK = re.compile("down_blocks|up_blocks")
_CONTEXT = re.compile(r"lora_unet_.*_attn2_to_[kv]\.")
_DEEP = re.compile(
    r"lora_unet_(?:(?:down|up)_blocks_\d+_attentions_\d+|mid_block_attentions_\d+"
    r"|(?:in|out)put_blocks_\d+_\d+|middle_block_\d+)_transformer_blocks_(?:[2-9]|\d\d+)_"
)


def check_keys(case: Case, groups: Mapping[str, Group]) -> None:
    """The rules about a file's keys as a whole.

    Raises:
        Refused: the tool loads nothing.
    """
    dialect = case.dialect
    foreign = next((key for key in case.keys if dialect.must_hold not in key), None)
    if foreign:
        raise Refused(f"it refuses files with a key such as {foreign!r}, which lacks {dialect.must_hold!r}")
    taken = {key for group in groups.values() for key in group.keys.values()}
    left = [key for key in case.keys if key not in taken]
    if dialect.most_unmatched is not None and len(left) > dialect.most_unmatched:
        raise Refused(
            f"it drops the whole file, as it does with more than {dialect.most_unmatched} keys that it does"
            f" not know; here are {len(left)}, such as {left[0]!r}"
        )
    if dialect.told_by_shapes and case.family.portable:
        _check_family(case)
    if dialect.one_naming == "refuse" and case.originals:
        _check_naming(case)
    if dialect.one_naming == "first" and case.originals:
        _check_first(case)
    if dialect.strict == "layers":
        for group in groups.values():
            if group.kind(dialect) is None:
                raise Refused(
                    f"it fails at {next(iter(group.keys.values()))!r}, which has no pair that it knows"
                )
    elif dialect.strict:
        _check_stems(case)
    _check_kinds(case, groups)


def _check_kinds(case: Case, groups: Mapping[str, Group]) -> None:
    """What a tool fails at in kinds that it reads otherwise."""
    for group in groups.values():
        kind, key = group.kind(case.dialect), next(iter(group.keys.values()))
        if kind == "LoKr" and ".lokr_t2" in group.keys and case.dialect.tucker_lokr == "fails":
            raise Refused(f"it fails at {key!r}, a LoKr of Tucker form: {KRON}")
        if kind == "norm" and case.dialect.strict == "layers" and ".b_norm" not in group.keys:
            raise Refused(f"it fails at {key!r}, a norm layer without b_norm")
        if not case.dialect.told_by_shapes:
            continue
        if kind == "full difference" and ".diff_b" in group.keys and not _has_bias(group.layer):
            raise Refused(f"it fails at {group.keys['.diff_b']!r}, since that layer has no bias")
        if kind in ("LoHa", "LoKr") and ".dora_scale" in group.keys:
            raise Refused(
                f"it fails at {group.keys['.dora_scale']!r}, since it knows DoRA of a plain LoRA only"
            )


KRON = "it passes PyTorch's kron a tensor that is not contiguous (fails with 2.13; other versions may differ)"
"""Why Forge and ComfyUI cannot use a LoKr of Tucker form."""


def _has_bias(layer: LayerKey) -> bool:
    return re.search(r"\.attn[12]\.to_[qkv]$|^text_projection$", layer[1]) is None


def _check_naming(case: Case) -> None:
    starts = ("lora_unet_", "lora_te1_", "lora_te2_")
    stray = next((key for key in case.keys if not key.startswith(starts)), None)
    if stray:
        raise Refused(f"it fails at {stray!r}, which does not begin as {case.family.title} files do")
    if len({ORIGINAL.match(key) is None for key in case.keys_of("unet")}) > 1:
        raise Refused("it fails where some UNet keys have original block names and others do not")


def _check_first(case: Case) -> None:
    """kohya's translation of diffusers' block names fails if the first key is none that it knows."""
    stems = [key.partition(".")[0] for key in case.keys_of("unet")]
    known = {f"lora_unet_{path.replace('.', '_')}" for part, path in case.layout if part == "unet"}
    if any(_DIFFUSERS_BLOCK.search(stem) for stem in stems) and stems[0] not in known:
        raise Refused(f"it fails at {stems[0]!r}, for it cannot translate it to the original block names")


def _check_stems(case: Case) -> None:
    """Every stem must have a pair that the tool takes; with "keys", also nothing besides."""
    stems: dict[str, set[str]] = {}
    for key in case.keys:
        stem, _, leaf = key.partition(".")
        stems.setdefault(stem, set()).add(f".{leaf}")
    others = {f".{leaf}" for kind in case.dialect.others for leaf in OTHER_LEAVES[kind]}
    for stem, leaves in stems.items():
        pair = next((p for p in case.dialect.leaves if {p.down, p.up} <= leaves), None)
        extra = leaves - {pair.down, pair.up, pair.alpha} if pair else leaves
        if (pair is None and not leaves & others) or (case.dialect.strict == "keys" and extra):
            raise Refused(f"it refuses files with a key such as {stem + min(extra)!r}")


def _check_family(case: Case) -> None:
    """As InvokeAI tells a file's family: by the first width that its keys give away, in the file's order."""
    width = told_width(case.facts.shapes)
    if width is None and any(_DEEP.match(key) for key in case.keys):
        width = next(f.context_width for f in FAMILIES.values() if f.kohya_block_names == "ldm")
    if width is None:
        raise Refused(
            "it cannot tell which base the file is for, since no key of the UNet's cross-attention says it;"
            " adapt attn2.to_k too"
        )
    if case.wide and SAME_BASE.get(width, width) != case.family.context_width:
        raise Refused(f"it takes the file, by a width of {width}, for another base than {case.family.title}")


def told_width(shapes: Mapping[str, Sequence[int]]) -> int | None:
    """The text width that InvokeAI reads off a file, or None.

    Its rule forgets the width of a text encoder at each alpha and up half, so that the two widths of a family
    with two text encoders meet only by luck.
    """
    first = second = None
    for key, shape in shapes.items():
        width = _width(key, shape, shapes)
        if _CONTEXT.match(key) or (key.startswith("lora_unet_") and "time_emb_proj.lora_down" in key):
            told = width
        elif key.startswith("lora_te") and "_self_attn_" in key:
            told = width if key.startswith("lora_te_") else None
            first = width if key.startswith("lora_te1_") else first
            second = width if key.startswith("lora_te2_") else second
        else:
            continue
        told = first + second if first is not None and second is not None else told
        if told is not None:
            return told
    return None


def _width(key: str, shape: Sequence[int], shapes: Mapping[str, Sequence[int]]) -> int | None:
    """How wide InvokeAI takes the input of a key's layer to be; of a LoKr it knows that of whole factors
    only."""
    stem, _, leaf = key.partition(".")
    if leaf.startswith("lokr_"):
        both = [shapes.get(f"{stem}.lokr_w{n}", ()) for n in "12"]
        return both[0][1] * both[1][1] if all(len(factor) > 1 for factor in both) else None
    inside = leaf in ("lora_down.weight", "hada_w1_b", "hada_w2_b", "diff") and len(shape) > 1
    return shape[1] if inside else None


def check_components(case: Case, taken: Taken) -> None:
    """Each component that the file has keys for must have a layer that is found, where the tool asks for it.

    Raises:
        Refused: one has none.
    """
    if not case.dialect.needs_match:
        return
    for part in case.family.parts:
        keys = case.keys_of(part)
        if keys and not any(layer[0] == part for layer in taken):
            raise Refused(f"it fails, for it knows no layer of {part} by a name such as {keys[0]!r}")


def drop_misspelled(case: Case, taken: Taken) -> None:
    """diffusers guesses how a text encoder's keys are spelled from some of them.

    Where it guesses wrong, it loses q, k and v.

    Raises:
        Refused: it cannot guess.
    """
    for part in case.family.parts[1:] if case.dialect.spelled else ():
        keys = case.keys_of(part)
        out = any("to_out_lora" in key or _KOHYA_OUT.search(key) for key in keys)
        peft = any(".lora_A.weight" in key for key in keys)
        linear = any("lora_linear_layer" in key or "_mlp_" in key for key in keys)
        peft_attention = any(_PEFT_ATTENTION.search(key) for key in keys)
        if keys and (not (out or peft or linear) or (peft and not (out or linear or peft_attention))):
            needed = "out_proj, fc1 or fc2" if not peft else "a layer of its attention"
            raise Refused(f"it fails at {part}, for which it needs {needed} among the adapted layers")
        for layer, (_, kind) in list(taken.items()):
            spelling = kind.spelling if isinstance(kind, Leaves) else ""
            old = spelling == "old" or (spelling == "kohya" and ".self_attn." in layer[1])
            if layer[0] == part and ((old and not out) or spelling == "unet"):
                del taken[layer]


def drop_partial_attention(case: Case, taken: Taken) -> None:
    """A1111 changes an OpenCLIP encoder's attention only if q, k, v and out are all there."""
    if not case.dialect.whole_attention:
        return
    open_clip = {encoder.part for encoder in case.family.text_encoders if encoder.open_clip}
    for part, path in list(taken):
        attention = path.rpartition(".")[0]
        if part in open_clip and attention.endswith(".self_attn"):
            whole = [(part, f"{attention}.{name}_proj") for name in ("q", "k", "v", "out")]
            if not all(layer in taken for layer in whole):
                for layer in whole:
                    taken.pop(layer, None)
