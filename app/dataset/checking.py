"""Looking the pictures over in the background: damaged, tiny, blurred, alike, or badly captioned.

What was measured on a picture is kept for as long as the window is open, so that a second look takes no time.
"""

import contextlib
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.train.form import Plan
from lora_core.data.audit import Looks, audit
from lora_core.data.holdout import split_holdout
from lora_core.data.scan import ImageRecord
from lora_core.data.statistics import TrainingView
from lora_core.errors import DatasetError, LoraError
from lora_core.projects.project import Project, relative_name

BY_ITSELF = 150
"""Up to so many pictures are looked over without being asked; a thousand would take a minute of both
cores."""
LISTS = ("problems", "learned", "shares")


class _Outdated(Exception):
    """The pictures have changed, or another project is open: a look at them is of no use any more."""


@dataclass(frozen=True)
class _CheckKey:
    """What a check is of."""

    folder: Path
    revision: int
    how: tuple[object, ...]


class Checker:
    """The findings on the open project's pictures."""

    def __init__(self, project: Project) -> None:
        """Nothing is looked at before it is asked for."""
        self.project = project
        self._looks: Looks = {}
        self._lock = threading.Lock()
        self._state: dict[str, Any] = {"state": "idle"}
        self._aim: _CheckKey | None = None

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

    def _now(self) -> _CheckKey:
        plan = Plan(self.project)
        # First, as reading the folder may make a new revision.
        self.project.dataset()
        config, base = plan.config, plan.base
        resolution = config.train.resolution or base.resolution
        batch = config.train.batch_size
        how = (resolution, base.multiple, plan.trigger, batch, config.validation.pictures, config.seed)
        return _CheckKey(self.project.dataset_folder, self.project.revision, how)

    def _run(self, aim: _CheckKey) -> None:
        plan, dataset = Plan(self.project), self.project.dataset()

        def said(done: int, total: int) -> None:
            if self._aim is not aim or self.project.dataset_folder != aim.folder:
                raise _Outdated
            self._state = {"state": "working", "done": done, "total": total}

        try:
            found = audit(dataset, plan_training(plan, dataset.records), said, self._looks)
            rows = {key: [_relative_row(row, aim.folder) for row in found[key]] for key in LISTS}
            state = {"state": "done", **rows}
        except _Outdated:
            with self._lock:
                # Another project was opened; its page would follow this one for ever.
                if self._aim is aim:
                    self._aim, self._state = None, {"state": "idle"}
            return
        except (LoraError, OSError) as error:
            state = {"state": "failed", "problem": str(error)}
        if self._aim is aim:
            self._state = state


def plan_training(plan: Plan, records: list[ImageRecord]) -> TrainingView:
    """How the pictures would be trained on by the run that the form stands for."""
    config = plan.config
    out: frozenset[Path] = frozenset()
    # Where they cannot be parted, the form says so.
    with contextlib.suppress(DatasetError):
        out = frozenset(r.path for r in split_holdout(records, config.validation.pictures, config.seed)[1])
    return TrainingView(
        resolution=config.train.resolution or plan.base.resolution,
        multiple=plan.base.multiple,
        tokenizer=plan.base.tokenizer,
        trigger=plan.trigger,
        batch_size=config.train.batch_size,
        held_out=out,
    )


def _relative_row(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A finding with names below the dataset folder in place of paths."""
    named: dict[str, Any] = {
        key: relative_name(Path(row[key]), folder) for key in ("picture", "twin") if row.get(key)
    }
    if "pictures" in row:
        named["pictures"] = [relative_name(Path(path), folder) for path in row["pictures"]]
    return {**row, **named}
