"""Compact layers: the error of 8 bits, gradients of the full weight, nothing kept for the backward pass."""

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_core.backends.compact import (
    NF4_BLOCK,
    CompactConv2d,
    CompactLinear,
    FileStore,
    OffloadStore,
    WeightPolicy,
    compact_layers,
    is_offloaded,
    offload_store_for,
    quantize_int8,
    quantize_nf4,
    quantized_bits,
)
from lora_core.lora.inject import adapter_weights, inject
from lora_core.lora.layer import LoraSpec
from lora_core.lora.weights import LoadedLora, Merger
from lora_core.model_files.families import ATTENTION
from lora_core.models.load import load_base
from tests.tiny import tiny_folder, tiny_unet

CPU = torch.device("cpu")


def test_eight_bits_by_hand() -> None:
    packed, scale = quantize_int8(torch.tensor([[127.0, -1.0, 0.4], [0.0, 0.0, 0.0], [-2.54, 1.27, 0.02]]))
    assert packed.tolist() == [[127, -1, 0], [0, 0, 0], [-127, 64, 1]]
    assert scale.flatten().tolist()[::2] == pytest.approx([1.0, 0.02])
    weight = torch.randn(32, 16, 3, 3) * torch.logspace(-6, 6, 32).view(-1, 1, 1, 1)
    packed, scale = quantize_int8(weight)
    assert packed.dtype == torch.int8
    largest = weight.abs().amax((1, 2, 3))
    assert bool(((packed * scale - weight).abs().amax((1, 2, 3)) <= largest / 254 * 1.0001).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moved", [False, True], ids=["packed", "packed and moved"])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(24, 40), (2, 7, 24)),
        (nn.Linear(24, 40, bias=False), (3, 24)),
        (nn.Conv2d(8, 12, 3, padding=1, stride=2), (2, 8, 9, 9)),
        (nn.Conv2d(8, 12, 3, padding=2, dilation=2, groups=4, bias=False), (1, 8, 6, 7)),
        (nn.Conv2d(8, 12, 1), (2, 8, 4, 4)),
    ],
)  # fmt: skip
def test_the_gradient_is_that_of_the_whole_weight(
    layer: nn.Module, shape: tuple[int, ...], moved: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    layer = copy.deepcopy(layer).to(dtype).requires_grad_(False)
    root = nn.ModuleDict({"mid_block": nn.ModuleDict({"layer": layer})})
    WeightPolicy(quantize_int8, FileStore(CPU, tmp_path) if moved else None).apply_to(root)
    compact = root.get_submodule("mid_block.layer")
    assert isinstance(compact, CompactLinear | CompactConv2d)
    whole = copy.deepcopy(layer)
    packed, scale = quantize_int8(layer.weight)
    whole.weight.data.copy_(packed * scale)
    assert torch.equal(compact.weight, whole.weight)
    kept: list[torch.Tensor] = []
    found = []
    for module in (compact, whole):
        torch.manual_seed(3)
        x = torch.randn(shape, dtype=dtype).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = module(x)
        if module is compact:
            assert not kept
        found.append((y, torch.autograd.grad(y, x, torch.randn_like(y))[0]))
    assert kept
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


NF4 = [
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
]  # fmt: skip
"""The levels that appendix E of the QLoRA paper prints."""


@pytest.mark.parametrize("moved", [False, True], ids=["packed", "packed and moved"])
def test_four_bits_are_the_nearest_levels_of_each_block(
    bitsandbytes: Any, moved: bool, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    layer = nn.Linear(96, 40).requires_grad_(False)
    blocks = layer.weight.reshape(-1, NF4_BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(NF4)
    wanted = levels[(blocks / scale - levels[:, None, None]).abs().argmin(0)] * scale
    root = nn.ModuleDict({"mid_block": nn.ModuleDict({"layer": copy.deepcopy(layer)})})
    WeightPolicy(quantize_nf4, FileStore(CPU, tmp_path) if moved else None).apply_to(root)
    compact = root.get_submodule("mid_block.layer")
    assert isinstance(compact, CompactLinear)
    torch.testing.assert_close(compact.weight, wanted.reshape(40, 96), rtol=1e-5, atol=1e-6)
    assert compact.bits == 4
    x = torch.randn(3, 96).requires_grad_()
    y = compact(x)
    torch.testing.assert_close(y, x @ compact.weight.T + layer.bias)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, compact.weight.sum(0).expand(3, -1))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_base_that_waits_elsewhere_has_the_same_gradients(checkpointing: bool, tmp_path: Path) -> None:
    """Also the second time, when what follows is known and fetched ahead; with an adapter in it, before and
    after."""
    plain = tiny_unet().requires_grad_(False)
    early, late = copy.deepcopy(plain), copy.deepcopy(plain)
    WeightPolicy(None, FileStore(CPU, tmp_path)).apply_to(early)
    adapters = [
        inject({"unet": unet}, ["unet"], ATTENTION, LoraSpec(2, 2.0), 5) for unet in (plain, early, late)
    ]
    WeightPolicy(None, FileStore(CPU, tmp_path)).apply_to(late)
    assert len(compact_layers(early)) == len(compact_layers(late)) > 60
    torch.manual_seed(7)
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 7, 32)
    found = []
    for unet, injected in zip((plain, early, late), adapters, strict=True):
        unet.train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        for layer in injected.layers.values():
            nn.init.constant_(layer.up, 0.01)
        for _ in range(3):
            y = unet(x, t, context).sample
            grads = torch.autograd.grad(y.square().sum(), injected.parameters())
            found.append(torch.cat([y.flatten(), *(grad.flatten() for grad in grads)]))
    for other in found[1:]:
        assert (other - found[0]).norm() <= 1e-6 * found[0].norm()
    assert list(tmp_path.iterdir()) == []  # the file has no name, so that no kill leaves it


def test_only_blocks_are_compact_and_packing_keeps_the_place(tmp_path: Path) -> None:
    unet = tiny_unet().requires_grad_(False)
    before = unet.down_blocks[0].resnets[0].conv1.weight.clone()
    WeightPolicy(None, offload_store_for(CPU, tmp_path)).apply_to(unet)
    assert (quantized_bits(unet), is_offloaded(unet)) == (0, True)
    assert type(unet.conv_in) is nn.Conv2d
    assert type(unet.time_embedding.linear_1) is nn.Linear
    conv = unet.down_blocks[0].resnets[0].conv1
    assert torch.equal(conv.weight, before)
    WeightPolicy(quantize_int8).apply_to(unet)
    assert (quantized_bits(unet), is_offloaded(unet)) == (8, True)
    assert unet.down_blocks[0].resnets[0].conv1 is conv
    assert conv.data is None
    packed, scale = quantize_int8(before)
    assert torch.equal(conv.weight, packed * scale)
    again = conv.weight
    WeightPolicy(quantize_int8).apply_to(unet)
    assert torch.equal(conv.weight, again)


def test_a_base_is_compact_as_it_is_read(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base")
    whole = load_base(str(folder), CPU, torch.bfloat16)
    base = load_base(
        str(folder), CPU, torch.bfloat16, policy=WeightPolicy(quantize_int8, FileStore(CPU, tmp_path))
    )
    assert is_offloaded(base.denoiser)
    assert base.denoiser.dtype == torch.bfloat16
    WeightPolicy(quantize_int8).apply_to(whole.denoiser)
    for ours, theirs in zip(compact_layers(base.denoiser), compact_layers(whole.denoiser), strict=True):
        assert torch.equal(ours.weight, theirs.weight)


def test_an_adapter_is_added_to_what_a_packed_weight_stands_for() -> None:
    unet = tiny_unet().requires_grad_(False)
    modules: dict[str, nn.Module] = {"unet": unet}
    injected = inject({"unet": tiny_unet()}, ["unet"], ATTENTION, LoraSpec(2, 2.0), 5)
    with torch.no_grad():
        for tensor in injected.parameters():
            tensor.normal_(std=0.1)
    weights = adapter_weights(injected)
    WeightPolicy(quantize_int8).apply_to(unet)
    path = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    layer, update = unet.get_submodule(path), weights.layers["unet", path]
    rounded, kept = layer.weight.clone(), layer.data.clone()
    Merger(modules).apply([LoadedLora(weights, 0.5)])
    torch.testing.assert_close(layer.weight, rounded + 0.5 * update.delta())
    # Packing again, as where memory gets short, takes the weight alone.
    layer.quantize(quantize_int8)
    assert (layer.data - kept).abs().max() <= 1


def test_what_followed_last_time_is_fetched_ahead() -> None:
    begun: list[int] = []

    class Told(OffloadStore):
        def _store(self, data: torch.Tensor) -> None:
            pass

        def _begin(self, number: int) -> int:
            begun.append(number)
            return number

        def _finish(self, begun: int) -> torch.Tensor:
            return torch.tensor(begun)

    depot = Told()
    fetches = [depot.put(torch.zeros(1)) for _ in range(4)]
    order = [0, 1, 2, 3, 3, 2, 1, 0]
    for _ in range(2):
        assert [int(fetches[number]()) for number in order] == order
    for number in order:
        assert begun[-1] == number
        before = len(begun)
        assert int(fetches[number]()) == number
        assert len(begun) == before + 1


def test_a_file_that_cannot_be_read_back_is_an_error_of_the_drive(tmp_path: Path) -> None:
    depot = FileStore(CPU, tmp_path)
    data = torch.arange(7, dtype=torch.bfloat16).reshape(7, 1)
    fetch = depot.put(data)
    assert torch.equal(fetch(), data)
    depot._file.truncate(3)
    with pytest.raises(OSError, match="cannot be read back"):
        fetch()
    threads = threading.active_count()
    del depot, fetch
    assert threading.active_count() <= threads
