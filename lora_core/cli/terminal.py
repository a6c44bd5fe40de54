"""What commands print: lines, JSON, the events of a run, and results in the words of `results.j2`."""

import errno
import functools
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lora_core.errors import count_words
from lora_core.runs import events
from lora_core.runs.events import Progress, verdict
from lora_core.runs.queue import Queue
from lora_core.settings.config import RunConfig
from lora_core.system.files import format_bytes, workspace

if TYPE_CHECKING:
    from lora_core.data.images import FileProblem

SECONDS_BETWEEN_STEPS = 0.5
"""Lines about steps come no closer than this, so that a pipe that nobody reads is not filled."""
SECONDS_BETWEEN_NOTES = 5.0
_ERASE_LINE = "\r\x1b[2K"
_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters but tab and newline, and the marks that change the direction of text."""
_LINE_BREAK = re.compile("[\n\u2028\u2029]")


def printable(text: str) -> str:
    """A text with control characters written out, such as `\\x1b`: names and files by others may hold any."""
    return _CONTROL.sub(_written_out, text)


def _written_out(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


def one_line(value: Any) -> Any:
    """A value as it goes into a line: of a text, line breaks too are written out, so that it forges none."""
    if isinstance(value, str | Path | Exception):
        return printable(_LINE_BREAK.sub(_written_out, str(value)))
    return value


def write(stream: TextIO, text: str, over: bool = False, result: bool = False) -> None:
    """Write at once, for as long as somebody reads.

    Work continues when the reader of the output is gone: `train ... | head` must not end a run. Later output
    is dropped, so that the process does not fail on its last flush either.

    Args:
        stream: where.
        text: control characters in it are written out, but line breaks, see `one_line`.
        over: whether it replaces the line that the cursor is in.
        result: whether it is what the command is for.

    Raises:
        OSError: the disk that a result is written to is full.
    """
    try:
        stream.write((_ERASE_LINE if over else "") + printable(text))
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if result and error.errno == errno.ENOSPC:
            raise OSError(error.errno, error.strerror, "The output") from error


def say(text: object) -> None:
    """Print one line on stdout, seen at once also through a pipe."""
    write(sys.stdout, f"{one_line(text)}\n")


def say_json(document: Any) -> None:
    """Print one JSON document on stdout; control characters are escaped as JSON does it."""
    text = json.dumps(document, ensure_ascii=False, indent=1)
    write(sys.stdout, _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n", result=True)


def slow_notes() -> Callable[..., None]:
    """A callback that says on stderr how far long work is: words, and (done, total).

    On a terminal it keeps to one line; elsewhere it is a line every few seconds.
    """
    terminal, began = sys.stderr.isatty(), time.monotonic()
    noted_at = began if not terminal else 0.0

    def note(*what: str | int) -> None:
        nonlocal noted_at
        words = [part for part in what if isinstance(part, str)]
        counts = [part for part in what if isinstance(part, int)]
        text = ", ".join([*map(one_line, words), *([f"{counts[0]} of {counts[1]}"] if counts else [])])
        last = bool(counts) and counts[0] == counts[1]
        if terminal:
            write(sys.stderr, text + ("\n" if last else ""), over=True)
        elif time.monotonic() - noted_at > SECONDS_BETWEEN_NOTES:
            noted_at = time.monotonic()
            write(sys.stderr, f"{text}\n")

    return note


def duration(seconds: float) -> str:
    """Seconds in the largest fitting unit."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class EventPrinter:
    """Shows the events of a run as they come: a bar on a terminal, a line per event otherwise."""

    def __init__(self, stream: TextIO, config: RunConfig | None = None) -> None:
        """Write to `stream`; `config` is that of the run, for the time left."""
        self._stream = stream
        self._config = config
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
        text = one_line(event_text(event, self._progress, self._config))
        if not text:
            return
        if self._terminal and often:
            # A line that wraps could not be overwritten.
            width = shutil.get_terminal_size().columns - 1
            write(self._stream, (self._bar() + text)[:width], over=True)
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


EVENT_TEXTS: dict[type[events.Event], str] = {
    events.RateFound: "Learning rate {0.rate:.3g}, found by a range test",
    events.RanksChosen: "{0.sentence}",
    events.CheckpointDone: "step {0.step}  saved {0.path}",
    events.Warned: "Note: {0.message}",
    events.Resumed: "Resuming from step {0.step}",
    events.Paused: "Paused at step {0.step}; continue with `resume`",
    events.Finished: "Done, {0.step} steps",
}


def event_text(event: events.Event, progress: Progress, config: RunConfig | None) -> str:
    """One line of text about an event, or "" for none."""
    match event:
        case events.Started():
            how = f"with {event.threads} threads" + (f", in {event.precision}" if event.precision else "")
            return f"Training to step {event.steps} on {event.device} {how}"
        case events.Preparing():
            return event.phase + (f": {event.done} of {event.total}" if event.total > 1 else "")
        case events.Working():
            return f"step {event.step}  {event.phase}: {100 * event.done // max(event.total, 1)}%"
        case events.StepDone():
            left = progress.seconds_left(config) or 0.0
            pace = progress.seconds_a_step() or 0.0
            loss = progress.smoothed_loss() or event.loss
            epoch = config.train.describe_epoch(event.step) if config else ""
            return (
                f"step {event.step} of {progress.steps}{epoch and f', {epoch}'}  loss {loss:.4f}"
                f"  {1 / pace if pace else 0:.1f} it/s  {int(left // 60)}:{int(left % 60):02d} left"
            )
        case events.Validated():
            best = ", the best so far" if event.best else ""
            words = verdict(progress.validations)
            return (
                f"step {event.step}  gain on {event.on} {event.gain:+.4f} "
                f"(standard error {event.standard_error:.4f}){best}" + (f". {words}" if words else "")
            )
        case events.PreviewDone():
            return f"step {event.step}  samples: {', '.join(event.files + event.raw_files)}"
        case events.Stopped():
            return f"Stopped at step {event.step}; the work is kept" + (
                f". {event.reason}" if event.reason else ""
            )
        case _:
            return EVENT_TEXTS.get(type(event), "").format(event)


def show_result(verb: str, result: Any, given: dict[str, Any]) -> None:
    """Print what a verb returned, in the words of `results.j2`; a result without a template as it is.

    Args:
        verb: its command.
        result: its return value.
        given: its arguments.
    """
    if verb in _templates():
        text = _environment().get_template(verb).render(result=result, given=given)
    else:
        lines = result if isinstance(result, list) else [] if result is None else [result]
        text = "".join(f"{one_line(line)}\n" for line in lines)
    write(sys.stdout, re.sub(r"(?<! ) +$", "", text, flags=re.M), result=True)


@functools.cache
def _templates() -> dict[str, str]:
    """The sections of `results.j2` by verb; only the one that is needed is compiled."""
    parts = re.split("^== (.+) ==\n", Path(__file__).with_name("results.j2").read_text("utf-8"), flags=re.M)
    sections = zip(parts[1::2], parts[2::2], strict=True)
    return {verb: text.removesuffix("\n") for verbs, text in sections for verb in verbs.split(", ")}


@functools.cache
def _environment() -> Any:
    import jinja2

    from lora_core.model_files.sizes import FALLBACKS

    environment = jinja2.Environment(
        loader=jinja2.DictLoader(_templates()), undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, finalize=one_line,
    )  # fmt: skip
    environment.filters |= {
        "count": count_words,
        "size": format_bytes,
        "duration": duration,
        "name": lambda path: Path(str(path)).name,
        "date": lambda seconds: time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)),
    }
    has_runner = lambda place: Queue(workspace(place)).runner() is not None  # noqa: E731
    environment.globals |= {"has_runner": has_runner, "summarize": _summarize, "fallbacks": FALLBACKS}
    return environment


def _summarize(rows: list[dict[str, str]]) -> "list[FileProblem]":
    from lora_core.data.dataset import summarize_notes
    from lora_core.data.images import FileProblem

    return summarize_notes([FileProblem(Path(row["picture"]), row["kind"], row["sentence"]) for row in rows])
