"""All that a report tells, read or measured before a line of it is written. What is missing is a sentence."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_core.analysis.spectrum import file_spectrum
from lora_core.report.measured import measured_rank, measured_strength
from lora_core.report.run_bench import run_bench
from lora_core.spec.config import RunConfig
from lora_core.spec.errors import LoraError
from lora_core.spec.events import Finished, Stopped, read_events
from lora_core.spec.progress import Progress
from lora_core.spec.run_folder import RunFolder

NOT_ASKED = "It was not measured for this report."
PICTURES_FILE = "pictures.json"
"""Gains by picture, which another command writes into the run folder."""

Tell = Callable[[str, int, int], None]
"""Called with (what is done, done, all); what it raises ends the work."""


@dataclass
class Story:
    """What is known of a run.

    Attributes:
        run, config, progress, state: the run.
        ending: why it ended early, in a sentence, "" where it did not.
        step: of the adapter that is looked at, 0 where there is none.
        best: whether that is the best by validation, rather than the last.
        size: bytes of the exported file, or of the checkpoint's.
        spectrum, rank, strength: as the analyses give them, None where there is none.
        problems: by those names, why not.
        measured_on: how many held-out pictures rank and strength were measured on.
        note: what to know of the measurements, "" for nothing.
        pictures: rows of gains by picture.
    """

    run: RunFolder
    config: RunConfig
    progress: Progress
    state: str
    ending: str = ""
    step: int = 0
    best: bool = False
    size: int = 0
    spectrum: dict[str, Any] | None = None
    rank: dict[str, Any] | None = None
    strength: dict[str, Any] | None = None
    problems: dict[str, str] = field(default_factory=dict)
    measured_on: int = 0
    note: str = ""
    pictures: list[dict[str, Any]] = field(default_factory=list)

    @property
    def adapter(self) -> Path:
        """The file that is looked at."""
        return self.run.checkpoint(self.step) / "adapter.safetensors"


def story_of(run: RunFolder, measure: bool, tell: Tell) -> Story:
    """Read a run, and measure what needs its base and its pictures.

    Args:
        run: the run.
        measure: whether to open the base and measure intrinsic rank and strength.
        tell: told how far it is.

    Raises:
        ConfigError: its settings were edited into something illegal.
    """
    config, progress = run.config(), run.progress()
    story = Story(run, config, progress, run.status(progress), _ending(run, progress))
    story.pictures = picture_rows(run.path / PICTURES_FILE)
    steps = run.checkpoint_steps()
    if not steps:
        why = "The run has no checkpoint yet, so there is no adapter to look at."
        story.problems = dict.fromkeys(("spectrum", "rank", "strength"), why)
        return story
    story.best = progress.best_step in steps
    story.step = progress.best_step if story.best and progress.best_step is not None else steps[-1]
    story.size = _size(run, progress, story.adapter)
    try:
        story.spectrum = file_spectrum(story.adapter, lambda done, total: tell("spectrum", done, total))
    except LoraError as error:
        story.problems["spectrum"] = plain_words(str(error), run)
    if measure:
        _measure(story, tell)
    else:
        story.problems |= dict.fromkeys(("rank", "strength"), NOT_ASKED)
    return story


def _measure(story: Story, tell: Tell) -> None:
    said = "the base"

    def note(words: str) -> None:
        nonlocal said
        said = words

    try:
        found = run_bench(story.run, story.config, note, lambda done, total: tell(said, done, total))
    except LoraError as error:
        words = plain_words(str(error), story.run)
        story.problems |= dict.fromkeys(("rank", "strength"), f"It cannot be measured any more. {words}")
        return
    story.measured_on, story.note = found.pictures, found.note
    for name, work in (("strength", measured_strength), ("rank", measured_rank)):
        try:
            setattr(story, name, work(story.adapter, found.base.family, found.bench.gains))
        except LoraError as error:
            story.problems[name] = plain_words(str(error), story.run)


def _ending(run: RunFolder, progress: Progress) -> str:
    """Why a run ended before its last step."""
    if progress.ending in ("failed", "paused"):
        return plain_words(progress.reason, run)
    last = [e for e in read_events(run.events_file)[0] if isinstance(e, Stopped | Finished)]
    return plain_words(last[-1].reason, run) if last and isinstance(last[-1], Stopped) else ""


def _size(run: RunFolder, progress: Progress, adapter: Path) -> int:
    for file in (run.path / progress.export if progress.export else adapter, adapter):
        if file.is_file():
            return file.stat().st_size
    return 0


def plain_words(text: str, run: RunFolder) -> str:
    """A sentence without the places of this computer: a path becomes its last part.

    A page that is passed on must not tell where, and for whom, it was made.
    """
    places = [str(run.path), str(run.path.parent.parent), str(Path.home())]
    for place in places:
        text = text.replace(place, Path(place).name if place != str(Path.home()) else "~")
    words = []
    for word in text.split(" "):
        parts = word.replace("\\", "/").rstrip("/").split("/")
        words.append(parts[-1] if len(parts) > 2 or (len(parts) == 2 and not parts[0]) else word)
    return " ".join(words)


def picture_rows(file: Path) -> list[dict[str, Any]]:
    """Gains by picture, the highest first; a file that is missing or broken counts as empty."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    rows = found.get("rows", []) if isinstance(found, dict) else found
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    good = [row for row in rows if all(_is_number(row.get(key)) for key in ("gain", "standard_error"))]
    return sorted(good, key=lambda row: -row["gain"])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
