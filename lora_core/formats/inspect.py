"""Describes an adapter file of any tool by its header, alphas and hashes, without a base."""

import math
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lora_core.errors import AdapterFileError
from lora_core.formats import detect, kohya, peft
from lora_core.formats.io import file_hashes, read_tensors
from lora_core.formats.layers import Tensors, check_lycoris_factors, is_finite, layer_from_tensors, read_alpha
from lora_core.formats.peft import add_peft_config
from lora_core.model_files.header import Header, read_header


def inspect_file(path: Path) -> dict[str, Any]:
    """Describe an adapter file of any kind, LoHa, LoKr and DoRA included.

    Returns:
        `family`: a row of `FAMILIES`, else a title, else "unknown"; `format`: "kohya", "diffusers" or
        "unknown"; `kind`: "LoRA", "LoCon", "LoHa", ...; `ranks` and `alphas`: the distinct values, ascending;
        `modules`: how many are adapted; `parameters`: how many, without alphas; `bytes`;
        `sha256`, `autov2`, `autov3`; `hash_matches`: whether the header's own hash is right, None if it has
        none; `problem`: a sentence on values that are not finite, factors that do not fit or a file without
        tensors, "" if there is none; `extras`: a sentence on what of the file is not used here, or "";
        `metadata`: the header's texts.

    Raises:
        AdapterFileError: one sentence on what is wrong with the file.
    """
    path = Path(path)
    header = read_header(path)
    shapes = header.shapes
    modules = detect.keys_by_module(shapes)
    ranks = sorted({rank for keys in modules.values() if (rank := _rank(keys, shapes))})
    weights = [shape for key, shape in shapes.items() if not key.endswith(".alpha")]
    return {
        "family": detect.detect_family_name(shapes, header.metadata),
        "format": file_format(shapes),
        "kind": detect.detect_kind(shapes),
        "ranks": ranks,
        "alphas": _alphas(path, header, ranks),
        "modules": len(modules),
        "parameters": sum(math.prod(shape) for shape in weights),
        "bytes": path.stat().st_size,
        **file_hashes(path),
        "problem": _problem(path, shapes),
        "extras": detect.extras_sentence(shapes),
        "metadata": header.metadata,
    }


def file_format(shapes: detect.Shapes) -> str:
    """The format of a file by its tensors' names: "kohya", "diffusers" or "unknown"."""
    if kohya.matches(shapes):
        return "kohya"
    return "diffusers" if peft.matches(shapes) else "unknown"


_ROLE = re.compile(
    r"[._](?:lora_(?P<kohya>down|up|mid)|lora_(?P<peft>[AB])(?:\.default)?"
    r"|lora(?:_linear_layer)?\.(?P<old>down|up))\.weight$"
)


def _problem(path: Path, shapes: detect.Shapes) -> str:
    """What is wrong with the tensors of a file whose header is fine, whatever its layers are called."""
    if not shapes:
        return f"{path} holds no tensors; it is no adapter."
    if detect.detect_kind(shapes) not in detect.ADAPTERS:
        return ""
    tensors, _ = read_tensors(path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            return f"{path} is broken: {name!r} holds numbers that are not finite (NaN or infinity)."
    extras = detect.extra_keys(tensors)
    modules = detect.keys_by_module(key for key in tensors if key not in extras)
    for module, keys in modules.items():
        try:
            _check_module(module, {key: tensors[key] for key in keys})
        except AdapterFileError as error:
            return f"{path} is broken. {error}"
    return ""


def _check_module(module: str, tensors: Tensors) -> None:
    """Refuse factors that do not fit together.

    Raises:
        AdapterFileError: what is wrong with the module.
    """
    products = {match[1]: tensors[key] for key in tensors if (match := _PRODUCT.search(key))}
    if products:
        check_lycoris_factors(module, products)
    roles = {role: tensors[key] for key in tensors if (role := _role(key))}
    if roles.keys() - {"alpha"}:
        layer_from_tensors(module, roles)
    elif len(tensors) == 1 and roles:
        raise AdapterFileError(f"{module!r} has an alpha, but no weights.")


def _role(key: str) -> str:
    match = _ROLE.search(key)
    if match is None:
        return "alpha" if key.endswith(".alpha") else ""
    return match["kohya"] or match["old"] or {"A": "down", "B": "up"}[match["peft"]]


_PRODUCT = re.compile(r"\.((?:hada|lokr)_\w+)$")
_RANK_AXES = {
    "lora_down": 0,
    "lora_A": 0,
    "lora.down": 0,
    "lora_linear_layer.down": 0,
    "hada_w1_b": 0,
    "lokr_w2_b": 0,
}
"""A part of a tensor's name, to the axis of its shape that is the rank."""


def _rank(keys: list[str], shapes: detect.Shapes) -> int:
    for key in keys:
        for part, axis in _RANK_AXES.items():
            if part in key and key.endswith(("weight", part)) and len(shapes[key]) > 1:
                return shapes[key][axis]
    return 0


def _alphas(path: Path, header: Header, ranks: list[int]) -> list[float]:
    """The distinct alphas: among the tensors, else in a diffusers header, else equal to the ranks."""
    names = [
        name for name, shape in header.shapes.items() if name.endswith(".alpha") and math.prod(shape) == 1
    ]
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            stored = [read_alpha(file.get_tensor(name)) for name in names]
    except (SafetensorError, OSError, RuntimeError) as error:
        raise AdapterFileError(f"{path} cannot be read: {error}.") from error
    texts = add_peft_config(path, header.tensors, header.metadata)
    claimed = stored or detect.header_alphas(texts, peft.HEADER_KEY)
    return sorted({alpha for alpha in claimed if math.isfinite(alpha)}) or [float(rank) for rank in ranks]
