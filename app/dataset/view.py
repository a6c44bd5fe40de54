"""The Dataset tab: import images, browse them, write captions.

The templates are fixed but for `status.html` and `summary.html`; `assets/dataset.js`, `dataset_tools.js` and
`dataset_learned.js` draw into them. Gradio holds only the trigger word, which the Train tab needs.
"""

import gradio as gr

from app.bindings import TYPING, Bindings, edit_events, html_block
from app.dataset.gallery import DatasetSummary, page_versions
from app.state import Snapshot
from app.templates import render
from app.train.form import Plan
from lora_core.system.files import DEMO_TRAIN

FIRST_SEEN = 48
"""Images of which the thumbnails are made while an import still shows its bar."""
FILTERS = (
    ("all", "All"), ("bare", "Uncaptioned"), ("small", "Too small"), ("twins", "Duplicates"),
    ("doubt", "In doubt"), ("held", "Validation"), ("out", "Excluded"),
)  # fmt: skip


def build_dataset(bindings: Bindings) -> None:
    """Lay out the tab and wire it."""
    app_state, summary = bindings.app_state, DatasetSummary()
    project = app_state.project

    def imported() -> None:
        summary.read(project, Plan(project))
        app_state.thumbs.prepare([record.path for record in project.dataset().records[:FIRST_SEEN]])

    def status(snapshot: Snapshot) -> str:
        shown = summary.read(project, snapshot.plan) | page_versions(project, snapshot.plan)
        return render("dataset/status.html", **shown)

    app_state.importer.after = imported
    with gr.Row(elem_classes="page page-dataset"):
        with gr.Column(elem_classes="main"):
            html_block(render("dataset/import.html"))
            _welcome(bindings)
            bindings.follow(html_block(elem_id="dataset-notes"), status)
            with gr.Row(elem_classes="toolbar"):
                html_block(render("dataset/toolbar.html", filters=FILTERS), elem_classes="grow")
                _trigger(bindings)
                html_block(render("dataset/trigger.html"), elem_classes="beside")
            html_block(render("dataset/words.html"))
            html_block(render("dataset/tools.html"))
            html_block(render("dataset/grid.html"), elem_id="dataset-grid")
        html_block(render("dataset/detail.html"), elem_classes="side")
    bindings.follow(
        html_block(elem_id="dataset-bar"),
        lambda snap: render("dataset/summary.html", **summary.read(project, snap.plan)),
    )


def _welcome(bindings: Bindings) -> None:
    """The demo, offered on the first visit."""
    drawings = sorted(file.name for file in DEMO_TRAIN.glob("*.png"))
    with gr.Row(elem_id="welcome", visible=False) as row:
        words = render("dataset/welcome.html", drawings=drawings[::3], count=len(drawings))
        html_block(words, elem_classes="grow")
        bindings.use_demo = gr.Button("Try the demo", elem_id="use-demo", min_width=0, scale=0)
    bindings.follow(row, lambda snap: gr.update(visible=snap.app_state.is_new()))


def _trigger(bindings: Bindings) -> None:
    project = bindings.app_state.project
    trigger = gr.Textbox(
        label="Trigger word",
        elem_id="trigger",
        elem_classes="inline",
        placeholder="none",
        lines=1,
        max_lines=1,
        scale=0,
        min_width=230,
        interactive=False,
    )
    # Text typed before the draft is loaded would be overwritten by it.
    bindings.fill_on_load(
        trigger, lambda: gr.update(value=project.draft().get("trigger", ""), interactive=True)
    )
    gr.on(
        edit_events(trigger), lambda text: project.update_draft(trigger=text.strip()), trigger, None, **TYPING
    )
    bindings.trigger = trigger
