"""The Dataset tab: bring pictures in, see them, write their captions.

Its pieces are HTML of our own, drawn in the browser over own routes; Gradio holds the trigger word, which the
Train tab needs, and tells pages when something changed.
"""

import gradio as gr

from app.dataset.gallery import Findings, marks
from app.dataset.pieces import DETAIL, DROP, GRID, LEARNED, TOOLBAR, TOOLS, TRIGGER, WORDS
from app.parts import TYPING, Parts, edited, piece
from app.train.plan import Plan

TITLE = "Dataset"
FIRST_SEEN = 48
"""Pictures of which the thumbnails are made while an import still shows its bar."""


def build(parts: Parts) -> None:
    """Lay out the tab and wire it."""
    found, project = Findings(), parts.desk.project
    desk = parts.desk

    def imported() -> None:
        found.html(project, Plan(project))
        desk.thumbs.prepare([record.path for record in project.dataset().records[:FIRST_SEEN]])

    desk.importer.after = imported
    with gr.Row(elem_classes="page page-dataset"):
        with gr.Column(elem_classes="main"):
            piece(DROP)
            with gr.Row(elem_classes="toolbar"):
                piece(TOOLBAR, elem_classes="grow")
                _trigger(parts)
                piece(TRIGGER, elem_classes="beside")
            piece(WORDS)
            piece(GRID, elem_id="dataset-grid")
            parts.live(piece(elem_classes="after"), lambda m: found.html(m.desk.project, m.plan))
            piece(TOOLS, elem_classes="after")
            piece(LEARNED, elem_classes="after")
            parts.live(piece(), lambda m: marks(m.desk.project, m.plan))
        piece(DETAIL, elem_classes="side")


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
        interactive=False,
    )
    # What is typed before the draft has been filled in would be overwritten by it.
    parts.fill(trigger, lambda: gr.update(value=project.draft().get("trigger", ""), interactive=True))
    save = gr.on(edited(trigger), lambda text: project.keep(trigger=text.strip()), trigger, None, **TYPING)
    parts.action(save)
    parts.trigger = trigger
