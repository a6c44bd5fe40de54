"""The first visit: three lines, and a demo that goes from nothing to a strength strip with three clicks."""

from typing import Any

import gradio as gr

from app.bindings import QUIET, Bindings, html_block

TEXT = """<h2>Teach a picture model something new, on your own computer</h2>
<p>1. Drop pictures of one thing or one style. &nbsp; 2. Press Start. &nbsp; 3. Move the strength slider, take
the file.</p> <p class="small">No pictures at hand? The demo trains a style in a minute or two, without a
GPU.</p>"""


def build(bindings: Bindings) -> Any:
    """The three lines and the demo's button; gone once there is anything to see."""
    with gr.Row(elem_id="welcome", visible=False) as row:
        html_block(TEXT, elem_classes="grow")
        demo = gr.Button("Try it with the demo", variant="primary", elem_id="use-demo", min_width=0, scale=0)
    bindings.follow(row, lambda snap: gr.update(visible=snap.app_state.is_new()))
    return demo


def wire(bindings: Bindings, demo: Any, tabs: Any) -> None:
    """Have the demo's button fill the form in and show the Train tab, where Start stands ready."""
    project = bindings.app_state.project
    filled = [fill.component for fill in bindings.initial]

    def to_demo() -> list[Any]:
        """The form alone: the tab is shown only when it stands there, lest what is typed be overwritten."""
        project.keep(
            dataset="demo", level="demo", goal="style", values={}, trigger="", preview={}, preview_loras={}
        )
        return bindings.initial_values()

    def to_own() -> list[Any]:
        project.keep(dataset="", level="", values={}, preview={}, preview_loras={})
        return bindings.initial_values()

    filled_in = demo.click(to_demo, None, filled, **QUIET)
    bindings.refresh_after(filled_in.then(lambda: gr.Tabs(selected="Train"), None, tabs, **QUIET))
    own = gr.Button("Use my own pictures", elem_id="use-own", visible="hidden")
    bindings.refresh_after(own.click(to_own, None, filled, **QUIET))
