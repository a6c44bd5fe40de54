"""The Dataset tab: bring pictures in, see them, write their captions."""

from pathlib import Path
from typing import Any

import gradio as gr

from app.bases import EMBEDDED
from app.gallery import DETAIL, filters, findings, grid
from app.meter import mark, too_long
from app.moment import Moment
from app.parts import QUIET, TYPING, Parts, edited, piece
from app.words import many, safe
from lora_core.dataset.archive import Imported, import_files, import_folder
from lora_core.spec.errors import LoraError

TITLE = "Dataset"
KINDS = "PNG, JPEG, WebP, HEIC. Captions beside them come along. Nothing leaves this computer."


def build(parts: Parts) -> None:
    """Lay out the tab and wire it."""
    with gr.Row(elem_classes="page page-dataset"):
        with gr.Column(elem_classes="main"):
            _drop_zone(parts)
            with gr.Row(elem_classes="toolbar"):
                parts.live(piece(elem_classes="grow"), lambda m: filters(m.desk.project.dataset()))
                _trigger(parts)
            parts.live(piece(elem_id="dataset-grid"), _grid)
            parts.live(piece(), _findings)
        piece(DETAIL, elem_classes="side")


def _drop_zone(parts: Parts) -> None:
    project = parts.desk.project
    with gr.Row(elem_id="dataset-drop"):
        piece(
            f'<h2>Drop pictures, a folder or a .zip anywhere</h2><p class="small">{KINDS}</p>',
            elem_classes="grow",
        )
        upload = gr.UploadButton(
            "Choose pictures", file_count="multiple", elem_id="dataset-upload", min_width=0, scale=0
        )
        path = gr.Textbox(
            label="Folder path",
            placeholder="or the path of a folder or .zip",
            elem_id="dataset-path",
            lines=1,
            max_lines=1,
        )
        take = gr.Button("Import", elem_id="dataset-import", min_width=0, scale=0)
    note = piece(elem_id="import-note")

    def uploaded(files: list[str] | None) -> str:
        paths = [Path(file) for file in files or []]
        said = _import(parts, lambda: import_files(paths, project.pictures))
        for file in paths:
            # Gradio's copy has done its work; the project holds its own.
            file.unlink(missing_ok=True)
        return said

    def from_path(text: str) -> tuple[Any, str]:
        where = Path(text.strip().strip('"')).expanduser()
        if not text.strip():
            return gr.skip(), _note("Type the path of a folder of pictures first.", bad=True)
        if where.is_dir():
            return "", _import(parts, lambda: import_folder(where, project.pictures))
        if where.is_file():
            return "", _import(parts, lambda: import_files([where], project.pictures))
        return gr.skip(), _note(f"There is no folder at {where}.", bad=True)

    parts.action(upload.upload(uploaded, upload, note, **QUIET))
    parts.action(take.click(from_path, path, [path, note], **QUIET))
    parts.action(path.submit(from_path, path, [path, note], **QUIET))


def _import(parts: Parts, work: Any) -> str:
    """Copy pictures into the project and say what came of it."""
    project = parts.desk.project
    try:
        imported: Imported = work()
    except (LoraError, OSError) as error:
        return _note(str(error), bad=True)
    project.notes = imported.skipped
    if imported.added and project.uses_demo:
        # Own pictures were brought: from here on they are what is trained on, with a preset for them.
        base = (project.draft().get("values") or {}).get("model.base", EMBEDDED)
        project.keep(dataset="", level="", values={"model.base": base})
    project.forget()
    added = f"{many(len(imported.added), 'file')} added." if imported.added else "Nothing was added."
    skipped = f" {len(imported.skipped)} skipped, see below." if imported.skipped else ""
    return _note(added + skipped, bad=not imported.added)


def _note(text: str, bad: bool = False) -> str:
    return f'<p role="status" class="{"problem" if bad else "small"}">{safe(text)}</p>'


def _trigger(parts: Parts) -> None:
    project = parts.desk.project
    trigger = gr.Textbox(
        label="Trigger word",
        elem_id="trigger",
        elem_classes="inline",
        placeholder="none",
        lines=1,
        max_lines=1,
        scale=0,
        min_width=230,
    )
    parts.fill(trigger, lambda: project.draft().get("trigger", ""))
    save = gr.on(edited(trigger), lambda text: project.keep(trigger=text.strip()), trigger, None, **TYPING)
    parts.action(save)
    parts.trigger = trigger


def _grid(moment: Moment) -> str:
    project, plan = moment.desk.project, moment.plan
    return grid(
        project.dataset(), project.dataset_folder, plan.base, plan.config.train.resolution, mark(plan)
    )


def _findings(moment: Moment) -> str:
    project = moment.desk.project
    dataset, skipped = project.dataset(), [] if project.uses_demo else project.notes
    return findings(dataset, skipped, project.uses_demo, too_long(dataset, moment.plan))
