"""The images generated in a project, and sheets of several.

`generated/history.jsonl` lists them: unlike the PNGs, which get shared, it holds the paths of base and
adapters.
"""

import dataclasses
import json
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from app.templates import _
from lora_core.errors import LoraError, RunError
from lora_core.generate.grid import Axis, grid_requests, grid_settings, make_axis
from lora_core.generate.request import GenerationRequest
from lora_core.model_files.detect import lookup_base
from lora_core.projects.workspace import list_trash, move_to_trash, restore
from lora_core.runs.events import append_line
from lora_core.system.files import changed_at, parse_json

MOST_SHOWN = 60
FILE = "history.jsonl"
TIME = attrgetter("time")


@dataclass(frozen=True)
class HistoryEntry:
    """A generated image.

    Attributes:
        file: the PNG.
        shot: its request; of a sheet the common part. rows, columns: what a sheet varies.
        time: when it was drawn, in seconds since the epoch.
        beside: whether it is the base's own image beside another, which the list does not show.
        starred: whether the user keeps it in the list, however many come after it.
    """

    file: Path
    shot: GenerationRequest
    rows: Axis | None = None
    columns: Axis | None = None
    time: float = 0.0
    beside: bool = False
    starred: bool = False

    @property
    def is_sheet(self) -> bool:
        """Whether it is a grid or a strip."""
        return self.rows is not None or self.columns is not None


class History:
    """The images of one project, newest last."""

    def __init__(self, folder: Path) -> None:
        """Read `folder`; broken lines and deleted images are skipped."""
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._removed: dict[str, HistoryEntry] = {}
        self._kept = self._read()

    def newest(self, most: int = MOST_SHOWN) -> list[HistoryEntry]:
        """The images, newest first; after `most` those that are starred."""
        with self._lock:
            listed = [one for one in reversed(self._kept) if not one.beside]
        return [one for at, one in enumerate(listed) if at < most or one.starred]

    def last_pair(self) -> list[HistoryEntry]:
        """The newest image but sheets, and the base's own; [] if one is missing or a LoRA has changed
        since."""
        newest = next((one for one in self.newest() if not one.is_sheet), None)
        if newest is None or any(changed_at(lora.file) > newest.time * 1e9 for lora in newest.shot.loras):
            return []
        alone = newest.shot.alone()
        with self._lock:
            base = next((one for one in reversed(self._kept) if one.shot == alone and not one.is_sheet), None)
        return [newest, base] if base is not None else []

    def named(self, name: object) -> HistoryEntry:
        """The entry with that file name.

        Raises:
            RunError: there is none.
        """
        with self._lock:
            found = next((one for one in self._kept if one.file.name == name), None)
        if found is None:
            raise RunError(_("The image {name!r} no longer exists.", name=name))
        return found

    def add(self, kept: HistoryEntry) -> None:
        """Add an image; an earlier entry with the same settings is replaced."""
        self._keep(dataclasses.replace(kept, time=time.time()))

    def star(self, name: object, on: bool) -> None:
        """Star an image, or take its star away.

        Raises:
            RunError: there is none of that name.
        """
        self._keep(dataclasses.replace(self.named(name), starred=on))

    def _keep(self, kept: HistoryEntry) -> None:
        line = dataclasses.asdict(kept) | {"file": kept.file.relative_to(self.folder).as_posix()}
        with self._lock:
            others = [one for one in self._kept if one.file != kept.file]
            self._kept = sorted([*others, kept], key=TIME)
            append_line(self.folder / FILE, json.dumps(line))

    def remove(self, name: object, workspace: Path) -> tuple[HistoryEntry, str]:
        """Move an image to the trash; returns the image, and its name in the trash.

        Raises:
            RunError: there is none of that name, or the disk refuses.
        """
        kept = self.named(name)
        place = move_to_trash(kept.file, workspace).parent.name
        with self._lock:
            self._kept = [one for one in self._kept if one is not kept]
            self._removed[place] = kept
        return kept, place

    def bring_back(self, place: object, workspace: Path) -> None:
        """Restore an image from the trash.

        Raises:
            RunError: it is gone, or the disk refuses.
        """
        kept = self._removed.pop(str(place), None)
        item = next((one for one in list_trash(workspace) if one.place.name == place), None)
        if kept is None or item is None:
            raise RunError(_("This image is no longer in the trash."))
        self.add(dataclasses.replace(kept, file=restore(item, workspace)))

    def _read(self) -> list[HistoryEntry]:
        try:
            lines = (self.folder / FILE).read_bytes().split(b"\n")
        except OSError:
            return []
        found: dict[Path, HistoryEntry] = {}
        for line in lines:
            kept = self._of_line(line)
            if kept is not None:
                found[kept.file] = kept
        return sorted(found.values(), key=TIME)

    def _of_line(self, line: bytes) -> HistoryEntry | None:
        try:
            row: dict[str, Any] = parse_json(line)
            file = Path(os.path.abspath(self.folder / row["file"]))
            if not file.is_relative_to(self.folder.absolute()) or not file.is_file():
                return None
            rows, columns = (
                make_axis(a["kind"], a["values"]) if a else None for a in (row["rows"], row["columns"])
            )
            # Entries from before this setting were not rescaled.
            shot = GenerationRequest.from_json({"cfg_rescale": 0.0, **row["shot"]})
            drawn_at = float(row["time"])
            kept = bool(row.get("beside")), bool(row.get("starred"))
            return HistoryEntry(file, shot, rows, columns, drawn_at, *kept)
        except (OSError, ValueError, OverflowError, KeyError, TypeError, AttributeError, LoraError):
            return None


# Sheets: several images as one.


@dataclass
class GridState:
    """A wanted grid: axes, images, and the PNG when it is complete."""

    shot: GenerationRequest
    rows: Axis | None
    columns: Axis | None
    cells: list[list[GenerationRequest]]
    sheet: Path | None = None
    problem: str = ""

    @classmethod
    def of(cls, shot: GenerationRequest, rows: Axis | None, columns: Axis | None) -> "GridState":
        """Lay out the grid of `shot` over two axes.

        Raises:
            ConfigError: the axes do not fit.
        """
        cells = [[cell.acting() for cell in row] for row in grid_requests(shot, rows, columns)]
        return cls(shot, rows, columns, cells)

    @property
    def waits(self) -> bool:
        """Whether it is still to be generated."""
        return not self.problem and self.sheet is None

    @property
    def shots(self) -> list[GenerationRequest]:
        """All images in reading order."""
        return [shot for row in self.cells for shot in row]

    def sheet_request(self, images: Mapping[GenerationRequest, Path], out: Path) -> dict[str, Any]:
        """What the worker is asked for, so that the images become one."""
        return {
            "do": "sheet",
            "cells": [[str(images[shot]) if shot in images else None for shot in row] for row in self.cells],
            "rows": self.rows.labels() if self.rows else [],
            "columns": self.columns.labels() if self.columns else [],
            "parameters": sheet_info(self),
            "out": str(out),
        }


def sheet_info(grid: GridState) -> str:
    """Infotext of a sheet: the settings its images share, and its axes."""
    shot = grid.shot
    facts = lookup_base(shot.base, shot.prediction, shot.zero_terminal_snr).facts
    phi = facts.cfg_rescale(shot.cfg_rescale) if facts is not None and shot.cfg > 1 else 0.0
    return shot.infotext(phi, grid_settings(grid.rows, grid.columns))
