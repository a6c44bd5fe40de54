"""Sizes of pictures that were decoded whole before, so that a folder of a thousand is read again at once.

A size holds for as long as the file's time and length stay as they were. Only good pictures are remembered: a
bad one is looked at again each time, as somebody may have mended it. A run never asks here; it decodes.
"""

import contextlib
import json
from pathlib import Path

from lora_core.dataset.pictures import ImageInfo, checked_info
from lora_core.dataset.records import Problem
from lora_core.spec.paths import write_atomically
from lora_core.spec.untrusted import parsed_json

_Known = tuple[int, int, ImageInfo]


class Sizes:
    """Path to time, bytes and what decoding told; kept in a file where one is given."""

    def __init__(self, file: Path | None = None) -> None:
        """Read what `file` remembers; a broken file counts as empty."""
        self.file = file
        self._known: dict[str, _Known] = {}
        self._changed = False
        if file is not None:
            with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
                for path, known in parsed_json(file.read_bytes()).items():
                    time, length, width, height, transparent = map(int, known)
                    self._known[path] = (time, length, ImageInfo(width, height, bool(transparent)))

    def info(self, path: Path, shown: str) -> ImageInfo | Problem:
        """As `pictures.checked_info`, without decoding a file that has not changed since it was decoded."""
        stamp = _stamp(path)
        known = self._known.get(str(path))
        if stamp is not None and known is not None and known[:2] == stamp:
            return known[2]
        found = checked_info(path, shown)
        if stamp is not None and not isinstance(found, Problem):
            self._known[str(path)] = (*stamp, found)
            self._changed = True
        return found

    def carry(self, source: Path, target: Path) -> None:
        """Have what is known of `source` hold for its copy, too."""
        known, stamp = self._known.get(str(source)), _stamp(target)
        if known is not None and stamp is not None:
            self._known[str(target)] = (*stamp, known[2])
            self._changed = True

    def save(self, below: Path) -> None:
        """Write down what is known of files below a folder, if anything is new; the rest is forgotten."""
        if self.file is None or not self._changed:
            return
        self._changed = False
        self._known = {p: known for p, known in dict(self._known).items() if Path(p).is_relative_to(below)}
        # Without the file the pictures are decoded once more, nothing else.
        with contextlib.suppress(OSError):
            flat = {path: [*known[:2], *map(int, known[2])] for path, known in self._known.items()}
            write_atomically(self.file, json.dumps(flat).encode())


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
