"""How tabs plug into the page: components that follow the snapshot, fields filled at load, events that
refresh.

There is one load event and one poll for the whole page. A component declares a function of the snapshot; only
values that changed are sent.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from app.state import AppState, Snapshot

# Options of every event: a plain function that completes even if the page is closed.
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
# For typing, sliding and choosing: while one event runs, only the latest one waits.
TYPING: dict[str, Any] = {**QUIET, "trigger_mode": "always_last"}


@dataclass
class Bindings:
    """What the tabs register with the page.

    Attributes:
        live: components, each with the function of the snapshot that it shows.
        initial: components, each with what gives its value when the page opens.
    """

    app_state: AppState
    live: list[tuple[Any, Callable[[Snapshot], Any]]] = field(default_factory=list)
    initial: list[tuple[Any, Callable[[], Any]]] = field(default_factory=list)
    refreshing: list[Any] = field(default_factory=list)
    trigger: Any = None
    use_demo: Any = None

    def follow(self, component: Any, shows: Callable[[Snapshot], Any]) -> Any:
        """Update `component` with `shows(snapshot)` at each poll."""
        self.live.append((component, shows))
        return component

    def fill_on_load(self, component: Any, value: Callable[[], Any]) -> Any:
        """Fill `component` when the page opens."""
        self.initial.append((component, value))
        return component

    def refresh_after(self, event: Any) -> Any:
        """Poll right after `event`."""
        self.refreshing.append(event)
        return event

    def initial_values(self) -> list[Any]:
        """The values of all fields filled at load, in order."""
        return [value() for _, value in self.initial]


def html_block(value: str = "", **options: Any) -> Any:
    """An HTML component without Gradio's frame and typography."""
    return gr.HTML(value, padding=False, apply_default_css=False, js_on_load=None, **options)


def edit_events(component: Any) -> list[Any]:
    """The events that mean the user edited a field.

    A text box swallows the first input event after its value was set, so leaving it counts too. Its change
    event is no use: it fires with empty fields before the draft is loaded.
    """
    return [component.input, component.blur] if isinstance(component, gr.Textbox) else [component.input]
