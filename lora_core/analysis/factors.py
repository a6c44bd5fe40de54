"""The singular value decomposition of an update from its factors, without forming the update.

With QR of both factors, up @ down = Qu (Ru Rd^T) Qd^T, and the SVD of the small core in the middle is that of
the whole. It is computed in double precision: a file of 722 layers takes seconds, and small singular values
keep their digits, which the eigenvalues of up^T up would not.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from lora_core.adapters.weights import LayerKey
from lora_core.analysis.updates import Update, Updates, file_updates
from lora_core.formats import kinds
from lora_core.formats.file import read_adapter
from lora_core.spec.errors import AdapterFileError
from lora_core.spec.families import Family
from lora_core.spec.tensor_file import read_header

Pair = tuple[torch.Tensor, torch.Tensor]
"""(up, down) whose product is an update; the scale is in `up`."""

DORA_LEFT_OUT = "a DoRA, whose update depends on the weights of its base"
NO_UPDATE = "it changes nothing"


@dataclass(frozen=True)
class Triples:
    """The singular triples of an update, u diag(values) v^T.

    Attributes:
        u: (out, k), directions that the update writes to.
        values: (k,), falling, fp64.
        v: (in, k), directions that it reads from; the kernel of a convolution is part of `in`.
    """

    u: torch.Tensor
    values: torch.Tensor
    v: torch.Tensor

    def leading(self, count: int) -> "Triples":
        """The largest `count` of them."""
        return Triples(self.u[:, :count], self.values[:count], self.v[:, :count])


@dataclass(frozen=True)
class LeftOut:
    """A layer that an analysis says nothing of, and why."""

    layer: LayerKey
    reason: str

    def row(self) -> dict[str, str]:
        """For JSON."""
        return {"part": self.layer[0], "module": self.layer[1], "reason": self.reason}


def flat_pair(update: Update) -> Pair:
    """(up (out, R), down (R, in)) in fp64; a LoKr that is no thin product stands as itself times one.

    Args:
        update: without magnitudes.
    """
    pair = update.factors()
    if pair is None:
        matrix = update.product().double().flatten(1)
        return matrix, torch.eye(matrix.shape[1], dtype=torch.float64)
    return pair[0].double().flatten(1), pair[1].double().flatten(1)


def _thin(pair: Pair) -> bool:
    """Whether the factors have fewer columns than their product has rows and columns."""
    return pair[1].shape[0] < min(pair[0].shape[0], pair[1].shape[1])


def singular_values(pair: Pair) -> torch.Tensor:
    """The singular values of up @ down, falling, in fp64: as many as the product has rows, columns or ranks.

    Args:
        pair: up (out, R), down (R, in).
    """
    up, down = pair[0].double(), pair[1].double()
    if not _thin(pair):
        return torch.linalg.svdvals(up @ down)
    r_up = torch.linalg.qr(up, mode="r").R
    r_down = torch.linalg.qr(down.T, mode="r").R
    return torch.linalg.svdvals(r_up @ r_down.T)


def singular_triples(pair: Pair) -> Triples:
    """The singular triples of up @ down, in fp64.

    Args:
        pair: up (out, R), down (R, in).
    """
    up, down = pair[0].double(), pair[1].double()
    if not _thin(pair):
        u, values, vh = torch.linalg.svd(up @ down, full_matrices=False)
        return Triples(u, values, vh.T)
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    u, values, vh = torch.linalg.svd(r_up @ r_down.T)
    return Triples(q_up @ u, values, q_down @ vh.T)


def inner_product(one: Pair, two: Pair) -> float:
    """<up1 down1, up2 down2>, the sum over elements, as the trace of two small matrices' product."""
    return float(((one[0].T @ two[0]) * (one[1] @ two[1].T)).sum())


def numeric_rank(values: torch.Tensor, update: Update) -> int:
    """How many singular values are more than what rounding to the file's number format makes.

    Args:
        values: of the update, falling.
        update: whose factors they are of.
    """
    tensors = [update.low.up, update.low.down] if update.low else list((update.roles or {}).values())
    coarsest = max(torch.finfo(tensor.dtype).eps for tensor in tensors)
    return int((values > 2 * coarsest * values[0]).sum()) if float(values[0]) > 0 else 0


def known_updates(path: Path, family: Family | None = None) -> tuple[Updates, list[LeftOut]]:
    """The updates of an adapter file of any kind that need no base, and what is left out.

    Args:
        path: a .safetensors file.
        family: of the base that it is used with, if that is known.

    Raises:
        AdapterFileError: the file is broken, or no adapter.
    """
    header = read_header(path)
    known = family or kinds.file_family(header.shapes, header.metadata)
    if known is None and kinds.kind_of(header.shapes) in (kinds.LORA, kinds.LOCON):
        layers = read_adapter(path).layers
        return {key: Update(".".join(key), layer) for key, layer in layers.items()}, []
    updates = file_updates(path, family)[0]
    left_out = [
        LeftOut(key, DORA_LEFT_OUT) for key, update in updates.items() if update.magnitude is not None
    ]
    return {key: update for key, update in updates.items() if update.magnitude is None}, left_out


def check_same_shape(first: Update, second: Update, names: tuple[str, str]) -> None:
    """Refuse layers of one name that are for different bases.

    Raises:
        AdapterFileError: they differ in width.
    """
    one, two = first.size, second.size
    if one[0] != two[0] or torch.Size(one).numel() != torch.Size(two).numel():
        raise AdapterFileError(
            f"{names[0]} and {names[1]} give {first.name} the shapes {list(one)} and {list(two)}; they are"
            " for different bases."
        )
