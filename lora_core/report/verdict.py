"""What came of a run, in a few sentences: whether it learned, which file to take, what to mind.

Learning by heart and forgetting are told in the words that the window has for them (`spec/verdict.py`).
"""

import math

from lora_core.report.story import Story
from lora_core.spec.events import Validated
from lora_core.spec.verdict import SURE, best_of, by_heart, error_of, forgets, measured, raw_or_average

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
    found = measured(story.progress.validations)
    said = [_learned(story, found)]
    if found:
        said += [by_heart(found[-1]), forgets(found[-1]), raw_or_average(found[-1])]
    said.append(_rank(story))
    state = STATES.get(story.state, "")
    if state:
        said.append(f"{state} {story.ending}".strip())
    return [sentence for sentence in said if sentence]


def _learned(story: Story, found: list[Validated]) -> str:
    if not found:
        return (
            "Whether it learned was not measured: no picture was held out."
            if story.progress.step
            else "Nothing was trained yet."
        )
    best, last = best_of(found), found[-1]
    if best is None or best.gain < SURE * error_of(best.standard_error):
        if last.gain < -SURE * error_of(last.standard_error):
            return "It did not learn: pictures that it had not seen are predicted worse than by the base."
        return "No gain on pictures that it had not seen can be told from chance."
    share = best.gain / best.base_loss if best.base_loss > 0 else math.nan
    much = f"{share:.0%} better than by the base" if math.isfinite(share) else "better than by the base"
    at = "at the end" if best.step == story.progress.step else f"at best at step {best.step:,}"
    sentence = f"It learned: pictures that it had not seen are predicted {much}, {at}."
    return f"{sentence} {_overcooked(best, last, story.best)}".strip()


def _overcooked(best: Validated, last: Validated, kept: bool) -> str:
    """Whether it became worse after the best step, and what to do then."""
    if last.step <= best.step or not last.against_best < -SURE * error_of(last.against_best_error):
        return ""
    take = f"; take the file of step {best.step:,}" if kept else ""
    return f"After that it became worse{take}."


def _rank(story: Story) -> str:
    if story.rank is None or story.rank["rank"] >= story.rank["trained"]:
        return ""
    return (
        f"Trained at rank {story.rank['trained']}, it needs {story.rank['rank']}: the file can be"
        f" {story.rank['times_smaller']:.1f} times smaller."
    )
