"""The header above every tab: the shown run, its progress and its buttons."""

from dataclasses import dataclass
from typing import Any

import psutil

from app.formatting import STATES, format_clock
from app.jobs import RunView
from app.state import Snapshot
from app.templates import part, problem_html, render
from lora_core.system.hardware import Card
from lora_core.system.paths import ASSETS

TITLE = "LoRA Easel"
REASONS = {
    "pause": "Saves the run and ends its process; resume it later.",
    "stop": "Saves the run, exports what it has learned so far, and ends it.",
    "preview": "Generates the sample prompts after the current step.",
    "save": "Saves a checkpoint after the current step.",
}
NAMES = {"pause": "Pause", "stop": "Stop", "preview": "Sample now", "save": "Save now"}


@dataclass(frozen=True)
class Act:
    """What a button does.

    Attributes:
        text: on the button.
        body: posted as JSON to `path` below /easel.
        title: its tooltip.
        why: why it cannot be pressed now.
        confirm: a question asked first.
        id: of the button in the header.
    """

    text: str
    body: dict[str, Any]
    path: str = "run"
    title: str = ""
    why: str = ""
    confirm: str = ""
    id: str = ""


def request_act(snapshot: Snapshot, do: str) -> Act:
    """Send the request `do` to the shown run."""
    why = why_disabled(snapshot, do)
    return Act(NAMES[do], {"do": do, "run": ""}, title=REASONS[do], why=why, id=do)


def why_disabled(snapshot: Snapshot, do: str) -> str:
    """Why the run cannot take a request now, "" if it can."""
    if not snapshot.live:
        return "No run is going on."
    if snapshot.state in ("pausing", "stopping"):
        return f"The run is {snapshot.state}; this takes until the current step is finished and saved."
    if do in ("preview", "save") and snapshot.state == "preparing":
        return "The run is still preparing; this is possible once it trains."
    return ""


def resume_act(run_view: RunView, asks: bool = False, why: str = "") -> Act:
    """Resume a run from its last checkpoint.

    Args:
        run_view: the run.
        asks: whether it ended to ask if it may continue with changed inputs.
        why: why it cannot be resumed now.
    """
    step = run_view.resume_info().step
    tip = (
        f"Resumes at step {step:,}." if step else "Starts from the beginning: no checkpoint was written yet."
    )
    if asks:
        tip = "Use this after restoring what changed; otherwise it asks again."
    text = f"Resume from step {step:,}" if step else "Start over"
    return Act(text, {"do": "resume", "run": run_view.run.name}, title=tip, why=why, id="resume")


def accept_act(run_view: RunView, why: str = "") -> Act:
    """Resume a run although its inputs changed."""
    tip = "The result will differ from an uninterrupted run."
    return Act("Continue with the changes", {"do": "accept", "run": run_view.run.name}, title=tip, why=why)


def run_actions(snapshot: Snapshot) -> str:
    """Pause and Stop for a live run, Resume for one that can be resumed."""
    acts: list[Act] = []
    if snapshot.live:
        acts = [request_act(snapshot, "pause"), request_act(snapshot, "stop")]
    elif snapshot.resumable and snapshot.run_view is not None:
        acts = [resume_act(snapshot.run_view, snapshot.asks)]
    return render("header.html", part="acts", acts=acts)


def describe_run(snapshot: Snapshot) -> str:
    """The run in one line."""
    progress, run_view = snapshot.progress, snapshot.run_view
    name = run_view.run.name if run_view else ""
    match snapshot.state:
        case "none":
            return "No run yet"
        case "preparing":
            if not progress.phase:
                return "Preparing: loading"
            counted = f", {progress.phase_done} of {progress.phase_total}" if progress.phase_total > 1 else ""
            return f"Preparing: {progress.phase}{counted}"
        case "running" | "pausing" | "stopping":
            verb = "" if snapshot.state == "running" else f"{STATES[snapshot.state][0]}, "
            left = f", {format_clock(progress.seconds_left())} left" if snapshot.state == "running" else ""
            return f"{verb}{percent(snapshot)}%, step {progress.step:,} of {progress.steps:,}{left}"
        case "done":
            return f"{name}: done, {progress.step:,} steps"
        case _:
            at = f" at step {progress.step:,} of {progress.steps:,}" if progress.steps else ""
            return f"{name}: {STATES[snapshot.state][0].lower()}{at}"


def percent(snapshot: Snapshot) -> int:
    """Progress of the shown run in percent."""
    progress = snapshot.progress
    if snapshot.state == "preparing":
        return round(100 * progress.phase_done / progress.phase_total) if progress.phase_total else 0
    return min(100, round(100 * progress.step / progress.steps)) if progress.steps else 0


def draft_note(snapshot: Snapshot) -> str:
    """A note that the draft was set aside, if it was."""
    problem = snapshot.app_state.project.draft_problem
    return problem_html(problem) if problem else ""


def page_title(snapshot: Snapshot) -> str:
    """Title of the browser's tab: percent and run."""
    name = snapshot.run_view.run.name if snapshot.run_view else ""
    if snapshot.state in ("running", "pausing", "stopping"):
        return f"{percent(snapshot)}% \N{MIDDLE DOT} {name}"
    if snapshot.state in ("preparing", "done", "failed", "interrupted"):
        return f"{STATES[snapshot.state][0]} \N{MIDDLE DOT} {name}"
    return TITLE


def run_bar(snapshot: Snapshot) -> str:
    """Progress bar and text; the page title is attached as data."""
    name = snapshot.run_view.run.name if snapshot.run_view else ""
    return render(
        "header.html",
        part="run",
        title=page_title(snapshot),
        state=snapshot.state,
        name=name,
        percent=percent(snapshot),
        words=describe_run(snapshot),
    )


def memory_usage(card: Card | None) -> str:
    """Memory in use, of the GPU if there is one, rounded so that it does not flicker."""
    if card is not None:
        words = f"GPU {card.used / 2**30:.1f} of {card.total / 2**30:.0f} GB"
        return render("header.html", part="memory", words=words, of=card.name)
    used = psutil.virtual_memory()
    words = f"Memory {(used.total - used.available) / 2**30:.0f} of {used.total / 2**30:.0f} GB"
    return render("header.html", part="memory", words=words, of="this computer")


def brand() -> str:
    """The logo and the name."""
    icon = (ASSETS / "icon.svg").read_text(encoding="utf-8")
    return render("header.html", part="brand", icon=icon, name=TITLE)
