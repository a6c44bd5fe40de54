"""The forecast and the problems of the run to come, shown before Start."""

from app.formatting import (
    UNKNOWN,
    format_bytes,
    format_duration,
    format_scientific,
    format_speed,
    pluralize,
    post_button,
    safe,
    tile,
)
from app.state import Snapshot
from lora_core.runs.costs import MEASURED, PROBED, SCALED, RunForecast, forecast_run
from lora_core.runs.preflight import caption_bytes
from lora_core.settings.config import RunConfig
from lora_core.settings.schema import AUTO
from lora_core.system.hardware import card_problem

SOURCES = {MEASURED: "measured", PROBED: "measured", SCALED: "estimated"}
NO_PICTURES = "There are no pictures yet: drop some on the Dataset tab, or try the demo there."


def blockers(snapshot: Snapshot) -> list[str]:
    """Why Start is disabled, each with what to do; empty where it is not."""
    found = start_problems(snapshot)
    if snapshot.live and snapshot.run_view:
        found.append(
            f"The run {snapshot.run_view.run.name} is going on; pause or stop it first, or add this one to"
            " the queue."
        )
    return found


def start_problems(snapshot: Snapshot) -> list[str]:
    """What must be fixed before this run can be started or queued."""
    plan, dataset = snapshot.plan, snapshot.app_state.project.dataset()
    found = list(plan.problems)
    if not dataset.records and not dataset.problems:
        found.append(NO_PICTURES)
    if plan.base.remote:
        found.append("The base model is not on this computer yet; download it, below its name.")
    elif plan.base.problem:
        found.append("The base model cannot be used; the reason is below its name.")
    known = snapshot.app_state.checks.known(plan.config, dataset)
    bad_base = bool(plan.base.problem)
    found += [one.sentence for one in known if one.blocking and not (bad_base and one.kind == "base")]
    return list(dict.fromkeys(found))


def notes(snapshot: Snapshot) -> list[str]:
    """What a user should know before Start, but may disregard."""
    plan, dataset = snapshot.plan, snapshot.app_state.project.dataset()
    known = [one for one in snapshot.app_state.checks.known(plan.config, dataset) if not one.blocking]
    # Not repeated: it is shown below the base's name.
    found = [one.sentence for one in known if not (plan.base.remote and one.kind == "base")]
    found += plan.notes
    hardware = snapshot.app_state.hardware
    card, worker = hardware.card(), snapshot.app_state.worker
    if card is not None and worker.device == "cpu" and plan.config.train.device == AUTO:
        found.insert(0, card_problem(card, worker.found) + " Until then the processor trains.")
    elif hardware.known and not hardware.has_gpu and not plan.base.embedded:
        found.insert(
            0,
            "No graphics card was found, so the processor trains. That works, but a base of this size takes"
            " hours; the embedded base takes minutes.",
        )
    return found


def facts(snapshot: Snapshot) -> str:
    """Three figures, a few sentences, and what is in the way."""
    expected = forecast(snapshot, snapshot.plan.config)
    tried = snapshot.app_state.prober.known(snapshot.plan.config)
    is_measured = bool(tried and tried.peak)
    memory, size = expected.memory_bytes, expected.file_bytes
    tiles = [
        tile(
            format_duration(expected.seconds) if expected.seconds else UNKNOWN,
            SOURCES.get(expected.source, "time, known after some steps"),
        ),
        tile(
            f"{'' if is_measured else '~'}{memory / 1e9:.1f} GB" if memory else UNKNOWN,
            _memory_words(snapshot, is_measured),
        ),
        tile(format_bytes(size) if size else UNKNOWN, "file size"),
    ]
    stops = blockers(snapshot)
    # A run that is going on is no problem of the form's.
    tone = "small" if snapshot.live and len(stops) == 1 else "problem"
    return (
        f'<div class="facts three">{"".join(tiles)}</div>{_measuring(snapshot, expected)}<p'
        f' class="small">{safe(" ".join(_sentences(snapshot, expected)))}</p>'
        + _listed(notes(snapshot), "small notes", "start-notes")
        + _listed(stops, tone, "start-why")
    )


def forecast(snapshot: Snapshot, config: RunConfig) -> RunForecast:
    """What a run will take, from all that this window knows."""
    app_state, base = snapshot.app_state, snapshot.plan.base
    runs = [(run_view.progress, run_view.config()) for run_view, _ in snapshot.runs]
    records, costs = app_state.project.dataset().records, app_state.prober.costs()
    return forecast_run(config, base.facts, records, runs, costs, app_state.hardware.has_gpu)


def _measuring(snapshot: Snapshot, expected: RunForecast) -> str:
    """Where the time comes from, and the way to measure it; one line in each case, so that nothing jumps."""
    config, prober = snapshot.plan.config, snapshot.app_state.prober
    if prober.working(config):
        done, total = prober.steps_done()
        count = f", {done} of {total}" if total else ""
        return _line("working", f"Trying some steps{count}.", "unmeasure", "Stop")
    tried = prober.known(config)
    if tried and expected.source == PROBED:
        return _line("known", f"A step was tried on this computer: {format_speed(tried.step)}.")
    if expected.source == MEASURED:
        speed = format_speed(expected.seconds_a_step)
        return _line("known", f"A run like it took {speed}, samples included.")
    if not snapshot.plan.base.facts or snapshot.plan.problems:
        return _line("off", "The time is measured once the settings can be used.")
    if snapshot.app_state.project.dataset().records and not snapshot.live and prober.schedule(config):
        return _line("soon", "The time is measured in a moment.")
    unknown = "The time is an estimate." if expected.seconds else "The time is not known yet."
    why = prober.problem(config) or unknown
    return _line("offered", why, "measure", "Measure it", _what_it_takes(snapshot))


def _line(state: str, words: str, do: str = "", name: str = "", tip: str = "") -> str:
    button = f" {post_button(name, 'run', {'do': do}, tip=tip)}" if do else ""
    return f'<p class="small num measuring" id="measuring" data-measuring="{state}">{safe(words)}{button}</p>'


def _what_it_takes(snapshot: Snapshot) -> str:
    """What measuring costs, for the button's tip."""
    base, hardware = snapshot.plan.base, snapshot.app_state.hardware
    takes = "Opens the base and takes a few steps on noise; nothing is kept but the time."
    if base.embedded or hardware.has_gpu:
        return takes
    return f"{takes} On the processor that takes some minutes and the memory that training takes."


def _listed(sentences: list[str], tone: str, name: str) -> str:
    if not sentences:
        return ""
    rows = "".join(f"<li>{safe(text)}</li>" for text in sentences)
    return f'<ul class="sentences {tone}" id="{name}">{rows}</ul>'


def _memory_words(snapshot: Snapshot, measured: bool) -> str:
    card = snapshot.app_state.hardware.card()
    words = "memory, measured" if measured else "memory"
    return f"{words}, of {card.total / 2**30:.0f} GB on the card" if card else "memory, roughly"


def _sentences(snapshot: Snapshot, expected: RunForecast) -> list[str]:
    config, records = snapshot.plan.config, snapshot.app_state.project.dataset().records
    sentences = []
    if records:
        bare = expected.pictures - expected.captions
        captions = "all with captions" if not bare else f"{bare} without a caption"
        looks = pluralize(max(1, round(expected.looks)), "time")
        sentences.append(
            f"{pluralize(expected.pictures, 'picture')}, {captions}."
            f" {pluralize(expected.steps, 'step')} look at each about {looks}."
        )
        sentences += _caption_sentences(snapshot)
    if config.optimizer.range_test:
        sentences.append(
            "A range test finds the learning rate before the first step, beginning around"
            f" {_rate(config.optimizer.lr)}; it takes about as long as 65 steps."
        )
        return sentences
    sentences.append(
        f"Effective learning rate {_rate(config.optimizer.lr * config.adapter.scale)}"
        f" ({_rate(config.optimizer.lr)} \N{MULTIPLICATION SIGN} {config.adapter.scale:.3g})."
    )
    if config.dataset.trigger:
        sentences.append(f"Trigger word: {config.dataset.trigger}.")
    held = config.validation.pictures
    by_hand = sum(record.held_out for record in records)
    if by_hand:
        sentences.append(f"{by_hand} held out by hand to measure on.")
    elif held and records and config.validation.every:
        count = held if held >= 1 else held * len(records)
        sentences.append(f"About {max(1, round(count))} held out to measure on.")
    return sentences


def _caption_sentences(snapshot: Snapshot) -> list[str]:
    """What captions that vary cost, where they do."""
    known = snapshot.plan.base.facts
    records = snapshot.app_state.project.dataset().records
    drawn = caption_bytes(records, snapshot.plan.config, known)[1] if known else 0
    if not drawn:
        return []
    return [
        "Captions vary from look to look, so each is encoded as it comes; up to"
        f" {format_bytes(drawn)} of them stay in memory, none on disk."
    ]


def _rate(value: float) -> str:
    """A learning rate that is not broken over two lines."""
    return format_scientific(value).replace("-", "\N{NON-BREAKING HYPHEN}")
