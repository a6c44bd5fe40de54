"""The runs of the Train tab: the rail of all, the one shown with its progress, verdicts, charts, samples and
log, and two side by side."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from app.export.view import REPORT
from app.jobs import LIVE, RunView, lower_rate
from app.routes import image_url, run_url
from app.state import ShownRun, Snapshot
from app.templates import UNKNOWN, _, card, format_duration, format_gain, format_share, label_of, render
from app.top_bar import describe_left, describe_phase, memory_usage
from app.train.form import row_title
from app.train.start import can_resume, images_of
from lora_core.errors import RunError
from lora_core.projects.workspace import list_trash
from lora_core.report.plots import chart_tables, run_charts
from lora_core.runs.costs import Trial, compare_trials
from lora_core.runs.events import (
    A_LITTLE,
    MEMORIZED,
    SURE,
    PreviewDone,
    Progress,
    Validated,
    best_of,
    describe_average,
    describe_forgetting,
    describe_memorization,
    has_fallen,
    known_error,
    with_gain,
)
from lora_core.runs.queue import FAILED, WAITING, QueuedRun
from lora_core.settings.config import FIELDS
from lora_core.settings.schema import PRECISIONS, SAMPLE_PROMPTS
from lora_core.system.files import file_bytes
from lora_core.system.processes import log_tail

LOG_LINES = 40
MOST_WARNINGS = 3
MOST_ROWS, MOST_COLUMNS = 4, 60
MOST_GHOSTS = 7
"""Columns up to which samples to come have their places."""
MOST_EARLIER = 20
SPARK_WIDTH, SPARK_HEIGHT = 48, 20
ENCODE = ("Encoding images", "Encoding captions", "Finding the learning rate", "Trying the heaviest step")
STAGES = (
    ("Load base", ("Reading the images", "Opening the base model")),
    ("Encode images", ENCODE),
    ("Base samples", ("Sampling", "Validating")),
)
"""What comes before the first step: the trainer's phases, in their order."""


def run_card(snapshot: Snapshot) -> str:
    """The run shown: state, stages, what can be done now, and how it ended."""
    run, view, progress = snapshot.shown, snapshot.shown.view, snapshot.shown.progress
    if view is None:
        app_state, records = snapshot.app_state, images_of(snapshot)
        url = functools.partial(image_url, "dataset", app_state.project.dataset_folder)
        trash = list_trash(app_state.workspace) if app_state.jobs.missing() else []
        values = {"stages": stages(run), "images": records, "url": url, "trash": trash}
        return render("train/run.html", snap=snapshot, **values)
    found = with_gain(progress.validations)
    last, best = found[-1] if found else None, best_of(found)
    return render(
        "train/run.html",
        snap=snapshot,
        best=best,
        analysis=view.run.analysis(best.step) if best else None,
        url=run_url(snapshot.app_state),
        lower_rate=lower_rate,
        precisions=PRECISIONS,
        stages=stages(run),
        can_resume=can_resume(snapshot),
        doing=describe_phase(progress),
        memory=memory_usage(snapshot) if run.live else "",
        left=describe_left(run),
        gain=last if run.live else best or last,
        warnings=list(dict.fromkeys(progress.warnings[-MOST_WARNINGS:])),
        reported=(view.run.path / REPORT).is_file(),
        has_tensorboard=view.run.tensorboard.is_dir(),
        read_log=functools.partial(_read_log, snapshot),
    )


def _read_log(snapshot: Snapshot) -> str:
    view = snapshot.shown.view
    return "\n".join(log_tail(view.run.log_file, LOG_LINES)) if view else ""


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
        state = "done" if number < reached else "now" if number == reached and run.live else ""
        share = max(progress.phases.get(phase, 0.0) for phase in phases)
        percent = {"done": 100, "now": int(100 * share)}.get(state, 0)
        counted = state == "now" and progress.phase in phases and progress.phase_total > 1
        total = progress.phase_total
        note = _("{:,} of {:,}", round(progress.phases[progress.phase] * total), total) if counted else ""
        if state == "done" and (
            spans := [progress.spans[phase] for phase in phases if phase in progress.spans]
        ):
            note = format_duration(max(end for _, end in spans) - min(begin for begin, _ in spans))
        found.append({"name": name, "state": state, "percent": percent, "note": note})
    note = _("{done:,} of {total:,}", done=progress.step, total=progress.steps) if progress.steps else ""
    return [
        *found,
        {"name": "Train", "state": "now" if stepping else "", "percent": run.percent, "note": note},
    ]


verdicts_card = card("train/verdicts.html", verdicts=lambda snap: verdicts(snap.shown))
"""What the validations of the run shown mean; "" before the first."""
log_card = card("train/log.html", log=_read_log)
"""The end of the run's log, and a zip for bug reports."""
charts = card("train/charts.html")
"""The run's charts, which `assets/charts.js` asks for, and the test that found its learning rate."""


def charts_data(run_views: Sequence[RunView]) -> dict[str, Any]:
    """Improvement and loss of runs, each a curve of the same chart, with a note where nothing is measured."""
    first = run_views[0]
    found = run_charts({run_view.run.name: run_view.progress for run_view in run_views})
    config = first.config()
    every = config.validation.every if config else 0
    note = _("Improvement is first measured at step {:,}.", every) if every else _("Validation is off.")
    if any(with_gain(run_view.progress.validations) for run_view in run_views):
        note = ""
    elif not found:
        note = _("The curve begins with the first steps.")
    documents = [chart.document() for chart in found]
    for chart in documents:
        chart["title"] = _(chart["title"])
        if chart["mark"]:
            chart["mark"]["text"] = _("best, step {step:,}", step=int(chart["mark"]["x"]))
        for curve in chart["curves"]:
            curve["name"] = _(curve["name"])
    return {"charts": documents, "tables": chart_tables(found), "note": note}


def verdicts(run: ShownRun) -> list[dict[str, Any]]:
    """What the validations mean: name, grade (1 normal, 2 watch, 3 act), word, why, figures and one act."""
    found = with_gain(run.progress.validations)
    if not found:
        return _verdicts_to_come(run)
    last = found[-1]
    shown = {"show_preview": run.name}
    look = {"text": "See the curves", "data": {"curves": ""}}
    see = {"text": "Try it", "data": shown} if run.progress.best_step else look
    graded = [_grade_gain(found) | {"act": see}]
    if math.isfinite(last.gauge) and last.train_gain > 0:
        share = last.gauge / last.train_gain if last.gauge > SURE * known_error(last.gauge_error) else 0.0
        grade = 1 + (share >= MEMORIZED) + (share >= 1)
        why = _(describe_memorization(last)) or _("Held-out images improve as well.")
        stop = {"text": "Stop", "data": {"post": "run", "body": {"do": "stop", "run": ""}}}
        act = (stop if run.state == "running" else see) if grade == 3 else look
        figures = _("Gap {gap}", gap=format_gain(last.gauge, last.gauge_error))
        graded.append(_verdict("Overfitting", grade, ("Low", "Medium", "High")[grade - 1], why, figures, act))
    if math.isfinite(last.prior):
        share = 0.0
        if last.prior < -SURE * known_error(last.prior_error):
            share = -last.prior / last.gain if last.gain > 0 else math.inf
        grade = 1 + (share >= 1) + (share == math.inf)
        word = "High" if grade > 1 else "Normal" if share < A_LITTLE else "Some"
        why = _(describe_forgetting(last)) or _("The base's own images stay as they were.")
        if A_LITTLE <= share < math.inf:
            why += _(" Usual for a style; lower the strength if it bothers you.")
        act = {"text": "Try lower strengths", "data": shown} if see is not look and grade > 1 else look
        gain = format_gain(last.prior, last.prior_error)
        figures = _("Improvement on the base's own images {gain}", gain=gain)
        graded.append(_verdict("Drift from the base", grade, word, why, figures, act))
    average = describe_average(last)
    return [*graded, _verdict("EMA of weights", 1, "Measured", average, "", look)] if average else graded


def _verdicts_to_come(run: ShownRun) -> list[dict[str, Any]]:
    """The places of a live run's verdicts, so that nothing moves when they come: of grade 0, without acts."""
    config = run.view.config() if run.view and run.live else None
    if config is None or not config.validation.every or not (config.slider.on or config.validation.pictures):
        return []
    why = _("First measured at step {:,}.", config.validation.every)
    wanted = {
        "Improvement": True,
        "Overfitting": config.validation.memorization and not config.slider.on,
        "Drift from the base": config.validation.forgetting,
    }
    return [_verdict(name, 0, UNKNOWN, why, "", None) for name in wanted if wanted[name]]


def _verdict(
    name: str, grade: int, word: str, why: str, figures: str, act: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"name": name, "grade": grade, "word": word, "why": why, "figures": figures, "act": act}


def _grade_gain(found: list[Validated]) -> dict[str, Any]:
    """Whether held-out images improve, with the error of the difference to the best step."""
    last, best = found[-1], best_of(found)
    figures = _("Improvement {gain}", gain=format_gain(last.gain, last.standard_error))
    if best is None or best.gain < SURE * known_error(best.standard_error):
        if last.gain < -SURE * known_error(last.standard_error):
            return _verdict("Improvement", 3, "Worse", _("The base alone does better."), figures)
        why = _("Nothing certain up to step {:,}.", last.step)
        return _verdict("Improvement", 2, "None yet", why, figures)
    why, grade = _("Best so far: step {step:,}.", step=best.step), 1
    if last.step != best.step:
        error = known_error(last.against_best_error)
        if has_fallen(found):
            grade = 2
            why += _(" It is better than step {:,} by {:.4f} ± {:.4f}.", last.step, -last.against_best, error)
        else:
            why += _(" No certain difference since.")
    return _verdict("Improvement", grade, format_share(best.gain, best), why, figures)


def samples_card(snapshot: Snapshot) -> str:
    """All samples, one row per prompt from the base to the newest; a click enlarges one."""
    run_view = snapshot.shown.view
    if run_view is None:
        return ""
    rounds = select_rounds(snapshot.shown.progress.previews)
    ghosts = _steps_to_come(snapshot, run_view, rounds)
    config = run_view.config()
    expected = (len(config.sample.prompts) or SAMPLE_PROMPTS) if config and ghosts else 0
    return render(
        "train/samples.html",
        rounds=rounds,
        most=min(MOST_ROWS, max((len(one.files) for one in rounds), default=expected)),
        path=run_view.run.path,
        url=run_url(snapshot.app_state),
        ghosts=ghosts,
        best=snapshot.shown.progress.best_step,
    )


def _steps_to_come(snapshot: Snapshot, run_view: RunView, rounds: list[PreviewDone]) -> list[int]:
    """The next steps at which a live run will sample, as many as have a place beside those there are."""
    config = run_view.config()
    if config is None or not snapshot.shown.live or not config.sample.every:
        return []
    first = rounds[-1].step + config.sample.every if rounds else 0
    coming = range(first, config.train.steps + 1, config.sample.every)
    return list(coming)[: max(0, MOST_GHOSTS - len(rounds))]


def select_rounds(rounds: list[PreviewDone]) -> list[PreviewDone]:
    """The first round, the newest, and as many evenly spaced ones between as fit, oldest first."""
    if len(rounds) <= MOST_COLUMNS:
        return rounds
    last = len(rounds) - 1
    return [rounds[round(i * last / (MOST_COLUMNS - 1))] for i in range(MOST_COLUMNS)]


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
        url=run_url(snapshot.app_state),
        spark=sparkline,
        **values,
    )


def running(snapshot: Snapshot) -> str:
    """The heading, and the active run."""
    rows = [_Row(ShownRun(view, state)) for view, state in snapshot.runs if state in LIVE]
    return _render(snapshot, "running", rows=rows, any=bool(snapshot.runs))


def queue_card(snapshot: Snapshot) -> str:
    """What waits, in order; "" where nothing does."""
    app_state = snapshot.app_state
    try:
        present = app_state.queue.jobs()
    except RunError as error:
        return _render(snapshot, "queue", problem=str(error))
    runs = {view.run.name: ShownRun(view, state) for view, state in snapshot.runs}
    rows: list[_Row] = []
    waiting = 0
    for job in present:
        # A run that is trained now is listed above, and one that has ended below, unless its folder is gone.
        gone = ShownRun(app_state.jobs.run_view(app_state.queue.run(job.run)), FAILED)
        run = runs.get(job.run, gone)
        if not run.live and (not job.has_ended or (job.state == FAILED and run is gone)):
            waiting += job.state == WAITING
            rows.append(_Row(run, job, waiting if job.state == WAITING else 0))
    values = {"problem": "", "running": app_state.queue.runner(), "waiting": waiting, "rows": rows}
    return _render(snapshot, "queue", **values) if rows else ""


def earlier(snapshot: Snapshot) -> str:
    """The ended runs of the open project, newest first; those of other projects are folded below."""
    app_state = snapshot.app_state
    try:
        jobs = {job.run: job for job in app_state.queue.jobs()}
    except RunError:
        jobs = {}
    listed: list[list[_Row]] = [[], []]
    more = [0, 0]
    for view, state in snapshot.runs:
        job, other = jobs.get(view.run.name), not app_state.jobs.own(view)
        if state in LIVE or (job and not job.has_ended):
            continue
        # The run shown is listed however old it is.
        if len(listed[other]) < MOST_EARLIER or view is snapshot.shown.view:
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
        url=run_url(snapshot.app_state),
    )


def sweep_card(snapshot: Snapshot) -> str:
    """What the runs queued together with the run shown gained and took; "" where there are none."""
    app_state, run_view = snapshot.app_state, snapshot.shown.view
    name = run_view.run.name if run_view else ""
    together = next((one for one in reversed(app_state.queue.sweeps()) if name in one), [])
    views = {view.run.name: view for view, _ in snapshot.runs}
    there = [views[one] for one in together if one in views]
    trials = [Trial(v.run, config, v.progress) for v in there if (config := v.config()) is not None]
    if len(trials) < 2:
        return ""
    found = compare_trials(trials)
    labels = [label_of(setting) for setting in found["settings"]]
    return render("train/sweep_results.html", found=found, labels=labels)


def _exported_bytes(run: ShownRun) -> int:
    return max(map(file_bytes, run.view.run.exports.glob("*.safetensors")), default=0) if run.view else 0


def _nearest_samples(pair: tuple[ShownRun, ShownRun]) -> list[PreviewDone]:
    """The newest samples of both runs at the steps nearest to each other, [] where one has none."""
    first, second = (run.progress.previews for run in pair)
    if not first or not second:
        return []
    theirs = min(second, key=lambda one: abs(one.step - first[-1].step))
    return [min(first, key=lambda one: abs(one.step - theirs.step)), theirs]
