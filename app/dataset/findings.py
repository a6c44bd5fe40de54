"""Looking the pictures over in the background: damaged, tiny, blurred, alike, or badly captioned.

What was measured on a picture is kept for as long as the window is open, so that a second look takes no time.
"""

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.jobs import Jobs, RunView
from app.train.form import Plan
from app.worker_client import CANCELLED, Reply, WorkerClient
from lora_core.data.audit import Looks, audit
from lora_core.data.holdout import split_holdout
from lora_core.data.scan import ImageRecord
from lora_core.data.statistics import TrainingView
from lora_core.errors import DatasetError, LoraError, RunError
from lora_core.projects.project import DEMO, Project, read_json, relative_name
from lora_core.system.paths import write_atomically

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


# What the base says of the open project: captions that fit badly, words for a trigger, and what the last
# run has learned of each picture.
#
# The warm worker measures; a page only asks and looks again. What was found is kept in the project with a
# mark of what it is of, so that it is there after a restart and is told apart from what has changed since.


WHATS = ("captions", "triggers", "pictures")
LOOK_EVERY = 0.3
KEPT_IN = "insights.json"
OF_A_RUN = "pictures.json"


@dataclass
class _Work:
    """What is being measured, and of what."""

    reply: Reply
    mark: str
    folder: Path
    project: Path


@dataclass
class DatasetInsights:
    """Asks the worker, and keeps what it found.

    Attributes:
        project: the open one.
        worker: which measures.
        jobs: the runs.
        occupied: what needs the machine more, in a sentence; "" where nothing does.
    """

    project: Project
    worker: WorkerClient
    jobs: Jobs
    occupied: Callable[[], str]
    _work: dict[str, _Work] = field(default_factory=dict)
    _problems: dict[str, str] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def state(self) -> dict[str, Any]:
        """For each of `WHATS` its `state` (idle, working, done, failed), how far, `why` it cannot be asked
        for, and what was `found`, `fresh` where nothing has changed since."""
        return {what: self._state(what) for what in WHATS}

    def begin(self, what: str) -> None:
        """Have something measured, unless that is being done.

        Raises:
            RunError: it cannot be measured now; says why.
        """
        why = self._why(what)
        if why:
            raise RunError(why)
        with self._lock:
            before = self._work.get(what)
            if before is not None and before.project == self.project.path:
                return
            if before is not None:
                self.worker.cancel(before.reply)
            self._problems.pop(what, None)
            request, mark = self._request(what)
            project = self.project
            work = _Work(self.worker.submit(request), mark, project.dataset_folder, project.path)
            self._work[what] = work
        threading.Thread(target=self._attend, args=(what, work), daemon=True, name=what).start()

    def cancel(self, what: str) -> None:
        """Stop measuring; what was found before stays."""
        with self._lock:
            work = self._work.get(what)
        if work is not None:
            self.worker.cancel(work.reply)

    def _why(self, what: str) -> str:
        """Why something cannot be measured now, "" where it can."""
        if what not in WHATS:
            return f"{what!r} cannot be measured; choose one of {', '.join(WHATS)}."
        busy = self.occupied()
        if busy:
            return busy
        records = self.project.dataset().records
        if not records:
            return "There are no pictures yet; put some in."
        if what == "pictures":
            return (
                "" if self._run() else "There is no run on these pictures with a checkpoint yet; train first."
            )
        if what == "captions" and len({record.caption for record in records if record.caption}) < 2:
            return "Checking captions needs two pictures with different captions; write some first."
        plan = Plan(self.project)
        return "" if plan.base.facts is not None else plan.base.problem

    def _run(self) -> RunView | None:
        """The project's newest run on the pictures that are shown, of those with a checkpoint."""
        for run_view in self.jobs.all():
            config = run_view.config()
            if config is None or not self.jobs.own(run_view) or not run_view.run.checkpoint_steps():
                continue
            path = config.dataset.path
            if path == DEMO if self.project.uses_demo else Path(path) == self.project.dataset_folder:
                return run_view
        return None

    def _request(self, what: str) -> tuple[dict[str, Any], str]:
        """What to ask the worker, and the mark of what it is of."""
        if what == "pictures":
            run_view = self._run()
            assert run_view is not None
            return {"do": what, "run": str(run_view.run.path)}, run_view.run.name
        plan = Plan(self.project)
        model = plan.config.model
        asked = dict(vars(model))
        if what == "triggers":
            asked["trigger"] = plan.trigger
        return {"do": what, "dataset": str(self.project.dataset_folder), **asked}, self._mark(asked)

    def _mark(self, asked: dict[str, str]) -> str:
        """Of pictures, captions, base and trigger word."""
        folder = self.project.dataset_folder
        rows = [(relative_name(r.path, folder), r.caption) for r in self.project.dataset().records]
        return hashlib.sha256(json.dumps([rows, asked]).encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def _state(self, what: str) -> dict[str, Any]:
        why, work = self._why(what), self._work.get(what)
        if work is not None and work.project == self.project.path:
            reply = work.reply
            ahead = self.worker.ahead_of(reply)
            waits = f"Waiting for {ahead} other {'request' if ahead == 1 else 'requests'}." if ahead else ""
            return {
                "state": "working", "done": reply.done, "total": reply.total,
                "message": waits or reply.message, "why": why,
            }  # fmt: skip
        problem = self._problems.get(what, "")
        if problem:
            return {"state": "failed", "message": problem, "why": why}
        kept = self._kept_of_run() if what == "pictures" else self._kept(what)
        return {"state": "done" if "found" in kept else "idle", "why": why, **kept}

    def _kept(self, what: str) -> dict[str, Any]:
        kept = read_json(self.project.path / KEPT_IN).get(what)
        if not isinstance(kept, dict) or not isinstance(kept.get("found"), dict):
            return {}
        _, mark = self._request(what)
        return {"found": kept["found"], "fresh": kept.get("mark") == mark}

    def _kept_of_run(self) -> dict[str, Any]:
        run_view = self._run()
        if run_view is None:
            return {}
        found, steps = read_json(run_view.run.path / OF_A_RUN), run_view.run.checkpoint_steps()
        if not isinstance(found.get("rows"), list):
            return {"run": run_view.run.name}
        shown = _named(found, self.project.dataset_folder)
        # A run that was trained on since has another best or last checkpoint.
        best = run_view.run.progress().best_step
        wanted = best if best in steps else steps[-1]
        return {"found": shown, "run": run_view.run.name, "fresh": found.get("step") == wanted}

    def _attend(self, what: str, work: _Work) -> None:
        """Wait for the end and keep what was found; a run that begins meanwhile comes first."""
        reply, gave_way = work.reply, ""
        while not reply.finished.wait(LOOK_EVERY):
            gave_way = "" if reply.dropped else self.occupied()
            if gave_way:
                self.worker.cancel(reply)
        found = reply.result.get("found")
        with self._lock:
            if reply.state == "done":
                # What a run has learned stands in its folder.
                if isinstance(found, dict) and what != "pictures":
                    self._keep(what, work, found)
            elif work.project == self.project.path and (reply.message != CANCELLED or gave_way):
                self._problems[what] = gave_way or reply.message
            if self._work.get(what) is work:
                del self._work[what]

    def _keep(self, what: str, work: _Work, found: dict[str, Any]) -> None:
        file = work.project / KEPT_IN
        kept = {**read_json(file), what: {"mark": work.mark, "found": _named(found, work.folder)}}
        try:
            write_atomically(file, json.dumps(kept, ensure_ascii=False).encode("utf-8", "surrogatepass"))
        except OSError as error:
            self._problems[what] = f"What was found cannot be kept ({error.strerror}); free some disk space."


def _named(found: dict[str, Any], folder: Path) -> dict[str, Any]:
    """With names below the dataset folder in place of paths."""
    rows = []
    for row in found.get("rows", []):
        if not isinstance(row, dict):
            continue
        shown = dict(row)
        if isinstance(row.get("picture"), str):
            shown["picture"] = relative_name(Path(row["picture"]), folder)
        better = row.get("better")
        if isinstance(better, dict) and isinstance(better.get("picture"), str):
            shown["better"] = {**better, "picture": relative_name(Path(better["picture"]), folder)}
        rows.append(shown)
    return {**found, "rows": rows}
