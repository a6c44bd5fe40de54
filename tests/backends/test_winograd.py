"""Convolutions by Winograd's way against torch's own, in double precision."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_core.backends.onednn import (
    AT_ONCE,
    GROWTH,
    transform_kernel,
    winograd_conv2d,
    winograd_fits,
    winograd_pays,
)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 5, 8, 8),
        (3, 5, 10, 6),
        (2, 5, 32, 48),  # more tiles a picture than are worked at together
        (70, 5, 4, 4),  # more pictures than that
        (1, 5, 4, 2 * AT_ONCE + 8),  # a row of tiles is more than that already
    ],
)
@pytest.mark.parametrize("biased", [True, False])
def test_it_equals_a_convolution(shape: tuple[int, ...], biased: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.randn(7, 5, 3, 3)
    bias = torch.randn(7) if biased else None
    kernel = transform_kernel(weight)
    assert kernel.numel() == GROWTH * weight.numel()
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
        ((3, 9, 4, 4), False),
        ((1, 9, 9, 8), False),
    ):
        assert winograd_pays(torch.Size(shape)) is good
