"""A run's events for people: a bar on a terminal, a line an event otherwise."""

import time
from typing import TextIO

from lora_core.cli import write
from lora_core.runs import events
from lora_core.runs.progress import Progress
from lora_core.runs.verdict import verdict

SECONDS_BETWEEN_STEPS = 0.5
"""Lines about steps come no closer than this, so that a pipe that nobody reads is not filled."""


class EventPrinter:
    """Shows events as they come."""

    def __init__(self, stream: TextIO) -> None:
        """Write to `stream`."""
        self._stream = stream
        self._terminal = stream.isatty()
        self._progress = Progress()
        self._last = -SECONDS_BETWEEN_STEPS
        self._bar_shown = False

    def show(self, event: events.Event) -> None:
        """Show one event."""
        phase = self._progress.phase
        self._progress.update([event])
        often = isinstance(event, events.StepDone | events.Working | events.Preparing)
        new = isinstance(event, events.Preparing) and event.phase != phase
        ended = isinstance(event, events.StepDone) and event.step == self._progress.steps
        soon = time.monotonic() - self._last < SECONDS_BETWEEN_STEPS
        if often and soon and not new and not ended:
            return
        self._last = time.monotonic()
        text = described(event, self._progress)
        if not text:
            return
        if self._terminal and often:
            write(self._stream, self._bar() + text, over=True)
            self._bar_shown = True
        else:
            self.close()
            write(self._stream, text + "\n")

    def close(self) -> None:
        """End the bar's line."""
        if self._bar_shown:
            write(self._stream, "\n")
            self._bar_shown = False

    def _bar(self) -> str:
        share = self._progress.step / self._progress.steps if self._progress.steps else 0.0
        full = round(30 * share)
        return f"[{'#' * full}{'.' * (30 - full)}] {100 * share:3.0f}%  "


def described(event: events.Event, progress: Progress) -> str:
    """One line of text about an event, or "" where there is nothing to say."""
    match event:
        case events.Started():
            how = f"with {event.threads} threads" + (f", in {event.precision}" if event.precision else "")
            return f"Training to step {event.steps} on {event.device} {how}"
        case events.Preparing():
            return event.phase + (f": {event.done} of {event.total}" if event.total > 1 else "")
        case events.Working():
            return f"step {event.step}  {event.phase}: {event.done} of {event.total}"
        case events.RateFound():
            return f"Learning rate {event.rate:.3g}, found by a range test"
        case events.StepDone():
            left = progress.seconds_left() or 0.0
            pace = progress.seconds_a_step() or 0.0
            loss = progress.smoothed_loss() or event.loss
            return (
                f"step {event.step} of {progress.steps}  loss {loss:.4f}  {1 / pace if pace else 0:.1f} it/s "
                f" {int(left // 60)}:{int(left % 60):02d} left"
            )
        case events.Validated():
            best = ", the best so far" if event.best else ""
            said = verdict(progress.validations)
            return (
                f"step {event.step}  gain on held-out pictures {event.gain:+.4f} "
                f"(standard error {event.standard_error:.4f}){best}" + (f". {said}" if said else "")
            )
        case events.PreviewDone():
            return f"step {event.step}  samples: {', '.join(event.files + event.raw_files)}"
        case events.CheckpointDone():
            return f"step {event.step}  saved {event.path}"
        case events.Warned():
            return f"Note: {event.message}"
        case events.Resumed():
            return f"Going on from step {event.step}"
        case events.Paused():
            return f"Paused at step {event.step}; go on with `resume`"
        case events.Stopped():
            return f"Stopped at step {event.step}; the work is kept" + (
                f". {event.reason}" if event.reason else ""
            )
        case events.Finished():
            return f"Done, {event.step} steps"
        case _:
            return ""
