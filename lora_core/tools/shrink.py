"""Smaller adapters, and plain LoRAs of adapters of other kinds: each layer truncated to its leading triples.

How many triples each layer keeps follows from a rank (the same for all), from a share of the energy that each
layer has to keep, or from a share of the energy of all layers together ("pooled"): then the weakest triples
go first, wherever they are, so that for the same share fewer are kept in all. Which of the two shares makes
the smaller file depends on the layers' widths; both are computed and the smaller one is taken.

The intrinsic rank is the lowest one that keeps nearly all of what an adapter gains, found by measuring, since
energy says how much of the update is kept and not how much of its use. The adapter is truncated and measured
on the same draws, so that the error of "keeps 99%" is far smaller than that of the gain itself. A bisection
over ranks takes few measurements; then the pooled energies are bisected over the number of columns, and the
smaller of the two files wins. A bisection assumes that what is kept grows with the rank. Where noise breaks
that, it finds one crossing of the bar, and every rank that it proposes was measured and is above the bar.
"""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lora_core.errors import AdapterFileError, ConfigError
from lora_core.evaluate.validator import MeasureGains, clustered_error
from lora_core.formats.detect import extras_sentence
from lora_core.formats.layers import check_plain
from lora_core.lora.weights import AdapterWeights, LayerKey, LoadedLora
from lora_core.model_files.families import Family
from lora_core.model_files.header import read_header
from lora_core.tools.delta import (
    BaseWeights,
    Updates,
    check_rank_given,
    file_updates,
    load_plain_lora,
    needs_base,
    plain_layers,
)
from lora_core.tools.save import Rewrite, check_out
from lora_core.tools.svd import (
    OnLayer,
    Pair,
    Triples,
    TruncationLoss,
    adapter_from_pairs,
    check_rank,
    low_rank_pair,
    rank_of_energy,
    singular_triples,
    split_triples,
    truncate_pair,
)

SHRUNK_KEY = "lora_easel.shrunk"
"""Our own key of a header: what was truncated, as JSON."""

Ranks = Mapping[LayerKey, int]


# Adapters of other kinds as a plain LoRA.


def to_lora(
    updates: Updates, rank: int, base: BaseWeights | None = None, on_layer: OnLayer | None = None
) -> tuple[AdapterWeights, TruncationLoss]:
    """The plain LoRA of a rank that is closest to the updates, in fp32 with one alpha, and its error.

    A LoHa, a LoKr or a DoRA has no low rank by construction, so a plain LoRA comes close and is not the same.

    Args:
        updates: by layer.
        rank: of each layer; one that has a lower rank by construction keeps its own.
        base: only needed for a DoRA, see `delta.needs_base`.
        on_layer: called after each layer.

    Raises:
        ConfigError: the rank is out of range.
        AdapterFileError: an update is not finite, or does not fit the base.
        ModelFileError: the base has no such layer.
    """
    check_rank(rank)
    loss = TruncationLoss()
    pairs: dict[LayerKey, Pair] = {}
    for done, (key, update) in enumerate(updates.items(), 1):
        factors = update.factors() if update.magnitude is None else None
        if factors is not None:
            pairs[key], norm, lost = truncate_pair(factors, rank)
        else:
            weight = base.weight(key) if update.magnitude is not None and base else None
            pairs[key], norm, lost = low_rank_pair(update.delta(weight), rank)
        if not (norm < float("inf")):
            raise AdapterFileError(f"The update of {update.name} holds numbers that are not finite.")
        loss.layers[key] = (norm, lost)
        if on_layer is not None:
            on_layer(done, len(updates))
    return adapter_from_pairs(pairs), loss


def file_to_lora(
    path: Path, updates: Updates, rank: int | None, base: BaseWeights | None, on_layer: OnLayer | None
) -> tuple[AdapterWeights, TruncationLoss]:
    """`to_lora` for the updates of a file.

    Raises:
        AdapterFileError: there is no rank, or a DoRA is given without its base.
    """
    rank = check_rank_given(path, updates, rank)
    if needs_base(updates) and base is None:
        raise AdapterFileError(
            f"{path} is a DoRA, whose update depends on the weights of its base: give --base, the model that"
            " it was made for."
        )
    return to_lora(updates, rank, base, on_layer)


# Truncation to a rank or an energy.


@dataclass(frozen=True)
class DecomposedAdapter:
    """An adapter with the singular triples of each layer, from which any truncation is quickly made."""

    weights: AdapterWeights
    triples: dict[LayerKey, Triples]

    def parameters(self, ranks: Ranks) -> int:
        """The number of parameters at these ranks."""
        sizes = {key: t.u.shape[0] + t.v.shape[0] for key, t in self.triples.items()}
        return sum(rank * sizes[key] for key, rank in ranks.items())

    def own_parameters(self) -> int:
        """The number of parameters as it is."""
        return sum(layer.up.numel() + layer.down.numel() for layer in self.weights.layers.values())


def decompose(weights: AdapterWeights) -> DecomposedAdapter:
    """The singular triples of each layer; vectors in fp32, the precision of an adapter.

    Raises:
        AdapterFileError: it is no plain LoRA.
    """
    check_plain(weights)
    found = {}
    for key, layer in weights.layers.items():
        triples = singular_triples((layer.scale * layer.up.double().flatten(1), layer.down.flatten(1)))
        triples = triples.leading(min(layer.rank, len(triples.values)))
        found[key] = Triples(triples.u.float(), triples.values, triples.v.float())
    return DecomposedAdapter(weights, found)


def truncate_to_ranks(parts: DecomposedAdapter, ranks: Ranks) -> tuple[AdapterWeights, TruncationLoss]:
    """The best adapter of these ranks in fp32 with one alpha, and its error; rank 0 leaves a layer out.

    Raises:
        AdapterFileError: nothing is left.
    """
    loss = TruncationLoss()
    pairs: dict[LayerKey, Pair] = {}
    for key, triples in parts.triples.items():
        rank = min(ranks.get(key, 0), len(triples.values))
        squares = triples.values.square()
        loss.layers[key] = (float(squares.sum()), float(squares[rank:].sum()))
        if rank > 0:
            kept = Triples(triples.u.double(), triples.values, triples.v.double()).leading(rank)
            up, down = split_triples(kept, parts.weights.layers[key].down.shape[1:])
            pairs[key] = up, down.float()
    if not pairs:
        raise AdapterFileError("The adapter changes nothing, so there is nothing to cut.")
    return replace(adapter_from_pairs(pairs), metadata=parts.weights.metadata), loss


def uniform_ranks(parts: DecomposedAdapter, rank: int) -> dict[LayerKey, int]:
    """The same rank for every layer that has as much."""
    return {key: min(rank, _num_nonzero(triples.values)) for key, triples in parts.triples.items()}


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


def _num_nonzero(values: torch.Tensor) -> int:
    """The number of values that exceed the rounding of double precision."""
    return int((values > 1e-12 * values[0]).sum()) if float(values[0]) > 0 else 0


@dataclass(frozen=True)
class ShrinkTarget:
    """How small: a rank for all layers, or a share of the energy; exactly one of the two."""

    rank: int | None = None
    energy: float | None = None

    def check(self) -> None:
        """Raise a ConfigError for a rank or an energy that is out of range."""
        if self.rank is not None:
            check_rank(self.rank)
        elif not 0 < (self.energy or 0.0) <= 1:
            raise ConfigError(f"--energy {self.energy or 0.0:g} is out of range; it is a share such as 0.99.")


def shrink_adapter(
    parts: DecomposedAdapter, target: ShrinkTarget
) -> tuple[AdapterWeights, TruncationLoss, str]:
    """A smaller adapter, its error, and how its ranks were chosen, in a sentence.

    Raises:
        ConfigError: the rank or the energy is out of range.
        AdapterFileError: the adapter changes nothing.
    """
    target.check()
    if target.rank is not None:
        ranks, how = uniform_ranks(parts, target.rank), f"Each layer keeps rank {target.rank}"
    else:
        share = target.energy or 0.0
        each, pooled = ranks_of_energy(parts, share), pooled_ranks_of_energy(parts, share)
        if parts.parameters(pooled) < parts.parameters(each):
            ranks, how = pooled, f"All layers together keep {share:.4g} of the energy"
        else:
            ranks, how = each, f"Each layer keeps {share:.4g} of its energy"
    weights, loss = truncate_to_ranks(parts, ranks)
    return weights, loss, f"{how}: {_size_sentence(parts, ranks)}"


def _size_sentence(parts: DecomposedAdapter, ranks: Ranks) -> str:
    before, after = parts.own_parameters(), max(1, parts.parameters(ranks))
    low, high = min(ranks.values()), max(ranks.values())
    gone = sum(rank == 0 for rank in ranks.values())
    span = f"rank {high}" if low == high else f"ranks {max(1, low)} to {high}"
    less = f", {gone} of {len(ranks)} layers are left out" if gone else ""
    return f"{span}{less}; {after:,} numbers in place of {before:,}."


def shrink_file(
    to: Rewrite, target: ShrinkTarget, base: BaseWeights | None = None, on_layer: OnLayer | None = None
) -> list[str]:
    """Write a smaller adapter file.

    Args:
        to: the files.
        target: a rank or an energy; only a rank for a LoHa, a LoKr or a DoRA.
        base: that the file is for; a DoRA needs it, others only where the file does not name its family.
        on_layer: called for a file whose decomposition takes long.

    Returns:
        What was done and what it cost, in sentences.

    Raises:
        LoraError: one sentence on what is wrong; nothing is written then.
    """
    check_out(to.out)
    updates, metadata, family = file_updates(to.source, base.family if base else None)
    layers = plain_layers(updates)
    if layers is None:
        weights, loss = file_to_lora(to.source, updates, target.rank, base, on_layer)
        weights, how = replace(weights, metadata=metadata), f"A plain LoRA of rank {target.rank}."
    else:
        weights, loss, how = shrink_adapter(decompose(AdapterWeights(layers, metadata)), target)
    record = {"rank": target.rank, "energy": target.energy, "error": loss.overall}
    to.save(weights, family, SHRUNK_KEY, record)
    extras = extras_sentence(read_header(to.source).shapes)
    smaller = f"The file is {to.times_smaller:.1f} times smaller."
    return [*([extras] if extras else []), how, loss.sentence(), smaller]


def truncate_file(to: Rewrite, known: Family | None, ranks: Ranks, record: Mapping[str, Any]) -> str:
    """Write an adapter truncated to the ranks that `measure_rank` found for it.

    Args:
        to: the files.
        known: the family of the base, if there is one.
        ranks: by layer.
        record: for the header.

    Returns:
        What was done, in a sentence.

    Raises:
        AdapterFileError: it is no plain LoRA, or cannot be written.
    """
    weights, family = load_plain_lora(to.source, known)
    to.save(truncate_to_ranks(decompose(weights), ranks)[0], family, SHRUNK_KEY, record)
    return f"The file is {to.times_smaller:.1f} times smaller."


# The intrinsic rank.

KEEP = 0.99
"""The share of the gain that has to stay."""
_CLOSE = 1.05
"""The pooled bisection ends when the numbers of columns that do and do not suffice are within this factor."""


@dataclass(frozen=True)
class MeasuredCut:
    """A truncated adapter, measured.

    Attributes:
        ranks: by layer.
        parameters: how many it has.
        gain: over the base.
        kept: the share of the full adapter's gain.
        standard_error: of `kept`, from the paired differences, clustered by image.
    """

    ranks: dict[LayerKey, int]
    parameters: int
    gain: float
    kept: float
    standard_error: float


@dataclass(frozen=True)
class IntrinsicRank:
    """The intrinsic rank of an adapter.

    Attributes:
        trained: the rank that the adapter has.
        rank: the lowest one for all layers alike that keeps enough.
        uniform: the adapter at that rank.
        pooled: the smallest of pooled energies; None where that is no smaller.
        gain, standard_error: of the full adapter.
        tried: each measurement, as {columns, kept, standard_error}, in order.
    """

    trained: int
    rank: int
    uniform: MeasuredCut
    pooled: MeasuredCut | None
    gain: float
    standard_error: float
    tried: tuple[dict[str, float], ...]

    @property
    def best(self) -> MeasuredCut:
        """The smaller of the two."""
        return self.pooled or self.uniform

    def sentence(self, times_smaller: float) -> str:
        """The result in words; `times_smaller` is the factor by which the file shrank."""
        best = self.best
        by_layer = self._ranks_words() if self.pooled else ""
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

    def _ranks_words(self) -> str:
        kept = [rank for rank in self.best.ranks.values() if rank]
        gone = len(self.best.ranks) - len(kept)
        span = f"ranks of {min(kept)} to {max(kept)} by layer" if min(kept) < max(kept) else f"rank {kept[0]}"
        left = f" and {gone} of {len(self.best.ranks)} layers left out" if gone else ""
        return f"; with {span}{left}"

    def document(self, times_smaller: float) -> dict[str, Any]:
        """The result for JSON; `times_smaller` is the factor by which the file shrank."""
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


class _RankSearch:
    """Truncates an adapter and measures what is kept."""

    def __init__(self, parts: DecomposedAdapter, measure: MeasureGains) -> None:
        self.parts = parts
        self._measure = measure
        self.full = measure([LoadedLora(parts.weights)])
        self.tried: list[dict[str, float]] = []

    def measure(self, ranks: dict[LayerKey, int]) -> MeasuredCut:
        gains = self._measure([LoadedLora(truncate_to_ranks(self.parts, ranks)[0])])
        kept = float(gains.mean() / self.full.mean())
        # The error of a ratio of paired means, to first order: that of gains - kept * full over the full one.
        error = clustered_error(gains - kept * self.full) / float(self.full.mean())
        self.tried.append({"columns": sum(ranks.values()), "kept": kept, "standard_error": error})
        return MeasuredCut(ranks, self.parts.parameters(ranks), float(gains.mean()), kept, error)

    def lowest_rank(self, trained: int, full: MeasuredCut, keep: float) -> tuple[int, MeasuredCut]:
        """The lowest rank for all layers that keeps enough."""
        too_low, enough, best = 0, trained, full
        while enough - too_low > 1:
            rank = (too_low + enough) // 2
            found = self.measure(uniform_ranks(self.parts, rank))
            if found.kept >= keep:
                enough, best = rank, found
            else:
                too_low = rank
        return enough, best

    def fewest_columns(self, uniform: MeasuredCut, keep: float) -> MeasuredCut | None:
        """The smallest pooled truncation, if it is smaller than the uniform one."""
        too_few, enough = 0, sum(uniform.ranks.values())
        best: MeasuredCut | None = None
        columns = _most_columns(self.parts, enough, uniform.parameters)
        while columns > too_few:
            found = self.measure(pooled_ranks(self.parts, columns))
            if found.kept >= keep:
                enough, best = columns, found
            elif best is None:
                return None
            else:
                too_few = columns
            if enough <= max(too_few + 1, too_few * _CLOSE):
                break
            columns = (too_few + enough) // 2
        return best


def _most_columns(parts: DecomposedAdapter, columns: int, parameters: int) -> int:
    """The most columns, up to `columns`, whose pooled ranks have fewer than `parameters` parameters."""
    low, high = 0, columns
    while low < high:
        middle = (low + high + 1) // 2
        smaller = parts.parameters(pooled_ranks(parts, middle)) < parameters
        low, high = (middle, high) if smaller else (low, middle - 1)
    return low


def intrinsic_rank(
    weights: AdapterWeights, measure: MeasureGains, keep: float = KEEP
) -> tuple[AdapterWeights, IntrinsicRank]:
    """The smallest truncation of a plain LoRA that keeps a share of its gain, and how it was found.

    Raises:
        AdapterFileError: the adapter gains nothing here, so there is no gain to keep.
    """
    parts = decompose(weights)
    search = _RankSearch(parts, measure)
    gain, error = float(search.full.mean()), clustered_error(search.full)
    if not gain > 0:
        raise AdapterFileError(
            f"The adapter gains nothing on these pictures ({gain:+.4f}, standard error {error:.4f}), so there"
            " is no gain to keep; measure on pictures of what it was trained for, or give --rank."
        )
    trained = max(layer.rank for layer in weights.layers.values())
    full = MeasuredCut(uniform_ranks(parts, trained), parts.own_parameters(), gain, 1.0, 0.0)
    rank, uniform = search.lowest_rank(trained, full, keep)
    pooled = search.fewest_columns(uniform, keep)
    found = IntrinsicRank(trained, rank, uniform, pooled, gain, error, tuple(search.tried))
    return truncate_to_ranks(parts, found.best.ranks)[0], found


def measure_rank(file: Path, family: Family, measure: MeasureGains) -> dict[str, Any]:
    """The intrinsic rank of an adapter file, and by how much the smaller file would be smaller.

    Returns:
        The document of `shrink --intrinsic --json`; `ranks` by layer is what `truncate_file` takes.

    Raises:
        AdapterFileError: it is no plain LoRA, or gains nothing on these images.
    """
    weights, known = load_plain_lora(file, family)
    smaller, found = intrinsic_rank(weights, measure)
    with tempfile.TemporaryDirectory() as folder:
        to = Rewrite(file, Path(folder) / file.name, "", time.time())
        to.save(smaller, known, SHRUNK_KEY, {"intrinsic": found.rank})
        times = to.times_smaller
    return {**found.document(times), "sentences": [found.sentence(times)]}
