"""The part of the Export tab that puts the file where another tool looks for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from app.desk import Desk
from app.moment import Moment
from app.parts import TYPING, Parts, piece
from app.words import safe
from lora_core.spec.copying import Copied
from lora_core.spec.errors import RunError


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


def copied_line(desk: Desk, done: Copied) -> str:
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
