"""Frozen layers on a processor: weights laid out once for oneDNN, and Winograd convolutions in fp32.

Otherwise oneDNN reorders a weight in every call, which for the small images and single batches of training
takes up to half of the time. A weight is laid out twice, for the forward pass and, transposed, for the
backward pass; the plain one stays. This pays for large weights only. The operators are private to torch:
`is_available` compares them once with the plain layers, and everything stays plain if they are missing or
compute something else.

Images go through packed convolutions in `channels_last`: a kernel of 1 is then a linear layer of the pixels,
and Winograd's tiles have the channels together.

Winograd's F(2 x 2, 3 x 3) needs 4 / 9 of the multiplications of a 3 x 3 convolution. The image is cut into
tiles of 4 x 4 that overlap by two; each gives 2 x 2 of the output. Tiles and kernels are transformed,
multiplied point by point, which for all channels together are 16 matrix products, and the products are
transformed back. A frozen kernel is transformed once. Transforming a tile takes additions only; they are
done as products with small matrices of 0, 1 and -1, which is the fastest way that torch has.
Source: Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural Networks", section 4.1.
"""

import functools
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.grad import conv2d_input

from lora_core.backends.base import FrozenModule, replace_submodule
from lora_core.model_files.sizes import PREPACKED_COPIES, PREPACKED_SPARE

logger = logging.getLogger(__name__)

TESTED_TORCH = (2, 8), (2, 13)
"""The first and the last minor version of torch whose private operators were tested; see pyproject.toml."""
TILE, STEP = 4, 2
AT_ONCE = 128
"""Tiles that are processed together: more fall out of the CPU's cache between two passes."""
LEAST = 9
"""With fewer tiles, reading the transformed kernel, which is 16 / 9 as large, takes longer than it saves.
With 9 to 15 it takes 0.8 to 1.6 times as long as the direct layout, but saves a copy of the kernel."""
GROWTH = 16 / 9
"""Size of a transformed kernel relative to the kernel's."""
_TILE = torch.tensor([[1.0, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
_KERNEL = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
_BACK = torch.tensor([[1.0, 1, 1, 0], [0, 1, -1, -1]])
_BOTH, _BOTH_BACK = torch.kron(_TILE, _TILE), torch.kron(_BACK, _BACK)


def winograd_fits(layer: nn.Conv2d) -> bool:
    """Whether a convolution can use it: fp32 on a CPU, 3 x 3, input and output of the same size."""
    same = layer.kernel_size == (3, 3) and layer.padding in (1, (1, 1)) and layer.groups == 1
    plain = set(layer.stride) == {1} and set(layer.dilation) == {1} and layer.padding_mode == "zeros"
    return same and plain and layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu"


def winograd_pays(shape: torch.Size) -> bool:
    """Whether images (B, C, h, w) have enough tiles."""
    count, _, height, width = shape
    return count * -(height // -STEP) * -(width // -STEP) >= LEAST


def transform_kernel(weight: torch.Tensor) -> torch.Tensor:
    """Transform a kernel (out, in, 3, 3) to (16, out, in)."""
    half = torch.einsum("ij,ocjk->iock", _KERNEL, weight)
    return torch.einsum("iock,lk->iloc", half, _KERNEL).reshape(TILE * TILE, *weight.shape[:2]).contiguous()


def winograd_conv2d(
    x: torch.Tensor, kernel: Sequence[torch.Tensor], bias: torch.Tensor | None
) -> torch.Tensor:
    """(B, in, h, w) to (B, out, h, w) in `channels_last`, without autograd; padded with zeros.

    The last tiles of an odd side reach one pixel beyond it, which is cut off: that costs little time, and a
    second layout of the kernel for such images would cost gigabytes.

    Args:
        kernel: the 16 matrices (out, in) of `transform_kernel`, packed.
    """
    count, _, height, width = x.shape
    rows, columns = -(height // -STEP), -(width // -STEP)
    y = x.new_empty(count, rows * STEP, columns * STEP, len(kernel[0])).permute(0, 3, 1, 2)
    padded = F.pad(x, (1, 1 + width % STEP, 1, 1 + height % STEP))
    together, band = max(1, AT_ONCE // (rows * columns)), max(1, AT_ONCE // columns)
    for first in range(0, count, together):
        batch = slice(first, first + together)
        for top in range(0, rows, band):
            start, end = top * STEP, min(top + band, rows) * STEP
            _convolve(padded[batch, :, start : end + TILE - STEP], kernel, y[batch, :, start:end])
    y = y[:, :, :height, :width].contiguous(memory_format=torch.channels_last)
    return y if bias is None else y.add_(bias[:, None, None])


def _convolve(padded: torch.Tensor, kernel: Sequence[torch.Tensor], y: torch.Tensor) -> None:
    """Fill y (b, out, h, w) from (b, in, h + 2, w + 2)."""
    tiles = padded.unfold(2, TILE, STEP).unfold(3, TILE, STEP).permute(4, 5, 0, 2, 3, 1)
    inside = (_BOTH @ tiles.reshape(TILE * TILE, -1)).view(TILE * TILE, -1, padded.shape[1])
    products = torch.stack([multiply(*pair) for pair in zip(inside, kernel, strict=True)])
    rows, columns = tiles.shape[3:5]
    made = (_BOTH_BACK @ products.view(TILE * TILE, -1)).view(STEP, STEP, -1, rows, columns, y.shape[1])
    y.unflatten(2, (rows, STEP)).unflatten(4, (columns, STEP)).copy_(made.permute(2, 5, 3, 0, 4, 1))


def pack(matrix: torch.Tensor) -> torch.Tensor:
    """Lay out a frozen matrix (out, in) for `multiply`."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), None)
    return packed


def multiply(x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(..., in) to (..., out) by a matrix of `pack`, without autograd. One matrix of a batch at a time: for
    few rows this takes 0.6 of the time of torch's product of batches."""
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, matrix, bias, *NOTHING_AFTER)
    return y


FORMATS = (torch.float32, torch.bfloat16)
PLAIN, DIRECT, WINOGRAD = "plain", "direct", "winograd"
"""How the weights of a run are laid out: not at all; for oneDNN; for oneDNN, and 3 x 3 kernels for Winograd,
which is faster in fp32 and takes more memory."""
SMALLEST_LINEAR, SMALLEST_CONVOLUTION, SMALLEST_WINOGRAD = 2**16, 2**20, 2**19
"""Elements of a weight from which on it pays; measured on a Zen 4 core (the last: an Intel Xeon), batches of
1 to 8 and sides of 4 to 64. As a convolution, a kernel of 1 laid out for one size takes up to 150 times as
long with another, so it is packed as a matrix."""
SIDE = 8
"""Side of the image that a convolution's layout is chosen for. With sides of 4 to 64 it was as fast as their
own layouts; one chosen for 16, or for none in particular, took 25 times as long for some widths."""
NOTHING_AFTER: tuple[Any, ...] = ("none", [], "")
"""oneDNN can fuse another operation behind a product; these layers have none."""


class OneDnnLinear(FrozenModule, nn.Linear):
    """A frozen linear layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        self.weight, self.bias, self.plain = layer.weight, layer.bias, (layer,)
        weight = layer.weight.detach()
        self._forward_weight, self._backward_weight = pack(weight), pack(weight.T)

    def forward_frozen(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out), without autograd."""
        return multiply(x, self._forward_weight, self.bias)

    def input_grad(self, grad_output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The gradient of the input from that of the output."""
        return multiply(grad_output, self._backward_weight)


class OneDnnConv2d(FrozenModule, nn.Conv2d):
    """A frozen convolution; each layout is made when an image first needs it: usually one is enough.

    Where the size stays, the gradient of the input is a convolution too, with the kernel turned around and
    inputs and outputs exchanged; elsewhere it is torch's own, from the plain weight.
    """

    def __init__(self, layer: nn.Conv2d, by_winograd: bool = False) -> None:
        """Replace `layer`, which has zero padding and one group; `by_winograd` where it fits."""
        super().__init__(layer)
        self.weight, self.bias, self.plain = layer.weight, layer.bias, (layer,)
        self._settings: tuple[Any, ...] = (self.padding, self.stride, self.dilation, self.groups)
        self.by_winograd = by_winograd and winograd_fits(layer)
        self.pointwise = _is_pointwise(layer)
        self._grad_is_convolution = _keeps_size(layer)
        self._weights: dict[tuple[bool, bool], Any] = {}

    def forward_frozen(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in, h, w) to (B, out, h', w'), without autograd."""
        return self._convolve(x, False, self.bias)

    def input_grad(self, grad_output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The gradient of the input from that of the output."""
        if self._grad_is_convolution:
            return self._convolve(grad_output, True, None)
        padding, *more = self._settings
        return conv2d_input(x.shape, self.weight, grad_output, more[0], padding, *more[1:])

    def _convolve(self, x: torch.Tensor, backward: bool, bias: torch.Tensor | None) -> torch.Tensor:
        by_winograd = self.by_winograd and winograd_pays(x.shape)
        weight = self._packed(backward, by_winograd)
        if by_winograd:
            return winograd_conv2d(x, weight, bias)
        if self.pointwise:
            return multiply(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)
        y: torch.Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, weight, bias, *self._settings, *NOTHING_AFTER
        )
        return y

    def _packed(self, backward: bool, by_winograd: bool) -> Any:
        """The weight of the forward pass, or of the gradient, in one of the layouts."""
        kind = (backward, by_winograd)
        if kind not in self._weights:
            weight = self.weight.detach()
            if backward:
                weight = weight.transpose(0, 1).flip(2, 3).contiguous()
            if by_winograd:
                self._weights[kind] = [pack(matrix) for matrix in transform_kernel(weight)]
            elif self.pointwise:
                self._weights[kind] = pack(weight.flatten(1))
            else:
                reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
                shape = [1, weight.shape[1], SIDE, SIDE]
                self._weights[kind] = reorder(weight.to_mkldnn(), *self._settings, shape)
        return self._weights[kind]


@functools.cache
def is_available() -> bool:
    """Whether torch's private oneDNN operators are here and compute what the plain layers compute."""
    if not torch.backends.mkldnn.is_available():
        return False
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    first, last = TESTED_TORCH
    if not first <= version <= last:
        reason = f"torch {torch.__version__} is not among the tested versions {first} to {last}"
    else:
        reason = _self_test()
    if reason:
        logger.warning("Frozen layers use plain PyTorch instead of oneDNN's layouts: %s.", reason)
    return not reason


def _self_test() -> str:
    """Compare output and input gradient of small layers with the plain ones; "" or the difference."""
    generator = torch.Generator().manual_seed(0)
    layers: list[Any] = [nn.Linear(16, 24), nn.Conv2d(4, 8, 3, padding=1)]
    for layer in layers:
        layer.requires_grad_(False)
        shape = (3, 16) if isinstance(layer, nn.Linear) else (1, 4, 6, 6)
        x = torch.randn(shape, generator=generator)
        try:
            packed = OneDnnLinear(layer) if isinstance(layer, nn.Linear) else OneDnnConv2d(layer)
            found = _output_and_grad(packed, x)
        except Exception as error:  # noqa: BLE001 - a private operator can fail in any way
            return f"{type(layer).__name__} fails with {type(error).__name__}"
        expected = _output_and_grad(layer, x)
        if not all(torch.allclose(a, b, 1e-4, 1e-5) for a, b in zip(found, expected, strict=True)):
            return f"{type(layer).__name__} computes other values"
    return ""


def _output_and_grad(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        y: torch.Tensor = layer(x)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
    return y.detach(), grad


def supports_bf16() -> bool:
    """Whether oneDNN multiplies bf16 on this processor."""
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def choose_layout(modules: Iterable[nn.Module]) -> str:
    """The fastest layout that there is memory for; `PLAIN` on other devices than a processor."""
    found = (layer for module in modules for layer in module.modules())
    layers: list[Any] = [layer for layer in found if _kind(layer, WINOGRAD) is not None]
    if not layers or layers[0].weight.device.type != "cpu" or not is_available():
        return PLAIN
    if layers[0].weight.dtype == torch.bfloat16 and not supports_bf16():
        return PLAIN
    available: int = psutil.virtual_memory().available - PREPACKED_SPARE
    for layout in (WINOGRAD, DIRECT):
        if available > sum(_size(layer, layout) for layer in layers):
            return layout
    return PLAIN


def _size(layer: Any, layout: str) -> float:
    kind = _kind(layer, layout)
    if kind is None:
        return 0.0
    growth = GROWTH if kind is OneDnnConv2d and layout == WINOGRAD and winograd_fits(layer) else 1
    return float(PREPACKED_COPIES * growth * layer.weight.nbytes)


def prepack(module: nn.Module, layout: str) -> None:
    """Lay out all suitable frozen layers of a module, those inside adapted layers too."""
    if layout == PLAIN or not is_available():
        return
    for path, layer in list(module.named_modules()):
        kind = _kind(layer, layout)
        if kind is OneDnnConv2d:
            replace_submodule(module, path, OneDnnConv2d(layer, layout == WINOGRAD))
        elif kind is not None:
            replace_submodule(module, path, kind(layer))
    if any(isinstance(layer, OneDnnConv2d) for layer in module.modules()):
        _set_memory_format(module, torch.channels_last)


def _set_memory_format(module: nn.Module, memory_format: torch.memory_format) -> None:
    """Of frozen plain convolutions, which give images in the format of their weight."""
    for layer in module.modules():
        if type(layer) is nn.Conv2d and not layer.weight.requires_grad:
            layer.weight.data = layer.weight.to(memory_format=memory_format)


def undo_prepack(module: nn.Module) -> None:
    """Put the plain layers back."""
    for path, layer in list(module.named_modules()):
        if isinstance(layer, OneDnnLinear | OneDnnConv2d):
            replace_submodule(module, path, layer.plain[0])
    _set_memory_format(module, torch.contiguous_format)


def layout_of(module: nn.Module) -> str:
    """How the weights of a module are laid out."""
    found = [layer for layer in module.modules() if isinstance(layer, OneDnnLinear | OneDnnConv2d)]
    by_winograd = any(isinstance(layer, OneDnnConv2d) and layer.by_winograd for layer in found)
    return WINOGRAD if by_winograd else DIRECT if found else PLAIN


def is_prepacked(module: nn.Module) -> bool:
    """Whether any layer of a module is laid out."""
    return layout_of(module) != PLAIN


def _kind(layer: Any, layout: str) -> Any:
    """The class that replaces a layer, or None."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.requires_grad or weight.dtype not in FORMATS:
        return None
    if type(layer) is nn.Linear:
        return OneDnnLinear if weight.numel() >= SMALLEST_LINEAR else None
    if type(layer) is not nn.Conv2d or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return None
    least = SMALLEST_WINOGRAD if layout == WINOGRAD and winograd_fits(layer) else SMALLEST_CONVOLUTION
    if layer.kernel_size == (1, 1):
        least = SMALLEST_LINEAR if _is_pointwise(layer) else weight.numel() + 1
    return OneDnnConv2d if layer.groups == 1 and weight.numel() >= least else None


def _is_pointwise(layer: nn.Conv2d) -> bool:
    return layer.kernel_size == layer.stride == (1, 1) and layer.padding == (0, 0)


def _keeps_size(layer: nn.Conv2d) -> bool:
    padding: Any = layer.padding
    reach = [gap * (size - 1) for gap, size in zip(layer.dilation, layer.kernel_size, strict=True)]
    return [2 * pad for pad in padding] == reach and set(layer.stride) == {1}
