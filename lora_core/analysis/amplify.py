"""What an adapter amplifies: its update against what the base's weight does in the same directions.

The factor is ||dW||_F / ||U^T W V^T||_F with U and V the left and right singular vectors of dW (Hu et al.
2021, section 7.3). A factor of 20 says that the adapter is twenty times as strong in its own directions as
the base is there: it brings out what the base knew but did not stress. A random update of rank r would meet r
||W||_F / sqrt(out in) of the base; `chance` is what the factor would be then.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from lora_core.adapters.weights import LayerKey
from lora_core.analysis.base_weights import BaseWeights
from lora_core.analysis.factors import NO_UPDATE, LeftOut, Triples, known_updates
from lora_core.analysis.intruder import LEADING, THRESHOLD, intruder_count
from lora_core.analysis.similarity import meaningful_triples
from lora_core.analysis.spectrum import by_block
from lora_core.analysis.updates import Update
from lora_core.spec.errors import AdapterFileError

Note = Callable[[int, int], None]


def projected_norm(weight: torch.Tensor, triples: Triples) -> float:
    """||U^T W V^T||_F, how much the base does in an update's directions.

    Args:
        weight: (out, in).
        triples: of the update.
    """
    return float((triples.u.T @ weight.double() @ triples.v).norm())


def file_amplification(path: Path, base: BaseWeights, note: Note | None = None) -> dict[str, Any]:
    """The amplification factors of an adapter file against a base, and its intruder dimensions.

    Args:
        path: a .safetensors file.
        base: that it is used with.
        note: called with (done, all) layers.

    Returns:
        `layers`: for each `part`, `module`, `rank` (that means something), `norm` of the update, `base_norm`
            of the weight, `projected` of the weight in the update's directions, `amplification`, `chance`,
            `intruders`; `blocks`: see `amplified_blocks`; `amplification`: of all layers together;
            `intruders`: how many in all, and `leading` and `threshold`, by which they are told; `left_out`:
            layers with the `reason`.

    Raises:
        AdapterFileError: the file is broken, or for another base.
        ModelFileError: the base lacks a layer.
    """
    updates, left_out = known_updates(path, base.family)
    rows = []
    for done, (key, update) in enumerate(updates.items(), 1):
        weight = base.weight(key).flatten(1)
        size = torch.Size(update.size)
        if weight.shape[0] != size[0] or weight.numel() != size.numel():
            raise AdapterFileError(
                f"{path.name} gives {update.name} the shape {list(size)}, the base's is {list(weight.shape)};"
                " it is for another base."
            )
        row = _row(key, update, weight)
        if row is None:
            left_out.append(LeftOut(key, NO_UPDATE))
        else:
            rows.append(row)
        if note is not None:
            note(done, len(updates))
    if not rows:
        raise AdapterFileError(
            f"{path.name} has no layer whose update can be set against the base's weights."
        )
    return {
        "amplification": _together(rows),
        "intruders": sum(row["intruders"] for row in rows),
        "leading": LEADING,
        "threshold": THRESHOLD,
        "layers": rows,
        "blocks": amplified_blocks(rows),
        "left_out": [one.row() for one in left_out],
    }


def _row(key: LayerKey, update: Update, weight: torch.Tensor) -> dict[str, Any] | None:
    triples = meaningful_triples(update)
    rank = len(triples.values)
    if rank == 0:
        return None
    norm = float(triples.values.square().sum().sqrt())
    projected, whole = projected_norm(weight, triples), float(weight.norm())
    by_chance = rank * whole / math.sqrt(weight.numel())
    return {
        "part": key[0],
        "module": key[1],
        "rank": rank,
        "norm": norm,
        "base_norm": whole,
        "projected": projected,
        "amplification": norm / projected if projected else None,
        "chance": norm / by_chance if by_chance else None,
        "intruders": intruder_count(weight, update.product().flatten(1)),
    }


def _together(rows: Iterable[dict[str, Any]]) -> float | None:
    """The factor of several layers as if they were the blocks of one large diagonal weight."""
    rows = list(rows)
    projected = math.sqrt(sum(row["projected"] ** 2 for row in rows))
    return math.sqrt(sum(row["norm"] ** 2 for row in rows)) / projected if projected else None


def amplified_blocks(layers: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a heat map: `part`, `block`, `layers`, `norm`, `amplification`, `intruders`.

    Args:
        layers: rows of `file_amplification`.
    """
    return [
        {
            "part": part,
            "block": block,
            "layers": len(rows),
            "norm": math.sqrt(sum(row["norm"] ** 2 for row in rows)),
            "amplification": _together(rows),
            "intruders": sum(row["intruders"] for row in rows),
        }
        for (part, block), rows in by_block(layers).items()
    ]
