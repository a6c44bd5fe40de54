"""Starting runs and watching them. The run folder is the only channel: the window may die at any time and
lose nothing."""

import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from app.worker import detached, last_line
from lora_core.spec.config import RunConfig
from lora_core.spec.errors import ConfigError, RunError
from lora_core.spec.events import read_events
from lora_core.spec.paths import ASSETS
from lora_core.spec.progress import Progress
from lora_core.spec.run_folder import RunFolder, all_runs, checked_name, runs_folder

LIVE = ("preparing", "running", "pausing", "stopping")
TRAINER = (sys.executable, "-m", "lora_core", "resume")
RESUMABLE = ("queued", "paused", "stopped", "interrupted", "failed")


@dataclass
class Watch:
    """What the window knows of one run, read on from where it stopped reading."""

    run: RunFolder
    progress: Progress = field(default_factory=Progress)
    offset: int = 0
    started_here: subprocess.Popen[bytes] | None = None
    _config: RunConfig | None = None

    def config(self) -> RunConfig | None:
        """The run's settings, read once as they never change; None where somebody broke the file."""
        if self._config is None:
            try:
                self._config = self.run.config()
            except ConfigError:
                return None
        return self._config

    def state(self) -> str:
        """Status as in `runs --json`, plus pausing and stopping; reads new events first."""
        new, self.offset = read_events(self.run.events_file, self.offset)
        self.progress.update(new)
        status = self.run.status(self.progress)
        child = self.started_here
        if child is not None:
            if child.poll() is None:
                # The process lives but has not claimed its folder yet: to a person it is preparing.
                status = status if status in LIVE else "preparing"
            elif child.returncode and status in ("queued", "interrupted"):
                status = "failed"
        if status in LIVE:
            asked = {r["do"] for r in self.run.requests() if r["id"] not in self.progress.handled}
            status = "stopping" if "stop" in asked else "pausing" if "pause" in asked else status
        return status

    def reason(self) -> str:
        """Why a run failed, in a sentence."""
        if self.progress.reason:
            return self.progress.reason
        said = last_line(self.run.log_file)
        return f"The training process ended before it could say why. Its last words: {said}" if said else ""


class Jobs:
    """The runs of a workspace."""

    def __init__(self, workspace: Path, trainer: tuple[str, ...] = TRAINER) -> None:
        """Watch the runs folder of `workspace`; `trainer` is the command that a run's path is appended to."""
        self.trainer = trainer
        self.workspace = workspace
        self._watches: dict[Path, Watch] = {}
        self._lock = threading.RLock()
        self._chosen: Path | None = None

    def watch(self, run: RunFolder) -> Watch:
        """The one watch of a run."""
        with self._lock:
            return self._watches.setdefault(run.path, Watch(run))

    def all(self) -> list[Watch]:
        """Every run, newest first."""
        return [self.watch(run) for run in all_runs(self.workspace)]

    def state(self, watch: Watch) -> str:
        """The state of a run; one reader at a time, as a watch remembers how far it read."""
        with self._lock:
            return watch.state()

    def live(self) -> Watch | None:
        """The run that is going on, if one is."""
        return next((watch for watch in self.all() if self.state(watch) in LIVE), None)

    def current(self) -> Watch | None:
        """The run that the window shows: the live one, else the one chosen, else the newest."""
        live = self.live()
        if live is not None:
            return live
        watches = self.all()
        return next((w for w in watches if w.run.path == self._chosen), watches[0] if watches else None)

    def show(self, name: str) -> None:
        """Choose which run the window shows while none is going on."""
        self._chosen = runs_folder(self.workspace) / checked_name(name)

    def start(self, config: RunConfig) -> RunFolder:
        """Make a run folder from `config` and start its trainer.

        Raises:
            RunError: the name is taken or no folder's, or another run is going on.
        """
        self._refuse_beside_another()
        name = checked_name(config.name) if config.name else self.free_name(config)
        run = RunFolder.create(runs_folder(self.workspace) / name, config.changed({"name": name}))
        with self._lock:
            # The name may have been that of a run that failed at once, whose events are gone now.
            self._watches.pop(run.path, None)
        self._launch(run)
        return run

    def resume(self, name: str) -> RunFolder:
        """Go on with a run that was paused, stopped or broken off.

        Raises:
            RunError: it does not exist, or a run is going on.
        """
        self._refuse_beside_another()
        run = RunFolder.open(runs_folder(self.workspace) / checked_name(name))
        self._launch(run)
        return run

    def request(self, do: str) -> None:
        """Ask the live run for something.

        Raises:
            RunError: none is going on.
        """
        live = self.live()
        if live is None:
            raise RunError("No run is going on.")
        live.run.request(do)

    def _refuse_beside_another(self) -> None:
        live = self.live()
        if live is not None:
            raise RunError(f"The run {live.run.name} is going on; pause or stop it first.")

    def _launch(self, run: RunFolder) -> None:
        with self._lock, open(run.log_file, "ab") as log:
            watch = self.watch(run)
            watch.started_here = subprocess.Popen(
                [*self.trainer, str(run.path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(self.workspace),
                **detached(),
            )
            self._chosen = run.path

    def free_name(self, config: RunConfig) -> str:
        """Date and dataset, with a number where the day has several."""
        source = Path(config.dataset.path)
        words = source.parent.name if source.name == "pictures" else source.stem
        words = "pictures" if words == "default" else words
        stem = f"{time.strftime('%Y-%m-%d')}-{re.sub(r'[^A-Za-z0-9_-]+', '-', words) or 'run'}"
        taken = {run.name for run in all_runs(self.workspace)}
        number = next(n for n in range(1, 10_000) if (stem if n == 1 else f"{stem}-{n}") not in taken)
        return stem if number == 1 else f"{stem}-{number}"


def environment(workspace: Path) -> dict[str, str]:
    """The environment of a child that must find the project from any folder, and say its words unbuffered."""
    root = str(ASSETS.parent)
    path = os.environ.get("PYTHONPATH", "")
    return {
        **os.environ,
        "PYTHONPATH": f"{root}{os.pathsep}{path}" if path else root,
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
        "LORA_EASEL_HOME": str(workspace),
    }
