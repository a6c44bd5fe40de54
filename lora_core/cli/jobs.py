"""Verbs about runs: train, resume, stop, pause, save, preview, runs, serve."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_core import api
from lora_core.cli import (
    Verbs,
    add_file,
    add_json,
    add_run,
    add_workspace,
    file_size,
    named_run,
    say,
    say_json,
)
from lora_core.cli.progress import EventPrinter
from lora_core.errors import ModelFileError
from lora_core.model_files.detect import read_base_facts
from lora_core.runs.events import EventWriter, Stopped
from lora_core.runs.folder import RunFolder, runs_folder
from lora_core.runs.notifications import notify_end
from lora_core.runs.preflight import RunProblem, require_none_blocking
from lora_core.settings.choices import FORMATS
from lora_core.settings.config import RunConfig, checked_value, flattened, load_toml, parsed_assignment
from lora_core.system.cpu_threads import COMPUTES, GIVES_WAY, without_collecting
from lora_core.system.disk_space import file_bytes
from lora_core.system.keep_awake import keep_awake
from lora_core.system.paths import workspace
from lora_core.system.processes import INTERRUPTED, StopRequest
from lora_core.verbs import PRECISIONS

if TYPE_CHECKING:
    from lora_core.train.distributed import ProcessGroup
    from lora_core.train.trainer import Outcome

LAUNCHED = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers say how many processes there are; accelerate reads the same."""
ONE_ONLY = (
    "accelerate was asked for several processes and started one, as it does with --cpu where it is given no"
    " --mpirun_hostfile; set ACCELERATE_USE_CPU=true and give --multi_gpu instead of --cpu."
)


def add_verbs(verbs: Verbs) -> None:
    """Add this module's verbs."""
    train, forecast = verbs["train"], verbs["forecast"]
    for verb in (train, forecast):
        _add_settings(verb)
    train.add_argument(
        "--queue", action="store_true", help="put the run into the queue in place of training it"
    )
    train.set_defaults(run=_train, processor=COMPUTES)
    forecast.add_argument("--measure", action="store_true", help="take a few steps, to know time and memory")
    add_json(forecast)
    forecast.set_defaults(run=_forecast, processor=COMPUTES)
    _add_runs(verbs)


def _add_settings(train: argparse.ArgumentParser) -> None:
    """The options that say what is trained, and how."""
    train.add_argument("dataset", help="a folder of pictures, a zip of one, or `demo`")
    train.add_argument("--name", default="", help="the run's name; else date and dataset")
    train.add_argument(
        "--base", default="", help="`demo`, a diffusers folder, a .safetensors file, or a hub id"
    )
    train.add_argument("--config", type=Path, help="a TOML file of settings")
    train.add_argument("--preset", default="", help="quick, balanced, high, or goal-level such as style-high")
    train.add_argument("--set", action="append", default=[], metavar="section.key=value", help="one setting")
    add_file(train, "--like", metavar="FILE", help="a LoRA file whose settings are taken")
    add_workspace(train)


def _add_runs(verbs: Verbs) -> None:
    resume = verbs["resume"]
    add_run(resume)
    resume.add_argument("--steps", type=int, help="train to so many steps in all, also a finished run")
    resume.add_argument("--accept-changes", action="store_true", help="go on although something has changed")
    resume.set_defaults(run=_resume, processor=COMPUTES)
    for word in ("stop", "pause", "save", "preview"):
        add_run(verbs[word])
        verbs[word].set_defaults(run=_request)
    runs = verbs["runs"]
    add_workspace(runs)
    add_json(runs)
    runs.set_defaults(run=_runs)
    debug = verbs["debug"]
    add_run(debug)
    debug.add_argument("--out", type=Path, metavar="F.zip", help="else debug.zip in the run's folder")
    debug.set_defaults(run=_debug)
    add_run(verbs["delete"])
    verbs["delete"].set_defaults(run=_delete)
    export = verbs["export"]
    add_run(export)
    export.add_argument("--checkpoint", default="best", metavar="STEP", help="best, last, or a step")
    export.add_argument("--format", default="kohya", choices=list(FORMATS))
    export.add_argument("--precision", default="fp16", choices=PRECISIONS)
    export.add_argument("--name", default="", help="of the file, else the run's")
    add_json(export)
    export.set_defaults(run=_export)
    serve = verbs["serve"]
    serve.set_defaults(run=_serve, processor=GIVES_WAY)


def config_of(options: argparse.Namespace) -> RunConfig:
    """The settings that a command line asks for: preset, what the base's family needs, then --like, --config,
    --base and --set.

    Raises:
        ConfigError: something is not a setting or not legal.
    """
    asked: dict[str, Any] = flattened(load_toml(options.config)) if options.config else {}
    if options.base:
        asked["model.base"] = options.base
    asked |= dict(parsed_assignment(text) for text in options.set)
    return api.run_config(options.dataset, options.name, asked, options.preset, options.like)


def _say_like(options: argparse.Namespace) -> None:
    """What was taken from the file of --like, and what was not."""
    if options.like:
        like = api.like_file(options.like)
        say(f"Like {options.like.name}: {len(like.values)} settings from {like.source}.")
        if like.base:
            say(f"Note: It was trained on {like.base}; choose the base by --base.")
        for sentence in like.left:
            say(f"Note: {sentence}")


def _forecast(options: argparse.Namespace) -> int:
    found = api.forecast(config_of(options), options.workspace, options.measure)
    if options.json:
        say_json(found)
        return 0
    _say_like(options)
    for line in forecast_lines(found):
        say(line)
    for problem in found["problems"]:
        say(f"{'Problem' if problem['blocking'] else 'Note'}: {problem['sentence']}")
    return 0


def forecast_lines(found: dict[str, Any]) -> list[str]:
    """A forecast in a few lines."""
    looks = max(1, round(found["looks"]))
    lines = [
        f"{found['pictures']} pictures, {found['captions']} with a caption; {found['steps']} steps look at"
        f" each about {looks} times."
    ]
    known = []
    if found["seconds"]:
        source = "measured" if found["source"] in ("measured", "probed") else "estimated"
        known.append(f"time about {_duration(found['seconds'])}, {source}")
    else:
        known.append("time known after some steps, or by `forecast --measure`")
    if found["memory_bytes"]:
        known.append(f"memory about {file_size(found['memory_bytes'])}")
    if found["file_bytes"]:
        known.append(f"file about {file_size(found['file_bytes'])}")
    if found["learning_rate"]:
        known.append(f"effective learning rate {found['learning_rate']:.3g}")
    return lines + ([f"Forecast: {'; '.join(known)}."] if known else [])


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _train(options: argparse.Namespace) -> int:
    def lead(stopping: StopRequest, group: "ProcessGroup | None") -> int:
        with stopping.raising():
            config = config_of(options)
            place = workspace(options.workspace)
            expected = api.forecast(config, place)
            require_none_blocking([RunProblem(**problem) for problem in expected["problems"]])
        _say_like(options)
        run = _begun(config, place, expected)
        if options.queue:
            api.queue_add(run.path)
            say(f"{run.name} waits in the queue of {place}")
            return 0
        return resumed(run, None, stopping=stopping, group=group)

    return _together(lead)


def _resume(options: argparse.Namespace) -> int:
    def lead(stopping: StopRequest, group: "ProcessGroup | None") -> int:
        run = named_run(options)
        return resumed(run, options.steps, options.accept_changes, stopping, group)

    return _together(lead)


def _together(lead: Callable[[StopRequest, "ProcessGroup | None"], int]) -> int:
    """Train alone, or as one of the processes that `accelerate launch` started for one run.

    Args:
        lead: what the main process does, or the only one; returns the exit code. The others follow it, and
            leave stopping to it.
    """
    stopping = StopRequest()
    with stopping.taken():
        if max(int(os.environ.get(name) or 1) for name in LAUNCHED) == 1:
            if "MASTER_ADDR" in os.environ and not any(name in os.environ for name in LAUNCHED):
                say(f"Note: {ONE_ONLY}")
            return lead(stopping, None)
        from lora_core.train.distributed import process_group
        from lora_core.train.trainer import train_as_worker

        with process_group() as group:
            if group.main:
                return lead(stopping, group)
            train_as_worker(group)
            return 0


def _begun(config: RunConfig, place: Path, expected: dict[str, Any]) -> RunFolder:
    run = RunFolder.create(runs_folder(place) / config.name, config)
    say(f"Run {run.name} in {run.path}")
    with contextlib.suppress(ModelFileError):  # the run says it
        model = config.model
        say(f"Base: {read_base_facts(model.base, model.prediction, model.zero_terminal_snr).sentence}")
    for line in forecast_lines(expected):
        say(line)
    for problem in expected["problems"]:
        say(f"Note: {problem['sentence']}")
    return run


def resumed(
    run: RunFolder,
    steps: int | None,
    accept_changes: bool = False,
    stopping: StopRequest | None = None,
    group: "ProcessGroup | None" = None,
) -> int:
    """Train a run from where it stands, and tell whom the person chose when it ends; returns the exit code.

    Signals are taken from here on, long before torch is imported: also an early one is a stop that is written
    down.
    """
    stopping = stopping or StopRequest()
    with stopping.taken():
        before = file_bytes(run.events_file)
        try:
            outcome = _trained(run, steps, accept_changes, stopping, group)
        finally:
            note = notify_end(run, run.path.parent.parent) if file_bytes(run.events_file) > before else ""
            if note:
                say(f"Note: {note}")
        if outcome.export is not None:
            say(str(outcome.export))
        return INTERRUPTED if outcome.signalled else 0


def _trained(
    run: RunFolder,
    steps: int | None,
    accept_changes: bool,
    stopping: StopRequest,
    group: "ProcessGroup | None",
) -> "Outcome":
    if steps is not None:
        steps = checked_value("train.steps", steps, "--steps")
    with run.hold():
        try:
            # Torch takes seconds to import; a stop that is asked for meanwhile must not be voided by this
            # line.
            run.request("resume")
            with stopping.raising(), without_collecting():
                from lora_core.train.trainer import train
        except KeyboardInterrupt:
            _note_stop(run)
            raise

        if group is not None:
            _say_shares(group.count, run.config().train.batch_size)
        printer = EventPrinter(sys.stdout)
        with keep_awake():
            outcome = train(run, steps, printer.show, accept_changes, stopping, group)
        printer.close()
    return outcome


def _say_shares(processes: int, pictures: int) -> None:
    say(f"{processes} processes share each batch of {pictures}.")
    if pictures < processes:
        say(f"Note: {processes - pictures} of them have nothing to do; train.batch_size is {pictures}.")


def _note_stop(run: RunFolder) -> None:
    """Write down that the run was stopped before the trainer, which does so itself, was there."""
    before = run.progress()
    writer = EventWriter(run.events_file)
    writer.write(Stopped(step=before.step, export=before.export))
    writer.close()


def _request(options: argparse.Namespace) -> int:
    named_run(options).request_live(options.verb)
    return 0


def _runs(options: argparse.Namespace) -> int:
    rows = api.runs(options.workspace)
    if options.json:
        say_json(rows)
        return 0
    if not rows:
        say("No runs yet. Start one with `lora-easel train demo`.")
    for row in rows:
        loss = "" if row["loss"] is None else f"  loss {row['loss']:.4f}"
        say(
            f"{row['name']:30}  {row['status']:11}  step {row['step']} of {row['steps']}{loss} "
            f" {row['reason']}"
        )
    return 0


def _debug(options: argparse.Namespace) -> int:
    say(str(api.debug(named_run(options).path, options.out)))
    return 0


def _delete(options: argparse.Namespace) -> int:
    api.delete(named_run(options).path)
    say(f"In the trash; `lora-easel trash restore {Path(options.run_name).name}` puts it back.")
    return 0


def _export(options: argparse.Namespace) -> int:
    run = named_run(options)
    made = api.export(run.path, options.checkpoint, options.format, options.precision, options.name)
    if options.json:
        say_json(made)
        return 0
    for row in made["works_in"]["tools"]:
        if not row["ok"]:
            say(f"{row['tool']}: {row['note']}")
    if made["raw"]:
        say(f"The raw adapter, not averaged: {made['raw']}")
    say(made["file"])
    return 0


def _serve(options: argparse.Namespace) -> int:
    with without_collecting():
        api.serve()
    return 0
