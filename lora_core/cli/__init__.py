"""The command line: one command per verb, with options made from the verb's signature and docstring.

A command parses its words (`parser`), calls the verb and prints the result (`terminal`): in words, or with
`--json` as one JSON document and nothing else. The few commands that do more than one verb, or print while
they work, are functions in this file. Exit codes: 0 done; 1 a problem that a user can fix, in one sentence on
stderr; 2 wrong usage; 130 interrupted.
"""

import codecs
import contextlib
import dataclasses
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from lora_core import api
from lora_core.backends import import_models
from lora_core.cli.parser import Call, command, function_of, parse
from lora_core.cli.terminal import EventPrinter, one_line, say, say_json, show_result, slow_notes, write
from lora_core.errors import (
    AdapterFileError,
    ConfigError,
    LoraError,
    ModelFileError,
    RunError,
    clip_message,
    count_words,
)
from lora_core.generate.request import GenerationRequest
from lora_core.model_files.detect import read_base_facts
from lora_core.model_files.header import read_header
from lora_core.runs.diagnosis import notify_end
from lora_core.runs.events import EventWriter, Stopped
from lora_core.runs.folder import RunFolder, find_run, runs_folder
from lora_core.runs.queue import FAILED, Queue, run_queue
from lora_core.settings.config import (
    RunConfig,
    checked_value,
    flattened,
    in_short,
    load_toml,
    parsed_assignment,
    read_prompts,
)
from lora_core.system import processes
from lora_core.system.files import clean_text, expand_home, file_bytes
from lora_core.system.files import workspace as workspace_folder
from lora_core.verbs import CHECKPOINT, FILE_PRECISIONS, AdapterFile, File, Measure

if TYPE_CHECKING:
    from lora_core.train.distributed import ProcessGroup

COMPUTING = ("train", "forecast", "resume", "generate", "grid", "validate")
"""Verbs that a user waits for."""


def run() -> None:
    """Entry point of the `lora-easel` command."""
    sys.exit(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    for word in words:
        if word != clean_text(word) and not os.path.lexists(word):
            write(sys.stderr, f"{in_short(word)} holds bytes that are not UTF-8; type it again.\n")
            return 1
    replace_unprintable()
    try:
        call = parse(words)
        quiet_libraries()
        set_up_cuda()
        processes.limit_spinning(processor_use(call.verb))  # may wait
        return _run(call)
    except LoraError as error:
        write(sys.stderr, f"{one_line(error)}\n")
        return 1
    except KeyboardInterrupt:
        return processes.INTERRUPTED
    except OSError as error:
        name = error.filename or "A file"
        sentence = clip_message(f"{name} cannot be read or written: {error.strerror or error}.")
        write(sys.stderr, f"{one_line(sentence)}\n")
        return 1


def _run(call: Call) -> int:
    """Do a verb and print its result; returns the exit code."""
    function, arguments = function_of(call.verb), call.arguments()
    for one in arguments.values():
        if isinstance(one, GenerationRequest) or (isinstance(one, Measure) and one.dataset):
            loras = getattr(one, "loras", arguments.get("loras", ()))
            files = [arguments["file"]] if "file" in arguments else []
            note_extras([*files, *(lora.file for lora in loras)])
    result = function(**arguments)
    if function in PROGRAMS:
        return int(result)
    if not call.json:
        show_result(call.verb, result, arguments)
    elif isinstance(result, Path):
        say_json({"file": str(result), "bytes": result.stat().st_size})
    else:
        say_json(result)
    about = result if isinstance(result, dict) else {}
    if about.get("problem"):
        raise AdapterFileError(about["problem"])
    return 0 if about.get("ok", True) else 1


def note_extras(files: Iterable[File]) -> None:
    """Say on stderr what adapter files hold that is not used."""
    from lora_core.formats.kinds import extras_sentence

    for file in dict.fromkeys(map(Path, files)):
        sentence = extras_sentence(read_header(file).shapes, with_tokens=True)
        if sentence:
            write(sys.stderr, f"Note: {one_line(file.name)}: {one_line(sentence)}\n")


def processor_use(verb: str) -> str:
    """How a verb shares the processor, see `limit_spinning`."""
    if verb == "serve":
        return processes.GIVES_WAY
    return processes.COMPUTES if verb in COMPUTING else processes.SLEEPS


def quiet_libraries() -> None:
    """Hide the progress bars and deprecation notes of libraries from users."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore")


def set_up_cuda() -> None:
    """Number cards as nvidia-smi does, and do not fragment their memory; before torch is imported."""
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if sys.platform.startswith("linux"):
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def replace_unprintable() -> None:
    """Print a `?` for a letter that the terminal's encoding lacks, or its like, rather than fail."""
    codecs.register_error("easel", _replace)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - closed, as by >&-
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="easel")


def _replace(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    letters = error.object[error.start : error.end]
    return "".join({"✓": "+", "✗": "x"}.get(letter, "?") for letter in letters), error.end


# Commands that do what two verbs do


@command("shrink")
def _shrink(
    file: AdapterFile,
    out: Annotated[Path, "--out"],
    rank: int | None = None,
    energy: Annotated[float | None, "--energy SHARE"] = None,
    intrinsic: bool = False,
    precision: Annotated[str, FILE_PRECISIONS] = "",
    measure: Measure = Measure("", base=""),  # noqa: B008 - frozen
) -> dict[str, Any]:
    """Shrink an adapter.

    Args:
        intrinsic: the lowest rank that keeps 99% of the gain, measured on --dataset.
    """
    if not intrinsic:
        return api.shrink(file, out, rank, energy, precision, measure.base, slow_notes())
    if not measure.dataset:
        raise ConfigError("--intrinsic measures the gain: give --dataset, images that it was not trained on.")
    measured = dataclasses.replace(measure, base=measure.base or "demo")
    return api.shrink_intrinsic(file, out, measured, precision)


@command("take-back")
def _take_back(
    dataset: str, pictures: Annotated[Sequence[str], "PICTURE"] = (), workspace: Path | None = None
) -> list[str]:
    if not pictures:
        return api.left_out(dataset, workspace)
    return [f"{api.take_back(dataset, pictures, workspace)} taken back."]


# Commands that print while they work. Each returns the exit code.


@dataclass(frozen=True)
class Training:
    """What a command line asks a run to be.

    Attributes:
        dataset: a folder of images, a zip of one, a project's name, or `demo`; none for a slider.
        name: the run's name; else date and dataset.
        base: `demo`, a diffusers folder, a .safetensors file, or a hub id.
        config: a TOML file of settings.
        preset: quick, balanced, high, or goal-level such as style-high.
        set: one setting; sample.prompts may be a text file of prompts.
        like: a LoRA file or a configuration of another trainer, whose settings are taken.
    """

    dataset: Annotated[str, "DATASET"] = ""
    name: str = ""
    base: str = ""
    config: Path | None = None
    preset: str = ""
    set: Annotated[Sequence[str], "--set section.key=value"] = ()
    like: Annotated[Path | None, CHECKPOINT] = None

    def run_config(self, workspace: Path | None) -> RunConfig:
        """The settings: preset, what the base's family needs, then --like, --config, --base and --set.

        Raises:
            ConfigError: something is not a setting or not legal.
        """
        asked: dict[str, Any] = flattened(load_toml(self.config)) if self.config else {}
        if self.base:
            asked["model.base"] = self.base
        asked |= dict(parsed_assignment(text) for text in self.set)
        if isinstance(prompts := asked.get("sample.prompts"), str) and prompts.lower().endswith(".txt"):
            asked["sample.prompts"] = read_prompts(expand_home(prompts))
        return api.run_config(self.dataset, self.name, asked, self.preset, self.like, workspace)

    def say_like(self) -> None:
        """Print the settings taken from the file of --like, and those that were not."""
        if self.like:
            like = api.settings_from_lora(self.like)
            say(f"Like {self.like.name}: {count_words(len(like.values), 'setting')} from {like.source}.")
            if like.base:
                say(f"Note: It was trained on {like.base}; choose the base by --base.")
            say(f"Taken: {like.listed_values(defaults=False)}.")
            if like.defaults:
                say(f"Left out there; its trainer's defaults: {like.listed_values(defaults=True)}.")
            for sentence in like.left:
                say(f"Note: {sentence}")
            if like.keys:
                say(f"Read: {', '.join(like.keys)}.")
            if like.off:
                say(f"Empty or off there: {', '.join(like.off)}.")


@command("forecast")
def _forecast(
    training: Training, measure: bool = False, workspace: Path | None = None, as_json: bool = False
) -> int:
    found = api.forecast(training.run_config(workspace), workspace, measure)
    if as_json:
        say_json(found)
    else:
        training.say_like()
        show_result("forecast", found, {})
    return 0


@command("train")
def _train(training: Training, queue: bool = False, workspace: Path | None = None) -> int:
    from lora_core.runs.preflight import RunProblem, require_none_blocking
    from lora_core.runs.queue import Queue

    def lead(stopping: processes.StopRequest, group: "ProcessGroup | None") -> int:
        with stopping.raising():
            config = training.run_config(workspace)
            place = workspace_folder(workspace)
            expected = api.forecast(config, place)
            require_none_blocking([RunProblem(**problem) for problem in expected["problems"]])
        training.say_like()
        run = RunFolder.create(runs_folder(place) / config.name, config)
        say(f"Run {run.name} in {run.path}")
        with contextlib.suppress(ModelFileError):  # the run says it
            model = config.model
            say(f"Base: {read_base_facts(model.base, model.prediction, model.zero_terminal_snr).sentence}")
        show_result("forecast", expected, {})
        if queue:
            Queue(place).add(run)
            say(f"{run.name} waits in the queue of {place}")
            return 0
        return _resume_run(run, None, False, stopping, group)

    return _together(lead)


@command("resume")
def _resume(
    run: str, steps: int | None = None, accept_changes: bool = False, workspace: Path | None = None
) -> int:
    def lead(stopping: processes.StopRequest, group: "ProcessGroup | None") -> int:
        return _resume_run(find_run(run, workspace), steps, accept_changes, stopping, group)

    return _together(lead)


LAUNCHED = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers say how many processes there are; accelerate reads the same."""
ONE_ONLY = (
    "accelerate was asked for several processes and started one, as it does with --cpu where it is given no"
    " --mpirun_hostfile; set ACCELERATE_USE_CPU=true and give --multi_gpu instead of --cpu."
)


def _together(lead: Callable[[processes.StopRequest, "ProcessGroup | None"], int]) -> int:
    """Train alone, or as one of the processes that `accelerate launch` started for one run.

    Args:
        lead: what the main process does, or the only one; returns the exit code. The others follow it, and
            leave stopping to it.
    """
    stopping = processes.StopRequest()
    with stopping.taken():
        if max(int(os.environ.get(name) or 1) for name in LAUNCHED) == 1:
            if "MASTER_ADDR" in os.environ and not any(name in os.environ for name in LAUNCHED):
                say(f"Note: {ONE_ONLY}")
            return lead(stopping, None)
        from lora_core.train.distributed import process_group, train_as_worker

        with process_group() as group:
            if group.is_main:
                return lead(stopping, group)
            train_as_worker(group)
            return 0


def _resume_run(
    run: RunFolder, steps: int | None, accept_changes: bool, stopping: processes.StopRequest,
    group: "ProcessGroup | None",
) -> int:  # fmt: skip
    """Train a run to its end, and notify the user when it ends; returns the exit code.

    Signals are taken as a stop from here on, long before torch is imported.
    """
    if steps is not None:
        steps = checked_value("train.steps", steps, "--steps")
    before = file_bytes(run.events_file)
    try:
        with run.hold():
            try:
                # A stop that is asked for while torch is imported must not be voided by this line.
                run.request("resume")
                with stopping.raising(), processes.without_collecting():
                    import_models()
                    from lora_core.train.trainer import train
            except KeyboardInterrupt:
                # The trainer, which writes this down itself, was not there yet.
                progress, writer = run.progress(), EventWriter(run.events_file)
                writer.write(Stopped(step=progress.step, export=progress.export))
                writer.close()
                raise
            if group is not None:
                size = run.config().train.batch_size
                say(f"{group.world_size} processes share each batch of {size}.")
                if idle := max(0, group.world_size - size):
                    say(f"Note: {idle} of them have nothing to do; train.batch_size is {size}.")
            printer = EventPrinter(sys.stdout, run.config_or_none())
            with processes.keep_awake():
                outcome = train(run, steps, printer.show, accept_changes, stopping, group)
            printer.close()
    finally:
        note = notify_end(run, run.path.parent.parent) if file_bytes(run.events_file) > before else ""
        if note:
            say(f"Note: {note}")
    if outcome.export is not None:
        say(outcome.export)
    return processes.INTERRUPTED if outcome.signalled else 0


@command("queue run")
def _queue_run(workspace: Path | None = None, as_json: bool = False) -> int:
    place = workspace_folder(workspace)
    ended, interrupted = run_queue(place, (lambda line: None) if as_json else say)
    if as_json:
        say_json(Queue(place).rows())
    if interrupted:
        return processes.INTERRUPTED
    failed = [job.run for job in ended if job.state == FAILED]
    if failed:
        raise RunError(
            f"{len(failed)} of {len(ended)} jobs failed: {', '.join(failed)}; `lora-easel queue list` says"
            " why."
        )
    return 0


@command("serve")
def _serve() -> int:
    with processes.without_collecting():
        import_models()
        from lora_core.worker import main as serve
    serve()
    return 0


PROGRAMS = (_train, _forecast, _resume, _queue_run, _serve)
"""Commands that print while they work, and return the exit code."""
