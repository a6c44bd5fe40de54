"""The page: header, welcome, tabs; one load event and one poll for all components."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr

from app import projects as project_picker
from app import tabs as registry
from app import top_bar
from app.bindings import QUIET, TYPING, Bindings, html_block
from app.state import AppState, take_snapshot
from app.templates import render
from lora_core.projects.project import DEMO_TITLE, Project
from lora_core.system.files import ASSETS, clean_value

LIVE_EVERY, IDLE_EVERY = 1.0, 5.0
REST = 0.25


def build_page(app_state: AppState) -> gr.Blocks:
    """Build the page over `app_state`."""
    bindings = Bindings(app_state)
    page: gr.Blocks
    with gr.Blocks(
        title=top_bar.TITLE, analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)
    ) as page:
        _header(bindings)
        with gr.Tabs(elem_id="tabs") as tabs:
            for tab in registry.TABS:
                with gr.Tab(tab.title, id=tab.title, render_children=True):
                    tab.build(bindings)
        wire_demo(bindings, tabs)
        _poll(bindings, page)
    return page


def _header(bindings: Bindings) -> None:
    with gr.Row(elem_id="easel-header"):
        with gr.Row(elem_classes="brand-row"):
            html_block(top_bar.brand())
            bindings.follow(html_block(), project_picker.project_button)
        bindings.follow(html_block(elem_classes="grow"), top_bar.run_bar)
        with gr.Row(elem_classes="header-actions"):
            bindings.follow(html_block(), top_bar.run_actions)
            bindings.follow(html_block(), top_bar.memory_usage)
            html_block(render("header.html", part="tools", has_password=bindings.app_state.has_password))
    html_block(render("header.html", part="notes"))
    bindings.follow(html_block(), top_bar.draft_note)
    html_block(render("projects.html"))


def _poll(bindings: Bindings, demo: gr.Blocks) -> None:
    """Wire one load event, one timer and one hidden refresh button; only values that changed are sent."""
    app_state = bindings.app_state
    timer = gr.Timer(LIVE_EVERY)
    bindings.follow(timer, lambda snap: gr.update(value=LIVE_EVERY if snap.busy else IDLE_EVERY))
    refresh = gr.Button("Look again", elem_id="refresh", visible="hidden")
    seen = gr.State({})
    outputs = [seen, *(component for component, _ in bindings.live)]

    def shown() -> list[Any]:
        snapshot = take_snapshot(app_state)
        return [_valid(shows(snapshot)) for _, shows in bindings.live]

    def filled_in() -> list[Any]:
        values = [_valid(value) for value in bindings.initial_values()]
        for (component, _), value in zip(bindings.initial, values, strict=True):
            if not isinstance(value, dict):
                # Values a field cannot show fail here, where the draft can be set aside.
                component.postprocess(value)
        return values

    def look(before: dict[int, str]) -> list[Any]:
        values = _retry_without_draft(app_state.project, shown)
        now = {index: _fingerprint(value) for index, value in enumerate(values)}
        fresh = [v if now[i] != before.get(i) else gr.skip() for i, v in enumerate(values)]
        return [now if now != before else gr.skip(), *fresh]

    def opened() -> list[Any]:
        app_state.worker.warm()
        app_state.tools.look()
        app_state.project.invalidate()
        return [*_retry_without_draft(app_state.project, filled_in), *look({})]

    filled = [component for component, _ in bindings.initial]
    demo.load(opened, None, [*filled, *outputs], **QUIET)
    refill = gr.Button("Fill the form again", elem_id="refill", visible="hidden")
    bindings.refresh_after(refill.click(bindings.initial_values, None, filled, **QUIET))
    # A refresh requested during a poll runs after it.
    gr.on([timer.tick, refresh.click], look, seen, outputs, **TYPING)
    for event in bindings.refreshing:
        event.then(look, seen, outputs, **QUIET)


def _retry_without_draft(project: Project, work: Callable[[], list[Any]]) -> list[Any]:
    """Run `work`; if the project's draft makes it fail, set the draft aside and run it again."""
    try:
        return work()
    except Exception:
        with project.without_draft():
            values = work()
        logging.getLogger(__name__).exception("The draft of %s cannot be shown", project.path)
        project.set_draft_aside()
        return values


def _valid(value: Any) -> Any:
    """Make a component's value or update safe to send as JSON."""
    return clean_value(value) if isinstance(value, str | int | float | list | dict) else value


def _fingerprint(value: Any) -> str:
    return value if isinstance(value, str) and len(value) < 80 else str(hash(repr(value)))


def head() -> str:
    """The page's own styles and scripts, with addresses that change when the files do."""
    script_files, style_files = registry.list_scripts(), registry.list_styles()
    version = max(int((ASSETS / name).stat().st_mtime) for name in (*script_files, *style_files))
    return render("head.html", scripts=script_files, styles=style_files, version=version)


def slow_queue_polling(page: gr.Blocks) -> None:
    """Make Gradio's queue poll rarely; the only place that touches Gradio's private attributes.

    The queue polls for work every millisecond and for progress every 10 ms, which is most of what an idle
    window costs, and no event of ours goes through it.
    """
    queue = getattr(page, "_queue", None)
    for name in ("sleep_when_free", "progress_update_sleep_when_free"):
        if hasattr(queue, name):
            setattr(queue, name, REST)


def mount(app: Any, app_state: AppState, temporary: Path) -> Any:
    """Mount the page on a FastAPI app with all of Gradio's network features turned off."""
    temporary.mkdir(parents=True, exist_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = str(temporary)
    page = build_page(app_state)
    slow_queue_polling(page)
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


def wire_demo(bindings: Bindings, tabs: Any) -> None:
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
    bindings.refresh_after(filled_in.then(lambda: gr.Tabs(selected="Train"), None, tabs, **QUIET))
