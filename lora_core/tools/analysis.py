"""Analysis of adapters: their similarity, combinations, amplification of the base, best strength.

Similarity (Hu et al. 2021, section 7.2, equation 4) is phi(A, B, i, j) = ||U_A^i^T U_B^j||_F^2 / min(i, j) of
the leading i and j singular vectors: 1 where the smaller subspace is within the larger one, 0 where the two
are orthogonal. The paper takes the right singular vectors of A, the directions that an adapter reads from.
Here they are those of the update (alpha/r) B A: the rows of A span the same space, but A and B can trade
scale and rotation between them, which changes the order of A's own directions and not of the update's. The
left ones, which it writes to, are reported too. Random subspaces are not orthogonal: each pair of unit
vectors in d dimensions has the mean squared product 1/d, so the mean of phi is i j / d / min(i, j) = max(i,
j) / d, the baseline.

Updates add, so two adapters interfere where they write to the same directions (columns) or read from the same
(rows). For each pair and layer that is phi over all of their directions, and the cosine <D1, D2> / (|D1|
|D2|): positive where they do the same, negative where one undoes the other. Of each adapter, `survives` is
<S, D> / |D|^2 with the sum S of all: 1 where the others leave it alone, less where they take from it, more
where they add to it. `untouched` is the share of its energy outside of all directions that the others read or
write, |(1 - P) D (1 - Q)|^2 / |D|^2 with the projections P and Q on the others' columns and rows. No update
is formed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_core.errors import AdapterFileError, ConfigError
from lora_core.evaluate.validator import MeasureGains, clustered_error
from lora_core.formats.io import AS_IT_IS, load_adapter
from lora_core.generate.request import WeightedLora
from lora_core.lora.lycoris import LycorisUpdate
from lora_core.lora.weights import AdapterWeights, LayerKey, LoadedLora
from lora_core.model_files.families import Family, is_text_encoder
from lora_core.tools.delta import BaseWeights, Rewrite, Updates, check_out, shared_family
from lora_core.tools.shrink import load_plain_lora
from lora_core.tools.svd import (
    EXACT_UP_TO,
    NO_UPDATE,
    OnLayer,
    Pair,
    Triples,
    block_rows,
    check_same_shape,
    counted,
    inner_product,
    known_updates,
    left_out_row,
    randomized_svd,
    significant_triples,
)

TABLE = 16
"""The highest i and j in the table of phi."""


def phi(first: torch.Tensor, second: torch.Tensor) -> float:
    """phi of two subspaces, in [0, 1], of orthonormal columns (d, i) and (d, j).

    Source: Hu et al. 2021, equation 4.
    """
    together = float((first.T @ second).square().sum()) / min(first.shape[1], second.shape[1])
    return min(1.0, round(together, 12))  # exactly 1 where it is 1 up to rounding


def phi_table(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """phi(i, j) of the leading i and j of orthonormal columns (d, I) and (d, J), (i, j) from 1 on: figures 3
    and 4 of Hu et al. 2021."""
    sums = (first.T @ second).square().cumsum(0).cumsum(1)
    rows, columns = (torch.arange(1, n + 1) for n in sums.shape)
    return (sums / torch.minimum(rows[:, None], columns[None, :])).clamp(max=1.0)


def baseline(i: int, j: int, dimension: int) -> float:
    """The mean of phi of two random subspaces of i and j dimensions among `dimension`."""
    return min(1.0, max(i, j) / dimension)


def file_similarity(first: Path, second: Path, on_layer: OnLayer | None = None) -> dict[str, Any]:
    """The similarity of two adapter files.

    Returns:
        `similarity` and `baseline`: the means of phi and of its baseline over the layers that both files
        change, at the common rank, the lower of their two; `layers`: for each `part`, `module`, `rank` (the
        common one), `phi` and `baseline` of the directions that are read from, `phi_output` and
        `baseline_output` of those that are written to; `table`: the mean over layers of phi(i, j), None where
        no layer is of that rank; `left_out`: layers with the `reason`.

    Raises:
        AdapterFileError: a file is broken, they are for different bases, or no layer is in both.
    """
    known = shared_family((first, second), "they cannot be compared")
    (one, out_one), (two, out_two) = known_updates(first, known), known_updates(second, known)
    left_out = [*out_one, *out_two]
    for here, there, name in ((one, two, first.name), (two, one, second.name)):
        left_out += [left_out_row(key, f"it is in {name} alone") for key in here if key not in there]
    rows: list[dict[str, Any]] = []
    total, count = torch.zeros(TABLE, TABLE, dtype=torch.float64), torch.zeros(TABLE, TABLE)
    for key in counted([key for key in one if key in two], on_layer):
        check_same_shape(one[key], two[key], (first.name, second.name))
        a, b = significant_triples(one[key]), significant_triples(two[key])
        rank = min(len(a.values), len(b.values))
        if rank == 0:
            left_out.append(left_out_row(key, NO_UPDATE))
            continue
        a, b = a.leading(rank), b.leading(rank)
        table = phi_table(a.v[:, :TABLE], b.v[:, :TABLE])
        total[: len(table), : len(table)] += table
        count[: len(table), : len(table)] += 1
        rows.append(
            {
                "part": key[0], "module": key[1], "rank": rank,
                "phi": phi(a.v, b.v), "baseline": baseline(rank, rank, a.v.shape[0]),
                "phi_output": phi(a.u, b.u), "baseline_output": baseline(rank, rank, a.u.shape[0]),
            }
        )  # fmt: skip
    if not rows:
        why = f" ({left_out[0]['reason']})" if left_out else ""
        raise AdapterFileError(
            f"{first.name} and {second.name} have no layer in common that can be compared{why}."
        )
    side = int((count.diagonal() > 0).sum())
    means = ("phi", "baseline", "phi_output", "baseline_output")
    return {
        **{name.replace("phi", "similarity"): sum(row[name] for row in rows) / len(rows) for name in means},
        "layers": rows,
        "table": (total / count.clamp(min=1))[:side, :side].tolist(),
        "left_out": left_out,
    }


@dataclass(frozen=True)
class _Term:
    """One adapter's update of a layer, at its strength."""

    file: int
    triples: Triples
    factor: float

    @property
    def pair(self) -> Pair:
        return self.factor * self.triples.u * self.triples.values, self.triples.v.T

    @property
    def energy(self) -> float:
        return self.factor**2 * float(self.triples.values.square().sum())


def interference_report(files: Sequence[WeightedLora], on_layer: OnLayer | None = None) -> dict[str, Any]:
    """Overlap, cross terms and what survives of each of two or more adapter files.

    Returns:
        `files`: `name`, `strength`, `norm`, `survives`, `untouched` of each, over all of its layers; `pairs`:
        `first`, `second` (numbers of files), `cosine`, and the means over shared layers of `column_overlap`,
        `row_overlap` and their baselines; `layers`: `part`, `module`, `files` (numbers), `survives` and
        `untouched` for each of those, `pairs`; `left_out`: layers with the `reason`.

    Raises:
        AdapterFileError: fewer than two files, a broken one, or files for different bases.
    """
    if len(files) < 2:
        raise AdapterFileError("A stack needs two adapters or more.")
    paths = [Path(file.file) for file in files]
    known = shared_family(paths, "they do not stack")
    updates_of, outs = zip(*(known_updates(path, known) for path in paths), strict=True)
    layers, totals = [], [[0.0, 0.0, 0.0] for _ in files]
    left_out = [row for out in outs for row in out]
    unknown = {(row["part"], row["module"]) for row in left_out}  # and so is what they do to the others there
    keys = [
        key for key in dict.fromkeys(key for updates in updates_of for key in updates) if key not in unknown
    ]
    if not keys and left_out:
        raise AdapterFileError(f"No layer of this stack can be measured ({left_out[0]['reason']}).")
    for key in counted(keys, on_layer):
        terms = _terms(key, files, updates_of)
        if terms:
            layers.append(_layer(key, terms, totals))
    return {
        "files": [
            {
                "name": Path(file.file).name,
                "strength": file.strength,
                "norm": math.sqrt(energy),
                "survives": kept / energy if energy else None,
                "untouched": free / energy if energy else None,
            }
            for file, (energy, kept, free) in zip(files, totals, strict=True)
        ],
        "pairs": [_over_layers(pair, layers, totals) for pair in combinations(range(len(files)), 2)],
        "layers": layers,
        "left_out": left_out,
    }


def _terms(key: LayerKey, files: Sequence[WeightedLora], updates_of: Sequence[Updates]) -> list[_Term]:
    having = [number for number, updates in enumerate(updates_of) if key in updates]
    terms = []
    for number in having:
        first = having[0]
        names = (Path(files[first].file).name, Path(files[number].file).name)
        check_same_shape(updates_of[first][key], updates_of[number][key], names)
        term = _Term(number, significant_triples(updates_of[number][key]), files[number].on(key[0]))
        if term.energy > 0:
            terms.append(term)
    return terms


def _layer(key: LayerKey, terms: Sequence[_Term], totals: list[list[float]]) -> dict[str, Any]:
    survives, untouched = [], []
    products = {(a.file, b.file): inner_product(a.pair, b.pair) for a, b in combinations(terms, 2)}
    for term in terms:
        crossing = sum(value for pair, value in products.items() if term.file in pair)
        kept = term.energy + crossing
        free = _free_energy(term, [other for other in terms if other is not term])
        for index, value in enumerate((term.energy, kept, free)):
            totals[term.file][index] += value
        survives.append(kept / term.energy)
        untouched.append(free / term.energy)
    return {
        "part": key[0],
        "module": key[1],
        "files": [term.file for term in terms],
        "survives": survives,
        "untouched": untouched,
        "pairs": [_pair(a, b, products[a.file, b.file]) for a, b in combinations(terms, 2)],
    }


def _free_energy(term: _Term, others: Sequence[_Term]) -> float:
    """The energy of a term outside of all that the others read or write."""
    if not others:
        return term.energy
    up, down = term.pair
    for side, matrix in (("u", up), ("v", down.T)):
        basis = _span(torch.cat([getattr(other.triples, side) for other in others], dim=1))
        outside = matrix - basis @ (basis.T @ matrix)
        up, down = (outside, down) if side == "u" else (up, outside.T)
    return max(0.0, inner_product((up, down), (up, down)))


def _span(columns: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of what the columns span; they may repeat each other."""
    u, values, _ = torch.linalg.svd(columns, full_matrices=False)
    return u[:, values > 1e-9 * values[0]]


def _pair(a: _Term, b: _Term, product: float) -> dict[str, Any]:
    ranks = len(a.triples.values), len(b.triples.values)
    return {
        "first": a.file,
        "second": b.file,
        "product": product,
        "cosine": product / math.sqrt(a.energy * b.energy),
        "column_overlap": phi(a.triples.u, b.triples.u),
        "column_baseline": baseline(*ranks, a.triples.u.shape[0]),
        "row_overlap": phi(a.triples.v, b.triples.v),
        "row_baseline": baseline(*ranks, a.triples.v.shape[0]),
    }


def _over_layers(
    pair: tuple[int, int], layers: Sequence[dict[str, Any]], totals: Sequence[Sequence[float]]
) -> dict[str, Any]:
    first, second = pair
    rows = [row for layer in layers for row in layer["pairs"] if (row["first"], row["second"]) == pair]
    product = sum(row["product"] for row in rows)
    norms = math.sqrt(totals[first][0] * totals[second][0])
    means = ("column_overlap", "column_baseline", "row_overlap", "row_baseline")
    return {
        "first": first,
        "second": second,
        "layers": len(rows),
        "cosine": product / norms if norms else None,
        **{name: sum(row[name] for row in rows) / len(rows) if rows else None for name in means},
    }


def measure_stack(loras: Sequence[WeightedLora], family: Family, measure: MeasureGains) -> dict[str, Any]:
    """What adapters gain together and what each gains alone, on the same draws, by `Evaluator.gains`.

    Returns:
        `stack` and `sum` (of the gains of each alone) and `best_alone`, each {gain, standard_error}; `alone`:
        the same with `name` for each; `lost`: what the stack gains less than the sum, and `against_best`:
        more than the best alone, each with the paired standard error; `sentence`.
    """
    adapters = [
        LoadedLora(load_adapter(Path(lora.file), family, plain=False), lora.strength, lora.text_strength)
        for lora in loras
    ]
    alone = [measure([adapter]) for adapter in adapters]
    together = measure(adapters)
    best = max(alone, key=lambda gains: float(gains.mean()))
    sum_alone = torch.stack(alone).sum(dim=0)
    lost, more = _number(sum_alone - together), _number(together - best)
    stack = _number(together)
    return {
        "stack": stack,
        "alone": [
            {"name": Path(lora.file).name, **_number(gains)} for lora, gains in zip(loras, alone, strict=True)
        ],
        "sum": _number(sum_alone),
        "best_alone": _number(best),
        "lost": lost,
        "against_best": more,
        "sentence": (
            f"Together they gain {stack['gain']:+.4f} (standard error {stack['standard_error']:.4f}),"
            f" {_more(more)} than the best alone, and {_more(lost, -1)} than the sum of each alone."
        ),
    }


def _number(gains: torch.Tensor) -> dict[str, float]:
    return {"gain": float(gains.mean()), "standard_error": clustered_error(gains)}


def _more(number: dict[str, float], sign: int = 1) -> str:
    """A difference in words, with its error."""
    gain = sign * number["gain"]
    return (
        f"{abs(gain):.4f} (standard error {number['standard_error']:.4f}) {'more' if gain >= 0 else 'less'}"
    )


# What an adapter amplifies in its base, and the new directions that it adds.
#
# The amplification factor of a layer is ||dW||_F / ||U^T W V^T||_F with U and V the left and right singular
# vectors of dW (Hu et al. 2021, section 7.3). A factor of 20 says that the adapter is twenty times as
# strong in its own directions as the base is there: it brings out what the base knew but did not stress. A
# random update of rank r would meet r ||W||_F / sqrt(out in) of the base; `chance` is what the factor would
# be then.
#
# A leading left singular vector of the adapted weight is an intruder dimension if its cosine with every
# left singular vector of the frozen one is below a threshold (Shuttleworth et al. 2024, algorithm 1). Full
# fine-tuning turns old directions and adds hardly any; low-rank updates that are strong for their rank add
# some, and the more they add, the more of the base's abilities are forgotten. Large layers are compared
# through random probes first, with the leading old directions alone: a vector with a match there is no
# intruder. Only where one seems to be an intruder are both weights decomposed in full.


LEADING = 10
"""How many of the new directions are compared."""
THRESHOLD = 0.5
"""The cosine below which a new direction matches no old one."""
_EXTRA = 32


def intruder_count(
    weight: torch.Tensor, delta: torch.Tensor, leading: int = LEADING, threshold: float = THRESHOLD
) -> int:
    """How many of the leading left singular vectors of weight + delta match none of weight's.

    Args:
        weight: (out, in), the frozen weight.
        delta: (out, in), the update.
        leading: how many are compared, the largest singular values first.
        threshold: the cosine from which two match.

    Source: Shuttleworth et al. 2024, algorithm 1.
    """
    old, new = weight.float(), (weight + delta).float()
    if not bool(old.any()) or not bool(delta.any()):
        return 0
    count = min(leading, *old.shape)
    columns = 4 * count + _EXTRA
    if min(old.shape) > max(EXACT_UP_TO, columns):
        u, values, _ = randomized_svd(new, count + _EXTRA)
        candidates = u[:, : min(count, int((values > 1e-5 * values[0]).sum()))]
        if not _num_unmatched(randomized_svd(old, columns)[0].T @ candidates, threshold):
            return 0
    return _num_unmatched(_left_vectors(old).T @ _left_vectors(new)[:, :count], threshold)


def _left_vectors(matrix: torch.Tensor) -> torch.Tensor:
    """The left singular vectors of the singular values that exceed rounding, descending, (out, k) in fp64.

    The eigenvectors of the smaller square give them in a tenth of an SVD's time; in double precision, since a
    square halves the digits.
    """
    matrix = matrix.double()
    wide = matrix.shape[0] <= matrix.shape[1]
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)
    squares, vectors = squares.flip(0), vectors.flip(1)
    kept = squares > 1e-10 * squares[0]
    return vectors[:, kept] if wide else matrix @ vectors[:, kept] / squares[kept].sqrt()


def _num_unmatched(cosines: torch.Tensor, threshold: float) -> int:
    """How many columns have no entry of at least the threshold."""
    return int((cosines.abs().amax(dim=0) < threshold).sum())


def file_amplification(path: Path, base: BaseWeights, on_layer: OnLayer | None = None) -> dict[str, Any]:
    """The amplification factors of an adapter file against a base, and its intruder dimensions.

    Returns:
        `layers`: for each `part`, `module`, `rank` (that exceeds rounding), `norm` of the update, `base_norm`
            of the weight, `projected` of the weight in the update's directions, `amplification`, `chance`,
            `intruders`; `blocks`: by block, see `svd.block_rows`; `amplification`: of all layers together;
            `intruders`: how many in all, with `leading` and `threshold`; `left_out`: layers with the
            `reason`.

    Raises:
        AdapterFileError: the file is broken, or for another base.
        ModelFileError: the base lacks a layer.
    """
    updates, left_out = known_updates(path, base.family)
    rows = []
    for key, update in counted(updates.items(), on_layer):
        weight = base.weight(key).flatten(1)
        update.check_base(weight.shape)
        row = _row(key, update, weight)
        if row is None:
            left_out.append(left_out_row(key, NO_UPDATE))
        else:
            rows.append(row)
    if not rows:
        why = f" ({left_out[0]['reason']})" if left_out else ""
        raise AdapterFileError(
            f"{path.name} has no layer whose update can be set against the base's weights{why}."
        )
    columns = {"amplification": _overall, "intruders": lambda rows: sum(row["intruders"] for row in rows)}
    return {
        "amplification": _overall(rows),
        "intruders": sum(row["intruders"] for row in rows),
        "leading": LEADING,
        "threshold": THRESHOLD,
        "layers": rows,
        "blocks": block_rows(rows, columns),
        "left_out": left_out,
    }


def _row(key: LayerKey, update: LycorisUpdate, weight: torch.Tensor) -> dict[str, Any] | None:
    triples = significant_triples(update)
    rank = len(triples.values)
    if rank == 0:
        return None
    norm = float(triples.values.square().sum().sqrt())
    projected = float((triples.u.T @ weight.double() @ triples.v).norm())
    base_norm = float(weight.norm())
    by_chance = rank * base_norm / math.sqrt(weight.numel())
    return {
        "part": key[0],
        "module": key[1],
        "rank": rank,
        "norm": norm,
        "base_norm": base_norm,
        "projected": projected,
        "amplification": norm / projected if projected else None,
        "chance": norm / by_chance if by_chance else None,
        "intruders": intruder_count(weight, update.product().flatten(1)),
    }


def _overall(rows: list[dict[str, Any]]) -> float | None:
    """The factor of several layers as if they were the blocks of one large diagonal weight."""
    projected = math.sqrt(sum(row["projected"] ** 2 for row in rows))
    return math.sqrt(sum(row["norm"] ** 2 for row in rows)) / projected if projected else None


# Measures the strength at which an adapter gains most, and which strengths are as good within noise.
#
# The gain is a smooth curve of the strength: a few coarse points find where it is highest, and parabolas
# through the best three find the top (successive parabolic interpolation; Brent 1973, section 5.2). All
# points are measured on the same draws, so their differences have small errors. The interval holds the
# strengths whose loss of gain against the best is within two standard errors of that paired difference;
# between the measured points the curve of each draw is a polynomial through its own.


BAKED_KEY = "lora_easel.strength"
"""Our own key of a header: which strength was baked in, as JSON."""

COARSE = (0.5, 1.0, 1.5)
HIGHEST = 4.0
STEP = 0.01
"""Strengths have two decimals, as users set them."""
_BEYOND = 0.75
_REFINEMENTS = 4
_DEGREE = 4

GainsAt = Callable[[float], torch.Tensor]
"""From a strength to the gain on each draw, (images, K)."""


@dataclass(frozen=True)
class StrengthFit:
    """The best strength.

    Attributes:
        strength: the best of those measured.
        low, high: the ends of the strengths around it that are as good within noise.
        gain, standard_error: at the best.
        curve: (strength, gain, standard error) of each measured strength, ascending.
    """

    strength: float
    low: float
    high: float
    gain: float
    standard_error: float
    curve: tuple[tuple[float, float, float], ...]

    def sentence(self, what: str = "The adapter") -> str:
        """The result in words."""
        if self.strength <= 0:
            return f"{what} gains at no strength on these images: the base predicts them better without it."
        edge = " and may be best beyond that, where nothing was tried" if self.strength >= HIGHEST else ""
        return (
            f"{what} gains most at strength {self.strength:.2f}{edge}: {self.gain:+.4f} (standard error"
            f" {self.standard_error:.4f}); from {self.low:.2f} to {self.high:.2f} the difference is within"
            " noise."
        )

    def document(self) -> dict[str, Any]:
        """The result for JSON."""
        rows = [{"strength": s, "gain": g, "standard_error": e} for s, g, e in self.curve]
        return {**vars(self), "curve": rows}


def fit_strength_curve(gains_at: GainsAt) -> StrengthFit:
    """The strength of the highest mean gain, with about eight measurements on the same draws."""
    found = {strength: gains_at(strength) for strength in COARSE}
    found[0.0] = torch.zeros_like(found[1.0])
    if _best(found) == 0.0:
        found[0.2] = gains_at(0.2)
    while _best(found) == max(found) and max(found) < HIGHEST:
        further = min(HIGHEST, max(found) + _BEYOND)
        found[further] = gains_at(further)
    for _ in range(_REFINEMENTS):
        strength = _next_strength(found)
        if strength is None:
            break
        found[strength] = gains_at(strength)
    best = _best(found)
    low, high = _interval(found, best)
    curve = tuple((s, float(g.mean()), clustered_error(g)) for s, g in sorted(found.items()))
    return StrengthFit(best, low, high, float(found[best].mean()), clustered_error(found[best]), curve)


def _best(found: dict[float, torch.Tensor]) -> float:
    """The strength of the highest mean; the lower of equal ones."""
    return max(sorted(found), key=lambda strength: float(found[strength].mean()))


def _next_strength(found: dict[float, torch.Tensor]) -> float | None:
    """The top of the parabola through the best point and its neighbours; None where it is known well
    enough."""
    strengths = sorted(found)
    at = strengths.index(_best(found))
    if at in (0, len(strengths) - 1):
        return None
    a, b, c = strengths[at - 1 : at + 2]
    fa, fb, fc = (float(found[x].mean()) for x in (a, b, c))
    steeper, flatter = (b - a) * (fb - fc), (b - c) * (fb - fa)
    bend = steeper - flatter
    top = b if bend == 0 else b - ((b - a) * steeper - (b - c) * flatter) / (2 * bend)
    top = round(min(max(top, a), c), 2)
    if top in found:
        # The other side of the best, so that it is bracketed closely.
        wide = (a, b) if b - a > c - b else (b, c)
        top = round((wide[0] + 2 * wide[1]) / 3 if wide[1] == b else (2 * wide[0] + wide[1]) / 3, 2)
    return None if top in found or c - a <= 4 * STEP else top


def _interval(found: dict[float, torch.Tensor], best: float) -> tuple[float, float]:
    """The strengths around the best whose paired loss of gain is within two standard errors."""
    strengths = sorted(found)
    shape = found[best].shape
    values = np.stack([found[strength].flatten().numpy() for strength in strengths])
    scale = max(strengths)
    powers = np.polynomial.polynomial
    fit = powers.polyfit(np.array(strengths) / scale, values, min(_DEGREE, len(strengths) - 1))

    def differs(strength: float) -> bool:
        curve = powers.polyval(strength / scale, fit) - powers.polyval(best / scale, fit)
        difference = torch.from_numpy(np.asarray(curve)).reshape(shape)
        return -float(difference.mean()) > 2 * clustered_error(difference)

    ends = []
    for direction in (-STEP, STEP):
        end = best
        while 0 <= end + direction <= scale and not differs(end + direction):
            end += direction
        ends.append(round(min(max(end, 0.0), scale), 2))
    return ends[0], ends[1]


def fit_strength(weights: AdapterWeights, measure: MeasureGains) -> StrengthFit:
    """The best strength of an adapter, the same on UNet and text encoders."""
    return fit_strength_curve(lambda strength: measure([LoadedLora(weights, strength)]))


def fit_strengths_apart(weights: AdapterWeights, measure: MeasureGains) -> tuple[StrengthFit, StrengthFit]:
    """The best strengths on the UNet and on the text encoders.

    First both alike, then the text encoders' with the UNet's held, then the UNet's once more.

    Raises:
        ConfigError: the adapter is on one of the two alone.
    """
    parts = weights.parts()
    if len({is_text_encoder(part) for part in parts}) < 2:
        raise ConfigError(
            f"The adapter changes {', '.join(parts)} alone, so there are no strengths to tell apart; leave"
            " --apart out."
        )
    unet = fit_strength(weights, measure).strength
    text = fit_strength_curve(_gains_beyond_zero(measure, lambda s: LoadedLora(weights, unet, s)))
    again = fit_strength_curve(_gains_beyond_zero(measure, lambda s: LoadedLora(weights, s, text.strength)))
    return again, text


def _gains_beyond_zero(measure: MeasureGains, at: Callable[[float], LoadedLora]) -> GainsAt:
    """What one of two strengths adds to the gain of the other alone."""
    alone = measure([at(0.0)])
    return lambda strength: measure([at(strength)]) - alone


def measure_strength(
    file: Path, family: Family, measure: MeasureGains, apart: bool = False
) -> dict[str, Any]:
    """The best strength of an adapter file, or one for the UNet and one for the text encoders.

    Returns:
        `fits`: rows of `part` ("" for the full adapter, else "UNet" or "text encoders") and `StrengthFit`;
        `strengths`: to bake in; `sentences`.

    Raises:
        LoraError: it cannot be used, or `apart` and on one of the two alone.
    """
    weights = load_adapter(file, family, plain=False)
    if apart:
        unet, text = fit_strengths_apart(weights, measure)
        fits = [
            ("UNet", "On the UNet the adapter", unet),
            ("text encoders", "On the text encoders the adapter", text),
        ]
    else:
        fits = [("", "The adapter", fit_strength(weights, measure))]
    return {
        "fits": [{"part": part, **fit.document()} for part, _, fit in fits],
        "strengths": [fit.strength for _, _, fit in fits],
        "sentences": [fit.sentence(what) for _, what, fit in fits],
    }


def scale_alphas(
    weights: AdapterWeights, strength: float, text_strength: float | None = None
) -> AdapterWeights:
    """The adapter that at strength 1 is what this one is at another: alphas change, factors do not.

    Raises:
        ConfigError: a strength is not above 0.
    """
    at = LoadedLora(weights, strength, text_strength)
    for part in weights.parts():
        if not 0 < at.on(part) < float("inf"):
            raise ConfigError(
                f"A strength of {at.on(part):g} on the {part.replace('_', ' ')} cannot be baked in; it has to"
                " be above 0."
            )
    layers = {key: replace(layer, alpha=layer.alpha * at.on(key[0])) for key, layer in weights.layers.items()}
    return replace(weights, layers=layers)


def bake_strength(to: Rewrite, known: Family | None, strengths: Sequence[float]) -> str:
    """Save an adapter file at a strength of its own; the bits of the factors stay.

    Args:
        to: the files; the precision is the source's.
        strengths: one, or one for the UNet and one for the text encoders.

    Returns:
        A summary, one sentence.

    Raises:
        LoraError: a strength is not above 0, or the file is not a plain LoRA or cannot be written.
    """
    check_out(to.out)
    weights, family = load_plain_lora(to.source, known)
    record = dict(zip(("strength", "text_strength"), strengths, strict=False))
    replace(to, precision=AS_IT_IS).save(scale_alphas(weights, *strengths), family, BAKED_KEY, record)
    return f"Strength {' and '.join(f'{strength:g}' for strength in strengths)} is now strength 1."
