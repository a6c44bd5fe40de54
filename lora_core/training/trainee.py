"""The adapter of a run and its optimizer: which layers, how large, at which rate, and what they start
from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_core.adapters.blocks import Blocks, LayerPlan, layer_plans
from lora_core.adapters.inject import Injected, inject_layers
from lora_core.adapters.lora import LoraLayer, LoraShape
from lora_core.adapters.start import begin_with
from lora_core.adapters.storage import Storage
from lora_core.adapters.targets import named_targets
from lora_core.adapters.weights import AdapterWeights, LayerKey
from lora_core.formats.file import read_adapter
from lora_core.formats.kinds import extras_sentence
from lora_core.models.depot import depot_for
from lora_core.models.load import BaseModel
from lora_core.models.thin import Thinner
from lora_core.spec.choices import OPTIMIZERS, QUANTISED, chosen
from lora_core.spec.config import RunConfig
from lora_core.spec.errors import AdapterFileError, ConfigError
from lora_core.spec.families import Family
from lora_core.spec.sections import AdapterSection, OptimSection, TrainSection
from lora_core.spec.tensor_file import read_header

FRESH = "default"
"""The value of `adapter.init` for an adapter that starts from nothing."""
INT8, OFFLOAD = "int8", "offload"
"""Rungs of `memory.LADDER` that change how the base is kept."""


def thinner_of(
    train: TrainSection, rungs: Sequence[tuple[str, int]], device: torch.device, folder: Path
) -> Thinner:
    """How the base is kept as it is opened: as the settings say, and as was found to be needed before step 1.

    Args:
        train: the settings.
        rungs: names of what was done to take less memory, and after how many steps.
        device: what computes.
        folder: on whose drive weights may be put aside.
    """
    first = {name for name, step in rungs if step == 0}
    kind = INT8 if INT8 in first else train.quantise
    row = chosen(QUANTISED, kind, "train.quantise")
    depot = depot_for(device, folder) if train.offload or OFFLOAD in first else None
    return Thinner(row.resolve() if row.load else None, depot)


@dataclass(frozen=True)
class AdapterPlan:
    """What is to be trained.

    Attributes:
        layers: each layer's shape and rate.
        start: the adapter to go on with, or None for a fresh one.
        name: of the file that it comes from.
        notes: what a person should know of it, a sentence each.
    """

    layers: dict[LayerKey, LayerPlan]
    start: AdapterWeights | None
    name: str
    notes: list[str]

    @property
    def encoders_trained(self) -> bool:
        """Whether a text encoder is among the adapted parts."""
        return any(part != "unet" for part, _ in self.layers)


def start_file(section: AdapterSection) -> Path | None:
    """The file of the LoRA to go on with, or None."""
    return None if section.init.strip() in ("", FRESH) else Path(section.init).expanduser()


def adapter_plan(base: BaseModel, config: RunConfig) -> AdapterPlan:
    """The plan that a config means for a base. Its text encoders have to be there still.

    Raises:
        ConfigError: it fits no layer, or nothing would be trained.
        AdapterFileError: the LoRA to go on with is not there, is broken, or is for another family.
    """
    section, optim = config.adapter, config.optim
    rates = part_rates(base.family, optim)
    targets = named_targets(section.targets, base.family)
    file = start_file(section)
    if file is not None and not file.is_file():
        raise AdapterFileError(
            f"The LoRA {file} that adapter.init names does not exist; choose another file."
        )
    start = read_adapter(file, base.family) if file is not None else None
    shape = LoraShape(
        section.rank, section.alpha, section.dropout, section.rank_dropout, section.module_dropout
    )
    blocks = Blocks(section.block_ranks, section.block_alphas, optim.block_lr, section.rslora)
    layers = layer_plans(base.modules, rates, targets, shape, blocks, start.layers if start else ())
    notes = [
        f"adapter.targets = {section.targets} names no layer of the {part.replace('_', ' ')}, so that is not"
        " trained, whatever its learning rate."
        for part, rate in rates.items()
        if rate > 0 and targets.pattern(part) is None
    ]
    if file is not None and (out := extras_sentence(read_header(file).shapes)):
        notes.append(f"{file.name}: {out}")
    if optim.text_encoder_2_lr and len(base.family.text_encoders) < 2:
        notes.append(f"optim.text_encoder_2_lr plays no part: the {base.family.title} has one text encoder.")
    return AdapterPlan(layers, start, file.name if file else "", notes)


def part_rates(family: Family, optim: OptimSection) -> dict[str, float]:
    """Learning rate by part: the UNet's, then those of the text encoders in their order."""
    rates = (optim.lr, optim.text_encoder_lr, optim.text_encoder_2_lr)
    return dict(zip(family.parts, rates, strict=False))


def injected_adapter(base: BaseModel, plan: AdapterPlan, seed: int) -> tuple[Injected, list[str]]:
    """The adapter in the base, as it starts, and sentences on what of an earlier one it could not take over.

    Raises:
        AdapterFileError: the LoRA to go on with does not fit.
    """
    injected = inject_layers(base.modules, {key: layer.shape for key, layer in plan.layers.items()}, seed)
    notes = begin_with(injected, plan.start, plan.name) if plan.start is not None else []
    for key, layer in injected.layers.items():
        layer.requires_grad_(plan.layers[key].rate > 0)
        layer.base.requires_grad_(False)
    return injected, notes


def ready_for_training(base: BaseModel, checkpointing: bool) -> None:
    """Put the adapted parts into training mode, which checkpointing needs; the base has no dropout of its
    own."""
    for module in base.modules.values():
        for layer in module.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0
            if hasattr(layer, "attention_dropout"):
                setattr(layer, "attention_dropout", 0.0)  # noqa: B010 - a module's attributes are typed as tensors
        module.train()
    if checkpointing:
        enable_checkpointing(base)


def enable_checkpointing(base: BaseModel) -> None:
    """Have activations computed twice and kept once."""
    base.unet.enable_gradient_checkpointing()
    for encoder in base.text_encoders.values():
        encoder.gradient_checkpointing_enable({"use_reentrant": False})


def optimizer_of(
    injected: Injected, plan: AdapterPlan, base: BaseModel, optim: OptimSection
) -> tuple[torch.optim.Optimizer, Storage]:
    """The optimizer and where what it trains lies, with one group for each part and rate, a part's own rate
    first; `initial_lr` is a group's full rate, `until` the share of steps it is trained for.

    With `optim.lora_plus` each group is two, for the down factors and for the up factors at a multiple of the
    rate. Source: Hayou et al. 2024, "LoRA+", section 4.

    Raises:
        ConfigError: the optimizer's package is missing, or it cannot work with these rates.
    """
    row = chosen(OPTIMIZERS, optim.name, "optim.name")
    own = part_rates(base.family, optim)
    members: list[list[LoraLayer]] = []
    groups: list[dict[str, Any]] = []
    for part in injected.parts():
        by_rate: dict[float, list[LoraLayer]] = {own[part]: []}
        for key, layer in injected.layers.items():
            if key[0] == part and plan.layers[key].rate > 0:
                by_rate.setdefault(plan.layers[key].rate, []).append(layer)
        until = 1.0 if part == "unet" else optim.text_encoder_until
        for rate, layers in by_rate.items():
            if layers:
                members.append(layers)
                groups.append({"lr": rate, "until": until})
    if row.one_rate and (len({group["lr"] for group in groups}) > 1 or optim.lora_plus != 1.0):
        raise ConfigError(
            f"{row.title} works with one learning rate; set the rates of the text encoders to optim.lr"
            f" ({optim.lr:g}) or to 0, optim.lora_plus to 1, and leave optim.block_lr empty."
        )
    storage = Storage(members, apart=optim.lora_plus != 1.0)
    wholes = iter(storage.groups)
    parts = []
    for group, layers in zip(groups, members, strict=True):
        for names, ratio in zip(storage.kinds, (1.0, optim.lora_plus), strict=False):
            rate, whole = group["lr"] * ratio, next(wholes)
            factors = [getattr(layer, name) for layer in layers for name in names]
            own_factors = factors if row.by_matrix else [whole]
            parts.append({**group, "lr": rate, "initial_lr": rate, "params": own_factors})
    how = dict(row.defaults)
    if row.fused and base.device.type == "cuda":
        how["fused"] = True
    try:
        optimizer: torch.optim.Optimizer = row.resolve()(parts, lr=groups[0]["lr"], **how)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"{row.title} does not take these settings: {error}.") from error
    return optimizer, storage
