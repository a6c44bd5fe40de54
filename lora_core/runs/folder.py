"""A run is a folder, and its files are the only channel between the trainer and all other processes.

The trainer alone writes `events.jsonl`; anyone may append to `requests.jsonl`, one line a write. The status
follows from the last events and from whether the trainer's process lives; it is never stored, so it cannot be
wrong.
"""

import contextlib
import difflib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel, ValidationError

from lora_core.data.dataset import EPOCHS, run_dataset, split_holdout, with_epochs
from lora_core.data.images import ImageRecord
from lora_core.errors import ConfigError, RunError, wrap_os_errors
from lora_core.runs.events import Progress, append_line, read_events
from lora_core.settings.config import (
    BEFORE,
    RETIRED,
    RunConfig,
    flattened,
    in_short,
    load_toml,
    retired,
    to_toml,
)
from lora_core.system.files import (
    changed_at,
    clear_abandoned,
    expand_home,
    is_device,
    parse_json,
    patiently,
    read_json,
    workspace,
    write_atomically,
)
from lora_core.system.processes import hold_lock, live_process

REQUESTS = ("stop", "pause", "save", "preview", "resume")


class _Below:
    """An attribute of a run: a path below its folder."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, run: "RunFolder", kind: type | None = None) -> Path:
        return run.path / self._name


class MeasuredLayer(BaseModel):
    """The rank that a layer needs."""

    part: str
    module: str
    rank: int


class Analysis(BaseModel):
    """What a report measured of a checkpoint on the held-out images.

    Attributes:
        step: of the checkpoint.
        strength: the best strength of the full adapter; None where it could not be measured.
        rank: the lowest rank for all layers that keeps 99% of the gain, 0 where it could not be measured.
        kept, standard_error: the share of the gain that is left at `ranks`, and its error.
        times_smaller: the factor by which a file cut to `ranks` is smaller.
        ranks: by layer.
        sentence: the ranks in words.
    """

    step: int
    strength: float | None = None
    rank: int = 0
    kept: float = 1.0
    standard_error: float | None = None
    times_smaller: float = 1.0
    ranks: list[MeasuredLayer] = []
    sentence: str = ""

    @property
    def cut_pays(self) -> bool:
        """Whether a file cut to `ranks` is worth offering."""
        return self.rank > 0 and self.times_smaller >= 1.2


@dataclass(frozen=True)
class RunFolder:
    """One run on disk."""

    path: Path

    def __post_init__(self) -> None:
        """Take a text, too."""
        object.__setattr__(self, "path", Path(self.path))

    @property
    def name(self) -> str:
        """The run's name, which is its folder's."""
        return self.path.name

    config_file = _Below("config.toml")  # the frozen settings, complete
    events_file = _Below("events.jsonl")  # appended by the trainer
    requests_file = _Below("requests.jsonl")  # to the trainer, appended by anyone
    lock_file = _Below("run.lock")  # held by the live trainer; freed by the system on a crash
    process_file = _Below("process.json")  # the lock's holder, for readers, which never try the lock
    plan_file = _Below("plan.json")  # choices measured before the first step
    inputs_file = _Below("inputs.json")  # hashes of all inputs of the run, written at its first start
    held_out_file = _Below("held_out.json")  # hashes of the images that it never trained on, and of others
    analysis_file = _Below("analysis.json")  # what the last report measured of a checkpoint
    log_file = _Below("log.txt")  # the trainer's own output
    checkpoints = _Below("checkpoints")  # resumable states, one folder a step
    previews = _Below("previews")  # samples taken while training
    exports = _Below("export")  # files for other tools
    tensorboard = _Below("tensorboard")  # curves and samples for TensorBoard, if asked for

    @classmethod
    def create(cls, path: Path, config: RunConfig) -> "RunFolder":
        """Make the folder and freeze its config, atomically.

        A run of that name that failed before its first step has nothing to resume and is replaced, so the
        same command works once the problem is fixed.

        Epochs become steps here, of the images that there are now.

        Raises:
            RunError: the name is taken, or the folder cannot be made.
            DatasetError, ConfigError: its length is in epochs, and the images do not tell how long those are.
        """
        if any(config.get(epochs) for epochs in EPOCHS.values()):
            config = with_epochs(config, run_dataset(config, path.parent.parent / "cache" / "datasets"))
        making = cls(path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex}.making"))
        with wrap_os_errors(RunError, f"The run folder {path} cannot be made"):
            try:
                clear_abandoned(path.parent)
                for below in (making.checkpoints, making.previews, making.exports):
                    below.mkdir(parents=True)
                write_atomically(making.config_file, to_toml(config).encode())
                if cls(path)._failed_at_once():
                    os.rename(path, making.path / "replaced")
                cls(path).require_free()
                patiently(os.rename, making.path, path)
                shutil.rmtree(path / "replaced", ignore_errors=True)
            finally:
                shutil.rmtree(making.path, ignore_errors=True)
        return cls(path)

    def require_free(self) -> None:
        """Refuse a path that `create` could not use.

        Raises:
            RunError: there is something else than a run that failed before its first step.
        """
        if self.path.exists() and not self._failed_at_once():
            raise RunError(
                f"A run named {self.name} already exists in {self.path.parent}; continue it with"
                f" `resume {self.path}`, or choose another --name."
            )

    def _failed_at_once(self) -> bool:
        """Whether it is a run that ended in failure before its first step."""
        if not self.config_file.is_file():
            return False
        progress = self.progress()
        return self.status(progress) == "failed" and not progress.step and not self.checkpoint_steps()

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """An existing run.

        Raises:
            RunError: no run at `path`.
        """
        folder = cls(path)
        if not folder.config_file.is_file():
            raise RunError(f"{path} is not a run: it holds no config.toml.")
        return folder

    def config(self) -> RunConfig:
        """The frozen settings.

        Raises:
            ConfigError: the file was edited into something illegal.
        """
        config = RunConfig.from_dict(load_toml(self.config_file), say=False, absent=BEFORE)
        images = Path(config.dataset.path)
        if "projects" in images.parts and not os.path.exists(images):
            # A project's images, whose workspace may have been moved since.
            below = images.parts[-images.parts[::-1].index("projects") - 1 :]
            here = self.path.parent.parent.joinpath(*below)
            config = config.changed({"dataset.path": str(here)}) if here.is_dir() else config
        return config

    def config_or_none(self) -> RunConfig | None:
        """The frozen settings, or None where the file was edited into something illegal."""
        try:
            return self.config()
        except ConfigError:
            return None

    def retired_settings(self) -> list[str]:
        """A sentence for each setting of the file that an earlier version used and this one does not."""
        flat = flattened(load_toml(self.config_file), say=False)
        return [
            f"{sentence} The run continues as with {RETIRED[name][0]}."
            for name, value in flat.items()
            for sentence in retired([(name, value)])
        ]

    def request(self, action: str) -> str:
        """Ask the trainer for something; returns the request's id.

        Raises:
            RunError: `action` is not a request, or the folder cannot be written.
        """
        if action not in REQUESTS:
            raise RunError(f"{action!r} is not a request; choose one of {', '.join(REQUESTS)}.")
        line = {"id": uuid.uuid4().hex, "action": action}
        with wrap_os_errors(RunError, f"The request cannot be written to {self.requests_file}"):
            append_line(self.requests_file, json.dumps(line))
        return line["id"]

    def request_live(self, action: str) -> None:
        """Ask the live trainer for something.

        Raises:
            RunError: the run is not live, or as `request`.
        """
        if self.live_process() is None:
            raise RunError(
                f"The run {self.name} is not running (it is {self.status()}), so it cannot {action}."
            )
        self.request(action)

    def requests(self) -> list[dict[str, str]]:
        """All requests in order, as {"id", "action"}; those before the last `resume` are void."""
        try:
            text = self.requests_file.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        found: list[dict[str, str]] = []
        for line in text.split("\n")[:-1]:
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                request = parse_json(line)
                # Earlier versions wrote "do".
                action = request.get("action") or request["do"]
                if action == "resume":
                    found.clear()
                elif action in REQUESTS:
                    found.append({"id": str(request["id"]), "action": action})
        return found

    def hold(self) -> AbstractContextManager[None]:
        """Hold the run's lock and say who holds it; this process is the trainer while the context is open.

        Raises:
            RunError: another process is training this run, or the folder cannot be written.
        """
        busy = f"The run {self.name} is being trained by another process; stop or pause it first."
        return hold_lock(self.lock_file, self.process_file, busy)

    def live_process(self) -> psutil.Process | None:
        """The trainer, if it lives. Pids are reused, so the start time must agree too."""
        return live_process(self.process_file)

    def progress(self) -> Progress:
        """All events so far, folded."""
        progress = Progress()
        progress.update(read_events(self.events_file)[0])
        return progress

    def status(self, progress: Progress | None = None) -> str:
        """One of queued, preparing, running, paused, stopped, interrupted, done, failed."""
        progress = progress or self.progress()
        if self.live_process() is not None:
            return "running" if progress.stepping else "preparing"
        return progress.ending or ("interrupted" if progress.started else "queued")

    def write_held_out(self, held: Iterable[ImageRecord], trained: Iterable[ImageRecord] = ()) -> None:
        """Write down which of the images `held` out the run has not trained on, and which it has; of a
        checkpoint by an earlier version, which did not write these, what was held out then counts."""
        files, seen = ({record.digest for record in records} for records in (held, trained))
        before = read_json(self.held_out_file) if self.checkpoint_steps() else {}
        if isinstance(before.get("trained"), list):
            seen |= {*before["trained"]}
        elif isinstance(before.get("files"), list):
            files &= {*before["files"]}
        found = {"files": sorted(files - seen), "trained": sorted(seen)}
        write_atomically(self.held_out_file, json.dumps(found).encode())

    def held_out(self, records: list[ImageRecord], config: RunConfig) -> list[ImageRecord]:
        """Which of the images the run did not train on, whatever the dataset's list is today: as it would
        choose today where an earlier version trained it.

        Raises:
            DatasetError: an image cannot be read.
        """
        known = read_json(self.held_out_file).get("files")
        if not isinstance(known, list):
            return split_holdout(records, config.validation.pictures, config.seed)[1]
        return [record for record in records if record.digest in known]

    def analysis(self, step: int) -> Analysis | None:
        """What a report measured of a checkpoint; None where none did since it was written."""
        written = changed_at(self.checkpoint(step) / "adapter.safetensors")
        try:
            found = Analysis(**read_json(self.analysis_file))
        except (ValidationError, TypeError):
            return None
        return found if found.step == step and written <= changed_at(self.analysis_file) else None

    def checkpoint_steps(self) -> list[int]:
        """Steps of the complete checkpoints on disk, ascending."""
        found = ((path, path.name.removeprefix("step-")) for path in self.checkpoints.glob("step-*"))
        there = (step for path, step in found if (path / "adapter.safetensors").is_file())
        return sorted(int(step) for step in there if re.fullmatch(r"\d+", step))

    def step_of(self, which: str) -> int:
        """The step of a checkpoint: `best` (the last one where none was the best), `last`, or a step.

        Raises:
            RunError: no such checkpoint.
        """
        steps = self.checkpoint_steps()
        if not steps:
            raise RunError(f"The run {self.name} has no checkpoint yet; train it first.")
        best = self.progress().best_step
        if which in ("best", "last"):
            return best if which == "best" and best in steps else steps[-1]
        if which.isdecimal() and len(which) < 10 and int(which) in steps:
            return int(which)
        kept = ", ".join(map(str, steps))
        raise RunError(
            f"The run {self.name} has no checkpoint {which[:80]}; take best, last or one of {kept}."
        )

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint at `step`."""
        return self.checkpoints / f"step-{step:06d}"

    def summary(self) -> dict[str, Any]:
        """The row of `runs --json`."""
        progress = self.progress()
        row: dict[str, Any] = {"name": self.name, "path": str(self.path), "status": self.status(progress)}
        row |= {"step": progress.step, "steps": progress.steps, "loss": progress.smoothed_loss()}
        return row | {"best_step": progress.best_step, "reason": progress.reason}


def runs_folder(workspace: Path) -> Path:
    """Where a workspace keeps its runs."""
    return workspace / "runs"


def all_runs(workspace: Path) -> list[RunFolder]:
    """The runs of a workspace, newest first."""
    folder = runs_folder(workspace)
    if not folder.is_dir():
        return []
    paths = (path for path in folder.iterdir() if not path.name.startswith("."))
    found = [RunFolder(path) for path in paths if is_run_folder(path)]
    return sorted(found, key=lambda run: changed_at(run.config_file), reverse=True)


def is_run_folder(path: Path) -> bool:
    """Whether a run is kept at `path`; False too for a name that is too long for the file system."""
    try:
        return (path / "config.toml").is_file()
    except OSError:
        return False


def find_run(name: str | Path, place: str | Path | None = None) -> RunFolder:
    """The run that `name` means: a folder that holds a config.toml, else a run's name in a workspace.

    Args:
        name: a path or a name; where both exist, the path wins.
        place: the workspace; None for LORA_EASEL_HOME or the platform's folder.

    Raises:
        RunError: there is neither.
    """
    path = expand_home(name).absolute()
    if is_run_folder(path):
        return RunFolder(path.resolve())
    where = runs_folder(workspace(place))
    there = [run.name for run in all_runs(where.parent)]
    words = Path(name).parts
    if len(words) == 1 and words[0] in there:
        return RunFolder(where / words[0])
    near = difflib.get_close_matches(path.name, there, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "`lora-easel runs` lists those that exist."
    shown = in_short(path.name or str(path))[1:-1]
    raise RunError(
        f"{shown} is not a run: {path} holds no config.toml, and {where} no run of that name; {hint}"
    )


def check_run_name(name: str) -> str:
    """A run name that every file system takes.

    Raises:
        RunError: the name is empty or holds characters that a folder name cannot.
    """
    if not re.fullmatch(r"[\w][\w .()-]{0,99}", name) or name != name.strip(" .") or is_device(name):
        raise RunError(
            f"The name {name!r} cannot be a folder's; use letters, digits, space, dot, dash and underscore."
        )
    return name
