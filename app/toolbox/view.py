"""The Toolbox tab: its page, its routes, and the results of its tools.

Results are drawn by `templates/result.html`, with the figures of `lora_core/report/plots.py`.
"""

import functools
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, Response

from app.bindings import Bindings, html_block
from app.preview.loras import ADDED
from app.routes import FRESH, Answer, add_actions, add_reads, below, receive_file
from app.state import AppState
from app.templates import _, pluralize, render
from app.toolbox.tools import (
    CHECKPOINT,
    TOOLS,
    BackgroundTask,
    add_task,
    build_worker_request,
    free_path,
    list_choices,
)
from lora_core.errors import AdapterFileError, RunError
from lora_core.model_files.families import FAMILIES
from lora_core.report.plots import Bar, bars_plot, figure
from lora_core.runs.folder import runs_folder
from lora_core.settings.schema import FORMATS
from lora_core.system.files import parse_json

Row = Mapping[str, Any]
MOST_BARS = 14
MOST_TAGS = 12
# Texts of a header that one program writes, and what it is called; the more telling first.
WRITERS = (
    ("lora_easel.config", "LoRA Easel"),
    ("ot_branch", "OneTrainer"),
    ("ot_revision", "OneTrainer"),
    ("ss_sd_scripts_commit_hash", "kohya sd-scripts"),
    ("ss_network_module", "kohya sd-scripts"),
    ("lora_adapter_metadata", "diffusers or PEFT"),
)


def build_toolbox(bindings: Bindings) -> None:
    """Lay out the tab."""
    values = {"tools": TOOLS, "formats": {key: row.title for key, row in FORMATS.items()}}
    html_block(lambda: render("toolbox/page.html", **values), elem_classes="page page-toolbox")


def add_toolbox_routes(app: FastAPI, app_state: AppState) -> None:
    """Add the tab's routes to `app`."""
    toolbox = Toolbox(app_state)
    add_task(app, app_state.live, "toolbox", toolbox.task)
    add_reads(app, {"toolbox/choices": lambda: list_choices(app_state)})
    go_on = functools.partial(train_on, app_state)
    add_actions(app, {"toolbox/start": toolbox.start, "toolbox/act": toolbox.act, "toolbox/go-on": go_on})

    @app.post("/easel/toolbox/file")
    async def file(request: Request, name: str) -> Response:
        path = await receive_file(request, app_state.workspace / "tmp" / "dropped", name)
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
        """Start without a result."""
        self.task = BackgroundTask(app_state.worker)
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
                self._keep_best(str(request["file"]), result["strength"]["strengths"])
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

    def _keep_best(self, file: str, strengths: list[float]) -> None:
        """Keep a measured strength of the whole adapter, which the Preview tab marks at its slider."""
        if len(strengths) == 1:
            with self._app_state.project.editing():
                known = dict(self._app_state.project.draft().get("best_strengths") or {})
                best = known | {file: round(float(strengths[0]), 2)}
                self._app_state.project.update_draft(best_strengths=best)

    def _linked(self, result: dict[str, Any]) -> dict[str, Any]:
        """Add the URL and the location of a file that was made."""
        if "file" not in result:
            return result
        file, runs = Path(str(result["file"])), runs_folder(self._app_state.workspace)
        link = f"/easel/made/{quote(file.name)}" if file.parent.name == ADDED else ""
        if file.is_relative_to(runs):
            link = f"/easel/download/{quote(file.relative_to(runs).parts[0])}/{quote(file.name)}"
        return {**result, "link": link, "place": self._app_state.files.place(file, _("Saved to"))}


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
        request: what was asked.
        result: what the worker answered.
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
    """A file's name; run and step for a checkpoint."""
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
    report = dict(result.get("report") or {})
    metadata: dict[str, str] = dict(report.get("metadata") or {})
    family = str(report.get("family", "unknown"))
    rows = [
        (_("For"), FAMILIES[family].title if family in FAMILIES else family),
        (
            _("Kind"),
            _("{kind}, {format} format", kind=report.get("kind", ""), format=report.get("format", "")),
        ),
        (_("Written by"), find_writer(metadata) or _("unknown")),
        (_("Rank"), _numbers(report.get("ranks"))),
        (_("Alpha"), _numbers(report.get("alphas"))),
        (
            _("Layers"),
            _("{:,}, {:,} parameters", report.get("modules", 0), report.get("parameters", 0)),
        ),
        (_("Trained"), describe_training(metadata) or _("unknown")),
    ]
    return render(
        "toolbox/facts.html",
        name=name,
        rows=rows,
        report=report,
        triggers=find_trigger_words(metadata),
        problem=str(result.get("problem") or ""),
        verified=result.get("verify") or {},
    )


def _numbers(values: Any) -> str:
    """Distinct numbers: all of a few, else first and last."""
    found = [f"{float(value):g}" for value in values or []]
    return ", ".join(found) if len(found) <= 4 else _("{} to {}, {} values", found[0], found[-1], len(found))


def find_writer(metadata: Mapping[str, str]) -> str:
    """The program that wrote a file, "" if its metadata does not say."""
    software = _json(metadata.get("software", ""))
    if isinstance(software, dict) and software.get("name"):
        return f"{software['name']} {software.get('version') or ''}".strip()
    return next((name for key, name in WRITERS if key in metadata), "")


def find_trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """The trigger phrase in the metadata, else the tags of its captions, most frequent first."""
    phrase = metadata.get("modelspec.trigger_phrase", "").strip()
    if phrase:
        return [phrase]
    tables = _json(metadata.get("ss_tag_frequency", ""))
    counts: Counter[str] = Counter()
    for table in tables.values() if isinstance(tables, dict) else ():
        for tag, count in table.items() if isinstance(table, dict) else ():
            if isinstance(count, int):
                counts[str(tag).strip()] += count
    return [tag for tag, _ in counts.most_common(MOST_TAGS)]


def describe_training(metadata: Mapping[str, str]) -> str:
    """Base, images and steps, as far as the metadata says."""
    words = []
    base = metadata.get("ss_sd_model_name", "")
    if base:
        words.append(f"on {base}")
    for key, unit in (("ss_num_train_images", "image"), ("ss_steps", "step")):
        value = metadata.get(key, "")
        if re.fullmatch("[0-9]{1,18}", value) and int(value):
            words.append(pluralize(int(value), unit))
    return ", ".join(words)


def _json(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return None
