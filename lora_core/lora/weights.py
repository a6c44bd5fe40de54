"""The one in-memory adapter, to and from which each file format translates, and how it is merged into a base.

With s = alpha / rank, the update of a weight W0 is

    LoRA   s up @ down                                                      Hu et al. 2021, section 4.1
    LoHa   s (w1a @ w1b) * (w2a @ w2b), multiplied element by element       Yeh et al. 2023, section 4.1
    LoKr   s kron(w1, w2), each of which may be a product itself            the same
    DoRA   m (W0 + update) / |W0 + update| - W0, norms of rows or columns   Liu et al. 2024, equation 5

On a processor, a layer's weight is overwritten by the sum in fp32 and W0 is kept beside it: inference costs
what the base costs. On other devices memory is scarcer than time: W0 stays, the factors are copied to the
device once, in the base's dtype, and each use of a layer computes the sum anew, by one `addmm` for each
adapter. So a new strength copies nothing, and no weight is there twice; of the kinds other than a LoRA it is,
since the update is kept whole there.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from lora_core.backends.base import Adaptable, replace_submodule
from lora_core.backends.compact import CompactLayer, as_compact
from lora_core.errors import AdapterFileError
from lora_core.model_files.families import TEXT_LEVEL, is_text_encoder

LayerKey = tuple[str, str]
"""(part, module path): the part is one of `Family.parts`, such as "unet"; the path is diffusers'
dotted name below it, for text encoders always with the `text_model.` level
("text_model.encoder.layers.0.self_attn.q_proj")."""
Factors = tuple[torch.Tensor, torch.Tensor | None]
"""up (out, r) and down (r, in), or a whole update (out, in) and None."""


@dataclass(frozen=True)
class LoraSpec:
    """What all layers of one adapter share: rank, alpha, the probabilities of three kinds of dropout, and
    the kind, a key of `schema.ADAPTER_KINDS`."""

    rank: int
    alpha: float
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    kind: str = "lora"


@dataclass(frozen=True)
class LayerWeights:
    """The update of one layer: W = W0 + strength * (alpha / rank) * up @ down (Hu et al. 2021, section 4.1).

    Attributes:
        down: (r, in) for a linear layer, (r, in, k, k) for a convolution.
        up: (out, r) for a linear layer, (out, r, 1, 1) for a convolution.
        alpha: the numerator of the scale.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """The inner width r."""
        return self.down.shape[0]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the layer's weight: (out, in) or (out, in, k, k)."""
        return (self.up.shape[0], *self.down.shape[1:])

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def delta(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The update at strength 1 in the shape of the layer's weight, in fp32."""
        up, down = self.up.float(), self.down.float()
        product = up.flatten(1) @ down.flatten(1)
        return (self.scale * product).reshape(self.weight_shape)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of a kohya file, by what follows the layer's name."""
        return {"lora_down.weight": self.down, "lora_up.weight": self.up, "alpha": torch.tensor(self.alpha)}


@dataclass(frozen=True)
class Update:
    """The update of one layer, of any kind.

    Attributes:
        name: of the layer, for error sentences.
        low: the two factors of a LoRA; None for other kinds.
        roles: the tensors of a LoHa or a LoKr, by LyCORIS' names.
        scale: alpha / rank of a LoHa or a LoKr.
        kernel: (height, width) into which a flattened convolution is unfolded; () for a linear layer.
        magnitude: of a DoRA: (out, 1) where rows are normed, (1, in) where columns are.
    """

    name: str
    low: LayerWeights | None = None
    roles: Mapping[str, torch.Tensor] | None = None
    scale: float = 1.0
    kernel: tuple[int, ...] = ()
    magnitude: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """The inner width r; 0 where there is none, as in a LoKr of two full matrices."""
        if self.low is not None:
            return self.low.rank
        assert self.roles is not None
        names = ("hada_w1_b", "lokr_w2_b", "lokr_w1_b")
        return next((self.roles[name].shape[0] for name in names if name in self.roles), 0)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of a file, by what LyCORIS writes after the layer's name."""
        found = dict(self.roles or {})
        if self.low is not None:
            found |= self.low.tensors()
        elif self.rank:
            found["alpha"] = torch.tensor(self.scale * self.rank)
        if self.magnitude is not None:
            ones = (1,) * (len(self.weight_shape) - 2)
            found["dora_scale"] = self.magnitude.reshape(*self.magnitude.shape, *ones)
        return found

    def to(self, device: torch.device) -> "Update":
        """The update on a device."""
        low, roles, magnitude = self.low, self.roles, self.magnitude
        return replace(
            self,
            low=low and replace(low, down=low.down.to(device), up=low.up.to(device)),
            roles=roles and {role: tensor.to(device) for role, tensor in roles.items()},
            magnitude=None if magnitude is None else magnitude.to(device),
        )

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the update, (out, in) or (out, in, k, k), without computing it."""
        if self.low is not None:
            return self.low.weight_shape
        assert self.roles is not None
        shapes = {role: tensor.to("meta") for role, tensor in self.roles.items()}
        return tuple(replace(self, roles=shapes).product().shape)

    def check_base(self, shape: torch.Size) -> None:
        """Refuse a base in which the layer's weight has a shape that does not fit.

        Raises:
            AdapterFileError: names both shapes.
        """
        size = torch.Size(self.weight_shape)
        if size[0] != shape[0] or size.numel() != shape.numel():
            raise AdapterFileError(
                f"{self.name} has the shape {list(size)} in the file and {list(shape)} in the base; the file"
                " is for another base."
            )

    def product(self) -> torch.Tensor:
        """The update before magnitudes, in fp32."""
        if self.low is not None:
            return self.low.delta()
        assert self.roles is not None
        tensors = {role: tensor.float() for role, tensor in self.roles.items()}
        dense = self.scale * (_loha(tensors) if "hada_w1_a" in tensors else _lokr(tensors))
        if dense.dim() == 2 and self.kernel:
            return dense.reshape(dense.shape[0], -1, *self.kernel)
        return dense.flatten(1) if dense.shape[2:] == (1, 1) and not self.kernel else dense

    def factors(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(up, down) whose product is the update before magnitudes; None where their rank would not be low.

        An elementwise or Kronecker product of two products is a product of all pairs of their columns.
        """
        if self.low is not None:
            return self.low.scale * self.low.up.double(), self.low.down
        assert self.roles is not None
        pair = _paired({role: tensor.float() for role, tensor in self.roles.items()})
        if pair is None or 2 * pair[1].shape[0] > min(pair[0].shape[0], pair[1].shape[1]):
            return None
        up, down = self.scale * pair[0].double(), pair[1].reshape(pair[1].shape[0], *self.weight_shape[1:])
        return up.reshape(*up.shape, *(1 for _ in self.weight_shape[2:])), down

    def delta(self, weight: torch.Tensor | None) -> torch.Tensor:
        """The update at strength 1, in fp32; only a DoRA needs the frozen weight, in fp32 too.

        Raises:
            AdapterFileError: the weight has another shape.
        """
        product = self.product()
        if self.magnitude is None:
            return product
        assert weight is not None
        self.check_base(weight.shape)
        rows = self.magnitude.shape[1] == 1
        if self.magnitude.numel() != weight.shape[0 if rows else 1]:
            raise AdapterFileError(
                f"{self.name} has {self.magnitude.numel()} DoRA magnitudes for"
                f" {weight.shape[0 if rows else 1]} {'rows' if rows else 'columns'} of the base's layer."
            )
        return dora_update(weight, product, self.magnitude)


def _loha(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    halves = []
    for n in "12":
        a, b, core = tensors[f"hada_w{n}_a"], tensors[f"hada_w{n}_b"], tensors.get(f"hada_t{n}")
        # In the Tucker form the first factor is transposed.
        halves.append(a @ b if core is None else torch.einsum("ijkl,jr,ip->prkl", core, b, a))
    return halves[0] * halves[1]


def _lokr(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    first, second = (
        tensors[f"lokr_w{n}"] if f"lokr_w{n}" in tensors else _lokr_half(tensors, n) for n in "12"
    )
    return torch.kron(first.reshape(*first.shape, *(1,) * (second.dim() - 2)), second)


def _lokr_half(tensors: Mapping[str, torch.Tensor], n: str) -> torch.Tensor:
    a, b = tensors[f"lokr_w{n}_a"], tensors[f"lokr_w{n}_b"]
    if n == "2" and "lokr_t2" in tensors:
        return torch.einsum("ijkl,ip,jr->prkl", tensors["lokr_t2"], a, b).contiguous()
    return a @ b.flatten(1)


def _paired(tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A LoHa or a LoKr as (up, down), or None where one of its two parts is no product."""
    if "hada_t1" in tensors or "lokr_t2" in tensors:
        return None
    if "hada_w1_a" in tensors:
        a, b, c, d = (tensors[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
        up = a[:, :, None] * c[:, None, :]
        return up.flatten(1), (b[:, None, :] * d[None, :, :]).flatten(0, 1)
    if "lokr_w2" in tensors:
        return None
    if "lokr_w1" in tensors:
        first = tensors["lokr_w1"], torch.eye(tensors["lokr_w1"].shape[1])
    else:
        first = tensors["lokr_w1_a"], tensors["lokr_w1_b"]
    second = tensors["lokr_w2_a"], tensors["lokr_w2_b"].flatten(1)
    return torch.kron(first[0], second[0]), torch.kron(first[1], second[1])


def dora_update(
    weight: torch.Tensor, product: torch.Tensor, magnitude: torch.Tensor, norm: str = ""
) -> torch.Tensor:
    """m (W0 + update) / |V| - W0 in fp32, Liu et al. 2024, equation 5.

    Args:
        weight: W0, (out, in) or (out, in, k, k).
        product: the update before magnitudes, with as many elements.
        magnitude: m, (out, 1) or (1, in).
        norm: what |V| is: "rows" or "columns" of W0 + update, or "base rows", those of W0 alone; "" for
            the axis of the magnitudes.
    """
    merged = weight + product.reshape(weight.shape)
    norm = norm or ("rows" if magnitude.shape[1] == 1 else "columns")
    normed = (weight if norm == "base rows" else merged).reshape(*weight.shape[:2], -1)
    lengths = normed.norm(dim=(0, 2) if norm == "columns" else (1, 2)).reshape(
        (1, -1) if norm == "columns" else (-1, 1)
    )
    factor = magnitude.float() / lengths.clamp_min(torch.finfo(torch.float32).tiny)
    return merged * factor.reshape(*factor.shape, *(1,) * (weight.dim() - 2)) - weight


@dataclass(frozen=True)
class AdapterWeights:
    """An adapter: its layers by (part, module path), the text metadata of its file, and its layers of other
    kinds than a plain LoRA, which only some code can use: `check_plain` and `load_adapter` refuse them."""

    layers: dict[LayerKey, LayerWeights]
    metadata: dict[str, str] = field(default_factory=dict)
    others: dict[LayerKey, Update] = field(default_factory=dict)

    @property
    def highest_rank(self) -> int:
        """The largest inner width of a layer."""
        return max(layer.rank for layer in self.every_layer().values())

    def parts(self) -> list[str]:
        """The adapted components, in order of first appearance."""
        return list(dict.fromkeys(part for part, _ in self.every_layer()))

    def every_layer(self) -> dict[LayerKey, LayerWeights | Update]:
        """The layers of all kinds."""
        return {**self.layers, **self.others}


@dataclass(frozen=True)
class LoadedLora:
    """An adapter and its strengths: on the denoiser, and on the text encoders where that differs."""

    weights: AdapterWeights
    strength: float = 1.0
    text_strength: float | None = None

    def on(self, part: str) -> float:
        """The strength on a part."""
        text = self.text_strength
        return text if text is not None and is_text_encoder(part) else self.strength


def layer_by_path(module: nn.Module, path: str) -> tuple[str, Adaptable] | None:
    """The (real path, frozen layer) that a canonical path names in `module`, or None."""
    for candidate in dict.fromkeys((path, path.removeprefix(TEXT_LEVEL))):
        try:
            layer = module.get_submodule(candidate)
        except AttributeError:
            continue
        # An adapted layer hides the frozen one behind it.
        frozen = getattr(layer, "base", layer)
        if isinstance(frozen, Adaptable):
            return candidate, frozen
    return None


class Merger:
    """Merges adapters: W = W0 + sum of s (alpha/r) B A. Where every strength is 0 the weight is W0 bit for
    bit, and nothing depends on what was merged before."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        """Manage the components `modules`, by part."""
        self._modules = modules
        self._originals: dict[LayerKey, tuple[Adaptable, torch.Tensor]] = {}
        self._compact: dict[LayerKey, CompactLayer] = {}
        self._factors: dict[int, tuple[AdapterWeights, dict[LayerKey, Factors]]] = {}
        """By the adapter's id, beside the adapter, so that no other can have it."""

    def apply(self, adapters: list[LoadedLora]) -> None:
        """Make the base act as with exactly these adapters.

        Raises:
            AdapterFileError: a layer is not in this base or has another shape; nothing is changed then.
        """
        acting: dict[LayerKey, list[tuple[float, AdapterWeights]]] = {}
        for adapter in adapters:
            for key in adapter.weights.every_layer():
                self._prepare(key, adapter.weights)
                if strength := adapter.on(key[0]):
                    acting.setdefault(key, []).append((strength, adapter.weights))
        with torch.no_grad():
            for key, (layer, original) in self._originals.items():
                frozen = merged = original.float() if key in acting else original
                for strength, weights in acting.get(key, []):
                    delta = weights.every_layer()[key].delta(frozen)
                    merged = merged + strength * delta.reshape(original.shape)
                layer.weight.copy_(merged)
            if adapters and self._compact:
                used = {id(adapter.weights) for adapter in adapters}
                self._factors = {name: kept for name, kept in self._factors.items() if name in used}
            for key, compact in self._compact.items():
                compact.updates = [
                    (*self._factors_on_device(key, weights), strength * self._scale(key, weights))
                    for strength, weights in acting.get(key, [])
                ]

    def _scale(self, key: LayerKey, weights: AdapterWeights) -> float:
        return 1.0 if key in weights.others else weights.layers[key].scale

    def _factors_on_device(self, key: LayerKey, weights: AdapterWeights) -> Factors:
        """A layer's factors in its dtype and on its device."""
        _, factors = self._factors.setdefault(id(weights), (weights, {}))
        layer, found = self._compact[key], factors.get(key)
        if found is None or (layer.data is not None and found[0].device != layer.data.device):
            frozen = layer.dequantize() if layer.data is None else layer.data
            device = frozen.device
            if key in weights.others:
                delta = weights.others[key].to(device).delta(layer.dequantize().float())
                factors[key] = (delta.flatten(1).to(layer.dtype), None)
            else:
                update = weights.layers[key]
                up, down = (factor.flatten(1).to(device, layer.dtype) for factor in (update.up, update.down))
                factors[key] = (up, down)
        return factors[key]

    def _prepare(self, key: LayerKey, weights: AdapterWeights) -> None:
        """Check that a layer fits, and have its W0 kept."""
        part, path = key
        located = layer_by_path(self._modules[part], path) if part in self._modules else None
        if located is None:
            raise AdapterFileError(
                f"The adapter has a layer {part} {path} that this base does not have; it is for another base."
            )
        (real, layer), size = located, weights.every_layer()[key].weight_shape
        shape = layer.shape if isinstance(layer, CompactLayer) else layer.weight.shape
        if shape.numel() != math.prod(size) or shape[0] != size[0]:
            raise AdapterFileError(
                f"The adapter's layer {part} {path} is {size[1]} to {size[0]} wide, the base's "
                f"{shape[1]} to {shape[0]}; it is for another base."
            )
        if key in self._originals or key in self._compact:
            return
        # A weight on the CPU is merged in place.
        in_place = not isinstance(layer, CompactLayer) and layer.weight.device.type == "cpu"
        compact = None if in_place else as_compact(layer)
        if compact is None:
            self._originals[key] = (layer, layer.weight.detach().clone())
            return
        if compact is not layer:
            holder = self._modules[part].get_submodule(real)
            replace_submodule(self._modules[part], real if holder is layer else f"{real}.base", compact)
        self._compact[key] = compact
