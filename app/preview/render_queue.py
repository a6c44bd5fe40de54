"""What the Preview tab generates: an image beside the base's own, a strip of strengths, and a grid.

A page states what it wants to see and polls; generation continues without it. The image looked at comes
first, then the base's, the strip, and the grid. All of them are `GenerationRequest`s, so an image is
generated once and reused wherever it appears. `generated/history.jsonl` lists the images of a project: unlike
the PNGs, which get shared, it holds the paths of base and adapters.
"""

import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from app.worker_client import CANCELLED, Reply, WorkerClient
from lora_core.errors import LoraError, RunError
from lora_core.generate.request import (
    Axis,
    GenerationRequest,
    Infotext,
    WeightedLora,
    grid_requests,
    grid_settings,
    make_axis,
)
from lora_core.model_files.detect import lookup_base
from lora_core.runs.storage import move_to_trash
from lora_core.settings.choices import SAMPLERS
from lora_core.system.untrusted import check_fields, parse_json

STRIP = (0.0, 0.25, 0.5, 0.75, 1.0)


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
    def shots(self) -> list[GenerationRequest]:
        """All images in reading order."""
        return [shot for row in self.cells for shot in row]


@dataclass(frozen=True)
class PreviewState:
    """What a page shows.

    Attributes:
        state: of the picture looked at, idle, working or error; strip and grid say for themselves.
        message: why it waits or what went wrong.
        done, total: steps of the picture in hand.
        shot: what is looked at, None before the first.
        strip: the strengths of the strip, none where it is not wanted.
        grid: the grid, or None.
        images: those that are there, of what is looked at, the strip and the grid.
        wanted_at: when it was wanted, which tells one look from the next.
        drawing: the shot in hand.
        looks: how many looks there were at it.
        note: what to know of how the base of the last picture was kept.
    """

    state: str
    message: str
    done: int
    total: int
    shot: GenerationRequest | None
    strip: tuple[float, ...]
    grid: GridState | None
    images: dict[GenerationRequest, Path] = field(default_factory=dict)
    wanted_at: float = 0.0
    drawing: GenerationRequest | None = None
    looks: int = 0
    note: str = ""

    def image(self, shot: GenerationRequest) -> Path | None:
        """The file of an image, if it exists."""
        return self.images.get(shot.acting())

    def strip_shots(self) -> list[GenerationRequest]:
        """The requests of the strip."""
        if self.shot is None or not self.shot.loras:
            return []
        return [self.shot.at("strength", value).acting() for value in self.strip]

    @property
    def working(self) -> bool:
        """Whether anything is still to be generated, strip and grid included."""
        return self.state == "working" or self.strip_waits or self.grid_waits

    @property
    def strip_waits(self) -> bool:
        """Whether cells of the strip are still to be generated."""
        return self.state != "error" and any(shot not in self.images for shot in self.strip_shots())

    @property
    def grid_waits(self) -> bool:
        """Whether the grid is still to be generated."""
        return self.grid is not None and not self.grid.problem and self.grid.sheet is None


def sheet_info(grid: GridState) -> str:
    """Infotext of a sheet: the settings its images share, and its axes."""
    shot = grid.shot
    return Infotext(
        prompt=shot.prompt, negative=shot.negative, steps=shot.steps, sampler=sampler_title(shot.sampler),
        cfg=shot.cfg, cfg_rescale=_resolve_rescale(shot), seed=shot.seed,
        width=shot.width, height=shot.height, model=Path(shot.base).stem, clip_skip=shot.clip_skip,
        loras=tuple(one for one in shot.loras if one.acts),
        extra=grid_settings(grid.rows, grid.columns),
    ).text()  # fmt: skip


def _resolve_rescale(shot: GenerationRequest) -> float:
    """The CFG rescale that was used."""
    facts = lookup_base(shot.base, shot.prediction, shot.zero_terminal_snr).facts
    return facts.cfg_rescale(shot.cfg_rescale) if facts is not None and shot.cfg > 1 else 0.0


def sampler_title(key: str) -> str:
    """A sampler's name in A1111."""
    return SAMPLERS[key].title if key in SAMPLERS else key


MOST_SHOWN = 60
FILE = "history.jsonl"


@dataclass(frozen=True)
class HistoryEntry:
    """A generated image.

    Attributes:
        file: the PNG.
        shot: what it shows; of a sheet what its pictures have in common.
        rows, columns: what a sheet varies.
        time: when it was drawn, in seconds since the epoch.
    """

    file: Path
    shot: GenerationRequest
    rows: Axis | None = None
    columns: Axis | None = None
    time: float = 0.0

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
        self._half_line = False
        self._kept = self._read()

    def newest(self, most: int = MOST_SHOWN) -> list[HistoryEntry]:
        """The images, newest first."""
        with self._lock:
            return self._kept[::-1][:most]

    def named(self, name: str) -> HistoryEntry:
        """The entry with that file name.

        Raises:
            RunError: there is none.
        """
        with self._lock:
            found = next((one for one in self._kept if one.file.name == name), None)
        if found is None:
            raise RunError(f"There is no picture {name!r} any more.")
        return found

    def add(self, kept: HistoryEntry) -> None:
        """Add an image; an earlier entry with the same settings is replaced."""
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
                # A kill may have left half a line; start a new one.
                file.write(b"\n" * self._half_line + json.dumps(line).encode() + b"\n")
            self._half_line = False

    def remove(self, name: str, workspace: Path) -> HistoryEntry:
        """Move an image to the trash.

        Raises:
            RunError: there is none of that name, or the disk refuses.
        """
        kept = self.named(name)
        move_to_trash(kept.file, workspace)
        with self._lock:
            self._kept = [one for one in self._kept if one is not kept]
        return kept

    def _read(self) -> list[HistoryEntry]:
        try:
            lines = (self.folder / FILE).read_bytes().split(b"\n")
        except OSError:
            return []
        self._half_line = bool(lines[-1])
        found: dict[Path, HistoryEntry] = {}
        for line in lines:
            kept = self._of_line(line)
            if kept is not None:
                found.pop(kept.file, None)
                found[kept.file] = kept
        return list(found.values())

    def _of_line(self, line: bytes) -> HistoryEntry | None:
        try:
            said: dict[str, Any] = parse_json(line)
            file = Path(os.path.abspath(self.folder / said["file"]))
            if not file.is_relative_to(self.folder.absolute()) or not file.is_file():
                return None
            rows, columns = (
                make_axis(a["kind"], a["values"]) if a else None for a in (said["rows"], said["columns"])
            )
            return HistoryEntry(file, request_from_settings(said["shot"]), rows, columns, float(said["time"]))
        except (OSError, ValueError, OverflowError, KeyError, TypeError, AttributeError, LoraError):
            return None


def request_from_settings(said: dict[str, Any]) -> GenerationRequest:
    """Parse a request from its own JSON.

    Raises:
        TypeError, KeyError: it is none.
    """
    loras = tuple(check_fields(WeightedLora, row) for row in said["loras"])
    # Entries from before this setting were not rescaled.
    return check_fields(GenerationRequest, {"cfg_rescale": 0.0, **said, "loras": loras})


MOST_DRAWN = 2000
RESTS = 0.15
"""Seconds that a slider has to rest before a picture is begun."""


@dataclass(frozen=True)
class _RenderJob:
    """The next thing to generate, and where it is shown."""

    place: str
    shot: GenerationRequest | None = None


class RenderQueue:
    """Generates images through the worker, in its own thread."""

    def __init__(
        self, worker: WorkerClient, folder: Callable[[], Path], on_image: Callable[[], None] = lambda: None
    ) -> None:
        """Generate into `folder()`."""
        self.worker = worker
        self._folder = folder
        self._on_image = on_image
        self._shot: GenerationRequest | None = None
        self._strip: tuple[float, ...] = ()
        self._grid: GridState | None = None
        self._error = self._note = ""
        self._wanted_at = 0.0
        self._drawn: dict[tuple[GenerationRequest, tuple[int, ...]], Path] = {}
        # Of the files as they were at the last wish: one that is written anew changes nothing that is shown
        # until somebody asks again.
        self._times: dict[str, int] = {}
        self._histories: dict[Path, History] = {}
        self._reply: Reply | None = None
        self._job: _RenderJob | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def history(self) -> History:
        """History of the open project."""
        folder = self._folder()
        with self._changed:
            if folder not in self._histories:
                self._histories[folder] = History(folder)
            return self._histories[folder]

    def want(self, shot: GenerationRequest, strip: tuple[float, ...] | None = None) -> None:
        """Show `shot`, with the strip at these strengths (None: unchanged); other images being generated are
        dropped."""
        with self._changed:
            self._times.clear()
            other = self._shot is None or shot.alone() != self._shot.alone()
            self._shot, self._error, self._wanted_at = shot, "", time.monotonic()
            if strip is not None:
                self._strip = strip
            job = self._job
            if self._reply is not None and job is not None:
                wanted = {shot.acting(), shot.alone(), *self._strip_shots(shot)}
                if job.shot not in wanted and (other or job.place == "shot"):
                    self.worker.cancel(self._reply)
            self._begin()

    def look_at(self, shot: GenerationRequest) -> bool:
        """Change the strengths of the shown image; false if there is none."""
        if self._shot is None:
            return False
        self.want(shot)
        return True

    def draw_grid(self, grid: GridState) -> None:
        """Generate a grid after the shown image; an unfinished earlier one is dropped."""
        with self._changed:
            self._times.clear()
            self._grid = grid
            if self._reply is not None and self._job is not None and self._job.place == "grid":
                self.worker.cancel(self._reply)
            self._begin()

    def refuse(self, sentence: str) -> None:
        """Show why nothing can be generated."""
        with self._changed:
            self._error, self._wanted_at = sentence, time.monotonic()

    def cancel(self) -> None:
        """Stop generating; finished images stay."""
        with self._changed:
            if self._reply is not None:
                self.worker.cancel(self._reply)
            self._strip = ()
            if self._grid is not None and self._grid.sheet is None:
                self._grid.problem = self._grid.problem or CANCELLED
            if self._shot is not None and not self._has_needed_images(self._shot):
                self._error = CANCELLED
            self._wanted_at = time.monotonic()

    def clear(self) -> None:
        """Reset, as another project is open."""
        with self._changed:
            if self._reply is not None:
                self.worker.cancel(self._reply)
            self._shot, self._grid, self._strip, self._error = None, None, (), ""

    def view(self) -> PreviewState:
        """Image, strip and grid with the files that exist."""
        with self._changed:
            shot, reply, job, grid = self._shot, self._reply, self._job, self._grid
            wanted = set(self._strip_shots(shot)) | set(grid.shots if grid else ())
            if shot is not None:
                wanted |= {shot.acting(), shot.alone()}
            images = {one: path for one in wanted if (path := self._find_image(one)) is not None}
            working = shot is not None and not self._has_needed_images(shot)
            told = "idle" if self._error == CANCELLED else "error" if self._error else ""
            state = told or ("working" if working else "idle")
            message = self._error or (self._words(reply) if reply is not None else "")
            done, total = (reply.done, reply.total) if reply is not None else (0, 0)
            looks = reply.looks if reply is not None else 0
            return PreviewState(
                state, message, done, total, shot, self._strip, grid, images, self._wanted_at,
                job.shot if job else None, looks, self._note,
            )  # fmt: skip

    def look(self) -> bytes:
        """A small JPEG of the image in progress, b"" if there is none."""
        reply = self._reply
        return reply.look if reply is not None else b""

    def _words(self, reply: Reply) -> str:
        """Why a request has not started, or ""."""
        ahead = self.worker.ahead_of(reply)
        if ahead:
            return f"Waiting: {ahead} {'request' if ahead == 1 else 'requests'} before this one."
        return reply.message

    def _begin(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._draw_for_ever, daemon=True, name="render-queue")
            self._thread.start()
        self._changed.notify()

    def _has_needed_images(self, shot: GenerationRequest) -> bool:
        """Whether the shown image and the base's own exist."""
        return self._find_image(shot.acting()) is not None and self._find_image(shot.alone()) is not None

    def _strip_shots(self, shot: GenerationRequest | None) -> list[GenerationRequest]:
        return PreviewState("", "", 0, 0, shot, self._strip, None).strip_shots()

    def _find_image(self, shot: GenerationRequest) -> Path | None:
        """The file of a request, if it was generated in the open project from the adapter files as last
        requested."""
        path = self._drawn.get(self._key(shot))
        if path is None or not path.is_relative_to(self._folder()):
            return None
        return path if path.is_file() else None

    def _key(self, shot: GenerationRequest) -> tuple[GenerationRequest, tuple[int, ...]]:
        """A request with the times of its files: a checkpoint that was rewritten gives another image."""
        return shot, tuple(self._times.setdefault(one.file, _time(one.file)) for one in shot.loras)

    def _next(self) -> _RenderJob | None:
        """The next job: shown image, base beside it, strip, grid, sheet."""
        shot = self._shot
        if shot is not None and not self._error:
            if self._find_image(shot.acting()) is None:
                return _RenderJob("shot", shot.acting())
            if self._find_image(shot.alone()) is None:
                return _RenderJob("base", shot.alone())
            for wanted in self._strip_shots(shot):
                if self._find_image(wanted) is None:
                    return _RenderJob("strip", wanted)
        grid = self._grid
        if grid is None or grid.problem or grid.sheet is not None:
            return None
        missing = (cell for cell in grid.shots if self._find_image(cell) is None)
        cell = next(missing, None)
        return _RenderJob("grid", cell) if cell is not None else _RenderJob("sheet")

    def _draw_for_ever(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next() is not None)
                # The slider is still moving: wait for it to rest.
                while (rest := self._wanted_at + RESTS - time.monotonic()) > 0:
                    self._changed.wait(rest)
                job = self._next()
                if job is None:
                    continue
                grid = self._grid
                request = self._draw_request(job.shot) if job.shot else self._sheet_request(grid)
                self._job, self._reply = job, (reply := self.worker.submit(request))
            reply.finished.wait()
            with self._changed:
                self._keep(job, grid, reply)
                self._job = self._reply = None
            self._on_image()

    def _draw_request(self, shot: GenerationRequest) -> dict[str, Any]:
        place = self._folder() / time.strftime("%Y-%m")
        return {"do": "generate", **asdict(shot), "look": True, "out": str(place), "key": self._key(shot)[1]}

    def _sheet_request(self, grid: GridState | None) -> dict[str, Any]:
        assert grid is not None
        stem = f"{time.strftime('%Y%m%d-%H%M%S')}-grid-{time.monotonic_ns() % 100_000:05d}.png"
        cells = [[str(path) if (path := self._find_image(s)) else None for s in row] for row in grid.cells]
        return {
            "do": "sheet",
            "cells": cells,
            "rows": grid.rows.labels() if grid.rows else [],
            "columns": grid.columns.labels() if grid.columns else [],
            "parameters": sheet_info(grid),
            "out": str(self._folder() / time.strftime("%Y-%m") / stem),
        }

    def _keep(self, job: _RenderJob, grid: GridState | None, reply: Reply) -> None:
        if reply.state == "error":
            self._failed(job, grid, reply)
            return
        files = reply.result.get("files") or []
        path = Path(str(files[0])) if files else None
        if path is None or not path.is_file():
            # Retrying would loop: a worker that finishes without an image has a bug.
            reply.message = "The worker ended without an image; see the logs folder."
            self._failed(job, grid, reply)
        elif job.shot is None:
            assert grid is not None
            grid.sheet = path
            self._remember(HistoryEntry(path, grid.shot, grid.rows, grid.columns))
        else:
            self._note = str(reply.images[-1].get("note", "")) if reply.images else ""
            self._drawn[job.shot, tuple(reply.request["key"])] = path
            while len(self._drawn) > MOST_DRAWN:
                self._drawn.pop(next(iter(self._drawn)))
            if job.place == "shot":
                self._remember(HistoryEntry(path, job.shot))

    def _remember(self, kept: HistoryEntry) -> None:
        history = next((h for f, h in self._histories.items() if kept.file.is_relative_to(f)), None)
        (history or self.history_at(kept.file.parent.parent)).add(kept)

    def history_at(self, folder: Path) -> History:
        """The history of a folder, opened on first use."""
        return self._histories.setdefault(folder, History(folder))

    def _failed(self, job: _RenderJob, grid: GridState | None, reply: Reply) -> None:
        """Report a failure where it belongs; cancellation by a new request is silent."""
        if job.place in ("grid", "sheet"):
            if grid is not None and not (reply.dropped and grid is self._grid and not grid.problem):
                grid.problem = grid.problem or reply.message
        elif not reply.dropped and self._shot is not None:
            mine = {self._shot.acting(), self._shot.alone(), *self._strip_shots(self._shot)}
            if job.shot in mine:
                self._error = reply.message


def _time(file: str) -> int:
    try:
        return Path(file).stat().st_mtime_ns
    except OSError:
        return 0
