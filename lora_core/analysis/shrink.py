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

import torch

from lora_core.adapters.weights import AdapterWeights, LayerKey
from lora_core.analysis.base_weights import BaseWeights
from lora_core.analysis.combine import Loss, Pair, checked_rank, with_one_alpha
from lora_core.analysis.factors import Triples, singular_triples
from lora_core.analysis.plain import Note, needs_base, plain
from lora_core.analysis.rewrite import Rewriting, check_out
from lora_core.analysis.spectrum import rank_of_energy
from lora_core.analysis.updates import file_updates
from lora_core.formats.kinds import extras_sentence
from lora_core.formats.layers import check_plain
from lora_core.spec.errors import AdapterFileError, ConfigError
from lora_core.spec.families import Family
from lora_core.spec.tensor_file import read_header

SHRUNK_KEY = "lora_easel.shrunk"
"""Our own key of a header: what was cut, as JSON."""

Ranks = Mapping[LayerKey, int]


@dataclass(frozen=True)
class Decomposed:
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


def decomposed(weights: AdapterWeights) -> Decomposed:
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
    return Decomposed(weights, found)


def cut(parts: Decomposed, ranks: Ranks) -> tuple[AdapterWeights, Loss]:
    """The best adapter of these ranks in fp32 with one alpha, and what it lost; a rank of 0 leaves a layer
    out.

    Raises:
        AdapterFileError: nothing is left.
    """
    loss = Loss()
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
    return replace(with_one_alpha(pairs), metadata=parts.weights.metadata), loss


def uniform_ranks(parts: Decomposed, rank: int) -> dict[LayerKey, int]:
    """The same rank for every layer that has so much."""
    return {key: min(rank, _nonzero(triples.values)) for key, triples in parts.triples.items()}


def ranks_of_energy(parts: Decomposed, share: float) -> dict[LayerKey, int]:
    """For each layer the lowest rank that keeps the share of its own energy."""
    return {key: rank_of_energy(triples.values, share) for key, triples in parts.triples.items()}


def pooled_ranks(parts: Decomposed, columns: int) -> dict[LayerKey, int]:
    """Ranks that keep the `columns` largest singular values of all layers together."""
    values = torch.cat([triples.values for triples in parts.triples.values()])
    owners = torch.cat([torch.full((len(t.values),), n) for n, t in enumerate(parts.triples.values())])
    # Stable, so that of equal values those of earlier layers are kept.
    largest = torch.sort(values, descending=True, stable=True).indices[:columns]
    largest = largest[values[largest] > 0]
    counts = torch.bincount(owners[largest], minlength=len(parts.triples)).tolist()
    return dict(zip(parts.triples, counts, strict=True))


def pooled_ranks_of_energy(parts: Decomposed, share: float) -> dict[LayerKey, int]:
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
class Wish:
    """How small: exactly one of the two is given."""

    rank: int | None = None
    energy: float | None = None


def shrunk(parts: Decomposed, wish: Wish) -> tuple[AdapterWeights, Loss, str]:
    """An adapter cut as wished, what it lost, and how the ranks were chosen, in a sentence.

    Raises:
        ConfigError: a rank or an energy that is none.
        AdapterFileError: the adapter changes nothing.
    """
    if wish.rank is not None:
        ranks, how = uniform_ranks(parts, checked_rank(wish.rank)), f"Each layer keeps rank {wish.rank}"
    else:
        share = checked_energy(wish.energy or 0.0)
        each, pooled = ranks_of_energy(parts, share), pooled_ranks_of_energy(parts, share)
        if parts.parameters(pooled) < parts.parameters(each):
            ranks, how = pooled, f"All layers together keep {share:.4g} of the energy"
        else:
            ranks, how = each, f"Each layer keeps {share:.4g} of its energy"
    weights, loss = cut(parts, ranks)
    return weights, loss, f"{how}: {size_sentence(parts, ranks)}"


def size_sentence(parts: Decomposed, ranks: Ranks) -> str:
    """What ranks make of a file's size, for a person."""
    before, after = parts.own_parameters(), max(1, parts.parameters(ranks))
    low, high = min(ranks.values()), max(ranks.values())
    gone = sum(rank == 0 for rank in ranks.values())
    span = f"rank {high}" if low == high else f"ranks {max(1, low)} to {high}"
    less = f", {gone} of {len(ranks)} layers are left out" if gone else ""
    return f"{span}{less}; {after:,} numbers in place of {before:,}."


def opened_plain(path: Path, known: Family | None) -> tuple[AdapterWeights, Family]:
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
    to: Rewriting, wish: Wish, base: BaseWeights | None = None, note: Note | None = None
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
        weights, loss = plain(updates, wish.rank, base.weight if base else None, note)
        weights, how = replace(weights, metadata=metadata), f"A plain LoRA of rank {wish.rank}."
    else:
        weights, loss, how = shrunk(decomposed(opened_plain(to.source, known)[0]), wish)
    asked = {"rank": wish.rank, "energy": wish.energy}
    to.write(weights, family, SHRUNK_KEY, {**asked, "error": loss.overall})
    out = extras_sentence(read_header(to.source).shapes)
    return [
        *([out] if out else []),
        how,
        error_sentence(loss),
        f"The file is {to.times_smaller:.1f} times smaller.",
    ]


def error_sentence(loss: Loss) -> str:
    """What a cut lost, for a person."""
    name, share = loss.worst
    if loss.overall < 1e-5:
        return "Nothing is lost."
    return (
        f"The update differs from the whole one by {loss.overall:.2%} of its norm; the worst layer, {name},"
        f" by {share:.2%}."
    )
