"""Offloaded weights: in RAM or in a file while the device does not need them.

A card fetches from page-locked memory while it computes. Other devices compute in the memory that is short,
so that only a file is left. The weight that followed last time is prefetched.
"""

import errno
import functools
import tempfile
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from lora_core.model_files.sizes import OFFLOAD_BUFFERS

SLAB = 2**28
"""Bytes of page-locked memory that are allocated at once."""
ALIGNED = 512
"""Alignment of a weight in a slab, in bytes."""


class OffloadStore:
    """Weights by number, with one prefetched."""

    def __init__(self) -> None:
        """Start empty."""
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
        """Fetch onto `device`."""
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
