"""The run as HTML: card with state and buttons, loss and gain charts, log, and samples (one row per prompt,
base first)."""

import math
from collections.abc import Callable, Sequence

from app.formatting import (
    UNKNOWN,
    describe_changes,
    format_bytes,
    format_clock,
    format_speed,
    safe,
    state_chip,
    tile,
)
from app.jobs import RunView
from app.routes import image_url
from app.state import Snapshot
from app.top_bar import accept_button, describe_run, percent, request_button, resume_button, track
from app.train.checks import with_labels
from lora_core.report.plots import MOST_POINTS, Curve, Mark, curves_plot, downsample
from lora_core.report.rank_plots import rate_html
from lora_core.runs.costs import num_rounds
from lora_core.runs.events import PreviewDone, RateFound, StepDone, Validated
from lora_core.runs.folder import runs_folder
from lora_core.runs.progress import smooth
from lora_core.runs.verdict import SURE, best_of, known_error, verdict, with_gain
from lora_core.settings.choices import PRECISIONS
from lora_core.system.hardware import resident_bytes
from lora_core.system.processes import log_tail

DIGITS = 7


def _empty(text: str) -> str:
    return f'<p class="plot-empty small">{safe(text)}</p>'


def loss_chart(losses: Sequence[StepDone]) -> str:
    """Training loss, raw and smoothed."""
    points = [(float(e.step), round(e.loss, DIGITS)) for e in losses if math.isfinite(e.loss)]
    if len(points) < 2:
        return _empty("The curve begins with the first steps.")
    # Rounded, so that a constant loss does not plot rounding errors.
    means = [round(y, DIGITS) for y in smooth([y for _, y in points])]
    calm = downsample([(x, y) for (x, _), y in zip(points, means, strict=True)])
    raw = downsample(points)
    stride = math.ceil(len(points) / MOST_POINTS) or 1
    ys = sorted(y for _, y in raw)
    # A single outlier must not flatten the curve.
    top = max(ys[int(0.98 * (len(ys) - 1))], max(y for _, y in calm))
    label = f"Training loss, now {calm[-1][1]:.4f} smoothed"
    drawn = curves_plot(
        label,
        [Curve("each step", raw, (), "raw"), Curve("smoothed", calm)],
        highest=top if top > ys[0] else None,
    )
    # The page's slider smooths the drawn points, so it needs the number of steps per point.
    return drawn.replace('<polyline class="raw"', f'<polyline class="raw" data-stride="{stride}"', 1)


def gain_chart(validations: Sequence[Validated]) -> str:
    """Gain on held-out images with two standard errors, gain on training images, and the best step."""
    found = with_gain(validations)
    if not found:
        return _empty("Measured from time to time on the pictures that are held out.")
    trained = [one for one in found if math.isfinite(one.train_gain)]
    curves = [_curve("held-out pictures", found, "smooth", lambda e: e.gain, lambda e: e.standard_error)]
    if trained:
        curves.append(_curve("training pictures", trained, "second", lambda e: e.train_gain))
    best = best_of(found)
    raw = [one for one in found if math.isfinite(one.raw_gain)]
    if raw:
        curves.append(_curve("held-out pictures, raw adapter", raw, "third", lambda e: e.raw_gain))
    mark = Mark(float(best.step), best.gain, f"best, step {best.step:,}") if best else None
    words = f", best {best.gain:+.4f} at step {best.step}" if best else ""
    return curves_plot(f"Gain on held-out pictures{words}", curves, mark)


def _curve(
    name: str,
    found: Sequence[Validated],
    style: str,
    value: Callable[[Validated], float],
    error: Callable[[Validated], float] | None = None,
) -> Curve:
    # Step 0 is the base, with a gain of 0 by definition.
    points = [(0.0, 0.0), *((float(one.step), value(one)) for one in found)]
    errors = [0.0, *(SURE * known_error(error(one)) for one in found)] if error else ()
    return Curve(name, points, errors, style)


def describe_gain(validations: Sequence[Validated]) -> str:
    """What the gain curve means, with the two measurements behind it."""
    said = verdict(validations)
    if not said:
        return ""
    last = with_gain(validations)[-1]
    gauges = _gauge("Learning by heart", last.gauge, last.gauge_error)
    gauges += _gauge("The base's own pictures", last.prior, last.prior_error)
    row = f'<p class="small num gauges">{gauges}</p>' if gauges else ""
    return f'<div class="meaning" id="verdict"><p role="status">{safe(said)}</p>{row}</div>'


def _gauge(name: str, value: float, error: float) -> str:
    """A measurement with its error."""
    if not math.isfinite(value):
        return ""
    tips = {
        "Learning by heart": "How much more training pictures gain than held-out ones.",
        "The base's own pictures": "Gain on pictures that the base made; below 0 they are being forgotten.",
    }
    words = f"{value:+.4f} ± {known_error(error):.4f}".replace("-", "\N{MINUS SIGN}")
    return f'<span title="{safe(tips[name])}">{safe(name)} {words}</span>'


ASKS = ("preview", "save", "pause", "stop")
TWINS = {"preview": "sample-now", "save": "save-now", "pause": "train-pause", "stop": "train-stop"}
LOG_LINES = 40
MOST_WARNINGS = 3


def run_card(snapshot: Snapshot) -> str:
    """State, bar, buttons and four figures; scripts read `#run-status`."""
    progress = snapshot.progress
    open_tag = (
        f'<div class="panel" id="run-status" data-state="{snapshot.state}" data-step="{progress.step}"'
        f' data-steps="{progress.steps}">'
    )
    if snapshot.run_view is None:
        return (
            f'{open_tag}<h2>No run yet</h2><p class="small">Press Start. The run goes on by itself, also when'
            " this page or the window is closed; here you see how far it is, how the loss falls and what it"
            f' has learned.</p><div class="row">{_requests(snapshot)}</div></div>'
        )
    name = snapshot.run_view.run.name
    head = (
        f'<div class="row apart"><div class="row"><h2>{safe(name)}</h2><span'
        f' role="status">{state_chip(snapshot.state)}</span></div><div class="row'
        f' run-buttons">{_next_step(snapshot)}</div></div>'
    )
    return f"{open_tag}{head}{track(snapshot, name)}{_body(snapshot, snapshot.run_view)}</div>"


def _requests(snapshot: Snapshot) -> str:
    return "".join(request_button(snapshot, do, TWINS[do]) for do in ASKS)


def _next_step(snapshot: Snapshot) -> str:
    """What can be done now, most useful first."""
    if snapshot.live or snapshot.run_view is None:
        return _requests(snapshot)
    if snapshot.state == "done":
        return _see_it(snapshot)
    if snapshot.asks:
        yes = accept_button(snapshot.run_view, "train-accept", "primary")
        return yes + resume_button(snapshot, "train-resume")
    again = resume_button(snapshot, "train-resume", "" if snapshot.state == "stopped" else "primary")
    return _see_it(snapshot) + again if snapshot.state == "stopped" else again


def _see_it(snapshot: Snapshot) -> str:
    name = safe(snapshot.run_view.run.name if snapshot.run_view else "")
    return (
        f'<button type="button" class="own primary" id="see-result" data-show-preview="{name}">See what it'
        ' learned</button><button type="button" class="own" data-tab="Export">Export</button>'
    )


def _body(snapshot: Snapshot, run_view: RunView) -> str:
    progress = snapshot.progress
    if snapshot.asks:
        return _asking(snapshot, run_view)
    if snapshot.state in ("failed", "interrupted"):
        return _broken(snapshot, run_view)
    if snapshot.state == "queued":
        return f'<p class="small">{_queued(snapshot, run_view)}</p>'
    if snapshot.state == "preparing" and not progress.losses:
        return (
            f'<p class="small num" id="run-phase">{safe(describe_run(snapshot))}. Steps begin after'
            f" that.{_memory(snapshot, run_view)}</p>"
        )
    warnings = "".join(
        f'<p class="small notes">{safe(text)}</p>'
        for text in dict.fromkeys(progress.warnings[-MOST_WARNINGS:])
    )
    tiles = "".join(_tiles(snapshot))
    return f'<div class="facts">{tiles}</div>{_line(snapshot, run_view)}{warnings}{_remark(snapshot)}'


def _queued(snapshot: Snapshot, run_view: RunView) -> str:
    if snapshot.app_state.queue.holds(run_view.run.name):
        return "It waits in the queue below."
    return "The run was made but never started. Resume starts it."


def _asking(snapshot: Snapshot, run_view: RunView) -> str:
    """The inputs that changed since the run began, and what each answer does."""
    step = run_view.resume_info().step
    kept = f" What it saved up to step {step:,} stays in each case." if step else ""
    again = f"Continue at step {step:,}" if step else "Start again"
    return (
        f'<p class="notes" role="alert" data-hint="changed">{safe(describe_changes(run_view.changed))} Go on'
        f' all the same?</p><p class="small num">Reached {_reached(snapshot)}. With the changes it goes on'
        " with what is there now, and the result is not that of an unbroken run. To have that one, put back"
        f" what has changed and press {again}. Or leave the run as it is.{kept}</p>"
    )


def _reached(snapshot: Snapshot) -> str:
    return f"{percent(snapshot)}%, step {snapshot.progress.step:,} of {snapshot.progress.steps:,}"


def _broken(snapshot: Snapshot, run_view: RunView) -> str:
    """Why the run ended, what to change, and where it resumes."""
    after = run_view.resume_info()
    why = run_view.reason() or "The run ended without saying why."
    keeps = (
        f"Nothing before step {after.step:,} is lost: it goes on there with the same result as without the"
        " break."
        if after.step
        else "It had not saved a checkpoint yet, so it starts again from the beginning."
    )
    lines = "\n".join(log_tail(run_view.run.log_file, LOG_LINES))
    log = (
        '<details><summary>What it said last</summary><pre class="log"'
        f' tabindex="0">{safe(lines)}</pre></details>'
        if lines
        else ""
    )
    return (
        f'<p class="problem" role="alert">{safe(with_labels(why))}</p>{_less_memory(run_view)}<p'
        f' class="small num">Reached {_reached(snapshot)}. {keeps}</p>{log}'
    )


def _less_memory(run_view: RunView) -> str:
    """After running out of memory: the two settings to lower, with their values and location."""
    config = run_view.config()
    if config is None or not run_view.out_of_memory:
        return ""
    batch, side = config.train.batch_size, config.train.resolution
    size = f"{side} px" if side else "as the base"
    precision = PRECISIONS[config.train.precision].title
    return (
        '<p class="small" data-hint="memory">Two settings decide how much memory a run takes: <b>Batch'
        f" size</b> (Memory and speed; it was {batch}) and <b>Resolution</b> (it was {size}). Lower one and"
        " start a new run; Resume keeps the old ones. <b>Gradient checkpointing</b> saves much memory too"
        f" and costs a third of the speed; the precision was {safe(precision)}.</p>"
    )


def _tiles(snapshot: Snapshot) -> list[str]:
    progress = snapshot.progress
    tiles = [tile(f"{progress.step:,}", f"of {progress.steps:,} steps")]
    if snapshot.live:
        speed = format_speed(progress.seconds_a_step())
        tiles.append(tile(format_clock(progress.seconds_left()), f"left, {speed}" if speed else "left"))
    else:
        took = sum(event.seconds for event in progress.losses)
        # Averaged over the whole run: the last steps may not match the elapsed time next to it.
        mean = format_speed(took / len(progress.losses)) if progress.losses else ""
        tiles.append(tile(format_clock(took), f"of training, {mean}" if mean else "taken"))
    loss = progress.smoothed_loss()
    tiles.append(tile(f"{loss:.4f}" if loss is not None else UNKNOWN, "loss, smoothed"))
    if progress.validations:
        last = progress.validations[-1]
        tiles.append(tile(f"{last.gain:+.4f}", f"gain on held-out, ±{last.standard_error:.4f}"))
    else:
        tiles.append(tile(UNKNOWN, "gain on held-out pictures"))
    return tiles


def _line(snapshot: Snapshot, run_view: RunView) -> str:
    """What the run does between steps, and its memory."""
    if not snapshot.live:
        return ""
    progress = snapshot.progress
    count = f", {progress.phase_done} of {progress.phase_total}" if progress.phase_total > 1 else ""
    doing = f"{progress.phase}{count}" if progress.phase else "Training"
    return f'<p class="small num" id="run-phase">{safe(doing)}.{_memory(snapshot, run_view)}</p>'


def _memory(snapshot: Snapshot, run_view: RunView) -> str:
    """Memory of the trainer's process; "" if unknown."""
    process = run_view.run.live_process()
    held = resident_bytes(process)
    if process is None or held is None:
        return ""
    card = snapshot.app_state.hardware.card()
    own = card.by_process.get(process.pid) if card else None
    # Coarse, so that the line does not flicker at every poll.
    on_card = f" and {format_bytes(own)} on the graphics card" if own else ""
    return f" Its process holds {round(held / 1e8) / 10:.1f} GB of memory{on_card}."


def _remark(snapshot: Snapshot) -> str:
    reason = snapshot.progress.reason
    if snapshot.state == "paused" and reason:
        # A pause that was not requested, e.g. because the drive is full.
        return f'<p class="problem" role="alert" data-hint="paused">{safe(with_labels(reason))}</p>'
    if snapshot.state == "stopped" and reason:
        # Early stopping.
        return (
            f'<p role="status" data-hint="early">{safe(with_labels(reason))} The file of what it learned is'
            " there.</p>"
        )
    texts = {
        "pausing": "It saves a checkpoint after the current step and ends.",
        "stopping": "It saves, writes the file for other tools and ends.",
        "paused": "Resume goes on from here, with the same result as without the pause.",
        "stopped": (
            "Ended early on request; the file of what it learned is there, and it can be gone on with."
        ),
    }
    text = texts.get(snapshot.state, "")
    return f'<p class="small">{safe(text)}</p>' if text else ""


def charts(snapshot: Snapshot) -> str:
    """Both charts side by side, with a smoothing slider."""
    if snapshot.run_view is None:
        return ""
    progress = snapshot.progress
    smoothing = (
        '<label class="small smoothing">Smoothing <input type="range" id="smoothing" min="0" max="200"'
        ' step="5" value="50" aria-label="Smoothing of the loss, in steps"></label>'
        if len(progress.losses) > 1
        else ""
    )
    return (
        f'<div class="panel">{describe_gain(progress.validations)}<div class="cols2 plots"><div><h3>Gain on'
        f" pictures that it has never seen</h3>{gain_chart(progress.validations)}</div><div><div"
        f' class="row apart"><h3>Training loss</h3>{smoothing}</div>{loss_chart(progress.losses)}</div>'
        f"</div>{_rate(progress.rate)}</div>"
    )


def _rate(found: RateFound | None) -> str:
    """The learning-rate search, if there was one."""
    if found is None:
        return ""
    title = f"Learning rate {found.rate:.2g}, found by a range test"
    return (
        f'<details id="rate"><summary>{title}</summary><div class="plots">{rate_html(found)}</div></details>'
    )


def log_card(snapshot: Snapshot) -> str:
    """The end of the run's log, and a zip for bug reports."""
    run_view = snapshot.run_view
    if run_view is None:
        return ""
    lines = "\n".join(log_tail(run_view.run.log_file, LOG_LINES)) or "Nothing yet."
    name = safe(run_view.run.name)
    return (
        '<div class="panel tight"><details id="log"><summary>Log</summary><pre class="log"'
        f' tabindex="0">{safe(lines)}</pre></details><div class="row apart"><span class="small">Something'
        " odd? This zip holds settings, versions, events and the log; no pictures, no paths, no"
        f' names.</span><a class="own" id="debug-zip" href="/easel/debug/{name}" download>Debug'
        " zip</a></div></div>"
    )


RAW = ", raw adapter (above: its average)"
MOST_ROWS, FEWEST_COLUMNS, MOST_COLUMNS = 4, 3, 6


def samples_card(snapshot: Snapshot) -> str:
    """All samples; a click enlarges one."""
    run_view = snapshot.run_view
    if run_view is None:
        return ""
    rounds = select_rounds(snapshot.progress.previews)
    head = (
        '<div class="row apart"><h2>Samples</h2><span class="small">each row one prompt, same noise; first'
        " the base, then the newest</span></div>"
    )
    if not rounds:
        return (
            f'<div class="panel">{head}<p class="small">The first ones show the base, before it learns'
            " anything.</p></div>"
        )
    columns = _columns(run_view, len(rounds))
    kinds = (False, True) if any(one.raw_files for one in rounds) else (False,)
    strips = [
        _strip(snapshot, run_view, rounds, (row, raw), columns)
        for row in range(min(MOST_ROWS, max(len(r.files) for r in rounds)))
        for raw in kinds
    ]
    return f'<div class="panel">{head}{"".join(strips)}</div>'


def _strip(
    snapshot: Snapshot, run_view: RunView, rounds: list[PreviewDone], which: tuple[int, bool], columns: int
) -> str:
    """Samples of one prompt over the rounds; `which`: its index, and whether from the raw adapter."""
    row, raw = which
    root = runs_folder(snapshot.app_state.workspace)
    prompt = rounds[0].prompts[row] if row < len(rounds[0].prompts) else ""
    words = safe(f"{prompt}{RAW if raw else ''}")
    cells = []
    for one in rounds:
        files = one.raw_files if raw else one.files
        if row < len(files):
            link = safe(image_url("run", root, run_view.run.path / files[row]))
            shown = safe(one.prompts[row] if row < len(one.prompts) else "")
            step = f"step {one.step:,}" + (", the base" if one.step == 0 else "")
            cells.append(
                f'<figure><a href="{link}" target="_blank" data-large="{row}{"-raw" if raw else ""}"'
                f' data-words="{step}: {shown}"><img src="{link}" alt="{shown}, {step}"></a><figcaption'
                f' class="small num">{step}</figcaption></figure>'
            )
    return (
        f'<p class="small prompt" title="{words}">{words}</p><div'
        f' class="strip" style="--count:{columns}">{"".join(cells)}</div>'
    )


def _columns(run_view: RunView, there: int) -> int:
    """As many columns as the run will fill, so that images keep their size."""
    config = run_view.config()
    planned = num_rounds(config.train.steps, config.sample.every) if config else 0
    return min(MOST_COLUMNS, max(FEWEST_COLUMNS, planned, there))


def select_rounds(rounds: list[PreviewDone]) -> list[PreviewDone]:
    """The first round, then the newest and as many evenly spaced ones as fit, newest first."""
    if len(rounds) > MOST_COLUMNS:
        last = len(rounds) - 1
        rounds = [rounds[round(i * last / (MOST_COLUMNS - 1))] for i in range(MOST_COLUMNS)]
    return [*rounds[:1], *reversed(rounds[1:])]
