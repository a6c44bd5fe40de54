"""The intrinsic rank where a whole layer does nothing; the rest of it is in `test_shrink.py`."""

from collections.abc import Sequence

import torch

from lora_core.lora.inject import LoadedLora
from lora_core.lora.weights import AdapterWeights, LayerKey, LayerWeights
from lora_core.tools.shrink import intrinsic_rank
from tests.tools.planted import TO_K, TO_Q, dense, layer_of, orthonormal, shape_of


def layer(key: LayerKey, values: Sequence[float], rank: int, seed: int) -> LayerWeights:
    """A layer with these singular values, in factors of a higher rank."""
    draw = torch.Generator().manual_seed(seed)
    out, inner = shape_of(key)[0], torch.Size(shape_of(key)[1:]).numel()
    mix = torch.randn(rank, len(values), generator=draw, dtype=torch.float64)
    up = orthonormal(out, len(values), draw) * torch.tensor(values, dtype=torch.float64)
    return layer_of(
        up @ torch.linalg.pinv(mix), mix @ orthonormal(inner, len(values), draw).T, key, float(rank)
    )


class Truth:
    """Gains that fall with the squared distance from a target, by picture."""

    def __init__(self, layers: dict[LayerKey, LayerWeights]) -> None:
        self.target = {key: dense(one) for key, one in layers.items()}
        self.whole = sum(float(d.square().sum()) for d in self.target.values())

    def __call__(self, adapters: Sequence[LoadedLora]) -> torch.Tensor:
        (adapter,) = adapters
        away = 0.0
        for key, target in self.target.items():
            found = adapter.weights.layers.get(key)
            away += float((target - (dense(found, adapter.strength) if found else 0.0)).square().sum())
        pictures = torch.tensor([0.8, 1.0, 1.2], dtype=torch.float64)
        return (pictures * (1 - away / self.whole))[:, None].expand(3, 4)


def test_pooled_energies_leave_out_what_does_nothing() -> None:
    """All of the gain is in one layer: a uniform rank keeps four columns of the other for nothing."""
    layers = {
        TO_K: layer(TO_K, [1.0, 1.0, 1.0, 1.0], 8, 0),
        TO_Q: layer(TO_Q, [0.01, 0.01, 0.01, 0.01], 8, 1),
    }
    _, found = intrinsic_rank(AdapterWeights(layers), Truth(layers))
    assert found.rank == 4
    assert found.pooled is not None
    assert found.pooled.ranks == {TO_K: 4, TO_Q: 0}
    assert "rank 4 and 1 of 2 layers left out" in found.sentence(4.0)
    assert found.best.kept >= 0.99
