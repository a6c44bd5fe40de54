"""Sizes that follow from settings and from the shapes of a base's layers, of which headers are read and no
weights: checkpoint, samples, exported file, the whole run, and the base in memory."""

import functools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_core.errors import LoraError, ModelFileError
from lora_core.model_files.detect import UNET, BaseFacts, weight_paths
from lora_core.model_files.families import FAMILIES, Family, canonical_path, named_targets
from lora_core.model_files.header import read_header
from lora_core.model_files.ldm_names import diffusers_unet_path
from lora_core.settings.choices import OPTIMIZERS, chosen
from lora_core.settings.config import RunConfig
from lora_core.settings.schema import last_matches
from lora_core.system.files import FAMILY_CONFIGS, MARGIN

DRAWN_CAPTIONS_BYTES = 256 * 2**20
"""The most memory for encoded captions that vary from draw to draw: some 800 of SDXL."""
PREPACKED_COPIES = 2
"""How many times the CPU backend lays out a base's weights beside the plain ones."""
WINOGRAD_COPIES = 3
"""The same in fp32, where kernels are laid out larger; 2.83 for Stable Diffusion 1.5."""
PREPACKED_SPARE = 2 * 2**30
"""Bytes that must stay free beside those."""
OFFLOAD_BUFFERS = 3
"""Weights of an offloaded base on the card at once: in use, on its way, maybe still waited for."""
HEADER_A_LAYER = 450
"""Bytes of the exported file's header for each layer: three tensors with long names."""
_HEADERS = 64 * 1024
_USUAL_SIDE = 512
_PIXEL = 2.0
"""Bytes of a pixel of a PNG, on the safe side of what samples were seen to take."""
_HALF, _FULL = 2, 4


def checkpoint_bytes(config: RunConfig, parameters: int) -> int:
    """About how large one checkpoint is.

    Args:
        config: the run's settings.
        parameters: how many are trained.
    """
    state = chosen(OPTIMIZERS, config.optimizer.name, "optimizer.name").state
    copies = 1.0 + state + (1.0 if config.save.ema else 0.0)
    return int(copies * parameters * _FULL) + _HEADERS


def num_adapters(config: RunConfig) -> int:
    """How many adapters a run samples and exports: its own, and the average where one is kept."""
    return 2 if config.save.ema else 1


def preview_bytes(config: RunConfig) -> int:
    """About how much one round of samples takes."""
    side = config.train.resolution or _USUAL_SIDE
    return int(max(2, len(config.sample.prompts)) * side * side * _PIXEL) * num_adapters(config)


def needed_bytes(config: RunConfig, export: int) -> int:
    """About how much a whole run takes on its drive, at the moment when it takes most.

    Args:
        config: the run's settings.
        export: size of the exported file, as `sizes.export_bytes` says; half of that is the number of trained
            parameters.
    """
    parameters = export // _HALF
    save = config.save
    # Those that stay, the best, the one to go back to, and the new one before an old one goes.
    count = save.keep_last + (1 if save.keep_best else 0) + 2 if save.every else 2
    rounds = config.train.steps // config.sample.every + 2 if config.sample.every else 0
    return (
        count * checkpoint_bytes(config, parameters)
        + export * num_adapters(config)
        + rounds * preview_bytes(config)
        + MARGIN
    )


Layers = dict[tuple[str, str], tuple[int, int]]
"""(part, path as diffusers names it) to the parameters that one rank costs below and above: inputs x kernel,
outputs."""


def export_bytes(facts: BaseFacts, config: RunConfig) -> int | None:
    """About how large the exported fp16 file is. None where the base does not say."""
    family = facts.family
    if family is None:
        return None
    rates = (config.optimizer.lr, config.optimizer.text_encoder_lr, config.optimizer.text_encoder_2_lr)
    trained = [part for part, rate in zip(family.parts, rates, strict=False) if rate > 0]
    try:
        layers = _layers(facts.path, family.name, facts.path.stat().st_mtime_ns)
        targets = named_targets(config.adapter.targets, family)
        patterns = {part: pattern for part in trained if (pattern := targets.pattern(part))}
        adapted = {
            f"{part}.{path}": sum(sides)
            for (part, path), sides in layers.items()
            if part in patterns and patterns[part].fullmatch(path)
        }
        ranks = last_matches(config.adapter.block_ranks, adapted)
    except (OSError, LoraError, ValueError, KeyError):
        return None
    parameters = sum(ranks.get(name, config.adapter.rank) * sides for name, sides in adapted.items())
    return parameters * _HALF + len(adapted) * HEADER_A_LAYER or None


def count_base_parameters(facts: BaseFacts) -> int | None:
    """How many parameters a base has, averaged copies left out. None where its family is unknown.

    Raises:
        ModelFileError: a file of weights is broken.
        OSError: the base is gone.
    """
    if facts.family is None:
        return None
    parts = () if facts.single_file else (*facts.family.parts, "vae")
    return _count_parameters(facts.path, parts, facts.path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _count_parameters(path: Path, parts: tuple[str, ...], changed_at: int) -> int:
    """Kept, since pages ask each second and a header may hold a megabyte."""
    files = [file for part in parts for file in weight_paths(path / part, part)] if parts else [path]
    shapes = [item for file in files for item in read_header(file, ModelFileError).shapes.items()]
    return sum(math.prod(shape) for name, shape in shapes if not name.startswith("model_ema."))


@functools.lru_cache(maxsize=8)
def _layers(path: Path, family_name: str, changed_at: int) -> Layers:
    """The layers of a base that have an input and an output side."""
    family = FAMILIES[family_name]
    if path.is_file():
        shapes = read_header(path).shapes
        return dict(_single_file_unet(shapes, family)) | dict(_known_text_layers(family))
    found: Layers = {}
    for part in family.parts:
        for file in weight_paths(path / part, part):
            for name, shape in read_header(file).shapes.items():
                if sides := _sides(shape):
                    found[part, canonical_path(part, name.removesuffix(".weight"))] = sides
    return found


def _sides(shape: list[int]) -> tuple[int, int] | None:
    """(inputs x kernel, outputs) of a weight, None for what is no linear or convolutional layer."""
    if len(shape) == 2:
        return shape[1], shape[0]
    return (shape[1] * shape[2] * shape[3], shape[0]) if len(shape) == 4 else None


def _single_file_unet(shapes: Mapping[str, list[int]], family: Family) -> Iterator[Any]:
    for name, shape in shapes.items():
        if name.startswith(UNET) and name.endswith(".weight"):
            own = name.removeprefix(UNET).removesuffix(".weight")
            path, sides = diffusers_unet_path(own, family.attention_levels), _sides(shape)
            if path is not None and sides:
                yield (family.denoiser, path), sides


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
