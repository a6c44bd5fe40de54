"""The header that stands above every tab: what runs, how far it is, and what one can do about it."""

import psutil

from app.moment import Moment
from app.words import STATES, clock, safe
from lora_core.spec.paths import ASSETS

TITLE = "LoRA Easel"
BUTTONS_WHY = {
    "pause": "Saves the run and ends its process, to go on later.",
    "stop": "Saves the run, writes the file from what is learned so far, and ends it.",
    "resume": "Goes on from the last checkpoint.",
}


def brand() -> str:
    """The app's mark and name."""
    return f'<div class="brand">{(ASSETS / "icon.svg").read_text(encoding="utf-8")}<span>{TITLE}</span></div>'


def project_chip(moment: Moment) -> str:
    """Which pictures are chosen."""
    return f'<span class="project">{safe(moment.desk.project.dataset_title)}</span>'


def run_words(moment: Moment) -> str:
    """The run in one line."""
    progress, watch = moment.progress, moment.watch
    name = watch.run.name if watch else ""
    match moment.state:
        case "none":
            return "No run yet"
        case "preparing":
            if not progress.phase:
                return "Preparing: loading"
            counted = f", {progress.phase_done} of {progress.phase_total}" if progress.phase_total > 1 else ""
            return f"Preparing: {progress.phase}{counted}"
        case "running" | "pausing" | "stopping":
            verb = "" if moment.state == "running" else f"{STATES[moment.state][0]}, "
            left = f", {clock(progress.seconds_left())} left" if moment.state == "running" else ""
            return f"{verb}{percent(moment)}%, step {progress.step:,} of {progress.steps:,}{left}"
        case "done":
            return f"{name}: done, {progress.step:,} steps"
        case _:
            at = f" at step {progress.step:,} of {progress.steps:,}" if progress.steps else ""
            return f"{name}: {STATES[moment.state][0].lower()}{at}"


def percent(moment: Moment) -> int:
    """How far the shown run is."""
    progress = moment.progress
    if moment.state == "preparing":
        return round(100 * progress.phase_done / progress.phase_total) if progress.phase_total else 0
    return min(100, round(100 * progress.step / progress.steps)) if progress.steps else 0


def track(moment: Moment, label: str) -> str:
    """The bar. Preparing is not step 0: it has a look of its own."""
    share = percent(moment)
    kind = "track preparing" if moment.state == "preparing" else "track"
    return (
        f'<div class="{kind}" role="progressbar" aria-label="{safe(label)}" aria-valuemin="0"'
        f' aria-valuemax="100" aria-valuenow="{share}"><i style="width:{share}%"></i></div>'
    )


def run_bar(moment: Moment) -> str:
    """Bar and words; the page's title rides along as data."""
    words = run_words(moment)
    title = f"{percent(moment)}% {TITLE}" if moment.state == "running" else TITLE
    if moment.state in ("done", "failed"):
        title = f"{STATES[moment.state][0]} · {TITLE}"
    bar = "" if moment.state == "none" else track(moment, "Training")
    return (
        f'<div class="runbar" data-page-title="{safe(title)}" data-run-state="{moment.state}">{bar}'
        f'<span class="num small-on-phone">{safe(words)}</span></div>'
    )


def memory() -> str:
    """How much of the machine's memory is taken, rounded so that it does not flicker."""
    used = psutil.virtual_memory()
    return (
        '<span class="small num memory" title="Memory of this computer in use">Memory'
        f" {(used.total - used.available) / 2**30:.0f} of {used.total / 2**30:.0f} GB</span>"
    )


def theme_switch() -> str:
    """A button between light and dark; until it is used the system's choice holds."""
    return (
        '<button type="button" class="own icon" data-theme-switch aria-label="Switch between light and'
        ' dark"><svg viewBox="0 0 20 20" aria-hidden="true"><path d="M10 2.5a7.5 7.5 0 1 0 0 15z"'
        ' fill="currentColor"/><circle cx="10" cy="10" r="7.5" fill="none" stroke="currentColor"'
        ' stroke-width="1.6"/></svg></button>'
    )
