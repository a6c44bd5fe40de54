"""Which layers one adapter has, how large each is and how fast it learns: numbers for all, and tables by
block.

A table's pattern (`spec/patterns.py`) is looked for in "part.path", such as
"unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q" or
"text_encoder.text_model.encoder.layers.0.self_attn.q_proj". Of several that match, the last in the table
counts.
"""

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from lora_core.adapters.lora import LoraShape
from lora_core.adapters.targets import Targets, target_modules
from lora_core.adapters.weights import LayerKey
from lora_core.spec.errors import ConfigError
from lora_core.spec.patterns import Pattern, last_matches


@dataclass(frozen=True)
class Blocks:
    """What differs from layer to layer.

    Attributes:
        ranks, alphas, rates: pattern to number; a layer without a match keeps what is common.
        rslora: whether the scale is alpha / sqrt(rank) in place of alpha / rank (Kalajdzievski 2023).
    """

    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False


@dataclass(frozen=True)
class LayerPlan:
    """One layer to adapt: its shape, and its learning rate; at 0 it acts and stays as it is."""

    shape: LoraShape
    rate: float


def layer_plans(
    modules: Mapping[str, nn.Module],
    rates: Mapping[str, float],
    targets: Targets,
    shape: LoraShape,
    blocks: Blocks,
    kept: Container[LayerKey] = (),
) -> dict[LayerKey, LayerPlan]:
    """The layers to adapt, in the order of `rates` and of the modules.

    A layer whose rank is 0 is left out, and so is one whose rate is 0, unless it is among `kept` and its part
    is
    trained elsewhere.

    Args:
        modules: components of the base by part.
        rates: learning rate by part.
        targets: which layers.
        shape: what is common; with rsLoRA its alpha is the numerator over sqrt(rank).
        blocks: what differs.
        kept: layers that an adapter to go on with has.

    Raises:
        ConfigError: a pattern matches no layer or takes too long, a trained part has no such layer, or
            nothing is left.
    """
    found: list[LayerKey] = []
    for part, rate in rates.items():
        if targets.pattern(part) is None:
            continue
        names = target_modules(part, modules[part], targets)
        if not names and rate > 0:
            raise ConfigError(
                f"The {part} of this base has no layer that adapter.targets names; choose other targets."
            )
        found += [(part, name) for name in names]
    ranks = _by_block(blocks.ranks, found)
    alphas = _by_block(blocks.alphas, found)
    own_rates = _by_block(blocks.rates, found)
    rate_of = {key: own_rates.get(key, rates[key[0]]) for key in found}
    trained = {part for part, _ in (key for key in found if rate_of[key] > 0 and ranks.get(key, 1) > 0)}
    plans: dict[LayerKey, LayerPlan] = {}
    for key in found:
        rank = int(ranks.get(key, shape.rank))
        if rank > 0 and (rate_of[key] > 0 or (key in kept and key[0] in trained)):
            alpha = alphas.get(key, shape.alpha) * (math.sqrt(rank) if blocks.rslora else 1.0)
            plans[key] = LayerPlan(replace(shape, rank=rank, alpha=alpha), rate_of[key])
    for name, table in (
        ("adapter.block_ranks", blocks.ranks),
        ("adapter.block_alphas", blocks.alphas),
        ("optim.block_lr", blocks.rates),
    ):
        _check_patterns(name, table, found, plans)
    if not trained:
        raise ConfigError(
            "Nothing would be trained: the learning rates of all chosen layers are 0; see optim.lr,"
            " optim.text_encoder_lr and optim.block_lr."
        )
    return plans


def _by_block(table: Mapping[str, float], found: list[LayerKey]) -> dict[LayerKey, float]:
    """The number of the last matching pattern, for each layer that has one."""
    names = {".".join(key): key for key in found}
    return {names[name]: value for name, value in last_matches(table, names).items()}


def _check_patterns(
    setting: str, table: Mapping[str, float], found: list[LayerKey], plans: Container[LayerKey]
) -> None:
    """Refuse a pattern that does nothing; one that leaves layers out has only to find some."""
    for text, value in table.items():
        pattern = Pattern(text)
        matches = [key for key in found if pattern.search(".".join(key))]
        if not matches or (value > 0 and not any(key in plans for key in matches)):
            raise ConfigError(
                f"{setting} has the pattern {text!r}, which matches no adapted layer; layers are called"
                " like unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q."
            )
