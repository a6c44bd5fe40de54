"""The run that the Train tab shows, with its progress, verdicts, charts, samples and log."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from app.export.view import REPORT
from app.jobs import LOWER_RATE, RunView
from app.routes import image_url
from app.state import ShownRun, Snapshot
from app.templates import format_gain, format_share, render
from app.top_bar import describe_left, describe_phase
from lora_core.report.plots import chart_tables, rate_html, run_charts
from lora_core.runs.events import PreviewDone, Validated
from lora_core.runs.folder import runs_folder
from lora_core.runs.progress import (
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
ENCODE = ("Encoding images", "Encoding captions", "Finding the learning rate", "Trying the heaviest step")
STAGES = (
    ("Load base", ("Reading the images", "Opening the base model")),
    ("Encode images", ENCODE),
    ("Base samples", ("Sampling", "Validating")),
)
"""What comes before the first step: the trainer's phases, in their order."""


def run_card(snapshot: Snapshot) -> str:
    """The run shown: state, stages, what can be done now, and how it ended."""
    run, view, progress = snapshot.shown, snapshot.run_view, snapshot.progress
    if view is None:
        return render("train/run.html", run=run, second="")
    found = with_gain(progress.validations)
    last = found[-1] if found else None
    return render(
        "train/run.html",
        run=run,
        second=snapshot.second.name,
        active=snapshot.active,
        config=view.config(),
        lower_rate=LOWER_RATE,
        precisions=PRECISIONS,
        stages=stages(run),
        doing=describe_phase(progress),
        left=describe_left(run),
        gain=last if run.live else best_of(found) or last,
        warnings=list(dict.fromkeys(progress.warnings[-MOST_WARNINGS:])),
        in_queue=snapshot.app_state.queue.holds,
        reported=(view.run.path / REPORT).is_file(),
        read_log=functools.partial(_read_log, view),
    )


def _read_log(view: RunView) -> str:
    return "\n".join(log_tail(view.run.log_file, LOG_LINES))


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


def log_card(snapshot: Snapshot) -> str:
    """The end of the run's log, and a zip for bug reports."""
    run_view = snapshot.run_view
    if run_view is None:
        return ""
    return render("train/log.html", log=_read_log(run_view), name=run_view.run.name)


def samples_card(snapshot: Snapshot) -> str:
    """All samples, one row per prompt from the base to the newest; a click enlarges one."""
    run_view = snapshot.run_view
    if run_view is None:
        return ""
    rounds = select_rounds(snapshot.progress.previews)
    return render(
        "train/samples.html",
        rounds=rounds,
        most=min(MOST_ROWS, max((len(one.files) for one in rounds), default=0)),
        path=run_view.run.path,
        url=run_url(snapshot),
        ghosts=_steps_to_come(snapshot, run_view, rounds),
        best=snapshot.progress.best_step,
    )


def run_url(snapshot: Snapshot) -> Callable[..., str]:
    """Gives the URL of an image in a run's folder."""
    return functools.partial(image_url, "run", runs_folder(snapshot.app_state.workspace))


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
