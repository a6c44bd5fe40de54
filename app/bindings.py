"""How tabs plug into the page: cards and fields that follow the snapshot, fields filled at load.

Each declares a function of the snapshot. The live stream sends the HTML of cards; Gradio's own fields are
updated by an event that the page triggers when the stream tells that they changed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from app.state import AppState, Snapshot
from lora_core.system.files import clean_value

# Options of every event: a plain function that completes even if the page is closed.
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
# For typing, sliding and choosing: while one event runs, only the latest one waits.
TYPING: dict[str, Any] = {**QUIET, "trigger_mode": "always_last"}


MOUNTED = "(window.easelMounted ??= []).push({{ name: {name!r}, element, trigger }}); window.easel?.mount();"
"""Tells the page's script of an element of ours that Gradio has made, now or later."""


@dataclass
class Bindings:
    """What the tabs register with the page.

    Attributes:
        parts: by the name of a card, the function of the snapshot that gives its HTML.
        updates: Gradio's fields, each with the function of the snapshot that gives its update.
        initial: components, each with what gives its value when the page opens.
    """

    app_state: AppState
    parts: dict[str, Callable[[Snapshot], str]] = field(default_factory=dict)
    updates: list[tuple[Any, Callable[[Snapshot], Any]]] = field(default_factory=list)
    initial: list[tuple[Any, Callable[[], Any]]] = field(default_factory=list)
    trigger: Any = None
    use_demo: Any = None

    def follow(self, component: Any, shows: Callable[[Snapshot], Any]) -> Any:
        """Show `shows(snapshot)` in `component`: HTML in a block of HTML, an update of another component."""
        if isinstance(component, gr.HTML):
            name = component.elem_id or f"part-{len(self.parts)}"
            component.js_on_load = MOUNTED.format(name=name)
            self.parts[name] = shows
        else:
            self.updates.append((component, shows))
        return component

    def fill_on_load(self, component: Any, value: Callable[[], Any]) -> Any:
        """Fill `component` when the page opens."""
        self.initial.append((component, value))
        return component

    def initial_values(self) -> list[Any]:
        """The values of all fields filled at load, in order."""
        return [clean_value(value()) for _, value in self.initial]


def html_block(shows: Callable[[], str] = str, **options: Any) -> Any:
    """An HTML component without Gradio's frame; it shows what `shows` gives in the page's language."""
    made: Any = gr.HTML(shows(), padding=False, apply_default_css=False, js_on_load=None, **options)
    made.shows = shows
    return made


def text_field(label: str, name: str, placeholder: str, **options: Any) -> Any:
    """A text box of one line."""
    return gr.Textbox(label=label, elem_id=name, placeholder=placeholder, lines=1, max_lines=1, **options)


def edit_events(component: Any) -> list[Any]:
    """The events that mean the user edited a field.

    A text box swallows the first input event after its value was set, so leaving it counts too. Its change
    event is no use: it fires with empty fields before the draft is loaded.
    """
    return [component.input, component.blur] if isinstance(component, gr.Textbox) else [component.input]
