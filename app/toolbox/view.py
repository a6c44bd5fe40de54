"""The Toolbox tab: its tools for LoRA files, the worker request that each makes of a page's choices, its
routes, and the results.

`templates/result.html` draws them, with the figures of `lora_core/report/plots.py`.
"""

import functools
import json
import logging
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, Response

from app.live import LiveStream
from app.preview.request_form import ADDED, find_owner, lora_groups
from app.routes import FRESH, Answer, add_actions, below, receive_file
from app.state import AppState, Bindings, take_snapshot
from app.templates import _, html_block, pluralize, problem_html, render
from app.train.train_form import base_choices
from app.worker_client import Reply, WorkerClient
from lora_core.errors import AdapterFileError, ConfigError, LoraError, ModelFileError, RunError
from lora_core.model_files.detect import base_path
from lora_core.model_files.families import FAMILIES
from lora_core.projects.project import Project
from lora_core.report.plots import Bar, bars_plot, figure
from lora_core.runs.folder import check_run_name, runs_folder
from lora_core.settings.schema import FORMATS
from lora_core.system.files import (
    MARGIN,
    expand_home,
    folder_bytes,
    format_bytes,
    free_bytes,
    unused_path,
)

MOST_FILES = 12
LONGEST_TABLE = 4000
BASES = "bases"
"""The folder of a project with bases that were made in it."""
CHECKPOINT = "adapter.safetensors"


@dataclass(frozen=True)
class LoraTool:
    """One thing to do with LoRA files.

    Attributes:
        title: on its button.
        line: its result.
        files: how few and how many it takes.
        needs: which fields it has: "base", "tuned", "measure", "apart", "size", "rank", "strengths",
            "blocks", "format", "alphas"; those with a ? may be left empty.
        go: on the button that starts it.
        makes: "adapter" or "base" where it makes a file.
        do: what the worker is asked for, where that is not the tool's own key.
    """

    title: str
    line: str
    files: tuple[int, int] = (1, 1)
    needs: tuple[str, ...] = ()
    go: str = "Analyze"
    makes: str = ""
    do: str = ""


TOOLS: dict[str, LoraTool] = {
    "check": LoraTool(
        "Inspect", "Type, trigger words, and which apps load it.", go="Inspect", do="verify"
    ),
    "spectrum": LoraTool("Spectrum", "The effective rank of each layer."),
    "amplify": LoraTool("Amplification", "Which blocks it changes most.", needs=("base",)),
    "intrinsic": LoraTool(
        "Intrinsic rank", "Finds the lowest rank that keeps 99% of the improvement.", (1, 1), ("measure",),
        "Measure",
    ),
    "strength": LoraTool(
        "Best strength", "Finds the best strength.", (1, 1), ("measure", "apart"), "Measure"
    ),
    "compare": LoraTool("Similarity", "How alike two LoRAs are.", (2, 2)),
    "stack": LoraTool(
        "Stacking", "How LoRAs interfere when combined.", (2, MOST_FILES),
        ("strengths", "measure?"),
    ),
    "merge": LoraTool(
        "Merge", "Combine LoRAs into one file.", (1, MOST_FILES),
        ("strengths", "rank?", "blocks?", "base?"), "Merge", "adapter",
    ),
    "into-base": LoraTool(
        "Merge into a base", "Write a copy of a base with LoRAs merged in.", (1, MOST_FILES),
        ("strengths", "base", "blocks?"), "Merge", "base",
    ),
    "plain": LoraTool(
        "Plain LoRA", "Turn a LoHa, LoKr, OFT or DoRA into a plain LoRA.", (1, 1),
        ("rank", "base?"), "Convert", "adapter", "merge",
    ),
    "convert": LoraTool(
        "Convert", "Write the same LoRA in another format.", (1, 1), ("format", "alphas"), "Convert",
        "adapter",
    ),
    "shrink": LoraTool(
        "Shrink", "Smaller file, same result.", (1, 1), ("size",), "Shrink", "adapter"
    ),
    "extract": LoraTool(
        "Extract", "Get a LoRA from a fine-tuned model.", (0, 0), ("tuned", "base", "size"), "Extract",
        "adapter",
    ),
}  # fmt: skip
VERBS = {
    "Inspect": ("What a LoRA is, and what it does.", "check spectrum amplify strength"),
    "Compare": ("How LoRAs differ, and how they combine.", "compare stack"),
    "Shrink": (TOOLS["shrink"].line, "shrink intrinsic"),
    "Merge": ("Combine LoRAs, or write another format.", "merge into-base plain convert"),
    "Extract": (TOOLS["extract"].line, "extract"),
}
"""What the tab offers: what each is for, and its tools."""


OTHER, FOLDER = ":other", ":folder"
"""Choices of the form's lists: a path that is typed, a folder of images."""


def draw_form(app_state: AppState, sent: dict[str, Any]) -> dict[str, Any]:
    """The parts of the form of a tool: files and fields as a page has filled them, what it will do, and why
    it cannot start.

    Raises:
        ConfigError: the tool is unknown.
    """
    snapshot, tool = take_snapshot(app_state), _tool(str(sent.get("tool")))
    dropped = [(file.stem, str(file)) for file in (app_state.workspace / DROPPED).glob("*/*")]
    groups = [*lora_groups(snapshot), *([(_("Dropped"), dropped)] if dropped else [])]
    titles = {path: title for _heading, found in groups for title, path in found}
    known = list(titles)
    rows = filter(lambda row: isinstance(row, dict), sent.get("files") or [])
    files = [{"file": "", "strength": 1, **row} for row in rows]
    files = files or [{"file": known[0] if known else "", "strength": 1}]
    owner = find_owner(snapshot, str(files[0]["file"]))
    run = owner.run.name if owner else ""
    bases_of_runs = {
        run_view.run.name: config.model.base
        for run_view, _ in snapshot.runs
        if (config := run_view.config()) is not None and config.validation.pictures > 0
    }
    bases = [(name, title) for title, name in base_choices(app_state)]
    base = bases_of_runs.get(run) if bases_of_runs.get(run) in dict(bases) else bases[0][0]
    values: dict[str, Any] = {
        "by": "rank", "rank": "8", "format": "", "measure": "" if "measure?" in tool.needs else run,
        "base": "" if "base?" in tool.needs else base,
        **{name: str(sent[name]) for name in ("by", "rank", "format", "measure", "base") if name in sent},
        "tool": tool, "groups": groups, "titles": titles, "known": known, "files": files, "bases": bases,
        "measured": [(name, _("what {run} held out", run=name)) for name in bases_of_runs],
        "formats": [(key, row.title) for key, row in FORMATS.items()], "OTHER": OTHER, "FOLDER": FOLDER,
        "count_problem": count_problem,
    }  # fmt: skip
    parts = ("files", "fields", "will", "why")
    return {"parts": {f"toolbox-{part}": render("toolbox/form.html", part=part, **values) for part in parts}}


def _tool(name: str) -> LoraTool:
    if name not in TOOLS:
        raise ConfigError(f"{name!r} is not one of the tools for LoRA files.")
    return TOOLS[name]


def build_worker_request(app_state: AppState, tool: str, sent: dict[str, Any]) -> dict[str, Any]:
    """Build the worker's request from a page's choices.

    Args:
        app_state: the window.
        tool: of `TOOLS`.
        sent: a page's choices: `files` ({file, strength}), `base`, `tuned`, `measure`, `rank`, `energy`,
            `apart`.

    Raises:
        LoraError: something is missing, in a sentence.
    """
    wanted, files = _tool(tool), _files(sent.get("files"))
    if problem := count_problem(wanted, len(files)):
        raise AdapterFileError(problem)
    request, high = dict[str, Any](do=wanted.do or tool), wanted.files[1]
    if request["do"] == "merge":
        request["files"] = files
    elif high == 1:
        request["file"] = files[0]["file"]
    elif high:
        request["files"] = files
    makers: dict[str, Callable[[], dict[str, Any]]] = {
        "base": lambda: {"base": _text(sent, "base", "Choose the base that it was made for.")},
        "tuned": lambda: {"tuned": _text(sent, "tuned", "Give the path of the fine-tuned model.")},
        "measure": lambda: {"measure": _measure(app_state, sent.get("measure"))},
        "apart": lambda: {"apart": bool(sent.get("apart"))},
        "size": lambda: _size(sent),
        "rank": lambda: {"rank": _rank(sent.get("rank") or "")},
        "blocks": lambda: {"blocks": _blocks(sent)},
        "format": lambda: {"format": _format(sent)},
        "alphas": lambda: {"keep_alphas": bool(sent.get("alphas"))},
    }
    for need in wanted.needs:
        field = need.rstrip("?")
        if field in makers and (field == need or str(sent.get(field) or "").strip()):
            request |= makers[field]()
    if wanted.makes == "base":
        request["out"] = str(_base_place(app_state, request["base"], files[0]["file"]))
    elif wanted.makes:
        source = str(sent["tuned"]) if tool == "extract" else files[0]["file"]
        request["out"] = str(free_path(app_state, source, _suffix(tool, request)))
    return request


def count_problem(tool: LoraTool, count: int) -> str:
    """Why a tool does not take so many files."""
    low, high = tool.files
    if count > high:
        return _("At most {count} files: remove the others.", count=high)
    missing = (
        _("Two files or more are needed: add another.")
        if low < high
        else _("Two files are needed: add another.")
    )
    return "" if count >= low else missing if low > 1 else _("Choose a file first.")


def _files(rows: Any) -> list[dict[str, Any]]:
    found = []
    for row in rows if isinstance(rows, list) else []:
        name = str(row.get("file") or "").strip().strip('"') if isinstance(row, dict) else ""
        if name:
            path = expand_home(name)
            if not path.is_file():
                raise AdapterFileError(_("There is no file at {path}; choose another.", path=path))
            found.append({"file": str(path), "strength": _number(row.get("strength", 1.0), _("A strength"))})
    return found


def _number(value: Any, title: str) -> float:
    try:
        number = float(str(value).replace(",", "."))
    except ValueError as error:
        raise ConfigError(_("{} should be a number, not {!r}.", title, str(value)[:40])) from error
    if not abs(number) < 1e6:
        raise ConfigError(_("{title} should be a number, not {value!r}.", title=title, value=str(value)[:40]))
    return number


def _text(sent: dict[str, Any], key: str, problem: str) -> str:
    text = str(sent.get(key) or "").strip().strip('"')
    if not text:
        raise ConfigError(problem)
    return text


def _rank(value: Any) -> int:
    number = _number(value, _("The rank"))
    if number != int(number) or not 1 <= number <= 4096:
        raise ConfigError(_("The rank should be an integer of 1 or more, not {!r}.", str(value)[:40]))
    return int(number)


def _blocks(sent: dict[str, Any]) -> str:
    """Block weights in the syntax of `merge --blocks`."""
    text = str(sent["blocks"]).strip()
    if len(text) > LONGEST_TABLE:
        raise ConfigError(
            _("The weights of blocks are longer than {:,} letters; use fewer rows.", LONGEST_TABLE)
        )
    return text


def _format(sent: dict[str, Any]) -> str:
    name = str(sent.get("format") or "")
    if name not in FORMATS:
        raise ConfigError(_("Choose a format: {formats}.", formats=_(" or ").join(FORMATS)))
    return name


def _size(sent: dict[str, Any]) -> dict[str, Any]:
    """A rank, or a share of the energy in percent."""
    if sent.get("by") == "energy":
        share = _number(sent.get("energy") or "", _("The share of the energy"))
        if not 0 < share <= 100:
            raise ConfigError(_("The share of the energy is from above 0 to 100 percent, not {:g}.", share))
        return {"energy": share / 100}
    return {"rank": _rank(sent.get("rank") or "")}


def check_memory_is_free(app_state: AppState) -> None:
    """Refuse to load a base for measuring while a run is active.

    Raises:
        RunError: a run is active.
    """
    if app_state.jobs.live() is not None:
        raise RunError(_("A run is using the memory; measure once it has ended."))


def _measure(app_state: AppState, sent: Any) -> dict[str, Any]:
    """What to measure on: a run's held-out images, or a folder with a base."""
    sent = sent if isinstance(sent, dict) else {}
    check_memory_is_free(app_state)
    name = str(sent.get("run") or "")
    if name:
        run_view = next((w for w in app_state.jobs.all() if w.run.name == check_run_name(name)), None)
        if run_view is None:
            raise ConfigError(_("There is no run named {name}; choose another.", name=name))
        return {"run": str(run_view.run.path)}
    dataset = _text(sent, "dataset", "Choose what to measure on: a run, or a folder of images with captions.")
    return {"dataset": str(expand_home(dataset)), "base": _text(sent, "base", "Choose the base.")}


def default_stem(app_state: AppState, file: Path) -> str:
    """Stem for a file made from this one; checkpoints use their run's name."""
    run_view = find_owner(take_snapshot(app_state), str(file))
    stem = f"{run_view.run.name}-{file.parent.name}" if run_view and file.name == CHECKPOINT else file.stem
    return re.sub(r"[^\w .()-]", "_", stem).strip(" .") or "lora"


def free_path(app_state: AppState, source: str, suffix: str) -> Path:
    """Path for a file made from `source`: beside a run's exports, else in the project."""
    file = expand_home(source)
    run_view = find_owner(take_snapshot(app_state), str(file))
    folder = run_view.run.exports if run_view else app_state.project.path / ADDED
    folder.mkdir(parents=True, exist_ok=True)
    return unused_path(folder, f"{default_stem(app_state, file)[:80]}-{suffix}", ".safetensors")


def _base_place(app_state: AppState, base: str, source: str) -> Path:
    """Path for a base with `source` merged into it: among the project's bases.

    Raises:
        ModelFileError: the base is not on this computer, or its copy does not fit.
    """
    path = base_path(base)
    folder = app_state.project.path / BASES
    size = path.stat().st_size if path.is_file() else folder_bytes(path.resolve())
    free = free_bytes(folder)
    if size + MARGIN > free:
        needed, room = format_bytes(size), format_bytes(free)
        raise ModelFileError(
            _("A copy of the base takes {}, and {} are free in {}; make room.", needed, room, folder)
        )
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{path.stem[:60]}-{default_stem(app_state, Path(source))[:60]}"
    return unused_path(folder, stem, ".safetensors" if path.is_file() else "")


def _suffix(tool: str, request: dict[str, Any]) -> str:
    if tool in ("merge", "plain", "convert"):
        return {"merge": "merged", "plain": f"plain{request.get('rank')}"}.get(tool) or request["format"]
    small = f"rank{request['rank']}" if request.get("rank") else f"energy{100 * request['energy']:g}"
    return f"lora-{small}" if tool == "extract" else small


DROPPED = Path("tmp") / "dropped"
"""Where dropped files are kept for a while, below the workspace."""
UNSHOWN = "The result cannot be shown because of a bug in LoRA Easel; its log has the details."
BUSY = "A tool is already running; wait for it, or cancel it."


class BackgroundTask:
    """The task that a page started in the worker, or the last one. One at a time, independent of the page: a
    page that returns finds its state."""

    def __init__(self, worker: WorkerClient, dropped: Path = Path("/none")) -> None:
        """Results name a file below `dropped`, where dropped files are kept, without its folder."""
        self._worker, self._folder = worker, re.compile(re.escape(str(dropped)) + r"[\\/]\w+[\\/]")
        self._lock = threading.Lock()
        self._reply: Reply | None = None
        self._shows: Callable[[dict[str, Any]], str] = lambda result: ""
        self._name = self._title = self._html = ""
        self._revision = 0
        self._told = True

    def start(
        self, title: str, request: dict[str, Any], shows: Callable[[dict[str, Any]], str], name: str = ""
    ) -> None:
        """Start a task.

        Args:
            title: its name while it runs.
            request: for the worker.
            shows: makes HTML of its answer.
            name: tells a page what the answer belongs to.

        Raises:
            RunError: something is under way.
        """
        with self._lock:
            if self._reply is not None and not self._reply.finished.is_set():
                raise RunError(BUSY)
            self._title, self._shows, self._told, self._name = title, shows, False, name
            self._reply = self._worker.submit(request)

    def cancel(self) -> None:
        """Cancel the running task."""
        if self._reply is not None and not self._reply.finished.is_set():
            self._worker.cancel(self._reply)

    def now(self) -> dict[str, Any]:
        """The state, and what the last task came to while none is running."""
        with self._lock:
            reply, shown = self._reply, {"words": "", "name": self._name}
            if reply is not None and not reply.finished.is_set():
                doing = reply.phase or self._worker.describe(reply)
                count = _(", {:,} of {:,}", reply.done, reply.total) if reply.total > 1 else ""
                words = (
                    f"{_(self._title)}: {doing[:1].lower() + doing[1:]}{count}" if doing else _(self._title)
                )
                progress = {"done": reply.done, "total": reply.total, "words": words}
                return {**shown, "state": "working", "revision": self._revision, **progress}
            if reply is not None and not self._told:
                self._told, self._revision = True, self._revision + 1
                self._html = self._outcome(reply)
            state = reply.state if reply else "idle"
            return {**shown, "state": state, "revision": self._revision, "html": self._html}

    def _plain(self, found: Any) -> Any:
        """A result without folders and options that mean nothing to a page."""
        match found:
            case str():
                return self._folder.sub("", found).replace("; name its base with --base", "")
            case dict():
                return {key: self._plain(value) for key, value in found.items()}
            case list():
                return [*map(self._plain, found)]
        return found

    def _outcome(self, reply: Reply) -> str:
        if reply.state == "error":
            return problem_html(self._plain(reply.message))
        try:
            return self._shows(self._plain(reply.result))
        except LoraError as error:
            return problem_html(error)
        except Exception:
            logging.getLogger(__name__).exception("The result of %s cannot be shown", self._title)
            return problem_html(UNSHOWN)


def add_task(app: FastAPI, live: LiveStream, name: str, task: BackgroundTask) -> None:
    """Tell pages of a task by the live stream, and let them cancel it at `/easel/NAME/cancel`."""
    live.feeds[name] = task.now
    add_actions(app, {f"{name}/cancel": lambda sent: task.cancel()})


Row = Mapping[str, Any]
MOST_BARS = 14


def build_toolbox(bindings: Bindings) -> None:
    """Lay out the tab."""
    offered = {"tools": TOOLS, "verbs": VERBS}
    html_block(lambda: render("toolbox/page.html", **offered), elem_classes="page page-toolbox")
    html_block(lambda: render("toolbox/page.html", part="foot"), elem_classes="foot")


def add_toolbox_routes(app: FastAPI, app_state: AppState) -> None:
    """Add the tab's routes to `app`."""
    toolbox = Toolbox(app_state)
    add_task(app, app_state.live, "toolbox", toolbox.task)
    actions: dict[str, Callable[[dict[str, Any]], Any]] = {
        "form": functools.partial(draw_form, app_state), "start": toolbox.start, "act": toolbox.act,
        "go-on": functools.partial(train_on, app_state),
    }  # fmt: skip
    add_actions(app, {f"toolbox/{name}": act for name, act in actions.items()})

    @app.post("/easel/toolbox/file")
    async def file(request: Request, name: str) -> Response:
        path = await receive_file(request, app_state.workspace / DROPPED, name)
        return Answer({"file": str(path)})

    @app.get("/easel/toolbox/numbers.json")
    def numbers(tool: str = "") -> Response:
        found = {key: value for key, value in toolbox.found(tool).items() if key not in ("id", "event")}
        headers = {"Content-Disposition": 'attachment; filename="numbers.json"', **FRESH}
        return Response(json.dumps(found, indent=1), media_type="application/json", headers=headers)

    @app.get("/easel/made/{file}")
    def made(file: str) -> Response:
        whole = below(app_state.project.path / ADDED, file, {".safetensors"})
        return FileResponse(whole, filename=whole.name, media_type="application/octet-stream")


class Toolbox:
    """Runs the tools, one at a time, and keeps the last result of each for follow-up actions."""

    def __init__(self, app_state: AppState) -> None:
        self.task = BackgroundTask(app_state.worker, app_state.workspace / DROPPED)
        self._app_state = app_state
        self._results: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {}

    def found(self, tool: str) -> dict[str, Any]:
        """The last result of a tool; a page shows those of several."""
        return self._results[tool][1] if tool in self._results else {}

    def start(self, sent: dict[str, Any]) -> None:
        """Start what a page asks for.

        Raises:
            LoraError: something is missing.
        """
        tool = str(sent.get("tool"))
        request = build_worker_request(self._app_state, tool, sent)

        def shows(result: dict[str, Any]) -> str:
            if TOOLS[tool].makes == "base":
                self._app_state.places.keep("bases", str(result["file"]))
            if tool == "strength":
                strength, *apart = result["strength"]["strengths"]
                if not apart:
                    keep_best_strength(self._app_state.project, str(request["file"]), strength)
            html = result_html(tool, request, self._linked(result))
            self._results[tool] = request, result, html
            return html

        self.task.start(TOOLS[tool].title, request, shows, tool)

    def act(self, sent: dict[str, Any]) -> None:
        """Make the file that a measurement proposed.

        Raises:
            RunError: nothing was measured that it could be made of.
        """
        do = str(sent.get("do"))
        tool = {"shrink": "intrinsic", "bake": "strength"}.get(do, "")
        if tool not in self._results:
            raise RunError(_("Measure first; there is no result to make a file from."))
        asked, result, before = self._results[tool]
        found = result[tool]
        if do == "shrink":
            more, suffix = {"ranks": found["ranks"]}, f"rank{found['rank']}"
        else:
            more, suffix = {"strengths": found["strengths"]}, "baked"
        out = free_path(self._app_state, asked["file"], suffix)
        request = {"do": do, "file": asked["file"], "out": str(out), **more}
        self.task.start(
            _("Writing the file"), request, lambda result: written_html(self._linked(result)) + before, tool
        )

    def _linked(self, result: dict[str, Any]) -> dict[str, Any]:
        """Add the URL and the location of a file that was made."""
        if "file" not in result:
            return result
        file, runs = Path(str(result["file"])), runs_folder(self._app_state.workspace)
        link = f"/easel/made/{quote(file.name)}" if file.parent.name == ADDED else ""
        if file.is_relative_to(runs):
            link = f"/easel/download/{quote(file.relative_to(runs).parts[0])}/{quote(file.name)}"
        return {**result, "link": link, "place": self._app_state.files.place(file, _("Saved to"))}


def keep_best_strength(project: Project, file: str, strength: float) -> None:
    """Keep a measured strength of the full adapter, which the Preview tab marks at its slider."""
    with project.editing():
        known = dict(project.draft().get("best_strengths") or {})
        project.update_draft(best_strengths=known | {file: round(float(strength), 2)})


def train_on(app_state: AppState, sent: dict[str, Any]) -> None:
    """Make the Train form start from a LoRA file.

    Raises:
        AdapterFileError: it is gone.
    """
    file = Path(str(sent.get("file", "")))
    if not file.is_file():
        raise AdapterFileError(_("There is no file at {file}; choose another.", file=file))
    with app_state.project.editing():
        values = dict(app_state.project.draft().get("values") or {})
        app_state.project.update_draft(values={**values, "adapter.init": str(file)})


def result_html(tool: str, request: Row, result: Row) -> str:
    """Render a tool's result.

    Args:
        tool: of `TOOLS`.
        request: of the tool.
        result: the worker's answer.
    """
    if TOOLS[tool].makes:
        return written_html(result)
    files = [request["file"]] if "file" in request else [row["file"] for row in request["files"]]
    names = [_name(file) for file in files]
    if tool == "check":
        return file_facts(names[0], result)
    values: dict[str, Any] = {}
    if tool == "spectrum":
        values["about"] = file_facts(_("The file"), {"report": result.get("report"), "problem": " "})
    elif tool == "compare":
        values["bars"] = _similarity_bars(result["compare"]["layers"])
    elif tool == "stack":
        rows = result["stack"]["files"]
        values["files"] = [{**row, "name": name} for row, name in zip(rows, names, strict=True)]
    return render("toolbox/result.html", tool=tool, names=names, result=result, **values)


def _name(file: str) -> str:
    path = Path(file)
    known = path.name == CHECKPOINT and len(path.parts) > 3
    return f"{path.parents[2].name}, {path.parent.name}" if known else path.name


def _similarity_bars(layers: list[Row]) -> str:
    """The most and least similar layers, against chance."""
    ordered = sorted(layers, key=lambda row: row["baseline"] - row["phi"])
    half = MOST_BARS // 2
    shown = ordered if len(ordered) <= MOST_BARS else [*ordered[:half], *ordered[-half:]]
    bars = [Bar(row["module"], row["phi"], 0.0, f"{row['phi']:.2f} ({row['baseline']:.2f})") for row in shown]
    title = _("Most and least alike layers") if len(ordered) > len(shown) else _("By layer")
    note = _("Of the directions that they read; in brackets what chance alone would give.")
    return figure(title, bars_plot(_("Similarity of single layers"), bars), note)


def written_html(result: Row) -> str:
    """A file that was made: location, cost, next steps. A base has no link: training does not continue from
    one."""
    return render("toolbox/made.html", result=result, name=Path(str(result["file"])).name)


def compatibility_card(result: Row | None) -> str:
    """What each tool makes of the written file, from the worker's answer."""
    return render("export/works_in.html", verified=(result.get("works_in") or {}) if result else None)


def file_facts(name: str, result: Row) -> str:
    """What a file is, and a row per tool."""
    report = {"metadata": {}, "family": "unknown", **(result.get("report") or {})}
    values = {"report": report, "trained": describe_training(report["metadata"]), "families": FAMILIES}
    return render("toolbox/facts.html", name=name, result=result, **values)


def describe_training(metadata: Mapping[str, str]) -> str:
    """Base, images and steps, as far as the metadata says."""
    words = []
    base = metadata.get("ss_sd_model_name", "")
    if base:
        words.append(_("on {base}", base=base))
    for key, unit in (("ss_num_train_images", "image"), ("ss_steps", "step")):
        value = metadata.get(key, "")
        if re.fullmatch("[0-9]{1,18}", value) and int(value):
            words.append(pluralize(int(value), unit))
    return ", ".join(words)
