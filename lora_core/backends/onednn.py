"""Convolutions of 3 x 3 with 4 / 9 of the multiplications: Winograd's F(2 x 2, 3 x 3).

The picture is cut into tiles of 4 x 4 that overlap by two; each gives 2 x 2 of the output. Tiles and kernels
are transformed, multiplied point by point, which for all channels together are 16 products of matrices, and
the products are transformed back. A frozen kernel is transformed once. Transforming a tile takes additions
alone; they are done as products with small matrices of 0, 1 and -1, which is the fastest way that torch has.

Source: Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural Networks", section 4.1.
"""

from collections.abc import Iterable
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from lora_core.model_files.sizes import PREPACKED_COPIES, PREPACKED_SPARE

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


def winograd_fits(layer: nn.Conv2d) -> bool:
    """Whether a convolution is of the kind: fp32 on a processor, 3 x 3, of the same size before and after."""
    same = layer.kernel_size == (3, 3) and layer.padding in (1, (1, 1)) and layer.groups == 1
    plain = set(layer.stride) == {1} and set(layer.dilation) == {1} and layer.padding_mode == "zeros"
    return same and plain and layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu"


def winograd_pays(shape: torch.Size) -> bool:
    """Whether pictures (B, C, h, w) are even, and enough."""
    count, _, height, width = shape
    return height % STEP == width % STEP == 0 and count * height * width >= LEAST * STEP * STEP


def transform_kernel(weight: torch.Tensor) -> torch.Tensor:
    """A kernel (out, in, 3, 3) transformed, (16, out, in)."""
    half = torch.einsum("ij,ocjk->iock", _KERNEL, weight)
    return torch.einsum("iock,lk->iloc", half, _KERNEL).reshape(TILE * TILE, *weight.shape[:2]).contiguous()


def winograd_conv2d(x: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
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


# Prepacked layers: frozen weights laid out once as a processor's matrix kernels want them.
#
# oneDNN lays a weight out anew in every call otherwise, which for the small pictures and single batches of
# training takes up to half of the time. The weight is laid out twice, for the forward pass and, transposed,
# for the backward pass; the plain one stays, for whoever asks for it. It pays for large weights alone:
# small ones are laid out in no time, and a layout that fits all sizes of pictures can be worse for them
# than their own.


FORMATS = (torch.float32, torch.bfloat16)
PLAIN, DIRECT, WINOGRAD = "plain", "direct", "winograd"
"""How the weights of a run are laid out: not at all; as oneDNN wants them; the same, and kernels of 3 as
`winograd` wants them, which is faster in fp32 and takes more memory."""
SMALLEST_LINEAR, SMALLEST_CONVOLUTION, SMALLEST_WINOGRAD = 2**16, 2**20, 2**19
"""Numbers in a weight from which on it pays; one Zen 4 core (the last: one core of an Intel Xeon), batches of
1 to 8 and sides of 4 to 64. Convolutions with kernels of 1 stay as they are: for them a layout chosen for one
size takes up to 150 times as long with another."""
SIDE = 8
"""Side of the picture that a convolution's layout is chosen for. Used with sides of 4 to 64 it was as fast as
their own; one chosen for 16, or for none in particular, took 25 times as long for some widths."""
NOTHING_AFTER: tuple[Any, ...] = ("none", [], "")
"""oneDNN can follow a product by another operation; these layers have none."""


class _Product(torch.autograd.Function):
    """What a prepacked layer does to its input. Only the input has a gradient, and nothing is kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: "PrepackedLinear | PrepackedConv2d") -> torch.Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return layer.product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.layer.pulled_back(grad, ctx.shape), None


class OneDnnLinear(nn.Linear):
    """A frozen linear layer."""

    def __init__(self, layer: nn.Linear) -> None:
        """Stand for `layer`."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.plain = (layer,)
        weight = layer.weight.detach()
        self._forth = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        self._back = torch.ops.mkldnn._reorder_linear_weight(weight.T.contiguous(), None)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out), without autograd."""
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._forth, self.bias, *NOTHING_AFTER)
        return y

    def pulled_back(self, grad: torch.Tensor, shape: torch.Size | None = None) -> torch.Tensor:
        """The gradient of the input from that of the output."""
        x: torch.Tensor = torch.ops.mkldnn._linear_pointwise(grad, self._back, None, *NOTHING_AFTER)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the layer that it stands for."""
        result: torch.Tensor = _Product.apply(x, self)
        return result


class OneDnnConv2d(nn.Conv2d):
    """A frozen convolution.

    Each layout is made when a picture first needs it: one is enough as a rule.

    Where the size stays, the gradient of the input is a convolution too, with the kernel turned around and
    inputs and outputs exchanged; elsewhere it is torch's own, from the plain weight.
    """

    def __init__(self, layer: nn.Conv2d, by_winograd: bool = False) -> None:
        """Stand for `layer`, which pads with zeros and has one group; `by_winograd` where it fits."""
        nn.Module.__init__(self)
        for name in (*nn.Conv2d.__constants__, "transposed"):
            setattr(self, name, getattr(layer, name))
        self.weight, self.bias = layer.weight, layer.bias
        self.plain = (layer,)
        self._how: tuple[Any, ...] = (self.padding, self.stride, self.dilation, self.groups)
        self.by_winograd = by_winograd and winograd_fits(layer)
        self._turns_back = _keeps_size(layer)
        self._kept: dict[tuple[bool, bool], torch.Tensor] = {}

    def _laid_out(self, back: bool, by_winograd: bool) -> torch.Tensor:
        """The weight, or what takes gradients back, in one of the layouts."""
        kind = (back, by_winograd)
        if kind not in self._kept:
            weight = self.weight.detach()
            if back:
                weight = weight.transpose(0, 1).flip(2, 3).contiguous()
            if by_winograd:
                self._kept[kind] = transform_kernel(weight)
            else:
                lay_out: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
                picture = [1, weight.shape[1], SIDE, SIDE]
                self._kept[kind] = lay_out(weight.to_mkldnn(), *self._how, picture)
        return self._kept[kind]

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in, h, w) to (B, out, h', w'), without autograd."""
        return self._convolved(x, False, self.bias)

    def pulled_back(self, grad: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The gradient of the input, which has this shape, from that of the output."""
        if self._turns_back:
            return self._convolved(grad, True, None)
        padding, *more = self._how
        return conv2d_input(shape, self.weight, grad, more[0], padding, *more[1:])

    def _convolved(self, x: torch.Tensor, back: bool, bias: torch.Tensor | None) -> torch.Tensor:
        by_winograd = self.by_winograd and winograd_pays(x.shape)
        weight = self._laid_out(back, by_winograd)
        if by_winograd:
            return winograd_conv2d(x, weight, bias)
        y: torch.Tensor = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *self._how, *NOTHING_AFTER)
        return y

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the layer that it stands for."""
        result: torch.Tensor = _Product.apply(x, self)
        return result


def choose_layout(modules: Iterable[nn.Module]) -> str:
    """The layout that is the fastest here of those that there is memory for.

    It is `PLAIN` where no processor computes, and where the processor's kernels have no use for another.
    """
    found = (layer for module in modules for layer in module.modules())
    layers: list[Any] = [layer for layer in found if _kind(layer, WINOGRAD) is not None]
    if not layers or layers[0].weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return PLAIN
    if layers[0].weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return PLAIN
    available: int = psutil.virtual_memory().available - PREPACKED_SPARE
    for layout in (WINOGRAD, DIRECT):
        if available > sum(_size(layer, layout) for layer in layers):
            return layout
    return PLAIN


def _size(layer: Any, layout: str) -> float:
    """Bytes that a layer's layouts take."""
    kind = _kind(layer, layout)
    if kind is None:
        return 0.0
    growth = GROWTH if kind is OneDnnConv2d and layout == WINOGRAD and winograd_fits(layer) else 1
    return float(PREPACKED_COPIES * growth * layer.weight.nbytes)


def prepack(module: nn.Module, layout: str) -> None:
    """Lay out all frozen layers of a module that can be, those inside adapted layers too."""
    if layout == PLAIN:
        return
    for path, layer in list(module.named_modules()):
        kind = _kind(layer, layout)
        if kind is OneDnnConv2d:
            _put(module, path, OneDnnConv2d(layer, layout == WINOGRAD))
        elif kind is not None:
            _put(module, path, kind(layer))


def undo_prepack(module: nn.Module) -> None:
    """Put the plain layers back."""
    for path, layer in list(module.named_modules()):
        if isinstance(layer, OneDnnLinear | OneDnnConv2d):
            _put(module, path, layer.plain[0])


def layout_of(module: nn.Module) -> str:
    """How its weights are laid out."""
    found = [layer for layer in module.modules() if isinstance(layer, OneDnnLinear | OneDnnConv2d)]
    by_winograd = any(isinstance(layer, OneDnnConv2d) and layer.by_winograd for layer in found)
    return WINOGRAD if by_winograd else DIRECT if found else PLAIN


def is_prepacked(module: nn.Module) -> bool:
    """Whether any layer is."""
    return layout_of(module) != PLAIN


def _put(root: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(root.get_submodule(parent), child, layer)


def _kind(layer: Any, layout: str) -> Any:
    """What a layer becomes, or None."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.requires_grad or weight.dtype not in FORMATS:
        return None
    if type(layer) is nn.Linear:
        return OneDnnLinear if weight.numel() >= SMALLEST_LINEAR else None
    if type(layer) is not nn.Conv2d or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return None
    least = SMALLEST_WINOGRAD if layout == WINOGRAD and winograd_fits(layer) else SMALLEST_CONVOLUTION
    pays = weight.numel() >= least and layer.kernel_size != (1, 1)
    return OneDnnConv2d if layer.groups == 1 and pays else None


def _keeps_size(layer: nn.Conv2d) -> bool:
    padding: Any = layer.padding
    reach = [gap * (size - 1) for gap, size in zip(layer.dilation, layer.kernel_size, strict=True)]
    return [2 * pad for pad in padding] == reach and set(layer.stride) == {1}
