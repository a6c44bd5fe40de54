"""The window at one moment: read once a poll, then shown by many pieces; and how a piece says what it
shows."""

from dataclasses import dataclass

from app.jobs import LIVE, RESUMABLE, RunView
from app.preview.page_state import View
from app.state import Desk
from app.train.form import Plan
from lora_core.runs.progress import Progress


@dataclass(frozen=True)
class Moment:
    """What the pieces of a page need, read once."""

    desk: Desk
    watch: RunView | None
    state: str
    runs: list[tuple[RunView, str]]
    view: View
    plan: Plan

    @property
    def progress(self) -> Progress:
        """Of the shown run; empty where there is none."""
        return self.watch.progress if self.watch else Progress()

    @property
    def live(self) -> bool:
        """Whether a run is going on."""
        return self.state in LIVE

    @property
    def resumable(self) -> bool:
        """Whether the shown run can be gone on with."""
        return self.state in RESUMABLE and self.watch is not None

    @property
    def asks(self) -> bool:
        """Whether the shown run ended to ask if it may go on with what has changed."""
        return self.watch is not None and asks(self.watch, self.state)

    @property
    def busy(self) -> bool:
        """Whether something changes by itself, so that pages should look often."""
        desk = self.desk
        # Between two runs of a queue none is live.
        working = desk.prober.active or desk.queue.is_running or desk.downloads.active
        return self.live or self.view.working or working


def asks(watch: RunView, state: str) -> bool:
    """Whether a run ended to ask if it may go on with what has changed."""
    return state == "failed" and bool(watch.changed)


def moment_of(desk: Desk) -> Moment:
    """Read everything once."""
    runs = [(watch, desk.jobs.state(watch)) for watch in desk.jobs.all()]
    watch = desk.jobs.current()
    state = next((s for w, s in runs if w is watch), "none")
    return Moment(desk, watch, state, runs, desk.studio.view(), Plan(desk.project))
