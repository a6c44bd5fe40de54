"""What a library user needs, in one place; everything else may move without notice.

Each verb of the command line (`lora_core.verbs`) is a function here with plain arguments, which returns data
and prints nothing:

    >>> inspect(file)["kind"]
    'LoRA'
    >>> merge([WeightedLora(str(file), 0.5), file], merged)
    ['1 layers of rank 4 from 2 files.']

Below the verbs are the parts that they are made of: open a base, put an adapter into it, draw a picture:

    >>> base = load_base("demo", torch.device("cpu"), torch.float32)
    >>> weights = read_adapter(file, base.family)
    >>> merger = Merger(base.modules)
    >>> merger.apply([LoadedLora(weights, 0.5)])
    >>> generate_image(base, Picture(seed=3), "a red cat").save(out)

Paths are `str` or `Path`. A run is a folder or a name in the workspace; `workspace=None` means the
environment variable LORA_EASEL_HOME, else the platform's user data folder. Every problem that a user can fix
is a `LoraError`. Torch is imported by what needs it, not by `import lora_core.api`.
"""

import importlib
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_core.data.bulk_edit import Edit
from lora_core.errors import AdapterFileError, ConfigError, DatasetError, LoraError, ModelFileError, RunError
from lora_core.generate.request import (
    LARGEST_SEED,
    Axis,
    GenerationRequest,
    WeightedLora,
    grid_requests,
    grid_settings,
)
from lora_core.model_files.detect import base_facts, chosen_base, is_remote
from lora_core.model_files.starting_settings import like_file, starting_settings
from lora_core.runs.folder import RunFolder, checked_name, find_run, runs_folder
from lora_core.settings.config import RunConfig, checked_option, flattened, with_switches
from lora_core.system.paths import workspace as workspace_folder
from lora_core.verbs import VERBS

if TYPE_CHECKING:
    from lora_core.data.scan import Dataset
    from lora_core.generate.pipeline import Pipeline
    from lora_core.model_files.families import Family
    from lora_core.models.load import BaseModel
    from lora_core.projects.project import Project
    from lora_core.projects.workspace import Projects
    from lora_core.runs.events import Event
    from lora_core.tools.evaluator import Evaluator
    from lora_core.train.trainer import Outcome

_LAZY = {
    "AdapterWeights": "lora_core.lora.weights",
    "LayerWeights": "lora_core.lora.weights",
    "Merger": "lora_core.lora.inject",
    "Picture": "lora_core.generate.pipeline",
    "LoadedLora": "lora_core.lora.inject",
    "adapter_weights": "lora_core.lora.inject",
    "generate_image": "lora_core.generate.pipeline",
    "inject": "lora_core.lora.inject",
    "inspect_file": "lora_core.formats.inspect",
    "load_base": "lora_core.models.load",
    "read_adapter": "lora_core.formats.io",
    "validation_report": "lora_core.evaluate.validator",
    "write_adapter": "lora_core.formats.io",
}
"""Names that need torch, and the modules that they are imported from when they are first asked for."""

PLACES = ("model.base", "model.vae", "adapter.init")
"""Settings that may name a file or a folder."""
NO_PLACES = ("", "demo", "default")
PRECISIONS = ("fp32", "fp16", "bf16")

__all__ = [
    *_LAZY,
    *(row.name.replace(" ", "_").replace("-", "_") for row in VERBS),
    "Axis",
    "left_out",
    "like_file",
    "WeightedLora",
    "LoraError",
    "Measure",
    "RunConfig",
    "RunFolder",
    "GenerationRequest",
    "merge_into_base",
    "run_config",
    "shrink_intrinsic",
]

File = str | Path
Lora = WeightedLora | str | Path
Progress = Callable[[int, int], None]
"""Called with (done, total)."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


@dataclass(frozen=True)
class Measure:
    """What to measure an adapter on: pictures that it was not trained on, and a base.

    Attributes:
        dataset: a folder of pictures with captions, a zip, or "demo".
        base: "demo", a folder, a file or a hub id.
        vae: in place of the base's own.
        prediction: "auto", "epsilon" or "v_prediction".
        triples: looks (timestep and noise) a picture.
        seed: of the looks.
        workspace: where zips are unpacked.
        said: called with what is being measured.
        zero_terminal_snr: "auto", "on" or "off".
    """

    dataset: File
    base: str = "demo"
    vae: str = ""
    prediction: str = "auto"
    triples: int = 8
    seed: int = 0
    workspace: File | None = None
    said: Callable[[str], None] | None = None
    zero_terminal_snr: str = "auto"


# Runs


def train(
    dataset: File,
    name: str = "",
    settings: Mapping[str, Any] | None = None,
    preset: str = "",
    workspace: File | None = None,
    on_event: "Callable[[Event], None] | None" = None,
    like: File | None = None,
) -> "Outcome":
    """Make a run and train it to its end.

    Args:
        dataset: a folder of pictures, a zip of one, or "demo".
        name: of the run; "" for date and dataset.
        settings: dotted names to values, such as {"adapter.rank": 8}, or nested tables.
        preset: such as "style-balanced"; "" for the demo's own where the dataset is "demo".
        workspace: where the run is made.
        on_event: called with each event.
        like: a LoRA file whose settings are taken; `settings` count more.

    Raises:
        LoraError: what is in the way, all in one message, or what went wrong.
    """
    from lora_core.runs.preflight import preflight, refuse

    config = run_config(dataset, name, settings, preset, like)
    place = workspace_folder(workspace)
    refuse(preflight(config, place))
    run = RunFolder.create(runs_folder(place) / config.name, config)
    return resume(run.path, on_event=on_event)


def run_config(
    dataset: File,
    name: str = "",
    settings: Mapping[str, Any] | None = None,
    preset: str = "",
    like: File | None = None,
) -> RunConfig:
    """The settings of a run to come: preset, what the base's family needs, those of `like`, then `settings`.

    Args:
        dataset: a folder of pictures, a zip of one, or "demo".
        name: of the run; "" for date and dataset.
        settings: dotted names to values, such as {"adapter.rank": 8}, or nested tables.
        preset: such as "style-balanced"; "" for the demo's own where the dataset is "demo".
        like: a LoRA file, see `spec.like_file`; what it does not say stays as it is.

    Raises:
        ConfigError: something is not a setting or not legal.
        AdapterFileError: `like` says nothing of its training.
    """
    demo = str(dataset) == "demo"
    asked = {**(like_file(Path(like)).values if like else {}), **flattened(settings or {})}
    asked["dataset.path"] = "demo" if demo else str(Path(dataset).expanduser().absolute())
    # Before the preset's own rate is lost to the word `auto`.
    asked = dict(with_switches(asked))
    start = preset or ("demo" if demo else "")
    config = RunConfig().changed(starting_settings(start, _family_of(asked.get("model.base"))) | asked)
    config = config.changed({place: _in_full(config.get(place)) for place in PLACES})
    stem = "demo" if demo else re.sub(r"[^\w.-]+", "-", Path(dataset).stem).strip("-. ") or "dataset"
    name = name or config.name or f"{time.strftime('%Y-%m-%d-%H%M%S')}-{stem}"
    return config.changed({"name": checked_name(name)})


def _family_of(base: object) -> "Family | None":
    """The family of a base, which is downloaded where it is a hub id.

    What is wrong with the files, the run says when it opens them.

    Raises:
        ModelFileError: it cannot be downloaded.
    """
    if not isinstance(base, str):
        return None
    if is_remote(base):
        from lora_core.model_files.hub import fetch_base

        fetch_base(base)
    try:
        return base_facts(base).family
    except ModelFileError:
        return None


def _in_full(place: str) -> str:
    """The full path of what exists, since a run may be resumed from elsewhere; other words stay."""
    path = Path(place).expanduser()
    return str(path.absolute()) if place not in NO_PLACES and path.exists() else place


def forecast(config: RunConfig, workspace: File | None = None, measure: bool = False) -> dict[str, Any]:
    """What a run will take and what is in its way, before it starts.

    Args:
        config: of the run, see `run_config`.
        workspace: where it would be; its runs and what was measured there tell the time.
        measure: take a few steps first, to know time and memory.

    Returns:
        pictures, captions, looks (at each picture), steps, seconds and memory_bytes (None where they are not
        known), source (measured, probed, scaled or guessed), file_bytes, learning_rate (the effective one),
        and problems [{kind, sentence, blocking}].
    """
    from lora_core.model_files.sizes import export_bytes
    from lora_core.runs import costs as known
    from lora_core.runs.costs import at_device, cost_key, read_measured
    from lora_core.runs.folder import all_runs
    from lora_core.runs.preflight import caption_bytes, preflight
    from lora_core.system.hardware import Hardware

    place, base, hardware = workspace_folder(workspace), chosen_base(config.model.base), Hardware()
    hardware.look()
    dataset = _opened(config, place)
    records, problems = dataset.records if dataset else [], preflight(config, place, dataset)
    if measure and base.facts:
        _measure_step(config, place, hardware.device)
    measured = {k: one for k, one in read_measured(place).items() if one.device == hardware.device}
    runs = ((run.progress(), _config_of(run)) for run in all_runs(place))
    step = known.forecast(config, runs, measured, len(records), hardware)
    tried = measured.get(at_device(cost_key(config, base.resolution), hardware.device))
    memory: float | None = tried.peak if tried and tried.peak else None
    if memory is None and base.facts:
        memory = known.memory_needed(config, base.facts, hardware.has_gpu)
        if memory and not hardware.has_gpu:
            memory += sum(caption_bytes(records, config, base.facts))
    shown = sum(record.repeats for record in records)
    looks = config.train.steps * config.train.batch_size * config.train.accumulate
    return {
        "pictures": len(records),
        "captions": sum(bool(record.caption) for record in records),
        "looks": looks / shown if shown else 0.0,
        "steps": config.train.steps,
        "seconds": step.seconds * config.train.steps if step else None,
        "source": step.source if step else "",
        "memory_bytes": round(memory) if memory else None,
        "file_bytes": export_bytes(base.facts, config) if base.facts else None,
        "learning_rate": None if config.optim.range_test else config.optim.lr * config.adapter.scale,
        "problems": [asdict(problem) for problem in problems],
    }


def _opened(config: RunConfig, place: Path) -> "Dataset | None":
    """The pictures, or None where they cannot be read, which `preflight` says."""
    from lora_core.data.dataset import open_dataset

    try:
        return open_dataset(config.dataset.path, place / "cache" / "datasets")
    except DatasetError:
        return None


def _config_of(run: RunFolder) -> RunConfig | None:
    try:
        return run.config()
    except ConfigError:
        return None


def _measure_step(config: RunConfig, place: Path, device: str) -> None:
    """Take a few steps, and keep what they took in the workspace."""
    from lora_core.runs.costs import Measured, cost_key, keep_measured, work_a_step
    from lora_core.worker.probe import Probe

    probe = Probe(lambda answer: None, set(), lambda request: {})
    took = probe.probe({"id": "", "config": config.to_dict(), "aside": str(place / "cache")})
    work, base = work_a_step(config) or 0.0, config.model.base
    measured = Measured(float(took["step"]), float(took["draw"]), int(took["peak"]), base, device, work)
    keep_measured(place, cost_key(config, chosen_base(base).resolution), measured)


def resume(
    run: File,
    steps: int | None = None,
    accept_changes: bool = False,
    workspace: File | None = None,
    on_event: "Callable[[Event], None] | None" = None,
) -> "Outcome":
    """Train a run from where it stands to its end; returns how it ended and its exported file.

    Args:
        run: the run.
        steps: train to so many steps in all; None for what was planned.
        accept_changes: go on although pictures, settings or packages changed since the run began.
        workspace: where a name is looked for.
        on_event: called with each event.

    Raises:
        LoraError: what went wrong.
    """
    from lora_core.train.trainer import train as train_run

    if steps is not None:
        steps = checked_option("steps", "train.steps", steps)
    folder = find_run(run, _path(workspace))
    with folder.held():
        folder.request("resume")
        return train_run(folder, steps, on_event or (lambda event: None), accept_changes)


def stop(run: File, workspace: File | None = None) -> None:
    """Ask a live run to end, keep its work and export it."""
    _request(run, "stop", workspace)


def pause(run: File, workspace: File | None = None) -> None:
    """Ask a live run to end its process, to go on later."""
    _request(run, "pause", workspace)


def save(run: File, workspace: File | None = None) -> None:
    """Ask a live run for a checkpoint."""
    _request(run, "save", workspace)


def preview(run: File, workspace: File | None = None) -> None:
    """Ask a live run for samples."""
    _request(run, "preview", workspace)


def _request(run: File, do: str, workspace: File | None) -> None:
    find_run(run, _path(workspace)).request_live(do)


def runs(workspace: File | None = None) -> list[dict[str, Any]]:
    """The runs of a workspace, newest first: name, path, status, step, steps, loss, best_step, reason."""
    from lora_core.runs.diagnosis import crash_reason
    from lora_core.runs.folder import all_runs

    found = []
    for run in all_runs(workspace_folder(workspace)):
        row = run.summary()
        found.append(row | {"reason": crash_reason(run)} if row["status"] == "interrupted" else row)
    return found


def notify(whom: str | None = None, test: bool = False, workspace: File | None = None) -> str:
    """Who is told when a run of a workspace ends; returns that.

    Args:
        whom: a command, or a web address; "" for nobody; None leaves it as it is.
        test: tell them now.
        workspace: whose runs.

    Raises:
        ConfigError: the command has an open quote, or with `test`, they could not be told.
    """
    from lora_core.runs.notifications import tell_from_now_on, try_telling, whom_to_tell

    place = workspace_folder(workspace)
    if whom is not None:
        tell_from_now_on(place, whom)
    told = whom_to_tell(place)
    if test and (problem := try_telling(told)):
        raise ConfigError(problem)
    return told


def delete(run: File, workspace: File | None = None) -> Path:
    """Move a run to the trash of its workspace; returns where it is now.

    Raises:
        RunError: it is live, or not in a workspace.
    """
    from lora_core.runs.storage import to_trash

    folder = find_run(run, _path(workspace))
    return to_trash(folder.path, folder.path.parent.parent)


def queue_add(run: File, workspace: File | None = None, start: bool = False) -> None:
    """Put a run at the end of its workspace's queue; `start` has the queue worked through by another process.

    Raises:
        RunError: it is done, live, or in the queue already.
    """
    from lora_core.runs.queue import Queue
    from lora_core.runs.runner import ensure_runner

    folder = find_run(run, _path(workspace))
    queue = Queue(workspace_folder(workspace) if workspace else folder.path.parent.parent)
    queue.add(folder)
    if start:
        ensure_runner(queue.workspace)


def queue_list(workspace: File | None = None) -> list[dict[str, Any]]:
    """The queue's jobs in order: position, name, path, state, step, steps, reason."""
    return _queue(workspace).rows()


def queue_move(run: str, position: int, workspace: File | None = None) -> None:
    """Give a waiting run another place; 1 is the next to start.

    Raises:
        RunError: it does not wait, or there is no such place.
    """
    _queue(workspace).move(Path(run).name, position)


def queue_remove(run: str, workspace: File | None = None) -> None:
    """Take a run out of the queue; the run stays.

    Raises:
        RunError: it is not in the queue, or live.
    """
    _queue(workspace).remove(Path(run).name)


def queue_run(workspace: File | None = None, said: Callable[[str], None] | None = None) -> list[Any]:
    """Work through the queue, then return the jobs that ended; `said` is called with a line for each."""
    from lora_core.runs.runner import run_queue

    return run_queue(workspace_folder(workspace), said or (lambda line: None))[0]


def queue_pause(workspace: File | None = None) -> None:
    """Have whoever works through the queue stop; the run in hand is paused and waits again."""
    from lora_core.runs.runner import pause_queue

    pause_queue(workspace_folder(workspace))


def _queue(workspace: File | None) -> Any:
    from lora_core.runs.queue import Queue

    return Queue(workspace_folder(workspace))


def debug(run: File, out: File | None = None, workspace: File | None = None) -> Path:
    """Write a zip for a bug report on a run: settings, events, log; no pictures, paths or names of people.

    Args:
        run: the run.
        out: the zip; None for debug.zip in the run's folder.
        workspace: where a name is looked for.
    """
    from lora_core.runs.diagnosis import debug_zip
    from lora_core.system.paths import write_atomically

    folder = find_run(run, _path(workspace))
    target = _path(out) or folder.path / "debug.zip"
    write_atomically(target, debug_zip(folder, folder.path.parent.parent))
    return target


def report(
    run: File,
    out: File | None = None,
    measure: bool = True,
    workspace: File | None = None,
    said: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Write a run as one self-contained HTML page; returns its path.

    Args:
        run: the run.
        out: the page; None for report.html in the run's folder.
        measure: intrinsic rank and strength too, which need the base.
        workspace: where a name is looked for.
        said: called with what is being done, done and total.
    """
    from lora_core.report.report import FILE_NAME, write_report

    folder = find_run(run, _path(workspace))
    page = _path(out) or folder.path / FILE_NAME
    write_report(folder, page, measure, said or (lambda words, done, total: None), time.time())
    return page


def export(
    run: File,
    checkpoint: str = "best",
    format: str = "kohya",
    precision: str = "fp16",
    name: str = "",
    workspace: File | None = None,
) -> dict[str, Any]:
    """Write a checkpoint of a run as a file for other tools, in the run's `export/`.

    Args:
        run: the run.
        checkpoint: "best" (the last one where none was the best), "last" or a step.
        format: of `choices.FORMATS`.
        precision: "fp16", "bf16" or "fp32".
        name: stem of the file; "" for the run's name.
        workspace: where a name is looked for.

    Returns:
        file, raw (the raw adapter's file where an average is kept, else ""), bytes, modules, sha256, and
        works_in, as `verify`.
    """
    from lora_core.settings.choices import FORMATS, chosen
    from lora_core.train.export import exported_checkpoint

    folder = find_run(run, _path(workspace))
    chosen(FORMATS, format, "format")
    _check_precision(precision)
    step = str(folder.step_of(checkpoint))
    return exported_checkpoint(folder, step, name or folder.name, (format, precision))


# Datasets


def audit(
    dataset: File,
    base: str = "demo",
    resolution: int = 0,
    trigger: str = "",
    batch: int = 1,
    workspace: File | None = None,
) -> dict[str, Any]:
    """What is wrong with a dataset and what will be learned from it, as `audit --json`.

    Args:
        dataset: a folder of pictures, a zip of one, or "demo".
        base: that it is for.
        resolution: in pixels; 0 for the base's own.
        trigger: word that may stand in every caption.
        batch: pictures a batch, for the shares of the steps.
        workspace: where zips are unpacked.
    """
    from lora_core.data.audit import audit as audited
    from lora_core.data.statistics import Training

    checked_option("--batch", "train.batch_size", batch)
    side = checked_option("--resolution", "train.resolution", resolution)
    facts = base_facts(base)
    training = Training(side or facts.resolution, facts.multiple, facts.tokenizer, trigger, batch)
    return audited(_dataset(dataset, workspace), training)


def probe(
    dataset: File,
    base: str = "demo",
    triples: int = 4,
    seed: int = 0,
    trigger: str = "",
    workspace: File | None = None,
    note: Progress | None = None,
) -> dict[str, Any]:
    """What a base makes of captions, as `probe --json`: which fit badly, and words for a trigger."""
    from lora_core.data.dataset import require_clean

    _check_triples(triples)
    found_pictures = _dataset(dataset, workspace)
    require_clean(found_pictures)
    from lora_core.evaluate.caption_scores import score_captions
    from lora_core.evaluate.triggers import propose_triggers
    from lora_core.models.device import best_device, dtype_of
    from lora_core.models.load import load_base

    device = best_device()
    opened = load_base(base, device, dtype_of("auto", device))
    found = score_captions(opened, found_pictures.records, triples, seed, said=note)
    found["trigger"] = propose_triggers(opened, found_pictures.records, trigger, triples, seed, said=note)
    return found


def pictures(
    run: File,
    checkpoint: str = "best",
    triples: int = 8,
    workspace: File | None = None,
    note: Progress | None = None,
) -> dict[str, Any]:
    """What a run has learned of each of its pictures, as `pictures --json`; kept in the run's folder too."""
    _check_triples(triples)
    folder = find_run(run, _path(workspace))
    from lora_core.evaluate.learned import measure_run_images

    return measure_run_images(folder, checkpoint, triples, note)


# Pictures


def generate(
    shot: GenerationRequest,
    out: File | None = None,
    count: int = 1,
    precision: str = "auto",
    workspace: File | None = None,
    drawn: Callable[[Path], None] | None = None,
) -> list[Path]:
    """Draw pictures of the seeds from `shot.seed` on, as PNG files; returns their paths.

    Args:
        shot: all that a picture depends on, adapters included.
        out: the file, with -2, -3, ... appended for more; None for new files in the workspace.
        count: how many.
        precision: of the base.
        workspace: where new files are made.
        drawn: called with each path once the file is written.

    Raises:
        LoraError: a value is out of range, or the base or an adapter cannot be used.
    """
    if not 1 <= count <= 1000:
        raise ConfigError(f"--count {count} is out of range; it goes from 1 to 1000.")
    _check_shot(shot)
    target = _path(out)
    if target:
        _check_png(target)
    folder = None if target else workspace_folder(workspace) / "generated"
    artist = _artist(shot, precision)
    from lora_core.generate.pipeline import save_png

    made = []
    for number in range(count):
        one = shot.at("seed", shot.seed + number)
        path = _numbered(target, number) if target else _unused_png(folder or Path(), one.seed)
        save_png(artist.drawn(one), path, artist.infotext(one))
        made.append(path)
        if drawn:
            drawn(path)
    return made


def grid(
    shot: GenerationRequest,
    out: File,
    rows: Axis | None = None,
    columns: Axis | None = None,
    precision: str = "auto",
) -> Path:
    """Draw a labelled sheet of pictures that differ in one or two things; returns its path.

    Args:
        shot: what all pictures have in common.
        out: the PNG file.
        rows: what differs down the sheet, see `spec.shots.axis`.
        columns: what differs across it.
        precision: of the base.

    Raises:
        LoraError: a value is out of range, or the base or an adapter cannot be used.
    """
    if rows is None and columns is None:
        raise ConfigError("A grid needs --rows or --columns, as in --columns strength=0,0.5,1.")
    for axis in (rows, columns):
        for file in axis.values if axis and axis.kind == "checkpoint" else ():
            if not Path(str(file)).is_file():
                raise AdapterFileError(f"The adapter {file} does not exist.")
    if not shot.prompt and not any(axis and axis.kind == "prompt" for axis in (rows, columns)):
        raise ConfigError(
            "A grid needs --prompt, or prompts as rows or columns, as in --rows prompt=cat,dog."
        )
    _check_shot(shot)
    shots, target = grid_requests(shot, rows, columns), Path(out)
    _check_png(target)
    artist = _artist(shot, precision)
    from lora_core.generate.grid import make_image_grid
    from lora_core.generate.pipeline import save_png

    made = make_image_grid(
        [[artist.drawn(one) for one in row] for row in shots],
        rows.labels() if rows else [],
        columns.labels() if columns else [],
    )
    save_png(made, target, artist.infotext(shot, grid_settings(rows, columns)))
    return target


def _artist(shot: GenerationRequest, precision: str) -> "Pipeline":
    from lora_core.generate.pipeline import open_pipeline
    from lora_core.tools.combine import truncate_adapter

    return open_pipeline(shot, truncate_adapter, precision)


def _check_shot(shot: GenerationRequest) -> None:
    for name, legal, range_words in (
        ("steps", 1 <= shot.steps <= 1000, "it goes from 1 to 1000"),
        ("seed", 0 <= shot.seed <= LARGEST_SEED, "it is a whole number from 0 on"),
        ("cfg", math.isfinite(shot.cfg), "take a number such as 5"),
    ):
        if not legal:
            raise ConfigError(f"--{name} {getattr(shot, name)} is out of range; {range_words}.")


def _check_png(path: Path) -> None:
    """Refuse before the work rather than after it."""
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--out {path} should end in .png.")
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"--out {path} cannot be written; choose a file in a folder of yours.")


def _numbered(path: Path, number: int) -> Path:
    return path if number == 0 else path.with_name(f"{path.stem}-{number + 1}{path.suffix}")


def _unused_png(folder: Path, seed: int) -> Path:
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{seed}"
    path, number = folder / f"{stem}.png", 2
    while path.exists():
        path, number = path.with_name(f"{stem}-{number}.png"), number + 1
    return path


# Adapter files


def validate(measure: Measure, loras: Sequence[Lora] = (), shuffle_captions: bool = False) -> dict[str, Any]:
    """How much better adapters make a base on pictures, as `validate --json`.

    Args:
        measure: the pictures and the base.
        loras: the adapters, all on at once.
        shuffle_captions: give each picture another's caption.
    """
    from lora_core.evaluate.validator import validation_report
    from lora_core.formats.io import read_adapter
    from lora_core.lora.inject import LoadedLora

    files = _loras(loras)
    base, records = _measured_on(measure)
    adapters = [
        LoadedLora(read_adapter(Path(f.file), base.family), f.strength, f.text_strength) for f in files
    ]
    return validation_report(base, records, adapters, measure.triples, measure.seed, shuffle_captions)


def inspect(file: File, spectrum: bool = False) -> dict[str, Any]:
    """What an adapter file is, as `inspect --json`; `problem` says what is wrong with it."""
    from lora_core.formats.inspect import inspect_file

    found = inspect_file(Path(file))
    if not spectrum or found["problem"]:
        return found
    from lora_core.tools.svd import file_spectrum

    return found | file_spectrum(Path(file))


def verify(file: File, base: str = "") -> dict[str, Any]:
    """What six tools would make of an adapter file, as `verify --json`."""
    from lora_core.formats.compat.verify import verified
    from lora_core.formats.layout import folder_layout
    from lora_core.tools.base_weights import BaseWeights

    facts = base_facts(base) if base else None
    family = facts.family if facts else None
    layout = folder_layout(facts.configs, family) if facts and family else None
    weight_of = BaseWeights(base).weight if facts and family else None
    return verified(Path(file), family, modules=layout, weight_of=weight_of)


def convert(source: File, target: File, to: str, keep_alphas: bool = False) -> list[str]:
    """Translate an adapter file to the format `to`, "kohya" or "diffusers"; returns notes.

    Raises:
        AdapterFileError: the target exists, or the source cannot be translated.
    """
    from lora_core.formats.convert import converted

    _check_new(Path(target))
    return converted(Path(source), Path(target), to, keep_alphas)


def merge(
    loras: Sequence[Lora],
    out: File,
    rank: int | None = None,
    blocks: str = "",
    precision: str = "fp32",
    base: str = "",
    note: Progress | None = None,
) -> list[str]:
    """Merge adapters into one file; returns what was done and what it cost, in sentences.

    Args:
        loras: the files, LoHa, LoKr and DoRA too.
        out: the file to make.
        rank: of the result; None adds the ranks and loses nothing.
        blocks: a TOML file of pattern = weight, or "mid_block=0.5,...".
        precision: of the file.
        base: of a DoRA, whose update depends on its weights.
        note: told how far it is.
    """
    from lora_core.tools.merge import MergeOptions, merge_files

    _check_precision(precision)
    return merge_files(
        _ingredients(loras), Path(out), MergeOptions(rank, blocks, precision, base), time.time(), note
    )


def merge_into_base(loras: Sequence[Lora], base: str, out: File, blocks: str = "") -> list[str]:
    """Merge adapters into a copy of a base, a file or a folder; returns what was done, in sentences."""
    from lora_core.tools.merge import merge_files_into_base

    return merge_files_into_base(_ingredients(loras), base, Path(out), blocks)


def shrink(
    file: File,
    out: File,
    rank: int | None = None,
    energy: float | None = None,
    precision: str = "",
    base: str = "",
    note: Progress | None = None,
) -> dict[str, Any]:
    """Write a smaller adapter file, to a rank or an energy; returns {file, sentences}.

    Args:
        file: an adapter; a LoHa, LoKr or DoRA with a rank.
        out: the file to make.
        rank: the same for every layer.
        energy: the share of it to keep, such as 0.99.
        precision: of the file; "" for its own.
        base: of a DoRA.
        note: told how far it is.
    """
    from lora_core.tools.base_weights import BaseWeights
    from lora_core.tools.rewrite import Rewrite
    from lora_core.tools.shrink import ShrinkTarget, shrink_file

    to = Rewrite(Path(file), Path(out), precision, time.time())
    known = BaseWeights(base) if base else None
    return {"file": str(out), "sentences": shrink_file(to, ShrinkTarget(rank, energy), known, note)}


def shrink_intrinsic(file: File, out: File, measure: Measure, precision: str = "") -> dict[str, Any]:
    """Write an adapter file cut to the lowest rank that keeps 99% of the gain measured on `measure`.

    Returns:
        file, sentences, and what was found, as `shrink --intrinsic --json`.
    """
    from lora_core.tools.rewrite import Rewrite, check_out
    from lora_core.tools.shrink import SHRUNK_KEY, intrinsic_rank, load_plain_lora

    check_out(Path(out))
    to = Rewrite(Path(file), Path(out), precision, time.time())
    bench, base = _bench(measure)
    weights, family = load_plain_lora(Path(file), base.family)
    smaller, found = intrinsic_rank(weights, bench.gains)
    record = {"intrinsic": found.rank, "kept": found.best.kept, "standard_error": found.best.standard_error}
    to.write(smaller, family, SHRUNK_KEY, record)
    said = [found.sentence(to.times_smaller)]
    return {"file": str(out), "sentences": said, **found.document(to.times_smaller)}


def extract(
    tuned: str,
    base: str,
    out: File,
    rank: int | None = None,
    energy: float | None = None,
    precision: str = "fp32",
    note: Progress | None = None,
) -> list[str]:
    """Write the LoRA between a fine-tuned model and its base, to a rank or an energy; returns sentences."""
    from lora_core.tools.extract import extract_file
    from lora_core.tools.shrink import ShrinkTarget

    _check_precision(precision)
    return extract_file(tuned, base, Path(out), ShrinkTarget(rank, energy), precision, time.time(), note)


def strength(file: File, measure: Measure, apart: bool = False, bake: File | None = None) -> dict[str, Any]:
    """The strength at which an adapter gains most, as `strength --json`.

    Args:
        file: the adapter.
        measure: the pictures and the base.
        apart: one strength for the UNet and one for the text encoders.
        bake: a file to make that has the best strength at 1.
    """
    from lora_core.tools.rewrite import AS_IT_IS, Rewrite, check_out
    from lora_core.tools.shrink import load_plain_lora
    from lora_core.tools.strength import bake_strength as baked
    from lora_core.tools.strength import fit_strength, fit_strengths_apart

    if bake:
        check_out(Path(bake))
    bench, base = _bench(measure)
    weights = load_plain_lora(Path(file), base.family)[0]
    if apart:
        fits = dict(zip(("unet", "text_encoders"), fit_strengths_apart(weights, bench.gains), strict=True))
        found: dict[str, Any] = {name: fit.document() for name, fit in fits.items()}
    else:
        fits = {"adapter": fit_strength(weights, bench.gains)}
        found = fits["adapter"].document()
    words = {"unet": "On the UNet the adapter", "text_encoders": "On the text encoders the adapter"}
    said = [fit.sentence(words.get(name, "The adapter")) for name, fit in fits.items()]
    if bake:
        to = Rewrite(Path(file), Path(bake), AS_IT_IS, time.time())
        said.append(baked(to, base.family, [fit.strength for fit in fits.values()]))
        found["file"] = str(bake)
    return {**found, "sentences": said}


def copy(file: File, folder: str, workspace: File | None = None) -> dict[str, Any]:
    """Copy an adapter and its side files to where another tool looks for it; nothing is replaced.

    Args:
        file: the adapter.
        folder: a folder, or how the name of a tool on this computer begins, such as "comfy".
        workspace: whose list of folders is searched for tools too.

    Returns:
        file (where it is now), beside (side files that went with it), kept (side files that differ and
        stayed), renamed.

    Raises:
        RunError: there is no such folder or tool, or it cannot be written.
    """
    from lora_core.system.other_tools import copied

    source, target = Path(file), Path(folder).expanduser()
    if not source.is_file():
        raise AdapterFileError(f"The adapter {source} does not exist.")
    if not target.is_dir():
        target = _tool_folder(folder, workspace_folder(workspace))
    done = copied(source, target)
    sides = {name: [str(path) for path in getattr(done, name)] for name in ("beside", "kept")}
    return {"file": str(done.file), **sides, "renamed": done.renamed}


def _tool_folder(name: str, workspace: Path) -> Path:
    from lora_core.system.other_tools import Places, found_tools

    there = [
        tool for tool in found_tools(Places(workspace / "places.json").folders()) if tool.loras is not None
    ]
    for tool in there:
        if tool.loras and tool.name.casefold().startswith(name.casefold()):
            return tool.loras
    names = ", ".join(f"{tool.name} ({tool.loras})" for tool in there)
    raise RunError(
        f"{name} is neither a folder nor a tool on this computer; "
        + (f"these were found: {names}." if names else "none was found, so give its LoRA folder.")
    )


def compare(first: File, second: File) -> dict[str, Any]:
    """How alike the directions of two adapters are, as `compare --json`."""
    from lora_core.tools.interference import file_similarity

    return file_similarity(Path(first), Path(second))


def stack(loras: Sequence[Lora], measure: Measure | None = None) -> dict[str, Any]:
    """How adapters disturb each other when all are on, as `stack --json`; measured too where asked for."""
    from lora_core.tools.interference import Stacked, interference_report, measure_stack

    files = [Stacked(Path(lora.file), lora.strength, lora.text_strength) for lora in _loras(loras)]
    found = interference_report(files)
    if measure is not None:
        bench, base = _bench(measure)
        found["validation"] = measure_stack(files, base.family, bench.gains)
    return found


def amplify(file: File, base: str, note: Progress | None = None) -> dict[str, Any]:
    """How much stronger an adapter is than its base where it acts, as `amplify --json`."""
    from lora_core.tools.amplification import file_amplification
    from lora_core.tools.base_weights import BaseWeights

    return file_amplification(Path(file), BaseWeights(base), note)


# The workspace


def caches_list(workspace: File | None = None) -> dict[str, int]:
    """Bytes of each cache of a workspace by its name, the largest first."""
    from lora_core.runs.storage import workspace_sizes

    return workspace_sizes(workspace_folder(workspace)).caches


def caches_clean(workspace: File | None = None) -> int:
    """Remove the caches, which runs can make again; returns the bytes freed.

    Raises:
        RunError: a run is live, or the disk refuses.
    """
    from lora_core.runs.storage import clean_caches

    return clean_caches(workspace_folder(workspace))


def trash_list(workspace: File | None = None) -> list[dict[str, Any]]:
    """What is in a workspace's trash, newest first: id, name, kind, came_from, time."""
    from lora_core.runs.storage import trashed

    return [one.row() for one in trashed(workspace_folder(workspace))]


def trash_restore(name: str, workspace: File | None = None) -> Path:
    """Put something from the trash back, under another name where its own is taken; returns where it is.

    Args:
        name: of a run, project or picture, or an id of `trash_list`.
        workspace: whose trash.

    Raises:
        RunError: nothing, or more than one thing, has that name.
    """
    from lora_core.runs.storage import restore, trashed

    place = workspace_folder(workspace)
    there = trashed(place)
    found = [one for one in there if name in (one.name, one.place.name)]
    if len(found) == 1:
        return restore(found[0], place)
    if found:
        ids = ", ".join(one.place.name for one in found)
        raise RunError(f"The trash holds {len(found)} things named {name}; give one of the ids {ids}.")
    names = ", ".join(sorted({one.name for one in there})[:10])
    raise RunError(f"The trash holds no {name}; " + (f"it holds {names}." if names else "it is empty."))


def trash_empty(workspace: File | None = None) -> int:
    """Remove for good all that is in a workspace's trash; returns the bytes freed."""
    from lora_core.runs.storage import empty_trash, trash_folder
    from lora_core.system.disk_space import folder_bytes

    place = workspace_folder(workspace)
    size = folder_bytes(trash_folder(place))
    empty_trash(place)
    return size - folder_bytes(trash_folder(place))


def projects_list(workspace: File | None = None) -> list[dict[str, Any]]:
    """The projects, the open one first: key (its folder), title, path, is_open, pictures, runs, size."""
    projects = _projects(workspace)
    return [{**asdict(one), "path": str(projects.folder / one.key)} for one in projects.listed()]


def projects_new(title: str, workspace: File | None = None) -> Path:
    """Make a project and open it; returns its folder.

    Raises:
        RunError: the title is empty or taken.
    """
    projects = _projects(workspace)
    return projects.folder / projects.new(title)


def projects_open(project: str, workspace: File | None = None) -> None:
    """Choose the project that the window opens with, by title or name of the folder."""
    projects = _projects(workspace)
    projects.open(projects.named(project))


def projects_rename(project: str, title: str, workspace: File | None = None) -> None:
    """Give a project another title; its folder keeps its name.

    Raises:
        RunError: there is no such project, or the title is empty or taken.
    """
    projects = _projects(workspace)
    projects.rename(projects.named(project), title)


def projects_delete(project: str, workspace: File | None = None) -> Path:
    """Move a project to the trash; returns where it is now.

    Raises:
        RunError: there is no such project, it is the only one, or a live run uses it.
    """
    projects = _projects(workspace)
    return projects.delete(projects.named(project))


def projects_import(
    project: str, source: File, link: bool = False, workspace: File | None = None
) -> dict[str, Any]:
    """Copy or link pictures, captions and masks into a project.

    Args:
        project: title, or name of the folder.
        source: a folder, a zip or a picture.
        link: link files in place of copying them.
        workspace: of the project.

    Returns:
        added (files) and skipped, a sentence for each file that was left out.

    Raises:
        LoraError: the source does not exist, or nothing in it can be used.
    """
    from lora_core.data.importer import Way, import_files, import_folder
    from lora_core.projects.project import Project

    projects, where = _projects(workspace), Path(source).expanduser().absolute()
    into = Project(projects.folder / projects.named(project))
    if not where.is_dir() and not where.is_file():
        raise DatasetError(f"There is no folder, zip or picture at {where}.")
    way = Way("link" if link else "copy", sizes=into.sizes)
    if where.is_dir():
        found = import_folder(where, into.pictures, way)
    else:
        found = import_files([where], into.pictures, way=way)
    if link:
        into.link(where if where.is_dir() else where.parent)
    return {"added": len(found.added), "skipped": [one.sentence for one in found.skipped]}


def _projects(workspace: File | None) -> "Projects":
    from lora_core.projects.workspace import Projects

    return Projects(workspace_folder(workspace))


# Pictures and captions of a folder or a project


def leave_out(dataset: File, pictures: Sequence[str], workspace: File | None = None) -> int:
    """Move pictures aside, with captions and masks; returns how many.

    Args:
        dataset: a folder of pictures, or a project's title or folder name.
        pictures: their paths below the folder.
        workspace: of the project.
    """
    from lora_core.projects.project import leave_out as moved

    return moved(_pictures_of(dataset, workspace), list(pictures))


def take_back(dataset: File, pictures: Sequence[str], workspace: File | None = None) -> int:
    """Put pictures that were left out back; returns how many."""
    from lora_core.projects.project import take_back as moved

    return moved(_pictures_of(dataset, workspace), list(pictures))


def left_out(dataset: File, workspace: File | None = None) -> list[str]:
    """The pictures that were left out, as `take_back` takes them."""
    from lora_core.projects.project import left_out as aside
    from lora_core.projects.project import relative_name

    project = _pictures_of(dataset, workspace)
    return [relative_name(record.path, project.aside) for record in aside(project)]


def hold_out(dataset: File, pictures: Sequence[str], on: bool = True, workspace: File | None = None) -> None:
    """Choose pictures to measure on instead of training on them; `on=False` takes that back."""
    project = _pictures_of(dataset, workspace)
    for name in pictures:
        project.named(name)
    project.hold_out(list(pictures), on)


def captions_set(dataset: File, picture: str, text: str, workspace: File | None = None) -> None:
    """Write the caption of one picture."""
    _pictures_of(dataset, workspace).save_caption(picture, text)


def captions_replace(
    dataset: File,
    find: str,
    put: str,
    regex: bool = False,
    any_case: bool = False,
    dry_run: bool = False,
    workspace: File | None = None,
) -> dict[str, Any]:
    """Find and replace in all captions.

    Args:
        dataset: a folder of pictures, or a project's title or folder name.
        find: a text, or with `regex` a regular expression.
        put: what comes in its place; may refer to the groups of a regular expression.
        regex: see `find`.
        any_case: whether capitals and small letters are the same.
        dry_run: change nothing.
        workspace: of the project.

    Returns:
        changed and asked (captions), and rows {picture, pieces} of the first, where pieces are (kind, text)
        with the kinds same, old and new.
    """
    return _edited(dataset, Edit("replace", find, put, regex, any_case), dry_run, workspace)


def captions_prefix(
    dataset: File, text: str, dry_run: bool = False, workspace: File | None = None
) -> dict[str, Any]:
    """Put a text in front of all captions; as `captions_replace`."""
    return _edited(dataset, Edit("prepend", put=text), dry_run, workspace)


def captions_suffix(
    dataset: File, text: str, dry_run: bool = False, workspace: File | None = None
) -> dict[str, Any]:
    """Put a text at the end of all captions; as `captions_replace`."""
    return _edited(dataset, Edit("append", put=text), dry_run, workspace)


def captions_rename_tag(
    dataset: File, tag: str, new: str, dry_run: bool = False, workspace: File | None = None
) -> dict[str, Any]:
    """Give a tag another name; as `captions_replace`."""
    return _edited(dataset, Edit("rename tag", tag, new), dry_run, workspace)


def captions_delete_tag(
    dataset: File, tag: str, dry_run: bool = False, workspace: File | None = None
) -> dict[str, Any]:
    """Delete a tag; as `captions_replace`."""
    return _edited(dataset, Edit("delete tag", tag), dry_run, workspace)


def captions_trigger(
    dataset: File, word: str, dry_run: bool = False, workspace: File | None = None
) -> dict[str, Any]:
    """Add a trigger word to all captions that lack it; as `captions_replace`."""
    return _edited(dataset, Edit("trigger", put=word), dry_run, workspace)


def captions_undo(dataset: File, workspace: File | None = None) -> dict[str, int]:
    """Take the last change of many captions back; returns how many are undone, and kept as changed since."""
    from lora_core.projects.caption_edits import undo

    undone, kept = undo(_pictures_of(dataset, workspace))
    return {"undone": undone, "kept": kept}


def _edited(dataset: File, edit: Edit, dry_run: bool, workspace: File | None) -> dict[str, Any]:
    from lora_core.projects import caption_edits

    project = _pictures_of(dataset, workspace)
    found = caption_edits.preview(project, edit, None)
    if not dry_run:
        found["changed"] = caption_edits.apply(project, edit, None)
    return found


def _pictures_of(dataset: File, workspace: File | None) -> "Project":
    from lora_core.projects.workspace import pictures_of

    return pictures_of(str(dataset), workspace_folder(workspace))


def doctor(workspace: File | None = None) -> dict[str, Any]:
    """What this computer has: `ok`, and `checks` with `name`, `found`, `ok` and `fix` each."""
    from lora_core.report.doctor import diagnosis

    return diagnosis(_path(workspace))


def serve() -> None:
    """Be the warm worker on this process's stdin and stdout until they end."""
    from lora_core import serve as worker

    worker.main()


def _path(text: File | None) -> Path | None:
    return Path(text) if text else None


def _loras(loras: Sequence[Lora]) -> list[WeightedLora]:
    """Raises AdapterFileError for a file that does not exist."""
    found = [one if isinstance(one, WeightedLora) else WeightedLora(str(one)) for one in loras]
    for lora in found:
        if not Path(lora.file).is_file():
            raise AdapterFileError(f"The adapter {lora.file} does not exist.")
    return found


def _ingredients(loras: Sequence[Lora]) -> list[Any]:
    from lora_core.tools.merge import Ingredient

    return [Ingredient(Path(lora.file), lora.strength, lora.text_strength) for lora in _loras(loras)]


def _dataset(dataset: File, workspace: File | None) -> Any:
    from lora_core.data.dataset import open_dataset

    return open_dataset(str(dataset), workspace_folder(workspace) / "cache" / "datasets")


def _measured_on(measure: Measure) -> "tuple[BaseModel, list[Any]]":
    """The opened base and the pictures."""
    from lora_core.data.dataset import require_clean

    _check_triples(measure.triples)
    found = _dataset(measure.dataset, measure.workspace)
    require_clean(found)
    from lora_core.models.device import best_device, dtype_of
    from lora_core.models.load import load_base

    device = best_device()
    base = load_base(
        measure.base, device, dtype_of("fp32", device), measure.prediction, measure.vae,
        zero_snr=measure.zero_terminal_snr,
    )  # fmt: skip
    return base, found.records


def _bench(measure: Measure) -> "tuple[Evaluator, BaseModel]":
    base, records = _measured_on(measure)
    from lora_core.tools.evaluator import Evaluator

    return Evaluator(base, records, measure.triples, measure.seed, measure.said), base


def _check_triples(triples: int) -> None:
    if not 1 <= triples <= 1000:
        raise ConfigError(f"--triples {triples} is out of range; it goes from 1 to 1000.")


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ConfigError(f"The precision {precision!r} is not one of {', '.join(PRECISIONS)}.")


def _check_new(path: Path) -> None:
    if path.exists():
        raise AdapterFileError(f"{path} exists already; choose another name or remove it first.")
