"""The right half of the Train tab as HTML: the run card, the charts, the samples, earlier runs."""

from app.charts import gain_chart, loss_chart
from app.header import run_words, track
from app.jobs import RESUMABLE, Watch
from app.moment import Moment
from app.routes import address
from app.words import UNKNOWN, about, clock, many, pace, safe, state_chip, tile
from app.worker import log_tail
from lora_core.spec.events import PreviewDone
from lora_core.spec.run_folder import runs_folder

MOST_ROWS, MOST_COLUMNS = 4, 6
MOST_EARLIER = 8


def run_card(moment: Moment) -> str:
    """State, bar and the four figures. `#run-status` is what scripts read."""
    progress = moment.progress
    open_tag = (
        f'<div class="panel" id="run-status" data-state="{moment.state}" data-step="{progress.step}"'
        f' data-steps="{progress.steps}">'
    )
    if moment.watch is None:
        return (
            f'{open_tag}<h2>No run yet</h2><p class="small">Press Start. The run goes on by itself, also when'
            " this page or the window is closed; here you see how far it is, how the loss falls and what it"
            " has learned.</p></div>"
        )
    name = moment.watch.run.name
    head = (
        f'<div class="row apart"><div class="row"><h2>{safe(name)}</h2><span'
        f' role="status">{state_chip(moment.state)}</span></div>{_next_step(moment)}</div>'
    )
    return f"{open_tag}{head}{track(moment, name)}{_body(moment, moment.watch)}</div>"


def _next_step(moment: Moment) -> str:
    """The one clear thing to do now."""
    if moment.state in ("done", "stopped"):
        return (
            '<div class="row"><button type="button" class="own primary" data-show-preview>See what it'
            ' learned</button><button type="button" class="own" data-tab="Export">Export</button></div>'
        )
    if moment.live:
        return ""
    return (
        '<div class="row"><button type="button" class="own primary" data-press="resume">Resume</button></div>'
    )


def _body(moment: Moment, watch: Watch) -> str:
    progress = moment.progress
    if moment.state == "failed":
        lines = "\n".join(log_tail(watch.run.log_file, 30))
        return (
            f'<p class="problem" role="alert">{safe(watch.reason() or "The run failed.")}</p><p'
            ' class="small">Nothing is lost: Resume goes on from the last checkpoint once the cause is'
            " gone.</p><details><summary>What it said last</summary><pre"
            f' class="log">{safe(lines)}</pre></details>'
        )
    if moment.state == "preparing" and not progress.losses:
        return f'<p class="small num">{safe(run_words(moment))}. Steps begin after that.</p>'
    warnings = "".join(f'<p class="small">{safe(text)}</p>' for text in dict.fromkeys(progress.warnings[-3:]))
    return f'<div class="facts">{"".join(_tiles(moment))}</div>{warnings}{_remark(moment)}'


def _tiles(moment: Moment) -> list[str]:
    progress = moment.progress
    tiles = [tile(f"{progress.step:,}", f"of {progress.steps:,} steps")]
    speed = pace(progress.seconds_a_step())
    if moment.state in ("running", "stopping", "pausing"):
        tiles.append(tile(clock(progress.seconds_left()), f"left, {speed}" if speed else "left"))
    else:
        tiles.append(
            tile(
                clock(sum(e.seconds for e in progress.losses)), f"of training, {speed}" if speed else "taken"
            )
        )
    loss = progress.smoothed_loss()
    tiles.append(tile(f"{loss:.4f}" if loss is not None else UNKNOWN, "loss, smoothed"))
    if progress.validations:
        last = progress.validations[-1]
        tiles.append(tile(f"{last.gain:+.4f}", f"gain on held-out, ±{last.standard_error:.4f}"))
    else:
        tiles.append(tile(UNKNOWN, "gain on held-out pictures"))
    return tiles


def _remark(moment: Moment) -> str:
    texts = {
        "pausing": "It saves a checkpoint after the present step and ends.",
        "stopping": "It saves, writes the file for other tools and ends.",
        "paused": "Resume goes on from here, with the same result as without the pause.",
        "stopped": "Ended early on request; the file of what it learned is there, and Resume goes on.",
        "interrupted": (
            "The process ended without a word, as in a power cut. Resume goes on from the last checkpoint."
        ),
        "queued": "The run was made but never started.",
    }
    text = texts.get(moment.state, "")
    return f'<p class="small">{safe(text)}</p>' if text else ""


def charts(moment: Moment) -> str:
    """The two curves side by side."""
    if moment.watch is None:
        return ""
    progress = moment.progress
    return (
        '<div class="panel"><div class="cols2 plots"><div><h3>Gain on pictures that it has never seen</h3>'
        f"{gain_chart(progress.validations)}</div><div><h3>Training loss, raw and smoothed</h3>"
        f"{loss_chart(progress.losses)}</div></div></div>"
    )


def samples(moment: Moment) -> str:
    """A row a prompt: the base at step 0 first, then what was learned, the newest last."""
    watch = moment.watch
    if watch is None:
        return ""
    rounds = _shown_rounds(moment.progress.previews)
    head = (
        '<div class="row apart"><h2>Samples</h2><span class="small">each row one prompt, same noise; step 0'
        " is the base</span></div>"
    )
    if not rounds:
        return (
            f'<div class="panel">{head}<p class="small">The first ones show the base, before it learns'
            " anything.</p></div>"
        )
    root = runs_folder(moment.desk.workspace)
    rows = []
    for row in range(min(MOST_ROWS, max(len(r.files) for r in rounds))):
        cells = []
        for one in rounds:
            if row < len(one.files):
                link = safe(address("run", root, watch.run.path / one.files[row]))
                prompt = one.prompts[row] if row < len(one.prompts) else ""
                cells.append(
                    f'<figure><a href="{link}" target="_blank"><img src="{link}" alt="{safe(prompt)}, step'
                    f' {one.step}"></a><figcaption class="small num">step {one.step:,}</figcaption></figure>'
                )
        prompt = rounds[-1].prompts[row] if row < len(rounds[-1].prompts) else ""
        rows.append(f'<div class="strip">{"".join(cells)}</div><p class="small prompt">{safe(prompt)}</p>')
    return f'<div class="panel">{head}{"".join(rows)}</div>'


def _shown_rounds(rounds: list[PreviewDone]) -> list[PreviewDone]:
    """The first, the newest, and as many between as fit, evenly spread."""
    if len(rounds) <= MOST_COLUMNS:
        return rounds
    last = len(rounds) - 1
    return [rounds[round(i * last / (MOST_COLUMNS - 1))] for i in range(MOST_COLUMNS)]


def earlier(moment: Moment) -> str:
    """The other runs, newest first, each with what can be done."""
    others = [(w, s) for w, s in moment.runs if w is not moment.watch]
    if not others:
        return ""
    rows = "".join(_row(watch, state, moment.live) for watch, state in others[:MOST_EARLIER])
    more = len(others) - MOST_EARLIER
    note = f'<p class="small">And {many(more, "older run")} in the workspace.</p>' if more > 0 else ""
    return f'<div class="panel"><h2>Earlier runs</h2><div class="list">{rows}</div>{note}</div>'


def _row(watch: Watch, state: str, live: bool) -> str:
    progress, name = watch.progress, safe(watch.run.name)
    steps = f"{progress.step:,} of {progress.steps:,} steps" if progress.steps else "no step yet"
    best = f", best at {progress.best_step:,}" if progress.best_step else ""
    took = sum(event.seconds for event in progress.losses)
    time = f", {about(took)}" if took else ""
    why = ' disabled title="A run is going on; pause or stop it first."' if live else ""
    resume = f'<button type="button" class="own quiet" data-run-resume="{name}"{why}>Resume</button>'
    show = f'<button type="button" class="own quiet" data-run-show="{name}"{why}>Show</button>'
    return (
        f'<div class="row apart"><div class="row">{state_chip(state)}<span>{name}</span>'
        f'<span class="small num">{steps}{best}{time}</span></div>'
        f'<div class="row">{resume if state in RESUMABLE else ""}{show}</div></div>'
    )
