"""The rail of the Train tab: all runs in three groups, the queue in its order, and two runs side by side."""

from dataclasses import dataclass
from typing import Any

from app.jobs import LIVE
from app.state import ShownRun, Snapshot
from app.templates import render
from app.train.form import row_title
from app.train.run_cards import MOST_ROWS, run_url
from lora_core.errors import RunError
from lora_core.runs.events import PreviewDone
from lora_core.runs.progress import Progress, with_gain
from lora_core.runs.queue import FAILED, WAITING, QueuedRun
from lora_core.settings.config import FIELDS, label_of
from lora_core.system.files import file_bytes

MOST_EARLIER = 20
SPARK_WIDTH, SPARK_HEIGHT = 48, 20


@dataclass(frozen=True)
class _Row:
    """A run in the rail, with what the queue says of it and its place among those that wait."""

    run: ShownRun
    job: QueuedRun | None = None
    place: int = 0


def _render(snapshot: Snapshot, part: str, **values: Any) -> str:
    return render(
        "train/rail.html",
        part=part,
        shown=snapshot.shown.name,
        second=snapshot.second.name,
        url=run_url(snapshot),
        spark=sparkline,
        **values,
    )


def running(snapshot: Snapshot) -> str:
    """The heading, and the run that is going on."""
    rows = [_Row(ShownRun(view, state)) for view, state in snapshot.runs if state in LIVE]
    return _render(snapshot, "running", rows=rows) if snapshot.runs else ""


def queue_card(snapshot: Snapshot) -> str:
    """What waits, in order; "" where nothing does."""
    app_state = snapshot.app_state
    try:
        present = app_state.queue.queue.jobs()
    except RunError as error:
        return _render(snapshot, "queue", problem=str(error))
    runs = {view.run.name: ShownRun(view, state) for view, state in snapshot.runs}
    rows: list[_Row] = []
    waiting = 0
    for job in present:
        # A run that is trained now is listed above, and one that has ended below, unless its folder is gone.
        gone = ShownRun(app_state.jobs.run_view(app_state.queue.queue.run(job.run)), FAILED)
        run = runs.get(job.run, gone)
        if not run.live and (not job.has_ended or (job.state == FAILED and run is gone)):
            waiting += job.state == WAITING
            rows.append(_Row(run, job, waiting if job.state == WAITING else 0))
    is_running = app_state.queue.is_running
    values = {"problem": "", "running": is_running, "waiting": waiting, "rows": rows}
    return _render(snapshot, "queue", **values) if rows else ""


def earlier(snapshot: Snapshot) -> str:
    """The ended runs of the open project, newest first; those of other projects are folded below."""
    app_state = snapshot.app_state
    try:
        jobs = {job.run: job for job in app_state.queue.queue.jobs()}
    except RunError:
        jobs = {}
    listed: list[list[_Row]] = [[], []]
    more = [0, 0]
    for view, state in snapshot.runs:
        job, other = jobs.get(view.run.name), not app_state.jobs.own(view)
        if state in LIVE or (job and not job.has_ended):
            continue
        # The run shown is listed however old it is.
        if len(listed[other]) < MOST_EARLIER or view is snapshot.run_view:
            listed[other].append(_Row(ShownRun(view, state), job))
        else:
            more[other] += 1
    return _render(snapshot, "earlier", listed=listed, more=more) if any(listed) else ""


def sparkline(progress: Progress) -> str:
    """The gains measured so far as points of an SVG line, from the base's gain of 0; "" without any."""
    found = with_gain(progress.validations)
    points = [(0, 0.0), *((one.step, one.gain) for one in found)]
    low, high = min(gain for _, gain in points), max(gain for _, gain in points)
    across = SPARK_WIDTH / max(progress.steps, points[-1][0], 1)
    down = (SPARK_HEIGHT - 2) / (high - low or 1.0)
    return " ".join(f"{x * across:.1f},{1 + (high - y) * down:.1f}" for x, y in points) if found else ""


def compare_card(snapshot: Snapshot) -> str:
    """The run shown beside a second one: figures, settings that differ, and samples; "" without a second."""
    pair = (snapshot.shown, snapshot.second)
    configs = [run.view.config() for run in pair if run.view]
    if len(configs) < 2:
        return ""
    first, second = configs
    names = [n for n in FIELDS if n != "name" and first and second and first.get(n) != second.get(n)]
    samples = _nearest_samples(pair)
    shared = (
        [text for text in dict.fromkeys(samples[0].prompts) if text in samples[1].prompts] if samples else []
    )
    return render(
        "train/compare.html",
        pair=pair,
        settings=[(n, label_of(n), *(row_title(n, config) for config in configs if config)) for n in names],
        readable=all(configs),
        prompts=shared[:MOST_ROWS],
        samples=list(zip(pair, samples, strict=False)),
        exported=_exported_bytes,
        url=run_url(snapshot),
    )


def _exported_bytes(run: ShownRun) -> int:
    """The size of a run's largest export, 0 without one."""
    return max(map(file_bytes, run.view.run.exports.glob("*.safetensors")), default=0) if run.view else 0


def _nearest_samples(pair: tuple[ShownRun, ShownRun]) -> list[PreviewDone]:
    """The newest samples of both runs at the steps nearest to each other, [] where one has none."""
    first, second = (run.progress.previews for run in pair)
    if not first or not second:
        return []
    theirs = min(second, key=lambda one: abs(one.step - first[-1].step))
    return [min(first, key=lambda one: abs(one.step - theirs.step)), theirs]
