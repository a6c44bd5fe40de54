"""Adapter files as other tools write them, small but on the true layers of SD 1.5 (and one of SDXL).

Twelve layers of a transformer of the UNet and the six of a layer of its text encoder, so that the numbers of
keys are those of the table in `test_foreign_files.py`.
"""

import json

import torch

from lora_core.formats.layers import norm_layers
from lora_core.model_files.detect import family_layout
from lora_core.model_files.families import FAMILIES
from lora_core.model_files.ldm_names import ldm_unet_path
from tests.formats.odd_files import diffusers_stem, ldm_stem, own_stem, swapped_dimensions

SD15, SDXL = FAMILIES["sd15"], FAMILIES["sdxl"]
RANK = 4
_BLOCK, _CLIP = "down_blocks.0.attentions.0.", "text_model.encoder.layers.0."
_SECOND = "down_blocks.1."
PLAIN = [layer for layer in family_layout(SD15) if layer[1].startswith((_BLOCK, _CLIP))]
CONVOLUTIONS = [
    ("unet", f"{_SECOND}resnets.0.conv1"),
    ("unet", f"{_SECOND}resnets.0.conv2"),
    ("unet", "down_blocks.0.downsamplers.0.conv"),
    ("unet", f"{_SECOND}resnets.0.conv_shortcut"),
    ("unet", f"{_SECOND}resnets.0.time_emb_proj"),
]
NORM = ("unet", f"{_SECOND}resnets.0.norm1")
assert NORM in norm_layers(family_layout(SD15))


def draw(*shape):
    return torch.randn(*shape, generator=_DRAWS) / 8


_DRAWS = torch.Generator().manual_seed(1)


def pair(shape, rank=RANK):
    """(down, up) of a LoRA."""
    out, inside, *kernel = shape
    return draw(rank, inside, *kernel), draw(out, rank, *(1 for _ in kernel))


def kohya(
    layers=PLAIN,
    stem=own_stem,
    alpha=lambda number: 2.0,
    family=SD15,
    form=lambda a: torch.tensor(a),
    leaves=("lora_down.weight", "lora_up.weight"),
):
    tensors, layout = {}, family_layout(family)
    for number, layer in enumerate(layers):
        name = stem(*layer, family)
        down, up = pair(layout[layer])
        tensors |= {f"{name}.{leaves[0]}": down, f"{name}.{leaves[1]}": up}
        if alpha(number) is not None:
            tensors[f"{name}.alpha"] = form(alpha(number))
    return tensors


def dotted(leaves, layers=PLAIN, alpha=False, name=lambda part, path: f"{part}.{path}"):
    tensors = {}
    for layer in layers:
        down, up = pair(family_layout(SD15)[layer])
        tensors |= {f"{name(*layer)}{leaves[0]}": down, f"{name(*layer)}{leaves[1]}": up}
        if alpha:
            tensors[f"{name(*layer)}.alpha"] = torch.tensor(2.0)
    return tensors


PEFT = (".lora_A.weight", ".lora_B.weight")


def processors():
    """diffusers' attention processors of 2023: the eight attention layers."""
    tensors = {}
    for part, path in PLAIN:
        if ".attn" in path:
            down, up = pair(family_layout(SD15)[part, path])
            parent, _, leaf = path.removesuffix(".0").rpartition(".")
            name = f"unet.{parent}.processor.{leaf}_lora"
            tensors |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
    return tensors


def lycoris(make, layers=None, alpha=True):
    """A file of kohya's stems with what `make(shape)` gives for each layer."""
    tensors = {}
    for layer in layers or [*PLAIN, *CONVOLUTIONS]:
        name = own_stem(*layer, SD15)
        tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in make(family_layout(SD15)[layer]).items()}
        if alpha:
            tensors[f"{name}.alpha"] = torch.tensor(2.0)
    return tensors


def large(shape):
    """Whether LyCORIS has a Tucker form for a layer of this shape."""
    return len(shape) == 4 and shape[2] > 1


def flat(shape):
    out, inside, *kernel = shape
    return out, inside * (kernel[0] ** 2 if kernel else 1)


def tucker(shape):
    if not large(shape):
        down, up = pair(shape)
        return {"lora_down.weight": down, "lora_up.weight": up}
    return {
        "lora_down.weight": draw(RANK, shape[1], 1, 1),
        "lora_up.weight": draw(shape[0], RANK, 1, 1),
        "lora_mid.weight": draw(RANK, RANK, *shape[2:]),
    }


def loha(shape, core=False):
    out, inside = flat(shape)
    if core and large(shape):
        halves = {
            f"hada_w{n}_{h}": draw(RANK, size) for n in "12" for h, size in (("a", out), ("b", shape[1]))
        }
        return halves | {f"hada_t{n}": draw(RANK, RANK, *shape[2:]) for n in "12"}
    return {f"hada_w{n}_{h}": draw(*s) for n in "12" for h, s in (("a", (out, RANK)), ("b", (RANK, inside)))}


def lokr(shape, first="whole", second="low"):
    """(4 x 4) times the rest; each factor "whole" or "low", the second also "tucker"."""
    out, inside, *kernel = shape
    rest = (out // 4, inside // 4)
    if first == "whole":
        found = {"lokr_w1": draw(4, 4)}
    else:
        found = {"lokr_w1_a": draw(4, RANK), "lokr_w1_b": draw(RANK, 4)}
    if second == "whole":
        return found | {"lokr_w2": draw(*rest, *kernel)}
    if second == "tucker" and large(shape):
        core = {"lokr_t2": draw(RANK, RANK, *kernel)}
        return found | core | {"lokr_w2_a": draw(RANK, rest[0]), "lokr_w2_b": draw(RANK, rest[1])}
    wide = rest[1] * (kernel[0] ** 2 if kernel else 1)
    return found | {"lokr_w2_a": draw(rest[0], RANK), "lokr_w2_b": draw(RANK, wide)}


def oft(shape):
    return {"oft_blocks": draw(shape[0] // 8, 8, 8)}


def dora(axis):
    def make(shape):
        down, up = pair(shape)
        ones = [1] * len(shape)
        ones[axis] = shape[axis]
        return {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": 1 + draw(*ones).abs()}

    return make


def full(shape):
    return {"diff": draw(*shape), "diff_b": draw(shape[0])}


def norms():
    stem, width = own_stem(*CONVOLUTIONS[0], SD15).replace("conv1", "norm1"), 320
    return {f"{stem}.w_norm": draw(width), f"{stem}.b_norm": draw(width)}


def te1_stem(part, path, family):
    return own_stem(part, path, family).replace("lora_te_", "lora_te1_")


def peft_header(**more):
    values = {}
    for part, targets in (
        ("unet", ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]),
        ("text_encoder", ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]),
    ):
        own = {"r": RANK, "lora_alpha": 2, "target_modules": targets} | more
        values |= {f"{part}.{key}": value for key, value in own.items()}
    return {"lora_adapter_metadata": json.dumps(values)}


def cast(dtype):
    return {key: t.to(dtype) if t.ndim > 1 else t for key, t in kohya().items()}


def comfy_names():
    layers = [
        ("unet", f"down_blocks.1.attentions.0.transformer_blocks.{n}.{attention}.{leaf}")
        for n in range(2)
        for attention in ("attn1", "attn2")
        for leaf in ("to_q", "to_k", "to_v", "to_out.0")
    ] + [("unet", "down_blocks.1.attentions.0.proj_in"), ("unet", "down_blocks.1.attentions.0.proj_out")]
    return kohya(layers, comfy_name, family=SDXL, leaves=PEFT_LEAVES)


PEFT_LEAVES = ("lora_A.weight", "lora_B.weight")


def comfy_name(part, path, family):
    if part != "unet":
        clip = "g" if part == "text_encoder_2" else "l"
        return f"text_encoders.clip_{clip}.transformer.{path}"
    return f"diffusion_model.{ldm_unet_path(path, family.attention_levels)}"


FILES = {
    "aitoolkit_peft_stems": lambda: kohya(alpha=lambda n: None, leaves=PEFT_LEAVES),
    "diffusers_attnprocs": processors,
    "kohya_alpha1d": lambda: kohya(form=lambda a: torch.tensor([a])),
    "kohya_alphaint": lambda: kohya(form=lambda a: torch.tensor(int(a))),
    "kohya_bf16": lambda: cast(torch.bfloat16),
    "kohya_fp16": lambda: cast(torch.float16),
    "kohya_fp8": lambda: cast(torch.float8_e4m3fn),
    "kohya_ldm_names": lambda: kohya(stem=ldm_stem),
    "kohya_lora_diff_b": lambda: kohya() | {f"{own_stem(*PLAIN[3], SD15)}.diff_b": draw(320)},
    "kohya_mixedalpha": lambda: kohya(alpha=lambda n: (1.0, 8.0, 1.0)[n % 3]),
    "kohya_noalpha": lambda: kohya(alpha=lambda n: None),
    "kohya_plain": kohya,
    "kohya_proj2d": lambda: swapped_dimensions(kohya()),
    "lycoris_dora_in": lambda: lycoris(dora(1), [*PLAIN, *CONVOLUTIONS[:2]]),
    "lycoris_dora_out": lambda: lycoris(dora(0), [*PLAIN, *CONVOLUTIONS[:2]]),
    "lycoris_full": lambda: lycoris(full, [*PLAIN, *CONVOLUTIONS[:2]], alpha=False),
    "lycoris_locon": lambda: kohya([*PLAIN, *CONVOLUTIONS]),
    "lycoris_loha": lambda: lycoris(loha),
    "lycoris_loha_tucker": lambda: lycoris(lambda shape: loha(shape, core=True)),
    "lycoris_lokr": lambda: lycoris(lokr),
    "lycoris_lokr_both": lambda: lycoris(lambda shape: lokr(shape, "low")),
    "lycoris_lokr_full": lambda: lycoris(lambda shape: lokr(shape, second="whole")),
    "lycoris_lokr_tucker": lambda: lycoris(lambda shape: lokr(shape, second="tucker")),
    "lycoris_lora_norm": lambda: kohya() | norms(),
    "lycoris_oft": lambda: lycoris(lambda shape: oft(shape) | {"alpha": torch.tensor(0.0)}, alpha=False),
    "lycoris_oft_limited": lambda: lycoris(oft),
    "lycoris_tucker": lambda: lycoris(tucker),
    "onetrainer_bundle": lambda: kohya() | {"bundle_emb.cat.clip_l": draw(2, 768)},
    "onetrainer_te1": lambda: kohya(stem=te1_stem),
    "peft_lora_A": lambda: dotted(PEFT),
    "peft_lora_down": lambda: dotted((".lora_down.weight", ".lora_up.weight")),
    "peft_meta": lambda: dotted(PEFT),
    "peft_meta_rslora": lambda: dotted(PEFT),
    "simpletuner_alpha": lambda: dotted(PEFT, alpha=True),
    "sdxl_comfy_diffusion_model": comfy_names,
    "sdxl_kohya_diffusers_names": lambda: kohya(
        [layer for layer in family_layout(SDXL) if layer[1].startswith("down_blocks.1.attentions.0.")][:18],
        stem=diffusers_stem,
        family=SDXL,
    ),
}
"""Name to what makes the tensors."""

HEADERS = {"peft_meta": peft_header(), "peft_meta_rslora": peft_header(use_rslora=True)}
