"""oneDNN's private operators: where they are missing or wrong, layers stay plain and training goes on."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from lora_core.backends import onednn
from lora_core.backends.onednn import DIRECT, PLAIN, WINOGRAD, choose_layout, layout_of, prepack
from lora_core.lora.inject import inject
from lora_core.lora.layer import FlatParams, LoraSpec
from lora_core.model_files.families import LOCON
from tests.tiny import tiny_unet


def broken(*_: Any) -> Any:
    raise RuntimeError("schema mismatch")


def wrong(layer: Any, x: torch.Tensor, *_: Any) -> torch.Tensor:
    return nn.functional.linear(x, layer.weight, layer.bias) + 0.1


@pytest.fixture(autouse=True)
def check_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("no oneDNN")
    for name in ("SMALLEST_LINEAR", "SMALLEST_CONVOLUTION", "SMALLEST_WINOGRAD"):
        monkeypatch.setattr(onednn, name, 1)
    onednn.is_available.cache_clear()
    yield
    onednn.is_available.cache_clear()


def step(unet: nn.Module) -> torch.Tensor:
    """The gradients of an adapter's first step."""
    unet.requires_grad_(False)
    flat = FlatParams([list(inject({"unet": unet}, ["unet"], LOCON, LoraSpec(2, 2.0), 0).layers.values())])
    for layout in (DIRECT, WINOGRAD):
        prepack(unet, layout)
    generator = torch.Generator().manual_seed(1)
    latents, context = (torch.randn(*shape, generator=generator) for shape in ((1, 4, 8, 8), (1, 7, 32)))
    unet(latents, torch.tensor([500]), context).sample.square().mean().backward()
    return flat.grads


@pytest.mark.parametrize(
    ("patch", "reason"),
    [
        (lambda m: m.setattr(onednn.OneDnnLinear, "__init__", broken), "Linear fails with RuntimeError"),
        (lambda m: m.setattr(onednn.OneDnnConv2d, "forward_frozen", broken), "Conv2d fails with"),
        (lambda m: m.setattr(onednn.OneDnnLinear, "forward_frozen", wrong), "Linear computes other values"),
        (lambda m: m.setattr(torch, "__version__", "2.99.1+cpu"), "2.99.1+cpu is not among the tested"),
    ],
)
def test_training_falls_back_to_plain_layers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, patch: Any, reason: str
) -> None:
    plain = tiny_unet()
    patch(monkeypatch)
    with caplog.at_level(logging.WARNING):
        grads = step(plain)
        assert choose_layout([plain]) == PLAIN
    assert layout_of(plain) == PLAIN
    assert grads.isfinite().all()
    assert grads.any()
    (record,) = caplog.records
    assert reason in record.getMessage()


def test_working_operators_are_used(caplog: pytest.LogCaptureFixture) -> None:
    unet = tiny_unet()
    step(unet)
    assert layout_of(unet) != PLAIN
    assert caplog.records == []
