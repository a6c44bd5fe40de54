"""The queue and the earlier runs, each a list of rows with what can be done about them."""

from app.export.lora_tools_results import report_entry
from app.formatting import describe_changes, format_bytes, format_duration, pluralize, post_button, safe, state_chip
from app.templates import chip
from app.jobs import RESUMABLE, RunView
from app.state import Snapshot, asks_to_accept
from app.top_bar import accept_button
from app.train.checks import with_labels
from lora_core.errors import RunError
from lora_core.runs.queue import FAILED, RUNNING, WAITING, QueuedRun

MOST_EARLIER = 12
MOST_FAILED = 3


def queue_card(snapshot: Snapshot) -> str:
    """What waits, in order; nothing where nothing ever waited."""
    queue = snapshot.app_state.queue
    try:
        present = queue.queue.jobs()
    except RunError as error:
        return f'<div class="panel" id="queue-list"><h2>Queue</h2><p class="problem">{safe(error)}</p></div>'
    jobs = [job for job in present if not job.has_ended]
    failed = [job for job in reversed(present) if job.state == FAILED][:MOST_FAILED]
    if not jobs and not failed:
        return ""
    waiting = [job.run for job in jobs if job.state == WAITING]
    asking = {
        run_view.run.name: run_view for run_view, state in snapshot.runs if asks_to_accept(run_view, state)
    }
    rows = "".join(_job_row(job, waiting, asking.get(job.run)) for job in [*jobs, *failed])
    return (
        f'<div class="panel" id="queue-list" data-waiting="{len(waiting)}"'
        f' data-worked="{int(queue.is_running)}"><div class="row'
        f' apart"><h2>Queue</h2>{_queue_switch(snapshot, bool(jobs))}</div><p'
        f' class="small">{_queue_words(snapshot, jobs)}</p><div class="list">{rows}</div></div>'
    )


def _queue_switch(snapshot: Snapshot, anything: bool) -> str:
    if snapshot.app_state.queue.is_running:
        tip = "Pauses the run in hand, which then waits again; nothing is lost."
        return post_button("Pause the queue", "queue", {"do": "pause"}, tip=tip)
    why = "" if anything else "Nothing waits in the queue."
    return post_button(
        "Start the queue", "queue", {"do": "start"}, why=why, tip="Also when this window is closed."
    )


def _queue_words(snapshot: Snapshot, jobs: list[QueuedRun]) -> str:
    if not jobs:
        return "Worked through. What failed says why; the others went on."
    if not snapshot.app_state.queue.is_running:
        return "It is not being worked through; start it when you like. It survives a restart."
    return "One after the other, also after a failure and when this window is closed."


def _job_row(job: QueuedRun, waiting: list[str], asking: RunView | None) -> str:
    """One job; `asking` is its run where that ended to ask if it may go on with what has changed."""
    tones = {WAITING: "", RUNNING: "accent", "paused": "warn", "failed": "bad"}
    place = waiting.index(job.run) + 1 if job.state == WAITING else 0
    state = (
        f"{place}." if place else {"running": "Running", "paused": "Paused", "failed": "Failed"}[job.state]
    )
    name = job.run
    actions = ""
    if place:
        up = "It is the first already." if place == 1 else ""
        down = "It is the last already." if place == len(waiting) else ""
        actions = post_button(
            "↑", "queue", {"do": "up", "run": name}, why=up, label=f"Move {name} up", tip="Earlier"
        )
        actions += post_button(
            "↓", "queue", {"do": "down", "run": name}, why=down, label=f"Move {name} down", tip="Later"
        )
    if job.state != RUNNING:
        tip = "Takes it out of the queue; a run that began stays below."
        actions += post_button("Remove", "queue", {"do": "remove", "run": name}, tip=tip)
    told = (
        f"{describe_changes(asking.changed)} Decide below, under Runs." if asking else with_labels(job.reason)
    )
    why = f'<span class="small">{safe(told)}</span>' if told else ""
    return (
        f'<div class="row apart" data-job="{safe(name)}" data-job-state="{job.state}"><div'
        f' class="row">{chip(state, tones[job.state])}<span>{safe(name)}</span>{why}</div><div'
        f' class="row">{actions}</div></div>'
    )


def earlier(snapshot: Snapshot) -> str:
    """The other runs of the open project, newest first; with a single run, that one, so that it can be
    deleted. Those of other projects are folded below."""
    listed = [
        (w, s) for w, s in snapshot.runs if not (s == "queued" and snapshot.app_state.queue.holds(w.run.name))
    ]
    listed = [(w, s) for w, s in listed if w is not snapshot.run_view or not snapshot.live]
    listed.sort(key=lambda one: one[0] is not snapshot.run_view)
    own: list[tuple[RunView, str]] = []
    others: list[tuple[RunView, str]] = []
    for one in listed:
        (own if snapshot.app_state.jobs.own(one[0]) else others).append(one)
    if not own and not others:
        return ""
    mine = _rows(snapshot, own) if own else '<p class="small">No earlier run of this project yet.</p>'
    folded = (
        f'<details id="other-runs"><summary>{pluralize(len(others), "run")} of other projects</summary>'
        f"{_rows(snapshot, others)}</details>"
        if others
        else ""
    )
    return f'<div class="panel"><h2>Runs</h2>{mine}{folded}</div>'


def _rows(snapshot: Snapshot, listed: list[tuple[RunView, str]]) -> str:
    rows = "".join(_run_row(snapshot, run_view, state) for run_view, state in listed[:MOST_EARLIER])
    more = len(listed) - MOST_EARLIER
    note = f'<p class="small">And {pluralize(more, "older run")} in the workspace.</p>' if more > 0 else ""
    return f'<div class="list">{rows}</div>{note}'


def _run_row(snapshot: Snapshot, run_view: RunView, state: str) -> str:
    progress, name, after = run_view.progress, run_view.run.name, run_view.resume_info()
    parts = [f"{progress.step:,} of {pluralize(progress.steps, 'step')}" if progress.steps else "no step yet"]
    best = next((e for e in reversed(progress.validations) if e.best), None)
    if best is not None:
        parts.append(f"best gain {best.gain:+.4f} at {best.step:,}")
    took = sum(event.seconds for event in progress.losses)
    parts += [format_duration(took)] if took else []
    parts.append(format_bytes(after.size))
    busy = "A run is going on; pause or stop it first." if snapshot.live else ""
    words = f"Continue at {after.step:,}" if after.step else "Start again"
    resume = post_button(words, "run", {"do": "resume", "run": name}, why=busy) if state in RESUMABLE else ""
    yes = accept_button(run_view, tone="quiet", why=busy) if asks_to_accept(run_view, state) else ""
    seen = (
        ""
        if run_view is snapshot.run_view
        else post_button("Show", "run", {"do": "show", "run": name}, why=busy)
    )
    ask = f"Move the run {name} with its samples and files to the trash?"
    delete = post_button("Delete", "run", {"do": "delete", "run": name}, confirm=ask, label=f"Delete {name}")
    folder = (
        f'<button type="button" class="own quiet" data-copy="{safe(run_view.run.path)}"'
        f' title="{safe(run_view.run.path)}" aria-label="Copy the path of {safe(name)}">Copy path</button>'
    )
    report = report_entry(run_view, after.step > 0)
    why = run_view.reason() if state in ("failed", "interrupted") else ""
    told = describe_changes(run_view.changed) if yes else with_labels(why)
    reason = f'<p class="small">{safe(told)}</p>' if told else ""
    return (
        f'<div class="row apart" data-run="{safe(name)}"><div'
        f' class="row">{state_chip(state)}<span>{safe(name)}</span><span class="small'
        f' num">{", ".join(parts)}</span></div><div'
        f' class="row">{yes}{resume}{seen}{report}{folder}{delete}</div>{reason}</div>'
    )
