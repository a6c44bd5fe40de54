"""The intrinsic rank of an adapter: the lowest that keeps nearly all of what it gains, found by measuring.

Energy says how much of the update is kept, not how much of its use: so the adapter is cut to a rank and
measured again on the same fixed looks. A bisection over ranks takes few measurements, and each is paired with
that of the whole adapter, so that the error of "keeps 99%" is far smaller than that of the gain itself. After
one rank for all layers the pooled energies are tried (`shrink.pooled_ranks`), bisected over the number of
columns that are kept; the smaller of the two files is the answer.

A bisection takes it that what is kept grows with the rank. Where noise breaks that, it finds one crossing of
the bar, and every rank that it proposes was measured and is above the bar.
"""

from dataclasses import dataclass
from typing import Any

from lora_core.adapters.inject import Strengthened
from lora_core.adapters.weights import AdapterWeights, LayerKey
from lora_core.analysis.bench import Measured
from lora_core.analysis.shrink import Decomposed, cut, decomposed, pooled_ranks, uniform_ranks
from lora_core.spec.errors import AdapterFileError
from lora_core.validation.gain import clustered_error

KEEP = 0.99
"""The share of the gain that has to stay."""
_CLOSE = 1.05
"""The pooled bisection ends when the numbers of columns that do and do not suffice are within this factor."""


@dataclass(frozen=True)
class Cut:
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
    uniform: Cut
    pooled: Cut | None
    gain: float
    standard_error: float
    parameters: int
    tried: tuple[dict[str, float], ...]

    @property
    def best(self) -> Cut:
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

    def __init__(self, parts: Decomposed, measured: Measured) -> None:
        self.parts = parts
        self._measured = measured
        self.whole = measured([Strengthened(parts.weights)])
        self.tried: list[dict[str, float]] = []

    def cut(self, ranks: dict[LayerKey, int]) -> Cut:
        gains = self._measured([Strengthened(cut(self.parts, ranks)[0])])
        kept = float(gains.mean() / self.whole.mean())
        # The error of a ratio of paired means, to first order: that of gains - kept * whole over the whole.
        error = clustered_error(gains - kept * self.whole) / float(self.whole.mean())
        columns = sum(ranks.values())
        self.tried.append({"columns": columns, "kept": kept, "standard_error": error})
        return Cut(ranks, self.parts.parameters(ranks), float(gains.mean()), kept, error)


def intrinsic_rank(
    weights: AdapterWeights, measured: Measured, keep: float = KEEP
) -> tuple[AdapterWeights, IntrinsicRank]:
    """The smallest cut of an adapter that keeps a share of its gain, and what was found on the way.

    Args:
        weights: a plain LoRA.
        measured: gives the gains of adapters, as `Bench.gains` does.
        keep: the share of the gain.

    Raises:
        AdapterFileError: the adapter gains nothing here, so that there is no gain to keep.
    """
    parts = decomposed(weights)
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
    uncut = Cut(whole, parts.own_parameters(), gain, 1.0, 0.0)
    rank, uniform = _lowest_rank(search, trained, uncut, keep)
    pooled = _fewest_columns(search, uniform, keep)
    found = IntrinsicRank(
        trained, rank, uniform, pooled, gain, error, parts.own_parameters(), tuple(search.tried)
    )
    return cut(parts, found.best.ranks)[0], found


def _lowest_rank(search: _Search, trained: int, uncut: Cut, keep: float) -> tuple[int, Cut]:
    too_low, enough, best = 0, trained, uncut
    while enough - too_low > 1:
        rank = (too_low + enough) // 2
        found = search.cut(uniform_ranks(search.parts, rank))
        if found.kept >= keep:
            enough, best = rank, found
        else:
            too_low = rank
    return enough, best


def _fewest_columns(search: _Search, uniform: Cut, keep: float) -> Cut | None:
    """The smallest pooled cut, if it is smaller than the uniform one."""
    too_few, enough = 0, sum(uniform.ranks.values())
    best: Cut | None = None
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


def _within(parts: Decomposed, columns: int, parameters: int) -> int:
    """The most columns, up to `columns`, whose pooled ranks have fewer than `parameters` numbers."""
    low, high = 0, columns
    while low < high:
        middle = (low + high + 1) // 2
        smaller = parts.parameters(pooled_ranks(parts, middle)) < parameters
        low, high = (middle, high) if smaller else (low, middle - 1)
    return low
