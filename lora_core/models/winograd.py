"""Convolutions of 3 x 3 with 4 / 9 of the multiplications: Winograd's F(2 x 2, 3 x 3).

The picture is cut into tiles of 4 x 4 that overlap by two; each gives 2 x 2 of the output. Tiles and kernels
are transformed, multiplied point by point, which for all channels together are 16 products of matrices, and
the products are transformed back. A frozen kernel is transformed once. Transforming a tile takes additions
alone; they are done as products with small matrices of 0, 1 and -1, which is the fastest way that torch has.

Source: Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural Networks", section 4.1.
"""

import torch
import torch.nn.functional as F
from torch import nn

TILE, STEP = 4, 2
AT_ONCE = 128
"""So many tiles are worked at together: more fall out of the processor's cache between two passes."""
LEAST = 16
"""With fewer tiles, reading the transformed kernel, 16 / 9 as large, takes longer than it saves."""
GROWTH = 16 / 9
"""Size of a transformed kernel, as a multiple of the kernel's."""
_TILE = torch.tensor([[1.0, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
_KERNEL = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
_BACK = torch.tensor([[1.0, 1, 1, 0], [0, 1, -1, -1]])
_BOTH, _BOTH_BACK = torch.kron(_TILE, _TILE), torch.kron(_BACK, _BACK)


def fits(layer: nn.Conv2d) -> bool:
    """Whether a convolution is of the kind: fp32 on a processor, 3 x 3, of the same size before and after."""
    same = layer.kernel_size == (3, 3) and layer.padding in (1, (1, 1)) and layer.groups == 1
    plain = set(layer.stride) == {1} and set(layer.dilation) == {1} and layer.padding_mode == "zeros"
    return same and plain and layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu"


def pays(shape: torch.Size) -> bool:
    """Whether pictures (B, C, h, w) are even, and enough."""
    count, _, height, width = shape
    return height % STEP == width % STEP == 0 and count * height * width >= LEAST * STEP * STEP


def laid_out(weight: torch.Tensor) -> torch.Tensor:
    """A kernel (out, in, 3, 3) transformed, (16, out, in)."""
    half = torch.einsum("ij,ocjk->iock", _KERNEL, weight)
    return torch.einsum("iock,lk->iloc", half, _KERNEL).reshape(TILE * TILE, *weight.shape[:2]).contiguous()


def convolved(x: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """(B, in, h, w) to (B, out, h, w), h and w even, without autograd; zeros around.

    Args:
        x: the pictures.
        kernel: as `laid_out` gives it.
        bias: (out,) or None.
    """
    count, _, height, width = x.shape
    y = x.new_empty(count, kernel.shape[1], height, width)
    padded = F.pad(x, (1, 1, 1, 1))
    rows, columns = height // STEP, width // STEP
    together, band = max(1, AT_ONCE // (rows * columns)), max(1, AT_ONCE // columns)
    for first in range(0, count, together):
        pictures = slice(first, first + together)
        for top in range(0, rows, band):
            start, end = top * STEP, min(top + band, rows) * STEP
            _convolve(padded[pictures, :, start : end + TILE - STEP], kernel, y[pictures, :, start:end])
    return y if bias is None else y.add_(bias[:, None, None])


def _convolve(padded: torch.Tensor, kernel: torch.Tensor, y: torch.Tensor) -> None:
    """Fill y (b, out, h, w) from (b, in, h + 2, w + 2)."""
    tiles = padded.unfold(2, TILE, STEP).unfold(3, TILE, STEP).permute(4, 5, 1, 0, 2, 3)
    inside = _BOTH @ tiles.reshape(TILE * TILE, -1)
    products = torch.bmm(kernel, inside.view(TILE * TILE, padded.shape[1], -1))
    made = (_BOTH_BACK @ products.view(TILE * TILE, -1)).view(STEP, STEP, y.shape[1], *tiles.shape[3:])
    rows, columns = tiles.shape[4:]
    y.unflatten(2, (rows, STEP)).unflatten(4, (columns, STEP)).copy_(made.permute(3, 2, 4, 0, 5, 1))
