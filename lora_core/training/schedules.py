"""Learning-rate schedules as pure functions of progress, so that a resume needs no state of them.

Each takes progress in [0, 1] after the warm-up and gives the factor of the full rate.
"""

import math

from lora_core.spec.choices import SCHEDULES, chosen

RESTARTS = 3


def constant(progress: float) -> float:
    """1 throughout."""
    return 1.0


def linear(progress: float) -> float:
    """From 1 to 0 in a straight line."""
    return 1.0 - progress


def cosine(progress: float) -> float:
    """From 1 to 0 along half a cosine (Loshchilov and Hutter 2017, equation 5)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def cosine_restarts(progress: float) -> float:
    """Three times from 1 to 0 along half a cosine."""
    return cosine(progress * RESTARTS % 1.0) if progress < 1.0 else 0.0


def rate_factor(step: int, steps: int, schedule: str, warmup: float) -> float:
    """The factor of the full learning rate for the step that follows `step` done ones.

    Args:
        step: optimizer steps done.
        steps: in the whole run.
        schedule: a key of `choices.SCHEDULES`.
        warmup: share of the steps over which the rate rises in a straight line.
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    return float(
        chosen(SCHEDULES, schedule, "optim.schedule").resolve()((step - rising) / max(1, steps - rising))
    )
