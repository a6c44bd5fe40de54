"""What was drawn in a project: one line a picture in `generated/history.jsonl`, beside the pictures.

A PNG says what it needs to be drawn again anywhere; this file also knows the paths of base and adapters,
which are nobody's business where a picture is shown around.
"""

import dataclasses
import json
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_core.spec.errors import LoraError, RunError
from lora_core.spec.shots import Axis, LoraAt, Shot, axis
from lora_core.spec.trash import to_trash
from lora_core.spec.untrusted import checked_fields, parsed_json

MOST_SHOWN = 60
FILE = "history.jsonl"


@dataclass(frozen=True)
class Kept:
    """A picture that was drawn.

    Attributes:
        file: the PNG.
        shot: what it shows; of a sheet what its pictures have in common.
        rows, columns: what a sheet varies.
        time: when it was drawn, in seconds since the epoch.
    """

    file: Path
    shot: Shot
    rows: Axis | None = None
    columns: Axis | None = None
    time: float = 0.0

    @property
    def is_sheet(self) -> bool:
        """Whether it is a grid or a strip."""
        return self.rows is not None or self.columns is not None


class History:
    """The pictures of one project, newest last."""

    def __init__(self, folder: Path) -> None:
        """Read what `folder` holds; lines of pictures that are gone, and broken lines, are passed over."""
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._half_line = False
        self._kept = self._read()

    def newest(self, most: int = MOST_SHOWN) -> list[Kept]:
        """The pictures, newest first."""
        with self._lock:
            return self._kept[::-1][:most]

    def named(self, name: str) -> Kept:
        """The picture with that file name.

        Raises:
            RunError: there is none.
        """
        with self._lock:
            found = next((one for one in self._kept if one.file.name == name), None)
        if found is None:
            raise RunError(f"There is no picture {name!r} any more.")
        return found

    def add(self, kept: Kept) -> None:
        """Remember a picture; the same settings again replace the earlier line."""
        kept = dataclasses.replace(kept, time=time.time())
        line = {
            "file": kept.file.relative_to(self.folder).as_posix(),
            "time": kept.time,
            "shot": dataclasses.asdict(kept.shot),
            "rows": dataclasses.asdict(kept.rows) if kept.rows else None,
            "columns": dataclasses.asdict(kept.columns) if kept.columns else None,
        }
        with self._lock:
            self._kept = [one for one in self._kept if one.file != kept.file] + [kept]
            with open(self.folder / FILE, "ab") as file:
                # A kill may have left half a line, which this one must not become part of.
                file.write(b"\n" * self._half_line + json.dumps(line).encode() + b"\n")
            self._half_line = False

    def remove(self, name: str, workspace: Path) -> Kept:
        """Move a picture into the trash.

        Raises:
            RunError: there is none of that name, or the disk refuses.
        """
        kept = self.named(name)
        to_trash(kept.file, workspace)
        with self._lock:
            self._kept = [one for one in self._kept if one is not kept]
        return kept

    def _read(self) -> list[Kept]:
        try:
            lines = (self.folder / FILE).read_bytes().split(b"\n")
        except OSError:
            return []
        self._half_line = bool(lines[-1])
        found: dict[Path, Kept] = {}
        for line in lines:
            kept = self._of_line(line)
            if kept is not None:
                found.pop(kept.file, None)
                found[kept.file] = kept
        return list(found.values())

    def _of_line(self, line: bytes) -> Kept | None:
        try:
            said: dict[str, Any] = parsed_json(line)
            file = Path(os.path.abspath(self.folder / said["file"]))
            if not file.is_relative_to(self.folder.absolute()) or not file.is_file():
                return None
            rows, columns = (
                axis(a["kind"], a["values"]) if a else None for a in (said["rows"], said["columns"])
            )
            return Kept(file, shot_of(said["shot"]), rows, columns, float(said["time"]))
        except (OSError, ValueError, OverflowError, KeyError, TypeError, AttributeError, LoraError):
            return None


def shot_of(said: dict[str, Any]) -> Shot:
    """A shot from its own JSON.

    Raises:
        TypeError, KeyError: it is none.
    """
    loras = tuple(checked_fields(LoraAt, row) for row in said["loras"])
    # Before there was a choice, none was rescaled.
    return checked_fields(Shot, {"cfg_rescale": 0.0, **said, "loras": loras})
