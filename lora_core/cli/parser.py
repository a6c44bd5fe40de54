"""From a verb's signature to a typer command, and from the words of a command line to the verb's arguments.

A dataclass among the parameters becomes one option per field. Adapters may be given as FILE:STRENGTH or as
RUN@STEP, and callbacks for progress print on stderr.
"""

import collections.abc
import dataclasses
import inspect
import math
import re
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lora_core.api import VERBS
from lora_core.cli.terminal import say, slow_notes, write
from lora_core.errors import AdapterFileError, RunError
from lora_core.generate.grid import KINDS, Axis, parse_axis
from lora_core.generate.request import WeightedLora
from lora_core.runs.folder import find_run, is_run_folder
from lora_core.settings.config import parse_cfg_rescale
from lora_core.settings.schema import PREDICTIONS, ZERO_TERMINAL_SNR
from lora_core.verbs import CHECKPOINT, GROUPS

NEEDED = inspect.Parameter.empty
LORA = "FILE[:STRENGTH[:TEXT_STRENGTH]]"
COMMANDS: dict[str, Callable[..., Any]] = {}
"""Functions that the command line has in place of a verb's own."""
SPELLINGS = {"loras": f"--lora {LORA}", "cfg_rescale": "--cfg-rescale PHI", "image": "--image FILE",
             "mask": "--mask FILE", "denoising_strength": "--strength SHARE", "rows": "--rows KIND=V,V,...",
             "columns": "--columns KIND=V,V,..."}  # fmt: skip
"""Of fields and parameters whose annotations do not say it."""
CHOICES = {"prediction": tuple(PREDICTIONS), "zero_terminal_snr": tuple(ZERO_TERMINAL_SNR)}
NO_OPTIONS = ("clip_skip", "tokens")
"""Fields of a generation request that no option sets."""
MUST_BE_GIVEN = {("generate", "prompt")}
EXACTLY_ONE = {"extract": ("rank", "energy"), "shrink": ("rank", "energy", "intrinsic")}
PANELS = {
    "lora_core.verbs.runs": "Runs",
    "lora_core.verbs.datasets": "Datasets, projects and the workspace",
    "lora_core.verbs.adapters": "Images and adapter files",
    "lora_core.api": "Program",
}
"""Headings of the list of verbs, by the module of their functions."""
_AXIS = f"what they vary, {', '.join(KINDS)}; a value with a comma needs double quotes"
HELP: dict[str, str] = {
    **tomllib.loads(Path(__file__).with_name("options.toml").read_text(encoding="utf-8")),
    "rows": _AXIS,
    "columns": _AXIS,
}
"""Help of parameters that many verbs have; but for `_OWN_HELP`, the docstring of a verb comes first."""
_OWN_HELP = ("workspace", "run", "rows", "columns", "cfg_rescale", "sampler")


def command(verb: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Have a function do a verb on the command line, in place of the verb's own."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        COMMANDS[verb] = function
        return function

    return register


def function_of(verb: str) -> Callable[..., Any]:
    """The function that does a verb on the command line."""
    return COMMANDS.get(verb, VERBS[verb])


@dataclass(frozen=True)
class Parameter:
    """One option or argument.

    Attributes:
        name: of its value in Python.
        kinds: the types that it may have, but None.
        default: its value if it is not given, `NEEDED` if it must be.
        help: one line.
        option: its flag, such as "--rank"; "" for an argument.
        metavar: placeholder of its value.
        choices: its legal values, where they are few.
        checkpoint: whether it may also name a run's checkpoint.
        owner: the parameter of the function whose field it is, "" for a parameter itself.
    """

    name: str
    kinds: tuple[Any, ...]
    default: Any
    help: str
    option: str
    metavar: str = ""
    choices: tuple[str, ...] = ()
    checkpoint: bool = False
    owner: str = ""

    @property
    def many(self) -> bool:
        """Whether it may be given several times."""
        return typing.get_origin(self.kinds[0]) in (collections.abc.Sequence, tuple, list)

    def typed(self) -> inspect.Parameter:
        """For typer: a flag is False unless given, any other option None."""
        kind, default = self._kind(), self.default
        if kind is bool:
            default = False
        elif self.many:
            default = NEEDED if default is NEEDED else []
        elif default is not NEEDED:
            kind, default = typing.Optional[kind], None  # noqa: UP045 - also of a Literal
        made = typer.Option if self.option else typer.Argument
        names = [self.option] if self.option else []
        info = made(*names, help=self.help, metavar=self.metavar or None, show_default=False)
        how = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(self.name, how, default=default, annotation=Annotated[kind, info])

    def _kind(self) -> Any:
        if self.many:
            return list[str]
        if self.choices:
            return Literal[self.choices]
        if Path in self.kinds:
            return Path
        return self.kinds[0] if self.kinds in ((bool,), (int,), (float,)) else str

    def value(self, given: Any, workspace: Path | None) -> Any:
        """The value that a function takes, of what typer gives; runs are looked for in `workspace`.

        Raises:
            LoraError: it is not legal, or a file or run that it names does not exist.
        """
        if self.kinds == (bool,):
            return given != (self.default is True)
        if self.many:
            return tuple(weighted_lora(text, workspace) for text in given) if self.name == "loras" else given
        if given is None:
            return self.default
        if self.name == "cfg_rescale":
            return parse_cfg_rescale(given)
        if Axis in self.kinds:
            axis = parse_axis(given)
            if axis.kind == "checkpoint":
                axis = Axis(axis.kind, tuple(str(adapter_file(v, workspace)) for v in axis.values))
            return axis
        # What looks like a file is the verb's to miss.
        if self.checkpoint and not given.exists() and ("@" in given.name or not given.suffix):
            return adapter_file(given, workspace)
        return given


def parameters(verb: str) -> list[Parameter]:
    """The options and arguments of a verb."""
    found = list(_parameters(verb))
    if not any(one.name == "workspace" for one in found) and any(
        one.checkpoint or one.many or Axis in one.kinds for one in found
    ):
        found.append(Parameter("workspace", (Path,), None, HELP["workspace"], "--workspace"))
    if "dict" in str(inspect.signature(VERBS[verb]).return_annotation) or verb in ("report", "queue run"):
        found.append(Parameter("json", (bool,), False, "one JSON document and nothing else", "--json"))
    return found


def _parameters(verb: str) -> Iterator[Parameter]:
    function = function_of(verb)
    helps = {**argument_help(VERBS[verb]), **argument_help(function)}
    for one in inspect.signature(function).parameters.values():
        kind = _kinds(one.annotation)[0]
        if not dataclasses.is_dataclass(kind) or kind is Axis:
            yield from _parameter(verb, one.name, one.annotation, one.default, helps)
            continue
        for field in dataclasses.fields(kind):
            default = NEEDED if field.default is dataclasses.MISSING else field.default
            if one.default is None:
                default = "" if default is NEEDED else default
            elif one.default is not NEEDED:
                default = getattr(one.default, field.name)
            if field.name not in NO_OPTIONS:
                yield from _parameter(verb, field.name, field.type, default, argument_help(kind), one.name)


def _parameter(
    verb: str, name: str, annotation: Any, default: Any, helps: Mapping[str, str], owner: str = ""
) -> Iterator[Parameter]:
    """One parameter; none for what no option sets."""
    kinds, extras = _kinds(annotation), list[Any]()
    if typing.get_origin(annotation) is Annotated:
        extras = list(typing.get_args(annotation)[1:])
    if isinstance(kinds[0], str) or typing.get_origin(kinds[0]) is collections.abc.Callable:
        return  # a callback
    if name == "as_json":
        return
    spelled = [one for one in extras if isinstance(one, str)]
    is_option = bool(owner) or default is not NEEDED
    usual = SPELLINGS.get(name, f"--{name.replace('_', '-')}") if is_option else name.upper()
    option, _, metavar = (spelled[-1] if spelled else usual).partition(" ")
    if not option.startswith("--"):
        option, metavar = "", option
    choices = [tuple(one) for one in extras if isinstance(one, tuple | Mapping)]
    yield Parameter(
        name, kinds, NEEDED if (verb, name) in MUST_BE_GIVEN else default,
        HELP[name] if name in _OWN_HELP else helps.get(name, HELP.get(name, "")),
        option, metavar, choices[-1] if choices else CHOICES.get(name, ()), CHECKPOINT in extras, owner,
    )  # fmt: skip


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation allows, but None."""
    if typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return tuple(
        one for one in (typing.get_args(annotation) if union else (annotation,)) if one is not types.NoneType
    )


def argument_help(documented: Any) -> dict[str, str]:
    """The help of each parameter, from `Args:` or `Attributes:` of a docstring."""
    text = inspect.getdoc(documented) or ""
    section = re.search(r"^(?:Args|Attributes):\n(.*?)(?=\n\S|\Z)", text, re.S | re.M)
    rows = re.findall(r"^ {4}(\w+): (.*(?:\n {6,}.*)*)", section[1] if section else "", re.M)
    return {name: " ".join(words.split()).rstrip(".") for name, words in rows}


@dataclass
class Call:
    """A verb, and the values of its options as typer gives them."""

    verb: str
    values: dict[str, Any]

    @property
    def json(self) -> bool:
        """Whether the result is printed as JSON."""
        return bool(self.values.get("json"))

    def arguments(self) -> dict[str, Any]:
        """The arguments of the function that does the verb.

        Raises:
            LoraError: a value is not legal, or a file or run that it names does not exist.
        """
        place = self.values.get("workspace")
        values = [
            (one.owner, one.name, one.value(self.values[one.name], place)) for one in parameters(self.verb)
        ]
        found: dict[str, Any] = {}
        for name, parameter in inspect.signature(function_of(self.verb)).parameters.items():
            fields = {field: value for owner, field, value in values if owner == name}
            own = [value for owner, field, value in values if not owner and field == name]
            if fields:
                kind = _kinds(parameter.annotation)[0]
                if "on_phase" in inspect.signature(kind).parameters:
                    fields["on_phase"] = slow_notes()
                found[name] = None if parameter.default is None and not fields["dataset"] else kind(**fields)
            elif own:
                found[name] = own[0]
            elif name in ("note", "on_phase", "on_image"):
                found[name] = say if name == "on_image" else slow_notes()
            elif name == "as_json":
                found[name] = self.json
        return found


def parse(words: Sequence[str]) -> Call:
    """The verb that a command line names, and its values.

    Raises:
        SystemExit: with 0 after help, with 2 after a usage error.
    """
    known = [verb for verb in VERBS if words and verb.split()[0] == words[0]]
    try:
        found = _app(known or VERBS)(list(words), prog_name="lora-easel", standalone_mode=False)
    except typer.TyperException as error:
        context, near = getattr(error, "ctx", None), getattr(error, "possibilities", None)
        message = error.format_message()
        if near:
            message = f"{error.message}. Did you mean {' or '.join(sorted(near))}?"
        usage = context.get_usage().replace("Usage:", "usage:") + "\n" if context else ""
        where = context.command_path if context else "lora-easel"
        write(sys.stderr, f"{usage}{where}: error: {' '.join(message.split())}\n")
        raise SystemExit(2) from error
    except SystemExit as ended:
        # The help's reader is gone, as in `--help | head`.
        raise SystemExit(0 if isinstance(ended.__context__, BrokenPipeError) else ended.code) from None
    if not isinstance(found, Call):
        raise SystemExit(int(found or 0))
    return found


def _app(verbs: Iterable[str]) -> typer.Typer:
    """The parser of some verbs."""
    how: dict[str, Any] = {"add_completion": False}
    how["context_settings"] = {"help_option_names": ["-h", "--help"]}
    top = typer.Typer(name="lora-easel", help="Train and use Stable Diffusion LoRA adapters.", **how)
    top.callback()(lambda: None)
    groups: dict[str, typer.Typer] = {}
    for verb in verbs:
        first, _, second = verb.partition(" ")
        panel = PANELS[VERBS[verb].__module__]
        if second and first not in groups:
            groups[first] = typer.Typer(help=GROUPS[first], **how)
            top.add_typer(groups[first], name=first, rich_help_panel=panel)
        inside, name = (groups[first], second) if second else (top, first)
        about = (inspect.getdoc(VERBS[verb]) or "").splitlines()[0].partition(";")[0].rstrip(".")
        inside.command(name, help=f"{about}.", rich_help_panel=panel)(_callback(verb))
    return top


def _callback(verb: str) -> Callable[..., Call]:
    def callback(**values: Any) -> Call:
        alone = EXACTLY_ONE.get(verb, ())
        # 0 is a value too, which its verb refuses.
        if alone and sum(values[name] is not None and values[name] is not False for name in alone) != 1:
            raise typer.BadParameter(f"give exactly one of {', '.join(f'--{name}' for name in alone)}")
        from_settings = values.get("set") or values.get("config") or values.get("like")
        if verb in ("train", "forecast") and not values["dataset"] and not from_settings:
            raise typer.BadParameter("give DATASET, or the two prompts of a slider by --set")
        return Call(verb, values)

    signature = inspect.Signature([one.typed() for one in parameters(verb)])
    callback.__signature__ = signature  # type: ignore[attr-defined]
    return callback


def adapter_file(text: object, workspace: Path | None) -> Path:
    """An adapter file, or that of a run's checkpoint: RUN (the best one) or RUN@STEP; a file comes first.

    Raises:
        AdapterFileError: there is neither.
        RunError: the run has no such checkpoint.
    """
    path = Path(str(text))
    is_run = is_run_folder(path)
    if path.exists() and not is_run:
        return path
    name, at, step = str(text).rpartition("@")
    name, step = (name, step) if at and not is_run else (str(text), "best")
    try:
        run = find_run(name, workspace)
    except RunError as error:
        file = len(path.parts) != 1 or path.suffix
        raise AdapterFileError(f"The adapter {text} does not exist{'.' if file else f': {error}'}") from error
    return run.checkpoint(run.step_of(step)) / "adapter.safetensors"


def weighted_lora(text: str, workspace: Path | None = None) -> WeightedLora:
    """The adapter of FILE[:STRENGTH[:TEXT_STRENGTH]]; what follows the last colons counts only if it is a
    number. FILE may be a run, as in `adapter_file`.

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
    path = adapter_file(rest, workspace)
    if not all(map(math.isfinite, numbers)):
        raise AdapterFileError(f"The strength in {text} is not a finite number.")
    return WeightedLora(str(path), [*numbers, 1.0][0], numbers[1] if len(numbers) > 1 else None)
