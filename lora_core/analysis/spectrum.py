"""The spectrum of an adapter: the singular values of each layer's update, and what they say of its rank.

Three numbers say "rank" and mean different things: how many columns the file has, how many of them matter
alike (effective rank), and how many hold a share of the energy (rank90, rank99), the energy being the sum of
squared singular values.
"""

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from lora_core.adapters.weights import LayerKey
from lora_core.analysis.factors import flat_pair, known_updates, numeric_rank, singular_values
from lora_core.analysis.updates import Update

Note = Callable[[int, int], None]
"""Called with how many layers are done, and of how many; what it raises ends the work."""

_BLOCK = re.compile(r"((?:down|up)_blocks\.\d+|mid_block|(?:text_model\.)?encoder\.layers\.\d+|[^.]+)")


def effective_rank(values: torch.Tensor) -> float:
    """exp of the Shannon entropy of the singular values over their sum; 0 of nothing.

    k equal values give k, one value alone gives 1.

    Args:
        values: singular values.

    Source: Roy and Vetterli 2007, definition 2.
    """
    total = float(values.sum())
    if total <= 0:
        return 0.0
    shares = values[values > 0].double() / total
    return math.exp(-float((shares * shares.log()).sum()))


def stable_rank(values: torch.Tensor) -> float:
    """The squared Frobenius norm over the squared spectral norm; 0 of nothing.

    Source: Rudelson and Vershynin 2007, section 1.
    """
    largest = float(values.max())
    return float(values.double().square().sum()) / largest**2 if largest > 0 else 0.0


def rank_of_energy(values: torch.Tensor, share: float) -> int:
    """How many of the largest singular values hold a share of the energy; 0 of nothing.

    Args:
        values: singular values, falling.
        share: of the sum of squares, above 0 and at most 1.
    """
    sums = values.double().square().cumsum(0)
    if float(sums[-1]) <= 0:
        return 0
    # A little less, since the last sums differ from the whole by roundings only.
    return int((sums < share * sums[-1] * (1 - 1e-12)).sum()) + 1


def spectrum_row(key: LayerKey, update: Update) -> dict[str, Any]:
    """The spectrum of one layer's update at strength 1, as `inspect --spectrum --json` has it.

    Args:
        key: of the layer.
        update: without magnitudes.
    """
    pair = flat_pair(update)
    values = singular_values(pair)
    meant = numeric_rank(values, update)
    return {
        "part": key[0],
        "module": key[1],
        "rank": update.low.rank if update.low else len(values),
        "alpha": update.low.alpha if update.low else None,
        "norm": float(values.square().sum().sqrt()),
        "numeric_rank": meant,
        # The entropy counts small values far more than energy does, roundings of fp16 and bf16 too.
        "effective_rank": effective_rank(values[:meant]),
        "stable_rank": stable_rank(values),
        "rank90": rank_of_energy(values, 0.9),
        "rank99": rank_of_energy(values, 0.99),
        "singular_values": values.tolist(),
    }


def file_spectrum(path: Path, note: Note | None = None) -> dict[str, Any]:
    """The spectrum of an adapter file, whoever wrote it.

    Args:
        path: a .safetensors file.
        note: called with (done, all) layers.

    Returns:
        `layers`: for each, `part`, `module`, `rank` and `alpha` of the file (`alpha` None for a LoHa or a
            LoKr), `norm`, `numeric_rank` (values above the rounding of the file's number format),
            `effective_rank`, `stable_rank`, `rank90`, `rank99`, `singular_values`; `blocks`: see
            `block_rows`; `left_out`: layers that nothing is said of, with the `reason`.

    Raises:
        AdapterFileError: one sentence on what is wrong with the file.
    """
    updates, left_out = known_updates(path)
    layers = []
    for key, update in updates.items():
        layers.append(spectrum_row(key, update))
        if note is not None:
            note(len(layers), len(updates))
    return {"layers": layers, "blocks": block_rows(layers), "left_out": [one.row() for one in left_out]}


def block_of(layer: LayerKey) -> str:
    """The block of the model that a layer is in, such as "down_blocks.1" or "layers.3" of a text encoder."""
    match = _BLOCK.match(layer[1])
    return match[1].removeprefix("text_model.encoder.") if match else layer[1]


def by_block(layers: Iterable[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Rows of layers grouped by (part, block): the UNet's blocks first, numbers in their order.

    Args:
        layers: rows with `part` and `module`.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in layers:
        groups.setdefault((row["part"], block_of((row["part"], row["module"]))), []).append(row)

    def place(group: tuple[str, str]) -> tuple[bool, str, list[tuple[int, str]]]:
        words = re.findall(r"\d+|\D+", group[1])
        return group[0] != "unet", group[0], [(int(w), "") if w.isdigit() else (-1, w) for w in words]

    return {group: groups[group] for group in sorted(groups, key=place)}


def block_rows(layers: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Norms by block: the root of the sum of squares.

    Args:
        layers: rows with `part`, `module`, `norm`, `effective_rank`, `rank99`.

    Returns:
        Rows of `part`, `block`, `layers`, `norm`, and the means of `effective_rank` and `rank99`.
    """
    return [
        {
            "part": part,
            "block": block,
            "layers": len(rows),
            "norm": math.sqrt(sum(row["norm"] ** 2 for row in rows)),
            "effective_rank": sum(row["effective_rank"] for row in rows) / len(rows),
            "rank99": sum(row["rank99"] for row in rows) / len(rows),
        }
        for (part, block), rows in by_block(layers).items()
    ]
