"""Updates of any kind as a plain LoRA, by a truncated SVD, with the error told.

A LoHa, a LoKr or a DoRA has no low rank by construction, so that a plain LoRA comes close and is not the
same. Small updates are decomposed exactly. For large ones the range is found from random probes first, as
that takes a tenth of the time; the error is measured against the update itself either way.
"""

from collections.abc import Callable

import torch

from lora_core.adapters.weights import AdapterWeights, LayerKey
from lora_core.analysis.combine import Loss, Pair, checked_rank, truncated, with_one_alpha
from lora_core.analysis.updates import Updates
from lora_core.spec.errors import AdapterFileError

WeightOf = Callable[[LayerKey], torch.Tensor]
"""The frozen weight of a layer of a base, in fp32."""

Note = Callable[[int, int], None]
"""Called with how many layers are done, and of how many."""

EXACT_UP_TO = 512
"""The shorter side up to which an SVD of the whole matrix is quick."""
_EXTRA, _ROUNDS = 32, 4
"""Probes beyond the rank, and rounds of sharpening; see `sketched`."""


def needs_base(updates: Updates) -> bool:
    """Whether the updates depend on the base's own weights, as those of a DoRA do."""
    return any(update.magnitude is not None for update in updates.values())


def plain(
    updates: Updates, rank: int, weight_of: WeightOf | None = None, note: Note | None = None
) -> tuple[AdapterWeights, Loss]:
    """The plain LoRA of a rank that is closest to the updates, in fp32 with one alpha, and what is lost.

    Args:
        updates: by layer.
        rank: of each layer; one that has a lower rank by construction keeps its own.
        weight_of: gives the base's weights; only needed where `needs_base`.
        note: called with (done, all) layers.

    Raises:
        ConfigError: the rank is out of range.
        AdapterFileError: an update holds numbers that are not finite, or does not fit the base.
        ModelFileError: the base lacks a layer.
    """
    checked_rank(rank)
    loss = Loss()
    pairs: dict[LayerKey, Pair] = {}
    for done, (key, update) in enumerate(updates.items(), 1):
        factors = update.factors() if update.magnitude is None else None
        if factors is not None:
            pairs[key], norm, lost = truncated(factors, rank)
        else:
            weight = weight_of(key) if update.magnitude is not None and weight_of else None
            pairs[key], norm, lost = low_rank(update.delta(weight), rank)
        if not (norm < float("inf")):
            raise AdapterFileError(f"The update of {update.name} holds numbers that are not finite.")
        loss.layers[key] = (norm, lost)
        if note is not None:
            note(done, len(updates))
    return with_one_alpha(pairs), loss


def low_rank(delta: torch.Tensor, rank: int) -> tuple[Pair, float, float]:
    """The pair of at most `rank` columns closest to an update, its squared norm, and that of the difference.

    Args:
        delta: (out, in) or (out, in, k, k).
        rank: of the pair.
    """
    matrix = delta.flatten(1)
    norm = float(matrix.double().square().sum())
    kept = min(rank, *matrix.shape)
    if not norm < float("inf"):
        return (delta, delta), norm, norm
    if min(matrix.shape) <= max(EXACT_UP_TO, kept + _EXTRA):
        u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        u, values, vh = sketched(matrix, kept + _EXTRA)
    root = values[:kept].sqrt()
    up, down = u[:, :kept] * root, root[:, None] * vh[:kept]
    lost = float((matrix - up @ down).double().square().sum())
    ones = (1,) * (delta.dim() - 2)
    return (up.reshape(*up.shape, *ones), down.reshape(kept, *delta.shape[1:])), norm, lost


def sketched(matrix: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest singular triples, from the range of the matrix applied to random probes.

    Source: Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1.
    """
    probes = torch.randn(matrix.shape[1], columns, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(matrix @ probes)[0]
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
    u, values, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, values, vh
