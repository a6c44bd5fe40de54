"""What the Dataset tab finds out about the images: file checks, and measurements by the base model.

Checks (damaged, tiny, blurred, near-duplicate, badly captioned) run in a thread; measurements of the images
are kept in the project. Measurements (captions that fit badly, trigger words, what the last run learned of
each image) run in the warm worker and are stored in the project with a hash of their inputs, so they survive
a restart and can be marked stale. So are the texts of a captioner and the masks of a mask model, which an
edit makes use of.
"""

import contextlib
import errno
import functools
import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from app.jobs import Jobs, RunView
from app.templates import _
from app.train.form import Plan
from app.worker_client import CANCELLED, Reply, WorkerClient
from lora_core.data.audit import TrainingView, audit, kept_looks
from lora_core.data.dataset import split_holdout
from lora_core.data.images import Dataset, ImageRecord
from lora_core.errors import DatasetError, LoraError, RunError
from lora_core.projects.caption_edits import Captioner, Edit, Masker, images_for, left_to_do
from lora_core.projects.project import DEMO, Project, relative_name
from lora_core.system.files import file_stamp, read_json, read_object, write_atomically

BY_ITSELF = 150
"""Up to this many images are checked automatically; a thousand would take a minute of both cores."""
LISTS = ("problems", "learned", "shares")
LOOKS = "looks.npz"


class _Outdated(Exception):
    """The check was cancelled, or the images changed or another project was opened during it."""


class Checker:
    """The checks of the open project's images."""

    def __init__(self, project: Project) -> None:
        """Nothing is looked at before it is asked for."""
        self.project = project
        self._lock = threading.Lock()
        self._state: dict[str, Any] = {"state": "idle"}
        self._made = 0
        self._inputs: tuple[object, ...] = ()
        """The input of a check: folder, revision, and how the run would train."""

    def state(self) -> dict[str, Any]:
        """`state` (idle, working, done, failed), progress, findings, and `fresh`: whether they are of the
        current images."""
        inputs = self._inputs
        return {**self._state, "fresh": bool(inputs) and inputs == self._now()}

    def progress(self) -> dict[str, Any]:
        """`state` and progress alone, and how many checks were `made`: one can be over between two looks."""
        state = {key: value for key, value in self._state.items() if key in ("state", "done", "total")}
        return {**state, "made": self._made}

    def start(self) -> None:
        """Start the check, unless it is running or done."""
        inputs = self._now()
        with self._lock:
            if self._inputs == inputs and self._state["state"] in ("working", "done"):
                return
            self._inputs = inputs
            self._state = {"state": "working", "done": 0, "total": len(self.project.dataset().records)}
        threading.Thread(target=self._run, args=(inputs,), daemon=True, name="check").start()

    def cancel(self) -> None:
        """Stop the check; its measurements are kept, and the next one continues from there."""
        with self._lock:
            if self._state["state"] == "working":
                self._inputs, self._state = (), {"state": "idle", "cancelled": True}

    def _now(self) -> tuple[object, ...]:
        plan = Plan(self.project)
        # First, because reading the folder may create a new revision.
        self.project.dataset()
        config, base = plan.config, plan.base
        resolution = config.resolution(base.resolution)
        how = (resolution, base.multiple, plan.trigger, config.train.batch_size)
        return (
            self.project.dataset_folder,
            self.project.revision,
            *how,
            *config.dataset.resolutions,
            config.validation.pictures,
            config.seed,
        )

    def _run(self, inputs: tuple[object, ...]) -> None:
        plan, dataset, folder = Plan(self.project), self.project.dataset(), self.project.dataset_folder
        project = self.project.path

        def report(done: int, total: int) -> None:
            if self._inputs is not inputs or self.project.dataset_folder != inputs[0]:
                raise _Outdated
            self._state = {"state": "working", "done": done, "total": total}

        try:
            # What was read may be another project's already.
            report(0, len(dataset.records))
            with kept_looks(project / LOOKS) as looks:
                found = audit(dataset, plan_training(plan, dataset), report, looks)
            rows = {key: [_relative(row, folder) for row in found[key]] for key in LISTS}
            state = {"state": "done", **rows}
        except _Outdated:
            with self._lock:
                # Another project was opened; its page would follow this check forever.
                if self._inputs is inputs:
                    self._inputs, self._state = (), {"state": "idle"}
            return
        except (LoraError, OSError) as error:
            state = {"state": "failed", "problem": str(error)}
        with self._lock:
            # Counted first: who sees that it is done has to see that there is one more.
            if self._inputs is inputs:
                self._made += 1
                self._state = state


def plan_training(plan: Plan, dataset: Dataset) -> TrainingView:
    """How the run described by the form would train on a dataset."""
    config, records = plan.config, dataset.records
    out: frozenset[Path] = frozenset()
    # If the split fails, the form says so.
    with contextlib.suppress(DatasetError):
        out = frozenset(r.path for r in split_holdout(records, config.validation.pictures, config.seed)[1])
    return TrainingView(
        resolution=config.resolution(plan.base.resolution),
        multiple=plan.base.multiple,
        tokenizer=plan.base.tokenizer,
        trigger=plan.trigger,
        batch_size=config.train.batch_size,
        held_out=out,
        reg=dataset.reg if config.dataset.reg_weight else [],
        rules=config.dataset,
    )


def _relative(value: Any, folder: Path, key: str = "") -> Any:
    """A finding with the paths of its images relative to the dataset folder."""
    if isinstance(value, dict):
        return {key: _relative(one, folder, key) for key, one in value.items()}
    if isinstance(value, list):
        return [_relative(one, folder, key) for one in value]
    is_path = isinstance(value, str) and key in ("picture", "twin", "pictures")
    return relative_name(Path(value), folder) if is_path and value else value


ANNOTATORS: Mapping[str, tuple[str, type[Captioner | Masker]]] = {
    "caption": ("captioner", Captioner), "mask": ("masker", Masker),
}  # fmt: skip
"""Actions of local models on images: where the draft keeps their options, and the fields."""
WHATS = ("captions", "triggers", "pictures", *ANNOTATORS)
KEPT_IN = "insights.json"
LARGEST = 256_000_000
"""Bytes of that file; a captioner's texts of 100,000 images take a tenth, as do the masks of 2,000."""
OF_A_RUN = "pictures.json"


@dataclass
class _Work:
    """A running measurement, its inputs and its results."""

    reply: Reply
    mark: str
    folder: Path
    project: Path
    inputs: dict[str, Any]


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
    _pictures: set[str] | None = None
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def state(self) -> dict[str, Any]:
        """Per entry of `WHATS`: `state` (idle, working, done, failed), progress, `why` it cannot start, what
        was `found`, and whether that is `fresh`."""
        return {what: self._state(what) for what in WHATS}

    def progress(self) -> dict[str, Any]:
        """`state`, working or idle, and the progress of the measurement."""
        done = {what: (work.reply.done, work.reply.message) for what, work in dict(self._work).items()}
        return {"state": "working" if done else "idle", "done": done}

    def begin(self, what: str, asked: Mapping[str, Any], pictures: list[str] | None = None) -> None:
        """Start a measurement, unless it is running.

        Args:
            what: one of `WHATS`.
            asked: the fields of a captioner or a mask model, and `how`, if needed.
            pictures: the names of the images to caption or to mask; None for all.

        Raises:
            LoraError: it cannot be measured now, or not so; says why.
        """
        why = self._why(what)
        if why:
            raise RunError(why)
        if what in ANNOTATORS:
            self._keep_asked(what, asked)
            self._pictures = None if pictures is None else set(pictures)
        with self._lock:
            before = self._work.get(what)
            if before is not None and before.project == self.project.path:
                return
            if before is not None:
                self.worker.cancel(before.reply)
            self._problems.pop(what, None)
            request, mark = self._request(what)
            project = self.project
            inputs = {"files": self._stamps(request["pictures"])} if what in ANNOTATORS else {}
            work = _Work(self.worker.submit(request), mark, project.dataset_folder, project.path, inputs)
            self._work[what] = work
        self.worker.follow(work.reply, self.occupied, functools.partial(self._ended, what, work))

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
            return _("There are no images yet; add some.")
        if what in ANNOTATORS:
            return ""
        if what == "pictures":
            return "" if self._run() else _("No run on these images has a checkpoint yet; train one first.")
        if what == "captions" and len({record.caption for record in records if record.caption}) < 2:
            return _("Checking captions needs two images with different captions; write some first.")
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
        if what in ANNOTATORS:
            kept = self.asked(what)
            wanted = left_to_do(*self._annotator(what, kept))
            names = [name for name in wanted if self._pictures is None or name in self._pictures]
            mark = json.dumps(kept, sort_keys=True)
            return {"do": what, "dataset": str(self.project.dataset_folder), "pictures": names, **kept}, mark
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
            return {
                "state": "working", "done": reply.done, "total": reply.total, "phase": reply.phase,
                "message": self.worker.describe(reply), "why": why,
            }  # fmt: skip
        problem = self._problems.get(what, "")
        if problem:
            return {"state": "failed", "message": problem, "why": why}
        kept = self._kept_of_run() if what == "pictures" else self._kept(what)
        return {"state": "done" if "found" in kept else "idle", "why": why, **kept}

    def asked(self, what: str) -> dict[str, Any]:
        """The fields of the last captioner or mask model, and `how` its result is used."""
        kept = self.project.draft().get(ANNOTATORS[what][0])
        return kept if isinstance(kept, dict) else {}

    def _annotator(
        self, what: str, asked: Mapping[str, Any]
    ) -> tuple[Captioner | Masker, dict[str, ImageRecord], str]:
        """A model with its options, the images, and `how`."""
        kind = ANNOTATORS[what][1]
        given = {one.name: asked[one.name] for one in fields(kind) if one.name in asked}
        images = images_for(self.project, what)
        return kind(**{"model": "", **given}), images, str(asked.get("how") or "missing")

    def _keep_asked(self, what: str, asked: Mapping[str, Any]) -> None:
        self.project.refuse_demo()
        annotator, images, how = self._annotator(what, asked)
        annotator.check()
        if not left_to_do(annotator, images, how):
            every = _("Every image has a caption; append to them, or replace them.")
            raise DatasetError(every if what == "caption" else _("Every image has a mask; replace them."))
        self.project.update_draft(**{ANNOTATORS[what][0]: {**asdict(annotator), "how": how}})

    def annotate(self, what: str, trigger: str) -> Edit:
        """The edit that makes captions or masks of what the model made last.

        Raises:
            DatasetError: it was not asked yet, or would be asked otherwise now, or not of these images.
        """
        kept, asked = self._kept(what), self.asked(what)
        found = kept.get("found", {})
        texts, files = found.get("texts", {}), found.get("files", {})
        # Another image may have come to a name since, or another crop to the image.
        same = {name: texts[name] for name, now in self._stamps(texts).items() if files.get(name) == now}
        if not kept.get("fresh") or (texts and not same):
            if what == "caption":
                raise DatasetError(_("Press Preview first: the captioner was not asked yet."))
            raise DatasetError(_("Press Preview first: the mask model was not asked yet."))
        name = self._annotator(what, asked)[0].short_name
        return Edit(what, name, trigger, texts=same, how=str(asked["how"]))

    def _stamps(self, names: Iterable[str]) -> dict[str, Any]:
        """What tells an image and its crop from others of its name, as JSON gives it back."""
        images = self.project.editable()
        now = {name: [file_stamp(images[name].path), images[name].crop] for name in names if name in images}
        return dict(json.loads(json.dumps(now)))

    def _kept(self, what: str) -> dict[str, Any]:
        kept = read_json(self.project.path / KEPT_IN, LARGEST).get(what)
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
        shown = _relative(found, self.project.dataset_folder)
        # A run that was resumed has another best or last checkpoint.
        best = run_view.run.progress().best_step
        wanted = best if best in steps else steps[-1]
        return {"found": shown, "run": run_view.run.name, "fresh": found.get("step") == wanted}

    def _ended(self, what: str, work: _Work) -> None:
        """Store the results, or the reason why there are none."""
        reply = work.reply
        found = reply.result.get("found")
        with self._lock:
            if reply.state == "done":
                # What a run learned is stored in its folder.
                if isinstance(found, dict) and what != "pictures":
                    self._keep(what, work, found | work.inputs)
            elif work.project == self.project.path and (reply.message != CANCELLED or reply.gave_way):
                self._problems[what] = reply.gave_way or reply.message
            if self._work.get(what) is work:
                del self._work[what]

    def _keep(self, what: str, work: _Work, found: dict[str, Any]) -> None:
        file, kept = work.project / KEPT_IN, dict[str, Any]()
        try:
            # One that is broken counts as empty; one that cannot be read now is not replaced.
            with contextlib.suppress(FileNotFoundError, ValueError):
                kept = read_object(file, LARGEST)
            kept[what] = {"mark": work.mark, "found": _relative(found, work.folder)}
            data = json.dumps(kept, ensure_ascii=False).encode("utf-8", "surrogatepass")
            if len(data) > LARGEST:
                raise OSError(errno.EFBIG, "too large", str(file))
            write_atomically(file, data)
        except OSError as error:
            too_large = _(
                "The results cannot be saved: {} would be larger than {} MB; move it elsewhere, or choose"
                " fewer images.",
                file, LARGEST // 10**6,
            )  # fmt: skip
            other = _("The results cannot be saved ({}); free some disk space.", error.strerror)
            self._problems[what] = too_large if error.errno == errno.EFBIG else other
