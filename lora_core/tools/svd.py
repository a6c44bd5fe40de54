"""The singular value decomposition of an update from its factors: spectra, and the best update of a rank.

With QR of both factors, up @ down = Qu (Ru Rd^T) Qd^T, and the SVD of the small core in the middle is that of
the product, which is never formed. It is computed in double precision: 722 layers take seconds, and small
singular values keep their digits, which the eigenvalues of up^T up would not. Updates without low rank are
decomposed exactly up to 512 rows or columns, else from random probes in a tenth of the time.

"Rank" is one of three numbers: how many columns the file has, how many of them matter alike (effective rank),
and how many hold a share of the energy (rank90, rank99), the sum of squared singular values.
"""

import math
import re
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from lora_core.errors import AdapterFileError, ConfigError
from lora_core.formats import kinds
from lora_core.formats.io import load_adapter
from lora_core.lora.lycoris import LycorisUpdate, as_update
from lora_core.lora.weights import AdapterWeights, LayerKey, LayerWeights
from lora_core.model_files.families import Family, is_text_encoder
from lora_core.model_files.header import read_header
from lora_core.tools.delta import Updates, file_updates

Pair = tuple[torch.Tensor, torch.Tensor]
"""(up, down) whose product is an update; the scale is in `up`."""
OnLayer = Callable[[int, int], None]
"""Called with (done, total) layers; an exception from it ends the work."""
T = TypeVar("T")

BASE_LEFT_OUT = "a DoRA or an OFT, whose update depends on the weights of its base"
NO_UPDATE = "it changes nothing"
MAX_RANK = 4096
"""No layer of a Stable Diffusion has a higher one."""
EXACT_UP_TO = 512
"""The shorter side up to which an exact SVD is quick."""
_FIRST_PROBES, _EXTRA_PROBES, _POWER_ITERATIONS = 64, 32, 4


def counted(items: Collection[T], on_layer: OnLayer | None) -> Iterator[T]:
    """The items, with progress after each."""
    for done, item in enumerate(items, 1):
        yield item
        if on_layer is not None:
            on_layer(done, len(items))


# Pairs of factors.


@dataclass(frozen=True)
class Triples:
    """The singular triples of an update, u diag(values) v^T.

    Attributes:
        u: (out, k), the directions that the update writes to.
        values: (k,), descending, fp64.
        v: (in, k), the directions that it reads from; for a convolution `in` includes the kernel.
    """

    u: torch.Tensor
    values: torch.Tensor
    v: torch.Tensor

    def leading(self, count: int) -> "Triples":
        """The largest `count` of them."""
        return Triples(self.u[:, :count], self.values[:count], self.v[:, :count])


def _is_thin(pair: Pair) -> bool:
    return pair[1].shape[0] < min(pair[0].shape[0], pair[1].shape[1])


def update_singular_values(update: LycorisUpdate) -> torch.Tensor:
    """The singular values of an update without magnitudes, descending, fp64; those of a Kronecker product are
    the products of its factors'."""
    halves = update.kronecker()
    if halves is None:
        return singular_values(flat_pair(update))
    one, two = map(torch.linalg.svdvals, halves)
    values = (abs(update.scale) * torch.outer(one, two)).flatten().sort(descending=True).values
    (out, rows), (more, columns) = (half.shape for half in halves)
    return torch.nn.functional.pad(values, (0, min(out * more, rows * columns) - len(values)))


def singular_values(pair: Pair) -> torch.Tensor:
    """The singular values of up (out, R) @ down (R, in), descending, fp64, min(out, in, R) of them."""
    up, down = pair[0].double(), pair[1].double()
    if not _is_thin(pair):
        return torch.linalg.svdvals(up @ down)
    r_up = torch.linalg.qr(up, mode="r").R
    r_down = torch.linalg.qr(down.T, mode="r").R
    return torch.linalg.svdvals(r_up @ r_down.T)


def singular_triples(pair: Pair) -> Triples:
    """The singular triples of up (out, R) @ down (R, in), in fp64."""
    up, down = pair[0].double(), pair[1].double()
    if not _is_thin(pair):
        u, values, vh = torch.linalg.svd(up @ down, full_matrices=False)
        return Triples(u, values, vh.T)
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    u, values, vh = torch.linalg.svd(r_up @ r_down.T)
    return Triples(q_up @ u, values, q_down @ vh.T)


def inner_product(one: Pair, two: Pair) -> float:
    """<up1 down1, up2 down2>, the sum over elements, as the trace of a product of two small matrices."""
    return float(((one[0].T @ two[0]) * (one[1] @ two[1].T)).sum())


def randomized_svd(matrix: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest singular triples, from the range of the matrix applied to random probes.

    Source: Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1.
    """
    probes = torch.randn(matrix.shape[1], columns, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(matrix @ probes)[0]
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
    u, values, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, values, vh


# The best approximation of a rank (Eckart and Young 1936).


@dataclass
class TruncationLoss:
    """The error of an approximation.

    Attributes:
        layers: layer to (squared norm of the update, squared norm of the difference).
    """

    layers: dict[LayerKey, tuple[float, float]] = field(default_factory=dict)

    @property
    def overall(self) -> float:
        """The relative error over all layers: |difference| / |update|."""
        total = sum(norm for norm, _ in self.layers.values())
        return math.sqrt(sum(lost for _, lost in self.layers.values()) / total) if total else 0.0

    @property
    def worst(self) -> tuple[str, float]:
        """The layer with the largest relative error, and that error; ("", 0) without any."""
        errors = {".".join(key): math.sqrt(lost / n) for key, (n, lost) in self.layers.items() if n}
        name = max(errors, key=lambda name: errors[name], default="")
        return (name, errors[name]) if name else ("", 0.0)

    @property
    def none(self) -> bool:
        """Whether only rounding is lost."""
        return self.overall < 1e-5

    def sentence(self, rank: int | None = None) -> str:
        """The error in words; with `rank` the sentence begins with it."""
        name, error = self.worst
        words = (
            "nothing is lost but rounding."
            if self.none
            else (
                f"the update differs from the original by {self.overall:.2%} of its norm; the worst layer,"
                f" {name}, by {error:.2%}."
            )
        )
        return f"At rank {rank} {words}" if rank else words[0].upper() + words[1:]


def check_rank(rank: int) -> int:
    """The rank, or a ConfigError where no layer can have it."""
    if not 1 <= rank <= MAX_RANK:
        raise ConfigError(f"--rank {rank} is out of range; it must be between 1 and {MAX_RANK}.")
    return rank


def split_triples(triples: Triples, shape: torch.Size) -> Pair:
    """(up, down) of singular triples, for a layer whose `down` has rows of `shape`.

    The singular values are shared between the factors, so that both have about the same size.
    """
    root, rank = triples.values.sqrt(), len(triples.values)
    up = (triples.u * root).reshape(-1, rank, *(1 for _ in shape[1:]))
    return up, (root[:, None] * triples.v.T).reshape(rank, *shape)


def truncate_pair(pair: Pair, rank: int) -> tuple[Pair, float, float]:
    """The best pair of at most `rank` columns, the squared norm of the update, and that of the difference."""
    up, down = pair
    triples = singular_triples((up.flatten(1), down.flatten(1)))
    kept = min(rank, down.shape[0], len(triples.values))
    new_up, new_down = split_triples(triples.leading(kept), down.shape[1:])
    squares = triples.values.square()
    return (new_up, new_down.float()), float(squares.sum()), float(squares[kept:].sum())


def low_rank_pair(
    delta: torch.Tensor, rank: int | None, energy: float = 1.0
) -> tuple[Pair, float, float, torch.Tensor]:
    """The pair closest to an update, the squared norms of the update and of the difference, and the squares
    of the leading singular values.

    Args:
        delta: (out, in) or (out, in, k, k), finite.
        rank: of the pair at most; None for the lowest that holds the share `energy`.
    """
    matrix = delta.flatten(1)
    norm = float(matrix.double().square().sum())
    columns = (rank or _FIRST_PROBES) + _EXTRA_PROBES
    while True:
        if min(matrix.shape) <= max(EXACT_UP_TO, columns):
            u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
        else:
            u, values, vh = randomized_svd(matrix, columns)
        squares = values.double().square()
        if rank is not None:
            kept = rank
            break
        reached = squares.cumsum(0) >= energy * norm * (1 - 1e-9)
        # The last probes are inaccurate, so the rank must not be found among them.
        if len(values) == min(matrix.shape) or bool(reached[: columns - _EXTRA_PROBES].any()):
            kept = int((~reached).sum()) + 1 if bool(reached.any()) else rank_of_energy(values, 1.0)
            break
        columns *= 2
    kept = max(1, min(kept, int((values > 0).sum())))
    up, down = split_triples(Triples(u, values, vh.T).leading(kept), delta.shape[1:])
    # Measured, since the difference of two sums of squares shows nothing below the root of a rounding.
    lost = float((matrix - up.flatten(1) @ down.flatten(1)).double().square().sum())
    return (up, down), norm, lost, squares


def adapter_from_pairs(pairs: dict[LayerKey, Pair]) -> AdapterWeights:
    """An adapter in fp32 with one alpha, the highest rank; `pairs` is emptied to save memory.

    Where a layer has fewer columns, its `up` makes up for the alpha that is too high for it.
    """
    alpha = max(down.shape[0] for _, down in pairs.values())
    layers = {}
    for key in list(pairs):
        up, down = pairs.pop(key)
        layers[key] = LayerWeights(down, (up * (down.shape[0] / alpha)).float(), float(alpha))
    return AdapterWeights(layers)


def truncate_adapter(weights: AdapterWeights, rank: int) -> AdapterWeights:
    """The best adapter of at most `rank` columns per layer; layers that have no more stay as they are.

    Raises:
        ConfigError: the rank is out of range.
    """
    check_rank(rank)
    layers = {}
    for key, layer in weights.layers.items():
        if layer.rank <= rank:
            layers[key] = layer
            continue
        (up, down), _, _ = truncate_pair((layer.up.double() * layer.scale, layer.down), rank)
        layers[key] = LayerWeights(down, up.float(), float(down.shape[0]))
    return AdapterWeights(layers, weights.metadata, tokens=weights.tokens)


# Updates of a file, and their spectra.


def left_out_row(layer: LayerKey, reason: str) -> dict[str, str]:
    """A layer that an analysis leaves out, and why, for JSON."""
    return {"part": layer[0], "module": layer[1], "reason": reason}


def known_updates(path: Path, family: Family | None = None) -> tuple[Updates, list[dict[str, str]]]:
    """The updates of an adapter file of any kind that need no base, and the names of the others; `family` is
    that of the base that it is used with, if that is known.

    Raises:
        AdapterFileError: the file is broken, or no adapter.
    """
    header = read_header(path)
    known = family or kinds.detect_family(header.shapes, header.metadata)
    if known is None and kinds.detect_kind(header.shapes) in (kinds.LORA, kinds.LOCON):
        layers = load_adapter(path).layers
        return {key: as_update(key, layer) for key, layer in layers.items()}, []
    updates = file_updates(path, family)[0]
    of_base = [key for key, update in updates.items() if update.needs_base]
    kept = {key: update for key, update in updates.items() if not update.needs_base}
    return kept, [left_out_row(key, BASE_LEFT_OUT) for key in of_base]


def check_same_shape(first: LycorisUpdate, second: LycorisUpdate, names: tuple[str, str]) -> None:
    """Refuse layers of one name that are for different bases.

    Raises:
        AdapterFileError: they differ in width.
    """
    one, two = first.weight_shape, second.weight_shape
    if one[0] != two[0] or torch.Size(one).numel() != torch.Size(two).numel():
        raise AdapterFileError(
            f"{names[0]} and {names[1]} give {first.name} the shapes {list(one)} and {list(two)}; they are"
            " for different bases."
        )


def flat_pair(update: LycorisUpdate) -> Pair:
    """(up (out, R), down (R, in)) in fp64 of an update without magnitudes; a dense one is itself times
    one."""
    pair = update.factors()
    if pair is None:
        matrix = update.product().double().flatten(1)
        return matrix, torch.eye(matrix.shape[1], dtype=torch.float64)
    return pair[0].double().flatten(1), pair[1].double().flatten(1)


def numeric_rank(values: torch.Tensor, update: LycorisUpdate) -> int:
    """How many singular values (descending) of an update exceed the rounding of the file's dtype."""
    tensors = [update.low.up, update.low.down] if update.low else list((update.roles or {}).values())
    coarsest = max(torch.finfo(tensor.dtype).eps for tensor in tensors)
    return int((values > 2 * coarsest * values[0]).sum()) if float(values[0]) > 0 else 0


def significant_triples(update: LycorisUpdate) -> Triples:
    """The singular triples of an update that exceed rounding."""
    triples = singular_triples(flat_pair(update))
    return triples.leading(numeric_rank(triples.values, update))


def effective_rank(values: torch.Tensor) -> float:
    """exp of the Shannon entropy of the singular values over their sum: k for k equal values, 0 for none.

    Source: Roy and Vetterli 2007, definition 2.
    """
    total = float(values.sum())
    if total <= 0:
        return 0.0
    shares = values[values > 0].double() / total
    return math.exp(-float((shares * shares.log()).sum()))


def stable_rank(values: torch.Tensor) -> float:
    """The squared Frobenius norm over the squared spectral norm; 0 for none.

    Source: Rudelson and Vershynin 2007, section 1.
    """
    largest = float(values.max())
    return float(values.double().square().sum()) / largest**2 if largest > 0 else 0.0


def rank_of_energy(values: torch.Tensor, share: float) -> int:
    """How many of the largest singular values (descending) hold a share of the sum of squares; 0 for none."""
    sums = values.double().square().cumsum(0)
    if float(sums[-1]) <= 0:
        return 0
    # A little less, since the last sums differ from the total by roundings only.
    return int((sums < share * sums[-1] * (1 - 1e-12)).sum()) + 1


def spectrum_row(key: LayerKey, update: LycorisUpdate) -> dict[str, Any]:
    """The spectrum of one layer's update (without magnitudes), see `file_spectrum`."""
    values = update_singular_values(update)
    significant = numeric_rank(values, update)
    return {
        "part": key[0],
        "module": key[1],
        "rank": update.low.rank if update.low else len(values),
        "alpha": update.low.alpha if update.low else None,
        "norm": float(values.square().sum().sqrt()),
        "numeric_rank": significant,
        # The entropy weighs small values far more than the energy does, roundings of fp16 and bf16 too.
        "effective_rank": effective_rank(values[:significant]),
        "stable_rank": stable_rank(values),
        "rank90": rank_of_energy(values, 0.9),
        "rank99": rank_of_energy(values, 0.99),
        "singular_values": values.tolist(),
    }


def file_spectrum(path: Path, on_layer: OnLayer | None = None) -> dict[str, Any]:
    """The spectrum of an adapter file of any kind at strength 1.

    Returns:
        `layers`: for each, `part`, `module`, `rank` and `alpha` of the file (`alpha` None for a LoHa or a
            LoKr), `norm`, `numeric_rank`, `effective_rank`, `stable_rank`, `rank90`, `rank99`,
            `singular_values`; `blocks`: see `block_rows`, with the means of `effective_rank` and
            `rank99`; `left_out`: other layers with the `reason`.

    Raises:
        AdapterFileError: the file is broken, or no adapter.
    """
    updates, left_out = known_updates(path)
    layers = [spectrum_row(key, update) for key, update in counted(updates.items(), on_layer)]
    blocks = block_rows(
        layers,
        {
            "effective_rank": lambda rows: statistics.fmean(row["effective_rank"] for row in rows),
            "rank99": lambda rows: statistics.fmean(row["rank99"] for row in rows),
        },
    )
    return {"layers": layers, "blocks": blocks, "left_out": left_out}


_BLOCK = re.compile(r"((?:down|up)_blocks\.\d+|mid_block|(?:text_model\.)?encoder\.layers\.\d+|[^.]+)")


def block_of(layer: LayerKey) -> str:
    """The block of the model that a layer is in, such as "down_blocks.1" or "layers.3" of a text encoder."""
    match = _BLOCK.match(layer[1])
    return match[1].removeprefix("text_model.encoder.") if match else layer[1]


def block_rows(
    layers: Iterable[dict[str, Any]], columns: Mapping[str, Callable[[list[dict[str, Any]]], Any]]
) -> list[dict[str, Any]]:
    """Rows of `part`, `block`, `layers` (how many), `norm` (the root of the sum of squares), and more
    columns, each a function of a block's rows; the denoiser first, blocks by number.

    Args:
        layers: rows with `part`, `module` and `norm`.
        columns: by name.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in layers:
        groups.setdefault((row["part"], block_of((row["part"], row["module"]))), []).append(row)

    def order(group: tuple[str, str]) -> tuple[bool, str, list[tuple[int, str]]]:
        words = re.findall(r"\d+|\D+", group[1])
        return is_text_encoder(group[0]), group[0], [(int(w), "") if w.isdigit() else (-1, w) for w in words]

    return [
        {
            "part": part,
            "block": block,
            "layers": len(rows),
            "norm": math.sqrt(sum(row["norm"] ** 2 for row in rows)),
            **{name: of(rows) for name, of in columns.items()},
        }
        for (part, block), rows in sorted(groups.items(), key=lambda group: order(group[0]))
    ]
