"""What an adapter amplifies in its base, and the new directions that it adds.

The amplification factor of a layer is ||dW||_F / ||U^T W V^T||_F with U and V the left and right singular
vectors of dW (Hu et al. 2021, section 7.3). A factor of 20 says that the adapter is twenty times as strong in
its own directions as the base is there: it brings out what the base knew but did not stress. A random update
of rank r would meet r ||W||_F / sqrt(out in) of the base; `chance` is what the factor would be then.

A leading left singular vector of the adapted weight is an intruder dimension if its cosine with every left
singular vector of the frozen one is below a threshold (Shuttleworth et al. 2024, algorithm 1). Full
fine-tuning turns old directions and adds hardly any; low-rank updates that are strong for their rank add
some, and the more they add, the more of the base's abilities are forgotten. Large layers are compared through
random probes first, with the leading old directions alone: a vector with a match there is no intruder. Only
where one seems to be an intruder are both weights decomposed in full.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lora_core.errors import AdapterFileError
from lora_core.lora.weights import LayerKey
from lora_core.tools.delta import BaseWeights, Update
from lora_core.tools.svd import (
    EXACT_UP_TO,
    NO_UPDATE,
    LeftOut,
    OnLayer,
    Triples,
    by_block,
    known_updates,
    randomized_svd,
    significant_triples,
)

LEADING = 10
"""How many of the new directions are compared."""
THRESHOLD = 0.5
"""The cosine below which a new direction matches no old one."""
_EXTRA = 32


def intruder_count(
    weight: torch.Tensor, delta: torch.Tensor, leading: int = LEADING, threshold: float = THRESHOLD
) -> int:
    """How many of the leading left singular vectors of weight + delta match none of weight's.

    Args:
        weight: (out, in), the frozen weight.
        delta: (out, in), the update.
        leading: how many are compared, the largest singular values first.
        threshold: the cosine from which two match.

    Source: Shuttleworth et al. 2024, algorithm 1.
    """
    old, new = weight.float(), (weight + delta).float()
    if not bool(old.any()) or not bool(delta.any()):
        return 0
    count = min(leading, *old.shape)
    columns = 4 * count + _EXTRA
    if min(old.shape) > max(EXACT_UP_TO, columns):
        candidates = _significant_left(randomized_svd(new, count + _EXTRA), count)
        if not _num_unmatched(randomized_svd(old, columns)[0].T @ candidates, threshold):
            return 0
    return _num_unmatched(_cosines(old, _leading_left(new, count)), threshold)


def _significant_left(found: tuple[torch.Tensor, torch.Tensor, torch.Tensor], count: int) -> torch.Tensor:
    """The leading left vectors whose singular values exceed rounding."""
    u, values, _ = found
    kept = min(count, int((values > 1e-5 * values[0]).sum()))
    return u[:, :kept]


def _eigen_of_square(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues (descending) and -vectors of the smaller square of a matrix, those that exceed rounding.

    They give its singular vectors in a tenth of an SVD's time; in double precision, since a square halves the
    digits.
    """
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    squares, vectors = torch.linalg.eigh(short @ short.T)
    squares, vectors = squares.flip(0), vectors.flip(1)
    kept = squares > 1e-10 * squares[0]
    return squares[kept], vectors[:, kept]


def _leading_left(matrix: torch.Tensor, count: int) -> torch.Tensor:
    """The leading left singular vectors, (out, count) or fewer, fp64."""
    matrix = matrix.double()
    squares, vectors = _eigen_of_square(matrix)
    if matrix.shape[0] <= matrix.shape[1]:
        return vectors[:, :count]
    return matrix @ vectors[:, :count] / squares[:count].sqrt()


def _cosines(matrix: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """The products of all left singular vectors with some directions (out, count), fp64."""
    matrix = matrix.double()
    squares, vectors = _eigen_of_square(matrix)
    if matrix.shape[0] <= matrix.shape[1]:
        return vectors.T @ directions
    return vectors.T @ (matrix.T @ directions) / squares.sqrt()[:, None]


def _num_unmatched(cosines: torch.Tensor, threshold: float) -> int:
    """How many columns have no entry of at least the threshold."""
    return int((cosines.abs().amax(dim=0) < threshold).sum())


def projected_norm(weight: torch.Tensor, triples: Triples) -> float:
    """||U^T W V^T||_F of a weight (out, in) in the directions of an update."""
    return float((triples.u.T @ weight.double() @ triples.v).norm())


def file_amplification(path: Path, base: BaseWeights, on_layer: OnLayer | None = None) -> dict[str, Any]:
    """The amplification factors of an adapter file against a base, and its intruder dimensions.

    Args:
        path: a .safetensors file.
        base: that it is used with.
        on_layer: called after each layer.

    Returns:
        `layers`: for each `part`, `module`, `rank` (that exceeds rounding), `norm` of the update, `base_norm`
            of the weight, `projected` of the weight in the update's directions, `amplification`, `chance`,
            `intruders`; `blocks`: see `amplified_blocks`; `amplification`: of all layers together;
            `intruders`: how many in all, with `leading` and `threshold`; `left_out`:
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
        if on_layer is not None:
            on_layer(done, len(updates))
    if not rows:
        raise AdapterFileError(
            f"{path.name} has no layer whose update can be set against the base's weights."
        )
    return {
        "amplification": _overall(rows),
        "intruders": sum(row["intruders"] for row in rows),
        "leading": LEADING,
        "threshold": THRESHOLD,
        "layers": rows,
        "blocks": amplified_blocks(rows),
        "left_out": [one.row() for one in left_out],
    }


def _row(key: LayerKey, update: Update, weight: torch.Tensor) -> dict[str, Any] | None:
    triples = significant_triples(update)
    rank = len(triples.values)
    if rank == 0:
        return None
    norm = float(triples.values.square().sum().sqrt())
    projected, base_norm = projected_norm(weight, triples), float(weight.norm())
    by_chance = rank * base_norm / math.sqrt(weight.numel())
    return {
        "part": key[0],
        "module": key[1],
        "rank": rank,
        "norm": norm,
        "base_norm": base_norm,
        "projected": projected,
        "amplification": norm / projected if projected else None,
        "chance": norm / by_chance if by_chance else None,
        "intruders": intruder_count(weight, update.product().flatten(1)),
    }


def _overall(rows: Iterable[dict[str, Any]]) -> float | None:
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
            "amplification": _overall(rows),
            "intruders": sum(row["intruders"] for row in rows),
        }
        for (part, block), rows in by_block(layers).items()
    ]
