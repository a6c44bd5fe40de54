"""The command line: one command per verb, with options made from the verb's signature and docstring.

A command parses its words, calls the verb and prints the result: in words, or with `--json` as one JSON
document and nothing else. The few commands that do more than one verb, or print while they work, are
functions in this file. Exit codes: 0 done; 1 a problem that a user can fix, in one sentence on stderr;
2 wrong usage; 130 interrupted.

Typer parses and draws the help. Verbs that need torch import it themselves, so that `runs` and `stop` answer
at once.
"""

import collections.abc
import contextlib
import dataclasses
import inspect
import io
import math
import os
import re
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lora_core import api
from lora_core.cli.terminal import (
    EventPrinter,
    forecast_lines,
    say,
    say_json,
    show_result,
    slow_notes,
    write,
)
from lora_core.errors import AdapterFileError, ConfigError, LoraError, ModelFileError, RunError
from lora_core.generate.request import (
    KINDS,
    Axis,
    GenerationRequest,
    WeightedLora,
    parse_axis,
    parse_cfg_rescale,
)
from lora_core.model_files.detect import read_base_facts
from lora_core.model_files.header import read_header
from lora_core.runs.events import EventWriter, Stopped
from lora_core.runs.folder import RunFolder, find_run, runs_folder
from lora_core.runs.notifications import notify_end
from lora_core.runs.queue import FAILED, Queue
from lora_core.runs.runner import run_queue
from lora_core.settings.choices import PREDICTIONS, ZERO_TERMINAL_SNR
from lora_core.settings.config import (
    RunConfig,
    checked_value,
    flattened,
    in_short,
    is_unicode,
    load_toml,
    parsed_assignment,
)
from lora_core.system.cpu_threads import COMPUTES, GIVES_WAY, SLEEPS, limit_spinning, without_collecting
from lora_core.system.disk_space import file_bytes
from lora_core.system.keep_awake import keep_awake
from lora_core.system.paths import workspace as workspace_folder
from lora_core.system.processes import INTERRUPTED, StopRequest
from lora_core.verbs import CHECKPOINT, GROUPS, PRECISIONS, VERBS, AdapterFile, File, Measure, Progress

if TYPE_CHECKING:
    from lora_core.train.distributed import ProcessGroup
    from lora_core.train.trainer import Outcome

NEEDED = inspect.Parameter.empty
LORA = "FILE[:STRENGTH[:TEXT_STRENGTH]]"
SPELLINGS = {"loras": f"--lora {LORA}", "cfg_rescale": "--cfg-rescale PHI", "rows": "--rows KIND=V,V,...",
             "columns": "--columns KIND=V,V,..."}  # fmt: skip
"""Of fields and parameters that cannot say it themselves."""
CHOICES = {"prediction": tuple(PREDICTIONS), "zero_terminal_snr": tuple(ZERO_TERMINAL_SNR)}
NO_OPTIONS = ("clip_skip", "tokens")
"""Fields of a generation request that no option sets."""
MUST_BE_GIVEN = {("generate", "prompt")}
EXACTLY_ONE = {"extract": ("rank", "energy"), "shrink": ("rank", "energy", "intrinsic")}
COMPUTING = ("train", "forecast", "resume", "generate", "grid", "validate")
"""Verbs that a user waits for."""
PANELS = {
    "lora_core.verbs.runs": "Runs",
    "lora_core.verbs.data": "Pictures, projects and the workspace",
    "lora_core.verbs.adapters": "Pictures and files with adapters",
    "lora_core.api": "This program",
}
"""Headings of the list of verbs, by the module of their functions."""
HELP = {
    "workspace": "where runs and caches live; else LORA_EASEL_HOME",
    "run": "a run's folder, or its name in the workspace",
    "base": "`demo`, a diffusers folder, a .safetensors file, or a hub id",
    "file": "an adapter",
    "prompt": "what the picture shows",
    "negative": "what it should not show",
    "steps": "of the sampler",
    "seed": "of the noise",
    "cfg": "guidance scale",
    "cfg_rescale": "0 to 1, off at 0; auto: 0.7 for a velocity base with zero terminal SNR, 0 for others and"
    " demo",
    "sampler": "such as ddim or euler_a",
    "width": "in pixels; 0 for the base's own",
    "height": "in pixels; 0 for the base's own",
    "loras": "an adapter",
    "rows": f"what they vary, {', '.join(KINDS)}; a value with a comma stands in double quotes",
    "columns": f"what they vary, {', '.join(KINDS)}; a value with a comma stands in double quotes",
    "dataset": "a folder of pictures, a zip of one, or `demo`",
    "pictures": "paths below the folder",
    "on": "have them trained on again",
    "project": "its title, or its folder's name",
    "dry_run": "show what would change, change nothing",
    "vae": "a VAE in place of the base's own: a folder or a file",
    "prediction": "what the base predicts, if it is known",
    "zero_terminal_snr": "whether the base's last timestep is pure noise, if it is known",
    "queue": "put the run into the queue instead of training it",
    "first": "an adapter",
    "second": "another",
}
"""Help of parameters that many verbs have; a verb's own docstring comes first but for the first two."""


# The parser


@dataclass(frozen=True)
class Parameter:
    """One option or argument.

    Attributes:
        key: where its value goes: a parameter of the function, or "parameter.field" of a dataclass.
        annotation: its type, without None.
        default: its value if it is not given, `NEEDED` if it must be.
        help: one line.
        spelling: how the command line has it, where the name does not say it: "--to FOLDER" or "FILE".
        choices: its legal values, where they are few.
        checkpoint: whether it may also name a run's checkpoint.
    """

    key: str
    annotation: Any
    default: Any
    help: str
    spelling: str = ""
    choices: tuple[str, ...] = ()
    checkpoint: bool = False

    @property
    def name(self) -> str:
        """The Python name of its value."""
        return self.key.rpartition(".")[2]

    @property
    def flag(self) -> bool:
        """Whether it is an option without a value."""
        return self.annotation is bool

    @property
    def many(self) -> bool:
        """Whether it may be given several times."""
        return typing.get_origin(self.annotation) in (collections.abc.Sequence, tuple, list)

    @property
    def option(self) -> str:
        """What it is set by, such as "--rank"; "" for an argument."""
        if self.spelling:
            return self.spelling.partition(" ")[0] if self.spelling.startswith("--") else ""
        return "" if self.default is NEEDED else f"--{self.name.replace('_', '-')}"

    def typed(self) -> inspect.Parameter:
        """As typer takes it."""
        metavar = self.spelling.partition(" ")[2] if self.option else self.spelling or self.name.upper()
        default = self.default
        kind: Any
        if self.flag:
            kind, default = bool, False
        elif self.many:
            kind = list[str]
            default = NEEDED if default is NEEDED else []
        elif self.choices:
            kind = Literal[self.choices]
        else:
            kinds = _members(self.annotation)
            kind = Path if Path in kinds else kinds[0] if kinds in ((int,), (float,)) else str
        default = None if default == "" and kind is not str else default
        if default is None:
            kind = kind | None if isinstance(kind, type) else typing.Optional[kind]  # noqa: UP045
        names = [self.option] if self.option else []
        made = typer.Option if self.option else typer.Argument
        info = made(*names, help=self.help, metavar=metavar or None, show_default=False)
        return inspect.Parameter(
            self.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
        )


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, without None; of any other type itself."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return tuple(
        one for one in (typing.get_args(annotation) if union else (annotation,)) if one is not types.NoneType
    )


def _callable(annotation: Any) -> bool:
    return typing.get_origin(annotation) is collections.abc.Callable


def parameters(verb: str) -> list[Parameter]:
    """The options and arguments of a verb."""
    function = COMMANDS.get(verb, VERBS[verb])
    helps = {**_argument_help(VERBS[verb]), **_argument_help(function)}
    found = [
        one for p in inspect.signature(function).parameters.values() for one in _expanded(verb, p, helps)
    ]
    names = [one.name for one in found]
    if "workspace" not in names and any(
        one.checkpoint or one.many or one.annotation is Axis for one in found
    ):
        found.append(Parameter("workspace", Path, None, HELP["workspace"]))
    returned = str(inspect.signature(VERBS[verb]).return_annotation)
    if "dict" in returned or verb in ("report", "queue run"):
        found.append(Parameter("json", bool, False, "one JSON document and nothing else"))
    return found


def _expanded(verb: str, parameter: inspect.Parameter, helps: Mapping[str, str]) -> Iterator[Parameter]:
    """One parameter, or those of the fields of a dataclass."""
    annotation, extras = parameter.annotation, list[Any]()
    if typing.get_origin(annotation) is Annotated:
        annotation, *extras = typing.get_args(annotation)
    kinds = _members(annotation)
    if annotation is Call or isinstance(annotation, str) or _callable(kinds[0]):
        return
    if dataclasses.is_dataclass(kinds[0]) and kinds[0] is not Axis:
        yield from _fields(verb, parameter, kinds[0])
        return
    name = parameter.name
    spelled: list[str] = [one for one in extras if isinstance(one, str)]
    choices: list[Any] = [one for one in extras if isinstance(one, tuple | Mapping)]
    yield Parameter(
        name,
        annotation if len(kinds) > 1 else kinds[0],
        parameter.default,
        HELP[name] if name in ("workspace", "run") else helps.get(name, HELP.get(name, "")),
        spelled[-1] if spelled else SPELLINGS.get(name, "") if parameter.default is not NEEDED else "",
        tuple(choices[-1]) if choices else (),
        CHECKPOINT in extras,
    )


def _fields(verb: str, parameter: inspect.Parameter, kind: Any) -> Iterator[Parameter]:
    """The fields of a dataclass, with the defaults of the parameter's own where it has one."""
    helps = _argument_help(kind)
    for field in dataclasses.fields(kind):
        name, default = field.name, field.default
        if name in NO_OPTIONS or _callable(_members(field.type)[0]):
            continue
        if parameter.default is None:
            default = "" if default is dataclasses.MISSING else default
        elif parameter.default is not NEEDED:
            default = getattr(parameter.default, name)
        needed = default is dataclasses.MISSING or (verb, name) in MUST_BE_GIVEN
        # A field that a dataclass needs is an option as the others, but for the first of a training.
        spelling = SPELLINGS.get(name, "" if kind is Training else f"--{name.replace('_', '-')}")
        text, choices = helps.get(name, HELP.get(name, "")), CHOICES.get(name, ())
        checkpoint = name == "like"
        yield Parameter(
            f"{parameter.name}.{name}",
            field.type,
            NEEDED if needed else default,
            text,
            spelling,
            choices,
            checkpoint,
        )


def _argument_help(documented: Any) -> dict[str, str]:
    """The help of each parameter, from `Args:` or `Attributes:` of a docstring."""
    text = inspect.getdoc(documented) or ""
    section = re.search(r"^(?:Args|Attributes):\n(.*?)(?=\n\S|\Z)", text, re.S | re.M)
    rows = re.findall(r"^ {4}(\w+): (.*(?:\n {6,}.*)*)", section[1] if section else "", re.M)
    return {name: " ".join(words.split()).rstrip(".") for name, words in rows}


@dataclass
class Call:
    """A verb and what its options say."""

    verb: str
    values: dict[str, Any]

    @property
    def json(self) -> bool:
        """Whether the result is printed as JSON."""
        return bool(self.values.get("json"))

    def arguments(self) -> dict[str, Any]:
        """The arguments of the verb's function.

        Raises:
            LoraError: a value is not legal, or a file or run that it names does not exist.
        """
        function, found = COMMANDS.get(self.verb, VERBS[self.verb]), dict[str, Any]()
        parts: dict[str, dict[str, Any]] = {}
        place = self.values.get("workspace")
        for one in parameters(self.verb):
            value = _meaning(one, self.values[one.name], place)
            first, _, field = one.key.partition(".")
            if field:
                parts.setdefault(first, {})[field] = value
            elif first in inspect.signature(function).parameters:
                found[first] = value
        for name, parameter in inspect.signature(function).parameters.items():
            kind = _members(parameter.annotation)[0]
            if name in parts:
                missing = parameter.default is None and not parts[name].get("dataset")
                given = {"said": slow_notes()} if kind is Measure else {}
                found[name] = None if missing else kind(**parts[name], **given)
            elif name in ("note", "said"):
                found[name] = slow_notes()
            elif name == "drawn":
                found[name] = say
        return found


def _meaning(parameter: Parameter, value: Any, place: Path | None) -> Any:
    """What the words of an option stand for."""
    if parameter.flag:
        return value != bool(parameter.default is not NEEDED and parameter.default)
    if parameter.name == "loras":
        return tuple(weighted_lora(text, place) for text in value)
    if parameter.name == "cfg_rescale":
        return parse_cfg_rescale(value)
    if parameter.annotation is Axis or Axis in _members(parameter.annotation):
        return _axis(value, place) if value else None
    # What looks like a file is the verb's to miss.
    if (
        parameter.checkpoint
        and value is not None
        and not value.exists()
        and ("@" in value.name or not value.suffix)
    ):
        return adapter_file(str(value), place)
    return parameter.default if value is None and parameter.default is not NEEDED else value


def _axis(text: str, place: Path | None) -> Axis:
    """An axis, its checkpoints as files."""
    axis = parse_axis(text)
    if axis.kind != "checkpoint":
        return axis
    return Axis(axis.kind, tuple(str(adapter_file(str(value), place)) for value in axis.values))


def adapter_file(text: str, place: Path | None) -> Path:
    """An adapter file, or that of a run's checkpoint: RUN (the best one) or RUN@STEP; a file comes first.

    Raises:
        AdapterFileError: there is neither.
        RunError: the run has no such checkpoint.
    """
    if Path(text).exists():
        return Path(text)
    name, at, step = text.rpartition("@")
    name, step = (name, step) if at else (text, "best")
    try:
        run = find_run(name, place)
    except RunError as error:
        file = len(Path(text).parts) != 1 or Path(text).suffix
        raise AdapterFileError(f"The adapter {text} does not exist{'.' if file else f': {error}'}") from error
    return run.checkpoint(run.step_of(step)) / "adapter.safetensors"


def weighted_lora(text: str, place: Path | None = None) -> WeightedLora:
    """The adapter of FILE[:STRENGTH[:TEXT_STRENGTH]]; what follows the last colons counts only if it is a
    number. FILE may be a run in the workspace `place`, as in `adapter_file`.

    Raises:
        AdapterFileError: no such file, or a strength that is not finite.
        RunError: the run has no such checkpoint.
    """
    numbers: list[float] = []
    rest = text
    while len(numbers) < 2 and ":" in rest and not Path(rest).exists():
        head, _, tail = rest.rpartition(":")
        try:
            numbers.insert(0, float(tail))
        except ValueError:
            break
        rest = head
    path = adapter_file(rest, place)
    if not all(map(math.isfinite, numbers)):
        raise AdapterFileError(f"The strength in {text} is not a finite number.")
    return WeightedLora(str(path), [*numbers, 1.0][0], numbers[1] if len(numbers) > 1 else None)


def note_extras(files: Iterable[File]) -> None:
    """Say on stderr what adapter files hold that is not used."""
    from lora_core.formats.detect import extras_sentence

    for file in dict.fromkeys(map(Path, files)):
        sentence = extras_sentence(read_header(file).shapes)
        if sentence:
            write(sys.stderr, f"Note: {file.name}: {sentence}\n")


def _app(verbs: Iterable[str]) -> typer.Typer:
    """The parser of some verbs."""
    how: dict[str, Any] = {
        "add_completion": False,
        "context_settings": {"help_option_names": ["-h", "--help"]},
    }
    top = typer.Typer(name="lora-easel", help="Train and use Stable Diffusion LoRA adapters.", **how)
    top.callback()(lambda: None)
    groups: dict[str, typer.Typer] = {}
    for verb in verbs:
        first, _, second = verb.partition(" ")
        if second and first not in groups:
            groups[first] = typer.Typer(help=GROUPS[first], **how)
            top.add_typer(groups[first], name=first, rich_help_panel=PANELS[VERBS[verb].__module__])
        inside, name = (groups[first], second) if second else (top, first)
        help_line = (inspect.getdoc(VERBS[verb]) or "").splitlines()[0].partition(";")[0].rstrip(".") + "."
        inside.command(name, help=help_line, rich_help_panel=PANELS[VERBS[verb].__module__])(_command(verb))
    return top


def _command(verb: str) -> Callable[..., Call]:
    def command(**values: Any) -> Call:
        given = [name for name in EXACTLY_ONE.get(verb, ()) if values[name] not in (None, False)]
        if verb in EXACTLY_ONE and len(given) != 1:
            options = ", ".join(f"--{name}" for name in EXACTLY_ONE[verb])
            raise typer.BadParameter(f"give exactly one of {options}")
        return Call(verb, values)

    command.__signature__ = inspect.Signature([one.typed() for one in parameters(verb)])  # type: ignore[attr-defined]
    return command


def parse(words: Sequence[str]) -> Call:
    """The verb that a command line names, and its values.

    Raises:
        SystemExit: with 0 after help, with 2 after saying what is wrong with the words.
    """
    first = words[0] if words else ""
    known = [verb for verb in VERBS if verb.split()[0] == first]
    try:
        found = _app(known or VERBS)(list(words), prog_name="lora-easel", standalone_mode=False)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        usage = "usage:" + context.get_usage().partition(":")[2] if context else ""
        message = error.format_message()
        near = getattr(error, "possibilities", None)
        if near:
            message = f"{error.message}. Did you mean {' or '.join(sorted(near))}?"
        write(sys.stderr, f"{usage}\n{context.command_path if context else 'lora-easel'}: error: {message}\n")
        raise SystemExit(2) from error
    if not isinstance(found, Call):
        raise SystemExit(int(found or 0))
    return found


# Running


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    for word in words:
        if not is_unicode(word) and not os.path.lexists(word):
            write(sys.stderr, f"{in_short(word)} holds bytes that are not UTF-8; type it anew.\n")
            return 1
    replace_unprintable()
    call = parse(words)
    quiet_libraries()
    set_up_cuda()
    limit_spinning(processor_use(call.verb))
    try:
        return _run(call)
    except LoraError as error:
        write(sys.stderr, f"{error}\n")
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        name = error.filename or "A file"
        write(sys.stderr, f"{name} cannot be read or written: {error.strerror or error}.\n")
        return 1


def processor_use(verb: str) -> str:
    """How a verb shares the processor, see `limit_spinning`."""
    return GIVES_WAY if verb == "serve" else COMPUTES if verb in COMPUTING else SLEEPS


def _run(call: Call) -> int:
    arguments = call.arguments()
    if call.verb in PROGRAMS:
        return PROGRAMS[call.verb](call, **arguments)
    request = next((one for one in arguments.values() if isinstance(one, GenerationRequest | Measure)), None)
    if request is not None:
        loras = getattr(request, "loras", arguments.get("loras", ()))
        note_extras([*(lora.file for lora in loras), *([arguments["file"]] if "file" in arguments else [])])
    result = COMMANDS.get(call.verb, VERBS[call.verb])(**arguments)
    if call.json:
        file = isinstance(result, Path)
        say_json({"file": str(result), "bytes": result.stat().st_size} if file else result)
    else:
        show_result(call.verb, result, arguments)
    if isinstance(result, dict) and result.get("problem"):
        raise AdapterFileError(result["problem"])
    return 1 if isinstance(result, dict) and result.get("ok") is False else 0


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
    """Print a `?` for a letter that the terminal's encoding lacks, rather than fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


# Commands that do what two verbs do


def _merge(  # noqa: PLR0913 - one option each
    loras: Annotated[Sequence[str], LORA],
    out: Annotated[Path, "--out"],
    rank: int | None = None,
    blocks: Annotated[str, "--blocks TABLE"] = "",
    precision: Annotated[str, PRECISIONS] = "",
    base: str = "",
    into_base: Annotated[str, "--into-base B"] = "",
    note: Progress | None = None,
) -> list[str]:
    """Merge adapters.

    Args:
        into_base: merge into a copy of this base instead.
    """
    if not into_base:
        return api.merge(loras, out, rank, blocks, precision or "fp32", base, note)
    given = [name for name, value in (("rank", rank), ("base", base), ("precision", precision)) if value]
    if given:
        raise ConfigError(
            f"--{given[0]} goes with a merged adapter, not with --into-base: there the base's own precision"
            " stays and nothing is approximated."
        )
    return api.merge_into_base(loras, into_base, out, blocks)


def _shrink(
    file: AdapterFile,
    out: Annotated[Path, "--out"],
    rank: int | None = None,
    energy: Annotated[float | None, "--energy SHARE"] = None,
    intrinsic: bool = False,
    precision: Annotated[str, PRECISIONS] = "",
    measure: Measure = Measure("", base=""),  # noqa: B008 - frozen
) -> dict[str, Any]:
    """Shrink an adapter.

    Args:
        intrinsic: the lowest rank that keeps 99% of the gain, measured on --dataset.
    """
    if not intrinsic:
        return api.shrink(file, out, rank, energy, precision, measure.base, slow_notes())
    if not measure.dataset:
        raise ConfigError(
            "--intrinsic measures the gain: give --dataset, pictures that it was not trained on."
        )
    measured = dataclasses.replace(measure, base=measure.base or "demo")
    return api.shrink_intrinsic(file, out, measured, precision)


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
        dataset: a folder of pictures, a zip of one, or `demo`.
        name: the run's name; else date and dataset.
        base: `demo`, a diffusers folder, a .safetensors file, or a hub id.
        config: a TOML file of settings.
        preset: quick, balanced, high, or goal-level such as style-high.
        set: one setting.
        like: a LoRA file whose settings are taken.
    """

    dataset: str
    name: str = ""
    base: str = ""
    config: Path | None = None
    preset: str = ""
    set: Sequence[str] = ()
    like: Path | None = None

    def run_config(self) -> RunConfig:
        """The settings: preset, what the base's family needs, then --like, --config, --base and --set.

        Raises:
            ConfigError: something is not a setting or not legal.
        """
        asked: dict[str, Any] = flattened(load_toml(self.config)) if self.config else {}
        if self.base:
            asked["model.base"] = self.base
        asked |= dict(parsed_assignment(text) for text in self.set)
        return api.run_config(self.dataset, self.name, asked, self.preset, self.like)

    def say_like(self) -> None:
        """Print what was taken from the file of --like, and what was not."""
        if self.like:
            like = api.like_file(self.like)
            say(f"Like {self.like.name}: {len(like.values)} settings from {like.source}.")
            if like.base:
                say(f"Note: It was trained on {like.base}; choose the base by --base.")
            for sentence in like.left:
                say(f"Note: {sentence}")


def _forecast(call: Call, training: Training, measure: bool = False, workspace: Path | None = None) -> int:
    found = api.forecast(training.run_config(), workspace, measure)
    if call.json:
        say_json(found)
    else:
        training.say_like()
        show_result("forecast", found, {})
    return 0


def _train(call: Call, training: Training, queue: bool = False, workspace: Path | None = None) -> int:
    from lora_core.runs.preflight import RunProblem, require_none_blocking

    def lead(stopping: StopRequest, group: "ProcessGroup | None") -> int:
        with stopping.raising():
            config = training.run_config()
            place = workspace_folder(workspace)
            expected = api.forecast(config, place)
            require_none_blocking([RunProblem(**problem) for problem in expected["problems"]])
        training.say_like()
        run = RunFolder.create(runs_folder(place) / config.name, config)
        say(f"Run {run.name} in {run.path}")
        with contextlib.suppress(ModelFileError):  # the run says it
            model = config.model
            say(f"Base: {read_base_facts(model.base, model.prediction, model.zero_terminal_snr).sentence}")
        for line in forecast_lines(expected):
            say(line)
        for problem in expected["problems"]:
            say(f"Note: {problem['sentence']}")
        if queue:
            api.queue_add(run.path)
            say(f"{run.name} waits in the queue of {place}")
            return 0
        return _resume_run(run, None, False, stopping, group)

    return _together(lead)


def _resume(
    call: Call,
    run: str,
    steps: int | None = None,
    accept_changes: bool = False,
    workspace: Path | None = None,
) -> int:
    def lead(stopping: StopRequest, group: "ProcessGroup | None") -> int:
        return _resume_run(find_run(run, workspace), steps, accept_changes, stopping, group)

    return _together(lead)


LAUNCHED = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers say how many processes there are; accelerate reads the same."""
ONE_ONLY = (
    "accelerate was asked for several processes and started one, as it does with --cpu where it is given no"
    " --mpirun_hostfile; set ACCELERATE_USE_CPU=true and give --multi_gpu instead of --cpu."
)


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


def _resume_run(
    run: RunFolder,
    steps: int | None,
    accept_changes: bool,
    stopping: StopRequest,
    group: "ProcessGroup | None",
) -> int:
    """Train a run to its end, and notify the user when it ends; returns the exit code."""
    before = file_bytes(run.events_file)
    try:
        outcome = _train_run(run, steps, accept_changes, stopping, group)
    finally:
        note = notify_end(run, run.path.parent.parent) if file_bytes(run.events_file) > before else ""
        if note:
            say(f"Note: {note}")
    if outcome.export is not None:
        say(outcome.export)
    return INTERRUPTED if outcome.signalled else 0


def _train_run(
    run: RunFolder,
    steps: int | None,
    accept_changes: bool,
    stopping: StopRequest,
    group: "ProcessGroup | None",
) -> "Outcome":
    """Train, with signals taken as a stop from here on, long before torch is imported."""
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
            # The trainer, which writes this down itself, was not there yet.
            progress, writer = run.progress(), EventWriter(run.events_file)
            writer.write(Stopped(step=progress.step, export=progress.export))
            writer.close()
            raise
        if group is not None:
            size = run.config().train.batch_size
            say(f"{group.count} processes share each batch of {size}.")
            if size < group.count:
                say(f"Note: {group.count - size} of them have nothing to do; train.batch_size is {size}.")
        printer = EventPrinter(sys.stdout)
        with keep_awake():
            outcome = train(run, steps, printer.show, accept_changes, stopping, group)
        printer.close()
    return outcome


def _queue_run(call: Call, workspace: Path | None = None) -> int:
    place = workspace_folder(workspace)
    ended, interrupted = run_queue(place, (lambda line: None) if call.json else say)
    if call.json:
        say_json(Queue(place).rows())
    if interrupted:
        return INTERRUPTED
    failed = [job.run for job in ended if job.state == FAILED]
    if failed:
        raise RunError(
            f"{len(failed)} of {len(ended)} jobs failed: {', '.join(failed)}; `lora-easel queue list` says"
            " why."
        )
    return 0


def _serve(call: Call) -> int:
    with without_collecting():
        api.serve()
    return 0


PROGRAMS: dict[str, Callable[..., int]] = {
    "train": _train, "forecast": _forecast, "resume": _resume, "queue run": _queue_run, "serve": _serve,
}  # fmt: skip
"""Commands that print while they work."""
COMMANDS: dict[str, Callable[..., Any]] = {
    **PROGRAMS, "merge": _merge, "shrink": _shrink, "take-back": _take_back,
}  # fmt: skip
"""Functions that the command line has in place of a verb's own."""


def run() -> None:
    """Entry point of the `lora-easel` command."""
    sys.exit(main())
