"""Smaller adapters: each layer cut to the leading singular triples of its update, the best there is of a
rank.

How many each layer keeps follows from a rank (all the same), from a share of the energy that each layer has
to keep, or from a share of the energy of all layers together ("pooled"): then the weakest triples go first,
wherever they are, so that for the same share fewer are kept in all. Which of the two shares makes the smaller
file depends on the layers' widths; both are worked out and the smaller one is taken.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lora_core.errors import AdapterFileError, ConfigError
from lora_core.evaluate.validator import clustered_error
from lora_core.formats.detect import extras_sentence
from lora_core.formats.layers import check_plain
from lora_core.lora.inject import LoadedLora
from lora_core.lora.weights import AdapterWeights, LayerKey
from lora_core.model_files.families import Family
from lora_core.model_files.header import read_header
from lora_core.tools.base_weights import BaseWeights
from lora_core.tools.combine import (
    Note,
    Pair,
    TruncationLoss,
    adapter_from_pairs,
    check_rank,
    needs_base,
    to_lora,
)
from lora_core.tools.delta import file_updates
from lora_core.tools.evaluator import MeasureGains
from lora_core.tools.rewrite import Rewrite, check_out
from lora_core.tools.svd import Triples, rank_of_energy, singular_triples

SHRUNK_KEY = "lora_easel.shrunk"
"""Our own key of a header: what was cut, as JSON."""

Ranks = Mapping[LayerKey, int]


@dataclass(frozen=True)
class DecomposedAdapter:
    """An adapter with the singular triples of each layer, from which any cut of it is quickly made."""

    weights: AdapterWeights
    triples: dict[LayerKey, Triples]

    @property
    def values(self) -> dict[LayerKey, torch.Tensor]:
        """The singular values by layer."""
        return {key: triples.values for key, triples in self.triples.items()}

    def parameters(self, ranks: Ranks) -> int:
        """How many numbers an adapter of these ranks has."""
        sizes = {key: t.u.shape[0] + t.v.shape[0] for key, t in self.triples.items()}
        return sum(rank * sizes[key] for key, rank in ranks.items())

    def own_parameters(self) -> int:
        """How many numbers the adapter has as it is."""
        return sum(layer.up.numel() + layer.down.numel() for layer in self.weights.layers.values())


def decompose(weights: AdapterWeights) -> DecomposedAdapter:
    """The singular triples of each layer; vectors in fp32, since an adapter has no more.

    Raises:
        AdapterFileError: it is no plain LoRA.
    """
    check_plain(weights)
    found = {}
    for key, layer in weights.layers.items():
        pair = layer.scale * layer.up.double().flatten(1), layer.down.double().flatten(1)
        triples = singular_triples(pair)
        kept = min(layer.rank, len(triples.values))
        triples = triples.leading(kept)
        found[key] = Triples(triples.u.float(), triples.values, triples.v.float())
    return DecomposedAdapter(weights, found)


def cut(parts: DecomposedAdapter, ranks: Ranks) -> tuple[AdapterWeights, TruncationLoss]:
    """The best adapter of these ranks in fp32 with one alpha, and what it lost; a rank of 0 leaves a layer
    out.

    Raises:
        AdapterFileError: nothing is left.
    """
    loss = TruncationLoss()
    pairs: dict[LayerKey, Pair] = {}
    for key, triples in parts.triples.items():
        rank = min(ranks.get(key, 0), len(triples.values))
        squares = triples.values.square()
        loss.layers[key] = (float(squares.sum()), float(squares[rank:].sum()))
        if rank == 0:
            continue
        kept = triples.leading(rank)
        root = kept.values.sqrt()
        shape = parts.weights.layers[key].down.shape[1:]
        up = (kept.u.double() * root).reshape(-1, rank, *(1 for _ in shape[1:]))
        pairs[key] = up, (root[:, None] * kept.v.T.double()).float().reshape(rank, *shape)
    if not pairs:
        raise AdapterFileError("The adapter changes nothing, so there is nothing to cut.")
    return replace(adapter_from_pairs(pairs), metadata=parts.weights.metadata), loss


def uniform_ranks(parts: DecomposedAdapter, rank: int) -> dict[LayerKey, int]:
    """The same rank for every layer that has so much."""
    return {key: min(rank, _nonzero(triples.values)) for key, triples in parts.triples.items()}


def ranks_of_energy(parts: DecomposedAdapter, share: float) -> dict[LayerKey, int]:
    """For each layer the lowest rank that keeps the share of its own energy."""
    return {key: rank_of_energy(triples.values, share) for key, triples in parts.triples.items()}


def pooled_ranks(parts: DecomposedAdapter, columns: int) -> dict[LayerKey, int]:
    """Ranks that keep the `columns` largest singular values of all layers together."""
    values = torch.cat([triples.values for triples in parts.triples.values()])
    owners = torch.cat([torch.full((len(t.values),), n) for n, t in enumerate(parts.triples.values())])
    # Stable, so that of equal values those of earlier layers are kept.
    largest = torch.sort(values, descending=True, stable=True).indices[:columns]
    largest = largest[values[largest] > 0]
    counts = torch.bincount(owners[largest], minlength=len(parts.triples)).tolist()
    return dict(zip(parts.triples, counts, strict=True))


def pooled_ranks_of_energy(parts: DecomposedAdapter, share: float) -> dict[LayerKey, int]:
    """The fewest columns in all that keep the share of the energy of all layers together."""
    values = torch.cat([triples.values for triples in parts.triples.values()])
    return pooled_ranks(parts, rank_of_energy(values.sort(descending=True).values, share))


def _nonzero(values: torch.Tensor) -> int:
    """Down to what double precision makes of nothing."""
    return int((values > 1e-12 * values[0]).sum()) if float(values[0]) > 0 else 0


def checked_energy(share: float) -> float:
    """The share of energy, if it is one.

    Raises:
        ConfigError: it is none.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"--energy {share:g} is out of range; it is a share such as 0.99.")
    return share


@dataclass(frozen=True)
class ShrinkTarget:
    """How small: exactly one of the two is given."""

    rank: int | None = None
    energy: float | None = None


def shrink_adapter(
    parts: DecomposedAdapter, wish: ShrinkTarget
) -> tuple[AdapterWeights, TruncationLoss, str]:
    """An adapter cut as wished, what it lost, and how the ranks were chosen, in a sentence.

    Raises:
        ConfigError: a rank or an energy that is none.
        AdapterFileError: the adapter changes nothing.
    """
    if wish.rank is not None:
        ranks, how = uniform_ranks(parts, check_rank(wish.rank)), f"Each layer keeps rank {wish.rank}"
    else:
        share = checked_energy(wish.energy or 0.0)
        each, pooled = ranks_of_energy(parts, share), pooled_ranks_of_energy(parts, share)
        if parts.parameters(pooled) < parts.parameters(each):
            ranks, how = pooled, f"All layers together keep {share:.4g} of the energy"
        else:
            ranks, how = each, f"Each layer keeps {share:.4g} of its energy"
    weights, loss = cut(parts, ranks)
    return weights, loss, f"{how}: {size_sentence(parts, ranks)}"


def size_sentence(parts: DecomposedAdapter, ranks: Ranks) -> str:
    """What ranks make of a file's size, for a person."""
    before, after = parts.own_parameters(), max(1, parts.parameters(ranks))
    low, high = min(ranks.values()), max(ranks.values())
    gone = sum(rank == 0 for rank in ranks.values())
    span = f"rank {high}" if low == high else f"ranks {max(1, low)} to {high}"
    less = f", {gone} of {len(ranks)} layers are left out" if gone else ""
    return f"{span}{less}; {after:,} numbers in place of {before:,}."


def load_plain_lora(path: Path, known: Family | None) -> tuple[AdapterWeights, Family]:
    """A plain LoRA and the family that it is for.

    Raises:
        AdapterFileError: it is broken, of another kind, or nothing says its family.
    """
    updates, metadata, family = file_updates(path, known)
    layers = {key: update.low for key, update in updates.items() if update.low is not None}
    if len(layers) < len(updates) or needs_base(updates):
        kind = "DoRA" if needs_base(updates) else "LoHa or LoKr"
        raise AdapterFileError(
            f"{path} is a {kind}, which is a plain LoRA only to a rank: give --rank, such as 32."
        )
    return AdapterWeights(layers, metadata), family


def shrink_file(
    to: Rewrite, wish: ShrinkTarget, base: BaseWeights | None = None, note: Note | None = None
) -> list[str]:
    """Write a smaller adapter file.

    Args:
        to: from where, where to and how.
        wish: a rank or an energy; only a rank for a LoHa, a LoKr or a DoRA.
        base: that the file is for; a DoRA needs it, others only where the file does not say its family.
        note: called with (done, all) layers of a file whose decomposition takes long.

    Returns:
        What was done and what it cost, in sentences.

    Raises:
        LoraError: one sentence on what is wrong; nothing is written then.
    """
    check_out(to.out)
    known = base.family if base else None
    updates, metadata, family = file_updates(to.source, known)
    if wish.rank is not None and (needs_base(updates) or any(u.low is None for u in updates.values())):
        if needs_base(updates) and base is None:
            raise AdapterFileError(
                f"{to.source} is a DoRA, whose update depends on the weights of its base: give --base, the"
                " model that it was made for."
            )
        weights, loss = to_lora(updates, wish.rank, base.weight if base else None, note)
        weights, how = replace(weights, metadata=metadata), f"A plain LoRA of rank {wish.rank}."
    else:
        weights, loss, how = shrink_adapter(decompose(load_plain_lora(to.source, known)[0]), wish)
    asked = {"rank": wish.rank, "energy": wish.energy}
    to.write(weights, family, SHRUNK_KEY, {**asked, "error": loss.overall})
    out = extras_sentence(read_header(to.source).shapes)
    return [
        *([out] if out else []),
        how,
        error_sentence(loss),
        f"The file is {to.times_smaller:.1f} times smaller.",
    ]


def error_sentence(loss: TruncationLoss) -> str:
    """What a cut lost, for a person."""
    name, share = loss.worst
    if loss.overall < 1e-5:
        return "Nothing is lost."
    return (
        f"The update differs from the whole one by {loss.overall:.2%} of its norm; the worst layer, {name},"
        f" by {share:.2%}."
    )


# The intrinsic rank of an adapter: the lowest that keeps nearly all of what it gains, found by measuring.
#
# Energy says how much of the update is kept, not how much of its use: so the adapter is cut to a rank and
# measured again on the same fixed looks. A bisection over ranks takes few measurements, and each is paired
# with that of the whole adapter, so that the error of "keeps 99%" is far smaller than that of the gain
# itself. After one rank for all layers the pooled energies are tried (`shrink.pooled_ranks`), bisected over
# the number of columns that are kept; the smaller of the two files is the answer.
#
# A bisection takes it that what is kept grows with the rank. Where noise breaks that, it finds one crossing
# of the bar, and every rank that it proposes was measured and is above the bar.


KEEP = 0.99
"""The share of the gain that has to stay."""
_CLOSE = 1.05
"""The pooled bisection ends when the numbers of columns that do and do not suffice are within this factor."""


@dataclass(frozen=True)
class MeasuredCut:
    """An adapter cut to some ranks, measured.

    Attributes:
        ranks: by layer.
        parameters: how many numbers it has.
        gain: over the base.
        kept: the share of the whole adapter's gain.
        standard_error: of `kept`, from the paired differences, clustered by picture.
    """

    ranks: dict[LayerKey, int]
    parameters: int
    gain: float
    kept: float
    standard_error: float


@dataclass(frozen=True)
class IntrinsicRank:
    """What was found.

    Attributes:
        trained: the rank that the adapter has.
        rank: the lowest for all layers alike that keeps enough.
        uniform: the adapter at that rank.
        pooled: the smallest of pooled energies, None where that is no smaller.
        gain, standard_error: of the whole adapter.
        parameters: of the whole adapter.
        tried: each measurement, as {columns, kept, standard_error}, in order.
    """

    trained: int
    rank: int
    uniform: MeasuredCut
    pooled: MeasuredCut | None
    gain: float
    standard_error: float
    parameters: int
    tried: tuple[dict[str, float], ...]

    @property
    def best(self) -> MeasuredCut:
        """The smaller of the two."""
        return self.pooled or self.uniform

    def sentence(self, times_smaller: float) -> str:
        """For a person.

        Args:
            times_smaller: by which factor the file shrank.
        """
        best = self.best
        by_layer = self._by_layer() if self.pooled else ""
        unsure = (
            " The gain itself is within two standard errors of nothing, so take this with care."
            if self.gain < 2 * self.standard_error
            else ""
        )
        return (
            f"Trained at rank {self.trained}, needs {self.rank}{by_layer}, the file is"
            f" {times_smaller:.1f} times smaller and keeps {best.kept:.1%} of the gain (standard error"
            f" {best.standard_error:.1%}).{unsure}"
        )

    def _by_layer(self) -> str:
        """How the ranks differ between layers, for a sentence."""
        kept = [rank for rank in self.best.ranks.values() if rank]
        gone = len(self.best.ranks) - len(kept)
        span = f"ranks of {min(kept)} to {max(kept)} by layer" if min(kept) < max(kept) else f"rank {kept[0]}"
        left = f" and {gone} of {len(self.best.ranks)} layers left out" if gone else ""
        return f"; with {span}{left}"

    def document(self, times_smaller: float) -> dict[str, Any]:
        """For JSON.

        Args:
            times_smaller: by which factor the file shrank.
        """
        return {
            "trained": self.trained,
            "rank": self.rank,
            "kept": self.best.kept,
            "standard_error": self.best.standard_error,
            "times_smaller": times_smaller,
            "pooled": self.pooled is not None,
            "gain": self.gain,
            "gain_standard_error": self.standard_error,
            "ranks": [
                {"part": part, "module": module, "rank": rank}
                for (part, module), rank in self.best.ranks.items()
            ],
            "tried": list(self.tried),
            "sentence": self.sentence(times_smaller),
        }


class _Search:
    """Cuts an adapter and measures what is kept."""

    def __init__(self, parts: DecomposedAdapter, measured: MeasureGains) -> None:
        self.parts = parts
        self._measured = measured
        self.whole = measured([LoadedLora(parts.weights)])
        self.tried: list[dict[str, float]] = []

    def cut(self, ranks: dict[LayerKey, int]) -> MeasuredCut:
        gains = self._measured([LoadedLora(cut(self.parts, ranks)[0])])
        kept = float(gains.mean() / self.whole.mean())
        # The error of a ratio of paired means, to first order: that of gains - kept * whole over the whole.
        error = clustered_error(gains - kept * self.whole) / float(self.whole.mean())
        columns = sum(ranks.values())
        self.tried.append({"columns": columns, "kept": kept, "standard_error": error})
        return MeasuredCut(ranks, self.parts.parameters(ranks), float(gains.mean()), kept, error)


def intrinsic_rank(
    weights: AdapterWeights, measured: MeasureGains, keep: float = KEEP
) -> tuple[AdapterWeights, IntrinsicRank]:
    """The smallest cut of an adapter that keeps a share of its gain, and what was found on the way.

    Args:
        weights: a plain LoRA.
        measured: gives the gains of adapters, as `Bench.gains` does.
        keep: the share of the gain.

    Raises:
        AdapterFileError: the adapter gains nothing here, so that there is no gain to keep.
    """
    parts = decompose(weights)
    search = _Search(parts, measured)
    gain = float(search.whole.mean())
    error = clustered_error(search.whole)
    if not gain > 0:
        raise AdapterFileError(
            f"The adapter gains nothing on these pictures ({gain:+.4f}, standard error {error:.4f}), so there"
            " is no gain to keep; measure on pictures of what it was trained for, or give --rank."
        )
    trained = max(layer.rank for layer in weights.layers.values())
    whole = uniform_ranks(parts, trained)
    uncut = MeasuredCut(whole, parts.own_parameters(), gain, 1.0, 0.0)
    rank, uniform = _lowest_rank(search, trained, uncut, keep)
    pooled = _fewest_columns(search, uniform, keep)
    found = IntrinsicRank(
        trained, rank, uniform, pooled, gain, error, parts.own_parameters(), tuple(search.tried)
    )
    return cut(parts, found.best.ranks)[0], found


def _lowest_rank(search: _Search, trained: int, uncut: MeasuredCut, keep: float) -> tuple[int, MeasuredCut]:
    too_low, enough, best = 0, trained, uncut
    while enough - too_low > 1:
        rank = (too_low + enough) // 2
        found = search.cut(uniform_ranks(search.parts, rank))
        if found.kept >= keep:
            enough, best = rank, found
        else:
            too_low = rank
    return enough, best


def _fewest_columns(search: _Search, uniform: MeasuredCut, keep: float) -> MeasuredCut | None:
    """The smallest pooled cut, if it is smaller than the uniform one."""
    too_few, enough = 0, sum(uniform.ranks.values())
    best: MeasuredCut | None = None
    columns = _within(search.parts, enough, uniform.parameters)
    while columns > too_few:
        found = search.cut(pooled_ranks(search.parts, columns))
        if found.kept >= keep:
            enough, best = columns, found
        else:
            if best is None:
                return None
            too_few = columns
        if enough <= max(too_few + 1, too_few * _CLOSE):
            break
        columns = (too_few + enough) // 2
    return best


def _within(parts: DecomposedAdapter, columns: int, parameters: int) -> int:
    """The most columns, up to `columns`, whose pooled ranks have fewer than `parameters` numbers."""
    low, high = 0, columns
    while low < high:
        middle = (low + high + 1) // 2
        smaller = parts.parameters(pooled_ranks(parts, middle)) < parameters
        low, high = (middle, high) if smaller else (low, middle - 1)
    return low
