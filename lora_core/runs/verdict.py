"""What the validations of a run mean, in sentences: gain, memorization, forgetting.

Command line, report and window ask here, so that they say the same.
"""

import math
from collections.abc import Sequence

from lora_core.runs.events import Validated

SURE = 2.0
"""Standard errors beyond which a difference counts."""
MEMORIZED = 0.25
"""Share of the gain on training images; where less is missing on others, that is usual."""
A_LITTLE = 0.1
"""Share of the gain; forgetting less is hardly seen."""


def verdict(validations: Sequence[Validated]) -> str:
    """A few sentences, the most important first; "" where nothing was measured."""
    found = with_gain(validations)
    if not found:
        return ""
    last = found[-1]
    sentences = (
        _describe_gain(found),
        describe_memorization(last),
        describe_forgetting(last),
        describe_average(last),
    )
    return " ".join(filter(None, sentences))


def with_gain(validations: Sequence[Validated]) -> list[Validated]:
    """The validations that have a number."""
    return [one for one in validations if math.isfinite(one.gain)]


def best_of(validations: Sequence[Validated]) -> Validated | None:
    """The best step: the newest that was called so when it was measured, which is not always the highest."""
    return next((one for one in reversed(with_gain(validations)) if one.best), None)


def known_error(value: float) -> float:
    """A standard error, 0 where it is not known."""
    return value if math.isfinite(value) else 0.0


def _describe_gain(found: Sequence[Validated]) -> str:
    last, best = found[-1], best_of(found)
    if best is None or best.gain < SURE * known_error(best.standard_error):
        if last.gain < -SURE * known_error(last.standard_error):
            return f"At step {last.step:,} it predicts held-out pictures worse than the base does."
        return f"No significant gain up to step {last.step:,}."
    if last.step == best.step:
        return "Still gaining." if len(found) > 1 else f"It gains on held-out pictures: {best.gain:+.4f}."
    if last.against_best < -SURE * known_error(last.against_best_error):
        return f"It has become worse since step {best.step:,}; the file of that step is better."
    return f"No further gain since step {best.step:,}."


def describe_memorization(last: Validated) -> str:
    """Whether it learns its images by heart, in a sentence; "" where it does not or was not measured."""
    if not (math.isfinite(last.gauge) and last.train_gain > 0):
        return ""
    share = last.gauge / last.train_gain
    if last.gauge <= SURE * known_error(last.gauge_error) or share < MEMORIZED:
        return ""
    if share >= 1:
        return "Memorization: its gain on training pictures does not carry over to others at all."
    return f"Memorization: {share:.0%} of its gain on training pictures does not carry over to others."


def describe_forgetting(last: Validated) -> str:
    """Whether it forgets what the base knew, in a sentence; "" where it does not or was not measured."""
    if not math.isfinite(last.prior) or last.prior >= -SURE * known_error(last.prior_error):
        return ""
    if last.gain <= 0:
        return "Forgetting: it gets worse on the base's own pictures."
    share = -last.prior / last.gain
    if share < A_LITTLE:
        return "Forgetting: it gets slightly worse on the base's own pictures."
    if share < 1:
        return f"Forgetting: it loses {share:.0%} as much on the base's own pictures as it gains on new ones."
    return "Forgetting: it loses more on the base's own pictures than it gains on new ones."


def describe_average(last: Validated) -> str:
    """Whether the averaged adapter or the raw one gains more, in a sentence; "" where there is no average."""
    if not math.isfinite(last.raw_gain):
        return ""
    gains = f"{last.gain:+.4f} and {last.raw_gain:+.4f}"
    error = known_error(last.raw_against_error)
    if abs(last.raw_against) <= SURE * error:
        return f"The averaged adapter and the raw one gain the same within the error: {gains}."
    gap = f"{abs(last.raw_against):.4f} (standard error {error:.4f})"
    if last.raw_against < 0:
        return f"The averaged adapter gains more than the raw one, by {gap}: {gains}."
    return (
        f"The raw adapter gains more than its average, by {gap}: {last.raw_gain:+.4f} and {last.gain:+.4f}."
    )
