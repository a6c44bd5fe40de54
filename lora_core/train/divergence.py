"""Watches a run's losses and step times: values that are not finite, a loss that runs away, slow steps.

No tensors and no files here. What `DivergenceGuard` remembers is kept in each checkpoint, so that a resumed
run decides as an unbroken one would have.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from lora_core.train.loop import NonFinite

MAX_NONFINITE = 3
"""After so many steps in a row that are not finite, the run rolls back."""
MAX_ROLLBACKS = 3
RECENT, EARLIER = 10, 100
RUNAWAY = 5.0
PREDICT_NOTHING = 1.0
"""About the loss of predicting zeros: noise and velocity have variance 1."""
STABLE = 2.0
TIMED_STEPS, SLOW = 20, 5.0
NAMED = 4
"""So many images are named in a message."""


class NeedsRollback(Exception):
    """Training diverged and may go on from an earlier state; the message says how it diverged."""


@dataclass
class DivergenceGuard:
    """Decides when a run has to roll back.

    A loss has run away if the median of the last 10 steps is over 5 times the level before: the mean of up to
    100 steps before those, at most what predicting nothing would cost. Single losses of diffusion models vary
    by more than 5, a median does not.

    Attributes:
        lr_scale: factor of the learning rates, halved at each rollback.
        rollbacks: how many there were.
        nonfinite: steps in a row that were not finite.
        losses: the last 110 that were.
    """

    lr_scale: float = 1.0
    rollbacks: int = 0
    nonfinite: int = 0
    losses: list[float] = field(default_factory=list)

    def update(self, loss: float, problem: str) -> str:
        """Take in a step; returns why the run has to roll back, or "".

        Args:
            loss: the step's.
            problem: what of the step was not finite, or "".
        """
        if problem:
            self.nonfinite += 1
            if self.nonfinite >= MAX_NONFINITE:
                return f"{MAX_NONFINITE} steps in a row failed, of the last {problem}"
            return ""
        self.nonfinite = 0
        self.losses = [*self.losses[1 - RECENT - EARLIER :], loss]
        if len(self.losses) < RECENT:
            return ""
        recent, level = self._recent(), self._level()
        return f"the loss has risen from {level:.3g} to {recent:.3g}" if recent > RUNAWAY * level else ""

    @property
    def stable(self) -> bool:
        """Whether the present state is one to roll back to."""
        return not self.nonfinite and (len(self.losses) < RECENT or self._recent() <= STABLE * self._level())

    def roll_back_to(self, record: dict[str, Any]) -> None:
        """Halve the learning rates and go on with the losses of an earlier `record`."""
        self.lr_scale, self.rollbacks, self.nonfinite = self.lr_scale / 2, self.rollbacks + 1, 0
        self.losses = list(record.get("losses", []))

    def record(self) -> dict[str, Any]:
        """As plain values, for a checkpoint."""
        return {
            "rate": self.lr_scale, "returns": self.rollbacks, "bad": self.nonfinite, "losses": self.losses,
        }  # fmt: skip

    def restore(self, record: dict[str, Any]) -> None:
        """Take over the `record` of a checkpoint; an empty one is that of a new run."""
        self.lr_scale = float(record.get("rate", 1.0))
        self.rollbacks = int(record.get("returns", 0))
        self.nonfinite = int(record.get("bad", 0))
        self.losses = list(record.get("losses", []))

    def _recent(self) -> float:
        ordered = sorted(self.losses[-RECENT:])
        return (ordered[(RECENT - 1) // 2] + ordered[RECENT // 2]) / 2

    def _level(self) -> float:
        before = self.losses[:-RECENT]
        if len(before) < RECENT:
            return PREDICT_NOTHING
        return min(PREDICT_NOTHING, math.fsum(before) / len(before))


def describe_nonfinite(found: NonFinite) -> str:
    """What of a step is not finite, and which images at which timesteps may have caused it."""
    images = [f"{name} at timestep {timestep}" for name, timestep in found.images]
    more = f" and {len(images) - NAMED} more" if len(images) > NAMED else ""
    where = f" of {' '.join(found.layer)}" if found.layer else ""
    return f"the {found.what}{where} is not finite ({', '.join(images[:NAMED])}{more})"


class StepTimer:
    """Notices, once, that steps suddenly take several times as long.

    A graphics driver that is out of memory may move some of it to the computer's own, as Windows does: no
    error, and minutes a step. Two slow steps in a row count, since anything may hold up one.
    """

    def __init__(self) -> None:
        """No step is timed yet; the first one may be slow."""
        self._times: deque[float] = deque(maxlen=TIMED_STEPS)
        self._slow = 0
        self._reported = False
        self._skip = True

    @property
    def median(self) -> float:
        """Median seconds per step, NaN before the first that counts."""
        return statistics.median(self._times) if self._times else math.nan

    def skip_next(self) -> None:
        """Do not count the next step: something else was done before it."""
        self._skip = True

    def update(self, seconds: float) -> float | None:
        """Take in a step's time; returns how many times the usual one it is, if that is to be reported."""
        if self._skip:
            self._skip = False
            return None
        usual = sorted(self._times)[len(self._times) // 2] if len(self._times) == TIMED_STEPS else math.inf
        if seconds <= SLOW * usual:
            self._times.append(seconds)
            self._slow = 0
            return None
        self._slow += 1
        if self._slow < 2 or self._reported:
            return None
        self._reported = True
        return seconds / usual


def describe_slow_step(step: int, seconds: float, times: float, device: str) -> str:
    """What may be wrong if a step took `times` as long as those before it."""
    start = f"Step {step} took {seconds:.1f} s, {times:.0f} times as long as those before it."
    if device == "cpu":
        return f"{start} Another program may be using the processor, or memory is being written to the disk."
    return (
        f"{start} The graphics memory may be full and its driver moving some of it to the computer's own, as"
        " Windows does without an error: pause, close other programs that use the graphics card, or set"
        " train.gradient_checkpointing or a lower train.batch_size, and go on."
    )
