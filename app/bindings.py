"""How the tabs plug into the page: what follows the snapshot, what is filled in at load, what makes the page
look again.

There is one load event and one poll for the whole page. Each piece says what it shows; only what changed is
sent.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from app.state import AppState, Snapshot

# Every event of the window: a plain function that runs to its end, also when the page is closed meanwhile.
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
# For typing, sliding and choosing: while one is under way only the newest of those that follow is kept.
TYPING: dict[str, Any] = {**QUIET, "trigger_mode": "always_last"}


@dataclass(frozen=True)
class Live:
    """A component that follows the snapshot."""

    component: Any
    shows: Callable[[Snapshot], Any]


@dataclass(frozen=True)
class Initial:
    """A component that is filled from the draft when the page opens."""

    component: Any
    value: Callable[[], Any]


@dataclass
class Bindings:
    """What the tabs hand to the page."""

    app_state: AppState
    live: list[Live] = field(default_factory=list)
    initial: list[Initial] = field(default_factory=list)
    refreshing: list[Any] = field(default_factory=list)
    trigger: Any = None

    def follow(self, component: Any, shows: Callable[[Snapshot], Any]) -> Any:
        """Have a component follow the snapshot."""
        self.live.append(Live(component, shows))
        return component

    def fill_on_load(self, component: Any, value: Callable[[], Any]) -> Any:
        """Have a component filled at load."""
        self.initial.append(Initial(component, value))
        return component

    def refresh_after(self, event: Any) -> Any:
        """Have the page look again after an event."""
        self.refreshing.append(event)
        return event

    def initial_values(self) -> list[Any]:
        """The values of all filled components, in their order."""
        return [fill.value() for fill in self.initial]


def html_block(value: str = "", **options: Any) -> Any:
    """A piece of our own HTML, without the frame and the type that Gradio would give it."""
    return gr.HTML(value, padding=False, apply_default_css=False, js_on_load=None, **options)


def edit_events(component: Any) -> list[Any]:
    """The events of a person's editing a field.

    A text box swallows the first input after a value was put into it, a paste as well as a key: leaving it
    counts too. Its change event is of no use here, as it fires with empty fields before the draft is filled
    in.
    """
    return [component.input, component.blur] if isinstance(component, gr.Textbox) else [component.input]
