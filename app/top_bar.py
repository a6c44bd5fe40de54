"""The header above every tab: the run that is going on, whatever run is shown, and its buttons."""

from dataclasses import dataclass
from typing import Any

import psutil

from app.formatting import STATES, format_bytes, format_clock, format_duration
from app.jobs import RESUMABLE, RunView
from app.state import ShownRun, Snapshot
from app.templates import problem_html, render
from lora_core.runs.progress import Progress
from lora_core.system.files import ASSETS
from lora_core.system.hardware import resident_bytes

TITLE = "LoRA Easel"
REASONS = {
    "pause": "Saves the run and ends its process; resume it later.",
    "stop": "Saves the run, exports what it has learned so far, and ends it.",
    "preview": "Generates the sample prompts after the current step.",
    "save": "Saves a checkpoint after the current step.",
}
NAMES = {"pause": "Pause", "stop": "Stop", "preview": "Sample now", "save": "Save now"}
FEW_STEPS = 10
"""So many steps say how long each of the rest takes."""


@dataclass(frozen=True)
class Act:
    """What a button does.

    Attributes:
        text: on the button.
        body: posted as JSON to `path` below /easel.
        title: its tooltip.
        why: why it cannot be pressed now.
        confirm: a question asked first.
        id: of the button.
    """

    text: str
    body: dict[str, Any]
    path: str = "run"
    title: str = ""
    why: str = ""
    confirm: str = ""
    id: str = ""


def request_act(run: ShownRun, do: str, name: str = "") -> Act:
    """Send the request `do` to the live run; `name` is the button's id."""
    return Act(NAMES[do], {"do": do, "run": ""}, title=REASONS[do], why=why_disabled(run, do), id=name or do)


def why_disabled(run: ShownRun, do: str) -> str:
    """Why a run cannot take a request now, "" if it can."""
    if not run.live:
        return "No run is active."
    if run.state in ("pausing", "stopping"):
        return f"The run is {run.state}; this takes until the current step is finished and saved."
    if do in ("preview", "save") and run.state == "preparing":
        return "The run is still preparing; this is possible once it trains."
    return ""


def resume_act(run_view: RunView, asks: bool = False, why: str = "", name: str = "resume") -> Act:
    """Resume a run from its last checkpoint.

    Args:
        run_view: the run.
        asks: whether it ended to ask if it may continue with changed inputs.
        why: why it cannot be resumed now.
        name: the button's id.
    """
    step = run_view.resume_info().step
    tip = (
        f"Resumes at step {step:,}." if step else "Starts from the beginning: no checkpoint was written yet."
    )
    if asks:
        tip = "Use this after restoring what changed; otherwise it asks again."
    text = f"Resume from step {step:,}" if step else "Start over"
    return Act(text, {"do": "resume", "run": run_view.run.name}, title=tip, why=why, id=name)


def accept_act(run_view: RunView, why: str = "", name: str = "") -> Act:
    """Resume a run although its inputs changed."""
    tip = "The result will differ from an uninterrupted run."
    body = {"do": "accept", "run": run_view.run.name}
    return Act("Continue with the changes", body, title=tip, why=why, id=name)


def run_actions(snapshot: Snapshot) -> str:
    """Pause and Stop for a live run, Resume for one that can be resumed."""
    run = snapshot.active
    acts: list[Act] = []
    if run.live:
        acts = [request_act(run, "pause"), request_act(run, "stop")]
    elif run.view is not None and run.state in RESUMABLE and not run.progress.stopped_early:
        acts = [resume_act(run.view, run.asks)]
    return render("header.html", part="acts", acts=acts)


def describe_left(run: ShownRun) -> str:
    """The time left; a range as long as few steps were done."""
    left = run.progress.seconds_left(run.view.config() if run.view else None)
    if left is None or len(run.progress.losses) >= FEW_STEPS:
        return format_clock(left)
    low, _, unit = format_duration(left).partition(" ")
    high = format_duration(2 * left)
    return f"{low} to {high}" if high.endswith(f" {unit}") else f"{low} {unit} to {high}"


def describe_phase(progress: Progress) -> str:
    """What the run does now, in a sentence."""
    if not progress.phase:
        return "Training." if progress.stepping else "Starting."
    return f"{progress.phase}, {int(100 * progress.phases.get(progress.phase, 0.0))}%."


def describe_run(run: ShownRun) -> str:
    """A run in one line."""
    progress = run.progress
    match run.state:
        case "none":
            return "No run yet"
        case "preparing":
            return f"Preparing: {describe_phase(progress)[:-1]}"
        case "running" | "pausing" | "stopping":
            verb = "" if run.state == "running" else f"{STATES[run.state][0]}, "
            left = f", {describe_left(run)} left" if run.state == "running" else ""
            return f"{verb}{run.percent}%, step {progress.step:,} of {progress.steps:,}{left}"
        case "done":
            return f"{run.name}: done, {progress.step:,} steps"
        case _:
            at = f" at step {progress.step:,} of {progress.steps:,}" if progress.steps else ""
            early = " early" if run.state == "stopped" and progress.stopped_early else ""
            return f"{run.name}: {STATES[run.state][0].lower()}{early}{at}"


def draft_note(snapshot: Snapshot) -> str:
    """A note that the draft was set aside, if it was."""
    problem = snapshot.app_state.project.draft_problem
    return problem_html(problem) if problem else ""


def page_title(snapshot: Snapshot) -> str:
    """Title of the browser's tab: percent and run."""
    run = snapshot.active
    if run.state in ("running", "pausing", "stopping"):
        return f"{run.percent}% \N{MIDDLE DOT} {run.name}"
    if run.state in ("preparing", "done", "failed", "interrupted"):
        return f"{STATES[run.state][0]} \N{MIDDLE DOT} {run.name}"
    return TITLE


def run_bar(snapshot: Snapshot) -> str:
    """Progress bar and text; the page's title and the tabs' badges are attached as data."""
    run = snapshot.active
    images = len(snapshot.app_state.project.dataset().records)
    return render(
        "header.html",
        part="run",
        run=run,
        title=page_title(snapshot),
        words=describe_run(run),
        badges={"Dataset": f"{images:,}" if images else "", "Train": f"{run.percent}%" if run.live else ""},
    )


def memory_usage(snapshot: Snapshot) -> str:
    """Memory in use, of the GPU if there is one, else by the run; rounded so that it does not flicker."""
    run, process = snapshot.active, None
    config = run.view.config() if run.view else None
    process = run.view.run.live_process() if run.view else None
    card = snapshot.app_state.hardware.card(config.train.device if process and config else None)
    held = round((resident_bytes(process) or 0) / 1e8) / 10
    own = f"This run uses {held:.1f} GB of memory" if held else ""
    if card is not None:
        words = f"GPU {card.used / 2**30:.1f} of {card.total / 2**30:.0f} GB"
        on_card = card.by_process.get(process.pid) if process else None
        more = f" and {format_bytes(on_card)} on the GPU" if own and on_card else ""
        tip = f"Memory of {card.name} in use. {own}{more}"
    elif own:
        used = psutil.virtual_memory()
        words = f"{held:.1f} GB"
        tip = f"{own}; {(used.total - used.available) / 2**30:.0f} of {used.total / 2**30:.0f} GB are in use."
    else:
        return ""
    return render("header.html", part="memory", words=words, tip=tip)


def brand() -> str:
    """The logo and the name."""
    icon = (ASSETS / "icon.svg").read_text(encoding="utf-8")
    return render("header.html", part="brand", icon=icon, name=TITLE)
