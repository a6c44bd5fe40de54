"""Sizes that follow from settings and from the shapes of a base's layers, of which headers are read and no
weights: checkpoint, samples, exported file, the run on disk, and its memory on a card with the fallbacks if
that is short."""

import functools
import importlib.util
import math
from collections.abc import Collection, Sequence
from pathlib import Path

import psutil

from lora_core.errors import LoraError, ModelFileError
from lora_core.model_files.detect import BaseFacts, base_layout, weight_paths
from lora_core.model_files.families import named_targets
from lora_core.model_files.header import read_header
from lora_core.settings.config import RunConfig, sample_fields
from lora_core.settings.schema import (
    ADAPTER_KINDS,
    QUANTIZED,
    RATES,
    SLIDER_STRENGTHS,
    TARGETS,
    Quantization,
    last_matches,
    rows,
)
from lora_core.system.files import MARGIN

DRAWN_CAPTIONS_BYTES = 256 * 2**20
"""The most memory for encoded captions that vary from draw to draw: some 800 of SDXL."""
RANDOM_MASKS = 4
"""Random masks of each image without its own, for inpainting bases; few, as each one's condition is
cached."""
PREPACKED_COPIES = 2
"""How many times the CPU backend lays out a base's weights beside the plain ones."""
WINOGRAD_COPIES = 3
"""The same in fp32, where kernels are laid out larger; 2.94 for Stable Diffusion 1.5."""
PREPACKED_SPARE = 2 * 2**30
"""Bytes that must stay free beside those."""
OFFLOAD_BUFFERS = 3
"""Weights of an offloaded base on the card at once: in use, on its way, maybe still waited for."""
CARD_SPARE = 300 * 2**20
"""Bytes of a card that a process leaves free, for the driver and the desktop."""
CONTEXT = 0.8e9
"""Bytes of a card for its driver's context and the libraries' workspaces."""
LOOKS = 4
"""Noise draws that are validated in one batch."""
DECODE_TILES = (512, 256)
"""Sides of VAE tiles in pixels, tried in this order where an image does not fit in one piece."""
OFFLOAD_SPARE = 2**30
"""Bytes that stay free where the base is offloaded to."""
BITSANDBYTES = "bitsandbytes"
VAE_ON_CPU, TEXT_ON_CPU, PLAIN_LAYOUT = "vae aside", "text encoders aside", "plain layout"
ON_CPU = VAE_ON_CPU, TEXT_ON_CPU
CHECKPOINTING, HALVES, OPTIMIZER_8BIT = "checkpointing", "half", "8-bit optimizer"
INT8, OFFLOAD = "int8", "offload"
FALLBACKS: dict[str, str] = rows()["fallbacks"]
"""The memory fallbacks, in the order in which they are tried before the first step: name in `plan.json` to
effect and cost. `train/autotune.py` applies them."""
HEADER_A_LAYER = 450
"""Bytes of the exported file's header for each layer: three tensors with long names."""
_HEADERS = 64 * 1024
_USUAL_SIDE = 512
_PIXEL = 2.0
"""Bytes of a pixel of a PNG, on the safe side of what samples were seen to take."""
_HALF, _FULL = 2, 4


def checkpoint_bytes(config: RunConfig, parameters: int) -> int:
    """About how large one checkpoint is."""
    copies = num_adapters(config) + config.optimizer.row.state
    return int(copies * parameters * _FULL) + _HEADERS


def num_adapters(config: RunConfig) -> int:
    """How many adapters a run samples and exports: its own, and the average where one is kept."""
    return 2 if config.save.ema or config.optimizer.row.averages else 1


def sample_pixels(config: RunConfig, own: int) -> list[int]:
    """How many pixels each sample has; `own` is the usual side. Two where captions are the prompts."""
    lines = config.sample.prompts or ["", ""]
    samples = [sample_fields(config.sample, line) for line in lines]
    return [(sample["width"] or own) * (sample["height"] or own) for sample in samples]


def preview_bytes(config: RunConfig) -> int:
    """About how much one round of samples takes."""
    side = config.resolution(_USUAL_SIDE)
    pixels = max(2 * side * side, sum(sample_pixels(config, side)))
    return int(pixels * (len(SLIDER_STRENGTHS) if config.slider.on else 1) * _PIXEL) * num_adapters(config)


def needed_bytes(config: RunConfig, export: int) -> int:
    """Estimated peak disk use of a run; `export` comes from `export_bytes`, twice the number of trained
    parameters."""
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


def count_lora(rank: int, shape: Sequence[int]) -> int:
    """The parameters of a LoRA on a weight (out, in) or (out, in, k, k); also of the other kinds below."""
    return rank * (shape[0] + math.prod(shape[1:]))


def count_dora(rank: int, shape: Sequence[int]) -> int:
    """A LoRA and a magnitude for each input channel."""
    return count_lora(rank, shape) + shape[1]


def count_loha(rank: int, shape: Sequence[int]) -> int:
    """Two LoRAs."""
    return 2 * count_lora(rank, shape)


def count_lokr(rank: int, shape: Sequence[int]) -> int:
    """A matrix of the smaller factors of both sides, and one of the larger ones, which is a product where
    that is smaller. Each side is split as evenly as it can be. Source: LyCORIS, Yeh et al. 2023."""
    (out_1, out_2), (in_1, in_2) = (
        next((d, side // d) for d in range(math.isqrt(side), 0, -1) if side % d == 0) for side in shape[:2]
    )
    kernel = math.prod(shape[2:])
    low = rank < max(out_2, in_2) / 2
    return out_1 * in_1 + (rank * (out_2 + in_2 * kernel) if low else out_2 * in_2 * kernel)


def oft_side(rank: int, out: int) -> int:
    """The side of the blocks of an OFT: the largest divisor of a layer's outputs that is at most the rank."""
    return next(side for side in range(min(rank, out), 0, -1) if out % side == 0)


def count_oft(rank: int, shape: Sequence[int]) -> int:
    """Square blocks along the diagonal of a matrix as high and wide as the outputs."""
    return shape[0] * oft_side(rank, shape[0])


def export_bytes(facts: BaseFacts, config: RunConfig) -> int | None:
    """Estimated size of the exported fp16 file. None if the base is unknown."""
    adapted = adapted_layers(facts, config).values()
    kind = ADAPTER_KINDS[config.adapter.kind]
    parameters = sum(kind.count_parameters(rank, shape) for rank, shape in adapted)
    return parameters * _HALF + len(adapted) * HEADER_A_LAYER or None


def target_shapes(facts: BaseFacts, config: RunConfig) -> dict[str, Sequence[int]]:
    """The shapes of the layers that the settings name, trained or not, by "part.path"; empty if the base is
    unknown."""
    if (family := facts.family) is None:
        return {}
    try:
        layout, targets = base_layout(facts.path, family), named_targets(config.adapter.targets, family)
        return {
            f"{part}.{path}": shape
            for (part, path), shape in layout.items()
            if (pattern := targets.pattern(part)) and pattern.fullmatch(path)
        }
    except (OSError, LoraError, ValueError, KeyError):
        return {}


def adapted_layers(facts: BaseFacts, config: RunConfig) -> dict[str, tuple[int, Sequence[int]]]:
    """The rank of each layer to train and the shape of its weight, by "part.path"; empty if the base is
    unknown."""
    optim, section, shapes = config.optimizer, config.adapter, target_shapes(facts, config)
    parts = facts.family.parts if facts.family else ()
    rates = dict(zip(parts, (getattr(optim, name) for name in RATES), strict=False))
    ranks, own_rates = last_matches(section.block_ranks, shapes), last_matches(optim.block_lr, shapes)
    usual = {name: section.conv_rank if math.prod(shape[2:]) > 1 else 0 for name, shape in shapes.items()}
    return {
        name: (rank, shape)
        for name, shape in shapes.items()
        if (rank := ranks.get(name, usual[name] or section.rank))
        and own_rates.get(name, rates.get(name.split(".")[0], 0.0)) > 0
    }


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


def fit_on_card(
    config: RunConfig, facts: BaseFacts, varied: bool = False, free: float | None = None
) -> tuple[float, list[str]] | None:
    """Predict a run's memory on a card, within a quarter of what the simulated card counts.

    Args:
        varied: whether captions vary from draw to draw, so that frozen text encoders are needed in training.
        free: bytes of the card that no other process holds; None where that is not known.

    Returns:
        Bytes at the peak with the driver's context, and the keys of `FALLBACKS` that will be applied to fit
        into `free`, in order; more than `free` where they do not suffice. None where the base does not say.
    """
    parameters, export = count_base_parameters(facts), export_bytes(facts, config)
    if facts.family is None or not parameters or not export:
        return None
    counts, applied = (parameters, export // 2), list[str]()

    def phases() -> tuple[float, float, list[float]]:
        return _card_phases(config, facts, counts, varied, applied)

    def apply_next(*names: str) -> bool:
        possible = _possible_fallbacks(config, parameters, varied, applied)
        found = [name for name in possible if name in (names or FALLBACKS)][:1]
        applied.extend(found)
        return bool(found)

    if free is not None:
        room = free - CARD_SPARE
        while phases()[0] > room and apply_next(INT8, OFFLOAD):
            pass
        while phases()[1] > room and apply_next():
            pass
        while phases()[2][-1] > room and apply_next(*ON_CPU):
            pass
    _, step, samples = phases()
    sample = samples[0] if free is None else next((one for one in samples if one <= room), samples[-1])
    return max(step, sample), applied


def _possible_fallbacks(
    config: RunConfig, parameters: int, varied: bool, applied: Collection[str]
) -> list[str]:
    """The fallbacks that are left after those that were applied; `parameters` are those of the base."""
    train, optim = config.train, config.optimizer
    in_ram = psutil.virtual_memory().available > parameters * _HALF + OFFLOAD_SPARE
    impossible = {
        TEXT_ON_CPU: not varied or trains_text_encoder(config),
        PLAIN_LAYOUT: True,
        CHECKPOINTING: train.gradient_checkpointing,
        HALVES: 2 ** list(applied).count(HALVES) >= train.batch_size,
        OPTIMIZER_8BIT: optim.name != "adamw" or importlib.util.find_spec(BITSANDBYTES) is None,
        INT8: train.quantize_base != "none" or train.offload or OFFLOAD in applied,
        OFFLOAD: train.offload or not in_ram,
    }
    possible = [name for name in FALLBACKS if not impossible.get(name)]
    return [name for name in possible if name == HALVES or name not in applied]


def trains_text_encoder(config: RunConfig) -> bool:
    """Whether a text encoder is trained or gets new tokens, so that no caption's embedding can be kept."""
    optim, text = config.optimizer, TARGETS[config.adapter.targets].text
    return bool(config.adapter.new_tokens or (text and (optim.text_encoder_lr or optim.text_encoder_2_lr)))


def _kept_by_kind(
    config: RunConfig, facts: BaseFacts, checkpointed: bool, width: int, of_rank: float
) -> float:
    """Bytes that a step keeps for the backward pass with another kind of adapter than a LoRA; `of_rank` are
    those of one value for each token of each layer."""
    kind = ADAPTER_KINDS[config.adapter.kind]
    shapes = [shape for _, shape in adapted_layers(facts, config).values()]
    kept = 0.0
    if kind.keeps_update:
        updates = [math.prod(shape) for shape in shapes]
        kept += width * (max(updates) if checkpointed else sum(updates))
    if kind.keeps_input and not checkpointed:
        # Where layers are twice as wide, there are a quarter of the tokens.
        kept += of_rank * sum(1 / shape[1] for shape in shapes) / sum(shape[1] ** -2 for shape in shapes)
    return kept


def _card_phases(
    config: RunConfig, facts: BaseFacts, counts: tuple[int, int], varied: bool, applied: Collection[str]
) -> tuple[float, float, list[float]]:
    """Bytes of a card: of the UNet alone, at the peak of steps, validation and what comes before, and in
    samples decoded at once or in ever smaller tiles. `counts` are the parameters of base and adapter."""
    assert facts.family is not None
    row, train, (weights, trained) = facts.family.footprint, config.train, counts
    larger = weights / (row.unet + row.text + row.vae)
    width = 4 if train.precision == "fp32" else 2
    kept = QUANTIZED[train.quantize_base]
    bytes_kept = kept.width if isinstance(kept, Quantization) else 1 if INT8 in applied else 0
    blocks = OFFLOAD_BUFFERS * row.largest if train.offload or OFFLOAD in applied else row.blocks
    unet = ((row.unet - row.blocks) * width + blocks * (bytes_kept or width)) * larger
    made = row.largest * width * larger if bytes_kept else 0
    text = row.text * width * larger
    encoders = text if trains_text_encoder(config) or (varied and TEXT_ON_CPU not in applied) else 0
    state = 0.5 if OPTIMIZER_8BIT in applied else config.optimizer.row.state
    copies = 2 + state + (1 if width == 2 else 0) + (1 if config.save.ema else 0)
    vae = 0 if VAE_ON_CPU in applied else row.vae * 4 * larger
    held = CONTEXT + unet + made + encoders + vae + trained * 4 * copies
    # Activations grow with the width of the layers, weights with its square.
    activation = math.sqrt(larger) * width / 2
    side, drawn = (
        config.resolution(facts.resolution),
        math.sqrt(max(sample_pixels(config, facts.resolution))),
    )
    pixels = (side / 8) ** 2
    plain, of_rank, checkpointed = row.steps.get(config.adapter.targets, row.steps["kohya"])
    recomputed = train.gradient_checkpointing or CHECKPOINTING in applied
    a_pixel: float = checkpointed if recomputed else plain + of_rank * (config.adapter.rank - 16)
    passed = math.ceil(train.batch_size / 2 ** list(applied).count(HALVES)) * pixels * activation
    passing = [a_pixel * passed + _kept_by_kind(config, facts, recomputed, width, of_rank * passed)]
    if config.validation.every and config.validation.pictures:
        passing.append(min(LOOKS, config.validation.draws_per_image) * row.guided * pixels * activation)
    if varied and not encoders:  # one after the other, for some captions
        passing.append(row.encoder * width * larger)
    # Images that do not fit are encoded on the processor.
    encoding = CONTEXT + row.vae * 4 * larger + row.encode * pixels * math.sqrt(larger)
    before = [CONTEXT + text] + ([] if applied else [encoding])
    decoded = [drawn, *(tile for tile in DECODE_TILES if tile < drawn)]
    guided = 2 * row.guided * (drawn / 8) ** 2 * activation
    # A sample can be asked for at any time; a VAE that waits on the CPU comes to the card for it, if it fits.
    moved = 0 if vae else row.vae * 4 * larger
    samples = [moved + row.decode * (one / 8) ** 2 * math.sqrt(larger) for one in decoded]
    samples += [] if vae else [0]
    return CONTEXT + unet, max(held + max(passing), *before), [held + max(guided, one) for one in samples]
