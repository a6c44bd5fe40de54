"""Starts runs and follows them, alone and from the queue.

The run folder is the only channel: a window that is killed loses nothing.
"""

import contextlib
import dataclasses
import re
import shutil
import subprocess
import sys
import threading
import time
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from app.templates import _
from lora_core.errors import OutOfMemory, RunError
from lora_core.projects.project import read_title
from lora_core.projects.workspace import move_to_trash
from lora_core.runs.diagnosis import ExitRecorder, find_crash, resume_step
from lora_core.runs.events import Progress, read_events
from lora_core.runs.folder import RunFolder, all_runs, check_run_name, is_run_folder, runs_folder
from lora_core.runs.queue import PAUSED, RUNNING, WAITING, Queue, ensure_runner
from lora_core.settings.config import RunConfig
from lora_core.settings.schema import require_package
from lora_core.system.files import changed_at, fold_name, folder_bytes, safe_name, unused_stem
from lora_core.system.processes import ACCEPTING, TRAINER, last_log_line, start_detached

LIVE = ("preparing", "running", "pausing", "stopping")
LOOK_SECONDS = 2.0
LOWER_RATE = 0.1


def lower_rate(config: RunConfig) -> float:
    """The learning rate after one at which training diverged: a tenth, or the usual one where that is still
    above the range of the optimizer."""
    rate, row = config.optimizer.lr * LOWER_RATE, config.optimizer.row
    scale = 1.0 if row.one_rate else config.adapter.scale
    return rate if rate * scale <= row.rates[1] else row.lr


@dataclass(frozen=True)
class ResumeInfo:
    """What an ended run left.

    Attributes:
        reason, cause: why it broke off or failed, as `find_crash` says it.
        step: where a resume would continue, 0 for the start.
        size: bytes on disk.
    """

    reason: str
    cause: str
    step: int
    size: int


@dataclass
class RunView:
    """What the window knows of one run; events are read on from `offset`."""

    run: RunFolder
    progress: Progress = field(default_factory=Progress)
    offset: int = 0
    child: subprocess.Popen[bytes] | None = None
    recorder: threading.Thread | None = None
    _config: RunConfig | None = None
    _resume_info: tuple[object, ResumeInfo] | None = None

    def config(self) -> RunConfig | None:
        """The run's settings, read once as they never change; None where the file was broken."""
        if self._config is None:
            self._config = self.run.config_or_none()
        return self._config

    def state(self) -> str:
        """Status as in `runs --json`, plus pausing and stopping; reads new events first."""
        new, self.offset = read_events(self.run.events_file, self.offset)
        self.progress.update(new)
        status = self.run.status(self.progress)
        if self.child is not None:
            has_no_end = status in ("queued", "interrupted")
            if self.child.poll() is None:
                # The process has not claimed its folder yet, or has left it and is about to end.
                early = "running" if self.progress.stepping else "preparing"
                status = status if status in LIVE else early
            elif has_no_end and self.recorder and self.recorder.is_alive():
                # How it ended is being written down; until then the reason would be wrong.
                status = "preparing" if status == "queued" else "running"
            elif has_no_end and self.child.returncode > 0:
                # It printed why and ended; a signal's end counts as interrupted.
                status = "failed"
        if status in LIVE:
            # A stop is under way from its request to the end of the process.
            done = self.progress.handled - self.progress.answered
            asked = {r["action"] for r in self.run.requests() if r["id"] not in done}
            status = "stopping" if "stop" in asked else "pausing" if "pause" in asked else status
        return status

    def reason(self) -> str:
        """Why a run failed or broke off, in a sentence."""
        reason = self.progress.reason or self.resume_info().reason
        if reason:
            return reason
        last = last_log_line(self.run.log_file)
        return (
            _("The training process ended before it could say why. Its last words: {}", last) if last else ""
        )

    def resume_info(self) -> ResumeInfo:
        """The results of an ended run; read again only if it was resumed."""
        key = (self.offset, changed_at(self.run.path / "exit.json"), changed_at(self.run.checkpoints))
        if self._resume_info is None or self._resume_info[0] != key:
            crash, step = find_crash(self.run), resume_step(self.run)
            info = ResumeInfo(crash.reason, crash.cause, step, folder_bytes(self.run.path))
            self._resume_info = (key, info)
        return self._resume_info[1]

    @property
    def changed(self) -> list[str]:
        """What differs from the run's start, where it ended to ask about that."""
        return self.progress.changed if self.progress.ending == "failed" else []

    @property
    def made(self) -> str:
        """The day on which it was made, such as 29 Nov 2026."""
        seconds = changed_at(self.run.config_file) / 1e9
        return time.strftime(_("%d %b %Y"), time.localtime(seconds)).lstrip("0") if seconds else ""

    @property
    def out_of_memory(self) -> bool:
        """Whether it ended because memory ran out."""
        return OutOfMemory.cause in (self.progress.cause, self.resume_info().cause)


class Jobs:
    """The runs of a workspace."""

    def __init__(self, workspace: Path, trainer: tuple[str, ...] = TRAINER) -> None:
        """Watch the runs folder of `workspace`; `trainer` is the command that a run's path is appended to."""
        self.trainer = trainer
        self.workspace = workspace
        self.queue = Queue(workspace)
        self._views: dict[Path, RunView] = {}
        self._lock = threading.RLock()
        self._chosen: Path | None = None
        self._second: Path | None = None
        self._last_live: Path | None = None
        # Called with each run that is made here; the window notes its project.
        self.created: Callable[[RunFolder], None] = lambda run: None
        # Whether a run is one of the open project, as the window knows.
        self.own: Callable[[RunView], bool] = lambda run_view: True
        # A queue that ran when the machine went down; one that cannot be read says so where it is shown.
        with contextlib.suppress(RunError, OSError):
            if self.queue.is_enabled():
                ensure_runner(workspace)

    def run_view(self, run: RunFolder) -> RunView:
        """The one watch of a run."""
        with self._lock:
            return self._views.setdefault(run.path, RunView(run))

    def all(self) -> list[RunView]:
        """Every run, newest first."""
        return [self.run_view(run) for run in all_runs(self.workspace)]

    def state(self, run_view: RunView) -> str:
        """The state of a run; one reader at a time, as a watch remembers how far it read."""
        with self._lock:
            return run_view.state()

    def live(self) -> RunView | None:
        """The active run, if any."""
        return next((run_view for run_view in self.all() if self.state(run_view) in LIVE), None)

    def current(self) -> RunView | None:
        """The run that the Train tab shows."""
        return self.watched(self.live())[0]

    def watched(self, live: RunView | None) -> tuple[RunView | None, RunView | None]:
        """The runs that the Train tab shows (the one chosen, else the live one, else the newest) and
        that the header shows (the live one, else the last that was, until another is chosen)."""
        if live is not None:
            with self._lock:
                # Who watched the last run of a queue watches the next one too.
                if self._chosen in (None, self._last_live):
                    self._chosen = live.run.path
                self._last_live = live.run.path
        # Runs that only wait have no events and come last.
        own = sorted(filter(self.own, self.all()), key=lambda view: -changed_at(view.run.events_file))
        newest = next(iter(own), None)
        shown = self._find(self._chosen) if self._chosen else newest
        return shown, live or self._find(self._last_live) or shown or newest

    def missing(self) -> str:
        """The name of the run that was chosen, where there is none: deleted, or never made."""
        return self._chosen.name if self._chosen and not is_run_folder(self._chosen) else ""

    def _find(self, path: Path | None) -> RunView | None:
        return self.run_view(RunFolder(path)) if path and is_run_folder(path) else None

    def choose_anew(self) -> None:
        """Forget which runs were chosen, as when another project is opened."""
        with self._lock:
            self._chosen = self._second = self._last_live = None

    def show(self, names: str) -> None:
        """Choose which run the window shows: "A", or "A+B" beside another one."""
        first, *others = (runs_folder(self.workspace) / check_run_name(name) for name in names.split("+", 1))
        with self._lock:
            self._chosen, self._second, self._last_live = first, next(iter(others), None), None

    def second(self) -> RunView | None:
        """The run that the one shown is compared with."""
        both = self._find(self._chosen) and self._second != self._chosen
        return self._find(self._second) if both else None

    def create(self, config: RunConfig) -> RunFolder:
        """Make a run folder from `config`, to be started now or later.

        Raises:
            RunError: the name is taken or no folder's.
        """
        name = check_run_name(config.name) if config.name else self.free_name(config)
        run = RunFolder.create(runs_folder(self.workspace) / name, config.changed({"name": name}))
        with self._lock:
            # The name may have been that of a run that failed at once, whose events are gone now.
            self._views.pop(run.path, None)
        try:
            self.created(run)
        except OSError as error:
            shutil.rmtree(run.path, ignore_errors=True)
            raise RunError(
                _("The run folder {} cannot be made: {}.", run.path, error.strerror or error)
            ) from error
        return run

    def start(self, config: RunConfig) -> RunFolder:
        """Make a run folder from `config` and start its trainer.

        Raises:
            RunError: the name is taken or no folder's, or another run is active.
        """
        with self._lock:
            self._refuse_beside_another()
            run = self.create(config)
            self._launch(run)
        return run

    def delete(self, name: str) -> dict[str, str]:
        """Move a run into the workspace's trash, and take it out of the queue; returns its `place` there.

        Raises:
            RunError: there is none of that name, or it is running.
        """
        run = RunFolder(runs_folder(self.workspace) / check_run_name(name))
        if run.live_process() is not None:
            raise RunError(_("The run {name} is still running; stop it before it is deleted.", name=name))
        place = move_to_trash(run.path, self.workspace).parent.name
        with self._lock:
            self._views.pop(run.path, None)
            if self._chosen == run.path:
                self._chosen = self._second = None
        return {"place": place}

    def resume(self, name: str, accept_changes: bool = False) -> RunFolder:
        """Resume a run that was paused, stopped or interrupted.

        Args:
            name: the run's.
            accept_changes: also where images, settings, base or packages have changed since its start.

        Raises:
            RunError: it does not exist, or a run is active.
        """
        with self._lock:
            self._refuse_beside_another()
            run = RunFolder.open(runs_folder(self.workspace) / check_run_name(name))
            self._launch(run, *([ACCEPTING] if accept_changes else []))
        return run

    def retry(self, name: str) -> RunFolder:
        """Start a new run with the settings of another one and a lower learning rate.

        Raises:
            LoraError: there is no such run, its settings cannot be read, or a run is active.
        """
        config = RunFolder.open(runs_folder(self.workspace) / check_run_name(name)).config()
        return self.start(config.changed({"name": "", "optimizer.lr": lower_rate(config)}))

    def request(self, do: str) -> None:
        """Ask the live run for something.

        Raises:
            RunError: none is running.
        """
        live = self.live()
        if live is None:
            raise RunError(_("No run is active."))
        live.run.request(do)

    def add_to_queue(self, *configs: RunConfig) -> list[RunFolder]:
        """Make runs and put them at the end of the queue, all or none. While a run is active the queue is
        started behind it.

        Raises:
            RunError: the name is taken, or the queue cannot be written.
        """
        made = self.queue.add_new(configs, self.create)
        if self.live() is not None:
            self.start_queue()
        return made

    def start_queue(self) -> None:
        """Start the queue, which continues when the window is closed.

        Raises:
            RunError: it cannot be read.
        """
        with self._lock:
            for job in self.queue.stored_jobs():
                if job.state == PAUSED:
                    self.queue.update(dataclasses.replace(job, state=WAITING, reason=""))
            ensure_runner(self.workspace)

    def move_in_queue(self, name: str, by: int) -> None:
        """Move a waiting run up or down.

        Raises:
            RunError: it does not wait, or is at that end already.
        """
        waiting = [job.run for job in self.queue.stored_jobs() if job.state == WAITING]
        if name not in waiting:
            raise RunError(_("The run {name} is no longer in the queue.", name=name))
        self.queue.move(name, waiting.index(name) + 1 + by)

    def take_from_queue(self, name: str) -> None:
        """Take a run out of the queue; one that never began goes to the trash with its place.

        Raises:
            RunError: it is not in the queue, or is running.
        """
        run = self.queue.run(check_run_name(name))
        self.queue.remove(name)
        if run.path.is_dir() and not run.events_file.exists():
            self.delete(name)

    def is_queued(self, name: str) -> bool:
        """Whether a run waits in the queue or is trained from there."""
        try:
            return any(job.run == name and job.state in (WAITING, RUNNING) for job in self.queue.jobs())
        except RunError:
            return False

    def _refuse_beside_another(self) -> None:
        live = self.live()
        if live is not None:
            raise RunError(_("The run {name} is still running; pause or stop it first.", name=live.run.name))

    def _launch(self, run: RunFolder, *options: str) -> None:
        with self._lock:
            view = self.run_view(run)
            view.state()
            view.progress.expect_start()
            exit_recorder = ExitRecorder(run)
            command = [*self.trainer, str(run.path), *options]
            view.child = start_detached(command, run.log_file, self.workspace)
            self._chosen, self._second = run.path, None
            view.recorder = threading.Thread(
                target=_record_exit, args=(view.child, exit_recorder), daemon=True
            )
            view.recorder.start()

    def free_name(self, config: RunConfig) -> str:
        """The words of the project's title or of the dataset's name, with a number where they are taken."""
        source = Path(config.dataset.path)
        title = read_title(source.parent) if source.name == "pictures" else source.stem
        words = "-".join(re.findall(r"\w+", title.lower()))[:60]
        taken = {fold_name(run.name) for run in all_runs(self.workspace)}
        return unused_stem(safe_name(words or "run").name, taken)


def _record_exit(child: "subprocess.Popen[bytes]", recorder: ExitRecorder) -> None:
    """Note how a trainer ends, which one that is killed cannot do itself."""
    code = None
    while code is None:
        recorder.sample_memory(child.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = child.wait(LOOK_SECONDS)
    recorder.record(code)


TENSORBOARD_SECONDS = 60.0
"""From its start to its address."""
SERVE_TENSORBOARD = """import os, threading

def end_with_the_window():
    os.read(0, 1)
    os._exit(0)

threading.Thread(target=end_with_the_window, daemon=True).start()
from tensorboard.main import run_main
run_main()"""
"""The window holds the other end of its input, which closes even where the window is killed."""


class TensorBoard:
    """TensorBoard on the runs of a workspace: a process for this computer only that ends with the window."""

    def __init__(self, workspace: Path) -> None:
        self._workspace = workspace
        self._process: subprocess.Popen[bytes] | None = None
        self._address = ""
        self._lock = threading.Lock()

    def open(self) -> str:
        """Open it in the browser, started if it does not run; returns its address.

        Raises:
            ConfigError: it is not installed.
            RunError: it ended before it had an address, or had none in time.
        """
        require_package("TensorBoard", "tensorboard", "tensorboard")
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
        # On some platforms this blocks until the browser is up.
        threading.Thread(target=webbrowser.open, args=(self._address,), daemon=True).start()
        return self._address

    def close(self) -> None:
        """End it."""
        if self._process is not None:
            with self._process as process:
                process.terminate()

    def _start(self) -> None:
        # The pipe to one that has ended is still open.
        self.close()
        log = self._workspace / "logs" / "tensorboard.txt"
        log.unlink(missing_ok=True)
        runs = str(runs_folder(self._workspace))
        words = ["-c", SERVE_TENSORBOARD, "--logdir", runs, "--host", "127.0.0.1", "--port", "0"]
        self._process = start_detached([sys.executable, *words], log, self._workspace, subprocess.PIPE)
        end = time.monotonic() + TENSORBOARD_SECONDS
        while not (found := re.search(r" at (http://\S+/)\s", log.read_text("utf-8", "replace"))):
            ended = self._process.poll() is not None
            if ended or time.monotonic() > end:
                self.close()
                late = f"no address within {TENSORBOARD_SECONDS:.0f} s ({log})"
                reason = last_log_line(log) if ended else late
                raise RunError(_("TensorBoard did not start: {reason}", reason=reason))
            time.sleep(0.1)
        self._address = found[1]
