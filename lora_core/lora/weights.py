"""The one in-memory adapter: each file format translates to and from it, so n formats need n translators."""

from dataclasses import dataclass, field

import torch

from lora_core.model_files.families import is_text_encoder

LayerKey = tuple[str, str]
"""(part, module path): the part is one of `Family.parts`, such as "unet"; the path is diffusers'
dotted name below it, for text encoders always with the `text_model.` level
("text_model.encoder.layers.0.self_attn.q_proj")."""


@dataclass(frozen=True)
class LayerWeights:
    """The update of one layer: W = W0 + strength * (alpha / rank) * up @ down (Hu et al. 2021, section 4.1).

    Attributes:
        down: (r, in) for a linear layer, (r, in, k, k) for a convolution.
        up: (out, r) for a linear layer, (out, r, 1, 1) for a convolution.
        alpha: the numerator of the scale.
        magnitude: (out,) DoRA magnitudes, or None for plain LoRA.
    """

    down: torch.Tensor
    up: torch.Tensor
    alpha: float
    magnitude: torch.Tensor | None = None

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

    def delta(self) -> torch.Tensor:
        """The update at strength 1 in the shape of the layer's weight, in fp32."""
        up, down = self.up.float(), self.down.float()
        product = up.flatten(1) @ down.flatten(1)
        return (self.scale * product).reshape(self.weight_shape)


@dataclass(frozen=True)
class AdapterWeights:
    """An adapter: its layers by (part, module path), and the text metadata of its file."""

    layers: dict[LayerKey, LayerWeights]
    metadata: dict[str, str] = field(default_factory=dict)

    def parts(self) -> list[str]:
        """The adapted components, in order of first appearance."""
        return list(dict.fromkeys(part for part, _ in self.layers))


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
