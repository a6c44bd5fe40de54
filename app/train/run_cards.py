"""The run that the Train tab shows, with its progress, verdicts, charts, samples and log."""

import math
from collections.abc import Sequence
from typing import Any

from app.export.view import report_entry
from app.formatting import (
    UNKNOWN,
    describe_changes,
    format_clock,
    format_speed,
)
from app.jobs import LOWER_RATE, RESUMABLE, RunView
from app.routes import image_url
from app.state import ShownRun, Snapshot
from app.templates import render
from app.top_bar import Act, accept_act, describe_left, describe_phase, request_act, resume_act
from app.train.background import with_labels
from lora_core.errors import Diverged
from lora_core.report.plots import chart_tables, rate_html, run_charts
from lora_core.runs.events import PreviewDone, Validated
from lora_core.runs.folder import runs_folder
from lora_core.runs.progress import (  # fmt: skip
    A_LITTLE,
    MEMORIZED,
    SURE,
    best_of,
    describe_average,
    describe_forgetting,
    describe_memorization,
    known_error,
    with_gain,
)
from lora_core.settings.choices import PRECISIONS
from lora_core.system.processes import log_tail

LOG_LINES = 40
MOST_WARNINGS = 3
MOST_ROWS, MOST_COLUMNS = 4, 60
MOST_GHOSTS = 7
"""Columns up to which samples to come have their places."""
RAW = ", raw adapter (above: its average)"
ENCODE = ("Encoding images", "Encoding captions", "Finding the learning rate", "Trying the heaviest step")
STAGES = (
    ("Load base", ("Reading the images", "Opening the base model")),
    ("Encode images", ENCODE),
    ("Base samples", ("Sampling", "Validating")),
)
"""What comes before the first step: the trainer's phases, in their order."""
REMARKS = {
    "pausing": "Pausing: saving a checkpoint after the current step.",
    "stopping": "Stopping: saving and exporting after the current step.",
    "paused": "Resuming gives exactly the same result as training without the pause.",
}


def run_card(snapshot: Snapshot) -> str:
    """The run shown: state, stages, what can be done now, and how it ended."""
    run, run_view = snapshot.shown, snapshot.run_view
    values: dict[str, Any] = {"run": run, "second": snapshot.second.name, "kind": "steps"}
    if run_view is not None:
        values |= {
            "acts": _acts(snapshot),
            "report": report_entry(run_view, run_view.resume_info().step > 0) if not run.live else "",
            "path": str(run_view.run.path),
            "can_try": run.state in ("done", "stopped"),
            "summary": _summary(snapshot),
            "stages": stages(run),
            "doing": describe_phase(run.progress),
            **_body(snapshot, run_view),
        }
    return render("train/run.html", **values)


def stages(run: ShownRun) -> list[dict[str, Any]]:
    """The stages of a run, of which none ever falls back: name, state, percent and a note."""
    progress = run.progress
    stepping = run.state != "preparing" and progress.stepping
    reached = len(STAGES)
    if not stepping:
        seen = [n for n, (_, phases) in enumerate(STAGES) if set(phases) & set(progress.phases)]
        reached = max(seen, default=0)
    found = []
    for number, (name, phases) in enumerate(STAGES):
        state = "done" if number < reached else "now" if number == reached else ""
        share = max(progress.phases.get(phase, 0.0) for phase in phases)
        percent = {"done": 100, "now": int(100 * share)}.get(state, 0)
        counted = state == "now" and progress.phase in phases and progress.phase_total > 1
        note = f"{progress.phase_done:,} of {progress.phase_total:,}" if counted else ""
        found.append({"name": name, "state": state, "percent": percent, "note": note})
    note = f"{progress.step:,} of {progress.steps:,}" if progress.steps else ""
    percent = int(100 * progress.step / max(progress.steps, 1))
    return [*found, {"name": "Train", "state": "now" if stepping else "", "percent": percent, "note": note}]


def _acts(snapshot: Snapshot) -> list[Act]:
    run, run_view = snapshot.shown, snapshot.run_view
    if run.live:
        return [request_act(run, do, name) for do, name in (("preview", "sample-now"), ("save", "save-now"))]
    if run.state not in RESUMABLE or run_view is None:
        return []
    busy = _busy(snapshot)
    again = resume_act(run_view, run.asks, busy, "train-resume")
    config = run_view.config()
    if run.asks:
        return [accept_act(run_view, busy, "train-accept"), again]
    if run.progress.cause == Diverged.cause and config is not None:
        tip = "Starts a new run with the same settings and a lower learning rate."
        text, body = f"Retry with {config.optimizer.lr * LOWER_RATE:g}", {"do": "retry", "run": run.name}
        return [Act(text, body, title=tip, why=busy, id="retry"), again]
    return [again]


def _busy(snapshot: Snapshot) -> str:
    """Why no run can be resumed now."""
    return f"{snapshot.active.name} is training; pause or stop it first." if snapshot.active.live else ""


def _summary(snapshot: Snapshot) -> str:
    if snapshot.active.live and snapshot.active.name != snapshot.shown.name:
        return f"Viewed while {snapshot.active.name} trains."
    return snapshot.run_view.made if snapshot.run_view else ""


def _body(snapshot: Snapshot, run_view: RunView) -> dict[str, Any]:
    """Which template tells the rest, and its values."""
    run, progress = snapshot.shown, snapshot.progress
    reached = f"{run.percent}%, step {progress.step:,} of {progress.steps:,}"
    if run.asks:
        return {"kind": "asks", "changes": describe_changes(run_view.changed), "reached": reached}
    if run.state in ("failed", "interrupted"):
        return {
            "kind": "broken",
            "why": with_labels(run_view.reason() or "The run ended without saying why."),
            "diverged": progress.cause == Diverged.cause,
            "memory": _less_memory(run_view),
            "reached": reached,
            "step": run_view.resume_info().step,
            "log": "\n".join(log_tail(run_view.run.log_file, LOG_LINES)),
        }
    if run.state == "queued":
        return {"kind": "queued", "in_queue": snapshot.app_state.queue.holds(run.name)}
    hint, remark = _remark(run)
    warnings = list(dict.fromkeys(progress.warnings[-MOST_WARNINGS:]))
    return {"tiles": _tiles(run), "warnings": warnings, "hint": hint, "remark": remark}


def _less_memory(run_view: RunView) -> dict[str, Any] | None:
    """After running out of memory: the values of the settings to lower."""
    config = run_view.config()
    if config is None or not run_view.out_of_memory:
        return None
    side = config.train.resolution
    return {
        "batch": config.train.batch_size,
        "side": f"{side} px" if side else "as the base",
        "precision": PRECISIONS[config.train.precision].title,
    }


def _tiles(run: ShownRun) -> list[tuple[str, str]]:
    progress = run.progress
    if run.live:
        speed = format_speed(progress.seconds_a_step())
        first = (describe_left(run), f"left, {speed}" if speed else "left")
    else:
        took = progress.train_seconds
        # Averaged over the whole run: the last steps may not match the elapsed time next to it.
        mean = format_speed(took / len(progress.losses)) if progress.losses else ""
        first = (format_clock(took), f"elapsed, {mean}" if mean else "elapsed")
    loss = progress.smoothed_loss()
    found = with_gain(progress.validations)
    last = (best_of(found) or found[-1]) if found and not run.live else found[-1] if found else None
    at = f" at step {last.step:,}" if last else ""
    return [
        first,
        (format_share(last.gain, last) if last else UNKNOWN, f"improvement on held-out images{at}"),
        (f"{loss:.4f}" if loss is not None else UNKNOWN, "loss, smoothed"),
        (f"{progress.step:,}", f"of {progress.steps:,} steps"),
    ]


def format_share(value: float, of: Validated) -> str:
    """A difference of losses as a share of the base's loss."""
    share = f"{value / of.base_loss:.0%}" if of.base_loss > 0 else f"{value:+.4f}"
    return share.replace("-", "\N{MINUS SIGN}")


def _remark(run: ShownRun) -> tuple[str, str]:
    """What the state means, with the kind of hint that scripts and tests know it by."""
    progress, reason = run.progress, with_labels(run.progress.reason)
    best = best_of(progress.validations)
    at = f"best at step {best.step:,}" if best else ""
    if run.state == "paused" and reason:
        # A pause that was not requested, e.g. because the drive is full.
        return "paused", reason
    if run.state == "stopped" and reason:
        return "early", f"Stopped early{f': {at}' if at else ''}. {reason}"
    if run.state == "stopped":
        return "", f"Stopped at step {progress.step:,}{f', {at}' if at else ''}. Exported; you can resume."
    if run.state == "done":
        return "", f"Done{f': {at}' if at else ''}. Exported."
    return "", REMARKS.get(run.state, "")


def verdicts_card(snapshot: Snapshot) -> str:
    """What the validations of the run shown mean; "" before the first."""
    return render("train/verdicts.html", verdicts=verdicts(snapshot.shown))


def charts(snapshot: Snapshot) -> str:
    """The run's charts, which `assets/charts.js` asks for, and the test that found its learning rate."""
    run_view, rate = snapshot.run_view, snapshot.progress.rate
    if run_view is None:
        return ""
    title = f"Learning rate {rate.rate:.2g}, found by a range test" if rate else ""
    plot = rate_html(rate) if rate else ""
    return render(
        "train/charts.html", run=run_view.run.name, second=snapshot.second.name, title=title, plot=plot
    )


def charts_data(run_views: Sequence[RunView]) -> dict[str, Any]:
    """Improvement and loss of runs, each a curve of the same chart, with a note where nothing is measured."""
    first = run_views[0]
    found = run_charts({run_view.run.name: run_view.progress for run_view in run_views})
    config = first.config()
    every = config.validation.every if config else 0
    note = f"Improvement is first measured at step {every:,}." if every else "Validation is off."
    if any(with_gain(run_view.progress.validations) for run_view in run_views):
        note = ""
    elif not found:
        note = "The curve begins with the first steps."
    return {"charts": [chart.document() for chart in found], "tables": chart_tables(found), "note": note}


def verdicts(run: ShownRun) -> list[dict[str, Any]]:
    """What the validations mean: name, grade (1 normal, 2 watch, 3 act), word, why, figures and one act."""
    found = with_gain(run.progress.validations)
    if not found:
        return []
    last = found[-1]
    shown = {"show_preview": run.name}
    see = {"text": "Try it", "data": shown} if run.progress.best_step else None
    graded = [_grade_gain(found) | {"act": see}]
    if math.isfinite(last.gauge) and last.train_gain > 0:
        share = last.gauge / last.train_gain if last.gauge > SURE * known_error(last.gauge_error) else 0.0
        grade = 1 + (share >= MEMORIZED) + (share >= 1)
        why = describe_memorization(last) or "Held-out images improve as well."
        stop = {"text": "Stop", "data": {"post": "run", "body": {"do": "stop", "run": ""}}}
        act = (stop if run.state == "running" else see) if grade == 3 else None
        figures = f"Gap {format_gain(last.gauge, last.gauge_error)}"
        graded.append(_verdict("Overfitting", grade, ("Low", "Medium", "High")[grade - 1], why, figures, act))
    if math.isfinite(last.prior):
        share = 0.0
        if last.prior < -SURE * known_error(last.prior_error):
            share = -last.prior / last.gain if last.gain > 0 else math.inf
        grade = 1 + (share >= 1) + (share == math.inf)
        word = "High" if grade > 1 else "Normal" if share < A_LITTLE else "Some"
        why = describe_forgetting(last) or "The base's own images stay as they were."
        if A_LITTLE <= share < math.inf:
            why += " Usual for a style; lower the strength if it bothers you."
        act = {"text": "Try lower strengths", "data": shown} if see and grade > 1 else None
        figures = f"Gain on the base's own images {format_gain(last.prior, last.prior_error)}"
        graded.append(_verdict("Drift from the base", grade, word, why, figures, act))
    average = describe_average(last)
    return [*graded, _verdict("EMA of weights", 1, "Measured", average)] if average else graded


def _verdict(
    name: str, grade: int, word: str, why: str, figures: str = "", act: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"name": name, "grade": grade, "word": word, "why": why, "figures": figures, "act": act}


def _grade_gain(found: list[Validated]) -> dict[str, Any]:
    """Whether held-out images improve, with the error of the difference to the best step."""
    last, best = found[-1], best_of(found)
    figures = f"Gain {format_gain(last.gain, last.standard_error)}"
    if best is None or best.gain < SURE * known_error(best.standard_error):
        if last.gain < -SURE * known_error(last.standard_error):
            return _verdict("Improvement", 3, "Worse", "The base alone does better.", figures)
        return _verdict("Improvement", 2, "None yet", f"Nothing certain up to step {last.step:,}.", figures)
    why, grade = f"Best so far: step {best.step:,}.", 1
    if last.step != best.step:
        error = known_error(last.against_best_error)
        if last.against_best < -SURE * error:
            grade = 2
            why += f" It is better than step {last.step:,} by {-last.against_best:.4f} ± {error:.4f}."
        else:
            why += " No certain difference since."
    return _verdict("Improvement", grade, format_share(best.gain, best), why, figures)


def format_gain(value: float, error: float) -> str:
    """A difference of losses with its standard error."""
    return f"{value:+.4f} ± {known_error(error):.4f}".replace("-", "\N{MINUS SIGN}")


def log_card(snapshot: Snapshot) -> str:
    """The end of the run's log, and a zip for bug reports."""
    run_view = snapshot.run_view
    if run_view is None:
        return ""
    return render(
        "train/log.html", log="\n".join(log_tail(run_view.run.log_file, LOG_LINES)), name=run_view.run.name
    )


def samples_card(snapshot: Snapshot) -> str:
    """All samples, one row per prompt from the base to the newest; a click enlarges one."""
    run_view = snapshot.run_view
    if run_view is None:
        return ""
    rounds = select_rounds(snapshot.progress.previews)
    kinds = (False, True) if any(one.raw_files for one in rounds) else (False,)
    most = min(MOST_ROWS, max((len(one.files) for one in rounds), default=0))
    return render(
        "train/samples.html",
        strips=[_strip(snapshot, run_view, rounds, row, raw) for row in range(most) for raw in kinds],
        rounds=[one.step for one in rounds],
        ghosts=_steps_to_come(snapshot, run_view, rounds),
        best=snapshot.progress.best_step,
    )


def _strip(
    snapshot: Snapshot, run_view: RunView, rounds: list[PreviewDone], row: int, raw: bool
) -> dict[str, Any]:
    """Samples of one prompt over the rounds, of the raw adapter where `raw`."""
    root = runs_folder(snapshot.app_state.workspace)
    shots = []
    for one in rounds:
        files = one.raw_files if raw else one.files
        if row < len(files):
            file = run_view.run.path / files[row]
            shots.append(
                {
                    "step": one.step,
                    "url": image_url("run", root, file),
                    "thumb": image_url("run", root, file, "thumb"),
                    "prompt": one.prompts[row] if row < len(one.prompts) else "",
                    "title": f"step {one.step:,}" + (", the base" if one.step == 0 else ""),
                }
            )
    prompt = rounds[0].prompts[row] if row < len(rounds[0].prompts) else ""
    return {"id": f"{row}-raw" if raw else str(row), "prompt": prompt + (RAW if raw else ""), "shots": shots}


def _steps_to_come(snapshot: Snapshot, run_view: RunView, rounds: list[PreviewDone]) -> list[int]:
    """The steps at which a live run will sample, where their places fit beside those there are."""
    config = run_view.config()
    if config is None or not snapshot.shown.live or not rounds or not config.sample.every:
        return []
    coming = range(rounds[-1].step + config.sample.every, config.train.steps + 1, config.sample.every)
    return list(coming) if len(rounds) + len(coming) <= MOST_GHOSTS else []


def select_rounds(rounds: list[PreviewDone]) -> list[PreviewDone]:
    """The first round, the newest, and as many evenly spaced ones between as fit, oldest first."""
    if len(rounds) <= MOST_COLUMNS:
        return rounds
    last = len(rounds) - 1
    return [rounds[round(i * last / (MOST_COLUMNS - 1))] for i in range(MOST_COLUMNS)]
