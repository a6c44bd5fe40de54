"""What will happen, said before Start in plain sentences: pictures, looks, time, file size, and each
problem."""

from app.form import for_family
from app.moment import Moment
from app.words import UNKNOWN, about, file_size, many, safe, scientific, tile
from lora_core.spec.config import RunConfig
from lora_core.spec.sizes import export_bytes


def blockers(moment: Moment) -> list[str]:
    """Why Start cannot be pressed, each with what to do; empty where it can."""
    plan, dataset = moment.plan, moment.desk.project.dataset()
    found = list(plan.problems)
    if not dataset.records:
        found.append("There are no pictures yet: drop some on the Dataset tab.")
    found += [problem.sentence for problem in dataset.problems[:3]]
    if plan.base.problem:
        found.append("The base model cannot be used; below its name stands why.")
    if moment.live and moment.watch:
        found.append(f"The run {moment.watch.run.name} is going on; pause or stop it first.")
    return found


def facts(moment: Moment) -> str:
    """Three figures, a few sentences, and what is in the way."""
    config, dataset = moment.plan.config, moment.desk.project.dataset()
    shown = sum(record.repeats for record in dataset.records) or 1
    looks = config.train.steps * config.train.batch_size * config.train.accumulate / shown
    known = moment.plan.base.facts
    size = export_bytes(known, config) if known else None
    seconds = usual_pace(moment, config)
    tiles = [
        tile(f"{looks:,.0f}" if dataset.records else UNKNOWN, "looks at each picture"),
        tile(
            about(seconds * config.train.steps) if seconds else UNKNOWN,
            "at the last run's pace" if seconds else "time, known after a run",
        ),
        tile(file_size(size) if size else UNKNOWN, "file size"),
    ]
    stops = blockers(moment)
    # That a run is going on is no problem of the form's.
    tone = "small" if moment.live and len(stops) == 1 else "problem"
    problems = "".join(f"<li>{safe(text)}</li>" for text in stops)
    listed = f'<ul class="sentences {tone}" id="start-why">{problems}</ul>' if stops else ""
    return (
        f'<div class="facts three">{"".join(tiles)}</div><p'
        f' class="small">{safe(" ".join(_sentences(moment)))}</p>{listed}'
    )


def usual_pace(moment: Moment, config: RunConfig) -> float | None:
    """Seconds a step of the newest run of the same base and size, the only honest forecast before a probe."""
    for watch, _ in moment.runs:
        pace = watch.progress.seconds_a_step()
        if pace is None:
            continue
        other = watch.config()
        if other is not None and _cost(other) == _cost(config):
            return pace
    return None


def _cost(config: RunConfig) -> tuple[object, ...]:
    train = config.train
    return (config.model.base, train.resolution, train.batch_size, train.accumulate, train.checkpointing)


def _sentences(moment: Moment) -> list[str]:
    config, dataset = moment.plan.config, moment.desk.project.dataset()
    sentences = []
    if dataset.records:
        bare = sum(not record.caption for record in dataset.records)
        captions = "all with captions" if not bare else f"{bare} without a caption"
        sentences.append(f"{many(len(dataset.records), 'picture')}, {captions}.")
    sentences.append(f"Effective learning rate {scientific(config.optim.lr * config.adapter.scale)}.")
    if config.dataset.trigger:
        sentences.append(f"Trigger word: {config.dataset.trigger}.")
    held = config.validation.pictures
    if held and dataset.records and config.validation.every:
        count = held if held >= 1 else held * len(dataset.records)
        sentences.append(f"About {max(1, round(count))} held out to measure on.")
    return sentences


def base_note(moment: Moment) -> str:
    """What the chosen base is, and what the form starts with because of it."""
    plan = moment.plan
    tone = "problem" if plan.base.problem else "small"
    sentences = [plan.base.sentence]
    own = for_family(plan.goal, plan.level, plan.base.family)
    if own:
        sentences.append(f"For it the preset starts with {', '.join(own)}.")
    trained_at = plan.config.train.resolution
    if plan.base.facts and trained_at and trained_at != plan.base.resolution:
        sentences.append(f"You train it at {trained_at} px.")
    return f'<p class="{tone}" id="base-note" role="status">{safe(" ".join(sentences))}</p>'
