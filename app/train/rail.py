"""The rail of the Train tab: all runs in three groups, the queue in its order, and two runs side by side."""

from collections.abc import Sequence
from typing import Any

from app.formatting import STATES, UNKNOWN, describe_changes, format_bytes, format_duration, pluralize
from app.jobs import LIVE, RunView
from app.routes import image_url
from app.state import ShownRun, Snapshot, asks_to_accept
from app.templates import render
from app.train.background import with_labels
from app.train.form import row_title
from app.train.run_cards import MOST_ROWS, format_gain, format_share
from lora_core.errors import RunError
from lora_core.runs.folder import runs_folder
from lora_core.runs.progress import Progress, best_of, with_gain
from lora_core.runs.queue import FAILED, WAITING, QueuedRun
from lora_core.settings.config import FIELDS, label_of
from lora_core.system.files import file_bytes

MOST_EARLIER = 20
SPARK_WIDTH, SPARK_HEIGHT = 48, 20


def running(snapshot: Snapshot) -> str:
    """The heading, and the run that is going on."""
    runs = [_row(snapshot, run_view, state) for run_view, state in snapshot.runs if state in LIVE]
    return render("train/rail.html", part="running", runs=runs) if snapshot.runs else ""


def queue_card(snapshot: Snapshot) -> str:
    """What waits, in order; "" where nothing does."""
    app_state = snapshot.app_state
    try:
        present = app_state.queue.queue.jobs()
    except RunError as error:
        return render("train/rail.html", part="queue", problem=str(error))
    runs = {run_view.run.name: (run_view, state) for run_view, state in snapshot.runs}
    # A run that is trained now is listed above, and one that has ended below, unless its folder is gone.
    jobs = [
        (job, *runs.get(job.run, (app_state.jobs.run_view(app_state.queue.queue.run(job.run)), "failed")))
        for job in present
        if not job.has_ended or (job.state == FAILED and job.run not in runs)
    ]
    waiting = [job.run for job, _, state in jobs if job.state == WAITING and state not in LIVE]
    rows = [_row(snapshot, view, state, job, waiting) for job, view, state in jobs if state not in LIVE]
    values = {"problem": "", "running": app_state.queue.is_running, "waiting": len(waiting), "runs": rows}
    return render("train/rail.html", part="queue", **values) if rows else ""


def earlier(snapshot: Snapshot) -> str:
    """The ended runs of the open project, newest first; those of other projects are folded below."""
    app_state = snapshot.app_state
    try:
        jobs = {job.run: job for job in app_state.queue.queue.jobs()}
    except RunError:
        jobs = {}
    listed: list[list[dict[str, Any]]] = [[], []]
    more = [0, 0]
    for run_view, state in snapshot.runs:
        job, other = jobs.get(run_view.run.name), not app_state.jobs.own(run_view)
        if state in LIVE or (job and not job.has_ended):
            continue
        # The run shown is listed however old it is.
        if len(listed[other]) < MOST_EARLIER or run_view is snapshot.run_view:
            listed[other].append(_row(snapshot, run_view, state, job))
        else:
            more[other] += 1
    return render("train/rail.html", part="earlier", listed=listed, more=more) if any(listed) else ""


def _row(
    snapshot: Snapshot,
    run_view: RunView,
    state: str,
    job: QueuedRun | None = None,
    waiting: Sequence[str] = (),
) -> dict[str, Any]:
    """A run as the rail lists it; `job` is what the queue says of it, `waiting` all that wait there."""
    progress, name, why = run_view.progress, run_view.run.name, ""
    place = waiting.index(name) + 1 if name in waiting else 0
    if job and job.state == FAILED and state == "queued":
        state = "failed"
    if asks_to_accept(run_view, state):
        why = describe_changes(run_view.changed)
    elif state in ("failed", "interrupted"):
        why = with_labels(job.reason if job and job.reason else run_view.reason())
    word, tone = ("Stopped early", "good") if state == "stopped" and progress.stopped_early else STATES[state]
    if job and not job.has_ended:
        word, tone = ("Next" if place == 1 else "Then") if place else job.state.capitalize(), ""
    samples = progress.previews[-1].files if progress.previews else []
    root = runs_folder(snapshot.app_state.workspace)
    steps = f"{progress.step:,} of {pluralize(progress.steps, 'step')}" if progress.steps else "no step yet"
    facts = [run_view.made, steps]
    if state not in LIVE:
        facts += [format_duration(progress.train_seconds)] if progress.train_seconds else []
        facts.append(format_bytes(run_view.resume_info().size))
    return {
        "name": name,
        "state": state,
        "word": word,
        "tone": tone,
        "job": job if job and not job.has_ended else None,
        "place": place,
        "brief": _briefly(progress, state),
        "facts": ", ".join(facts),
        "shown": name == snapshot.shown.name,
        "beside": snapshot.shown.name,
        "second": name == snapshot.second.name,
        "thumb": image_url("run", root, root / name / samples[0], "thumb") if samples else "",
        "spark": sparkline(progress),
        "why": why,
    }


def _briefly(progress: Progress, state: str) -> str:
    """Step and improvement in a few letters."""
    best = best_of(progress.validations)
    gain = format_share(best.gain, best) if best else ""
    if state in LIVE:
        steps = f"{progress.step:,} of {progress.steps:,}" if progress.steps else ""
        return ", ".join(filter(None, (steps, gain)))
    if best and state == "done":
        return f"best {best.step:,}, {gain}"
    return gain if gain and state == "stopped" else f"step {progress.step:,}" if progress.step else ""


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
    return render(
        "train/compare.html",
        names=[run.name for run in pair],
        figures=list(zip(*map(_figures, pair), strict=True)),
        settings=[(n, label_of(n), *(row_title(n, config) for config in configs if config)) for n in names],
        readable=all(configs),
        samples=_sample_pairs(snapshot, pair),
    )


def _figures(run: ShownRun) -> list[tuple[str, str]]:
    """What a run came to, as (name, value)."""
    progress, best = run.progress, best_of(run.progress.validations)
    took = progress.train_seconds
    size = max(map(file_bytes, run.view.run.exports.glob("*.safetensors")), default=0) if run.view else 0
    return [
        ("State", STATES[run.state][0]),
        ("Steps", f"{progress.step:,} of {progress.steps:,}"),
        ("Best step", f"{best.step:,}" if best else UNKNOWN),
        ("Improvement", format_share(best.gain, best) if best else UNKNOWN),
        ("Gain", format_gain(best.gain, best.standard_error) if best else UNKNOWN),
        ("Training time", format_duration(took) if took else UNKNOWN),
        ("File size", format_bytes(size) if size else UNKNOWN),
    ]


def _sample_pairs(snapshot: Snapshot, pair: Sequence[ShownRun]) -> list[dict[str, Any]]:
    """Samples of both runs for the prompts that they share, at the newest steps nearest to each other."""
    first, second = (run.progress.previews for run in pair)
    if not first or not second:
        return []
    theirs = min(second, key=lambda one: abs(one.step - first[-1].step))
    mine = min(first, key=lambda one: abs(one.step - theirs.step))
    root, found = runs_folder(snapshot.app_state.workspace), []
    for prompt in [text for text in dict.fromkeys(mine.prompts) if text in theirs.prompts][:MOST_ROWS]:
        shots = [
            (f"{run.name}, step {one.step:,}", image_url("run", root, root / run.name / file))
            for run, one in zip(pair, (mine, theirs), strict=True)
            for file in one.files[one.prompts.index(prompt) :][:1]
        ]
        found.append({"prompt": prompt, "shots": shots})
    return found
