"""The window at one moment: read once a poll, then shown by many pieces; and how a piece says what it
shows."""

from dataclasses import dataclass

from app.jobs import LIVE, RESUMABLE, RunView
from app.preview.page_state import PreviewState
from app.state import AppState
from app.train.form import Plan
from lora_core.runs.progress import Progress


@dataclass(frozen=True)
class Snapshot:
    """What the pieces of a page need, read once."""

    app_state: AppState
    run_view: RunView | None
    state: str
    runs: list[tuple[RunView, str]]
    view: PreviewState
    plan: Plan

    @property
    def progress(self) -> Progress:
        """Of the shown run; empty where there is none."""
        return self.run_view.progress if self.run_view else Progress()

    @property
    def live(self) -> bool:
        """Whether a run is going on."""
        return self.state in LIVE

    @property
    def resumable(self) -> bool:
        """Whether the shown run can be gone on with."""
        return self.state in RESUMABLE and self.run_view is not None

    @property
    def asks(self) -> bool:
        """Whether the shown run ended to ask if it may go on with what has changed."""
        return self.run_view is not None and asks_to_accept(self.run_view, self.state)

    @property
    def busy(self) -> bool:
        """Whether something changes by itself, so that pages should look often."""
        app_state = self.app_state
        # Between two runs of a queue none is live.
        working = app_state.prober.active or app_state.queue.is_running or app_state.downloads.active
        return self.live or self.view.working or working


def asks_to_accept(run_view: RunView, state: str) -> bool:
    """Whether a run ended to ask if it may go on with what has changed."""
    return state == "failed" and bool(run_view.changed)


def take_snapshot(app_state: AppState) -> Snapshot:
    """Read everything once."""
    runs = [(run_view, app_state.jobs.state(run_view)) for run_view in app_state.jobs.all()]
    run_view = app_state.jobs.current()
    state = next((s for w, s in runs if w is run_view), "none")
    return Snapshot(app_state, run_view, state, runs, app_state.render_queue.view(), Plan(app_state.project))
