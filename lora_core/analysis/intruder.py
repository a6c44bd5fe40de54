"""Intruder dimensions: leading singular directions of W0 + B A that W0 has none like.

A leading left singular vector of the adapted weight is an intruder if its cosine with every left singular
vector of the frozen one is below a threshold (Shuttleworth et al. 2024, algorithm 1). Full fine-tuning turns
old directions and adds hardly any; low-rank updates that are strong for their rank add some, and the more
they add, the more of what the base could do is forgotten.

Large layers are looked at through random probes first, with the leading old directions alone. What has a like
one there is no intruder; only where something seems to be one are both weights decomposed in full.
"""

import torch

from lora_core.analysis.plain import EXACT_UP_TO, sketched

LEADING = 10
"""How many of the new directions are looked at."""
THRESHOLD = 0.5
"""The cosine below which a new direction is like no old one."""
_EXTRA = 32


def intruder_count(
    weight: torch.Tensor, delta: torch.Tensor, leading: int = LEADING, threshold: float = THRESHOLD
) -> int:
    """How many of the leading left singular vectors of weight + delta are like none of weight's.

    Args:
        weight: (out, in), the frozen weight.
        delta: (out, in), the update.
        leading: how many are looked at, the largest singular values first.
        threshold: the cosine that makes two alike.

    Source: Shuttleworth et al. 2024, algorithm 1.
    """
    old, new = weight.float(), (weight + delta).float()
    if not bool(old.any()) or not bool(delta.any()):
        return 0
    count = min(leading, *old.shape)
    columns = 4 * count + _EXTRA
    if min(old.shape) > max(EXACT_UP_TO, columns):
        looked_at = _leading(sketched(new, count + _EXTRA), count)
        if not _unlike(sketched(old, columns)[0].T @ looked_at, threshold):
            return 0
    return _unlike(_cosines(old, _exactly_leading(new, count)), threshold)


def _leading(found: tuple[torch.Tensor, torch.Tensor, torch.Tensor], count: int) -> torch.Tensor:
    """The leading left vectors that stand for something."""
    u, values, _ = found
    kept = min(count, int((values > 1e-5 * values[0]).sum()))
    return u[:, :kept]


def _squared(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues and -vectors of the smaller square of a matrix, falling, of all that stands for something.

    They give its singular vectors in a tenth of an SVD's time; in double precision, since a square halves the
    digits.
    """
    short = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    squares, vectors = torch.linalg.eigh(short @ short.T)
    squares, vectors = squares.flip(0), vectors.flip(1)
    kept = squares > 1e-10 * squares[0]
    return squares[kept], vectors[:, kept]


def _exactly_leading(matrix: torch.Tensor, count: int) -> torch.Tensor:
    """The leading left singular vectors, (out, count) or fewer, fp64."""
    matrix = matrix.double()
    squares, vectors = _squared(matrix)
    if matrix.shape[0] <= matrix.shape[1]:
        return vectors[:, :count]
    return matrix @ vectors[:, :count] / squares[:count].sqrt()


def _cosines(matrix: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """The products of all left singular vectors with some directions (out, count), fp64."""
    matrix = matrix.double()
    squares, vectors = _squared(matrix)
    if matrix.shape[0] <= matrix.shape[1]:
        return vectors.T @ directions
    return vectors.T @ (matrix.T @ directions) / squares.sqrt()[:, None]


def _unlike(cosines: torch.Tensor, threshold: float) -> int:
    """How many columns have no entry of the threshold's size."""
    return int((cosines.abs().amax(dim=0) < threshold).sum())
