"""Small pictures for the window: made when they are first asked for, by two threads, and kept on disk.

Two threads, because each may hold a decoded picture of 90 million pixels; and they are never the threads that
save captions. Large views are made anew each time somebody looks: a browser keeps them.
"""

import asyncio
import contextlib
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lora_core.data.images import make_thumbnail
from lora_core.data.sidecars import write_without_sync
from lora_core.errors import LoraError

KEPT_SIDE = 256
_THREADS = 2


class Thumbnails:
    """A folder of thumbnails, named for the picture's path, time and size; it can be emptied at any time."""

    def __init__(self, folder: Path) -> None:
        """Keep them in `folder`, which need not be there."""
        self.folder = folder
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="thumbs")

    async def webp(self, file: Path, side: int) -> bytes:
        """The picture as a WebP that fits into a square of `side` pixels.

        Raises:
            DatasetError: it cannot be read as a picture.
        """
        return await asyncio.get_running_loop().run_in_executor(self._pool, self.made, file, side)

    def made(self, file: Path, side: int) -> bytes:
        """As `webp`, in this thread."""
        if side > KEPT_SIDE:
            return make_thumbnail(file, side)
        stamp = file.stat()
        key = hashlib.sha256(f"{file}\n{stamp.st_mtime_ns}\n{stamp.st_size}\n{side}".encode()).hexdigest()
        kept = self.folder / key[:2] / f"{key[2:34]}.webp"
        with contextlib.suppress(OSError):
            data = kept.read_bytes()
            if _whole(data):
                return data
        data = make_thumbnail(file, side)
        # A full disk is no reason to show nothing. Nothing waits for the disk either: what a power cut spoils
        # is
        # seen by its length and made again.
        with contextlib.suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_without_sync(kept, data)
        return data

    def prepare(self, files: list[Path], side: int = KEPT_SIDE) -> None:
        """Make those that will be looked at first; one that cannot be made is left to whoever asks for it."""

        def quietly(file: Path) -> None:
            with contextlib.suppress(LoraError, OSError):
                self.made(file, side)

        list(self._pool.map(quietly, files))

    def close(self) -> None:
        """Make no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _whole(data: bytes) -> bool:
    """Whether a WebP is as long as its head says (RIFF: the length less 8, in bytes 4 to 8)."""
    return data[:4] == b"RIFF" and int.from_bytes(data[4:8], "little") + 8 == len(data)
