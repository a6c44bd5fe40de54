"""The Export tab: choose a checkpoint, name the file, take it or have it put into another tool's folder, and
see where it works; the run's report; and a look into any other LoRA file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from app.bindings import QUIET, TYPING, Parts, piece
from app.export.compatibility import build_check, checkpoint_cards, works_in, written_line
from app.export.lora_tools import inside_card
from app.export.report_card import FRAME, STATE, report_card
from app.formatting import safe
from app.jobs import RunView
from app.preview.loras import checkpoint_choices
from app.snapshot import Moment, moment_of
from app.state import Desk
from lora_core.errors import LoraError, RunError
from lora_core.model_files.detect import chosen_base
from lora_core.runs.folder import check_run_name
from lora_core.settings.choices import FORMATS
from lora_core.system.other_tools import CopiedFile, copy_export

TITLE = "Export"
PRECISIONS = [("fp16, half the size", "fp16"), ("bf16", "bf16"), ("fp32, exact", "fp32")]
# The page starts a download by itself once the file is written.
START_DOWNLOAD = """(address) => { if (address) { const link = document.createElement("a");
link.href = address; link.download = ""; document.body.append(link); link.click(); link.remove(); } }"""


def build(parts: Parts) -> None:
    """Lay out the tab and wire it."""
    with gr.Row(elem_classes="page page-export"):
        with gr.Column(elem_classes="main card"):
            piece("<h2>Export</h2>")
            fields = _form(parts)
            button = gr.Button(
                "Download .safetensors", variant="primary", elem_id="export-download", elem_classes="big"
            )
            parts.live(button, lambda m: gr.update(interactive=bool(_with_checkpoints(m))))
            written = piece(elem_id="export-written")
            address = gr.Textbox(visible="hidden", elem_id="export-address")
            buttons = {"download": button, **build_copy(parts, lambda m: bool(_with_checkpoints(m)))}
        with gr.Column(elem_classes="main"):
            table = piece(works_in(None, True), elem_id="works-in")
            build_check(parts)
            with gr.Column(elem_classes="card"):
                piece(FRAME)
                parts.live(piece(), lambda m: report_card(_Chosen(parts).watch(m)))
                piece(STATE)
        with gr.Column(elem_classes="main wide"):
            piece(inside_card())
    _wire(parts, fields, buttons, [written, table, address])


def _form(parts: Parts) -> dict[str, Any]:
    made: dict[str, Any] = {}
    made["run"] = gr.Dropdown(label="Run", elem_id="export-run", allow_custom_value=False)
    cards = piece(elem_id="export-cards")
    with gr.Row(elem_classes="pair"):
        made["checkpoint"] = gr.Dropdown(label="Checkpoint", elem_id="checkpoint")
        made["name"] = gr.Textbox(label="File name", elem_id="export-name", lines=1, max_lines=1)
    with gr.Row(elem_classes="pair"):
        formats = [(row.title, key) for key, row in FORMATS.items()]
        made["format"] = gr.Dropdown(formats, value="kohya", label="Format", elem_id="export-format")
        made["precision"] = gr.Dropdown(
            PRECISIONS, value="fp16", label="Precision", elem_id="export-precision"
        )
    chosen = _Chosen(parts)
    parts.live(made["run"], chosen.runs)
    parts.live(made["checkpoint"], chosen.checkpoints)
    parts.live(made["name"], chosen.name)
    parts.live(cards, lambda m: checkpoint_cards(m, chosen.watch(m), chosen.checkpoint(m)))
    parts.action(made["run"].input(chosen.choose_run, made["run"], None, **TYPING))
    parts.action(made["checkpoint"].input(chosen.choose_checkpoint, made["checkpoint"], None, **TYPING))
    return made


def _with_checkpoints(moment: Moment) -> list[RunView]:
    return [watch for watch, _ in moment.runs if watch.run.checkpoint_steps()]


class _Chosen:
    """Which run and checkpoint the tab is at: the person's choice, else the newest run and its best.

    A list's event fires also where it is merely left, which is no choice.
    """

    def __init__(self, parts: Parts) -> None:
        self.desk, self.project = parts.desk, parts.desk.project

    def choose_run(self, name: str) -> None:
        watch = self.watch(moment_of(self.desk))
        if watch is None or watch.run.name != name:
            self.project.keep(export_run=name, export_checkpoint="")

    def choose_checkpoint(self, key: str) -> None:
        if key != self.checkpoint(moment_of(self.desk)):
            self.project.keep(export_checkpoint=key)

    def watch(self, moment: Moment) -> RunView | None:
        there = _with_checkpoints(moment)
        kept = self.project.draft().get("export_run")
        return next((w for w in there if w.run.name == kept), there[0] if there else None)

    def checkpoint(self, moment: Moment) -> str:
        watch = self.watch(moment)
        keys = [key for _, key in checkpoint_choices(watch)] if watch else []
        kept = str(self.project.draft().get("export_checkpoint") or "")
        return kept if kept in keys else keys[0] if keys else ""

    def runs(self, moment: Moment) -> Any:
        watch = self.watch(moment)
        names = [w.run.name for w in _with_checkpoints(moment)]
        return gr.update(choices=names, value=watch.run.name if watch else None)

    def checkpoints(self, moment: Moment) -> Any:
        watch = self.watch(moment)
        return gr.update(
            choices=checkpoint_choices(watch) if watch else [], value=self.checkpoint(moment) or None
        )

    def name(self, moment: Moment) -> Any:
        watch = self.watch(moment)
        return gr.update(value=watch.run.name if watch else "")


def _wire(parts: Parts, fields: dict[str, Any], buttons: dict[str, Any], outputs: list[Any]) -> None:
    desk = parts.desk

    def download(*choice: str) -> tuple[str, Any, str]:
        try:
            watch, result = written(desk, *choice)
        except LoraError as error:
            return problem(error), gr.skip(), ""
        file = Path(str(result["file"]))
        link = f"/easel/download/{quote(watch.run.name)}/{quote(file.name)}"
        place = desk.files.place(file, "It is at")
        if result.get("raw"):
            place += desk.files.place(Path(result["raw"]), "It holds the averaged adapter; the raw one is at")
        return written_line(result, choice[-1], link, place), works_in(result, _portable(watch)), link

    def copy(folder: str, *choice: str) -> tuple[str, Any]:
        try:
            target = checked_folder(folder)
            watch, result = written(desk, *choice)
            done = copy_export(Path(str(result["file"])), target)
        except LoraError as error:
            return problem(error), gr.skip()
        desk.places.keep_lora_folder(target)
        return copied_line(desk, done), works_in(result, _portable(watch))

    inputs = [fields[name] for name in ("run", "checkpoint", "name", "format", "precision")]
    busy = {**QUIET, "show_progress": "minimal"}
    done = buttons["download"].click(download, inputs, outputs, **busy)
    done.then(None, outputs[-1], None, js=START_DOWNLOAD, queue=False)
    parts.action(done)
    note, table = buttons["copied"], outputs[1]
    # What was said of one file says nothing of the next.
    changes = [fields[name].input for name in ("run", "checkpoint", "format", "precision")]
    gr.on(changes, lambda: ["", works_in(None, True), ""], None, [outputs[0], table, note], **QUIET)
    parts.action(buttons["copy"].click(copy, [buttons["folder"], *inputs], [note, table], **busy))


def written(
    desk: Desk, run: str, checkpoint: str, name: str, form: str, precision: str
) -> tuple[RunView, dict[str, Any]]:
    """Have the worker write the file. Returns the run and the worker's answer.

    Raises:
        LoraError: there is no such run, the name is no file's, or the worker could not write it.
    """
    watch = next((w for w, _ in moment_of(desk).runs if w.run.name == run), None)
    if watch is None:
        raise LoraError("Choose a run first; there is none with a checkpoint yet.")
    stem = check_run_name(name.strip().removesuffix(".safetensors") or watch.run.name)
    request = {"run": str(watch.run.path), "checkpoint": checkpoint or "last", "name": stem}
    reply = desk.worker.ask({"do": "export", **request, "format": form, "precision": precision})
    if reply.state == "error":
        raise LoraError(reply.message)
    return watch, reply.result


def _portable(watch: RunView) -> bool:
    """Whether other tools have the base that a run was trained on."""
    config = watch.config()
    family = chosen_base(config.model.base).family if config else None
    return family is None or family.portable


# The part of the Export tab that puts the file where another tool looks for it.


def build_copy(parts: Parts, ready: Callable[[Moment], bool]) -> dict[str, Any]:
    """The dropdown of folders, the button, and the place for what came of it.

    Args:
        parts: of the page.
        ready: whether there is anything to export.
    """
    desk = parts.desk
    made: dict[str, Any] = {}
    piece('<h3 class="over-line">Or put it where your other tool looks for LoRAs</h3>')
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
    made["copied"] = piece(elem_id="copy-note")
    parts.live(piece(), lambda m: _tools_note(desk))
    parts.live(made["folder"], lambda m: _folders(desk))
    parts.live(made["copy"], lambda m: gr.update(interactive=ready(m)))
    chosen = made["folder"].input(
        lambda folder: desk.project.keep(copy_to=folder or ""), made["folder"], None, **TYPING
    )
    parts.action(chosen)
    return made


def folder_choices(desk: Desk) -> list[tuple[str, str]]:
    """Where a LoRA can be copied to, as (words, path): tools' folders first, then others used before."""
    found = [(f"{name}: {_short(folder)}", str(folder)) for name, folder in desk.tools.lora_folders()]
    known = {Path(folder).resolve() for _, folder in found}
    before = [folder for folder in desk.places.lora_folders() if folder.is_dir()]
    return found + [(_short(folder), str(folder)) for folder in before if folder.resolve() not in known]


def _short(folder: Path) -> str:
    """A path with the home folder as ~."""
    home = Path.home()
    return f"~/{folder.relative_to(home).as_posix()}" if folder.is_relative_to(home) else str(folder)


def _folders(desk: Desk) -> Any:
    """The choices; what was chosen, else the folder that was used last, else the first tool's."""
    choices = folder_choices(desk)
    wanted = [str(desk.project.draft().get("copy_to") or ""), *map(str, desk.places.lora_folders())]
    there = [folder for _, folder in choices]
    value = next((f for f in wanted if f in there or (f and Path(f).is_dir())), there[0] if there else None)
    return gr.update(choices=choices, value=value)


def _tools_note(desk: Desk) -> str:
    """What to do where no folder was found, and for tools that keep a list of their own and look into
    none."""
    if not folder_choices(desk):
        return '<p class="small">No folder of another tool was found here; type its path.</p>'
    names = [
        tool.name for tool, _ in desk.tools.shelves() if tool.loras is None and tool.root not in tool.models
    ]
    if not names:
        return ""
    return (
        f'<p class="small">{safe(" and ".join(dict.fromkeys(names)))} keeps a list of its own: add the file'
        " there, in its model manager, by the path above.</p>"
    )


def checked_folder(text: str | None) -> Path:
    """The folder that was chosen or typed.

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


def copied_line(desk: Desk, done: CopiedFile) -> str:
    """What was copied, and where it lies."""
    tool = next((n for n, f in desk.tools.lora_folders() if f.resolve() == done.file.parent.resolve()), "")
    with_it = ", with its side files" if done.beside else ""
    words = [f"Copied{f' to {tool}' if tool else ''}{with_it}."]
    if done.renamed:
        words.append(f"Another file has that name there, so this one is called {done.file.stem}.")
    if done.kept:
        words.append(f"{', '.join(file.name for file in done.kept)} was there already and stays as it is.")
    words.append("The tool lists it after a refresh." if tool else "")
    return (
        '<p class="small"'
        f' role="status">{safe(" ".join(words).strip())}</p>{desk.files.place(done.file, "It is at")}'
    )


def problem(error: Exception) -> str:
    """A problem as HTML."""
    return f'<p class="problem" role="alert">{safe(error)}</p>'
