"""Adapter files of true layout, good ones and odd ones, built by the rules of the formats."""

import json
import re

import torch

from lora_core.formats.io import serialize
from lora_core.formats.layers import prefix_of_layer
from lora_core.model_files.families import FAMILIES
from lora_core.model_files.ldm_names import ldm_unet_path

ATTENTION = re.compile(r".*\.(?:attn[12]\.to_(?:q|k|v|out\.0)|self_attn\.(?:q|k|v|out)_proj)")
DEFAULT = re.compile(r".*\.attentions\..*|text_model\..*")
LOCON = re.compile(r"(?:down_blocks|mid_block|up_blocks|text_model)\..*")
TEXT = re.compile(r"text_model\..*")


def serialised(tensors, metadata):
    """A safetensors file in memory."""
    return b"".join(serialize(tensors, metadata))


def prefixes(family):
    return {"unet": "lora_unet"} | {e.part: e.kohya_prefix for e in family.text_encoders}


def own_stem(part, path, family):
    return prefix_of_layer(part, path, family)


def diffusers_stem(part, path, family):
    return f"{prefixes(family)[part]}_{path.replace('.', '_')}"


def ldm_stem(part, path, family):
    name = ldm_unet_path(path, family.attention_levels) if part == "unet" else path
    return f"{prefixes(family)[part]}_{name.replace('.', '_')}"


def bare_stem(part, path, family):
    return own_stem(part, path, family).replace("_text_model_", "_")


def factors(shape, rank=1, dtype=torch.float16):
    out, inside, *kernel = shape
    return torch.ones(rank, inside, *kernel, dtype=dtype), torch.ones(
        out, rank, *(1 for _ in kernel), dtype=dtype
    )


def kohya_file(
    family,
    layout,
    which=DEFAULT,
    *,
    stem=own_stem,
    alpha=lambda i: 2.0,
    rank=lambda i: 1,
    halves=("lora_down", "lora_up"),
    alpha_form=lambda a: torch.tensor(a),
):
    chosen = which if callable(which) else lambda part, path: which.fullmatch(path)
    tensors = {}
    layers = [layer for layer in layout if chosen(*layer)]
    for number, layer in enumerate(layers):
        name = stem(*layer, family)
        down, up = factors(layout[layer], rank(number))
        tensors |= {f"{name}.{halves[0]}.weight": down, f"{name}.{halves[1]}.weight": up}
        if alpha(number) is not None:
            tensors[f"{name}.alpha"] = alpha_form(alpha(number))
    return tensors


def dotted_file(family, layout, which=DEFAULT, *, name=lambda part, path: f"{part}.{path}", halves="AB"):
    leaves = [f".lora_{half}.weight" for half in halves] if halves == "AB" else halves
    tensors = {}
    for layer in layout:
        if which(*layer) if callable(which) else which.fullmatch(layer[1]):
            down, up = factors(layout[layer])
            tensors |= {f"{name(*layer)}{leaves[0]}": down, f"{name(*layer)}{leaves[1]}": up}
    return tensors


def old_name(part, path):
    parent, _, leaf = path.removesuffix(".0").rpartition(".")
    if part == "unet":
        return f"unet.{parent}.processor.{leaf}"
    return f"{part}.{parent}.to_{leaf.removesuffix('_proj')}"


def swapped_dimensions(tensors):
    """proj_in as a linear layer where it is a convolution, and the other way round."""
    return {
        key: (t.flatten(1) if t.ndim == 4 else t[..., None, None]) if "proj_in" in key and t.ndim else t
        for key, t in tensors.items()
    }


UNKNOWN = {
    "lora_unet_down_blocks_7_attentions_0_proj_in.lora_down.weight": torch.ones(1, 8),
    "lora_unet_down_blocks_7_attentions_0_proj_in.lora_up.weight": torch.ones(8, 1),
}


def peft_header(family, **more):
    """What diffusers' own saver writes into a header."""
    unet = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
    text = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    values = {"unet.r": 1, "unet.lora_alpha": 2, "unet.target_modules": unet}
    for encoder in family.text_encoders:
        values |= {
            f"{encoder.part}.{k}": v for k, v in (("r", 1), ("lora_alpha", 3), ("target_modules", text))
        }
    return {"lora_adapter_metadata": json.dumps(values | more)}


def _text(part, path):
    return TEXT.fullmatch(path) is not None


CASES = {
    "default targets": lambda f, m: kohya_file(f, m),
    "attention only": lambda f, m: kohya_file(f, m, ATTENTION),
    "LoCon": lambda f, m: kohya_file(f, m, LOCON),
    "every layer": lambda f, m: kohya_file(f, m, re.compile(".*")),
    "mixed ranks, one alpha": lambda f, m: kohya_file(f, m, rank=lambda i: 1 + i % 3),
    "mixed alphas": lambda f, m: kohya_file(f, m, alpha=lambda i: (2.0, 4.0, 2.0, 0.5)[i % 4]),
    "alphas half and half": lambda f, m: kohya_file(f, m, alpha=lambda i: (2.0, 4.0)[i % 2]),
    "no alpha": lambda f, m: kohya_file(f, m, alpha=lambda i: None, rank=lambda i: 1 + i % 2),
    "alpha in some layers": lambda f, m: kohya_file(f, m, alpha=lambda i: None if i % 3 == 0 else 3.0),
    "alpha 0": lambda f, m: kohya_file(f, m, alpha=lambda i: 0.0),
    "alpha of one element, fp16": lambda f, m: kohya_file(
        f, m, alpha_form=lambda a: torch.tensor([a]).half()
    ),
    "UNet only": lambda f, m: kohya_file(f, m, lambda p, n: p == "unet" and ".attentions." in n),
    "UNet's self-attention only": lambda f, m: kohya_file(f, m, lambda p, n: ".attn1." in n),
    "text encoders only": lambda f, m: kohya_file(f, m, _text),
    "text encoders without out_proj": lambda f, m: kohya_file(
        f, m, lambda p, n: _text(p, n) and not n.endswith("out_proj")
    ),
    "q only": lambda f, m: kohya_file(f, m, re.compile(r".*(?:to_q|q_proj)")),
    "lora_A in kohya stems": lambda f, m: kohya_file(f, m, halves=("lora_A", "lora_B")),
    "no text_model level": lambda f, m: kohya_file(f, m, stem=bare_stem),
    "diffusers' block names": lambda f, m: kohya_file(f, m, stem=diffusers_stem),
    "diffusers' block names, LoCon": lambda f, m: kohya_file(f, m, LOCON, stem=diffusers_stem),
    "original block names": lambda f, m: kohya_file(f, m, stem=ldm_stem),
    "2-D and 4-D exchanged": lambda f, m: swapped_dimensions(kohya_file(f, m)),
    "one unknown UNet layer": lambda f, m: kohya_file(f, m) | UNKNOWN,
    "a stray key": lambda f, m: kohya_file(f, m) | {"note.x": torch.ones(2)},
    "PEFT": lambda f, m: dotted_file(f, m),
    "PEFT without text_model": lambda f, m: dotted_file(
        f, m, name=lambda p, n: f"{p}.{n.removeprefix('text_model.')}"
    ),
    "PEFT's own prefix": lambda f, m: dotted_file(
        f, m, lambda p, n: p == "unet" and ATTENTION.fullmatch(n), name=lambda p, n: f"base_model.model.{n}"
    ),
    "old diffusers": lambda f, m: dotted_file(
        f, m, ATTENTION, name=old_name, halves=("_lora.down.weight", "_lora.up.weight")
    ),
    "lora.down in the UNet": lambda f, m: dotted_file(
        f,
        m,
        lambda p, n: p == "unet" and ATTENTION.fullmatch(n),
        halves=(".lora.down.weight", ".lora.up.weight"),
    ),
}
"""Name to what makes the tensors for (family, layout)."""

HEADERS = {
    "PEFT with a header": lambda f: peft_header(f),
    "PEFT with rsLoRA and patterns": lambda f: peft_header(
        f, **{"unet.use_rslora": True, "unet.alpha_pattern": {"to_q": 5}}
    ),
    "PEFT, header names layers with text_model": lambda f: peft_header(
        f, **{"text_encoder.target_modules": ["text_model.encoder.layers.0.mlp.fc1"]}
    ),
}
"""Name to the header of a file with the tensors of "PEFT"."""


def odd_file(name, family, layout):
    """(tensors, metadata) of a case."""
    if name in HEADERS:
        return CASES["PEFT"](family, layout), HEADERS[name](family)
    return CASES[name](family, layout), {}


ALL = [*CASES, *HEADERS]
FAMILIES_HERE = {name: FAMILIES[name] for name in ("sd15", "sd2", "sdxl")}
