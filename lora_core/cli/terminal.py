"""What commands print: lines, JSON, the events of a run, and each verb's result in words."""

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from lora_core.runs import events
from lora_core.runs.progress import Progress
from lora_core.runs.queue import Queue
from lora_core.runs.verdict import verdict
from lora_core.system.paths import workspace

SECONDS_BETWEEN_STEPS = 0.5
"""Lines about steps come no closer than this, so that a pipe that nobody reads is not filled."""
SECONDS_BETWEEN_NOTES = 5.0
MAX_TAGS, MAX_NAMES, MAX_CAPTIONS = 20, 6, 5
_ERASE_LINE = "\r\x1b[2K"
_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters but tab and newline, and the marks that change the direction of text."""


def printable(text: str) -> str:
    """A text with control characters written out, such as `\\x1b`: names and files by others may hold any."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def write(stream: TextIO, text: str, over: bool = False) -> None:
    """Write at once, for as long as somebody reads.

    Work continues when the reader of the output is gone: `train ... | head` must not end a run. What is
    written after that is dropped, so that the process does not fail on its last flush either.

    Args:
        stream: where.
        text: control characters in it are written out.
        over: whether it replaces the line that the cursor is in.
    """
    try:
        stream.write((_ERASE_LINE if over else "") + printable(text))
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(text: object) -> None:
    """Print one line on stdout, seen at once also through a pipe."""
    write(sys.stdout, f"{text}\n")


def say_json(document: Any) -> None:
    """Print one JSON document on stdout; control characters are escaped as JSON does it."""
    text = json.dumps(document, ensure_ascii=False, indent=1)
    say(_CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def slow_notes() -> Callable[..., None]:
    """A callback that says on stderr how far long work is: words, and (done, total).

    On a terminal it keeps to one line; elsewhere it is a line every few seconds.
    """
    terminal, began = sys.stderr.isatty(), time.monotonic()
    said = began if not terminal else 0.0

    def note(*what: str | int) -> None:
        nonlocal said
        words = [part for part in what if isinstance(part, str)]
        counts = [part for part in what if isinstance(part, int)]
        text = ", ".join([*words, *([f"{counts[0]} of {counts[1]}"] if counts else [])])
        last = bool(counts) and counts[0] == counts[1]
        if terminal:
            write(sys.stderr, text + ("\n" if last else ""), over=True)
        elif time.monotonic() - said > SECONDS_BETWEEN_NOTES:
            said = time.monotonic()
            write(sys.stderr, f"{text}\n")

    return note


def file_size(size: float) -> str:
    """Bytes in the largest fitting unit."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"


def duration(seconds: float) -> str:
    """Seconds in the largest fitting unit."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class EventPrinter:
    """Shows the events of a run as they come: a bar on a terminal, a line per event otherwise."""

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
        text = event_text(event, self._progress)
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


def event_text(event: events.Event, progress: Progress) -> str:
    """One line of text about an event, or "" for none."""
    match event:
        case events.Started():
            how = f"with {event.threads} threads" + (f", in {event.precision}" if event.precision else "")
            return f"Training to step {event.steps} on {event.device} {how}"
        case events.Preparing():
            return event.phase + (f": {event.done} of {event.total}" if event.total > 1 else "")
        case events.Working():
            return f"step {event.step}  {event.phase}: {100 * event.done // max(event.total, 1)}%"
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
            words = verdict(progress.validations)
            return (
                f"step {event.step}  gain on held-out pictures {event.gain:+.4f} "
                f"(standard error {event.standard_error:.4f}){best}" + (f". {words}" if words else "")
            )
        case events.PreviewDone():
            return f"step {event.step}  samples: {', '.join(event.files + event.raw_files)}"
        case events.CheckpointDone():
            return f"step {event.step}  saved {event.path}"
        case events.Warned():
            return f"Note: {event.message}"
        case events.Resumed():
            return f"Resuming from step {event.step}"
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


# The results of verbs. Each function prints what its verb returned; `given` are the verb's arguments.

Given = dict[str, Any]
Rows = list[dict[str, Any]]


def forecast_lines(found: dict[str, Any]) -> list[str]:
    """A forecast in a few lines."""
    each = max(1, round(found["looks"]))
    lines = [
        f"{found['pictures']} pictures, {found['captions']} with a caption; {found['steps']} steps look at"
        f" each about {each} times."
    ]
    known = []
    if found["seconds"]:
        source = "measured" if found["source"] in ("measured", "probed") else "estimated"
        known.append(f"time about {duration(found['seconds'])}, {source}")
    else:
        known.append("time known after some steps, or by `forecast --measure`")
    if found["memory_bytes"]:
        known.append(f"memory about {file_size(found['memory_bytes'])}")
    if found["file_bytes"]:
        known.append(f"file about {file_size(found['file_bytes'])}")
    if found["learning_rate"]:
        known.append(f"effective learning rate {found['learning_rate']:.3g}")
    return lines + ([f"Forecast: {'; '.join(known)}."] if known else [])


def _forecast(found: dict[str, Any], given: Given) -> None:
    for line in forecast_lines(found):
        say(line)
    for problem in found["problems"]:
        say(f"{'Problem' if problem['blocking'] else 'Note'}: {problem['sentence']}")


def _runs(rows: Rows, given: Given) -> None:
    if not rows:
        say("No runs yet. Start one with `lora-easel train demo`.")
    for row in rows:
        loss = "" if row["loss"] is None else f"  loss {row['loss']:.4f}"
        step = f"step {row['step']} of {row['steps']}{loss}"
        say(f"{row['name']:30}  {row['status']:11}  {step}  {row['reason']}")


def _queue(rows: Rows, given: Given) -> None:
    if not rows:
        say("The queue is empty. Put a run in with `lora-easel queue add RUN`.")
    for row in rows:
        place = "" if row["position"] is None else f"{row['position']}."
        steps = f"step {row['step']} of {row['steps']}" if row["steps"] else ""
        say(f"{place:>4} {row['name']:30}  {row['state']:8}  {steps}  {row['reason']}".rstrip())
    if any(row["position"] for row in rows) and Queue(workspace(given["workspace"])).runner() is None:
        say("The queue is not running; start it with `lora-easel queue run`.")


def _export(made: dict[str, Any], given: Given) -> None:
    for row in made["works_in"]["tools"]:
        if not row["ok"]:
            say(f"{row['tool']}: {row['note']}")
    if made["raw"]:
        say(f"The raw adapter, not averaged: {made['raw']}")
    say(made["file"])


def _audit(found: dict[str, Any], given: Given) -> None:
    from lora_core.data.dataset import summarize_notes
    from lora_core.data.scan import FileProblem

    say(f"{found['pictures']} pictures, {found['captions']} with a caption.")
    rows = [FileProblem(Path(row["picture"]), row["kind"], row["sentence"]) for row in found["problems"]]
    for row in summarize_notes(rows):
        say(f"  {row.kind}: {row.sentence}")
    if all(row.kind == "hidden" for row in rows):
        say("Nothing is wrong with them.")
    tags = [f"{one['tag']} ({one['pictures']})" for one in found["tags"][:MAX_TAGS]]
    if tags:
        say(f"Most frequent tags: {', '.join(tags)}.")
    if found["learned"]:
        say("What will be learned:")
    for row in found["learned"]:
        say(f"  {row['kind']}: {row['sentence']}")
        if row["kind"] in ("absorbed", "meaning"):
            shown = [Path(path).name for path in row["pictures"][:MAX_NAMES]]
            more = len(row["pictures"]) - len(shown)
            say(f"    {', '.join(shown)}{f' and {more} more' if more else ''}")


def _probe(found: dict[str, Any], given: Given) -> None:
    say(
        f"With captions the base's loss is lower by {found['helped']:.4f} (standard error"
        f" {found['standard_error']:.4f}) than without, over {len(found['rows'])} pictures."
    )
    suspects = [row for row in found["rows"] if row["suspect"]]
    for row in suspects:
        say(f"  {row['sentence']}")
    if not suspects:
        say("No caption fits another picture better than its own. The weakest:")
        for row in found["rows"][:MAX_CAPTIONS]:
            fits = f"{row['fits']:+.3f} ± {row['fits_error']:.3f}"
            say(f"  {fits}  {Path(row['picture']).name}: {row['caption']}")
    say("Words for a trigger, by how little the base reacts to them:")
    for row in found["trigger"]["rows"]:
        say(f"  {row['sentence']}")


def _pictures(found: dict[str, Any], given: Given) -> None:
    say(f"Step {found['step']}, outliers first, then by what was learned; kept in the run's pictures.json.")
    for row in found["rows"]:
        held = "  held out" if row["held_out"] else f"  {row['share']:.1%} of the steps"
        helps = "" if row["helps"] is None else f"  caption {row['helps']:+.4f}"
        say(
            f"  {row['learned']:4.0%}  gain {row['gain']:+.4f} ± {row['standard_error']:.4f} of"
            f" {row['base_loss']:.4f}{helps}{held}  {Path(row['picture']).name}"
        )
    for row in found["rows"]:
        if row["suspect"]:
            say(row["sentence"])


def _caption_change(found: dict[str, Any], given: Given) -> None:
    marks = {"same": "{}", "old": "[-{}-]", "new": "{{+{}+}}"}
    dry = given["dry_run"]
    for row in found["rows"] if dry else ():
        say(f"{row['picture']}: {''.join(marks[kind].format(text) for kind, text in row['pieces'])}")
    more = found["changed"] - len(found["rows"])
    if dry and more:
        say(f"and {more} more")
    would = "would change" if dry else "changed; `captions undo` takes it back"
    say(f"{found['changed']} of {found['asked']} captions {would}.")


def _caption_undo(found: dict[str, int], given: Given) -> None:
    kept = f", {found['kept']} changed since and kept" if found["kept"] else ""
    say(f"{found['undone']} captions are as before{kept}.")


def _projects(rows: Rows, given: Given) -> None:
    for row in rows:
        mark = "*" if row["is_open"] else " "
        holds = f"{row['pictures']} pictures, {row['runs']} runs, {file_size(row['size'])}"
        say(f"{mark} {row['title']:30}  {holds}  {row['path']}")


def _import(made: dict[str, Any], given: Given) -> None:
    for sentence in made["skipped"]:
        say(sentence)
    say(f"{made['added']} files added.")


def _caches(sizes: dict[str, int], given: Given) -> None:
    for name, size in sizes.items():
        say(f"{name:10} {file_size(size)}")
    if not sizes:
        say("There are no caches.")


def _trash(rows: Rows, given: Given) -> None:
    for row in rows:
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["time"]))
        say(f"{row['id']}  {day}  {row['kind']:8} {row['name']}")
    if not rows:
        say("The trash is empty.")


def _doctor(found: dict[str, Any], given: Given) -> None:
    for row in found["checks"]:
        say(f"{'ok   ' if row['ok'] else 'WRONG'}  {row['name']}: {row['found']}")
        if row["fix"]:
            say(f"       {row['fix']}")
    wrong = sum(not row["ok"] for row in found["checks"])
    say("Nothing is wrong." if found["ok"] else f"{wrong} wrong; the line below each says what to do.")


def _validation(found: dict[str, Any], given: Given) -> None:
    say(
        f"gain {found['gain']:+.4f} (standard error {found['standard_error']:.4f}): base loss"
        f" {found['base_loss']:.4f}, with the adapter {found['adapted_loss']:.4f}, over {found['triples']}"
        " triples"
    )
    if "captions" in found:
        words = found["captions"]
        say(
            f"with shuffled captions the base's loss is {words['worse']:+.4f} (standard error"
            f" {words['standard_error']:.4f}) against {words['right_loss']:.4f} with the right ones"
        )


def _inspection(found: dict[str, Any], given: Given) -> None:
    for key, value in found.items():
        if key not in ("metadata", "problem", "layers", "left_out", "extras"):
            say(f"{key:13} {value}")
    for key, value in sorted(found["metadata"].items()):
        say(f"  {key}: {value if len(value) <= 100 else value[:97] + '...'}")
    for row in found.get("layers", ()):
        say(
            f"{row['part']}.{row['module']}: rank {row['rank']}, effective {row['effective_rank']:.1f}, 90%"
            f" of the energy in {row['rank90']}, 99% in {row['rank99']}, norm {row['norm']:.4g}"
        )
    _left_out(found)
    if found["extras"]:
        say(f"Note: {found['extras']}")


def _left_out(found: dict[str, Any]) -> None:
    for row in found.get("left_out", ()):
        say(f"{row['part']}.{row['module']} is left out: {row['reason']}")


def _verification(found: dict[str, Any], given: Given) -> None:
    name = Path(given["file"]).name
    say(f"{name}: {found['kind']} in the {found['format']} format, for {found['family']}")
    for row in found["tools"]:
        mark, keys = ("✓" if row["ok"] else "✗"), f"{row['matched']:5} of {row['keys']} keys"
        say(f"{mark} {row['tool']:10} {keys}  {row['note']}")
    if found["extras"]:
        say(f"convert, merge and generate: {found['extras']}")


def _copied(done: dict[str, Any], given: Given) -> None:
    if done["kept"]:
        say(f"Note: {', '.join(done['kept'])} differs and stays as it is.")
    say(done["file"])


def _comparison(found: dict[str, Any], given: Given) -> None:
    for row in found["layers"]:
        chance = f"by chance {row['baseline']:.3f}"
        say(f"{row['part']}.{row['module']}: {row['phi']:.3f} at rank {row['rank']}, {chance}")
    _left_out(found)
    say(
        f"Similarity {found['similarity']:.3f} of the directions read, {found['similarity_output']:.3f} of"
        f" those written, over {len(found['layers'])} layers; random ones would have"
        f" {found['baseline']:.3f} and {found['baseline_output']:.3f}."
    )


def _stack(found: dict[str, Any], given: Given) -> None:
    names = [file["name"] for file in found["files"]]
    for pair in found["pairs"]:
        both = f"{names[pair['first']]} and {names[pair['second']]}"
        if pair["layers"]:
            say(
                f"{both}: cosine {pair['cosine']:+.3f}; they"
                f" write {pair['column_overlap']:.3f} alike (by chance {pair['column_baseline']:.3f}) and"
                f" read {pair['row_overlap']:.3f} (by chance {pair['row_baseline']:.3f}), over"
                f" {pair['layers']} layers"
            )
        else:
            say(f"{both} change no layer in common")
    for file in found["files"]:
        if file["survives"] is not None:
            say(
                f"{file['name']}: {file['survives']:.1%} of it survives in the stack, {file['untouched']:.1%}"
                " is untouched by the others"
            )
    _left_out(found)
    if "validation" in found:
        say(found["validation"]["sentence"])


def _amplification(found: dict[str, Any], given: Given) -> None:
    for row in found["blocks"]:
        factor = "beyond measure" if row["amplification"] is None else f"{row['amplification']:.2f}"
        say(
            f"{row['part']} {row['block']}: amplification {factor}, norm {row['norm']:.4g},"
            f" {row['intruders']} intruder dimensions in {row['layers']} layers"
        )
    _left_out(found)
    say(
        f"{found['intruders']} intruder dimensions: of the {found['leading']} leading directions of each"
        " adapted weight, those whose cosine with every direction of the base's is below"
        f" {found['threshold']}."
    )


def _strength(found: dict[str, Any], given: Given) -> None:
    for fit in (found["unet"], found["text_encoders"]) if given["apart"] else (found,):
        for row in fit["curve"]:
            error = f"standard error {row['standard_error']:.4f}"
            say(f"strength {row['strength']:5.2f}  gain {row['gain']:+.4f}  ({error})")
    for sentence in [*found["sentences"], *([found["file"]] if given["bake"] else [])]:
        say(sentence)


def _lines(made: list[str], given: Given) -> None:
    for sentence in [*made, given["out"]]:
        say(sentence)


def _notes(notes: list[str], given: Given) -> None:
    _lines([f"Note: {note}" for note in notes], {"out": given["target"]})


def _deleted(name: str) -> None:
    say(f"In the trash; `lora-easel trash restore {name}` puts it back.")


def _freed(size: int, given: Given) -> None:
    say(f"{file_size(size)} freed")


RESULTS: dict[str, Callable[[Any, Given], None]] = {
    "forecast": _forecast, "runs": _runs, "queue list": _queue, "export": _export, "audit": _audit,
    "probe": _probe, "pictures": _pictures, "captions undo": _caption_undo, "projects list": _projects,
    "projects import": _import, "caches list": _caches, "trash list": _trash, "doctor": _doctor,
    "validate": _validation, "inspect": _inspection, "verify": _verification, "copy": _copied,
    "compare": _comparison, "stack": _stack, "amplify": _amplification, "strength": _strength,
    "queue add": lambda run, given: say(f"{run.name} waits in the queue of {run.path.parent.parent}"),
    "merge": _lines, "extract": _lines, "convert": _notes,
    "delete": lambda place, given: _deleted(Path(str(given["run"])).name),
    "shrink": lambda made, given: _lines(made["sentences"], {"out": made["file"]}),
    "projects delete": lambda place, given: _deleted(place.parent.name),
    "leave-out": lambda count, given: say(f"{count} left out."),
    "caches clean": _freed, "trash empty": _freed,
    "notify": lambda recipient, given: say(recipient or "Nobody is notified when a run ends."),
    "generate": lambda paths, given: None,
    **dict.fromkeys(
        (f"captions {how}" for how in ("replace", "prefix", "suffix", "rename-tag", "delete-tag", "trigger")),
        _caption_change,
    ),
}  # fmt: skip
"""How the result of a verb is printed; any other is printed as it is."""


def show_result(verb: str, result: Any, given: Given) -> None:
    """Print what a verb returned, in words."""
    if verb in RESULTS:
        RESULTS[verb](result, given)
    elif isinstance(result, list):
        for line in result:
            say(line)
    elif result is not None:
        say(result)
