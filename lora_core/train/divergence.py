"""What is watched while a run trains: numbers that are not finite, a loss that runs away, a pace that breaks.

Nothing here touches a tensor or a file. What the watch over the numbers remembers is kept in each checkpoint,
so that a resumed run decides as an unbroken one would have.
"""

import math
import statistics
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

IN_A_ROW = 3
"""So many steps that are not finite, one after the other, send a run back."""
RETURNS = 3
"""After so many returns, the next trouble ends the run."""
RECENT, EARLIER = 10, 100
RUNAWAY = 5.0
NOTHING = 1.0
"""About what it costs to predict nothing at all: noise and velocity have variance 1."""
CALM = 2.0

PACE, SLOW = 20, 5.0


@dataclass
class DivergenceGuard:
    """How the numbers of a run stand.

    A loss has run away where the median of the last 10 steps is over 5 times the level before: the mean of up
    to 100 steps before those, and never more than what predicting nothing would cost. A single picture that
    is hard moves no median, and single losses of diffusion models differ by far more than 5.

    Attributes:
        rate: factor of the learning rates: halved at each return.
        returns: how often the run went back.
        bad: steps in a row that were not finite.
        losses: the last 110 that were.
    """

    rate: float = 1.0
    returns: int = 0
    bad: int = 0
    losses: list[float] = field(default_factory=list)

    def trouble_after(self, loss: float, trouble: str) -> str:
        """Take in a step; returns why the run has to go back, or "".

        Args:
            loss: the step's.
            trouble: what of the step was not finite, or "".
        """
        if trouble:
            self.bad += 1
            return f"{IN_A_ROW} steps in a row failed, of the last {trouble}" if self.bad >= IN_A_ROW else ""
        self.bad = 0
        self.losses = [*self.losses[1 - RECENT - EARLIER :], loss]
        if len(self.losses) < RECENT:
            return ""
        recent, level = self._recent(), self._level()
        return f"the loss has risen from {level:.3g} to {recent:.3g}" if recent > RUNAWAY * level else ""

    @property
    def calm(self) -> bool:
        """Whether the present state is one to go back to."""
        return not self.bad and (len(self.losses) < RECENT or self._recent() <= CALM * self._level())

    def returned(self, then: "DivergenceGuard") -> "DivergenceGuard":
        """The health after going back to a state of which `then` was the health."""
        return DivergenceGuard(self.rate / 2, self.returns + 1, 0, then.losses)

    def record(self) -> dict[str, Any]:
        """As plain numbers, for a checkpoint."""
        return asdict(self)

    def _recent(self) -> float:
        ordered = sorted(self.losses[-RECENT:])
        return (ordered[(RECENT - 1) // 2] + ordered[RECENT // 2]) / 2

    def _level(self) -> float:
        before = self.losses[:-RECENT]
        return min(NOTHING, math.fsum(before) / len(before)) if len(before) >= RECENT else NOTHING


class StepTimer:
    """Notices once that steps suddenly take several times as long.

    A graphics driver that is out of memory may move some of it to the computer's own, as Windows does: no
    error, and minutes a step. Two slow steps in a row are asked for, since anything may hold up one.
    """

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._usual: deque[float] = deque(maxlen=PACE)
        self._slow = 0
        self._told = False
        self._excused = True

    @property
    def usual(self) -> float:
        """Median seconds of a step, NaN before the first that counts."""
        return statistics.median(self._usual) if self._usual else math.nan

    def excuse(self) -> None:
        """The next step may take its time: something else was done before it."""
        self._excused = True

    def slowdown(self, seconds: float) -> float | None:
        """Take in a step's time; how many times the usual one it is, where that is to be told."""
        if self._excused:
            self._excused = False
            return None
        usual = sorted(self._usual)[len(self._usual) // 2] if len(self._usual) == PACE else math.inf
        if seconds <= SLOW * usual:
            self._usual.append(seconds)
            self._slow = 0
            return None
        self._slow += 1
        if self._slow < 2 or self._told:
            return None
        self._told = True
        return seconds / usual


def describe_slow_step(step: int, seconds: float, times: float, device: str) -> str:
    """What a person should know of a step that took `times` as long as those before it."""
    start = f"Step {step} took {seconds:.1f} s, {times:.0f} times as long as those before it."
    if device == "cpu":
        return f"{start} Another program may be using the processor, or memory is being written to the disk."
    return (
        f"{start} The graphics memory may be full and its driver moving some of it to the computer's own, as"
        " Windows does without an error: pause, close other programs that use the graphics card, or set"
        " train.gradient_checkpointing or a lower train.batch_size, and go on."
    )
