"""Compact layers: frozen weights that take less of the device's memory, in 8 or 4 bits or offloaded.

The full weight is materialized where it is needed, once in the forward pass and once in the backward pass,
and freed at once. Autograd keeps nothing of it: where the forward pass materializes it under autograd,
every full weight is kept until the backward pass, and training gains nothing. Low-rank updates can be added
to the weight as it is materialized, which previews use.

Offloaded weights are in RAM or in a file. A card fetches from page-locked memory while it computes; other
devices compute in the memory that is short, so that only a file is left. The weight that followed last time
is prefetched.
"""

import errno
import functools
import tempfile
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_core.backends.base import FrozenModule, replace_submodule
from lora_core.model_files.sizes import OFFLOAD_BUFFERS

SLAB = 2**28
"""Bytes of page-locked memory that are allocated at once."""
ALIGNED = 512
"""Alignment of a weight in a slab, in bytes."""


class OffloadStore:
    """Weights by number, with one prefetched."""

    def __init__(self) -> None:
        self._count = 0
        self._followed: dict[tuple[int, int], int] = {}
        self._last = (-1, -1)
        self._ahead: tuple[int, Any] | None = None

    def put(self, data: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Keep a tensor; returns the function that fetches it."""
        self._store(data)
        self._count += 1
        return functools.partial(self._fetch, self._count - 1)

    def _fetch(self, number: int) -> torch.Tensor:
        ahead, self._ahead = self._ahead, None
        begun = ahead[1] if ahead is not None and ahead[0] == number else self._begin(number)
        tensor = self._finish(begun)
        # The last two tell a forward from a backward pass, so that each is predicted from one of its kind.
        before, last = self._last
        self._followed[before, last] = number
        self._last = (last, number)
        guess = self._followed.get(self._last)
        if guess is not None:
            self._ahead = (guess, self._begin(guess))
        return tensor

    def _store(self, data: torch.Tensor) -> None:
        raise NotImplementedError

    def _begin(self, number: int) -> Any:
        raise NotImplementedError

    def _finish(self, begun: Any) -> torch.Tensor:
        raise NotImplementedError


class FileStore(OffloadStore):
    """A file without a name, which vanishes with the process however it ends."""

    def __init__(self, device: torch.device, folder: Path) -> None:
        """Keep weights in a file on the drive of `folder`; OSError if none can be created there."""
        super().__init__()
        folder.mkdir(parents=True, exist_ok=True)
        self._device = device
        self._file = tempfile.TemporaryFile(dir=folder, prefix=".", suffix=".tmp", buffering=0)  # noqa: SIM115
        self._entries: list[tuple[int, torch.Size, torch.dtype]] = []
        self._end = 0
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1)
        weakref.finalize(self, self._file.close)

    def _store(self, data: torch.Tensor) -> None:
        values = data.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        view = memoryview(values.data)
        with self._lock:
            self._file.seek(self._end)
            while view:
                view = view[self._file.write(view) :]
        self._entries.append((self._end, data.shape, data.dtype))
        self._end += values.nbytes

    def _read(self, number: int) -> torch.Tensor:
        start, shape, dtype = self._entries[number]
        tensor = torch.empty(shape, dtype=dtype)
        view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
        with self._lock:
            self._file.seek(start)
            while view:
                count = self._file.readinto(view)
                if not count:
                    raise OSError(errno.EIO, "The weights that were put aside cannot be read back")
                view = view[count:]
        return tensor

    def _begin(self, number: int) -> Any:
        return self._thread.submit(self._read, number)

    def _finish(self, begun: Any) -> torch.Tensor:
        tensor: torch.Tensor = begun.result()
        return tensor.to(self._device)


class PinnedStore(OffloadStore):
    """Page-locked memory of the computer, for a graphics card.

    Weights are copied on a stream of their own into a few buffers on the card, used in turn, each as
    large as the largest weight. Nothing is allocated in a pass, however far the processor runs ahead of the
    card. A fetched weight is valid until the next one is fetched.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._slabs: list[tuple[torch.Tensor, int]] = []
        self._kept: list[torch.Tensor] = []
        self._largest = 0
        self._stream = torch.cuda.Stream(device)
        self._buffers: list[torch.Tensor] = []
        self._used: list[Any] = [None] * OFFLOAD_BUFFERS
        self._turn = 0
        self._lent: int | None = None

    def _store(self, data: torch.Tensor) -> None:
        size = data.numel() * data.element_size()
        place = self._place(-(-size // ALIGNED) * ALIGNED)[:size].view(data.dtype).view(data.shape)
        place.copy_(data.detach())
        self._kept.append(place)
        self._largest = max(self._largest, size)

    def _place(self, size: int) -> torch.Tensor:
        """Bytes of a slab that has room; slabs are a power of two, to which torch rounds up."""
        for number, (slab, end) in enumerate(self._slabs):
            if end + size <= len(slab):
                self._slabs[number] = (slab, end + size)
                return slab[end : end + size]
        slab = allocate_pinned(max(SLAB, size))
        self._slabs.append((slab, size))
        return slab[:size]

    def _begin(self, number: int) -> Any:
        kept = self._kept[number]
        size = kept.numel() * kept.element_size()
        if not self._buffers or len(self._buffers[0]) < self._largest:
            self._buffers = [
                torch.empty(self._largest, dtype=torch.uint8, device=self._device)
                for _ in range(OFFLOAD_BUFFERS)
            ]
            self._used = [torch.cuda.current_stream(self._device).record_event()] * OFFLOAD_BUFFERS
        turn, self._turn = self._turn, (self._turn + 1) % OFFLOAD_BUFFERS
        tensor = self._buffers[turn][:size].view(kept.dtype).view(kept.shape)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._used[turn])
            tensor.copy_(kept, non_blocking=True)
            return turn, tensor, self._stream.record_event()

    def _fetch(self, number: int) -> torch.Tensor:
        if self._lent is not None:
            # By now all work that uses the weight fetched before is queued on the computing stream.
            self._used[self._lent] = torch.cuda.current_stream(self._device).record_event()
        return super()._fetch(number)

    def _finish(self, begun: Any) -> torch.Tensor:
        tensor: torch.Tensor
        self._lent, tensor, arrived = begun
        torch.cuda.current_stream(self._device).wait_event(arrived)
        return tensor


def allocate_pinned(size: int) -> torch.Tensor:
    """Bytes of RAM, page-locked where the system allows it; otherwise copies are slower."""
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        # Windows locks at most about half of the memory.
        return torch.empty(size, dtype=torch.uint8)


def offload_store_for(device: torch.device, folder: Path) -> OffloadStore:
    """The store that suits a device; a file is created on the drive of `folder`."""
    return PinnedStore(device) if device.type == "cuda" else FileStore(device, folder)


Quantized = tuple[torch.Tensor, torch.Tensor]
"""A weight in 8 bits, and its scale for each output, shaped to be multiplied with it; or two weights of 4
bits in each uint8, and the scale of each block of `NF4_BLOCK` weights."""

Update = tuple[torch.Tensor, torch.Tensor | None, float]
"""up (out, r), down (r, in) and the factor of their product; or a matrix (out, in), None and its factor."""

BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")
"""Where in a UNet layers are made compact: its first and last ones and those of the timestep are small, and
errors in them spread to everything."""
LEVELS = 127
NF4_BLOCK = 64
"""Weights that share a scale in NF4, as in QLoRA."""


def quantize_int8(weight: torch.Tensor) -> Quantized:
    """Round a weight (out, ...) to 255 levels, spread for each output over its largest element.

    The error of an element is at most about 1/254 of the largest of its output. The scale of a weight in bf16
    is in bf16 too: all levels are integers that bf16 has, so that the product needs one multiplication and
    one rounding. fp16 is too short for small scales.
    """
    rows = weight.detach().float().flatten(1)
    scale = rows.abs().amax(1).div(LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
    scale = scale.to(torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32)
    packed = rows.div(scale[:, None]).round_().clamp_(-LEVELS, LEVELS)
    packed = packed.to(torch.int8).reshape(weight.shape)
    return packed, scale.reshape(-1, *[1] * (weight.dim() - 1))


def quantize_nf4(weight: torch.Tensor) -> Quantized:
    """Round a weight (out, ...) to the 16 levels of NF4, spread for each block over its largest element.

    Raises:
        Exception: bitsandbytes is not installed, or has no code for this device.

    Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, section 3.
    """
    from bitsandbytes.functional import quantize_4bit

    rows = weight.detach().reshape(_nf4_rows(weight.numel()))
    packed, state = quantize_4bit(rows, blocksize=NF4_BLOCK, quant_type="nf4")
    return packed, state.absmax


def dequantize_nf4(
    packed: torch.Tensor, scale: torch.Tensor, shape: torch.Size, dtype: torch.dtype
) -> torch.Tensor:
    """The weight that `quantize_nf4` rounded."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    rows = _nf4_rows(shape.numel())
    state = QuantState(scale, rows, blocksize=NF4_BLOCK, quant_type="nf4", dtype=dtype)
    return dequantize_4bit(packed, state).view(shape)


def _nf4_rows(count: int) -> torch.Size:
    """The shape in which blocks of `count` weights never go from one row into the next: for such, the CPU
    kernel of bitsandbytes 0.50 takes the scale of another block."""
    return torch.Size((-(-count // NF4_BLOCK), NF4_BLOCK) if count % NF4_BLOCK == 0 else (1, count))


class CompactLayer(FrozenModule):
    """A frozen layer whose weight is kept as it is, in fewer bits or offloaded, and computed in each use.

    `updates` are added to the weight as it is materialized; the stored weight is untouched.
    """

    data: torch.Tensor | None
    scale: torch.Tensor | None

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        """Replace `layer`, its weight as it is for now."""
        super().__init__(layer)
        self.bias = layer.bias
        self.dtype, self.shape = layer.weight.dtype, layer.weight.shape
        self.bits = 0
        self.updates: list[Update] = []
        self.store: OffloadStore | None = None
        self.fetch: Callable[[], torch.Tensor] | None = None
        self.register_buffer("data", layer.weight.detach(), persistent=False)
        self.register_buffer("scale", None, persistent=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "CompactLayer":
        self.updates = [(fn(up), down if down is None else fn(down), s) for up, down, s in self.updates]
        result: CompactLayer = super()._apply(fn, recurse)
        return result

    def dequantize(self) -> torch.Tensor:
        """The full weight without its updates."""
        kept = self.fetch() if self.fetch is not None else self.data
        assert kept is not None
        if self.scale is None:
            return kept
        if self.bits == 4:
            return dequantize_nf4(kept, self.scale, self.shape, self.dtype)
        return (kept * self.scale).to(self.dtype)

    def materialize(self) -> torch.Tensor:
        """The full weight, computed each time: W + sum of factor * up @ down."""
        weight = self.dequantize()
        for up, down, factor in self.updates:
            flat = weight.flatten(1)
            added = flat.add(up, alpha=factor) if down is None else flat.addmm(up, down, alpha=factor)
            weight = added.view(self.shape)
        return weight

    weight: Any = property(materialize)

    def quantize(self, how: Callable[[torch.Tensor], Quantized]) -> None:
        """Keep the weight in fewer bits, where it is now."""
        self.data, self.scale = how(self.dequantize())
        self.bits = 4 if self.data.dtype == torch.uint8 else 8
        if self.store is not None:
            self.offload(self.store)

    def offload(self, store: OffloadStore) -> None:
        """Keep a weight in `store`."""
        assert self.data is not None
        self.store, self.fetch = store, store.put(self.data)
        self.data = None


class CompactLinear(CompactLayer, nn.Linear):
    """A frozen linear layer."""


class CompactConv2d(CompactLayer, nn.Conv2d):
    """A frozen convolution with zero padding."""


def as_compact(layer: nn.Module) -> CompactLayer | None:
    """A compact layer with the weight of `layer`, which may be one already; None for other layers."""
    if isinstance(layer, CompactLayer):
        return layer
    if type(layer) is nn.Linear:
        return CompactLinear(layer)
    if type(layer) is nn.Conv2d and layer.padding_mode == "zeros":
        return CompactConv2d(layer)
    return None


def compact_layers(unet: nn.Module) -> list[CompactLayer]:
    """The compact layers of a UNet, in its own order."""
    return [layer for layer in unet.modules() if isinstance(layer, CompactLayer)]


def quantized_bits(unet: nn.Module) -> int:
    """Bits of a weight in the blocks of a UNet, 8 or 4; 0 if they are as they are."""
    return max((layer.bits for layer in compact_layers(unet)), default=0)


def is_offloaded(unet: nn.Module) -> bool:
    """Whether the blocks of a UNet are offloaded."""
    return any(layer.fetch is not None for layer in compact_layers(unet))


@dataclass
class WeightPolicy:
    """How the weights of a UNet's blocks are kept: quantized, offloaded, both, or as they are."""

    quantize: Callable[[torch.Tensor], Quantized] | None = None
    store: OffloadStore | None = None
    width: float = 1
    """Bytes of a quantized weight."""

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return self.quantize is not None or self.store is not None

    def resident_bytes(self, root: nn.Module, dtype: torch.dtype) -> float:
        """Bytes that the weights of a UNet take on the device in `dtype`, kept like this."""
        total = 0.0
        for path, layer in root.named_modules():
            compact = bool(self) and path.startswith(BLOCKS) and as_compact(layer) is not None
            for name, parameter in layer.named_parameters(recurse=False):
                width: float = dtype.itemsize
                if compact and name == "weight":
                    width = 0 if self.store is not None else self.width
                total += parameter.numel() * width
        return total

    def apply_to_layer(self, root: nn.Module, path: str) -> None:
        """Make the layer at `path` compact, if it can be."""
        if not path.startswith(BLOCKS):
            return
        layer = as_compact(root.get_submodule(path))
        if layer is None:
            return
        if self.quantize is not None and layer.scale is None:
            layer.quantize(self.quantize)
        if self.store is not None and layer.fetch is None:
            layer.offload(self.store)
        replace_submodule(root, path, layer)

    def apply_to(self, unet: nn.Module) -> None:
        """Make all layers of a UNet compact, those inside adapted ones too."""
        for path in [path for path, _ in unet.named_modules()]:
            self.apply_to_layer(unet, path)
