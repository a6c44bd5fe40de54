"""Kinds of adapters beside the plain LoRA, under the names that LyCORIS gives them: their updates, and the
layers that train them. With s = alpha / rank, the update of a weight W0 is

    LoHa   s (w1a @ w1b) * (w2a @ w2b), multiplied element by element       Yeh et al. 2023, section 4.1
    LoKr   s kron(w1, w2), each of which may be a product itself            the same
    DoRA   m (W0 + update) / |W0 + update| - W0, norms of rows or columns   Liu et al. 2024, equation 5
    OFT    R^T W0 - W0, R = (1 + Q) (1 - Q)^-1 in blocks, Q = B - B^T       Qiu et al. 2023, section 3.3

DoRA is written here since PEFT's cannot be exported: it norms rows of the weight, which no other tool does
right, where the paper and LyCORIS norm columns (docs/decisions). Columns are a scale of the layer's input, so
that it costs a LoRA and one norm of the weight. OFT is written here too, since PEFT's rotates a layer's input
where LyCORIS and the tools rotate its output; s has no effect in it. PEFT's layers bring the parameters,
their random start and the formula; forward pass, seeds and files are ours, since theirs draw from the global
generator. A LoHa or a LoKr multiplies a dense update, which is as large as the weight: slower than a LoRA and
more memory.
"""

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lora_core.backends.base import Adaptable
from lora_core.errors import AdapterFileError
from lora_core.lora.layer import AdaptedLayer, DropoutState, LoraLayer, hash_seed
from lora_core.lora.weights import LayerKey, LayerUpdate, LayerWeights, LoraSpec, is_shape_of
from lora_core.model_files.sizes import oft_side

PEFT_NAME = "default"
"""The name of the one adapter of a PEFT layer."""
NO_LIMIT = 1e6
"""The alpha of an OFT's file, which limits |Q|. 0 is not a limit in LyCORIS, and no rotation in kohya's
networks/oft.py and in A1111 before 1.9."""


@dataclass(frozen=True)
class LycorisUpdate:
    """The update of one layer, of any kind.

    Attributes:
        name: of the layer, for error sentences.
        low: the two factors of a LoRA; None for other kinds.
        roles: the tensors of a LoHa, a LoKr or an OFT, by LyCORIS' names.
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
    def needs_base(self) -> bool:
        """Whether the update depends on the frozen weight."""
        return self.magnitude is not None or "oft_blocks" in (self.roles or {})

    @property
    def rank(self) -> int:
        """The inner width r, or the side of the blocks of an OFT; 0 where there is none, as in a LoKr of two
        full matrices."""
        if self.low is not None:
            return self.low.rank
        assert self.roles is not None
        names = ("hada_w1_b", "lokr_w2_b", "lokr_w1_b")
        if "oft_blocks" in self.roles:
            return self.roles["oft_blocks"].shape[1]
        return next((self.roles[name].shape[0] for name in names if name in self.roles), 0)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of a file, by what LyCORIS writes after the layer's name."""
        found = dict(self.roles or {})
        if self.low is not None:
            found |= self.low.tensors()
        elif self.rank:
            found["alpha"] = torch.tensor(NO_LIMIT if "oft_blocks" in found else self.scale * self.rank)
        if self.magnitude is not None:
            ones = (1,) * (len(self.weight_shape) - 2)
            found["dora_scale"] = self.magnitude.reshape(*self.magnitude.shape, *ones)
        return found

    def to(self, device: torch.device) -> "LycorisUpdate":
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
        """The shape of the update, (out, in) or (out, in, k, k), without computing it; (out,) of an OFT."""
        if self.low is not None:
            return self.low.weight_shape
        assert self.roles is not None
        if "oft_blocks" in self.roles:
            return (self.roles["oft_blocks"][..., 0].numel(),)
        shapes = {role: tensor.to("meta") for role, tensor in self.roles.items()}
        return tuple(replace(self, roles=shapes).product().shape)

    def check_base(self, shape: torch.Size) -> None:
        """Refuse a base in which the layer's weight has a shape that does not fit.

        Raises:
            AdapterFileError: names both shapes.
        """
        if not is_shape_of(self.weight_shape, shape):
            raise AdapterFileError(
                f"{self.name} has the shape {list(self.weight_shape)} in the file and {list(shape)} in the"
                " base; the file is for another base."
            )

    def product(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The update before magnitudes, in fp32; that of an OFT needs the frozen weight."""
        if self.low is not None:
            return self.low.delta()
        assert self.roles is not None
        tensors = {role: tensor.float() for role, tensor in self.roles.items()}
        if "oft_blocks" in tensors:
            assert weight is not None
            turn = oft_turn(tensors["oft_blocks"])
            return (turn.mT @ weight.float().reshape(*turn.shape[:2], -1)).reshape(weight.shape)
        dense = self.scale * (_loha(tensors) if "hada_w1_a" in tensors else _lokr(tensors))
        if dense.dim() == 2 and self.kernel:
            return dense.reshape(dense.shape[0], -1, *self.kernel)
        return dense.flatten(1) if dense.shape[2:] == (1, 1) and not self.kernel else dense

    def kronecker(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The matrices whose Kronecker product is the update of a LoKr, without its scale; None for others.

        The second has the kernel of a convolution in its rows.
        """
        tensors = {role: tensor.double() for role, tensor in (self.roles or {}).items()}
        if not any(role.startswith("lokr") for role in tensors):
            return None
        first, second = _lokr_halves(tensors)
        return first, second.flatten(1)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(up, down) whose product is the update before magnitudes; None where their rank would not be low.

        An elementwise or Kronecker product of two products is a product of all pairs of their columns.
        """
        if self.low is not None:
            return self.low.scale * self.low.up.double(), self.low.down
        assert self.roles is not None
        if self.needs_base:
            return None
        pair = _paired({role: tensor.float() for role, tensor in self.roles.items()})
        if pair is None or 2 * pair[1].shape[0] > min(pair[0].shape[0], pair[1].shape[1]):
            return None
        up, down = self.scale * pair[0].double(), pair[1].reshape(pair[1].shape[0], *self.weight_shape[1:])
        return up.reshape(*up.shape, *(1 for _ in self.weight_shape[2:])), down

    def delta(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The update at strength 1, in fp32; only a DoRA and an OFT need the frozen weight.

        With a weight, all is computed on its device.

        Raises:
            AdapterFileError: the weight has another shape.
        """
        update = self if weight is None else self.to(weight.device)
        if not update.needs_base:
            return update.product()
        assert weight is not None
        self.check_base(weight.shape)
        product, magnitude = update.product(weight), update.magnitude
        if magnitude is None:
            return product
        rows = magnitude.shape[1] == 1
        if magnitude.numel() != weight.shape[0 if rows else 1]:
            raise AdapterFileError(
                f"{self.name} has {magnitude.numel()} DoRA magnitudes for"
                f" {weight.shape[0 if rows else 1]} {'rows' if rows else 'columns'} of the base's layer."
            )
        return dora_update(weight, product, magnitude)


def as_update(key: LayerKey, layer: LayerUpdate) -> LycorisUpdate:
    """A layer of an adapter as what tools compute with, of any kind."""
    if isinstance(layer, LayerWeights):
        return LycorisUpdate(".".join(key), layer)
    assert isinstance(layer, LycorisUpdate)
    return layer


def _loha(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    halves = []
    for n in "12":
        a, b, core = tensors[f"hada_w{n}_a"], tensors[f"hada_w{n}_b"], tensors.get(f"hada_t{n}")
        # In the Tucker form the first factor is transposed.
        halves.append(a @ b if core is None else torch.einsum("ijkl,jr,ip->prkl", core, b, a))
    return halves[0] * halves[1]


def _lokr(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    first, second = _lokr_halves(tensors)
    return torch.kron(first.reshape(*first.shape, *(1,) * (second.dim() - 2)), second)


def _lokr_halves(tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    return [tensors[f"lokr_w{n}"] if f"lokr_w{n}" in tensors else _lokr_half(tensors, n) for n in "12"]


def _lokr_half(tensors: Mapping[str, torch.Tensor], n: str) -> torch.Tensor:
    a, b = tensors[f"lokr_w{n}_a"], tensors[f"lokr_w{n}_b"]
    if n == "2" and "lokr_t2" in tensors:
        return torch.einsum("ijkl,ip,jr->prkl", tensors["lokr_t2"], a, b).contiguous()
    return a @ b.flatten(1)


def _paired(tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A LoHa or a LoKr as (up, down), or None where one of its two parts is not a product."""
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


def oft_turn(blocks: torch.Tensor) -> torch.Tensor:
    """R - 1 = 2 (1 - Q)^-1 Q of R = (1 + Q) (1 - Q)^-1, Cayley's rotation, and Q = B - B^T.

    Args:
        blocks: B, (blocks, side, side); 0 for no rotation.
    """
    skew = blocks - blocks.mT
    eye = torch.eye(blocks.shape[1], dtype=blocks.dtype, device=blocks.device)
    return 2 * torch.linalg.solve(eye - skew, skew)


class OftLayer(AdaptedLayer):
    """y = R^T (W0 x) + bias with a block-diagonal rotation R, so that weights keep their lengths and angles.

    Blocks are as large as the largest divisor of the outputs that is at most the rank, and start at zero. A
    strength multiplies the update. Source: Qiu et al. 2023, section 3.3, of outputs as in LyCORIS' diag-oft.
    """

    factor_names: tuple[str, ...] = ("oft_blocks",)

    def __init__(self, base: Adaptable, name: str, spec: LoraSpec, state: DropoutState, seed: int) -> None:
        super().__init__(base, name, spec, state, seed)
        weight = base.weight
        side = oft_side(spec.rank, len(weight))
        self.oft_blocks = nn.Parameter(torch.zeros(len(weight) // side, side, side, device=weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out), or (B, in, h, w) to (B, out, h', w')."""
        frozen: torch.Tensor = self.base(x)
        if self.strength == 0:
            return frozen
        bias, is_conv = self.base.bias, isinstance(self.base, nn.Conv2d)
        y = frozen if bias is None else frozen - (bias.view(-1, 1, 1) if is_conv else bias)
        turn = (self.strength * oft_turn(self.oft_blocks)).to(y.dtype)
        axis, terms = (1, "knm,bknhw->bkmhw") if is_conv else (-1, "knm,...kn->...km")
        return frozen + torch.einsum(terms, turn, y.unflatten(axis, turn.shape[:2])).reshape(y.shape)

    def layer_weights(self) -> LycorisUpdate:
        """See `AdaptedLayer`."""
        return LycorisUpdate(self.name, None, {"oft_blocks": self.oft_blocks.detach().cpu().clone()})

    def factors_of(self, weights: LayerUpdate) -> list[torch.Tensor]:
        """See `AdaptedLayer`."""
        assert isinstance(weights, LycorisUpdate)
        assert weights.roles is not None
        return [weights.roles["oft_blocks"]]


class DoraLayer(LoraLayer):
    """y = (W0 + s up down) (g x) + bias with g = m / |W0 + s up down|, one for each input channel.

    The norms are over outputs, and for a convolution over its kernel too; they are constants for the
    gradient. m starts at |W0|, so that training starts at the base. A strength other than 0 and 1 multiplies
    the update, as in other tools, not its factors.

    Source: Liu et al. 2024, equation 5 and section 4.3.
    """

    factor_names: tuple[str, ...] = ("down", "up", "magnitude")

    def __init__(self, base: Adaptable, name: str, spec: LoraSpec, state: DropoutState, seed: int) -> None:
        super().__init__(base, name, spec, state, seed)
        self.magnitude = nn.Parameter(self._norms())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As of `LoraLayer`."""
        if self.strength not in (0.0, 1.0):
            frozen, strength = self.base(x), self.strength
            self.strength = 1.0
            try:
                return torch.lerp(frozen, self(x), strength)
            finally:
                self.strength = strength
        if self.strength == 0:
            return super().forward(x)
        gain = self.magnitude / self._norms()
        if isinstance(self.base, nn.Conv2d):
            gain = gain.view(-1, 1, 1)
        if x.dtype == gain.dtype:
            return super().forward(x * gain)
        # In half precision a gain near 1 is 1, so its difference to 1 goes through the layer separately.
        added, bias = super().forward(x * (gain - 1).to(x.dtype)), self.base.bias
        if bias is not None:
            added = added - (bias.view(-1, 1, 1) if isinstance(self.base, nn.Conv2d) else bias)
        return super().forward(x) + added

    @torch.no_grad()
    def _norms(self) -> torch.Tensor:
        """|W0 + s up down| by input channel, (in,), in fp32."""
        weight = self.base.weight
        product = self.up.flatten(1) @ self.down.flatten(1)
        merged = weight.to(product.dtype).flatten(1).add(product, alpha=self.spec.alpha / self.spec.rank)
        norms: torch.Tensor = merged.view(*weight.shape[:2], -1).norm(dim=(0, 2))
        return norms.clamp_min(torch.finfo(norms.dtype).tiny)

    def layer_weights(self) -> LycorisUpdate:
        """See `AdaptedLayer`."""
        low = super().layer_weights()
        assert isinstance(low, LayerWeights)
        return LycorisUpdate(self.name, low, magnitude=self.magnitude.detach().cpu().clone().view(1, -1))

    def factors_of(self, weights: LayerUpdate) -> list[torch.Tensor]:
        """See `AdaptedLayer`; a plain LoRA has the magnitudes with which it acts as it is."""
        if isinstance(weights, LycorisUpdate):
            assert weights.low is not None
            assert weights.magnitude is not None
            return [weights.low.down, weights.low.up, weights.magnitude]
        assert isinstance(weights, LayerWeights)
        delta = weights.delta().to(self.base.weight.device)
        merged = self.base.weight.float() + delta.view(self.base.weight.shape)
        return [weights.down, weights.up, merged.view(*merged.shape[:2], -1).norm(dim=(0, 2))]


class PeftLayer(AdaptedLayer):
    """y = base(x) + strength * delta x, where delta is the update of a layer of PEFT."""

    def __init__(
        self, config: type, base: Adaptable, name: str, spec: LoraSpec, state: DropoutState, seed: int
    ) -> None:
        """Wrap `base` with the layer that `config`, one of PEFT's configs, makes."""
        super().__init__(base, name, spec, state, seed)
        # PEFT starts an adapter in the global generator, and asks its base for its shape alone.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash_seed(seed, name))
            holder = nn.ModuleDict({"layer": _empty_like(base)})
            settings = config(r=spec.rank, alpha=spec.alpha, target_modules=["layer"])
            source: Any = importlib.import_module("peft").inject_adapter_in_model(settings, holder)["layer"]
        source.base_layer.to("meta")
        # In a tuple, as a module it would be moved and walked with the base.
        self._source = (source,)
        self.factor_names = tuple(
            factor for factor in source.adapter_layer_names if PEFT_NAME in getattr(source, factor)
        )
        for factor in self.factor_names:
            start = getattr(source, factor)[PEFT_NAME].detach()
            self.set_factor(factor, nn.Parameter(start.to(base.weight.device)))
        if not self.update().rank:
            # As LyCORIS has it: where no factor has a rank, alpha means nothing.
            source.scaling[PEFT_NAME] = 1.0

    def set_factor(self, name: str, factor: nn.Parameter) -> None:
        """See `AdaptedLayer`."""
        super().set_factor(name, factor)
        getattr(self._source[0], name)[PEFT_NAME] = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out), or (B, in, h, w) to (B, out, h', w')."""
        base, frozen = self.base, self.base(x)
        if self.strength == 0:
            return frozen
        delta = (self.strength * self._source[0].get_delta_weight(PEFT_NAME)).to(x.dtype)
        if isinstance(base, nn.Conv2d):
            update = F.conv2d(x, delta, None, base.stride, base.padding, base.dilation, base.groups)
        else:
            update = F.linear(x, delta)
        return frozen + update.to(frozen.dtype)

    def update(self) -> LycorisUpdate:
        """The update, of the live parameters."""
        roles = {name: getattr(self, name).detach() for name in self.factor_names}
        kernel = self.base.kernel_size if isinstance(self.base, nn.Conv2d) else ()
        return LycorisUpdate(self.name, None, roles, self._source[0].scaling[PEFT_NAME], kernel)

    def layer_weights(self) -> LycorisUpdate:
        """See `AdaptedLayer`."""
        found = self.update()
        assert found.roles is not None
        return replace(found, roles={name: factor.cpu().clone() for name, factor in found.roles.items()})

    def factors_of(self, weights: LayerUpdate) -> list[torch.Tensor]:
        """See `AdaptedLayer`."""
        assert isinstance(weights, LycorisUpdate)
        assert weights.roles is not None
        return [weights.roles[name] for name in self.factor_names]


def _empty_like(layer: Adaptable) -> nn.Module:
    """A plain layer of the same shape in fp32, without values."""
    if isinstance(layer, nn.Conv2d):
        sizes = (layer.in_channels, layer.out_channels, layer.kernel_size)
        return nn.utils.skip_init(nn.Conv2d, *sizes, groups=layer.groups, bias=False)
    return nn.utils.skip_init(nn.Linear, layer.in_features, layer.out_features, bias=False)


def layer_maker(found: type) -> Any:
    """What makes the layers of a row of `schema.ADAPTER_KINDS`, which names one of our layers or a config of
    PEFT."""
    return found if issubclass(found, AdaptedLayer) else functools.partial(PeftLayer, found)
