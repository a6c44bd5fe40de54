"""What the Preview tab shows: a shot beside the base's own picture, a strip of strengths, and a grid. Each
picture is drawn once and kept.

A page only says what it wants to see and polls for it. The drawing goes on without the page, and a page that
comes back finds the pictures. What somebody looks at comes first; the strip, then the grid fill up behind it.
Because all of them are shots, a cell of a strip or of a grid is the very picture that was drawn alone.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from app.preview.history import History, Kept
from app.preview.view import Grid, View, sheet_info
from app.worker import CANCELLED, Reply, Worker
from lora_core.spec.shots import Shot

MOST_DRAWN = 2000
RESTS = 0.15
"""Seconds that a slider has to rest before a picture is begun."""


@dataclass(frozen=True)
class _Job:
    """What to do next: draw a shot for a place, or put the grid together."""

    place: str
    shot: Shot | None = None


class Studio:
    """Draws shots through the worker, in a thread of its own."""

    def __init__(
        self, worker: Worker, folder: Callable[[], Path], on_picture: Callable[[], None] = lambda: None
    ) -> None:
        """Draw into what `folder` says at the time, calling `on_picture` for each picture that is there."""
        self.worker = worker
        self._folder = folder
        self._on_picture = on_picture
        self._shot: Shot | None = None
        self._strip: tuple[float, ...] = ()
        self._grid: Grid | None = None
        self._error = self._note = ""
        self._wanted_at = 0.0
        self._drawn: dict[tuple[Shot, tuple[int, ...]], Path] = {}
        # Of the files as they were at the last wish: one that is written anew changes nothing that is shown
        # until somebody asks again.
        self._times: dict[str, int] = {}
        self._histories: dict[Path, History] = {}
        self._reply: Reply | None = None
        self._job: _Job | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def history(self) -> History:
        """What was drawn in the project that is open."""
        folder = self._folder()
        with self._changed:
            if folder not in self._histories:
                self._histories[folder] = History(folder)
            return self._histories[folder]

    def want(self, shot: Shot, strip: tuple[float, ...] | None = None) -> None:
        """Look at a shot, with the strip at these strengths (None: as it is); what is drawn for another shot
        is dropped."""
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

    def look_at(self, shot: Shot) -> bool:
        """Move the strengths of what is looked at; false where nothing was drawn yet."""
        if self._shot is None:
            return False
        self.want(shot)
        return True

    def draw_grid(self, grid: Grid) -> None:
        """Fill a grid behind what is looked at; an earlier one that is not whole is dropped."""
        with self._changed:
            self._times.clear()
            self._grid = grid
            if self._reply is not None and self._job is not None and self._job.place == "grid":
                self.worker.cancel(self._reply)
            self._begin()

    def refuse(self, sentence: str) -> None:
        """Show why nothing can be drawn."""
        with self._changed:
            self._error, self._wanted_at = sentence, time.monotonic()

    def cancel(self) -> None:
        """Stop drawing; what is there stays."""
        with self._changed:
            if self._reply is not None:
                self.worker.cancel(self._reply)
            self._strip = ()
            if self._grid is not None and self._grid.sheet is None:
                self._grid.problem = self._grid.problem or CANCELLED
            if self._shot is not None and not self._needed_pictures(self._shot):
                self._error = CANCELLED
            self._wanted_at = time.monotonic()

    def clear(self) -> None:
        """Forget what is looked at, as another project is open."""
        with self._changed:
            if self._reply is not None:
                self.worker.cancel(self._reply)
            self._shot, self._grid, self._strip, self._error = None, None, (), ""

    def view(self) -> View:
        """The present shot, strip and grid with their pictures."""
        with self._changed:
            shot, reply, job, grid = self._shot, self._reply, self._job, self._grid
            wanted = set(self._strip_shots(shot)) | set(grid.shots if grid else ())
            if shot is not None:
                wanted |= {shot.acting(), shot.alone()}
            pictures = {one: path for one in wanted if (path := self._picture(one)) is not None}
            working = shot is not None and not self._needed_pictures(shot)
            told = "idle" if self._error == CANCELLED else "error" if self._error else ""
            state = told or ("working" if working else "idle")
            message = self._error or (self._words(reply) if reply is not None else "")
            done, total = (reply.done, reply.total) if reply is not None else (0, 0)
            looks = reply.looks if reply is not None else 0
            return View(
                state, message, done, total, shot, self._strip, grid, pictures, self._wanted_at,
                job.shot if job else None, looks, self._note,
            )  # fmt: skip

    def look(self) -> bytes:
        """The picture under way as a small JPEG, b"" where there is none."""
        reply = self._reply
        return reply.look if reply is not None else b""

    def _words(self, reply: Reply) -> str:
        """Why a request is not drawn yet, or ""."""
        ahead = self.worker.ahead_of(reply)
        if ahead:
            return f"Waiting: {ahead} {'request' if ahead == 1 else 'requests'} before this one."
        return reply.message

    def _begin(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._draw_for_ever, daemon=True, name="studio")
            self._thread.start()
        self._changed.notify()

    def _needed_pictures(self, shot: Shot) -> bool:
        """Whether what is looked at is there, and the base's own picture with it."""
        return self._picture(shot.acting()) is not None and self._picture(shot.alone()) is not None

    def _strip_shots(self, shot: Shot | None) -> list[Shot]:
        return View("", "", 0, 0, shot, self._strip, None).strip_shots()

    def _picture(self, shot: Shot) -> Path | None:
        """The picture of a shot, if it was drawn in the open project, from the files as they were at the last
        wish, and is still there."""
        path = self._drawn.get(self._key(shot))
        if path is None or not path.is_relative_to(self._folder()):
            return None
        return path if path.is_file() else None

    def _key(self, shot: Shot) -> tuple[Shot, tuple[int, ...]]:
        """A shot and the times of its files: a checkpoint that was written anew is another picture."""
        return shot, tuple(self._times.setdefault(one.file, _time(one.file)) for one in shot.loras)

    def _next(self) -> _Job | None:
        """What is looked at, then the base beside it, the strip, the grid and its sheet."""
        shot = self._shot
        if shot is not None and not self._error:
            if self._picture(shot.acting()) is None:
                return _Job("shot", shot.acting())
            if self._picture(shot.alone()) is None:
                return _Job("base", shot.alone())
            for wanted in self._strip_shots(shot):
                if self._picture(wanted) is None:
                    return _Job("strip", wanted)
        grid = self._grid
        if grid is None or grid.problem or grid.sheet is not None:
            return None
        missing = (cell for cell in grid.shots if self._picture(cell) is None)
        cell = next(missing, None)
        return _Job("grid", cell) if cell is not None else _Job("sheet")

    def _draw_for_ever(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next() is not None)
                # A slider that is still moving: wait for it to rest before a picture is begun.
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
            self._on_picture()

    def _draw_request(self, shot: Shot) -> dict[str, Any]:
        place = self._folder() / time.strftime("%Y-%m")
        return {"do": "generate", **asdict(shot), "look": True, "out": str(place), "key": self._key(shot)[1]}

    def _sheet_request(self, grid: Grid | None) -> dict[str, Any]:
        assert grid is not None
        stem = f"{time.strftime('%Y%m%d-%H%M%S')}-grid-{time.monotonic_ns() % 100_000:05d}.png"
        cells = [[str(path) if (path := self._picture(s)) else None for s in row] for row in grid.cells]
        return {
            "do": "sheet",
            "cells": cells,
            "rows": grid.rows.labels() if grid.rows else [],
            "columns": grid.columns.labels() if grid.columns else [],
            "parameters": sheet_info(grid),
            "out": str(self._folder() / time.strftime("%Y-%m") / stem),
        }

    def _keep(self, job: _Job, grid: Grid | None, reply: Reply) -> None:
        if reply.state == "error":
            self._failed(job, grid, reply)
            return
        files = reply.result.get("files") or []
        path = Path(str(files[0])) if files else None
        if path is None or not path.is_file():
            # Asking again would only loop: a worker that is done without a picture has a defect.
            reply.message = "The drawing process ended without a picture; see the logs folder."
            self._failed(job, grid, reply)
        elif job.shot is None:
            assert grid is not None
            grid.sheet = path
            self._remember(Kept(path, grid.shot, grid.rows, grid.columns))
        else:
            self._note = str(reply.pictures[-1].get("note", "")) if reply.pictures else ""
            self._drawn[job.shot, tuple(reply.request["key"])] = path
            while len(self._drawn) > MOST_DRAWN:
                self._drawn.pop(next(iter(self._drawn)))
            if job.place == "shot":
                self._remember(Kept(path, job.shot))

    def _remember(self, kept: Kept) -> None:
        history = next((h for f, h in self._histories.items() if kept.file.is_relative_to(f)), None)
        (history or self.history_at(kept.file.parent.parent)).add(kept)

    def history_at(self, folder: Path) -> History:
        """The history of a folder, opened if it was not."""
        return self._histories.setdefault(folder, History(folder))

    def _failed(self, job: _Job, grid: Grid | None, reply: Reply) -> None:
        """Say what went wrong where it belongs; what was cancelled by a new wish says nothing."""
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
