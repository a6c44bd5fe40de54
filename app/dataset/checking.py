"""Looking the pictures over in the background: damaged, tiny, blurred, alike, or badly captioned.

What was measured on a picture is kept for as long as the window is open, so that a second look takes no time.
"""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.projects.project import Project, relative_name
from app.train.plan import Plan
from lora_core.dataset.audit import Looks, audit
from lora_core.spec.errors import LoraError

BY_ITSELF = 150
"""Up to so many pictures are looked over without being asked; a thousand would take a minute of both
cores."""


class _Away(Exception):
    """The pictures have changed, or another project is open: a look at them is of no use any more."""


@dataclass(frozen=True)
class _Aim:
    """What a check is of."""

    folder: Path
    revision: int
    resolution: int


class Checker:
    """The findings on the open project's pictures."""

    def __init__(self, project: Project) -> None:
        """Nothing is looked at before it is asked for."""
        self.project = project
        self._looks: Looks = {}
        self._lock = threading.Lock()
        self._state: dict[str, Any] = {"state": "idle"}
        self._aim: _Aim | None = None

    def state(self) -> dict[str, Any]:
        """`state` (idle, working, done, failed), how far, the findings, and whether they are of the pictures
        as they are now."""
        aim = self._aim
        fresh = aim is not None and aim == self._now()
        return {**self._state, "fresh": fresh}

    def start(self) -> None:
        """Look the pictures over, unless that is being done or has been done."""
        aim = self._now()
        with self._lock:
            if self._aim == aim and self._state["state"] in ("working", "done"):
                return
            self._aim = aim
            total = len(self.project.dataset().records)
            self._state = {"state": "working", "done": 0, "total": total}
        threading.Thread(target=self._run, args=(aim,), daemon=True, name="check").start()

    def _now(self) -> _Aim:
        plan = Plan(self.project)
        # First, as reading the folder may make a new revision.
        self.project.dataset()
        resolution = plan.config.train.resolution or plan.base.resolution
        return _Aim(self.project.dataset_folder, self.project.revision, resolution)

    def _run(self, aim: _Aim) -> None:
        plan, dataset = Plan(self.project), self.project.dataset()

        def said(done: int, total: int) -> None:
            if self._aim is not aim or self.project.dataset_folder != aim.folder:
                raise _Away
            self._state = {"state": "working", "done": done, "total": total}

        try:
            found = audit(
                dataset,
                aim.resolution,
                plan.base.multiple,
                plan.base.tokenizer,
                plan.trigger,
                said,
                self._looks,
            )
            state = {"state": "done", "problems": [self._shown(row, aim.folder) for row in found["problems"]]}
        except _Away:
            return
        except (LoraError, OSError) as error:
            state = {"state": "failed", "problem": str(error)}
        if self._aim is aim:
            self._state = state

    @staticmethod
    def _shown(row: dict[str, str], folder: Path) -> dict[str, str]:
        """A finding with names below the dataset folder in place of paths."""
        named = {key: relative_name(Path(row[key]), folder) for key in ("picture", "twin") if row.get(key)}
        return {**row, **named}
