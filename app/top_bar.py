"""The header above every tab: the shown run, its progress and its buttons."""

import json

import psutil

from app.formatting import STATES, format_clock, problem_html, progress_bar, safe
from app.jobs import RunView
from app.state import Snapshot
from lora_core.system.hardware import Card
from lora_core.system.paths import ASSETS

TITLE = "LoRA Easel"
REASONS = {
    "pause": "Saves the run and ends its process; resume it later.",
    "stop": "Saves the run, exports what it has learned so far, and ends it.",
    "preview": "Generates the sample prompts after the current step.",
    "save": "Saves a checkpoint after the current step.",
}
NOTE = (
    '<div id="header-note"><p id="other-pages" class="small" role="status" hidden>This window is open in'
    " another tab too. Both show the same run; if you edit the form in both, the last change wins.</p></div>"
)
NAMES = {"pause": "Pause", "stop": "Stop", "preview": "Sample now", "save": "Save now"}


def request_button(snapshot: Snapshot, do: str, name: str, text: str = "") -> str:
    """A button that sends a request to the run; when disabled, its tooltip says why.

    Args:
        snapshot: what the page shows.
        do: the request, as in the run folder.
        name: the button's id.
        text: what stands on it, if not the usual words.
    """
    why = why_disabled(snapshot, do)
    tip, off = why or REASONS[do], " disabled" if why else ""
    return (
        f'<button type="button" class="own" id="{name}" data-run-do="{do}" title="{safe(tip)}"{off}>'
        f"{safe(text or NAMES[do])}</button>"
    )


def why_disabled(snapshot: Snapshot, do: str) -> str:
    """Why the run cannot take a request now, "" if it can."""
    if not snapshot.live:
        return "No run is going on."
    if snapshot.state in ("pausing", "stopping"):
        return f"The run is {snapshot.state}; this takes until the current step is finished and saved."
    if do in ("preview", "save") and snapshot.state == "preparing":
        return "The run is still preparing; this is possible once it trains."
    return ""


def resume_button(snapshot: Snapshot, name: str, tone: str = "") -> str:
    """The button that resumes the shown run; it names the step."""
    step = snapshot.run_view.resume_info().step if snapshot.run_view else 0
    words = "Resume" if name == "resume" else f"Continue at step {step:,}" if step else "Start again"
    if snapshot.state == "stopped" and snapshot.progress.reason:
        words = "Go on anyway"
    tip = (
        f"Resumes at step {step:,}." if step else "Starts from the beginning: no checkpoint was written yet."
    )
    if snapshot.asks:
        tip = "Use this after restoring what changed; otherwise it asks again."
    return (
        f'<button type="button" class="own {tone}" id="{name}" data-run-do="resume"'
        f' title="{safe(tip)}">{words}</button>'
    )


def accept_button(run_view: RunView, name: str = "", tone: str = "", why: str = "") -> str:
    """The button that resumes a run although its inputs changed.

    Args:
        run_view: the run.
        name: the button's id, if it has one.
        tone: its look.
        why: why it cannot be pressed now, "" where it can.
    """
    tip = why or "The result will differ from an uninterrupted run."
    body = json.dumps({"do": "accept", "run": run_view.run.name})
    named, off = f' id="{name}"' if name else "", " disabled" if why else ""
    return (
        f'<button type="button" class="own {tone}"{named} data-post="run" data-body="{safe(body)}"'
        f' title="{safe(tip)}"{off}>Continue with the changes</button>'
    )


def run_actions(snapshot: Snapshot) -> str:
    """Pause and Stop for a live run, Resume for one that can be resumed."""
    if snapshot.live:
        both = request_button(snapshot, "pause", "pause") + request_button(snapshot, "stop", "stop")
        return f'<div class="row run-actions">{both}</div>'
    return resume_button(snapshot, "resume") if snapshot.resumable else ""


def brand() -> str:
    """The logo and the name."""
    icon = (ASSETS / "icon.svg").read_text(encoding="utf-8")
    return f'<h1 class="brand">{icon}<span>{TITLE}</span></h1>'


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


def track(snapshot: Snapshot, label: str) -> str:
    """The progress bar; preparing has its own style, because it is not step 0."""
    return progress_bar(
        percent(snapshot), label, "track preparing" if snapshot.state == "preparing" else "track"
    )


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
    words = describe_run(snapshot)
    name = snapshot.run_view.run.name if snapshot.run_view else ""
    shown = "" if snapshot.state == "none" else track(snapshot, "Training")
    return (
        f'<div class="runbar" data-page-title="{safe(page_title(snapshot))}"'
        f' data-run-state="{snapshot.state}" data-run-name="{safe(name)}">{shown}<span'
        f' class="num small-on-phone">{safe(words)}</span></div>'
    )


def memory_usage(card: Card | None) -> str:
    """Memory in use, of the GPU if there is one, rounded so that it does not flicker."""
    if card is not None:
        return (
            f'<span class="small num memory" title="Memory of {safe(card.name)} in use">GPU'
            f" {card.used / 2**30:.1f} of {card.total / 2**30:.0f} GB</span>"
        )
    used = psutil.virtual_memory()
    return (
        '<span class="small num memory" title="Memory of this computer in use">Memory'
        f" {(used.total - used.available) / 2**30:.0f} of {used.total / 2**30:.0f} GB</span>"
    )


def header_buttons(has_password: bool) -> str:
    """The icon buttons: notify at the end, light or dark, log out, quit."""
    log_out = '<a class="link small" href="/easel/logout">Log out</a>' if has_password else ""
    return f'<div class="row tools">{_bell()}{theme_switch()}{log_out}{_quit()}</div>'


def _icon(paths: str) -> str:
    return (
        '<svg viewBox="0 0 20 20" aria-hidden="true" fill="none" stroke="currentColor" stroke-width="1.6"'
        f' stroke-linecap="round" stroke-linejoin="round">{paths}</svg>'
    )


def _bell() -> str:
    paths = '<path d="M5 14h10l-1.3-2V8.5a3.7 3.7 0 0 0-7.4 0V12z"/><path d="M8.6 16.5a1.5 1.5 0 0 0 2.8 0"/>'
    return (
        '<button type="button" class="own icon" id="tell-end" aria-pressed="false" aria-label="Tell me when a'
        f' run ends" title="Tell me when a run ends">{_icon(paths)}</button>'
    )


def _quit() -> str:
    paths = '<path d="M10 3v6.5"/><path d="M6 5.6a6 6 0 1 0 8 0"/>'
    return (
        '<button type="button" class="own icon" id="quit" aria-label="Quit LoRA Easel" title="Quit; a run'
        f' that is going on goes on">{_icon(paths)}</button>'
    )


def theme_switch() -> str:
    """The light/dark button; until it is used the system's setting applies."""
    return (
        '<button type="button" class="own icon" data-theme-switch aria-label="Switch between light and'
        ' dark"><svg viewBox="0 0 20 20" aria-hidden="true"><path d="M10 2.5a7.5 7.5 0 1 0 0 15z"'
        ' fill="currentColor"/><circle cx="10" cy="10" r="7.5" fill="none" stroke="currentColor"'
        ' stroke-width="1.6"/></svg></button>'
    )
