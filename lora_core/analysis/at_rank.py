"""An adapter cut to a rank: what a lower rank would have kept of it."""

from lora_core.adapters.weights import AdapterWeights, LayerWeights
from lora_core.analysis.combine import checked_rank, truncated


def at_rank(weights: AdapterWeights, rank: int) -> AdapterWeights:
    """The best adapter of at most `rank` columns a layer; layers that have no more stay as they are.

    Raises:
        ConfigError: the rank is no number of columns.
    """
    checked_rank(rank)
    layers = {}
    for key, layer in weights.layers.items():
        if layer.rank <= rank:
            layers[key] = layer
            continue
        (up, down), _, _ = truncated((layer.up.double() * layer.scale, layer.down), rank)
        layers[key] = LayerWeights(down, up.float(), float(down.shape[0]), layer.magnitude)
    return AdapterWeights(layers, weights.metadata)
