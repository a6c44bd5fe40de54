"""The singular value decomposition of an update from its factors, without forming the update.

With QR of both factors, up @ down = Qu (Ru Rd^T) Qd^T, and the SVD of the small core in the middle is that of
the whole. It is computed in double precision: a file of 722 layers takes seconds, and small singular values
keep their digits, which the eigenvalues of up^T up would not.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_core.errors import AdapterFileError
from lora_core.formats import detect
from lora_core.formats.io import load_adapter
from lora_core.lora.weights import LayerKey
from lora_core.model_files.families import Family
from lora_core.model_files.header import read_header
from lora_core.tools.delta import Update, Updates, file_updates

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
    known = family or detect.detect_family(header.shapes, header.metadata)
    if known is None and detect.detect_kind(header.shapes) in (detect.LORA, detect.LOCON):
        layers = load_adapter(path).layers
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


# The spectrum of an adapter: the singular values of each layer's update, and what they say of its rank.
#
# Three numbers say "rank" and mean different things: how many columns the file has, how many of them matter
# alike (effective rank), and how many hold a share of the energy (rank90, rank99), the energy being the sum
# of squared singular values.


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
