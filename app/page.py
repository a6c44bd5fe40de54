"""The page: its tabs and header, what fills their fields, and what of them follows the state.

To add a tab, write its view and routes and a script in `assets/`, and add a row to `TABS`: the page, the
server and the list of served assets are made from it.
"""

import contextlib
import functools
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
from fastapi import FastAPI

from app import top_bar
from app.dataset.view import add_dataset_routes, build_dataset
from app.export.view import add_export_routes, build_export
from app.gradio_modules import bundle_modules, serve_page
from app.preview.view import add_preview_routes, build_preview
from app.routes import BadRequest, add_actions, add_assets
from app.state import AppState, Bindings, take_snapshot
from app.templates import (
    LANGUAGES,
    MOUNTED,
    QUIET,
    TYPING,
    WORDS,
    _,
    html_block,
    language_tag,
    preferred_language,
    render,
    script_words,
)
from app.toolbox.view import add_toolbox_routes, build_toolbox
from app.train.view import add_run_routes, build_train
from lora_core.projects.project import DEMO_TITLE, Project
from lora_core.report.plots import SCRIPTS
from lora_core.system.files import ASSETS, clean_value, write_atomically

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")


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
        ("dataset.js", "dataset_tools.js", "dataset_learned.js", "mask.js"), ("dataset.css",),
    ),
    Tab("Train", build_train, add_run_routes, ("train.js", "timeline.js")),
    Tab("Preview", build_preview, add_preview_routes, ("preview.js",), ("preview.css",)),
    Tab("Export", build_export, add_export_routes, ("export.js",)),
    Tab("Toolbox", build_toolbox, add_toolbox_routes, ("toolbox.js",), ("analysis.css",)),
)  # fmt: skip


@functools.cache
def list_assets() -> dict[str, bytes]:
    """What the page loads of `assets/`: scripts and styles as one file each, the shared ones first; and what
    draws a chart, once there is one."""
    uplot, charts = SCRIPTS
    scripts = (
        "window.js",
        charts,
        "lightbox.js",
        "folder_drop.js",
        "projects.js",
        *(name for tab in TABS for name in tab.scripts),
    )
    styles = ("style.css", "charts.css", *(name for tab in TABS for name in tab.styles))
    files = {"page.js": scripts, "page.css": styles, "uplot.js": (uplot,), "icon.svg": ("icon.svg",)}
    return {name: _join(parts) for name, parts in files.items()}


def _join(names: Iterable[str]) -> bytes:
    """The files without indentation and lines of comments; no text in them goes over a line's end."""
    return b"\n".join(
        re.sub(rb"(?m)^[ \t]+(//.*)?|^//.*", b"", (ASSETS / name).read_bytes()) for name in names
    )


REST = 2.0
Found = TypeVar("Found")


def build_page(app_state: AppState) -> gr.Blocks:
    """Build the page over `app_state`."""
    bindings = Bindings(app_state)
    page: gr.Blocks
    with gr.Blocks(
        title=top_bar.TITLE, analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)
    ) as page:
        hub = _header(bindings)
        for tab in TABS:
            with gr.Column(elem_id=f"page-{tab.title.lower()}", elem_classes="tabitem"):
                tab.build(bindings)
        wire_demo(bindings)
        _follow(bindings, page, hub)
    return page


def _header(bindings: Bindings) -> Any:
    """Lay out the header; returns the block that lets the page's script trigger events of Gradio."""
    with gr.Row(elem_id="easel-header"):
        with gr.Row(elem_classes="brand-row"):
            html_block(top_bar.brand)
            bindings.follow(html_block(), top_bar.project_button)
        html_block(lambda: render("header.html", part="tabs", tabs=TABS), elem_id="tabs")
        bindings.follow(html_block(elem_id="run-bar", elem_classes="grow"), top_bar.run_bar)
        with gr.Row(elem_classes="header-actions"):
            bindings.follow(html_block(), top_bar.run_actions)
            bindings.follow(html_block(), top_bar.memory_usage)
            tools = {
                "has_password": bindings.app_state.has_password,
                "has_documents": top_bar.has_documents(),
                "languages": LANGUAGES,
            }
            html_block(lambda: render("header.html", part="tools", **tools))
    hub = html_block(lambda: render("header.html", part="notes"))
    hub.js_on_load = MOUNTED.format(name="hub")
    bindings.follow(html_block(), top_bar.draft_note)
    html_block(lambda: render("projects.html", part="dialog"))
    return hub


def _follow(bindings: Bindings, demo: gr.Blocks, hub: Any) -> None:
    """Wire the load event, the live stream, and the events by which the page has Gradio's fields updated."""
    app_state = bindings.app_state

    def look() -> tuple[dict[str, Any], bool]:
        def shown() -> tuple[dict[str, Any], bool]:
            snapshot = take_snapshot(app_state)
            parts = {name: shows(snapshot) for name, shows in bindings.parts.items()}
            fields = [zlib.crc32(repr(shows(snapshot)).encode()) for _, shows in bindings.updates]
            return {**parts, "fields": fields, "version": f"{version} {WORDS.served}"}, snapshot.busy

        # Writes what a full disk refused.
        app_state.project.write_draft()
        # The grid first: to count what is in the captions would hold it up. And here, as the list needs the
        # project's lock, which a look without the draft holds.
        with app_state.listing:
            pass
        return _retry_without_draft(app_state.project, shown)

    def filled_in() -> list[Any]:
        values = bindings.initial_values()
        for (component, _value), value in zip(bindings.initial, values, strict=True):
            if not isinstance(value, dict):
                # Values a field cannot show fail here, where the draft can be set aside.
                component.postprocess(value)
        return values

    def opened() -> list[Any]:
        app_state.worker.warm()
        app_state.tools.look()
        app_state.project.invalidate()
        return _retry_without_draft(app_state.project, filled_in)

    def update(event: gr.EventData) -> list[Any]:
        """The fields of Gradio that the page asks for, by their place in `updates`."""
        snapshot, asked = take_snapshot(app_state), event.fields
        shown = enumerate(shows for _, shows in bindings.updates)
        return [clean_value(shows(snapshot)) if at in asked else gr.skip() for at, shows in shown]

    # An open page of another version, or in another language, reloads itself.
    version = sum(map(zlib.crc32, list_assets().values()))
    app_state.live.look = look
    filled = [component for component, _ in bindings.initial]
    demo.load(opened, None, filled, **QUIET).then(None, js="() => window.easel.formShown()", **QUIET)
    # One that is asked for while another is under way brings newer values: it comes after it.
    hub.submit(bindings.initial_values, None, filled, **TYPING)
    # Fields that change during an update are asked for after it.
    hub.change(update, None, [component for component, _ in bindings.updates], **TYPING)


def _retry_without_draft(project: Project, work: Callable[[], Found]) -> Found:
    """Run `work`; if the project's draft makes it fail, set the draft aside and run it again.

    A draft that could not even be read is set aside before.
    """
    # Where the folder cannot be written, the page still says where the draft is.
    with contextlib.suppress(OSError):
        project.set_unreadable_draft_aside()
    try:
        return work()
    except Exception:
        with project.without_draft():
            values = work()
        logging.getLogger(__name__).exception("The draft of %s cannot be shown", project.path)
        project.set_draft_aside()
        return values


def slow_queue_polling(page: gr.Blocks) -> None:
    """Make Gradio's queue poll rarely; the only place that touches Gradio's private attributes.

    The queue polls for work every millisecond and for progress every 10 ms, which is most of what an idle
    window costs, and no event of ours goes through it.
    """
    queue = getattr(page, "_queue", None)
    for name in ("sleep_when_free", "progress_update_sleep_when_free"):
        if hasattr(queue, name):
            setattr(queue, name, REST)


TEXTS = ("label", "info", "placeholder", "choices")
"""Attributes of Gradio's components that are texts of ours."""


def follow_language(app: Any, app_state: AppState, page: gr.Blocks) -> None:
    """Let the page speak another language: the first browser's own, until one is chosen."""
    file = app_state.workspace / "language.txt"
    blocks: list[Any] = list(page.blocks.values())
    texts = [(block, name) for block in blocks for name in TEXTS if getattr(block, name, None)]
    # A field's value is what a user typed; a button's is a text of ours.
    texts += [(block, "value") for block in blocks if isinstance(block, gr.Button)]
    english = [(block, name, getattr(block, name)) for block, name in texts]

    def speak(language: str) -> None:
        if language not in LANGUAGES:
            raise BadRequest("no such language")
        WORDS.speak(language)
        for block, name, text in english:
            setattr(block, name, [(_(title), key) for title, key in text] if name == "choices" else _(text))
        for block in blocks:
            if hasattr(block, "shows"):
                block.value = block.shows()
        page.config = page.get_config_file()
        # Open pages reload for it, so last.
        WORDS.served = language

    def choose(sent: dict[str, Any]) -> None:
        speak(str(sent.get("language")))
        write_atomically(file, WORDS.language.encode())

    def greet(header: str) -> None:
        # Where the folder cannot be written, the page is served all the same.
        with contextlib.suppress(OSError):
            if header and not file.exists():
                choose({"language": preferred_language(header)})

    add_actions(app, {"language": choose})
    with contextlib.suppress(OSError, ValueError, BadRequest):
        speak(file.read_text("utf-8"))
    app_state.greet = greet


def mount(app: Any, app_state: AppState, temporary: Path) -> Any:
    """Mount the page on a FastAPI app with all of Gradio's network features turned off."""
    temporary.mkdir(parents=True, exist_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = str(temporary)
    WORDS.speak("en")
    page = build_page(app_state)
    slow_queue_polling(page)
    follow_language(app, app_state, page)
    bundle = bundle_modules(block.get_block_name() for block in page.blocks.values())
    files = list_assets() | bundle
    add_assets(app, files, app_state.workspace / "cache" / "assets")
    # Their addresses change when they do.
    values = {"versions": {name: zlib.crc32(data) for name, data in files.items()}, "tabs": TABS}
    if bundle:
        scripts = files["page.js"]
        serve_page(
            render("page.html", title=top_bar.TITLE, **values),
            {"language": language_tag, "script_words": lambda: script_words(WORDS.language, scripts)},
        )
    return gr.mount_gradio_app(
        app,
        page,
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        show_error=True,
        # Own fonts would be loaded first and not be used.
        theme=gr.themes.Base(font=["sans-serif"], font_mono=["monospace"]),
        head=None if bundle else render("head.html", **values),
    )


def wire_demo(bindings: Bindings) -> None:
    """Make the demo button open the demo's own project, fill the form and open the Train tab."""
    app_state, project = bindings.app_state, bindings.app_state.project
    filled = [component for component, _ in bindings.initial]

    def to_demo() -> list[Any]:
        """Fill the form first and switch tabs afterwards, so that nothing typed meanwhile is overwritten."""
        app_state.projects.open_titled(DEMO_TITLE)
        app_state.reset_project_view()
        project.update_draft(
            dataset="demo", level="demo", goal="style", values={}, trigger="", preview={}, preview_loras={}
        )
        return bindings.initial_values()

    filled_in = bindings.use_demo.click(to_demo, None, filled, **QUIET)
    filled_in.then(None, js="() => window.easel.openTab('Train')", **QUIET)
