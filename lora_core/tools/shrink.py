"""Smaller adapters, plain LoRAs of adapters of other kinds, and LoRAs extracted from fine-tuned models.

How many singular triples each layer keeps follows from a rank (the same for all), from a share of the energy
that each layer has to keep, or from a share of the energy of all layers together ("pooled"): then the weakest
triples go first, wherever they are, so that for the same share fewer are kept in all. Which of the two shares
makes the smaller file depends on the layers' widths; both are computed and the smaller one is taken.
"""

import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_core.errors import AdapterFileError, ConfigError, ModelFileError, count_words
from lora_core.evaluate.validator import CLEARLY, MeasureGains, clustered_error
from lora_core.formats.io import load_adapter, save_adapter
from lora_core.formats.kinds import extras_sentence, file_format, require_family
from lora_core.formats.layers import check_plain, reshape_adapter
from lora_core.lora.weights import AdapterWeights, LayerKey, LoadedLora
from lora_core.model_files.detect import base_layout, family_layout
from lora_core.model_files.families import Family, named_targets
from lora_core.model_files.header import read_header
from lora_core.tools.delta import BaseWeights, Rewrite, Updates, check_out, file_updates, titles
from lora_core.tools.svd import (
    OnLayer,
    Pair,
    Triples,
    TruncationLoss,
    adapter_from_pairs,
    check_rank,
    counted,
    low_rank_pair,
    rank_of_energy,
    singular_triples,
    split_triples,
    truncate_pair,
)

SHRUNK_KEY = "lora_easel.shrunk"
"""Our own key of a header: the truncation, as JSON."""

Ranks = Mapping[LayerKey, int]


# Adapters of other kinds as a plain LoRA.


def to_lora(
    updates: Updates, rank: int, base: BaseWeights | None = None, on_layer: OnLayer | None = None
) -> tuple[AdapterWeights, TruncationLoss]:
    """The plain LoRA of a rank that is closest to the updates, in fp32 with one alpha, and its error.

    A LoHa, a LoKr, an OFT or a DoRA has no low rank by construction, so a plain LoRA comes close and is not
    the same.

    Args:
        rank: of each layer; one that has a lower rank by construction keeps its own.
        base: only needed for a DoRA and an OFT.

    Raises:
        ConfigError: the rank is out of range.
        AdapterFileError: an update is not finite, or does not fit the base.
        ModelFileError: the base has no such layer.
    """
    check_rank(rank)
    loss = TruncationLoss()
    pairs: dict[LayerKey, Pair] = {}
    for key, update in counted(updates.items(), on_layer):
        factors = None if update.needs_base else update.factors()
        if factors is not None:
            pairs[key], norm, lost = truncate_pair(factors, rank)
        else:
            weight = base.weight(key) if update.needs_base and base else None
            delta = update.delta(weight)
            if not torch.isfinite(delta).all():
                raise AdapterFileError(f"The update of {update.name} holds numbers that are not finite.")
            pairs[key], norm, lost, _ = low_rank_pair(delta, rank)
        loss.layers[key] = (norm, lost)
    return adapter_from_pairs(pairs), loss


def plain_lora(
    path: Path, updates: Updates, rank: int | None = None, base: BaseWeights | None = None,
    on_layer: OnLayer | None = None,
) -> tuple[AdapterWeights, TruncationLoss | None]:  # fmt: skip
    """The plain LoRA in a file, as it is, or `to_lora` of another kind, with its error.

    Raises:
        AdapterFileError: it is of another kind and no rank is given, or it needs its base and none is given.
    """
    of_base = any(update.needs_base for update in updates.values())
    layers = {key: update.low for key, update in updates.items() if update.low is not None}
    if len(layers) == len(updates) and not of_base:
        return AdapterWeights(layers), None
    dora = any(update.magnitude is not None for update in updates.values())
    kind = "a DoRA" if dora else "an OFT" if of_base else "a LoHa or LoKr"
    if rank is None:
        raise AdapterFileError(
            f"{path} is {kind}, which is a plain LoRA only to a rank: give --rank, such as 32."
        )
    if of_base and base is None:
        raise AdapterFileError(
            f"{path} is {kind}, whose update depends on the weights of its base: give --base, the model that"
            " it was made for."
        )
    return to_lora(updates, rank, base, on_layer)


def load_plain_lora(path: Path, known: Family | None) -> tuple[AdapterWeights, Family]:
    """A plain LoRA with its new tokens, and the family that it is for.

    Raises:
        AdapterFileError: it is broken, of another kind, or does not name its family.
    """
    weights, header = load_adapter(path, known), read_header(path)
    family = known or require_family(path, header.shapes, header.metadata, "it cannot be used")
    return reshape_adapter(weights, family), family


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
        AdapterFileError: it is not a plain LoRA.
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
    own = parts.weights
    return replace(adapter_from_pairs(pairs), metadata=own.metadata, tokens=own.tokens), loss


def uniform_ranks(parts: DecomposedAdapter, rank: int) -> dict[LayerKey, int]:
    """The same rank for every layer that has as much, up to the rounding of double precision."""
    return {key: min(rank, int((t.values > 1e-12 * t.values[0]).sum())) for key, t in parts.triples.items()}


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


def check_target(rank: int | None, energy: float | None) -> None:
    """Raise a ConfigError for a rank or a share of the energy that is out of range, or none or both."""
    if (rank is None) == (energy is None):
        raise ConfigError("Give either a rank or a share of the energy to keep, such as 8 or 0.99.")
    if rank is not None:
        check_rank(rank)
    elif not 0 < (energy or 0.0) <= 1:
        raise ConfigError(f"--energy {energy or 0.0:g} is out of range; it is a share such as 0.99.")


def shrink_adapter(
    parts: DecomposedAdapter, rank: int | None = None, energy: float | None = None
) -> tuple[AdapterWeights, TruncationLoss, str]:
    """A smaller adapter, its error, and how its ranks were chosen, in a sentence.

    Args:
        rank: of all layers.
        energy: without a rank, the share of it to keep.

    Raises:
        ConfigError: the rank or the energy is out of range.
        AdapterFileError: the adapter changes nothing.
    """
    check_target(rank, energy)
    if rank is not None:
        ranks, how = uniform_ranks(parts, rank), f"Each layer keeps rank {rank}"
    else:
        share = energy or 0.0
        each, pooled = ranks_of_energy(parts, share), pooled_ranks_of_energy(parts, share)
        if parts.parameters(pooled) < parts.parameters(each):
            ranks, how = pooled, f"All layers together keep {share:.4g} of the energy"
        else:
            ranks, how = each, f"Each layer keeps {share:.4g} of its energy"
    weights, loss = truncate_to_ranks(parts, ranks)
    kept = [rank for rank in ranks.values() if rank]
    gone = len(ranks) - len(kept)
    less = f", {gone} of {len(ranks)} layers are left out" if gone else ""
    numbers = f"{parts.parameters(ranks):,} numbers in place of {parts.own_parameters():,}"
    return weights, loss, f"{how}: {rank_words(kept)}{less}; {numbers}."


def rank_words(ranks: Iterable[int]) -> str:
    """The ranks of some layers, in words."""
    low, high = min(ranks := list(ranks)), max(ranks)
    return f"rank {low}" if low == high else f"ranks {low} to {high}"


def shrink_file(
    to: Rewrite, rank: int | None = None, energy: float | None = None, base: BaseWeights | None = None,
    on_layer: OnLayer | None = None,
) -> list[str]:  # fmt: skip
    """Write a smaller adapter file.

    Args:
        rank: of all layers.
        energy: without a rank, the share of it to keep; not for a LoHa, a LoKr, an OFT or a DoRA.
        base: that the file is for; a DoRA and an OFT need it, others only where the file does not name its
            family.
        on_layer: called for a file whose decomposition takes long.

    Returns:
        The operation and its cost, in sentences.

    Raises:
        LoraError: one sentence on the problem; nothing is written then.
    """
    check_out(to.out)
    updates, metadata, family = file_updates(to.source, base.family if base else None)
    weights, loss = plain_lora(to.source, updates, rank, base, on_layer)
    how = f"A plain LoRA of rank {rank}."
    if loss is None:
        weights, loss, how = shrink_adapter(decompose(weights), rank, energy)
    record = {"rank": rank, "energy": energy, "error": loss.overall}
    shapes, tokens = read_header(to.source).shapes, load_adapter(to.source, family, plain=False).tokens
    to.save(replace(weights, metadata=metadata, tokens=tokens), family, SHRUNK_KEY, record)
    extras = extras_sentence(shapes, file_format(shapes) != "diffusers")
    return [*([extras] if extras else []), how, loss.sentence(), to.size_sentence]


def truncate_file(to: Rewrite, known: Family | None, ranks: Ranks, record: Mapping[str, Any]) -> str:
    """Write an adapter truncated to the ranks that `measure_rank` found for it.

    Returns:
        A summary, one sentence.

    Raises:
        AdapterFileError: it is not a plain LoRA, or cannot be written.
    """
    check_out(to.out)
    weights, family = load_plain_lora(to.source, known)
    to.save(truncate_to_ranks(decompose(weights), ranks)[0], family, SHRUNK_KEY, record)
    return to.size_sentence


# The intrinsic rank: the lowest one that keeps nearly all of what an adapter gains, found by measuring, since
# energy says how much of the update is kept and not how much of its use. The adapter is truncated and
# measured on the same draws, so that the error of "keeps 99%" is far smaller than that of the gain itself. A
# bisection over ranks takes few measurements; then the pooled energies are bisected over the number of
# columns, and the smaller of the two files wins. A bisection assumes that the kept gain grows with the rank.
# Where noise breaks that, it finds one crossing of the bar, and every rank that it proposes was measured and
# is above the bar.

KEEP = 0.99
"""The share of the gain that has to stay."""
_CLOSE, _NEAR = 1.05, 1.15
"""A pooled bisection ends when the numbers of columns that do and do not suffice are within this factor; the
second one at the end of a run, which has less time."""
_MORE = 1.25


class MeasuredCut(NamedTuple):
    """A truncated adapter, measured: ranks by layer, number of parameters, the share of the full adapter's
    gain that is kept, and its standard error from the paired differences, clustered by image."""

    ranks: dict[LayerKey, int]
    parameters: int
    kept: float = 1.0
    standard_error: float = 0.0


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
    tried: list[dict[str, float]]

    @property
    def best(self) -> MeasuredCut:
        """The smaller of the two."""
        return self.pooled or self.uniform

    def document(self, times_smaller: float) -> dict[str, Any]:
        """The result for JSON; `times_smaller` is the factor by which the file shrank."""
        best, by_layer, unsure = self.best, "", ""
        if self.pooled:
            kept = [rank for rank in best.ranks.values() if rank]
            gone = len(best.ranks) - len(kept)
            left = f" and {gone} of {len(best.ranks)} layers left out" if gone else ""
            words = f"ranks of {min(kept)} to {max(kept)} by layer"
            by_layer = f"; with {words if min(kept) < max(kept) else f'rank {kept[0]}'}{left}"
        if self.gain < 2 * self.standard_error:
            unsure = " The gain itself is within two standard errors of nothing, so take this with care."
        sentence = (
            f"Trained at rank {self.trained}, needs {self.rank}{by_layer}, the file is"
            f" {times_smaller:.1f} times smaller and keeps {best.kept:.1%} of the gain (standard error"
            f" {best.standard_error:.1%}).{unsure}"
        )
        rows = [{"part": part, "module": module, "rank": r} for (part, module), r in best.ranks.items()]
        return {
            "trained": self.trained, "rank": self.rank, "kept": best.kept,
            "standard_error": best.standard_error, "times_smaller": times_smaller,
            "pooled": self.pooled is not None, "gain": self.gain, "gain_standard_error": self.standard_error,
            "ranks": rows, "tried": self.tried, "sentence": sentence,
        }  # fmt: skip


def intrinsic_rank(
    weights: AdapterWeights, measure: MeasureGains, keep: float = KEEP
) -> tuple[AdapterWeights, IntrinsicRank]:
    """The smallest truncation of a plain LoRA that keeps a share of its gain, and how it was found.

    Raises:
        AdapterFileError: the adapter gains nothing here.
    """
    parts = decompose(weights)
    gain, error, measured = _measured_cuts(parts, measure)
    if not gain > 0:
        raise AdapterFileError(
            f"The adapter gains nothing on these images ({gain:+.4f}, standard error {error:.4f}), so there"
            " is no gain to keep; measure on images of what it was trained for, or give --rank."
        )
    tried: list[dict[str, float]] = []

    def cut(ranks: dict[LayerKey, int]) -> MeasuredCut:
        found = measured(ranks)
        tried.append(
            {"columns": sum(ranks.values()), "kept": found.kept, "standard_error": found.standard_error}
        )
        return found

    trained = weights.highest_rank
    uniform = MeasuredCut(uniform_ranks(parts, trained), parts.own_parameters())
    too_low, rank = 0, trained
    while rank - too_low > 1:
        middle = (too_low + rank) // 2
        found = cut(uniform_ranks(parts, middle))
        if found.kept >= keep:
            rank, uniform = middle, found
        else:
            too_low = middle
    pooled = _pooled_cut(parts, cut, uniform, keep)
    result = IntrinsicRank(trained, rank, uniform, pooled, gain, error, tried)
    return truncate_to_ranks(parts, result.best.ranks)[0], result


def _measured_cuts(
    parts: DecomposedAdapter, measure: MeasureGains
) -> tuple[float, float, Callable[[dict[LayerKey, int]], MeasuredCut]]:
    """The gain of an adapter, its standard error, and what measures it cut to ranks."""
    full = measure([LoadedLora(parts.weights)])
    gain = float(full.mean())

    def cut(ranks: dict[LayerKey, int]) -> MeasuredCut:
        gains = measure([LoadedLora(truncate_to_ranks(parts, ranks)[0])])
        kept = float(gains.mean()) / gain
        # The error of a ratio of paired means, to first order: that of gains - kept * full over the full one.
        error = clustered_error(gains - kept * full) / abs(gain)
        return MeasuredCut(ranks, parts.parameters(ranks), kept, error)

    return gain, clustered_error(full), cut


def automatic_ranks(
    weights: AdapterWeights, choose: MeasureGains, confirm: MeasureGains, keep: float = KEEP
) -> MeasuredCut | None:
    """A small truncation of a plain LoRA that keeps a share of its gain, found in about five measurements.

    The largest singular values of all layers together are kept; their number is bisected on a logarithmic
    scale. It suffices if the kept gain exceeds the share by its standard error. The smallest that is enough
    is measured again, on the draws of `confirm`, which had no say in the choice; while it falls short there,
    a quarter more are kept.

    Returns:
        The truncation as `confirm` measured it; None where the gain is within two errors of nothing.
    """
    parts = decompose(weights)
    gain, error, cut = _measured_cuts(parts, choose)
    if not gain > CLEARLY * error:
        return None
    everything = uniform_ranks(parts, weights.highest_rank)
    most = high = sum(everything.values())
    low = max(1, len(parts.triples) // 4)
    while high > low * _NEAR and low < (columns := round(math.sqrt(low * high))) < high:
        found = cut(pooled_ranks(parts, columns))
        if found.kept - found.standard_error >= keep:
            high = columns
        else:
            low = columns
    again = _measured_cuts(parts, confirm)[2] if high < most else cut
    while high < most:
        found = again(pooled_ranks(parts, high))
        if found.kept >= keep:
            return found
        high = math.ceil(_MORE * high)
    return MeasuredCut(everything, parts.own_parameters())


def _pooled_cut(
    parts: DecomposedAdapter,
    cut: Callable[[dict[LayerKey, int]], MeasuredCut],
    uniform: MeasuredCut,
    keep: float,
) -> MeasuredCut | None:
    """The smallest pooled truncation that keeps enough, if it is smaller than the uniform one."""
    # The most columns with fewer parameters than the uniform truncation.
    columns, high = 0, sum(uniform.ranks.values())
    enough = high
    while columns < high:
        middle = (columns + high + 1) // 2
        smaller = parts.parameters(pooled_ranks(parts, middle)) < uniform.parameters
        columns, high = (middle, high) if smaller else (columns, middle - 1)
    too_few, best = 0, None
    while columns > too_few:
        found = cut(pooled_ranks(parts, columns))
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


def shrink_to_intrinsic(to: Rewrite, known: Family, measure: MeasureGains) -> dict[str, Any]:
    """Write the smallest truncation of an adapter file that keeps nearly all of its gain.

    Returns:
        The document of `shrink --intrinsic --json`; `ranks` by layer are for `truncate_file`.

    Raises:
        AdapterFileError: it is not a plain LoRA, gains nothing on these images, or cannot be written.
    """
    weights, family = load_plain_lora(to.source, known)
    smaller, found = intrinsic_rank(weights, measure)
    record = {"intrinsic": found.rank, "kept": found.best.kept, "standard_error": found.best.standard_error}
    to.save(smaller, family, SHRUNK_KEY, record)
    document = found.document(to.times_smaller)
    return {**document, "sentences": [document["sentence"]]}


def measure_rank(file: Path, family: Family, measure: MeasureGains) -> dict[str, Any]:
    """What `shrink_to_intrinsic` would do; nothing is kept of the file."""
    with tempfile.TemporaryDirectory() as folder:
        return shrink_to_intrinsic(Rewrite(file, Path(folder) / file.name), family, measure)


# Extraction: for each layer the best update of a rank to W_tuned - W_base. Both models are read layer by
# layer, so that two layers are in memory at a time. For a share of the energy the number of random probes
# doubles until they hold it. The leading singular values are known for every layer and the total energy is
# known exactly, so the spectrum also suggests a rank.

EXTRACTED_KEY = "lora_easel.extracted"
"""Our own key of a header: how it was extracted, as JSON."""
_ROUNDING = 0.5
"""Differences below this share of the dtype's epsilon are rounding."""


@dataclass
class Spectra:
    """The singular values of the differences, as far as they are known.

    Attributes:
        squares: by layer the leading squared singular values, descending.
        energies: by layer the total sum of squares.
        outside: the sum of squares in layers that no LoRA target includes.
    """

    squares: dict[LayerKey, torch.Tensor] = field(default_factory=dict)
    energies: dict[LayerKey, float] = field(default_factory=dict)
    outside: float = 0.0

    def rank_for(self, share: float) -> int | None:
        """The lowest rank for all layers that keeps a share of all energy; None if that is not known."""
        deepest = max(map(len, self.squares.values()))
        kept = torch.zeros(deepest, dtype=torch.float64)
        for squares in self.squares.values():
            sums = squares.cumsum(0)
            kept += torch.cat([sums, sums[-1:].expand(deepest - len(sums))])
        rank = int((kept < share * sum(self.energies.values()) * (1 - 1e-9)).sum()) + 1
        known = all(
            len(s) >= rank or float(s.sum()) >= self.energies[k] * (1 - 1e-6) for k, s in self.squares.items()
        )
        return rank if rank <= deepest and known else None

    def sentence(self) -> str:
        """The rank that the spectrum suggests, in words."""
        found = {share: self.rank_for(share) for share in (0.9, 0.99)}
        words = [f"rank {rank} would hold {share:.0%} of the change" for share, rank in found.items() if rank]
        known = max(map(len, self.squares.values()))
        if not words:
            return f"The change is of high rank: {known} does not hold 90% of it."
        more = "" if found[0.99] else f"; {known} does not hold 99%"
        return f"R{' and '.join(words)[1:]}{more}."


def extract_lora(
    tuned: BaseWeights, base: BaseWeights, rank: int | None = None, energy: float | None = None,
    on_layer: OnLayer | None = None,
) -> tuple[AdapterWeights, TruncationLoss, Spectra]:  # fmt: skip
    """The LoRA between two models, in fp32 with one alpha; its error, and the spectra.

    Args:
        tuned: the fine-tuned model.
        base: the model that it was tuned from.
        rank: of all layers.
        energy: without a rank, the share of it to keep of each layer.

    Raises:
        ConfigError: the rank or the energy is out of range.
        ModelFileError: the two are of different kinds or widths, or do not differ.
    """
    check_target(rank, energy)
    if tuned.family.title != base.family.title:
        raise ModelFileError(
            f"{tuned.path} is of the kind {tuned.family.title} and {base.path} of {base.family.title}; give"
            " the base that it was made from."
        )
    loss, spectra = TruncationLoss(), Spectra()
    pairs: dict[LayerKey, Pair] = {}
    for key, delta in _differences(tuned, base, spectra, on_layer):
        found = low_rank_pair(delta, rank, energy or 0.0)
        pairs[key], spectra.energies[key], lost, spectra.squares[key] = found
        loss.layers[key] = (spectra.energies[key], lost)
    if not pairs:
        raise ModelFileError(
            f"{tuned.path} has the weights of {base.path} in every layer that a LoRA reaches; there is"
            " nothing to extract."
        )
    return adapter_from_pairs(pairs), loss, spectra


def _differences(
    tuned: BaseWeights, base: BaseWeights, spectra: Spectra, on_layer: OnLayer | None
) -> Iterator[tuple[LayerKey, torch.Tensor]]:
    """The layers that differ by more than rounding, with their differences in fp32."""
    layout = family_layout(base.family) if base.single else base_layout(base.path, base.family)
    targets = named_targets("locon")
    for key in counted(layout, on_layer):
        places = tuned.places(key), base.places(key)
        if bool(places[0]) != bool(places[1]):
            lacking = base if places[0] else tuned
            raise ModelFileError(
                f"{lacking.path} lacks the layer {'.'.join(key)}, which the other model has."
            )
        if not places[0]:
            continue
        ours, theirs = places[0][0].read(), places[1][0].read()
        if ours.shape != theirs.shape:
            raise ModelFileError(
                f"The layer {'.'.join(key)} has the shapes {list(ours.shape)} and {list(theirs.shape)} in the"
                " two models; give the base that this one was made from."
            )
        delta = ours.float() - theirs.float()
        steps = {torch.finfo(tensor.dtype).eps for tensor in (ours, theirs)}
        rounding = _ROUNDING * max(steps) * float(theirs.float().norm()) if len(steps) > 1 else 0.0
        norm = float(delta.norm())
        if not math.isfinite(norm):
            raise ModelFileError(
                f"The layer {'.'.join(key)} holds numbers that are not finite in one of the two."
            )
        pattern = targets.pattern(key[0])
        if norm > rounding and pattern is not None and pattern.fullmatch(key[1]):
            yield key, delta
        elif norm > rounding:
            spectra.outside += norm**2


def extraction_sentences(weights: AdapterWeights, loss: TruncationLoss, spectra: Spectra) -> list[str]:
    """The extraction and its cost."""
    ranks = [layer.rank for layer in weights.layers.values()]
    sentences = [
        f"{count_words(len(ranks), 'layer')} of {rank_words(ranks)}.",
        loss.sentence(),
        spectra.sentence(),
    ]
    whole = spectra.outside + sum(spectra.energies.values())
    if spectra.outside > 1e-6 * whole:
        share = math.sqrt(spectra.outside / whole)
        sentences.append(
            f"{share:.2%} of the change is in layers that a LoRA does not reach, and is left out."
        )
    return sentences


def extract_file(
    tuned: str, base: str, out: Path, rank: int | None, energy: float | None, precision: str,
    on_layer: OnLayer | None = None,
) -> list[str]:  # fmt: skip
    """Write the LoRA between two models, named as `--base` names them, as a file of the kohya format; other
    arguments as of `extract_lora`.

    Returns:
        The extraction, its cost and the rank that the spectrum suggests, in sentences.

    Raises:
        LoraError: one sentence on the problem; nothing is written then.
    """
    check_out(out)
    models = BaseWeights(tuned), BaseWeights(base)
    weights, loss, spectra = extract_lora(*models, rank, energy, on_layer)
    family = models[1].family
    header = {
        **titles(out),
        "ss_sd_model_name": models[1].path.name,
        "modelspec.implementation": "diffusers",
        "modelspec.description": (
            f"LoRA between {models[1].path.stem} and {models[0].path.stem}, extracted with LoRA Easel"
        ),
        EXTRACTED_KEY: json.dumps({"rank": rank, "energy": energy, "error": loss.overall}),
    }
    save_adapter(reshape_adapter(weights, family), out, family, dtype=precision, metadata=header)
    return extraction_sentences(weights, loss, spectra)
