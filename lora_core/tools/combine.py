"""A weight for each block of a model: patterns over layer names, from a TOML file or from the command
line."""

import math
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_core.errors import AdapterFileError, ConfigError
from lora_core.formats.layers import check_plain
from lora_core.lora.inject import LoadedLora
from lora_core.lora.weights import AdapterWeights, LayerKey, LayerWeights
from lora_core.settings.config import load_toml, parse_toml
from lora_core.settings.patterns import Pattern, PatternError
from lora_core.tools.delta import Updates
from lora_core.tools.svd import Pair, singular_triples

_INLINE = re.compile(r"\s*([^=,]+?)\s*=\s*(\[[^\]]*\]|[^,\[\]]+?)\s*(?:,|$)")


@dataclass(frozen=True)
class BlockWeights:
    """Weights of layers, one for each of the merged files; of the rows that match a layer the last counts.

    Attributes:
        rows: a pattern that is looked for in "part.path", and a weight for each file.
    """

    rows: tuple[tuple[Pattern, tuple[float, ...]], ...] = ()

    def weight(self, layer: LayerKey, file: int) -> float:
        """The weight of a layer in the file of that number; 1 where no row matches."""
        name = ".".join(layer)
        return next((weights[file] for row, weights in reversed(self.rows) if row.search(name)), 1.0)

    def check(self, layers: Iterable[LayerKey]) -> None:
        """Refuse a row that changes nothing, which is a slip of the pen.

        Raises:
            ConfigError: names the pattern that matches no layer.
        """
        names = [".".join(layer) for layer in layers]
        for row, _ in self.rows:
            if not any(map(row.search, names)):
                raise ConfigError(
                    f"The pattern {row.text!r} of --blocks matches no layer of these files; their layers"
                    f" are named like {names[0] if names else 'unet.mid_block...'}."
                )


def parse_block_weights(text: str, files: int) -> BlockWeights:
    """The table that `--blocks` gives.

    Args:
        text: a TOML file of `pattern = weight` and `pattern = [weight, ...]`, or the same rows inline with
            commas between.
        files: how many are merged; a list has one weight for each.

    Raises:
        ConfigError: a row is no such thing.
    """
    path = Path(text).expanduser()
    rows = dict(_flattened(_from_file(path))) if path.is_file() or path.suffix == ".toml" else _inline(text)
    return BlockWeights(tuple((_pattern(name), _weights(name, value, files)) for name, value in rows.items()))


def _from_file(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ConfigError(f"The table {path} of --blocks does not exist.")
    return load_toml(path)


def _flattened(table: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    """Rows of nested tables joined by dots, since TOML takes an unquoted `up_blocks.1` for a nested table."""
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _inline(text: str) -> dict[str, Any]:
    rows, place = {}, 0
    while match := _INLINE.match(text, place):
        rows[match[1]] = match[2]
        place = match.end()
    if not rows or text[place:].strip():
        raise ConfigError(
            f"--blocks {text!r} is neither a TOML file nor a table such as 'mid_block=0.5,up_blocks.1=0'."
        )
    try:
        return {
            name: parse_toml(f"value = {value}", f"--blocks {name}")["value"] for name, value in rows.items()
        }
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--blocks {text!r} holds a weight that is not a number.") from error


def _pattern(name: str) -> Pattern:
    try:
        return Pattern(name)
    except PatternError as error:
        raise ConfigError(f"The pattern {name!r} of --blocks cannot be used: {error}.") from error


def _weights(name: str, value: Any, files: int) -> tuple[float, ...]:
    values = value if isinstance(value, list) else [value] * files
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e6]
    if len(numbers) != len(values):
        raise ConfigError(f"{name} = {value!r} of --blocks should be a number, or a list of numbers.")
    if len(numbers) != files:
        raise ConfigError(
            f"{name} of --blocks lists {len(numbers)} weights for {files} files; give one number for all or"
            " one for each file."
        )
    return tuple(float(number) for number in numbers)


# Several adapters as one: the sum of their updates, exactly or at a chosen rank.
#
# The update of a layer is the sum over files of s (alpha/r) up @ down. Factors that are put beside each
# other give that sum, [u1 u2] [d1; d2] = u1 d1 + u2 d2, and ranks add; factors that are added to each other
# would give the cross terms u1 d2 and u2 d1 as well. A lower rank comes from a truncated SVD, which is the
# best there is of its rank (Eckart and Young 1936). It is taken of a core of (sum of ranks)^2 numbers
# between the Q of both stacks, in double precision, so that the update itself is never formed.


MAX_RANK = 4096
"""No layer of a Stable Diffusion has a higher one."""


@dataclass
class TruncationLoss:
    """What an approximation lost, in squared Frobenius norms by layer.

    Attributes:
        layers: layer to (squared norm of the whole update, squared norm of what is missing).
    """

    layers: dict[LayerKey, tuple[float, float]] = field(default_factory=dict)

    @property
    def overall(self) -> float:
        """The relative error over all layers: |missing| / |whole|."""
        whole = sum(norm for norm, _ in self.layers.values())
        return math.sqrt(sum(lost for _, lost in self.layers.values()) / whole) if whole else 0.0

    @property
    def worst(self) -> tuple[str, float]:
        """The layer that lost the largest share of itself, and that share; ("", 0) where none lost any."""
        shares = {".".join(key): math.sqrt(lost / n) for key, (n, lost) in self.layers.items() if n}
        name = max(shares, key=lambda name: shares[name], default="")
        return (name, shares[name]) if name else ("", 0.0)

    @property
    def none(self) -> bool:
        """Whether nothing but rounding is lost."""
        return self.overall < 1e-5

    def sentence(self, rank: int) -> str:
        """The error in words."""
        name, share = self.worst
        if self.none:
            return f"At rank {rank} nothing is lost."
        return (
            f"At rank {rank} the update differs from the whole one by {self.overall:.2%} of its norm; the"
            f" worst layer, {name}, by {share:.2%}."
        )


def merge_adapters(
    adapters: Sequence[LoadedLora], rank: int | None = None, blocks: BlockWeights | None = None
) -> tuple[AdapterWeights, TruncationLoss]:
    """The sum of adapters, each times its strength, as one adapter in fp32 with one alpha.

    Args:
        adapters: what to add up, all for one family.
        rank: of the result; None adds the ranks and loses nothing.
        blocks: weights of layers on top of the strengths.

    Returns:
        The adapter, and what the rank lost.

    Raises:
        AdapterFileError: two adapters give a layer different shapes, or nothing is left of any layer.
        ConfigError: the rank is no number of columns, or a row of `blocks` matches nothing.
    """
    if rank is not None:
        check_rank(rank)
    for adapter in adapters:
        check_plain(adapter.weights)
    keys = dict.fromkeys(key for adapter in adapters for key in adapter.weights.layers)
    blocks = blocks or BlockWeights()
    blocks.check(keys)
    loss = TruncationLoss()
    pairs: dict[LayerKey, Pair] = {}
    for key in keys:
        terms = [
            (adapter.on(key[0]) * blocks.weight(key, number), adapter.weights.layers[key])
            for number, adapter in enumerate(adapters)
            if key in adapter.weights.layers
        ]
        terms = [(factor, layer) for factor, layer in terms if factor * layer.scale != 0]
        if not terms:
            continue
        pair = _stacked(key, terms)
        if rank is not None:
            pair, norm, lost = truncate_pair(pair, rank)
            loss.layers[key] = (norm, lost)
        pairs[key] = pair
    if not pairs:
        raise AdapterFileError("With these strengths and weights nothing is left of any layer.")
    return adapter_from_pairs(pairs), loss


def check_rank(rank: int) -> int:
    """The rank, if a layer can have it.

    Raises:
        ConfigError: it cannot.
    """
    if not 1 <= rank <= MAX_RANK:
        raise ConfigError(f"--rank {rank} is out of range; it goes from 1 to {MAX_RANK}.")
    return rank


def _stacked(key: LayerKey, terms: Sequence[tuple[float, LayerWeights]]) -> Pair:
    """The sum of the terms as one pair: up (out, R) or (out, R, 1, 1), down (R, in) or (R, in, k, k)."""
    # A 1 x 1 convolution and a linear layer are the same; where files differ, the longer shape can say both.
    template = max((layer.down.shape for _, layer in terms), key=len)
    ups, downs = [], []
    for factor, layer in terms:
        inner = layer.down.shape[1:]
        same = inner == template[1:] or (inner.numel() == inner[0] == template[1:].numel() == template[1])
        if not same or layer.up.shape[0] != terms[0][1].up.shape[0]:
            raise AdapterFileError(
                f"The files give {'.'.join(key)} different shapes, {_size(terms[0][1])} and {_size(layer)};"
                " they are for different bases."
            )
        ups.append(factor * layer.scale * layer.up.double().flatten(1))
        downs.append(layer.down.float().reshape(-1, *template[1:]))
    up = torch.cat(ups, dim=1)
    return up.reshape(*up.shape, *(1 for _ in template[2:])), torch.cat(downs)


def _size(layer: LayerWeights) -> str:
    return f"{list(layer.down.shape[1:])} to {layer.up.shape[0]}"


def truncate_pair(pair: Pair, rank: int) -> tuple[Pair, float, float]:
    """The best pair of at most `rank` columns, the squared norm of the update, and of what was cut off.

    With QR of both factors, up @ down = Qu (Ru Rd^T) Qd^T, and the SVD of the small core in the middle is
    that of the whole. The singular values are shared between the two factors, so that both keep a like size.
    """
    up, down = pair
    triples = singular_triples((up.flatten(1), down.flatten(1)))
    kept = min(rank, down.shape[0], len(triples.values))
    best = triples.leading(kept)
    root = best.values.sqrt()
    new_up = (best.u * root).reshape(-1, kept, *up.shape[2:])
    new_down = (root[:, None] * best.v.T).reshape(kept, *down.shape[1:])
    squares = triples.values.square()
    return (new_up, new_down.float()), float(squares.sum()), float(squares[kept:].sum())


def adapter_from_pairs(pairs: dict[LayerKey, Pair]) -> AdapterWeights:
    """An adapter in fp32 of pairs, which are taken out of their table: one alpha for all, the highest rank.

    Where a layer has fewer columns, its `up` makes up for the alpha that is too high for it.
    """
    alpha = max(down.shape[0] for _, down in pairs.values())
    layers = {}
    for key in list(pairs):
        up, down = pairs.pop(key)
        layers[key] = LayerWeights(down, (up * (down.shape[0] / alpha)).float(), float(alpha))
    return AdapterWeights(layers)


# An adapter cut to a rank: what a lower rank would have kept of it.


def truncate_adapter(weights: AdapterWeights, rank: int) -> AdapterWeights:
    """The best adapter of at most `rank` columns a layer; layers that have no more stay as they are.

    Raises:
        ConfigError: the rank is no number of columns.
    """
    check_rank(rank)
    layers = {}
    for key, layer in weights.layers.items():
        if layer.rank <= rank:
            layers[key] = layer
            continue
        (up, down), _, _ = truncate_pair((layer.up.double() * layer.scale, layer.down), rank)
        layers[key] = LayerWeights(down, up.float(), float(down.shape[0]), layer.magnitude)
    return AdapterWeights(layers, weights.metadata)


# Updates of any kind as a plain LoRA, by a truncated SVD, with the error told.
#
# A LoHa, a LoKr or a DoRA has no low rank by construction, so that a plain LoRA comes close and is not the
# same. Small updates are decomposed exactly. For large ones the range is found from random probes first, as
# that takes a tenth of the time; the error is measured against the update itself either way.


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


def to_lora(
    updates: Updates, rank: int, weight_of: WeightOf | None = None, note: Note | None = None
) -> tuple[AdapterWeights, TruncationLoss]:
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
    check_rank(rank)
    loss = TruncationLoss()
    pairs: dict[LayerKey, Pair] = {}
    for done, (key, update) in enumerate(updates.items(), 1):
        factors = update.factors() if update.magnitude is None else None
        if factors is not None:
            pairs[key], norm, lost = truncate_pair(factors, rank)
        else:
            weight = weight_of(key) if update.magnitude is not None and weight_of else None
            pairs[key], norm, lost = low_rank_pair(update.delta(weight), rank)
        if not (norm < float("inf")):
            raise AdapterFileError(f"The update of {update.name} holds numbers that are not finite.")
        loss.layers[key] = (norm, lost)
        if note is not None:
            note(done, len(updates))
    return adapter_from_pairs(pairs), loss


def low_rank_pair(delta: torch.Tensor, rank: int) -> tuple[Pair, float, float]:
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
        u, values, vh = randomized_svd(matrix, kept + _EXTRA)
    root = values[:kept].sqrt()
    up, down = u[:, :kept] * root, root[:, None] * vh[:kept]
    lost = float((matrix - up @ down).double().square().sum())
    ones = (1,) * (delta.dim() - 2)
    return (up.reshape(*up.shape, *ones), down.reshape(kept, *delta.shape[1:])), norm, lost


def randomized_svd(matrix: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest singular triples, from the range of the matrix applied to random probes.

    Source: Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1.
    """
    probes = torch.randn(matrix.shape[1], columns, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(matrix @ probes)[0]
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
    u, values, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, values, vh
