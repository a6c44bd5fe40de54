"""Going on from an existing LoRA: its update, as exactly as the new rank allows, as the start of a
training."""

import math

import torch

from lora_core.adapters.inject import Injected
from lora_core.adapters.weights import AdapterWeights, LayerWeights
from lora_core.spec.errors import AdapterFileError


def begin_with(injected: Injected, weights: AdapterWeights, name: str) -> list[str]:
    """Set fresh trainable layers so that they act as `weights` does; those that it lacks stay fresh.

    Args:
        injected: the layers, fresh from `inject_layers`.
        weights: what to go on with, of any ranks and alphas.
        name: of its file, for sentences.

    Returns:
        What a person should know of it, a sentence each: what was cut off, and what is not continued.

    Raises:
        AdapterFileError: nothing of it fits, or a layer has another shape than the base's.
    """
    common = [key for key in injected.layers if key in weights.layers]
    if not common:
        raise AdapterFileError(
            f"{name} adapts none of the layers that are to be trained; see adapter.targets."
        )
    whole, cut, shortened = 0.0, 0.0, 0
    for key in common:
        layer, given = injected.layers[key], weights.layers[key]
        fitting = tuple(layer.base.weight.shape)
        size = (given.up.shape[0], *given.down.shape[1:])
        if size[0] != fitting[0] or math.prod(size) != math.prod(fitting):
            raise AdapterFileError(
                f"{name} cannot be continued: its layer {'.'.join(key)} is {list(size)} large, the base's"
                f" {list(fitting)}; it is for another base."
            )
        fresh = LayerWeights(layer.down.detach(), layer.up.detach(), layer.shape.alpha)
        begun, kept, lost = begun_layer(given, fresh)
        layer.from_layer_weights(begun)
        if given.rank > fresh.rank:
            whole, cut, shortened = whole + kept + lost, cut + lost, shortened + 1
    notes = []
    if shortened:
        share = 1.0 - cut / whole if whole else 1.0
        notes.append(
            f"{shortened} layers of {name} have a higher rank than this run; their best approximation holds"
            f" {100 * share:.1f}% of their energy."
        )
    left = len(weights.layers) - len(common)
    if left:
        notes.append(
            f"{left} of the {len(weights.layers)} layers of {name} are not continued, because this run does"
            " not train them; its result is without them."
        )
    return notes


def begun_layer(given: LayerWeights, fresh: LayerWeights) -> tuple[LayerWeights, float, float]:
    """`given` in the rank and at the scale of `fresh`.

    Up to the rank of `fresh` the factors are kept, `up` scaled by the quotient of the two scales, and what is
    missing is filled up with the fresh rows of down and columns of zeros in up. Beyond it, the best
    approximation of
    that rank is taken (Eckart and Young 1936), through the singular values of the two small factors of a QR
    decomposition of up and down, so that the product is never formed.

    Returns:
        The layer, and how much of the update's squared norm is kept and how much is lost.
    """
    scale = given.scale / fresh.scale
    down, up = given.down.double().flatten(1), given.up.double().flatten(1)
    kept, lost = 0.0, 0.0
    if given.rank <= fresh.rank:
        new_down = torch.cat([down, fresh.down.double().flatten(1)[given.rank :].cpu()])
        new_up = torch.cat([scale * up, torch.zeros(len(up), fresh.rank - given.rank, dtype=torch.double)], 1)
    else:
        left, small_up = torch.linalg.qr(up)
        right, small_down = torch.linalg.qr(down.T)
        u, singular, v = torch.linalg.svd(small_up @ small_down.T * scale)
        squares = (singular * fresh.scale).square()
        kept, lost = float(squares[: fresh.rank].sum()), float(squares[fresh.rank :].sum())
        count = min(fresh.rank, len(singular))
        root = singular[:count].sqrt()
        new_up, new_down = (
            torch.zeros(len(up), fresh.rank).double(),
            fresh.down.double().flatten(1).cpu().clone(),
        )
        new_up[:, :count] = left @ u[:, :count] * root
        new_down[:count] = root[:, None] * (v[:count] @ right.T)
    layer = LayerWeights(
        new_down.float().reshape(fresh.down.shape), new_up.float().reshape(fresh.up.shape), fresh.alpha
    )
    return layer, kept, lost
