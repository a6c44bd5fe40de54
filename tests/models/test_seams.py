"""What a new architecture and a new kind of adapter need: a toy of each goes through the training loop."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_core.lora.inject import Injected, adapter_weights, inject, load_weights
from lora_core.lora.layer import FlatParams, LoraLayer, LoraSpec
from lora_core.lora.weights import LayerWeights
from lora_core.model_files.families import FAMILIES, Targets
from lora_core.models.load import BaseModel
from lora_core.models.unet import PromptEmbeds
from lora_core.settings.schema import ADAPTER_KINDS, AdapterKind, LossSection
from lora_core.train.loop import NoiseSample, diffusion_loss
from tests.tiny import flow_schedule

CPU = torch.device("cpu")
SPEC = LoraSpec(rank=4, alpha=4.0)
EVERY_LINEAR = Targets(unet=r"blocks\..*", text="")


class ToyDiT(nn.Module):
    """A transformer over the pixels of the latents, with the caption in front; predicts the flow."""

    latent_channels, downscale = 4, 1

    def __init__(self, width: int = 16, depth: int = 2) -> None:
        super().__init__()
        self.inner, self.time, self.text = nn.Linear(4, width), nn.Linear(1, width), nn.Linear(8, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
            for _ in range(depth)
        )
        self.outer = nn.Linear(width, 4)

    def predict(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, prompt: PromptEmbeds, time_ids: Any
    ) -> torch.Tensor:
        assert time_ids is None
        caption = self.text(prompt.context).mean(1, keepdim=True)
        tokens = (
            self.inner(noisy.flatten(2).transpose(1, 2)) + caption + self.time(timesteps.view(-1, 1, 1) / 100)
        )
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return self.outer(tokens).transpose(1, 2).view_as(noisy)


class GainLora(LoraLayer):
    """A toy kind: LoRA with a trained gain for each of its directions, which files fold into `up`."""

    factor_names = ("down", "up", "gain")

    def __init__(self, base: Any, name: str, spec: LoraSpec, *more: Any) -> None:
        super().__init__(base, name, spec, *more)
        self.gain = nn.Parameter(torch.ones(spec.rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        update = x @ self.down.T * self.gain @ self.up.T
        y: torch.Tensor = self.base(x) + self.strength * self.spec.alpha / self.spec.rank * update
        return y

    def layer_weights(self) -> LayerWeights:
        found = super().layer_weights()
        return replace(found, up=found.up * self.gain.detach())

    def from_layer_weights(self, weights: LayerWeights) -> None:
        self.gain.data.fill_(1.0)
        super().from_layer_weights(weights)


@pytest.fixture
def base() -> BaseModel:
    torch.manual_seed(0)
    family = replace(
        FAMILIES["tiny"], name="toy", denoiser="transformer", text_encoders=(), prediction="flow"
    )
    return BaseModel(
        name="toy", path=Path(), family=family, denoiser=ToyDiT().requires_grad_(False), vae=None,
        text_encoders={}, tokenizers={}, noise=flow_schedule(100), device=CPU,
        dtype=torch.float32, facts=None,
    )  # type: ignore[arg-type]  # fmt: skip


def train(base: BaseModel, spec: LoraSpec, steps: int = 40) -> tuple[Injected, list[float]]:
    """Train on one image; returns the adapter and the losses."""
    injected = inject(base.modules, base.family.parts, EVERY_LINEAR, spec, seed=0)
    flat = FlatParams([list(injected.layers.values())])
    optimizer = torch.optim.AdamW(flat.groups, 0.02)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 4, 4, generator=generator).expand(8, -1, -1, -1)
    prompt, losses = PromptEmbeds(torch.randn(1, 3, 8, generator=generator)).expand(8), []
    draw = NoiseSample(torch.arange(0, 80, 10), torch.randn(8, 4, 4, 4, generator=generator))
    for _ in range(steps):
        flat.zero_grad()
        loss = diffusion_loss(base, latents, prompt, draw, LossSection()).mean()
        loss.backward()
        flat.step(optimizer)
        losses.append(float(loss.detach()))
    return injected, losses


def test_a_transformer_that_predicts_flow_trains(base: BaseModel) -> None:
    assert base.family.parts == ("transformer",)
    injected, losses = train(base, SPEC)
    assert {part for part, _ in injected.layers} == {"transformer"}
    assert len(injected.layers) == 4
    assert losses[-1] < 0.7 * losses[0]


def test_flow_goes_in_a_straight_line_from_image_to_noise() -> None:
    noise = flow_schedule(100)
    image, other = torch.zeros(2, 4, 2, 2), torch.ones(2, 4, 2, 2)
    noisy = noise.add_noise(image, other, torch.tensor([24, 99]))
    torch.testing.assert_close(noisy[:, 0, 0, 0], torch.tensor([0.25, 1.0]))
    assert torch.equal(noise.target(image, other, torch.tensor([24, 99])), other - image)
    torch.testing.assert_close(noise.snr(torch.tensor([24])), torch.tensor([9.0]))


def test_another_kind_of_adapter_trains(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdapterKind, "resolve", lambda row: GainLora)
    injected, losses = train(base, replace(SPEC, kind=list(ADAPTER_KINDS)[-1]))
    assert losses[-1] < 0.7 * losses[0]
    layers = list(injected.layers.values())
    assert all(isinstance(layer, GainLora) and not layer.gain.allclose(torch.ones(4)) for layer in layers)
    x = torch.randn(3, 16)
    before = [layer(x) for layer in layers]
    load_weights(injected, adapter_weights(injected))
    for layer, y in zip(layers, before, strict=True):
        torch.testing.assert_close(layer(x), y)
