"""How large a base is and how large the exported file will be, from the shapes of the base's layers: headers
are read, no weights."""

import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_core.spec.base_facts import UNET, BaseFacts
from lora_core.spec.choices import TARGETS
from lora_core.spec.config import RunConfig
from lora_core.spec.errors import LoraError, ModelFileError
from lora_core.spec.families import FAMILIES, Family
from lora_core.spec.ldm_names import diffusers_unet_path
from lora_core.spec.paths import FAMILY_CONFIGS
from lora_core.spec.patterns import PatternError, last_matches
from lora_core.spec.tensor_file import read_header

BYTES_A_NUMBER = 2
HEADER_A_LAYER = 450
"""Bytes: what the file's header says of each layer, three tensors with long names."""
PREPACKED_COPIES = 2
"""How often a base's weights are laid out beside the plain ones where a processor trains."""
WINOGRAD_COPIES = 3
"""The same in fp32, where kernels are laid out larger; 2.83 for Stable Diffusion 1.5."""
PREPACKED_SPARE = 2 * 2**30
"""Bytes that have to stay free beside those."""

Layers = dict[tuple[str, str], tuple[int, int]]
"""(part, path as diffusers names it) to the numbers that one rank costs below and above: inputs x kernel,
outputs."""


def export_bytes(facts: BaseFacts, config: RunConfig) -> int | None:
    """About how large the exported fp16 file is. None where the base does not say."""
    family = facts.family
    if family is None:
        return None
    rates = (config.optim.lr, config.optim.text_encoder_lr, config.optim.text_encoder_2_lr)
    trained = [part for part, rate in zip(family.parts, rates, strict=False) if rate > 0]
    try:
        layers = _layers(facts.path, family.name, facts.path.stat().st_mtime_ns)
    except (OSError, LoraError, ValueError, KeyError):
        return None
    wanted = {part: _wanted(config.adapter.targets, part, family) for part in trained}
    adapted = {
        f"{part}.{path}": sum(sides)
        for (part, path), sides in layers.items()
        if part in wanted and all(pattern.fullmatch(path) for pattern in wanted[part])
    }
    try:
        ranks = last_matches(config.adapter.block_ranks, adapted)
    except PatternError:
        return None
    rank = config.adapter.rank
    numbers = sum(ranks.get(name, rank) * sides for name, sides in adapted.items())
    return numbers * BYTES_A_NUMBER + len(adapted) * HEADER_A_LAYER or None


def base_numbers(facts: BaseFacts) -> int | None:
    """How many numbers a base's weights are in all, averaged copies left out. None where it does not say.

    Raises:
        ModelFileError: a file of weights is broken.
    """
    if facts.family is None:
        return None
    if facts.single_file:
        shapes = read_header(facts.path, ModelFileError).shapes
        return sum(math.prod(shape) for name, shape in shapes.items() if not name.startswith("model_ema."))
    files = [file for part in (*facts.family.parts, "vae") for file in weight_files(facts.path / part)]
    headers = [read_header(file, ModelFileError) for file in files]
    return sum(math.prod(shape) for header in headers for shape in header.shapes.values())


def _wanted(targets: str, part: str, family: Family) -> list[re.Pattern[str]]:
    """The patterns that a layer's path must all match to be adapted."""
    row: Mapping[str, str] = TARGETS[targets].defaults
    if part != "unet":
        return [re.compile(row["text"])]
    blocks = getattr(family, row["blocks"]) if row.get("blocks") else ".*"
    return [re.compile(row["unet"]), re.compile(blocks)]


@functools.lru_cache(maxsize=8)
def _layers(path: Path, family_name: str, changed_at: int) -> Layers:
    """The layers of a base that have an input and an output side."""
    family = FAMILIES[family_name]
    if path.is_file():
        shapes = read_header(path).shapes
        return dict(_single_file_unet(shapes, family)) | dict(_known_text_layers(family))
    found: Layers = {}
    for part in family.parts:
        for file in weight_files(path / part):
            for name, shape in read_header(file).shapes.items():
                own = name.removesuffix(".weight")
                if part != "unet" and not own.startswith("text_model."):
                    own = f"text_model.{own}"
                if sides := _sides(shape):
                    found[part, own] = sides
    if not found:
        raise FileNotFoundError(path)
    return found


def _sides(shape: list[int]) -> tuple[int, int] | None:
    """(inputs x kernel, outputs) of a weight, None for what is no linear or convolutional layer."""
    if len(shape) == 2:
        return shape[1], shape[0]
    return (shape[1] * shape[2] * shape[3], shape[0]) if len(shape) == 4 else None


def weight_files(folder: Path) -> list[Path]:
    """The weights of one component: those in full precision, where there are several versions."""
    files = sorted(folder.glob("*.safetensors"))
    variants = [file for file in files if re.search(r"\.(fp16|bf16|non_ema)\b", file.name)]
    return [file for file in files if file not in variants] or variants


def _single_file_unet(shapes: Mapping[str, list[int]], family: Family) -> Iterator[Any]:
    for name, shape in shapes.items():
        if name.startswith(UNET) and name.endswith(".weight"):
            own = name.removeprefix(UNET).removesuffix(".weight")
            path, sides = diffusers_unet_path(own, family.attention_levels), _sides(shape)
            if path is not None and sides:
                yield ("unet", path), sides


def _known_text_layers(family: Family) -> Iterator[Any]:
    """The layers of a family's text encoders, which never differ among single files."""
    for encoder in family.text_encoders:
        file = FAMILY_CONFIGS / family.configs / encoder.part / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        width, inner = config["hidden_size"], config["intermediate_size"]
        for number in range(config["num_hidden_layers"]):
            start = f"text_model.encoder.layers.{number}"
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                yield (encoder.part, f"{start}.self_attn.{name}"), (width, width)
            yield (encoder.part, f"{start}.mlp.fc1"), (width, inner)
            yield (encoder.part, f"{start}.mlp.fc2"), (inner, width)
