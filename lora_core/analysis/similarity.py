"""How alike the directions of two adapters are (Hu et al. 2021, section 7.2, equation 4).

phi(A, B, i, j) = ||U_A^i^T U_B^j||_F^2 / min(i, j), with the leading i and j singular vectors: 1 where the
smaller subspace lies within the larger one, 0 where the two are orthogonal. The paper takes the right
singular vectors of A, the directions that an adapter reads from. Here they are those of the whole update
(alpha/r) B A: the rows of A span the same space, but A and B can trade scale and rotation between them, which
changes the order of A's own directions and not of the update's. The left ones, which it writes to, are told
beside them.

Two subspaces that know nothing of each other are not orthogonal. With random ones every pair of unit vectors
in d dimensions has the mean squared product 1/d, so the mean of phi is i j / d / min(i, j) = max(i, j) / d:
the baseline.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lora_core.analysis.factors import (
    NO_UPDATE,
    LeftOut,
    Triples,
    check_same_shape,
    flat_pair,
    known_updates,
    numeric_rank,
    singular_triples,
)
from lora_core.analysis.updates import Update
from lora_core.spec.errors import AdapterFileError

TABLE = 16
"""The table of phi over i and j goes no further."""


def phi(first: torch.Tensor, second: torch.Tensor) -> float:
    """phi of two subspaces, in [0, 1].

    Args:
        first, second: (d, i) and (d, j), orthonormal columns.

    Source: Hu et al. 2021, equation 4.
    """
    together = float((first.T @ second).square().sum()) / min(first.shape[1], second.shape[1])
    # Of what is 1 but for roundings.
    return min(1.0, round(together, 12))


def phi_table(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """phi(i, j) of the leading i and j columns, (i, j) from 1 on: figures 3 and 4 of Hu et al. 2021.

    Args:
        first, second: (d, I) and (d, J), orthonormal columns, the leading ones first.
    """
    sums = (first.T @ second).square().cumsum(0).cumsum(1)
    rows, columns = (torch.arange(1, n + 1) for n in sums.shape)
    return (sums / torch.minimum(rows[:, None], columns[None, :])).clamp(max=1.0)


def baseline(i: int, j: int, dimension: int) -> float:
    """The mean of phi of two random subspaces of i and j dimensions among `dimension`."""
    return min(1.0, max(i, j) / dimension)


def meaningful_triples(update: Update) -> Triples:
    """The singular triples of an update that are more than rounding."""
    triples = singular_triples(flat_pair(update))
    return triples.leading(numeric_rank(triples.values, update))


def file_similarity(
    first: Path, second: Path, note: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """The similarity of two adapter files.

    Args:
        first, second: .safetensors files.
        note: called with (done, all) layers; what it raises ends the work.

    Returns:
        `similarity` and `baseline`: the means of phi and of its baseline over the layers that both files
        change, at the common rank, the lower of their two; `layers`: for each `part`, `module`, `rank` (the
        common one), `phi` and `baseline` of the directions that are read from, `phi_output` and
        `baseline_output` of those that are written to; `table`: the mean over layers of phi(i, j), None where
        no layer is of that rank; `left_out`: layers with the `reason`.

    Raises:
        AdapterFileError: a file is broken, they are for different bases, or no layer is in both.
    """
    (one, out_one), (two, out_two) = known_updates(first), known_updates(second)
    left_out = [*out_one, *out_two, *_alone(one, two, first.name), *_alone(two, one, second.name)]
    rows: list[dict[str, Any]] = []
    total, count = torch.zeros(TABLE, TABLE, dtype=torch.float64), torch.zeros(TABLE, TABLE)
    shared = [key for key in one if key in two]
    for done, key in enumerate(shared):
        if note is not None:
            note(done, len(shared))
        check_same_shape(one[key], two[key], (first.name, second.name))
        a, b = meaningful_triples(one[key]), meaningful_triples(two[key])
        rank = min(len(a.values), len(b.values))
        if rank == 0:
            left_out.append(LeftOut(key, NO_UPDATE))
            continue
        a, b = a.leading(rank), b.leading(rank)
        table = phi_table(a.v[:, :TABLE], b.v[:, :TABLE])
        total[: len(table), : len(table)] += table
        count[: len(table), : len(table)] += 1
        rows.append({"part": key[0], "module": key[1], "rank": rank, **_alike(a, b, rank)})
    if not rows:
        raise AdapterFileError(
            f"{first.name} and {second.name} change no layer in common, so nothing compares."
        )
    side = int((count.diagonal() > 0).sum())
    means = ("phi", "baseline", "phi_output", "baseline_output")
    return {
        **{name.replace("phi", "similarity"): sum(row[name] for row in rows) / len(rows) for name in means},
        "layers": rows,
        "table": (total / count.clamp(min=1))[:side, :side].tolist(),
        "left_out": [one.row() for one in left_out],
    }


def _alike(a: Triples, b: Triples, rank: int) -> dict[str, float]:
    """How alike two updates are in what they read and in what they write, and what chance would give."""
    return {
        "phi": phi(a.v, b.v),
        "baseline": baseline(rank, rank, a.v.shape[0]),
        "phi_output": phi(a.u, b.u),
        "baseline_output": baseline(rank, rank, a.u.shape[0]),
    }


def _alone(updates: Mapping[Any, Update], other: Mapping[Any, Update], name: str) -> list[LeftOut]:
    return [LeftOut(key, f"it is in {name} alone") for key in updates if key not in other]
