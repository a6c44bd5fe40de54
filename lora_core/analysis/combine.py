"""Several adapters as one: the sum of their updates, exactly or at a chosen rank.

The update of a layer is the sum over files of s (alpha/r) up @ down. Factors that are put beside each other
give that sum, [u1 u2] [d1; d2] = u1 d1 + u2 d2, and ranks add; factors that are added to each other would
give the cross terms u1 d2 and u2 d1 as well. A lower rank comes from a truncated SVD, which is the best there
is of its rank (Eckart and Young 1936). It is taken of a core of (sum of ranks)^2 numbers between the Q of
both stacks, in double precision, so that the update itself is never formed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lora_core.adapters.inject import Strengthened
from lora_core.adapters.weights import AdapterWeights, LayerKey, LayerWeights
from lora_core.analysis.blocks import Blocks
from lora_core.analysis.factors import Pair, singular_triples
from lora_core.formats.layers import check_plain
from lora_core.spec.errors import AdapterFileError, ConfigError

MAX_RANK = 4096
"""No layer of a Stable Diffusion has a higher one."""


@dataclass
class Loss:
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


def merged(
    adapters: Sequence[Strengthened], rank: int | None = None, blocks: Blocks | None = None
) -> tuple[AdapterWeights, Loss]:
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
        checked_rank(rank)
    for adapter in adapters:
        check_plain(adapter.weights)
    keys = dict.fromkeys(key for adapter in adapters for key in adapter.weights.layers)
    blocks = blocks or Blocks()
    blocks.check(keys)
    loss = Loss()
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
            pair, norm, lost = truncated(pair, rank)
            loss.layers[key] = (norm, lost)
        pairs[key] = pair
    if not pairs:
        raise AdapterFileError("With these strengths and weights nothing is left of any layer.")
    return with_one_alpha(pairs), loss


def checked_rank(rank: int) -> int:
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


def truncated(pair: Pair, rank: int) -> tuple[Pair, float, float]:
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


def with_one_alpha(pairs: dict[LayerKey, Pair]) -> AdapterWeights:
    """An adapter in fp32 of pairs, which are taken out of their table: one alpha for all, the highest rank.

    Where a layer has fewer columns, its `up` makes up for the alpha that is too high for it.
    """
    alpha = max(down.shape[0] for _, down in pairs.values())
    layers = {}
    for key in list(pairs):
        up, down = pairs.pop(key)
        layers[key] = LayerWeights(down, (up * (down.shape[0] / alpha)).float(), float(alpha))
    return AdapterWeights(layers)
