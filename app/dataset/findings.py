"""What the Dataset tab finds out about the images: file checks, and measurements by the base model.

Checks (damaged, tiny, blurred, near-duplicate, badly captioned) run in a thread and are cached while the
window is open. Measurements (captions that fit badly, trigger words, what the last run learned of each image)
run in the warm worker and are stored in the project with a hash of their inputs, so they survive a restart
and can be marked stale.
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
from lora_core.data.audit import Looks, TrainingView, audit
from lora_core.data.holdout import split_holdout
from lora_core.data.scan import ImageRecord
from lora_core.errors import DatasetError, LoraError, RunError
from lora_core.projects.project import DEMO, Project, read_json, relative_name
from lora_core.system.files import write_atomically

BY_ITSELF = 150
"""Up to so many images are looked over without being asked; a thousand would take a minute of both
cores."""
LISTS = ("problems", "learned", "shares")


class _Outdated(Exception):
    """The images changed or another project was opened during the check."""


@dataclass(frozen=True)
class _CheckKey:
    """The inputs of a check."""

    folder: Path
    revision: int
    how: tuple[object, ...]


class Checker:
    """The checks of the open project's images."""

    def __init__(self, project: Project) -> None:
        """Nothing is looked at before it is asked for."""
        self.project = project
        self._looks: Looks = {}
        self._lock = threading.Lock()
        self._state: dict[str, Any] = {"state": "idle"}
        self._aim: _CheckKey | None = None

    def state(self) -> dict[str, Any]:
        """`state` (idle, working, done, failed), progress, findings, and `fresh`: whether they are of the
        current images."""
        aim = self._aim
        fresh = aim is not None and aim == self._now()
        return {**self._state, "fresh": fresh}

    def progress(self) -> dict[str, Any]:
        """`state` and progress alone."""
        return {key: value for key, value in self._state.items() if key in ("state", "done", "total")}

    def start(self) -> None:
        """Start the check, unless it is running or done."""
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
        # First, because reading the folder may create a new revision.
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
                # Another project was opened; its page would follow this check forever.
                if self._aim is aim:
                    self._aim, self._state = None, {"state": "idle"}
            return
        except (LoraError, OSError) as error:
            state = {"state": "failed", "problem": str(error)}
        if self._aim is aim:
            self._state = state


def plan_training(plan: Plan, records: list[ImageRecord]) -> TrainingView:
    """How the run described by the form would train on `records`."""
    config = plan.config
    out: frozenset[Path] = frozenset()
    # If the split fails, the form says so.
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
    """A finding with paths relative to the dataset folder."""
    named: dict[str, Any] = {
        key: relative_name(Path(row[key]), folder) for key in ("picture", "twin") if row.get(key)
    }
    if "pictures" in row:
        named["pictures"] = [relative_name(Path(path), folder) for path in row["pictures"]]
    return {**row, **named}


WHATS = ("captions", "triggers", "pictures")
LOOK_EVERY = 0.3
KEPT_IN = "insights.json"
OF_A_RUN = "pictures.json"


@dataclass
class _Work:
    """A running measurement and its inputs."""

    reply: Reply
    mark: str
    folder: Path
    project: Path


@dataclass
class DatasetInsights:
    """Asks the worker for measurements and stores the results.

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
        """Per entry of `WHATS`: `state` (idle, working, done, failed), progress, `why` it cannot start, what
        was `found`, and whether that is `fresh`."""
        return {what: self._state(what) for what in WHATS}

    def progress(self) -> dict[str, Any]:
        """`state`, working or idle, and the progress of what is being measured."""
        done = {what: (work.reply.done, work.reply.message) for what, work in dict(self._work).items()}
        return {"state": "working" if done else "idle", "done": done}

    def begin(self, what: str) -> None:
        """Start a measurement, unless it is running.

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
        """Stop a measurement; earlier results stay."""
        with self._lock:
            work = self._work.get(what)
        if work is not None:
            self.worker.cancel(work.reply)

    def _why(self, what: str) -> str:
        """Why something cannot be measured now, "" if it can."""
        if what not in WHATS:
            return f"{what!r} cannot be measured; choose one of {', '.join(WHATS)}."
        busy = self.occupied()
        if busy:
            return busy
        records = self.project.dataset().records
        if not records:
            return "There are no images yet; add some."
        if what == "pictures":
            return "" if self._run() else "No run on these images has a checkpoint yet; train one first."
        if what == "captions" and len({record.caption for record in records if record.caption}) < 2:
            return "Checking captions needs two images with different captions; write some first."
        plan = Plan(self.project)
        return "" if plan.base.facts is not None else plan.base.problem

    def _run(self) -> RunView | None:
        """The newest run with a checkpoint that trained on the shown images."""
        for run_view in self.jobs.all():
            config = run_view.config()
            if config is None or not self.jobs.own(run_view) or not run_view.run.checkpoint_steps():
                continue
            path = config.dataset.path
            if path == DEMO if self.project.uses_demo else Path(path) == self.project.dataset_folder:
                return run_view
        return None

    def _request(self, what: str) -> tuple[dict[str, Any], str]:
        """The worker's request and the hash of its inputs."""
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
        """Of images, captions, base and trigger word."""
        rows = [(name, record.caption) for name, record in self.project.images().items()]
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
        # A run that was resumed has another best or last checkpoint.
        best = run_view.run.progress().best_step
        wanted = best if best in steps else steps[-1]
        return {"found": shown, "run": run_view.run.name, "fresh": found.get("step") == wanted}

    def _attend(self, what: str, work: _Work) -> None:
        """Wait for the result and store it; a run that begins meanwhile takes precedence."""
        reply, gave_way = work.reply, ""
        while not reply.finished.wait(LOOK_EVERY):
            gave_way = "" if reply.dropped else self.occupied()
            if gave_way:
                self.worker.cancel(reply)
        found = reply.result.get("found")
        with self._lock:
            if reply.state == "done":
                # What a run learned is stored in its folder.
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
            self._problems[what] = f"The results cannot be saved ({error.strerror}); free some disk space."


def _named(found: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Paths relative to the dataset folder."""
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
