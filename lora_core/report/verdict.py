"""What came of a run, in two or three sentences: whether it learned, which file to take, what to mind."""

import math

from lora_core.report.story import Story
from lora_core.spec.events import Validated

SURE = 2.0
"""Standard errors beyond which a difference is told."""
STATES = {
    "queued": "It has not begun.",
    "preparing": "It is being prepared.",
    "running": "It is still going on.",
    "paused": "It is paused.",
    "stopped": "It was stopped early.",
    "interrupted": "It was broken off and can go on.",
    "failed": "It failed.",
    "done": "",
}


def verdict(story: Story) -> list[str]:
    """Sentences, the most important first."""
    said = [_learned(story), _forgets(story), _rank(story)]
    state = STATES.get(story.state, "")
    if state:
        said.append(f"{state} {story.ending}".strip())
    return [sentence for sentence in said if sentence]


def measured(story: Story) -> list[Validated]:
    """The validations that have a number."""
    return [one for one in story.progress.validations if math.isfinite(one.gain)]


def best_of(story: Story) -> Validated | None:
    """The validation of the best step, else the highest."""
    found = measured(story)
    if not found:
        return None
    chosen = [one for one in found if one.step == story.progress.best_step]
    return chosen[-1] if chosen else max(found, key=lambda one: one.gain)


def _learned(story: Story) -> str:
    best, found = best_of(story), measured(story)
    if best is None:
        return (
            "Whether it learned was not measured: no picture was held out."
            if story.progress.step
            else "Nothing was trained yet."
        )
    error = best.standard_error if math.isfinite(best.standard_error) else 0.0
    if best.gain <= -SURE * error:
        return "It did not learn: pictures that it had not seen are predicted worse than by the base."
    if best.gain < SURE * error:
        return "No gain on pictures that it had not seen can be told from chance."
    share = best.gain / best.base_loss if best.base_loss > 0 else math.nan
    much = f"{share:.0%} better than the base" if math.isfinite(share) else "better than the base"
    sentence = (
        f"It learned: pictures that it had not seen are predicted {much}, at best at step {best.step:,}."
    )
    return f"{sentence} {_overcooked(best, found[-1], story.best)}".strip()


def _overcooked(best: Validated, last: Validated, kept: bool) -> str:
    """Whether what came after the best step was learning by heart."""
    if last.step <= best.step:
        return ""
    heart = math.isfinite(last.gauge) and last.gauge > SURE * _error(last.gauge_error)
    error = last.against_best_error
    paired = math.isfinite(error) and last.against_best < -SURE * error
    unpaired = not math.isfinite(error) and best.gain - last.gain > SURE * math.hypot(
        _error(best.standard_error), _error(last.standard_error)
    )
    if paired or unpaired:
        why = " and learned by heart" if heart else ""
        take = f": take the file of step {best.step:,}" if kept else ""
        return f"After that it lost some of it again{why}{take}."
    return ""


def _error(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _forgets(story: Story) -> str:
    best = best_of(story)
    if best is None or not math.isfinite(best.prior):
        return ""
    if best.prior < -SURE * _error(best.prior_error):
        share = -best.prior / best.base_loss if best.base_loss > 0 else math.nan
        much = f" by {share:.1%}" if math.isfinite(share) else ""
        return f"What it should leave alone, the base's own pictures, is predicted worse{much}."
    return "What it should leave alone, the base's own pictures, is predicted as before."


def _rank(story: Story) -> str:
    if story.rank is None or story.rank["rank"] >= story.rank["trained"]:
        return ""
    return (
        f"Trained at rank {story.rank['trained']}, it needs {story.rank['rank']}: the file can be"
        f" {story.rank['times_smaller']:.1f} times smaller."
    )
