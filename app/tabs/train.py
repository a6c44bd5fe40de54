"""The Train tab: five settings, the rest folded; what will happen; Start; and the run as it goes."""

import gradio as gr

from app.parts import Parts, piece
from app.train import cards
from app.train.run_list import earlier, queue_card
from app.train.samples import samples
from app.train.starting import build_like, build_start
from app.train.telling import build_telling
from app.train.train_form import TrainForm

TITLE = "Train"


def build(parts: Parts) -> None:
    """Lay out the tab and wire it."""
    with gr.Row(elem_classes="page page-train"):
        with gr.Column(elem_classes="side card"):
            form = TrainForm(parts)
            build_like(parts, form)
            build_telling(parts)
            build_start(parts, form)
        with gr.Column(elem_classes="main"):
            parts.live(piece(elem_id="run-card"), cards.run_card)
            parts.live(piece(elem_id="queue"), queue_card)
            parts.live(piece(elem_id="charts"), cards.charts)
            parts.live(piece(elem_id="samples"), samples)
            parts.live(piece(elem_id="earlier"), earlier)
            parts.live(piece(elem_id="run-log"), cards.log_card)
