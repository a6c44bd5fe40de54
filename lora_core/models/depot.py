"""Where frozen weights wait while the device does not need them: the computer's own memory, or a file.

A graphics card fetches from page-locked memory beside its work; any other device computes in the memory that
is short, so that a file is what is left. The weight that followed last time is fetched ahead.
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


class Depot:
    """Weights by number, fetched one ahead."""

    def __init__(self) -> None:
        """Nothing is kept yet."""
        self._count = 0
        self._followed: dict[tuple[int, int], int] = {}
        self._last = (-1, -1)
        self._ahead: tuple[int, Any] | None = None

    def put(self, data: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Keep a tensor; returns what fetches it."""
        self._store(data)
        self._count += 1
        return functools.partial(self._fetched, self._count - 1)

    def _fetched(self, number: int) -> torch.Tensor:
        ahead, self._ahead = self._ahead, None
        begun = ahead[1] if ahead is not None and ahead[0] == number else self._begin(number)
        tensor = self._finish(begun)
        # Two in a row tell forward from backward, so that a pass follows the one of its kind.
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


class FileDepot(Depot):
    """A nameless file, which goes with the process however it ends."""

    def __init__(self, device: torch.device, folder: Path) -> None:
        """Keep a file on the drive of `folder`.

        Raises:
            OSError: no file can be made there.
        """
        super().__init__()
        folder.mkdir(parents=True, exist_ok=True)
        self._device = device
        self._file = tempfile.TemporaryFile(dir=folder, prefix=".", suffix=".tmp", buffering=0)  # noqa: SIM115
        self._places: list[tuple[int, torch.Size, torch.dtype]] = []
        self._end = 0
        self._in_hand = threading.Lock()
        self._thread = ThreadPoolExecutor(1)
        weakref.finalize(self, self._file.close)

    def _store(self, data: torch.Tensor) -> None:
        numbers = data.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        view = memoryview(numbers.data)
        with self._in_hand:
            self._file.seek(self._end)
            while view:
                view = view[self._file.write(view) :]
        self._places.append((self._end, data.shape, data.dtype))
        self._end += numbers.nbytes

    def _read(self, number: int) -> torch.Tensor:
        start, shape, dtype = self._places[number]
        tensor = torch.empty(shape, dtype=dtype)
        view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
        with self._in_hand:
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


class HostDepot(Depot):
    """Page-locked memory of the computer, for a graphics card."""

    def __init__(self, device: torch.device) -> None:
        """Fetch onto `device`, on a stream of its own."""
        super().__init__()
        self._device = device
        self._kept: list[torch.Tensor] = []
        self._stream = torch.cuda.Stream(device)

    def _store(self, data: torch.Tensor) -> None:
        self._kept.append(data.detach().cpu().pin_memory())

    def _begin(self, number: int) -> Any:
        with torch.cuda.stream(self._stream):
            tensor = self._kept[number].to(self._device, non_blocking=True)
            return tensor, self._stream.record_event()

    def _finish(self, begun: Any) -> torch.Tensor:
        tensor: torch.Tensor
        tensor, arrived = begun
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(arrived)
        # Its memory belongs to the other stream, which must not use it again before this one is done.
        tensor.record_stream(stream)
        return tensor


def depot_for(device: torch.device, folder: Path) -> Depot:
    """The depot that a device has use for; a file lies on the drive of `folder`."""
    return HostDepot(device) if device.type == "cuda" else FileDepot(device, folder)
