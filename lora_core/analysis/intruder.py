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
        if not _unlike(looked_at, sketched(old, columns)[0], threshold):
            return 0
    u = torch.linalg.svd(old, full_matrices=False).U
    return _unlike(_leading(torch.linalg.svd(new, full_matrices=False), count), u, threshold)


def _leading(found: tuple[torch.Tensor, torch.Tensor, torch.Tensor], count: int) -> torch.Tensor:
    """The leading left vectors that stand for something."""
    u, values, _ = found
    kept = min(count, int((values > 1e-5 * values[0]).sum()))
    return u[:, :kept]


def _unlike(new: torch.Tensor, old: torch.Tensor, threshold: float) -> int:
    cosines = (old.T @ new).abs().amax(dim=0)
    return int((cosines < threshold).sum())
