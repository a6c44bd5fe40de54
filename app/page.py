"""The page: header, four tabs, one load event, one poll."""

import functools
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr

from app import header
from app.desk import Desk
from app.moment import Moment, moment_of
from app.parts import QUIET, Parts, piece
from app.tabs import dataset, export, preview, train
from app.tabs.train import asked
from app.words import safe
from lora_core.spec.errors import LoraError
from lora_core.spec.paths import ASSETS

TABS = (dataset, train, preview, export)
LIVE_EVERY, IDLE_EVERY = 1.0, 5.0
SCRIPTS = ("window.js", "folder_drop.js")

WELCOME = """<h2>Teach a picture model something new, on your own computer</h2>
<p>1. Drop pictures of one thing or one style. &nbsp; 2. Press Start. &nbsp; 3. Move the strength slider, take
the file.</p> <p class="small">No pictures at hand? The demo trains a style in about two minutes, without a
GPU.</p>"""


def build_page(desk: Desk) -> gr.Blocks:
    """The whole page over one desk."""
    parts = Parts(desk)
    page: gr.Blocks
    with gr.Blocks(
        title=header.TITLE, analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)
    ) as page:
        _header(parts)
        with gr.Row(elem_id="welcome", visible=False) as welcome:
            piece(WELCOME, elem_classes="grow")
            use_demo = gr.Button(
                "Try it with the demo", variant="primary", elem_id="use-demo", min_width=0, scale=0
            )
        parts.live(welcome, lambda m: gr.update(visible=desk.is_new()))
        with gr.Tabs(elem_id="tabs") as tabs:
            for tab in TABS:
                with gr.Tab(tab.TITLE, id=tab.TITLE, render_children=True):
                    tab.build(parts)
        _wire_demo(parts, use_demo, tabs)
        _poll(parts, page)
    return page


def _header(parts: Parts) -> None:
    with gr.Row(elem_id="easel-header"):
        with gr.Row(elem_classes="brand-row"):
            piece(header.brand())
            parts.live(piece(), header.project_chip)
        parts.live(piece(elem_classes="grow"), header.run_bar)
        with gr.Row(elem_classes="header-actions"):
            for do in ("pause", "stop"):
                button = gr.Button(do.title(), elem_id=do, min_width=0, scale=0, visible="hidden")
                parts.live(button, functools.partial(_request_button, do))
                parts.action(button.click(functools.partial(asked, parts, do), None, None, **QUIET))
            resume = gr.Button("Resume", elem_id="resume", min_width=0, scale=0, visible="hidden")
            parts.live(resume, lambda m: gr.update(visible=True if m.resumable and not m.live else "hidden"))
            parts.live(piece(), lambda m: header.memory())
            piece(header.theme_switch())
    note = piece(elem_id="header-note")

    def resumed() -> str:
        moment = moment_of(parts.desk)
        try:
            if moment.watch is not None:
                parts.desk.jobs.resume(moment.watch.run.name)
        except LoraError as error:
            return f'<p class="problem" role="alert">{safe(error)}</p>'
        return ""

    parts.action(resume.click(resumed, None, note, **QUIET))


def _request_button(do: str, moment: Moment) -> Any:
    asked_already = moment.state in ("pausing", "stopping")
    return gr.update(visible=True if moment.live else "hidden", interactive=not asked_already)


def _wire_demo(parts: Parts, use_demo: Any, tabs: Any) -> None:
    project = parts.desk.project
    filled = [fill.component for fill in parts.fills]

    def to_demo() -> list[Any]:
        project.keep(
            dataset="demo", level="demo", goal="style", values={}, trigger="", preview={}, preview_lora=""
        )
        return [gr.Tabs(selected="Train"), *parts.filled()]

    def to_own() -> list[Any]:
        project.keep(dataset="", level="", values={}, preview={}, preview_lora="")
        return parts.filled()

    parts.action(use_demo.click(to_demo, None, [tabs, *filled], **QUIET))
    own = gr.Button("Use my own pictures", elem_id="use-own", visible="hidden")
    parts.action(own.click(to_own, None, filled, **QUIET))


def _poll(parts: Parts, demo: gr.Blocks) -> None:
    """One load, one timer, one hidden button: all ask the same question, and get only what changed."""
    desk = parts.desk
    timer = gr.Timer(LIVE_EVERY)
    parts.live(timer, lambda m: gr.update(value=LIVE_EVERY if m.busy else IDLE_EVERY))
    refresh = gr.Button("Look again", elem_id="refresh", visible="hidden")
    seen = gr.State({})
    outputs = [seen, *(live.component for live in parts.lives)]

    def look(before: dict[int, str]) -> list[Any]:
        moment = moment_of(desk)
        values = [live.shows(moment) for live in parts.lives]
        now = {index: _fingerprint(value) for index, value in enumerate(values)}
        fresh = [v if now[i] != before.get(i) else gr.skip() for i, v in enumerate(values)]
        return [now if now != before else gr.skip(), *fresh]

    def opened() -> list[Any]:
        desk.worker.warm()
        desk.tools.look()
        desk.project.forget()
        return [*parts.filled(), *look({})]

    filled = [fill.component for fill in parts.fills]
    demo.load(opened, None, [*filled, *outputs], **QUIET)
    gr.on([timer.tick, refresh.click], look, seen, outputs, **QUIET)
    for event in parts.actions:
        event.then(look, seen, outputs, **QUIET)


def _fingerprint(value: Any) -> str:
    return value if isinstance(value, str) and len(value) < 80 else str(hash(repr(value)))


def head() -> str:
    """What the page loads besides Gradio: our own style and scripts, by addresses that change with the
    files."""
    version = max(int((ASSETS / name).stat().st_mtime) for name in (*SCRIPTS, "style.css"))
    scripts = "".join(f'<script defer src="/easel/assets/{name}?v={version}"></script>' for name in SCRIPTS)
    return (
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon"'
        f' href="/easel/assets/icon.svg"><link rel="stylesheet" href="/easel/assets/style.css?v={version}">'
        + scripts
    )


def mount(app: Any, desk: Desk, temporary: Path) -> Any:
    """Mount the page on a FastAPI app, with every switch of Gradio's that reaches outside turned off."""
    temporary.mkdir(parents=True, exist_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = str(temporary)
    page = build_page(desk)
    queue: Any = getattr(page, "_queue", None)
    if queue is not None and hasattr(queue, "sleep_when_free"):
        # Gradio looks at its queue each millisecond for ever; 20 times a second is as good and costs half of
        # it.
        queue.sleep_when_free = 0.05
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
        max_file_size="2gb",
        theme=gr.themes.Base(),
        head=head(),
    )
