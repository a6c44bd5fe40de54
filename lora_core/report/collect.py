"""Everything that a report shows, read or measured before it is rendered; a gap is a sentence instead."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_core.data.captions import plain_caption
from lora_core.data.dataset import open_dataset, require_clean
from lora_core.data.holdout import split_holdout
from lora_core.data.scan import ImageRecord
from lora_core.errors import DatasetError, LoraError
from lora_core.evaluate.validator import Evaluator, OnProgress
from lora_core.models.device import best_device
from lora_core.models.encode import encode_prompt
from lora_core.models.load import BaseModel, load_base
from lora_core.models.unet import PromptEmbeds
from lora_core.models.weight_files import PRECISIONS
from lora_core.runs.events import Finished, Stopped, read_events
from lora_core.runs.folder import RunFolder
from lora_core.runs.progress import Progress
from lora_core.settings.config import RunConfig
from lora_core.tools.shrink import measure_rank
from lora_core.tools.strength import measure_strength
from lora_core.tools.svd import file_spectrum
from lora_core.train.setup import input_hashes

FEWEST_DRAWS = 8
CHANGED = (
    "The pictures have changed since the run started, so some of those that are measured may have been"
    " trained on."
)


@dataclass(frozen=True)
class RunEvaluator:
    """An evaluator on the images that a run held out.

    Attributes:
        evaluator: measures adapters.
        base: the run's base.
        pictures: how many images are measured.
        note: a sentence, "" for none.
    """

    evaluator: Evaluator
    base: BaseModel
    pictures: int
    note: str = ""


def held_out_records(run: RunFolder, config: RunConfig) -> tuple[list[ImageRecord], str]:
    """The images that a run held out with their captions, and a note if they have changed.

    Raises:
        DatasetError: the images are gone, or none was held out.
    """
    dataset = open_dataset(config.dataset.path, run.path.parent.parent / "cache" / "datasets")
    require_clean(dataset)
    _, held = split_holdout(dataset.records, config.validation.pictures, config.seed)
    if not held:
        raise DatasetError(f"{run.name} held no picture out, so there is nothing to measure it on.")
    known, now = _known_inputs(run), input_hashes(run, dataset.records)
    pictures = {name for name in (*known, *now) if name.startswith("the picture ")}
    changed = bool(known) and any(known.get(name) != now.get(name) for name in pictures)
    records = [
        replace(record, caption=plain_caption(record.caption, config.dataset.trigger)) for record in held
    ]
    return records, CHANGED if changed else ""


def _known_inputs(run: RunFolder) -> dict[str, str]:
    """The hashes of its images that the run recorded at the start; {} for a run that did not."""
    try:
        found = json.loads(run.inputs_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def run_evaluator(
    run: RunFolder,
    config: RunConfig,
    on_phase: Callable[[str], None] | None = None,
    on_image: OnProgress | None = None,
) -> RunEvaluator:
    """Load a run's base in fp32 and encode its held-out images.

    Args:
        run: the run.
        config: its settings.
        on_phase: called with what is being measured, in a few words.
        on_image: called within each measurement.

    Raises:
        DatasetError: the images are gone, or none was held out.
        ModelFileError: the base is gone.
    """
    records, note = held_out_records(run, config)
    model = config.model
    base = load_base(
        model.base, best_device(), PRECISIONS["fp32"], model.prediction, model.vae,
        zero_snr=model.zero_terminal_snr,
    )  # fmt: skip
    if config.train.resolution:
        base = replace(base, facts=replace(base.facts, resolution=config.train.resolution))

    def encode(caption: str) -> PromptEmbeds:
        return encode_prompt(base, [caption], config.train.clip_skip, config.train.max_token_length)

    draws = max(FEWEST_DRAWS, config.validation.draws_per_image)
    evaluator = Evaluator(base, records, draws, config.seed, on_phase, on_image, encode)
    return RunEvaluator(evaluator, base, len(records), note)


# The data of a report.

NOT_ASKED = "It was not measured for this report."
PICTURES_FILE = "pictures.json"
"""Gains by image, written by `evaluate.learned`."""

OnPhase = Callable[[str, int, int], None]
"""Called with (what is being done, done, total); an exception from it ends the work."""


@dataclass
class ReportData:
    """What a report shows of a run.

    Attributes:
        run, config, progress, state: the run.
        ending: why it ended early, in a sentence, or "".
        step: of the adapter that is analysed, 0 for none.
        best: whether that is the best step by validation, rather than the last.
        size: of the exported file, or of the checkpoint's, in bytes.
        spectrum, rank, strength: the documents of the analyses, or None.
        problems: by those names, why there is none.
        measured_on: how many held-out images rank and strength were measured on.
        note: about the measurements, or "".
        images: rows of gains by image.
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
    images: list[dict[str, Any]] = field(default_factory=list)

    @property
    def adapter(self) -> Path:
        """The adapter that is analysed."""
        return self.run.checkpoint(self.step) / "adapter.safetensors"


def collect_data(run: RunFolder, measure: bool, on_phase: OnPhase) -> ReportData:
    """Read a run, and measure what needs its base and its images.

    Args:
        run: the run.
        measure: whether to load the base and measure intrinsic rank and strength.
        on_phase: called with the progress.

    Raises:
        ConfigError: its settings were edited into something illegal.
    """
    config, progress = run.config(), run.progress()
    data = ReportData(run, config, progress, run.status(progress), _ending(run, progress))
    data.images = saved_image_rows(run.path / PICTURES_FILE)
    steps = run.checkpoint_steps()
    if not steps:
        why = "The run has no checkpoint yet, so there is no adapter to analyse."
        data.problems = dict.fromkeys(("spectrum", "rank", "strength"), why)
        return data
    data.best = progress.best_step in steps
    data.step = progress.best_step if data.best and progress.best_step is not None else steps[-1]
    data.size = _size(run, progress, data.adapter)
    try:
        data.spectrum = file_spectrum(data.adapter, lambda done, total: on_phase("spectrum", done, total))
    except LoraError as error:
        data.problems["spectrum"] = without_paths(str(error), run)
    if measure:
        _measure(data, on_phase)
    else:
        data.problems |= dict.fromkeys(("rank", "strength"), NOT_ASKED)
    return data


def _measure(data: ReportData, on_phase: OnPhase) -> None:
    phase = "the base"

    def start(words: str) -> None:
        nonlocal phase
        phase = words

    try:
        found = run_evaluator(data.run, data.config, start, lambda done, total: on_phase(phase, done, total))
    except LoraError as error:
        words = without_paths(str(error), data.run)
        data.problems |= dict.fromkeys(("rank", "strength"), f"It cannot be measured any more. {words}")
        return
    data.measured_on, data.note = found.pictures, found.note
    for name, work in (("strength", measure_strength), ("rank", measure_rank)):
        try:
            setattr(data, name, work(data.adapter, found.base.family, found.evaluator.gains))
        except LoraError as error:
            data.problems[name] = without_paths(str(error), data.run)


def _ending(run: RunFolder, progress: Progress) -> str:
    """Why a run ended before its last step."""
    if progress.ending in ("failed", "paused"):
        return without_paths(progress.reason, run)
    last = [e for e in read_events(run.events_file)[0] if isinstance(e, Stopped | Finished)]
    return without_paths(last[-1].reason, run) if last and isinstance(last[-1], Stopped) else ""


def _size(run: RunFolder, progress: Progress, adapter: Path) -> int:
    for file in (run.path / progress.export if progress.export else adapter, adapter):
        if file.is_file():
            return file.stat().st_size
    return 0


def without_paths(text: str, run: RunFolder) -> str:
    """A sentence without the paths of this computer: each becomes its last part.

    A page that is passed on must not reveal where it was made, and for whom.
    """
    places = [str(run.path), str(run.path.parent.parent), str(Path.home())]
    for place in places:
        text = text.replace(place, Path(place).name if place != str(Path.home()) else "~")
    words = []
    for word in text.split(" "):
        parts = word.replace("\\", "/").rstrip("/").split("/")
        words.append(parts[-1] if len(parts) > 2 or (len(parts) == 2 and not parts[0]) else word)
    return " ".join(words)


def saved_image_rows(file: Path) -> list[dict[str, Any]]:
    """Gains by image, the highest first; a file that is missing or broken counts as empty."""
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
