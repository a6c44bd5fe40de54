"""The tabs of the window.

To add one, write its view and routes and a script in `assets/`, and add a row here: the page, the
server and the list of served assets are made from `TABS`.
"""

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fastapi import FastAPI

from app.bindings import Bindings
from app.dataset.view import add_dataset_routes, build_dataset
from app.export.view import add_export_routes, build_export
from app.preview.routes import add_preview_routes
from app.preview.view import build_preview
from app.state import AppState
from app.toolbox.view import add_toolbox_routes, build_toolbox
from app.train.view import add_run_routes, build_train
from lora_core.report.plots import SCRIPTS
from lora_core.system.files import ASSETS


@dataclass(frozen=True)
class Tab:
    """One tab.

    Attributes:
        title: on the tab, and its id.
        build: lays out the tab's components inside an open Gradio context.
        add_routes: adds its routes to the server.
        scripts: its JavaScript, files in `assets/`.
        styles: its CSS, files in `assets/`.
    """

    title: str
    build: Callable[[Bindings], None]
    add_routes: Callable[[FastAPI, AppState], None]
    scripts: tuple[str, ...] = ()
    styles: tuple[str, ...] = ()


TABS = (
    Tab(
        "Dataset", build_dataset, add_dataset_routes,
        ("dataset.js", "dataset_tools.js", "dataset_learned.js", "dataset_mask.js"), ("dataset.css",),
    ),
    Tab("Train", build_train, add_run_routes, ("train.js", "timeline.js")),
    Tab("Preview", build_preview, add_preview_routes, ("preview.js",), ("preview.css",)),
    Tab("Export", build_export, add_export_routes, ("export.js",)),
    Tab("Toolbox", build_toolbox, add_toolbox_routes, ("toolbox.js",), ("analysis.css",)),
)  # fmt: skip


@functools.cache
def list_assets() -> dict[str, bytes]:
    """What the page loads of `assets/`: scripts and styles as one file each, the shared ones first."""
    scripts = (
        "window.js",
        *SCRIPTS,
        "lightbox.js",
        "folder_drop.js",
        "projects.js",
        *(name for tab in TABS for name in tab.scripts),
    )
    styles = ("style.css", "charts.css", *(name for tab in TABS for name in tab.styles))
    return {"page.js": _join(scripts), "page.css": _join(styles), "icon.svg": _join(("icon.svg",))}


def _join(names: Iterable[str]) -> bytes:
    """The files without indentation and lines of comments; no text in them goes over a line's end."""
    return b"\n".join(
        re.sub(rb"(?m)^[ \t]+(//.*)?|^//.*", b"", (ASSETS / name).read_bytes()) for name in names
    )
