"""What the validations of a run say so far, in words: whether it still gains, learns by heart, forgets.

Command line, report and window say the same, because they ask here.
"""

import math
from collections.abc import Sequence

from lora_core.runs.events import Validated

SURE = 2.0
"""Standard errors beyond which a difference is told."""
BY_HEART = 0.25
"""Where less than this share of the gain on training pictures is missing on others, that is as it always
is."""
A_LITTLE = 0.1
"""Of the gain: forgetting less is hardly seen."""


def verdict(validations: Sequence[Validated]) -> str:
    """A few sentences, the most important first; "" where nothing was measured."""
    found = with_gain(validations)
    if not found:
        return ""
    return " ".join(
        filter(
            None,
            (
                _gains(found),
                describe_memorization(found[-1]),
                describe_forgetting(found[-1]),
                describe_average(found[-1]),
            ),
        )
    )


def with_gain(validations: Sequence[Validated]) -> list[Validated]:
    """The validations that have a number."""
    return [one for one in validations if math.isfinite(one.gain)]


def best_of(validations: Sequence[Validated]) -> Validated | None:
    """The best step: the newest that was called so when it was measured, which is not always the highest."""
    return next((one for one in reversed(with_gain(validations)) if one.best), None)


def known_error(value: float) -> float:
    """A standard error, 0 where it is not known."""
    return value if math.isfinite(value) else 0.0


def _gains(found: Sequence[Validated]) -> str:
    last, best = found[-1], best_of(found)
    if best is None or best.gain < SURE * known_error(best.standard_error):
        if last.gain < -SURE * known_error(last.standard_error):
            return f"At step {last.step:,} it predicts new pictures worse than the base does."
        return f"Up to step {last.step:,} no gain can be told from chance."
    if last.step == best.step:
        return (
            "Still gaining."
            if len(found) > 1
            else f"It gains on pictures that it has not seen: {best.gain:+.4f}."
        )
    if last.against_best < -SURE * known_error(last.against_best_error):
        return f"It has become worse since step {best.step:,}; that step's file is the better one."
    return f"Nothing gained since step {best.step:,}."


def describe_memorization(last: Validated) -> str:
    """Whether it learns by heart, in a sentence; "" where nothing tells of it."""
    if not (math.isfinite(last.gauge) and last.train_gain > 0):
        return ""
    share = last.gauge / last.train_gain
    if last.gauge <= SURE * known_error(last.gauge_error) or share < BY_HEART:
        return ""
    if share >= 1:
        return "It is learning by heart: what it gains on its own pictures helps with no others."
    return (
        f"It is learning by heart: {share:.0%} of what it gains on its own pictures is not gained on others."
    )


def describe_forgetting(last: Validated) -> str:
    """Whether it forgets what the base knew, in a sentence; "" where nothing tells of it."""
    if not math.isfinite(last.prior) or last.prior >= -SURE * known_error(last.prior_error):
        return ""
    if last.gain <= 0:
        return "It forgets what the base knew."
    share = -last.prior / last.gain
    if share < A_LITTLE:
        return "It forgets a little of what the base knew."
    if share < 1:
        return f"It forgets what the base knew: that costs {share:.0%} of what it gains."
    return "It forgets what the base knew: the base's own pictures lose more than the new ones gain."


def describe_average(last: Validated) -> str:
    """Whether the averaged adapter or the raw one gains more, in a sentence; "" where there is no average."""
    if not math.isfinite(last.raw_gain):
        return ""
    gains = f"{last.gain:+.4f} and {last.raw_gain:+.4f}"
    error = known_error(last.raw_against_error)
    if abs(last.raw_against) <= SURE * error:
        return f"The averaged adapter and the raw one gain the same but for chance: {gains}."
    gap = f"{abs(last.raw_against):.4f} (standard error {error:.4f})"
    if last.raw_against < 0:
        return f"The averaged adapter gains more than the raw one, by {gap}: {gains}."
    return (
        f"The raw adapter gains more than its average, by {gap}: {last.raw_gain:+.4f} and {last.gain:+.4f}."
    )
