"""What the Preview tab generates: an image beside the base's own, a strip of strengths, and a grid.

A page states its request and follows it; generation continues without it. The image looked at comes first,
then the base's, the strip, and the grid. All of them are `GenerationRequest`s, so an image is generated once
and reused wherever it appears.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from app.preview.history import GridState, History, HistoryEntry
from app.templates import _
from app.worker_client import CANCELLED, Reply, WorkerClient
from lora_core.generate.grid import vary
from lora_core.generate.request import GenerationRequest
from lora_core.system.files import changed_at


@dataclass(frozen=True)
class PreviewState:
    """What a page shows.

    Attributes:
        state: of the image looked at, idle, working or error; strip and grid say for themselves.
        message: why it waits or what went wrong.
        done, total: steps of the image in hand.
        shot: the image shown, None before the first.
        strip: the strengths of the strip, none where it is not wanted.
        grid: the grid, or None.
        images: the finished ones of the image shown, the strip and the grid.
        wanted_at: when it was wanted, which tells one look from the next.
        drawing: the shot in hand.
        looks: how many looks there were at it.
        note: what to know of how the base of the last image was kept.
        seconds: that the last image took; 0 before the first.
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
    seconds: float = 0.0

    def image(self, shot: GenerationRequest) -> Path | None:
        """The file of an image, if it exists."""
        return self.images.get(shot.acting())

    @property
    def working(self) -> bool:
        """Whether anything is still to be generated, strip and grid included."""
        strip = strip_shots(self.shot, self.strip)
        strip_waits = self.state != "error" and any(shot not in self.images for shot in strip)
        return self.state == "working" or strip_waits or (self.grid is not None and self.grid.waits)


def strip_shots(shot: GenerationRequest | None, strengths: tuple[float, ...]) -> list[GenerationRequest]:
    """The requests of a strip; none without a LoRA."""
    if shot is None or not shot.loras:
        return []
    return [vary(shot, "strength", value).acting() for value in strengths]


MOST_DRAWN = 2000
RESTS = 0.15
"""Seconds that a slider has to rest before an image is begun."""
ImageKey = tuple[GenerationRequest, tuple[int, ...]]
"""A request with the times of its files: a checkpoint that was rewritten gives another image."""


@dataclass(frozen=True)
class _RenderJob:
    """The image in progress: where it is shown, the image, None for a grid's sheet, and the grid."""

    place: str
    shot: GenerationRequest | None
    key: ImageKey | None
    grid: GridState | None
    reply: Reply


class RenderQueue:
    """Generates images through the worker, in its own thread."""

    def __init__(self, worker: WorkerClient, folder: Callable[[], Path]) -> None:
        self.worker = worker
        self._folder = folder
        self._shot: GenerationRequest | None = None
        self._strip: tuple[float, ...] = ()
        self._grid: GridState | None = None
        self._error = self._note = ""
        self._seconds = 0.0
        self._wanted_at = 0.0
        self._drawn: dict[ImageKey, Path] = {}
        # As of the last wish: a rewritten file changes nothing that is shown until somebody asks again.
        self._times: dict[str, int] = {}
        self._histories: dict[Path, History] = {}
        self._job: _RenderJob | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def history(self) -> History:
        """History of the open project."""
        with self._changed:
            return self._history_at(self._folder())

    def want(self, shot: GenerationRequest, strip: tuple[float, ...] | None = None) -> None:
        """Show `shot`, and the strip at these strengths (None: unchanged), instead of what is in progress."""
        with self._changed:
            self._times.clear()
            other = self._shot is None or shot.alone() != self._shot.alone()
            self._shot, self._error, self._wanted_at = shot, "", time.monotonic()
            if strip is not None:
                self._strip = strip
            job = self._job
            if job is not None and (other or job.place == "shot") and job.shot not in self._wanted().values():
                self.worker.cancel(job.reply)
            self._begin()

    def draw_grid(self, grid: GridState) -> None:
        """Generate a grid after the shown image; an unfinished earlier one is dropped."""
        with self._changed:
            self._times.clear()
            self._grid = grid
            if self._job is not None and self._job.place == "grid":
                self.worker.cancel(self._job.reply)
            self._begin()

    def refuse(self, sentence: str) -> None:
        """Show why nothing can be generated."""
        with self._changed:
            self._error, self._wanted_at = sentence, time.monotonic()

    def cancel(self) -> None:
        """Stop generating; finished images stay."""
        with self._changed:
            self._drop()
            self._strip = ()
            if self._grid is not None and self._grid.waits:
                self._grid.problem = CANCELLED
            if not self._is_shown():
                self._error = CANCELLED
            self._wanted_at = time.monotonic()

    def clear(self) -> None:
        """Reset, as another project is open."""
        with self._changed:
            self._drop()
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
            job, grid = self._job, self._grid
            wanted = [*self._wanted().values(), *(grid.shots if grid else ())]
            images = {one: path for one in wanted if (path := self._find_image(one)) is not None}
            states = {"": "idle" if self._is_shown() else "working", CANCELLED: "idle"}
            state = states.get(self._error, "error")
            reply = job.reply if job else Reply({})
            message = self._error or self.worker.describe(reply)
            return PreviewState(
                state, message, reply.done, reply.total, self._shot, self._strip, grid,
                images, self._wanted_at, job.shot if job else None, reply.looks, self._note, self._seconds,
            )  # fmt: skip

    def look(self) -> bytes:
        """A small JPEG of the image in progress, b"" if there is none."""
        return job.reply.look if (job := self._job) else b""

    def _show_last(self) -> None:
        pair = self._history_at(self._folder()).last_pair()
        for one in pair:
            self._drawn.setdefault(self._key(one.shot), one.file)
        if pair:
            self._shot = pair[0].shot

    def _begin(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._draw_for_ever, daemon=True, name="render-queue")
            self._thread.start()
        self._changed.notify()

    def _drop(self) -> None:
        if self._job is not None:
            self.worker.cancel(self._job.reply)

    def _wanted(self) -> dict[str, GenerationRequest]:
        """The shown image, the base's beside it and the strip, in the order that they are generated in, by
        place."""
        if self._shot is None:
            return {}
        strip = strip_shots(self._shot, self._strip)
        shown = {"shot": self._shot.acting(), "base": self._shot.alone()}
        return shown | {f"strip {number}": shot for number, shot in enumerate(strip)}

    def _is_shown(self) -> bool:
        """Whether the shown image and the base's own exist, or none is wanted."""
        return all(self._find_image(shot) is not None for shot in list(self._wanted().values())[:2])

    def _find_image(self, shot: GenerationRequest) -> Path | None:
        """The file of a request, if it was generated in the open project from the adapter files as last
        requested."""
        path = self._drawn.get(self._key(shot))
        return path if path is not None and path.is_relative_to(self._folder()) and path.is_file() else None

    def _key(self, shot: GenerationRequest) -> ImageKey:
        files = (*(one.file for one in shot.loras), *filter(None, [shot.image]))
        return shot, tuple(self._times.setdefault(file, changed_at(file)) for file in files)

    def _next(self) -> tuple[str, GenerationRequest | None] | None:
        """Where the next image is shown, and its request: shown image, base beside it, strip, grid, sheet."""
        if not self._error:
            for place, shot in self._wanted().items():
                if self._find_image(shot) is None:
                    return place, shot
        if self._grid is None or not self._grid.waits:
            return None
        cell = next((cell for cell in self._grid.shots if self._find_image(cell) is None), None)
        return ("grid", cell) if cell is not None else ("sheet", None)

    def _draw_for_ever(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next() is not None)
                # The slider is still moving: wait for it to rest.
                while (rest := self._wanted_at + RESTS - time.monotonic()) > 0:
                    self._changed.wait(rest)
                found = self._next()
                if found is None:
                    continue
                place, shot = found
                reply = self.worker.submit(self._request(shot))
                key = self._key(shot) if shot is not None else None
                self._job = job = _RenderJob(place, shot, key, self._grid, reply)
            reply.finished.wait()
            with self._changed:
                self._keep(job)
                self._job = None

    def _request(self, shot: GenerationRequest | None) -> dict[str, Any]:
        """What the worker is asked for: an image, or the sheet of the grid."""
        folder = self._folder() / time.strftime("%Y-%m")
        if shot is not None:
            return {"do": "generate", **asdict(shot), "look": True, "out": str(folder)}
        assert self._grid is not None
        images = {one: path for one in self._grid.shots if (path := self._find_image(one)) is not None}
        stem = f"{time.strftime('%Y%m%d-%H%M%S')}-grid-{time.monotonic_ns() % 100_000:05d}.png"
        return self._grid.sheet_request(images, folder / stem)

    def _keep(self, job: _RenderJob) -> None:
        reply, grid = job.reply, job.grid
        path = Path(str((reply.result.get("files") or [""])[0]))
        if reply.state != "error" and not path.is_file():
            # Retrying would loop: a worker that finishes without an image has a bug.
            reply.state, reply.message = "error", _("The worker ended without an image; see the logs folder.")
        if reply.state == "error":
            self._fail(job)
        elif job.shot is None or job.key is None:
            assert grid is not None
            grid.sheet = path
            entry = HistoryEntry(path, grid.shot, grid.rows, grid.columns)
            self._history_at(path.parent.parent).add(entry)
        else:
            self._note = str(reply.images[-1].get("note", "")) if reply.images else ""
            self._seconds = float(reply.result.get("seconds", 0.0))
            self._drawn[job.key] = path
            while len(self._drawn) > MOST_DRAWN:
                self._drawn.pop(next(iter(self._drawn)))
            if job.place in ("shot", "base"):
                entry = HistoryEntry(path, job.shot, beside=job.place == "base")
                self._history_at(path.parent.parent).add(entry)

    def _history_at(self, folder: Path) -> History:
        if folder not in self._histories:
            self._histories[folder] = History(folder)
        return self._histories[folder]

    def _fail(self, job: _RenderJob) -> None:
        """Report a failure where it belongs; cancellation by a new request is silent."""
        grid, reply = job.grid, job.reply
        if job.place in ("grid", "sheet"):
            if grid is not None and not (reply.dropped and grid is self._grid):
                grid.problem = grid.problem or reply.message
        elif not reply.dropped and job.shot in self._wanted().values():
            self._error = reply.message
