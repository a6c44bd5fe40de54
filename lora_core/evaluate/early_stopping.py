"""Which step of a run is the best one, and when a run stops gaining: rules that know the error bars.

All steps are measured on the same draws, so the difference of two of them has a small error of its own,
however large that of either gain is. A step is better, or worse, than another where the difference exceeds
its error; between the two the earlier one stays, which is less overfitted.
"""

from collections.abc import Sequence

import torch

from lora_core.evaluate.validator import clustered_error
from lora_core.runs.events import Validated

CLEARLY = 2.0
"""Standard errors from which a difference is clear."""


def paired_difference(before: torch.Tensor | None, now: torch.Tensor) -> tuple[float, float]:
    """How much lower the loss is now than before, and the standard error.

    Args:
        before, now: losses on the same draws, each (images, K); the result is NaN where `before` is None or
        of
            other draws.
    """
    if before is None or before.shape != now.shape:
        return float("nan"), float("nan")
    gained = before - now
    # Two or three images can agree by chance: their draws, taken for independent, give a floor.
    floor = float(gained.std() / gained.numel() ** 0.5) if gained.numel() > 1 else 0.0
    return float(gained.mean()), max(clustered_error(gained), floor)


def is_better(gained: float, error: float) -> bool:
    """Whether a difference favours the later step."""
    return gained > error


def is_worse(gained: float, error: float) -> bool:
    """Whether a difference is against the later step."""
    return gained < -error


def reason_to_stop(validations: Sequence[Validated], patience: int) -> str:
    """Why a run should stop after its last validation, or "" where it should continue.

    It stops after `patience` validations in a row that were no better than the best, if the last of them is
    clearly worse; after twice as many in any case.

    Args:
        validations: of the run, in order.
        patience: 0 for never.
    """
    best = next((at for at in range(len(validations) - 1, -1, -1) if validations[at].best), None)
    if not patience or best is None:
        return ""
    since = len(validations) - 1 - best
    last = validations[-1]
    falling = last.against_best < -CLEARLY * last.against_best_error
    if since < patience or not (falling or since >= 2 * patience):
        return ""
    how = (
        f"the last is {-last.against_best:.4f} below it (standard error {last.against_best_error:.4f})"
        if falling
        else (
            f"the last differs from it by {last.against_best:+.4f} (standard error"
            f" {last.against_best_error:.4f})"
        )
    )
    return (
        f"The gain on held-out pictures stopped growing after step {validations[best].step:,}: {since}"
        f" validations were no better, and {how}. Resume the run to continue anyway."
    )
