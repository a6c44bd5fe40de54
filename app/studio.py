"""What the Preview tab shows: a scene, drawn at the strengths that somebody looks at, each drawn once and
kept.

A page only says what it wants to see and polls for it. The drawing goes on without the page, and a page that
comes back finds the pictures. The strength looked at comes first, the strip fills up behind it.
"""

import dataclasses
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.worker import Reply, Worker

MOST_RECENT = 9
STRIP = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)


@dataclass(frozen=True)
class Scene:
    """All that a picture depends on, but for the strength."""

    base: str
    lora: str
    prompt: str
    negative: str
    seed: int
    steps: int
    cfg: float
    sampler: str
    prediction: str = "auto"
    vae: str = ""
    clip_skip: int = 1
    tokens: int = 75


@dataclass(frozen=True)
class Recent:
    """A scene that was drawn before, and a picture of it."""

    scene: Scene
    strength: float
    picture: Path


@dataclass(frozen=True)
class View:
    """What a page shows at a moment."""

    state: str
    message: str
    done: int
    total: int
    scene: Scene | None
    strength: float
    pictures: dict[float, Path]
    wanted_at: float
    recent: tuple["Recent", ...] = ()

    @property
    def working(self) -> bool:
        """Whether anything is still to be drawn, the strip included."""
        return self.state == "working" or self.strip_waits

    @property
    def strip_waits(self) -> bool:
        """Whether cells of the strip are still empty and will be drawn."""
        wants_strip = self.scene is not None and bool(self.scene.lora)
        return wants_strip and self.state != "error" and any(s not in self.pictures for s in STRIP)


class Studio:
    """Draws scenes through the worker, in a thread of its own."""

    def __init__(self, worker: Worker, folder: Path, on_picture: Callable[[], None] = lambda: None) -> None:
        """Draw into `folder`, calling `on_picture` for each picture that is there."""
        self.worker = worker
        self.folder = folder
        self._on_picture = on_picture
        self._scene: Scene | None = None
        self._strength = 1.0
        self._wanted_at = 0.0
        self._error = ""
        self._drawn: dict[tuple[Scene, float], Path] = {}
        self._looked_at: dict[Scene, float] = {}
        self._reply: Reply | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def want(self, scene: Scene, strength: float) -> None:
        """Look at a scene at a strength; what is being drawn for another scene is dropped."""
        with self._changed:
            if self._reply is not None and scene != self._scene:
                self.worker.cancel(self._reply)
            self._scene, self._strength, self._error = scene, round(strength, 3), ""
            self._wanted_at = time.monotonic()
            self._looked_at[scene] = self._strength
            if self._thread is None:
                self._thread = threading.Thread(target=self._draw_for_ever, daemon=True, name="studio")
                self._thread.start()
            self._changed.notify()

    def look_at(self, strength: float) -> bool:
        """Move the strength of the present scene; false where nothing has been drawn yet."""
        scene = self._scene
        if scene is None:
            return False
        self.want(scene, strength)
        return True

    def view(self) -> View:
        """The present scene and its pictures."""
        with self._changed:
            scene, reply = self._scene, self._reply
            pictures = {s: path for (of, s), path in self._drawn.items() if of == scene}
            needed = {0.0} if scene is None or not scene.lora else {0.0, self._strength}
            working = scene is not None and not needed <= set(pictures)
            state = "error" if self._error else "working" if working else "idle"
            message = self._error or (reply.message if reply is not None else "")
            done, total = (reply.done, reply.total) if reply is not None else (0, 0)
            return View(
                state, message, done, total, scene, self._strength, pictures, self._wanted_at, self._recent()
            )

    def _recent(self) -> tuple[Recent, ...]:
        """The scenes drawn so far, newest first, each at the strength that it was looked at."""
        found = []
        for scene, strength in reversed(self._looked_at.items()):
            picture = self._drawn.get((scene, strength)) or self._drawn.get((scene, 0.0))
            if picture is not None:
                found.append(Recent(scene, strength, picture))
        return tuple(found[:MOST_RECENT])

    def _next(self) -> list[float] | None:
        """The strengths to draw next: those looked at, then the strip one by one."""
        scene = self._scene
        if scene is None or self._error:
            return None
        missing = [s for s in (0.0, self._strength) if (scene, s) not in self._drawn]
        if not scene.lora:
            return missing[:1] if (scene, 0.0) not in self._drawn else None
        strip = [s for s in STRIP if (scene, s) not in self._drawn]
        return list(dict.fromkeys(missing)) or strip[:1] or None

    def _draw_for_ever(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next() is not None)
                # A slider that is still moving: wait for it to rest before a picture is begun.
                while time.monotonic() - self._wanted_at < 0.25:
                    self._changed.wait(0.25)
                scene, strengths = self._scene, self._next()
                if scene is None or strengths is None:
                    continue
                self._reply = reply = self.worker.submit(self._request(scene, strengths))
            reply.finished.wait()
            with self._changed:
                self._keep(scene, strengths, reply)
                self._reply = None
            self._on_picture()

    def _request(self, scene: Scene, strengths: list[float]) -> dict[str, Any]:
        out = self.folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{time.monotonic_ns() % 1_000_000:06d}"
        out.mkdir(parents=True, exist_ok=True)
        settings = dataclasses.asdict(scene)
        lora = settings.pop("lora")
        loras = [{"file": lora, "strength": 1.0, "text_strength": None}] if lora else []
        size = {"width": 0, "height": 0}
        return {"do": "generate", **settings, **size, "loras": loras, "strengths": strengths, "out": str(out)}

    def _keep(self, scene: Scene, strengths: list[float], reply: Reply) -> None:
        if reply.state == "error":
            if scene == self._scene:
                self._error = reply.message
            return
        out = Path(reply.request["out"])
        for picture in reply.pictures:
            index = int(picture.get("index", 0))
            if 0 <= index < len(strengths):
                self._drawn[scene, strengths[index]] = out / str(picture["file"])
        if scene == self._scene and any((scene, s) not in self._drawn for s in strengths):
            # Asking again would only loop: a worker that is done without a picture has a defect.
            self._error = "The drawing process ended without a picture; see the logs folder of the workspace."
