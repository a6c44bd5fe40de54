"""State of the window: one `AppState` per server, shared by all its pages, a `Snapshot` of it per look, and
the `Bindings` by which tabs follow it.

Two pages of the same window therefore show the same project, run and images. Other tools of this computer and
its file manager, which no run or project owns, are here too.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from app.dataset.findings import Checker, DatasetInsights
from app.dataset.gallery import Thumbnails
from app.dataset.uploads import Importer
from app.jobs import LIVE, Jobs, RunView, TensorBoard
from app.live import LiveStream
from app.preview.render_queue import PreviewState, RenderQueue
from app.templates import MOUNTED, _, render
from app.train.background import BYTES_A_NUMBER, Checks, Downloads, Prober
from app.train.form import Plan
from app.worker_client import CARDS, WorkerClient
from lora_core.errors import RunError
from lora_core.model_files.detect import lookup_base
from lora_core.projects.workspace import Projects, belongs_to, mark_project
from lora_core.runs.costs import parameters_of
from lora_core.runs.events import Progress
from lora_core.settings.schema import AUTO
from lora_core.system.files import clean_value
from lora_core.system.hardware import Hardware
from lora_core.system.other_tools import InstalledTool, RecentPaths, find_tools, list_base_files
from lora_core.system.processes import child_environment, detached

Shelf = tuple[InstalledTool, list[Path]]
"""A tool and the bases in its folders."""


class OtherTools:
    """Other tools on this computer, searched in the background so that no page waits."""

    def __init__(
        self, places: RecentPaths, search: Callable[[Iterable[Path]], list[InstalledTool]] = find_tools
    ) -> None:
        """Search with `search`, given the folders that the user added."""
        self._places = places
        self._search = search
        self._shelves: list[Shelf] = []
        self._looking = threading.Lock()

    def look(self, wait: bool = False) -> None:
        """Search again, in the background unless `wait`; one search at a time."""
        if not self._looking.acquire(blocking=wait):
            return
        thread = threading.Thread(target=self._look, daemon=True, name="other-tools")
        thread.start()
        if wait:
            thread.join()

    def _look(self) -> None:
        try:
            tools = self._search(map(Path, self._places.read("folders")))
            self._shelves = [(tool, list_base_files(tool)) for tool in tools]
        finally:
            self._looking.release()

    def shelves(self) -> list[Shelf]:
        """The tools found so far, each with its base models."""
        return self._shelves

    def lora_folders(self) -> list[tuple[str, Path]]:
        """LoRA folders of the tools as (tool, folder), each folder once."""
        found: dict[Path, tuple[str, Path]] = {}
        for tool, _bases in self._shelves:
            if tool.loras is not None:
                found.setdefault(tool.loras.resolve(), (tool.name, tool.loras))
        return list(found.values())


SHARED = "This window is open to other computers, so it starts no file manager; copy the path."
FILE_MANAGER_SECONDS = 5.0


class FileManager:
    """Shows files in the file manager of this computer.

    Only those that the window named to a page, and only if the page is on this computer too. No shell is
    involved. Where it cannot work, the path can be copied and the reason is given.
    """

    def __init__(self) -> None:
        self.shared = False
        """Whether the window listens to other computers."""
        self._named: set[str] = set()

    @property
    def problem(self) -> str:
        """Why no file can be shown, in a sentence; "" where one can."""
        return SHARED if self.shared else missing_file_manager(sys.platform, os.environ)

    def place(self, file: object, words: str) -> str:
        """A file's location, with buttons to show it and to copy the path."""
        self._named.add(str(file))
        return render("export/place.html", file=file, words=words, problem=self.problem)

    def show(self, name: str) -> None:
        """Open the folder of a file with the file selected, where the system can select one.

        Raises:
            RunError: the window has not named it, it is gone, or no file manager can be started.
        """
        file = Path(name)
        if name not in self._named:
            raise RunError(_("This file was not written by the window, so it is not shown."))
        if self.problem:
            raise RunError(self.problem)
        if not file.exists():
            raise RunError(_("{file} no longer exists.", file=file))
        threading.Thread(
            target=_start_first, args=(file_manager_commands(file, sys.platform),), daemon=True
        ).start()


def missing_file_manager(platform: str, environment: Mapping[str, str]) -> str:
    """Why no file manager can be started, in a sentence; "" where one can."""
    if platform in ("darwin", "win32"):
        return ""
    if not environment.get("DISPLAY") and not environment.get("WAYLAND_DISPLAY"):
        return _("No desktop session is running; copy the path.")
    if not shutil.which("dbus-send") and not shutil.which("xdg-open"):
        return _("No file manager was found (dbus-send or xdg-open); copy the path.")
    return ""


def file_manager_commands(file: Path, platform: str) -> list[list[str]]:
    """What to run until one succeeds."""
    if platform == "darwin":
        return [["open", "-R", str(file)]]
    if platform == "win32":
        # Explorer returns 1 even on success.
        return [["explorer", "/select,", str(file)]]
    # Percent-encoded: dbus-send splits at commas.
    ask = ["dbus-send", "--session", "--print-reply", "--dest=org.freedesktop.FileManager1"]
    ask += ["/org/freedesktop/FileManager1", "org.freedesktop.FileManager1.ShowItems"]
    ask += [f"array:string:{file.as_uri()}", "string:"]
    return [ask, ["xdg-open", str(file.parent)]]


def _start_first(tries: list[list[str]]) -> None:
    for command in tries:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                **detached(),
            )
            if process.wait(FILE_MANAGER_SECONDS) == 0:
                return
        except subprocess.TimeoutExpired:
            # Some file managers stay in the foreground.
            return
        except OSError:
            continue


class MemoryYieldPolicy:
    """When the worker gives its memory to a run: as soon as a run begins, later after a minute of idling."""

    def __init__(self, live_run: Callable[[], str], rest: float = 60.0) -> None:
        """`live_run` returns the name of the live run, "" if none."""
        self._live_run = live_run
        self._rest = rest
        self._known = ""

    def __call__(self, idle: float) -> bool:
        """Whether to free the memory after `idle` seconds."""
        before, self._known = self._known, self._live_run()
        return bool(self._known) and (self._known != before or idle >= self._rest)


BESIDE_BASE = 1_500_000_000
"""Bytes that an image takes beside its base: CUDA's context, the sampler and the decoder by tiles."""


class AppState:
    """The state behind the pages."""

    def __init__(self, workspace: Path, worker_command: list[str] | None = None) -> None:
        """Open a workspace; `worker_command` replaces the warm worker in tests."""
        self.workspace = workspace
        self.live = LiveStream()
        self.projects = Projects(workspace)
        # The same object for the window's lifetime; its project changes.
        self.project = self.projects.current
        self.importer = Importer(self.projects, workspace / "tmp" / "incoming")
        self.importer.switched = self.reset_project_view
        self.checker = Checker(self.project)
        self.thumbs = Thumbnails(workspace / "cache" / "thumbs")
        self.jobs = Jobs(workspace)
        self.jobs.created = lambda run: mark_project(run, self.project.path)
        self.jobs.own = lambda run_view: belongs_to(run_view.run, run_view.config, self.project.path)
        self.hardware = Hardware(lambda: self.worker.computes_on, self._device)
        self.queue = self.jobs.queue
        self.checks = Checks(workspace, self.free_on_card)
        self.on_quit: Callable[[], None] = lambda: None
        self.list_images: Callable[[], bytes] = bytes
        self.listing = threading.Lock()
        self.greet: Callable[[str], None] = lambda languages: None
        self.like_note = ""
        self.has_password = False
        self.places = RecentPaths(workspace / "places.json")
        self.tools = OtherTools(self.places)
        self.downloads = Downloads()
        self.files = FileManager()
        self.tensorboard = TensorBoard(workspace)
        command = worker_command or [sys.executable, "-m", "lora_core", "serve"]
        self.worker = WorkerClient(command, child_environment(workspace), workspace / "logs" / "worker.txt")
        self.worker.wanted_device = self._device
        self.worker.is_needed_elsewhere = MemoryYieldPolicy(self._live_run)
        self.worker.in_the_way = self._in_the_way
        self.render_queue = RenderQueue(self.worker, lambda: self.generated)
        self.prober = Prober(workspace, self.worker, self.hardware, self._occupied)
        self.insights = DatasetInsights(self.project, self.worker, self.jobs, self._occupied)

    def prepare(self) -> None:
        """Have the list of the images at hand when the first page asks for it."""
        # What is wrong, the page's own request says.
        with contextlib.suppress(Exception):
            self.list_images()

    @property
    def generated(self) -> Path:
        """Folder of the images generated in the open project."""
        return self.project.path / "generated"

    def _occupied(self) -> str:
        """Why nothing can be measured now, "" if it can."""
        run = self._live_run()
        if run:
            return _("The run {run} is still running; measure once it has ended.", run=run)
        return _("The queue is running.") if self.queue.runner() else ""

    def free_on_card(self) -> int | None:
        """Bytes of the card that a run finds free once worker and live run have ended; None for none."""
        card, live = self.hardware.card(), self.jobs.live()
        running = live.run.live_process() if live else None
        return card.free(self.worker.pid, running.pid if running else None) if card else None

    def _device(self) -> str:
        """`train.device` of the open project's draft."""
        values = self.project.draft().get("values")
        return str(values.get("train.device") or AUTO) if isinstance(values, dict) else AUTO

    def _in_the_way(self, request: dict[str, Any]) -> str:
        """Why a request that needs GPU memory has to wait for the run, "" if it need not: both would not fit,
        or the run has not allocated its memory yet."""
        live = self.jobs.live()
        if live is None:
            return ""
        card, config = self.hardware.card(), live.config()
        device = self.worker.computes_on or ("cuda" if card else "")
        if device not in CARDS or (
            config is not None
            and (config.train.device == "cpu" or self.hardware.card(config.train.device) is not card)
        ):
            return ""
        until = _("It is done when the run {name} has ended or is paused.", name=live.run.name)
        base = str(request.get("base", "")) if live.progress.stepping else ""
        numbers = parameters_of(lookup_base(base)) if base else None
        if card is None or numbers is None:
            return _("Waiting for the GPU. {until}", until=until)
        free, needed = card.total - card.used, numbers * BYTES_A_NUMBER + BESIDE_BASE
        if needed <= free:
            return ""
        return _(
            "It does not fit beside the run: about {:.1f} GB are needed on the GPU, {:.1f} GB are free. {}",
            *(needed / 1e9, free / 1e9, until),
        )

    def _live_run(self) -> str:
        live = self.jobs.live()
        return live.run.name if live else ""

    @property
    def identity(self) -> str:
        """A hash that identifies the workspace without revealing its path."""
        return hashlib.sha256(str(self.workspace.resolve()).encode()).hexdigest()[:16]

    def is_new(self) -> bool:
        """Whether this is a first visit: no images, no demo, no run."""
        project = self.project
        return not project.uses_demo and not project.dataset().records and not self.jobs.all()

    def reset_project_view(self) -> None:
        """Reset per-project view state after switching projects."""
        self.jobs.choose_anew()
        self.render_queue.clear()
        self.like_note = ""

    def close(self) -> None:
        """End what must end with the window; runs continue."""
        self.project.write_draft()
        self.worker.close()
        self.downloads.cancel()
        self.thumbs.close()
        self.tensorboard.close()


@dataclass(frozen=True)
class ShownRun:
    """A run as a part of the page shows it; without one `view` is None and the state "none"."""

    view: RunView | None = None
    state: str = "none"

    @property
    def name(self) -> str:
        """Its name, or ""."""
        return self.view.run.name if self.view else ""

    @property
    def progress(self) -> Progress:
        """Its progress; empty without a run."""
        return self.view.progress if self.view else Progress()

    @property
    def live(self) -> bool:
        """Whether it is running."""
        return self.state in LIVE

    @property
    def asks(self) -> bool:
        """Whether it ended to ask if it may continue with changed inputs."""
        return self.view is not None and self.state == "failed" and bool(self.view.changed)

    @property
    def percent(self) -> int:
        """Steps done in percent, also of those that a run went back from; none while it is prepared."""
        steps, done = self.progress.steps, max(self.progress.step, self.progress.furthest)
        return min(100, 100 * done // steps) if steps and self.state != "preparing" else 0


@dataclass(frozen=True)
class Snapshot:
    """State read once per look, from which all components are rendered.

    Attributes:
        shown: the run that the Train tab shows.
        second: the run that it is compared with.
        active: the run in the header: the live one, else the last that was.
        runs: all runs with their states, newest first.
        view: the Preview tab's.
        plan: the settings of the run to come.
    """

    app_state: AppState
    shown: ShownRun
    second: ShownRun
    active: ShownRun
    runs: list[tuple[RunView, str]]
    view: PreviewState
    plan: Plan

    @property
    def busy(self) -> bool:
        """Whether something changes by itself, so that it is looked at often."""
        app_state = self.app_state
        # Between two runs of a queue, none is live.
        working = app_state.prober.active or bool(app_state.queue.runner()) or app_state.downloads.active
        return self.active.live or self.view.working or working


def take_snapshot(app_state: AppState) -> Snapshot:
    """Read the state once."""
    runs = [(run_view, app_state.jobs.state(run_view)) for run_view in app_state.jobs.all()]
    states = {run_view.run.path: state for run_view, state in runs}

    def with_state(run_view: RunView | None) -> ShownRun:
        return ShownRun(run_view, states.get(run_view.run.path, "none")) if run_view else ShownRun()

    shown, active = app_state.jobs.watched(next((w for w, state in runs if state in LIVE), None))
    second, view, plan = app_state.jobs.second(), app_state.render_queue.view(), Plan(app_state.project)
    return Snapshot(app_state, with_state(shown), with_state(second), with_state(active), runs, view, plan)


@dataclass
class Bindings:
    """What the tabs register with the page: cards and fields that follow the snapshot, fields filled at load.

    Each declares a function of the snapshot. The live stream sends the HTML of cards; Gradio's own fields are
    updated by an event that the page triggers when the stream tells that they changed.

    Attributes:
        parts: by the name of a card, the function of the snapshot that gives its HTML.
        updates: Gradio's fields, each with the function of the snapshot that gives its update.
        initial: components, each with what gives its value when the page opens.
    """

    app_state: AppState
    parts: dict[str, Callable[[Snapshot], str]] = field(default_factory=dict)
    updates: list[tuple[Any, Callable[[Snapshot], Any]]] = field(default_factory=list)
    initial: list[tuple[Any, Callable[[], Any]]] = field(default_factory=list)
    trigger: Any = None
    use_demo: Any = None

    def follow(self, component: Any, shows: Callable[[Snapshot], Any]) -> Any:
        """Show `shows(snapshot)` in `component`: HTML in a block of HTML, an update of another component."""
        if isinstance(component, gr.HTML):
            name = component.elem_id or f"part-{len(self.parts)}"
            component.js_on_load = MOUNTED.format(name=name)
            self.parts[name] = shows
        else:
            self.updates.append((component, shows))
        return component

    def fill_on_load(self, component: Any, value: Callable[[], Any]) -> Any:
        """Fill `component` when the page opens."""
        self.initial.append((component, value))
        return component

    def initial_values(self) -> list[Any]:
        """The values of all fields filled at load, in order."""
        return [clean_value(value()) for _, value in self.initial]
