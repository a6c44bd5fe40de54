"""The Export tab: choose a checkpoint, download it or copy it to another tool, check compatibility, make the
report."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from app.bindings import QUIET, TYPING, Bindings, html_block
from app.export.compatibility import build_check, checkpoint_cards, compatibility_card, written_line
from app.export.lora_tools import lora_tools_card
from app.export.lora_tools_results import FRAME, STATE, report_card
from app.formatting import safe
from app.jobs import RunView
from app.preview.request_form import checkpoint_choices
from app.state import AppState, Snapshot, take_snapshot
from app.templates import problem_html
from lora_core.errors import LoraError, RunError
from lora_core.model_files.detect import lookup_base
from lora_core.runs.folder import check_run_name
from lora_core.settings.choices import FORMATS
from lora_core.system.other_tools import CopiedFile, copy_export

PRECISIONS = [("fp16, half the size", "fp16"), ("bf16", "bf16"), ("fp32, exact", "fp32")]
# Starts the download in the browser once the file is written.
START_DOWNLOAD = """(address) => { if (address) { const link = document.createElement("a");
link.href = address; link.download = ""; document.body.append(link); link.click(); link.remove(); } }"""


def build_export(bindings: Bindings) -> None:
    """Lay out the tab and wire it."""
    with gr.Row(elem_classes="page page-export"):
        with gr.Column(elem_classes="main card"):
            html_block("<h2>Export</h2>")
            fields = _form(bindings)
            button = gr.Button(
                "Download .safetensors", variant="primary", elem_id="export-download", elem_classes="big"
            )
            bindings.follow(button, lambda snap: gr.update(interactive=bool(_with_checkpoints(snap))))
            written = html_block(elem_id="export-written")
            address = gr.Textbox(visible="hidden", elem_id="export-address")
            buttons = {"download": button, **build_copy(bindings, lambda snap: bool(_with_checkpoints(snap)))}
        with gr.Column(elem_classes="main"):
            table = html_block(compatibility_card(None, True), elem_id="works-in")
            build_check(bindings)
            with gr.Column(elem_classes="card"):
                html_block(FRAME)
                bindings.follow(html_block(), lambda snap: report_card(_Chosen(bindings).run_view(snap)))
                html_block(STATE)
        with gr.Column(elem_classes="main wide"):
            html_block(lora_tools_card())
    _wire(bindings, fields, buttons, [written, table, address])


def _form(bindings: Bindings) -> dict[str, Any]:
    made: dict[str, Any] = {}
    made["run"] = gr.Dropdown(label="Run", elem_id="export-run", allow_custom_value=False)
    cards = html_block(elem_id="export-cards")
    with gr.Row(elem_classes="pair"):
        made["checkpoint"] = gr.Dropdown(label="Checkpoint", elem_id="checkpoint")
        made["name"] = gr.Textbox(label="File name", elem_id="export-name", lines=1, max_lines=1)
    with gr.Row(elem_classes="pair"):
        formats = [(row.title, key) for key, row in FORMATS.items()]
        made["format"] = gr.Dropdown(formats, value="kohya", label="Format", elem_id="export-format")
        made["precision"] = gr.Dropdown(
            PRECISIONS, value="fp16", label="Precision", elem_id="export-precision"
        )
    chosen = _Chosen(bindings)
    bindings.follow(made["run"], chosen.runs)
    bindings.follow(made["checkpoint"], chosen.checkpoints)
    bindings.follow(made["name"], chosen.name)
    bindings.follow(
        cards, lambda snap: checkpoint_cards(snap, chosen.run_view(snap), chosen.checkpoint(snap))
    )
    bindings.refresh_after(made["run"].input(chosen.choose_run, made["run"], None, **TYPING))
    bindings.refresh_after(
        made["checkpoint"].input(chosen.choose_checkpoint, made["checkpoint"], None, **TYPING)
    )
    return made


def _with_checkpoints(snapshot: Snapshot) -> list[RunView]:
    return [run_view for run_view, _ in snapshot.runs if run_view.run.checkpoint_steps()]


class _Chosen:
    """The chosen run and checkpoint: the user's choice, else the newest run and its best.

    A dropdown's event fires also when it is merely left, which is not a choice.
    """

    def __init__(self, bindings: Bindings) -> None:
        self.app_state, self.project = bindings.app_state, bindings.app_state.project

    def choose_run(self, name: str) -> None:
        run_view = self.run_view(take_snapshot(self.app_state))
        if run_view is None or run_view.run.name != name:
            self.project.update_draft(export_run=name, export_checkpoint="")

    def choose_checkpoint(self, key: str) -> None:
        if key != self.checkpoint(take_snapshot(self.app_state)):
            self.project.update_draft(export_checkpoint=key)

    def run_view(self, snapshot: Snapshot) -> RunView | None:
        there = _with_checkpoints(snapshot)
        kept = self.project.draft().get("export_run")
        return next((w for w in there if w.run.name == kept), there[0] if there else None)

    def checkpoint(self, snapshot: Snapshot) -> str:
        run_view = self.run_view(snapshot)
        keys = [key for _, key in checkpoint_choices(run_view)] if run_view else []
        kept = str(self.project.draft().get("export_checkpoint") or "")
        return kept if kept in keys else keys[0] if keys else ""

    def runs(self, snapshot: Snapshot) -> Any:
        run_view = self.run_view(snapshot)
        names = [w.run.name for w in _with_checkpoints(snapshot)]
        return gr.update(choices=names, value=run_view.run.name if run_view else None)

    def checkpoints(self, snapshot: Snapshot) -> Any:
        run_view = self.run_view(snapshot)
        return gr.update(
            choices=checkpoint_choices(run_view) if run_view else [], value=self.checkpoint(snapshot) or None
        )

    def name(self, snapshot: Snapshot) -> Any:
        run_view = self.run_view(snapshot)
        return gr.update(value=run_view.run.name if run_view else "")


def _wire(bindings: Bindings, fields: dict[str, Any], buttons: dict[str, Any], outputs: list[Any]) -> None:
    app_state = bindings.app_state

    def download(*choice: str) -> tuple[str, Any, str]:
        try:
            run_view, result = write_export(app_state, *choice)
        except LoraError as error:
            return problem_html(error), gr.skip(), ""
        file = Path(str(result["file"]))
        link = f"/easel/download/{quote(run_view.run.name)}/{quote(file.name)}"
        place = app_state.files.place(file, "It is at")
        if result.get("raw"):
            place += app_state.files.place(
                Path(result["raw"]), "It holds the averaged adapter; the raw one is at"
            )
        return (
            written_line(result, choice[-1], link, place),
            compatibility_card(result, _portable(run_view)),
            link,
        )

    def copy(folder: str, *choice: str) -> tuple[str, Any]:
        try:
            target = check_folder(folder)
            run_view, result = write_export(app_state, *choice)
            done = copy_export(Path(str(result["file"])), target)
        except LoraError as error:
            return problem_html(error), gr.skip()
        app_state.places.keep_lora_folder(target)
        return copied_line(app_state, done), compatibility_card(result, _portable(run_view))

    inputs = [fields[name] for name in ("run", "checkpoint", "name", "format", "precision")]
    busy = {**QUIET, "show_progress": "minimal"}
    done = buttons["download"].click(download, inputs, outputs, **busy)
    done.then(None, outputs[-1], None, js=START_DOWNLOAD, queue=False)
    bindings.refresh_after(done)
    note, table = buttons["copied"], outputs[1]
    # Results of one file do not apply to the next.
    changes = [fields[name].input for name in ("run", "checkpoint", "format", "precision")]
    gr.on(changes, lambda: ["", compatibility_card(None, True), ""], None, [outputs[0], table, note], **QUIET)
    bindings.refresh_after(buttons["copy"].click(copy, [buttons["folder"], *inputs], [note, table], **busy))


def write_export(
    app_state: AppState, run: str, checkpoint: str, name: str, form: str, precision: str
) -> tuple[RunView, dict[str, Any]]:
    """Have the worker write the file; returns the run and the worker's answer.

    Raises:
        LoraError: there is no such run, the name is no file's, or the worker could not write it.
    """
    run_view = next((w for w, _ in take_snapshot(app_state).runs if w.run.name == run), None)
    if run_view is None:
        raise LoraError("Choose a run first; none has a checkpoint yet.")
    stem = check_run_name(name.strip().removesuffix(".safetensors") or run_view.run.name)
    request = {"run": str(run_view.run.path), "checkpoint": checkpoint or "last", "name": stem}
    reply = app_state.worker.ask({"do": "export", **request, "format": form, "precision": precision})
    if reply.state == "error":
        raise LoraError(reply.message)
    return run_view, reply.result


def _portable(run_view: RunView) -> bool:
    """Whether other tools have the base that a run was trained on."""
    config = run_view.config()
    family = lookup_base(config.model.base).family if config else None
    return family is None or family.portable


def build_copy(bindings: Bindings, ready: Callable[[Snapshot], bool]) -> dict[str, Any]:
    """Lay out the folder dropdown, the copy button and its result.

    Args:
        bindings: of the page.
        ready: whether there is anything to export.
    """
    app_state = bindings.app_state
    made: dict[str, Any] = {}
    html_block('<h3 class="over-line">Or copy it to the LoRA folder of another tool</h3>')
    with gr.Row(elem_id="copy-row"):
        made["folder"] = gr.Dropdown(
            label="Folder of the other tool",
            allow_custom_value=True,
            filterable=True,
            elem_id="copy-folder",
            info="Found on this computer, or used before; or type the path of another folder.",
            elem_classes="tip",
        )
        made["copy"] = gr.Button("Copy there", elem_id="copy-export", min_width=0, scale=0)
    made["copied"] = html_block(elem_id="copy-note")
    bindings.follow(html_block(), lambda snap: _tools_note(app_state))
    bindings.follow(made["folder"], lambda snap: _folders(app_state))
    bindings.follow(made["copy"], lambda snap: gr.update(interactive=ready(snap)))
    chosen = made["folder"].input(
        lambda folder: app_state.project.update_draft(copy_to=folder or ""), made["folder"], None, **TYPING
    )
    bindings.refresh_after(chosen)
    return made


def folder_choices(app_state: AppState) -> list[tuple[str, str]]:
    """Folders a LoRA can be copied to, as (label, path): tools' folders first, then earlier ones."""
    found = [(f"{name}: {_short(folder)}", str(folder)) for name, folder in app_state.tools.lora_folders()]
    known = {Path(folder).resolve() for _, folder in found}
    before = [folder for folder in app_state.places.lora_folders() if folder.is_dir()]
    return found + [(_short(folder), str(folder)) for folder in before if folder.resolve() not in known]


def _short(folder: Path) -> str:
    """A path with ~ for the home folder."""
    home = Path.home()
    return f"~/{folder.relative_to(home).as_posix()}" if folder.is_relative_to(home) else str(folder)


def _folders(app_state: AppState) -> Any:
    """The choices; selected is the user's choice, else the last used folder, else the first tool's."""
    choices = folder_choices(app_state)
    wanted = [str(app_state.project.draft().get("copy_to") or ""), *map(str, app_state.places.lora_folders())]
    there = [folder for _, folder in choices]
    value = next((f for f in wanted if f in there or (f and Path(f).is_dir())), there[0] if there else None)
    return gr.update(choices=choices, value=value)


def _tools_note(app_state: AppState) -> str:
    """What to do if no folder was found, or a tool keeps its own list of LoRAs."""
    if not folder_choices(app_state):
        return '<p class="small">No folder of another tool was found; type its path.</p>'
    names = [
        tool.name
        for tool, _ in app_state.tools.shelves()
        if tool.loras is None and tool.root not in tool.models
    ]
    if not names:
        return ""
    return (
        f'<p class="small">{safe(" and ".join(dict.fromkeys(names)))} keeps its own list: add the file'
        " there, in its model manager, by the path above.</p>"
    )


def check_folder(text: str | None) -> Path:
    """Check the folder that was chosen or typed.

    Raises:
        RunError: nothing was, or it is no folder.
    """
    name = (text or "").strip().strip('"')
    if not name:
        raise RunError("Choose a folder to copy to, or type its path.")
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise RunError(f"There is no folder at {folder}; make it first, or choose another.")
    return folder.absolute()


def copied_line(app_state: AppState, done: CopiedFile) -> str:
    """What was copied, and where it is."""
    tool = next(
        (n for n, f in app_state.tools.lora_folders() if f.resolve() == done.file.parent.resolve()), ""
    )
    with_it = ", with its side files" if done.beside else ""
    words = [f"Copied{f' to {tool}' if tool else ''}{with_it}."]
    if done.renamed:
        words.append(f"That name was taken there, so this file is called {done.file.stem}.")
    if done.kept:
        words.append(f"{', '.join(file.name for file in done.kept)} was already there and is unchanged.")
    words.append("Refresh the tool's list to see it." if tool else "")
    return (
        '<p class="small"'
        f' role="status">{safe(" ".join(words).strip())}</p>{app_state.files.place(done.file, "It is at")}'
    )
