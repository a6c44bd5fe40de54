"""What the Preview tab generates: an image beside the base's own, a strip of strengths, and a grid.

A page states what it wants to see and polls; generation continues without it. The image looked at comes
first, then the base's, the strip, and the grid. All of them are `GenerationRequest`s, so an image is
generated once and reused wherever it appears.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from app.preview.history import GridState, History, HistoryEntry, file_time, sheet_info
from app.worker_client import CANCELLED, Reply, WorkerClient
from lora_core.generate.request import GenerationRequest


@dataclass(frozen=True)
class PreviewState:
    """What a page shows.

    Attributes:
        state: of the image looked at, idle, working or error; strip and grid say for themselves.
        message: why it waits or what went wrong.
        done, total: steps of the image in hand.
        shot: what is looked at, None before the first.
        strip: the strengths of the strip, none where it is not wanted.
        grid: the grid, or None.
        images: those that are there, of what is looked at, the strip and the grid.
        wanted_at: when it was wanted, which tells one look from the next.
        drawing: the shot in hand.
        looks: how many looks there were at it.
        note: what to know of how the base of the last image was kept.
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


MOST_DRAWN = 2000
RESTS = 0.15
"""Seconds that a slider has to rest before an image is begun."""


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
            return self.history_at(folder)

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

    def forget(self, name: object, workspace: Path) -> str:
        """Move an image to the trash; where it is the one shown, the one before it is shown. Returns its name
        in the trash.

        Raises:
            RunError: there is none of that name, or the disk refuses.
        """
        kept, place = self.history.remove(name, workspace)
        with self._changed:
            if self._shot is not None and self._shot.acting() == kept.shot:
                self._shot = None
        return place

    def view(self) -> PreviewState:
        """Image, strip and grid with the files that exist; at first the last image of the project."""
        with self._changed:
            if self._shot is None and not self._error:
                self._show_last()
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

    def _show_last(self) -> None:
        pair = self.history_at(self._folder()).last_pair()
        for one in pair:
            self._drawn.setdefault(self._key(one.shot), one.file)
        if pair:
            self._shot = pair[0].shot

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
        return shot, tuple(self._times.setdefault(one.file, file_time(one.file)) for one in shot.loras)

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
            self.history_at(path.parent.parent).add(HistoryEntry(path, grid.shot, grid.rows, grid.columns))
        else:
            self._note = str(reply.images[-1].get("note", "")) if reply.images else ""
            self._drawn[job.shot, tuple(reply.request["key"])] = path
            while len(self._drawn) > MOST_DRAWN:
                self._drawn.pop(next(iter(self._drawn)))
            if job.place in ("shot", "base"):
                entry = HistoryEntry(path, job.shot, beside=job.place == "base")
                self.history_at(path.parent.parent).add(entry)

    def history_at(self, folder: Path) -> History:
        """The history of a folder, opened on first use."""
        if folder not in self._histories:
            self._histories[folder] = History(folder)
        return self._histories[folder]

    def _failed(self, job: _RenderJob, grid: GridState | None, reply: Reply) -> None:
        """Report a failure where it belongs; cancellation by a new request is silent."""
        if job.place in ("grid", "sheet"):
            if grid is not None and not (reply.dropped and grid is self._grid and not grid.problem):
                grid.problem = grid.problem or reply.message
        elif not reply.dropped and self._shot is not None:
            mine = {self._shot.acting(), self._shot.alone(), *self._strip_shots(self._shot)}
            if job.shot in mine:
                self._error = reply.message
