"""Verbs for runs: make, train, control, queue, delete and export them."""

import contextlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from lora_core.data.dataset import run_dataset, with_epochs
from lora_core.errors import ConfigError, DatasetError, LoraError, ModelFileError, RunError
from lora_core.generate.grid import split_values
from lora_core.model_files.detect import base_of, is_remote, read_base_facts
from lora_core.model_files.starting_settings import LEVELS, settings_from_lora, starting_settings
from lora_core.projects.workspace import find_dataset
from lora_core.runs.diagnosis import debug_zip, find_crash, read_recipient, send_test, write_recipient
from lora_core.runs.events import Event
from lora_core.runs.folder import RunFolder, all_runs, check_run_name, find_run, is_run_folder, runs_folder
from lora_core.runs.queue import Queue, ensure_runner, run_queue, sweep_configs
from lora_core.settings.config import RunConfig, checked_value, flattened, with_switches
from lora_core.settings.schema import FORMATS, chosen
from lora_core.system.files import expand_home, write_atomically
from lora_core.system.files import workspace as workspace_folder
from lora_core.system.hardware import Hardware
from lora_core.verbs import FILE_PRECISIONS, File, Found, Place, check_precision, listed, verb

if TYPE_CHECKING:
    from lora_core.model_files.families import Family
    from lora_core.train.trainer import Outcome

PLACES = ("model.base", "model.vae", "adapter.init")
"""Settings that may name a file or a folder."""
NO_PLACES = ("", "demo", "default")


@verb
def train(
    dataset: File = "",
    name: str = "",
    settings: Mapping[str, Any] | None = None,
    preset: str = "",
    workspace: Place = None,
    on_event: Callable[[Event], None] | None = None,
    like: File | None = None,
) -> "Outcome":
    """Train an adapter on a dataset, or a slider from two prompts: make a run and train it to its end.

    Args:
        dataset, name, settings, preset, like: as for `run_config`.
        on_event: called with each event.

    Raises:
        LoraError: all problems in one message, or the failure.
    """
    from lora_core.runs.preflight import preflight, require_none_blocking

    config = run_config(dataset, name, settings, preset, like, workspace)
    place = workspace_folder(workspace)
    require_none_blocking(preflight(config, place))
    run = RunFolder.create(runs_folder(place) / config.name, config)
    return resume(run.path, on_event=on_event)


def run_config(
    dataset: File = "",
    name: str = "",
    settings: Mapping[str, Any] | None = None,
    preset: str = "",
    like: File | None = None,
    workspace: Place = None,
) -> RunConfig:
    """The settings of a run to come: preset, what the base's family needs, those of `like`, then `settings`.

    Args:
        dataset: a folder of images, a zip of one, a project's name, or "demo"; "" for a concept slider,
            which has none.
        name: of the run; "" for date and dataset.
        settings: dotted names to values, such as {"adapter.rank": 8}, or nested tables.
        preset: such as "style-balanced"; "" for the demo's own where the dataset is "demo", and for a
            slider's.
        like: a LoRA file or another trainer's configuration, see `model_files.settings_from_lora`; other
            settings stay as they are.

    Raises:
        ConfigError: something is not a setting or not legal, or there is neither a dataset nor a slider, or
            both.
        AdapterFileError: `like` says nothing of its training.
    """
    given, dataset = dataset, find_dataset(str(dataset), workspace_folder(workspace))
    demo = dataset == "demo"
    asked = {**(settings_from_lora(Path(like)).values if like else {}), **flattened(settings or {})}
    asked = {name: str(value) if isinstance(value, Path) else value for name, value in asked.items()}
    slider = bool(asked.get("slider.positive") or asked.get("slider.negative"))
    if slider == bool(dataset):
        raise ConfigError(
            f"A slider is trained without images: leave out the dataset {dataset}, or set slider.positive and"
            " slider.negative to nothing."
            if slider
            else "Give a dataset, or the two prompts of a slider: slider.positive and slider.negative."
        )
    asked["dataset.path"] = dataset if demo or slider else str(expand_home(dataset).absolute())
    # Before the preset's own rate is lost to the word `auto`.
    asked = dict(with_switches(asked))
    if slider:
        own = "demo" if asked.get("model.base", "demo") == "demo" else "balanced"
        preset = f"slider-{preset or own}" if preset in ("", *LEVELS) else preset
    start = preset or ("demo" if demo else "")
    # In two steps: a preset's rate is one for the preset's optimizer.
    config = RunConfig().changed(starting_settings(start, _family_of(asked.get("model.base")))).changed(asked)
    config = config.changed({place: _in_full(config.get(place)) for place in PLACES})
    stem = re.sub(r"[^\w.-]+", "-", Path(given).stem).strip("-. ") or ("slider" if slider else "dataset")
    name = name or config.name or f"{time.strftime('%Y-%m-%d-%H%M%S')}-{stem}"
    return config.changed({"name": check_run_name(name)})


def _family_of(base: object) -> "Family | None":
    """The family of a base, which is downloaded where it is a hub id.

    Problems of the files are reported when the run opens them.

    Raises:
        ModelFileError: it cannot be downloaded.
    """
    if not isinstance(base, str):
        return None
    if is_remote(base):
        from lora_core.model_files.hub import fetch_base

        fetch_base(base)
    try:
        return read_base_facts(base).family
    except ModelFileError:
        return None


def _in_full(place: str) -> str:
    """The full path of existing files, since a run may be resumed from elsewhere; other text stays."""
    path = expand_home(place)
    return str(path.absolute()) if place not in NO_PLACES and path.exists() else place


@verb
def forecast(config: RunConfig, workspace: Place = None, measure: bool = False) -> Found:
    """Predict a run's time, memory and file size, and list its problems.

    Args:
        config: of the run, see `run_config`.
        measure: time a few steps.

    Returns:
        pictures, captions, looks (at each image), steps, seconds and memory_bytes (None where they are not
        known), source (measured, probed, scaled or ""), file_bytes, learning_rate (the effective one),
        fallbacks (applied to fit into a card's free memory), memory_as_set (without them), and problems
        [{kind, sentence, blocking}].
    """
    from lora_core.runs.costs import forecast_run, read_costs
    from lora_core.runs.preflight import preflight

    place, facts = workspace_folder(workspace), base_of(config.model).facts
    hardware = Hardware(wanted=lambda: config.train.device)
    hardware.look()
    card = hardware.card()
    dataset = None
    with contextlib.suppress(DatasetError):  # `preflight` says it
        dataset = run_dataset(config, place / "cache" / "datasets")
    problems = preflight(config, place, dataset)
    if measure and facts:
        _measure_step(config, place, hardware.device)
    costs = read_costs(place, hardware.device)
    runs = ((run.progress(), run.config_or_none()) for run in all_runs(place))
    records = dataset.records if dataset else []
    gpu = hardware.gpu(card.free() if card else None)
    with contextlib.suppress(LoraError):  # `preflight` says it
        config = with_epochs(config, dataset) if dataset else config
    found = forecast_run(config, facts, records, runs, costs, gpu)
    return asdict(found) | {"problems": [asdict(problem) for problem in problems]}


def _measure_step(config: RunConfig, place: Path, device: str) -> None:
    """Time a few steps, and keep the result in the workspace."""
    from lora_core.runs.costs import StepCost, keep_cost, step_passes
    from lora_core.train.autotune import time_steps

    took = time_steps(config, place / "cache")
    cost = StepCost(took["step"], took["draw"], took["peak"], config.model.base, device, step_passes(config))
    keep_cost(place, config, cost)


@verb
def resume(
    run: File,
    steps: int | None = None,
    accept_changes: bool = False,
    workspace: Place = None,
    on_event: Callable[[Event], None] | None = None,
) -> "Outcome":
    """Start or resume a run and train it to its end; returns how it ended and its exported file.

    Args:
        steps: train to this many steps in all, also a finished run.
        accept_changes: resume although images, settings or packages changed since the run began.
        on_event: called with each event.

    Raises:
        LoraError: what went wrong.
    """
    from lora_core.train.trainer import train as train_run

    if steps is not None:
        steps = checked_value("train.steps", steps, "steps")
    folder = find_run(run, workspace)
    with folder.hold():
        folder.request("resume")
        return train_run(folder, steps, on_event or (lambda event: None), accept_changes)


@verb
def stop(run: File, workspace: Place = None) -> None:
    """Stop a run with a checkpoint and an export."""
    _request(run, "stop", workspace)


@verb
def pause(run: File, workspace: Place = None) -> None:
    """Pause a run with a checkpoint; resume it later."""
    _request(run, "pause", workspace)


@verb
def save(run: File, workspace: Place = None) -> None:
    """Write a checkpoint now."""
    _request(run, "save", workspace)


@verb
def preview(run: File, workspace: Place = None) -> None:
    """Draw samples now."""
    _request(run, "preview", workspace)


def _request(run: File, do: str, workspace: Place) -> None:
    find_run(run, workspace).request_live(do)


@verb
def runs(workspace: Place = None) -> list[Found]:
    """List the runs of a workspace, newest first.

    Returns:
        name, path, status, step, steps, loss, best_step and reason of each.
    """
    found = []
    for run in all_runs(workspace_folder(workspace)):
        row = run.summary()
        found.append(row | {"reason": find_crash(run).reason} if row["status"] == "interrupted" else row)
    return found


@verb
def notify(
    whom: Annotated[str | None, "COMMAND|URL"] = None, test: bool = False, workspace: Place = None
) -> str:
    """Set or show who is notified when a run ends: a command or a web address.

    Args:
        whom: a command or a web address; '' for none.
        test: notify now.

    Raises:
        ConfigError: the command has an open quote, or with `test`, they could not be notified.
    """
    place = workspace_folder(workspace)
    if whom is not None:
        write_recipient(place, whom)
    recipient = read_recipient(place)
    if test and (problem := send_test(recipient)):
        raise ConfigError(problem)
    return recipient


@verb
def delete(run: File, workspace: Place = None) -> Path:
    """Move a run to the trash; returns where it is now.

    Raises:
        RunError: it is live, or not in a workspace.
    """
    from lora_core.projects.workspace import move_to_trash

    folder = find_run(run, workspace)
    return move_to_trash(folder.path, folder.path.parent.parent)


@verb
def queue_add(run: File, workspace: Place = None, start: bool = False) -> RunFolder:
    """Put a run at the end of the queue of its workspace; returns its folder.

    Args:
        start: process the queue in another process.

    Raises:
        RunError: it is done, live, or in the queue already.
    """
    folder = find_run(run, workspace)
    queue = Queue(workspace_folder(workspace) if workspace else folder.path.parent.parent)
    queue.add(folder)
    if start:
        ensure_runner(queue.workspace)
    return folder


@verb
def queue_sweep(
    run: File,
    setting: str,
    values: Sequence[str],
    workspace: Place = None,
    start: bool = False,
    by: Annotated[Sequence[str], "--by SETTING=V,V,..."] = (),
    seeds: int = 1,
) -> list[RunFolder]:
    """Queue a sweep: copies of a run with several values of a setting; returns their folders.

    Args:
        setting: such as adapter.rank.
        values: such as 4 8 16; each copy is named after its own.
        start: process the queue in another process.
        by: a further setting and its values, such as optimizer.lr=1e-4,3e-4; each combination is a run.
        seeds: number of runs of each combination, with different seeds.

    Raises:
        LoraError: an invalid value or another problem; nothing is queued then.
    """
    from lora_core.runs.preflight import preflight, require_none_blocking

    folder = find_run(run, workspace)
    place = workspace_folder(workspace) if workspace else folder.path.parent.parent
    config = folder.config().changed({"name": folder.name})
    axes = [(name, split_values(rest)) for name, _, rest in (text.partition("=") for text in listed(by))]
    swept = sweep_configs(config, setting, listed(values), runs_folder(place), axes, seeds)
    places = (*PLACES, "dataset.path")
    configs = [one.changed({name: _in_full(one.get(name)) for name in places}) for one in swept]
    for one in configs:
        require_none_blocking(preflight(one, place))
    made = Queue(place).add_new(configs)
    if start:
        ensure_runner(place)
    return made


@verb
def queue_results(runs: Annotated[Sequence[str], "RUN..."] = (), workspace: Place = None) -> Found:
    """Compare gain and cost of runs with different settings: a sweep, or runs by name.

    Args:
        runs: names; one of a sweep selects all of it, none the last sweep.

    Returns:
        settings (the names of those that differ), rows and sentence, as of `costs.compare_trials`.

    Raises:
        RunError: no such run, or no sweep yet.
    """
    from lora_core.runs.costs import Trial, compare_trials

    place, runs = workspace_folder(workspace), listed(runs)
    queue = Queue(place)
    # Of a sweep, runs that were deleted since are left out.
    sweeps = [[run for run in map(queue.run, one) if is_run_folder(run.path)] for one in queue.sweeps()]
    if len(runs) > 1:
        folders = [find_run(name, place) for name in runs]
    else:
        asked = [one for one in sweeps if one and (not runs or runs[0] in [run.name for run in one])]
        folders = asked[-1] if asked else [find_run(name, place) for name in runs]
    if not folders:
        raise RunError("There is no sweep yet; queue one with `lora-easel queue sweep RUN SETTING VALUES`.")
    return compare_trials([Trial(folder, folder.config(), folder.progress()) for folder in folders])


@verb
def queue_list(workspace: Place = None) -> list[Found]:
    """List the jobs of the queue, in order: position, name, path, state, step, steps and reason."""
    return Queue(workspace_folder(workspace)).rows()


@verb
def queue_move(run: File, position: int, workspace: Place = None) -> None:
    """Move a waiting run to another place in the queue.

    Args:
        position: 1 is the next to start.

    Raises:
        RunError: it does not wait, or no such place.
    """
    queue, name = _queue_of(run, workspace)
    queue.move(name, position)


@verb
def queue_remove(run: File, workspace: Place = None) -> None:
    """Remove a run from the queue; the run is kept.

    Raises:
        RunError: it is not in the queue, or live.
    """
    queue, name = _queue_of(run, workspace)
    queue.remove(name)


def _queue_of(run: File, workspace: Place) -> tuple[Queue, str]:
    """The queue that a run is in, and the name of its job; the run's folder may be gone."""
    queue = Queue(workspace_folder(workspace))
    if any(job.run == str(run) for job in queue.stored_jobs()):
        return queue, str(run)
    folder = find_run(run, workspace)
    return (queue if workspace else Queue(folder.path.parent.parent)), folder.name


@verb
def queue_run(workspace: Place = None, on_phase: Callable[[str], None] | None = None) -> list[Any]:
    """Process the queue, then end; returns the finished jobs. `on_phase` gets a line for each."""
    return run_queue(workspace_folder(workspace), on_phase or (lambda line: None))[0]


@verb
def queue_pause(workspace: Place = None) -> None:
    """Pause the queue; the current run is paused and waits again."""
    Queue(workspace_folder(workspace)).set_enabled(False)


@verb
def debug(run: File, out: Annotated[File | None, "--out F.zip"] = None, workspace: Place = None) -> Path:
    """Write a zip for a bug report on a run, without images, paths and names.

    Args:
        out: the zip, else debug.zip in the run's folder.
    """
    folder = find_run(run, workspace)
    target = Path(out) if out else folder.path / "debug.zip"
    write_atomically(target, debug_zip(folder, folder.path.parent.parent))
    return target


@verb
def report(
    run: File,
    out: Annotated[File | None, "--out F.html"] = None,
    measure: Annotated[bool, "--no-measure"] = True,
    workspace: Place = None,
    on_phase: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Write a run as one self-contained HTML page.

    Args:
        out: the page, else report.html in the run's folder.
        measure: intrinsic rank and strength too, which need the base; --no-measure leaves them out.
        on_phase: called with (phase, done, total).
    """
    from lora_core.report.report import FILE_NAME, write_report

    folder = find_run(run, workspace)
    page = Path(out) if out else folder.path / FILE_NAME
    write_report(folder, page, measure, on_phase or (lambda words, done, total: None), time.time())
    return page


@verb
def export(  # noqa: PLR0913 - one option each
    run: File,
    checkpoint: Annotated[str, "--checkpoint STEP"] = "best",
    format: Annotated[str, FORMATS] = "kohya",
    precision: Annotated[str, FILE_PRECISIONS] = "fp16",
    name: str = "",
    workspace: Place = None,
    full_rank: bool = False,
    measured_rank: bool = False,
) -> Found:
    """Write a checkpoint of a run as a file for other tools, in the run's `export/`.

    Args:
        checkpoint: best (the last one where none was the best), last, or the step of a checkpoint.
        format: of the file.
        precision: dtype of the factors.
        name: of the file, else the run's.
        full_rank: keep all ranks of the checkpoint of a run with adapter.rank = auto.
        measured_rank: cut the file to the ranks that the run's report measured, which keep 99% of the gain.

    Returns:
        file, raw (the raw adapter's file where an average is kept, else ""), bytes, modules, sha256, cut
        (what `adapter.rank = auto` cut, with `sentence`, else empty), and works_in, as `verify`.
    """
    from lora_core.train.export import export_checkpoint

    if full_rank and measured_rank:
        raise ConfigError("--full-rank keeps all ranks and --measured-rank cuts them; give one of the two.")
    folder = find_run(run, workspace)
    chosen(FORMATS, format, "format")
    check_precision(precision)
    step = str(folder.step_of(str(checkpoint)))
    how = (format, precision)
    return export_checkpoint(folder, step, name or folder.name, how, full_rank, measured_rank)
