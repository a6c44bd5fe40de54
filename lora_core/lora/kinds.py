"""Kinds of adapters beside the plain LoRA of `layer.py`: DoRA, and LoHa and LoKr by PEFT's layers.

DoRA is written here since PEFT's cannot be exported: it norms rows of the weight, which no other tool does
right, where the paper and LyCORIS norm columns (docs/decisions). Columns are a scale of the layer's input, so
that it costs a LoRA and one norm of the weight. PEFT's layers bring the parameters, their random start and
the formula; forward pass, seeds and files are ours, since theirs draw from the global generator. A LoHa or a
LoKr multiplies a dense update, which is as large as the weight: slower than a LoRA and more memory.
"""

import functools
import importlib
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lora_core.backends.base import Adaptable
from lora_core.lora.layer import AdaptedLayer, DropoutState, LoraLayer, hash_seed
from lora_core.lora.weights import LayerWeights, LoraSpec, Update

PEFT_NAME = "default"
"""The name of the one adapter of a PEFT layer."""


class DoraLayer(LoraLayer):
    """y = (W0 + s up down) (g x) + bias with g = m / |W0 + s up down|, one for each input channel.

    The norms are over outputs, and for a convolution over its kernel too; they are constants for the
    gradient. m starts at |W0|, so that training starts at the base. A strength other than 0 and 1 multiplies
    the update, as in other tools, not its factors.

    Source: Liu et al. 2024, equation 5 and section 4.3.
    """

    factor_names: tuple[str, ...] = ("down", "up", "magnitude")

    def __init__(self, base: Adaptable, name: str, spec: LoraSpec, state: DropoutState, seed: int) -> None:
        """See `AdaptedLayer`."""
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
        # In half precision a gain near 1 is 1, so what it adds goes through the layer by itself.
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

    def layer_weights(self) -> LayerWeights | Update:
        """See `AdaptedLayer`."""
        low = super().layer_weights()
        assert isinstance(low, LayerWeights)
        return Update(self.name, low, magnitude=self.magnitude.detach().cpu().clone().view(1, -1))

    def factors_of(self, weights: LayerWeights | Update) -> list[torch.Tensor]:
        """See `AdaptedLayer`; a plain LoRA has the magnitudes with which it acts as it is."""
        if isinstance(weights, Update):
            assert weights.low is not None
            assert weights.magnitude is not None
            return [weights.low.down, weights.low.up, weights.magnitude]
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

    def update(self) -> Update:
        """The update, of the live parameters."""
        roles = {name: getattr(self, name).detach() for name in self.factor_names}
        kernel = self.base.kernel_size if isinstance(self.base, nn.Conv2d) else ()
        return Update(self.name, None, roles, self._source[0].scaling[PEFT_NAME], kernel)

    def layer_weights(self) -> LayerWeights | Update:
        """See `AdaptedLayer`."""
        found = self.update()
        assert found.roles is not None
        return replace(found, roles={name: factor.cpu().clone() for name, factor in found.roles.items()})

    def factors_of(self, weights: LayerWeights | Update) -> list[torch.Tensor]:
        """See `AdaptedLayer`."""
        assert isinstance(weights, Update)
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
