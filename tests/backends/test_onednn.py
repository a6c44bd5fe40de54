"""Prepacked layers: the same numbers as the plain ones, whatever the shape, and the plain ones come back."""

import copy
from unittest import mock

import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_core.backends import onednn
from lora_core.backends.onednn import (
    AT_ONCE,
    DIRECT,
    GROWTH,
    PLAIN,
    WINOGRAD,
    OneDnnConv2d,
    OneDnnLinear,
    choose_layout,
    is_available,
    is_prepacked,
    layout_of,
    pack,
    prepack,
    transform_kernel,
    undo_prepack,
    winograd_conv2d,
    winograd_fits,
    winograd_pays,
)
from lora_core.data.images import choose_bucket
from lora_core.lora.inject import inject
from lora_core.lora.layer import FlatParams, LoraSpec
from lora_core.model_files.families import KOHYA
from lora_core.model_files.sizes import PREPACKED_SPARE
from tests.tiny import tiny_unet

pytestmark = pytest.mark.skipif(not is_available(), reason="no oneDNN")


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that toys show what large layers do."""
    monkeypatch.setattr(onednn, "SMALLEST_LINEAR", 1)
    monkeypatch.setattr(onednn, "SMALLEST_CONVOLUTION", 1)
    monkeypatch.setattr(onednn, "SMALLEST_WINOGRAD", 1)


@pytest.mark.parametrize("layout", [DIRECT, WINOGRAD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("layer", "shapes"),
    [
        (nn.Linear(24, 40), [(2, 7, 24), (3, 24), (1, 1, 24)]),
        (nn.Linear(24, 40, bias=False), [(3, 24)]),
        (nn.Conv2d(8, 12, 3, padding=1), [(2, 8, 9, 9), (1, 8, 16, 4), (1, 8, 6, 4), (1, 8, 32, 20)]),
        (nn.Conv2d(8, 12, 3, padding=1, stride=2), [(2, 8, 9, 9), (2, 8, 8, 8)]),
        (nn.Conv2d(8, 12, 3, padding=2, dilation=2, bias=False), [(1, 8, 6, 7)]),
        (nn.Conv2d(4, 320, (3, 5), padding=(1, 2)), [(1, 4, 8, 8)]),
        (nn.Conv2d(24, 40, 1), [(2, 24, 8, 8), (1, 24, 5, 3)]),
    ],
)  # fmt: skip
def test_output_and_gradient(
    layer: nn.Module, shapes: list[tuple[int, ...]], dtype: torch.dtype, layout: str
) -> None:
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bf16")
    layer = copy.deepcopy(layer).to(dtype).requires_grad_(False)
    root = nn.Sequential(layer)
    prepack(root, layout)
    assert isinstance(root[0], OneDnnLinear | OneDnnConv2d)
    assert torch.equal(root[0].weight, layer.weight)
    near = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for shape in shapes:
        x = torch.randn(shape, dtype=dtype)
        turned = [x.to(memory_format=torch.channels_last)] if len(shape) == 4 else []
        for image in (x, *turned):
            pairs = []
            for one in (layer, root):
                given = image.clone().requires_grad_()
                y = one(given)
                y.float().square().sum().backward()
                pairs.append((y.detach(), given.grad))
            for plain, packed in zip(*pairs, strict=True):
                torch.testing.assert_close(packed, plain, **near)


@pytest.mark.parametrize("layout", [DIRECT, WINOGRAD])
def test_nothing_is_kept_for_the_backward_pass(layout: str) -> None:
    root = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, 2, 1)).requires_grad_(False)
    prepack(root, layout)
    assert layout_of(root) == layout
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        root(torch.randn(1, 4, 8, 8, requires_grad=True)).sum().backward()
    assert kept == []


def test_what_stays_plain() -> None:
    kinds = {
        "groups": nn.Conv2d(4, 4, 3, groups=2),
        "wrapping around": nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        "words": nn.Conv2d(4, 4, 3, padding="same"),
        "kernel of one, every second pixel": nn.Conv2d(1280, 1280, 1, stride=2),
        "long": nn.Linear(4, 4).double(),
    }
    root = nn.ModuleDict(kinds).requires_grad_(False)
    root["still trained"] = nn.Linear(4, 4)
    for layout in (PLAIN, DIRECT, WINOGRAD):
        prepack(root, layout)
        assert layout_of(root) == PLAIN
    assert choose_layout([root["groups"]]) == PLAIN


def test_small_weights_stay_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    same = {"padding": 1}
    kinds = [
        *(nn.Linear(255, 257), nn.Linear(256, 256), nn.Conv2d(255, 257, 1), nn.Conv2d(256, 256, 1)),
        *(nn.Conv2d(160, 320, 3, **same), nn.Conv2d(320, 320, 3, **same)),
        *(nn.Conv2d(320, 320, 3, 2, **same), nn.Conv2d(640, 320, 3, **same)),
    ]
    for layout, packed in ((DIRECT, [0, 1, 0, 1, 0, 0, 0, 1]), (WINOGRAD, [0, 1, 0, 1, 0, 1, 0, 1])):
        root = nn.Sequential(*kinds).requires_grad_(False)
        prepack(root, layout)
        assert [is_prepacked(layer) for layer in root] == [bool(one) for one in packed]


@pytest.mark.parametrize("layout", [DIRECT, WINOGRAD])
def test_an_adapted_unet_and_back(layout: str) -> None:
    plain, packed = tiny_unet(), tiny_unet()
    found = []
    for unet in (plain, packed):
        unet.requires_grad_(False)
        injected = inject({"unet": unet}, ["unet"], KOHYA, LoraSpec(4, 4.0), 0)
        storage = FlatParams([list(injected.layers.values())])
        with torch.no_grad():
            storage.data.copy_(
                0.1 * torch.randn(len(storage.data), generator=torch.Generator().manual_seed(0))
            )
        if unet is packed:
            before = list(unet.named_parameters())
            prepack(unet, layout)
            assert layout_of(unet) == layout
            assert any(isinstance(layer.base, OneDnnLinear) for layer in injected.layers.values())
            assert [name for name, _ in unet.named_parameters()] == [name for name, _ in before]
        generator = torch.Generator().manual_seed(6)
        latents, context = (
            torch.randn(2, 4, 8, 8, generator=generator),
            torch.randn(2, 7, 32, generator=generator),
        )
        unet(latents, torch.tensor([10, 700]), context).sample.square().mean().backward()
        found.append(storage.grads)
    assert (found[1] - found[0]).norm() <= 1e-5 * found[0].norm()
    undo_prepack(packed)
    assert not is_prepacked(packed)
    assert all(a is b for (_, a), (_, b) in zip(before, packed.named_parameters(), strict=True))


def test_images_stay_in_channels_last_until_the_plain_layers_are_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the first convolution on, which is too small to be packed."""
    monkeypatch.setattr(onednn, "SMALLEST_CONVOLUTION", 4 * 8 * 9 + 1)
    first, second, trained = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(4, 8, 3)
    root = nn.Sequential(first, second).requires_grad_(False)
    root.add_module("trained", trained)
    before, x = first.weight.clone(), torch.randn(1, 4, 6, 6)
    for layout in (PLAIN, DIRECT):
        prepack(root, layout)
        y = root[1](root[0](x))
        assert y.is_contiguous(memory_format=torch.channels_last) == (layout == DIRECT)
    assert root[0] is first
    assert root[1] is not second
    assert trained.weight.is_contiguous()
    undo_prepack(root)
    assert torch.equal(first.weight, before)
    assert root[1](first(x)).is_contiguous()


def test_the_layout_is_what_there_is_memory_for() -> None:
    layer = nn.Conv2d(256, 256, 3, padding=1).requires_grad_(False)
    for times, layout in ((1.9, PLAIN), (2.1, DIRECT), (3.5, DIRECT), (3.6, WINOGRAD)):
        memory = mock.Mock(available=PREPACKED_SPARE + times * layer.weight.nbytes)
        with mock.patch.object(psutil, "virtual_memory", lambda memory=memory: memory):
            assert choose_layout([layer]) == layout


# Convolutions by Winograd's way against torch's own, in double precision.


@pytest.mark.parametrize(
    "shape",
    [
        (1, 5, 8, 8),
        (3, 5, 10, 6),
        (2, 5, 32, 48),  # more tiles a picture than are worked at together
        (70, 5, 4, 4),  # more pictures than that
        (2, 5, 7, 9),  # odd sides
        (1, 5, 5, 2 * AT_ONCE + 7),
        (1, 5, 4, 2 * AT_ONCE + 8),  # a row of tiles is more than that already
    ],
)
@pytest.mark.parametrize("biased", [True, False])
def test_it_equals_a_convolution(shape: tuple[int, ...], biased: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.randn(7, 5, 3, 3)
    bias = torch.randn(7) if biased else None
    transformed = transform_kernel(weight)
    assert transformed.numel() == GROWTH * weight.numel()
    kernel = [pack(matrix) for matrix in transformed]
    found = winograd_conv2d(x, kernel, bias)
    known = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=1)
    assert (found - known).norm() <= 1e-6 * known.norm()
    turned = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(winograd_conv2d(turned, kernel, bias), found, rtol=0, atol=0)


def test_which_convolutions_it_is_for() -> None:
    assert winograd_fits(nn.Conv2d(4, 4, 3, padding=1))
    others = [
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, 1, padding=1),
        nn.Conv2d(4, 4, 3, stride=2, padding=1),
        nn.Conv2d(4, 4, 3, dilation=2, padding=2),
        nn.Conv2d(4, 4, 3, groups=2, padding=1),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, 3, padding=1).bfloat16(),
        nn.Conv2d(4, 4, 3, padding=1, device="meta"),
    ]
    assert not any(map(winograd_fits, others))


def test_which_pictures_it_is_for() -> None:
    for shape, good in (
        ((1, 9, 8, 8), True),
        ((4, 9, 4, 4), True),
        ((2, 9, 4, 4), False),
        ((1, 9, 9, 7), True),
        ((1, 9, 4, 8), False),
    ):
        assert winograd_pays(torch.Size(shape)) is good


def test_images_of_all_shapes_share_one_layout() -> None:
    """Also at the deepest level of Stable Diffusion 1.5, 64 pixels of the image to one, where sides are odd.
    A second layout of its kernels takes 2 GB that nobody has counted."""
    sides = range(512, 1100, 20)
    buckets = {choose_bucket(width, height, 512, 64) for width in sides for height in sides}
    shapes = [torch.Size((1, 1280, bucket.height // 64, bucket.width // 64)) for bucket in buckets]
    assert any(shape[2] % 2 for shape in shapes)
    assert all(map(winograd_pays, shapes))
