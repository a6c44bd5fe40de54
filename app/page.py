"""The page: header, four tabs, one load event, one poll."""

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr

from app import header
from app.desk import Desk
from app.moment import moment_of
from app.parts import QUIET, TYPING, Parts, piece
from app.projects import picker as project_picker
from app.routes import SCRIPTS, STYLES
from app.tabs import dataset, export, preview, train
from app.train import welcome
from lora_core.spec.paths import ASSETS

TABS = (dataset, train, preview, export)
LIVE_EVERY, IDLE_EVERY = 1.0, 5.0
REST = 0.25


def build_page(desk: Desk) -> gr.Blocks:
    """The whole page over one desk."""
    parts = Parts(desk)
    page: gr.Blocks
    with gr.Blocks(
        title=header.TITLE, analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)
    ) as page:
        _header(parts)
        demo = welcome.build(parts)
        with gr.Tabs(elem_id="tabs") as tabs:
            for tab in TABS:
                with gr.Tab(tab.TITLE, id=tab.TITLE, render_children=True):
                    tab.build(parts)
        welcome.wire(parts, demo, tabs)
        _poll(parts, page)
    return page


def _header(parts: Parts) -> None:
    with gr.Row(elem_id="easel-header"):
        with gr.Row(elem_classes="brand-row"):
            piece(header.brand())
            parts.live(piece(), project_picker.project_button)
        parts.live(piece(elem_classes="grow"), header.run_bar)
        with gr.Row(elem_classes="header-actions"):
            parts.live(piece(), header.run_actions)
            parts.live(piece(), lambda m: header.memory(m.desk.hardware.card()))
            piece(header.tools())
    piece(header.NOTE)
    piece(project_picker.DIALOG)


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
    refill = gr.Button("Fill the form again", elem_id="refill", visible="hidden")
    parts.action(refill.click(parts.filled, None, filled, **QUIET))
    # What was asked for during a look is looked for after it.
    gr.on([timer.tick, refresh.click], look, seen, outputs, **TYPING)
    for event in parts.actions:
        event.then(look, seen, outputs, **QUIET)


def _fingerprint(value: Any) -> str:
    return value if isinstance(value, str) and len(value) < 80 else str(hash(repr(value)))


def head() -> str:
    """What the page loads besides Gradio: our own style and scripts, by addresses that change with the
    files."""
    version = max(int((ASSETS / name).stat().st_mtime) for name in (*SCRIPTS, *STYLES))
    scripts = "".join(f'<script defer src="/easel/assets/{name}?v={version}"></script>' for name in SCRIPTS)
    styles = "".join(f'<link rel="stylesheet" href="/easel/assets/{name}?v={version}">' for name in STYLES)
    return (
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon"'
        f' href="/easel/assets/icon.svg">{styles}{scripts}'
    )


def calm(queue: Any) -> None:
    """Have Gradio's queue rest.

    It looks for work each millisecond and for progress each hundredth of a second, for ever, which is most of
    what an idle window costs; no event of ours goes through it.
    """
    for name in ("sleep_when_free", "progress_update_sleep_when_free"):
        if hasattr(queue, name):
            setattr(queue, name, REST)


def mount(app: Any, desk: Desk, temporary: Path) -> Any:
    """Mount the page on a FastAPI app, with every switch of Gradio's that reaches outside turned off."""
    temporary.mkdir(parents=True, exist_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = str(temporary)
    page = build_page(desk)
    calm(getattr(page, "_queue", None))
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
