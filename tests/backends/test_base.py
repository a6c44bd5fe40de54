"""Every frozen layer against the plain one: the same output and the same input gradient."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_core.backends.base import Adaptable, FrozenLayer, frozen_layer, replace_submodule
from lora_core.backends.compact import FileStore, as_compact, quantize_int8
from lora_core.backends.onednn import OneDnnConv2d, OneDnnLinear, is_available


def compact(layer: Adaptable, folder: Path) -> FrozenLayer:
    found = as_compact(layer)
    assert found is not None
    return found


def offloaded(layer: Adaptable, folder: Path) -> FrozenLayer:
    found = compact(layer, folder)
    found.offload(FileStore(torch.device("cpu"), folder))
    return found


def quantized(layer: Adaptable, folder: Path) -> FrozenLayer:
    found = compact(layer, folder)
    found.quantize(quantize_int8)
    layer.weight.data.copy_(found.weight)
    return found


def onednn(layer: Adaptable, folder: Path) -> FrozenLayer:
    if not is_available():
        pytest.skip("no oneDNN")
    return OneDnnConv2d(layer, True) if isinstance(layer, nn.Conv2d) else OneDnnLinear(layer)


@pytest.mark.parametrize("build", [lambda layer, _: layer, compact, offloaded, quantized, onednn])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(24, 40), (6, 24)),
        (nn.Conv2d(8, 12, 3, padding=1), (2, 8, 8, 8)),
        (nn.Conv2d(8, 12, 3, padding=1, stride=2), (2, 8, 9, 9)),
    ],
)  # fmt: skip
def test_output_and_input_gradient(
    layer: Adaptable,
    shape: tuple[int, ...],
    build: Callable[[Adaptable, Path], Adaptable],
    tmp_path: Path,
) -> None:
    plain = copy.deepcopy(layer).requires_grad_(False)
    frozen = frozen_layer(build(plain, tmp_path))
    x = torch.randn(shape, requires_grad=True)
    y = plain(x)
    grad_output = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, grad_output)
    with torch.no_grad():
        torch.testing.assert_close(frozen.forward_frozen(x), y, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(frozen.input_grad(grad_output, x), expected, rtol=1e-4, atol=1e-5)


def test_a_submodule_is_replaced_by_its_path() -> None:
    root = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
    new = nn.Identity()
    replace_submodule(root, "0.0", new)
    replace_submodule(root, "1", new)
    assert root[0][0] is root[1] is new
