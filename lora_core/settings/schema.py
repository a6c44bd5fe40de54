"""The settings of a run: one pydantic model for each section, every setting declared once; and the tables of
named choices (`assets/choices.toml`).

A field holds all there is to know about its setting: default, type, range, choices, label (`title`) and, in
the docstring below it, help. The window, the command line, the reading of TOML and the report take them from
here. Types are strict: `"8"` and `true` are not numbers. pydantic costs 0.08 s of start-up time.

A row of a table names its code as "module:attribute", imported only when it is used, so that a window without
torch can list them all. The price: editors cannot follow the reference, so `tests/settings/test_choices.py`
resolves every row.
"""

import ast
import difflib
import functools
import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    GetCoreSchemaHandler,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from lora_core.errors import ConfigError
from lora_core.system.files import clean_text, read_table

AUTO: Literal["auto"] = "auto"
NumberOrAuto = float | Literal["auto"]
"""A number, or `auto` where the base decides it."""
AUTO_RANK = 16
"""The least that `adapter.rank = auto` trains at: a style needs 2 or 3, 32 gains 2% more (docs/rank.md)."""
SLIDER_STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0)
"""A concept slider's range in the preview, and the number of its sample images."""
SAMPLE_PROMPTS = 2
"""Number of prompts of samples where the user gave none."""
PRIOR_IMAGES = 16
"""Number of the base's own images used for prior preservation."""
SLIDER_IMAGES = 4
"""Images at least that a slider is measured along."""
SLIDER_STEPS = 5
"""Sampler steps to the noisy latents of a slider's micro-batch: fewer than the 50 of Concept Sliders, as each
costs a prediction, or two."""
MIN_SNR = 5.0
"""gamma of min-SNR where it is on by default: the value that Hang et al. 2023 recommend."""
_DEVICE = re.compile(r"auto|cpu|mps|(cuda|xpu)(:\d{1,3})?")
LONGEST_PATTERN = 200
"""Characters of a pattern."""
MOST_PATTERNS = 100
"""Patterns of one table."""
_TO_RE2 = re.compile(r"\\Z|\{,(?=\d*\})|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.S)
"""Syntax that differs between RE2 and `re`, and the escapes and character classes to skip."""
CLASS_NAME = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
"""A class of an installed package, "module:Class"."""
NOT_NEGATIVE = ("betas", "eps", "momentum", "weight_decay")
"""Arguments that each optimizer refuses below 0, the betas from 1 on too."""
T = TypeVar("T")


@dataclass(frozen=True)
class Choice:
    """One row: what the user reads, and one sentence on when to take it."""

    title: str
    help: str


@dataclass(frozen=True)
class Implementation(Choice):
    """A row that names its implementation.

    Attributes:
        load: "module:attribute" of the code.
        defaults: keyword arguments that it is called with.
        package: the optional package that it needs, as the package index names it, or "".
    """

    load: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    package: str = ""

    def resolve(self) -> Any:
        """Import what `load` names.

        Raises:
            ConfigError: the optional package is not installed.
        """
        self.require()
        return _attribute(self.load)

    def require(self) -> None:
        """Check that the package is installed, without importing it.

        Raises:
            ConfigError: it is not.
        """
        if self.package:
            module = self.load.partition(":")[0].partition(".")[0]
            own = module == __name__.partition(".")[0]
            require_package(self.title, self.package if own else module, self.package)


@dataclass(frozen=True)
class Quantization(Implementation):
    """A way to keep weights in fewer bits; `width` is bytes a weight."""

    width: float = 1


@dataclass(frozen=True)
class OptimizerChoice(Implementation):
    """An optimizer.

    Attributes:
        lr: its learning rate where AdamW's is 1e-4; for one that finds its own rate, the setting itself.
        one_rate: it works with one learning rate for everything that it trains, and finds that itself.
        averages: it trains one point and is used at another, the mean of a sequence (schedule-free).
        state: values that it keeps for each parameter.
        by_matrix: it looks at rows and columns, so that each factor has to be a tensor of its own.
        fused: one of torch whose step is one kernel on a card (`fused=True`).
        rates: learning rate x alpha / rank outside of which a run hardly learns, or burns; for an optimizer
            that finds its own rate, the setting alone. Wide: ten times what guides and peers use, either way.
    """

    lr: float = 1e-4
    one_rate: bool = False
    averages: bool = False
    state: float = 2.0
    by_matrix: bool = False
    fused: bool = False
    rates: Sequence[float] = (0.0, math.inf)


@dataclass(frozen=True, kw_only=True)
class AdapterKind(Implementation):
    """A kind of adapter.

    Attributes:
        count: "module:attribute" of the function from a rank and the shape of a weight to parameters.
        continues: the kinds of files that it can start from.
        unused: settings that mean nothing to it.
        least_rank: the lowest that it can learn with.
        keeps_update, keeps_input: whether a step keeps an update as large as the weight, or an input of the
            layer's own, for the backward pass.
        network_args: LyCORIS' `ss_network_args` of its files, empty for a plain LoRA.
    """

    count: str
    continues: Sequence[str]
    unused: Sequence[str] = ()
    least_rank: int = 1
    keeps_update: bool = False
    keeps_input: bool = False
    network_args: Mapping[str, str] = field(default_factory=dict)

    def count_parameters(self, rank: int, shape: Sequence[int]) -> int:
        """The trained parameters of a layer whose weight has this shape."""
        return int(_attribute(self.count)(rank, shape))


@dataclass(frozen=True)
class LayerSet(Choice):
    """A set of layers to adapt.

    Attributes:
        unet, text: full-match patterns for paths as diffusers names them; "" for none.
        blocks: the field of a family that narrows the UNet's further, or "".
    """

    unet: str
    text: str
    blocks: str = ""


def _attribute(reference: str) -> Any:
    """The object that "module:attribute" names."""
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)


def require_package(feature: str, module: str, package: str) -> None:
    """Check that an optional package is installed, without importing it.

    Args:
        feature: what needs it, for the message.
        module: its import name.
        package: its name on the package index.

    Raises:
        ConfigError: it is not installed; the message has the command that installs it into this environment.
    """
    if _find_module(module) is None:
        python = f'"{sys.executable}"' if " " in sys.executable else sys.executable
        raise ConfigError(
            f"{feature} needs the package {package}, which is not installed. Install it with"
            f" `{python} -m pip install {package}`."
        )


def _find_module(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except ValueError:  # one without a file, such as `__main__`
        return None


def constructor_defaults(load: str, depth: int = 8) -> dict[str, Any] | None:
    """The arguments of a class's constructor with their defaults, `...` where one has none or computes it.

    Read from the source, since the window and the checks before a start import no torch.

    Args:
        load: "module:class"; the class may be imported there from another module.
        depth: how many modules further it is looked for.

    Returns:
        None if the source does not show it.
    """
    module, _, name = load.partition(":")
    path, tree = _read_source(module) if depth else (Path(), None)
    if tree is None:
        return None
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            makers = (one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__")
            maker = next(makers, None)
            # A constructor that only passes its arguments on has its base's.
            if maker is not None and (maker.args.args[1:] or maker.args.kwonlyargs or not maker.args.kwarg):
                return _argument_defaults(maker.args)
            base = ast.unparse(node.bases[0]) if node.bases else ""
            return constructor_defaults(f"{module}:{base}", depth - 1)
        if isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(filter(None, (above, node.module)))
            for one in node.names:
                known = one.name == "*" or name == (one.asname or one.name)
                wanted = name if one.name == "*" else one.name
                if known and (found := constructor_defaults(f"{source}:{wanted}", depth - 1)) is not None:
                    return found
    return None


def _read_source(module: str) -> tuple[Path, ast.Module | None]:
    """The file of a module, and what is in it; None if that is not Python that can be read."""
    top, *inner = module.split(".")
    spec = _find_module(top)
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return Path(), None
    place = Path(spec.origin).parent.joinpath(*inner) if inner else Path(spec.origin)
    path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    try:
        return path, ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return path, None


def _unknown_class(load: str) -> str:
    """What is wrong with a "module:class" whose module, by its source, has no such name; "" where it may."""
    module, _, name = load.partition(":")
    nodes = list(ast.walk(_read_source(module)[1] or ast.Module([], [])))
    names = {getattr(one, "asname", None) or getattr(one, "name", None) for one in nodes}
    names |= {one.id for one in nodes if isinstance(one, ast.Name)}
    known = {one for one in names if isinstance(one, str)}
    if not nodes[1:] or known & {name, "*", "__getattr__"}:
        return ""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {module}:{close[0]}?" if close else "."
    return f"optimizer.name = {load} cannot be used: {module} has no {name}{hint}"


def _argument_defaults(arguments: ast.arguments) -> dict[str, Any]:
    """Without the first, `self`."""
    names = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    missing = [None] * (len(names) - len(arguments.defaults) - len(arguments.kw_defaults))
    defaults = [*missing, *arguments.defaults, *arguments.kw_defaults]
    found: dict[str, Any] = {}
    for argument, default in list(zip(names, defaults, strict=True))[1:]:
        try:
            found[argument.arg] = ... if default is None else ast.literal_eval(default)
        except ValueError:
            found[argument.arg] = ...
    return found


PARTS = ("unet", "text")
Row = TypeVar("Row", bound=Choice)
Table = Mapping[str, Choice]


def rows() -> dict[str, Any]:
    """The tables of `assets/choices.toml`."""
    return read_table("choices.toml")


def _table(name: str, kind: type[Row]) -> dict[str, Row]:
    return {key: kind(**row) for key, row in rows()[name].items()}


ADAPTER_KINDS = _table("adapter_kinds", AdapterKind)
OPTIMIZERS = _table("optimizers", OptimizerChoice)
SCHEDULES = _table("schedules", Implementation)
LOSSES = _table("losses", Implementation)
HUBER_SCHEDULES = _table("huber_schedules", Implementation)
FORMATS = _table("formats", Implementation)
SAMPLERS = _table("samplers", Implementation)
PREDICTIONS = _table("predictions", Choice)
TIMESTEPS = _table("timesteps", Implementation)
ZERO_TERMINAL_SNR = _table("zero_terminal_snr", Choice)
PRECISIONS = _table("precisions", Choice)
MASKS = _table("masks", Choice)
BACKGROUNDS = _table("backgrounds", Choice)
"""Colours, as Pillow names them."""

TARGETS = {
    key: LayerSet(**row | {part: "|".join(rows()["patterns"][one] for one in row[part]) for part in PARTS})
    for key, row in rows()["targets"].items()
}
QUANTIZED = {
    key: (Quantization if "load" in row else Choice)(**row) for key, row in rows()["quantized"].items()
}


def optimizer_row(name: str) -> OptimizerChoice:
    """The row of an optimizer, or one for any class by its "module:Class", which gets each factor as a
    separate tensor.

    Raises:
        ConfigError: there is neither.
    """
    if not CLASS_NAME.fullmatch(name):
        return chosen(OPTIMIZERS, name, "optimizer.name")
    return OptimizerChoice(
        name, "", name, package=name.partition(":")[0].partition(".")[0], lr=1e-4, by_matrix=True
    )


def find_key(table: Table, name: str) -> str | None:
    """The key of the row `name`, found by key or by title, in any case."""
    wanted = name.strip().lower()
    return next((key for key, row in table.items() if wanted in (key, row.title.lower())), None)


def chosen(table: Mapping[str, Row], name: str, setting: str) -> Row:
    """The row `name`, found by key or by title, in any case.

    Raises:
        ConfigError: no such row; the message lists the rows.
    """
    key = find_key(table, name)
    if key is None:
        raise ConfigError(f"{setting} = {name!r} is not known; choose one of {', '.join(table)}.")
    return table[key]


class PatternError(ConfigError):
    """A pattern that cannot be used; the text is the reason, without a full stop."""


def compile_pattern(text: str) -> Any:
    """A pattern over layer names, whose `search` finds what `re.search` would, in linear time.

    Patterns also come from untrusted files: a LoRA's header, a config, a run folder. `re` backtracks, so that
    one such as `(\\w+)+!` would block the process for hours.

    Raises:
        PatternError: it cannot be used.
    """
    import re2

    if len(text) > LONGEST_PATTERN:
        raise PatternError(f"it is longer than {LONGEST_PATTERN} characters")
    options = re2.Options()
    options.log_errors, options.max_mem = False, 2**21
    spelled = {"\\Z": r"\z", "{,": "{0,"}
    try:
        return re2.compile(_TO_RE2.sub(lambda found: spelled.get(found[0], found[0]), text), options)
    except (re2.error, UnicodeError) as error:
        reason = error.args[0].decode(errors="replace") if isinstance(error, re2.error) else "not UTF-8"
        raise PatternError(
            f"{reason} (patterns are regular expressions without look-around and back-references)"
        ) from error


def last_matches(table: Mapping[str, T], names: Iterable[str]) -> dict[str, T]:
    """For each name that a pattern of the table is found in, the value of the last such pattern.

    Raises:
        PatternError: a pattern cannot be used.
    """
    return _last_matches(tuple(table.items()), tuple(names)) if table else {}


@functools.lru_cache(maxsize=16)
def _last_matches(table: tuple[tuple[str, T], ...], names: tuple[str, ...]) -> dict[str, T]:
    found: dict[str, T] = {}
    for text, value in table:
        pattern = compile_pattern(text)
        found |= {name: value for name in names if pattern.search(name)}
    return found


class Section(BaseModel, frozen=True, extra="forbid", strict=True, allow_inf_nan=False):
    """The settings under one heading of a config."""

    @field_validator("*", mode="before")
    @classmethod
    def _from_toml_or_json(cls, value: Any) -> Any:
        """Take 8.0 for 8, and refuse text that cannot be written as UTF-8."""
        texts = value if isinstance(value, list) else [value]
        if any(isinstance(text, str) and text != clean_text(text) for text in texts):
            raise ValueError("holds bytes that are not UTF-8; rename it")
        if isinstance(value, dict):
            return {key: _integer(one) for key, one in value.items()}
        return _integer(value)


def _integer(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _lower(value: Any) -> Any:
    return value.strip().lower() if isinstance(value, str) else value


Auto = Annotated[Literal["auto"], BeforeValidator(_lower)]
"""The word `auto`, in any case."""


@dataclass(frozen=True)
class RowOf:
    """Marks a text as the key of a table; a row's title is accepted for its key, in any case, and a
    "module:Class" if `classes`."""

    table: Table
    classes: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Have pydantic look the text up."""
        return core_schema.no_info_after_validator_function(self._key, handler(source))

    def _key(self, name: str) -> str:
        key = find_key(self.table, name)
        if key is None and self.classes and CLASS_NAME.fullmatch(name.strip()):
            return name.strip()
        if key is None:
            more = ", or give a class as module:Class" if self.classes else ""
            raise ValueError(f"is not known; choose one of {', '.join(self.table)}{more}")
        return key


def _check_device(name: str) -> str:
    name = name.strip().lower()
    if not _DEVICE.fullmatch(name):
        raise ValueError("is not known; choose auto, cpu, cuda, cuda:0, cuda:1, ..., mps or xpu")
    return name


def _check_patterns(table: Any) -> Any:
    if not isinstance(table, dict):
        return table
    if len(table) > MOST_PATTERNS:
        raise PydanticCustomError(
            "patterns", f"has {len(table):,} patterns; at most {MOST_PATTERNS} can be used"
        )
    for pattern, value in table.items():
        try:
            compile_pattern(pattern)
        except PatternError as error:
            shown = pattern if len(pattern) <= LONGEST_PATTERN else f"{pattern[:LONGEST_PATTERN]}…"
            text = f"has the pattern {shown!r}, which cannot be used: {error}"
            raise PydanticCustomError("patterns", text) from error
        if isinstance(value, dict):
            text = f"has a pattern with a dot that begins with {pattern!r}; put it into quotes"
            raise PydanticCustomError("patterns", text)
    return table


Patterns = BeforeValidator(_check_patterns)


def _check_arguments(table: Any) -> Any:
    """Names with numbers, true or false, texts, or lists of these."""
    if not isinstance(table, dict):
        raise PydanticCustomError("patterns", "should be a table, such as {weight_decay = 0.1}")
    for name, value in table.items():
        parts = value if isinstance(value, list) else [value]
        wrong = ""
        if not re.fullmatch(r"[A-Za-z_]\w{0,63}", name, re.ASCII):
            wrong = "which is not the name of an argument"
        elif not all(isinstance(part, bool | int | float | str) for part in parts):
            wrong = "which should be a number, true or false, a text, or a list of numbers"
        elif any(part != clean_text(part) for part in parts if isinstance(part, str)):
            wrong = "which holds bytes that are not UTF-8"
        elif not all(math.isfinite(part) for part in parts if isinstance(part, float)):
            wrong = "which is not a number that can be used"
        if wrong:
            text = f"has {name[:64]!r}, {wrong}"
            raise PydanticCustomError("patterns", "{text}", {"text": text})
    return table


Arguments = BeforeValidator(_check_arguments)
MOST_TOKENS = 6
"""New tokens of a LoRA: Forge rejects a file with more than 12 unknown tensors, and a token has two with two
text encoders."""
_NEW_TOKEN = re.compile(r"\s*([\w-]{1,64})(?:\*([1-9]|[12]\d|3[0-2]))?\s*=\s*(\S(?:.*\S)?)\s*")


class NewToken(NamedTuple):
    """A line of `adapter.new_tokens`: the token, how many vectors it has (0: as many as the words have
    tokens), and the words whose vectors it starts from."""

    name: str
    vectors: int
    words: str

    @property
    def word(self) -> re.Pattern[str]:
        """Finds the token as a word of a caption."""
        return word_pattern(self.name)


def word_pattern(word: str) -> re.Pattern[str]:
    """Finds a word or several in a text, in any case."""
    return re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)


def parse_new_tokens(lines: Sequence[str]) -> list[NewToken]:
    """The lines of `adapter.new_tokens`, such as "zwx = cat" and "zwx*4 = grey cat".

    Raises:
        PydanticCustomError: one is invalid.
    """
    parts = [_NEW_TOKEN.fullmatch(line) for line in lines]
    found = [NewToken(part[1], int(part[2] or 0), part[3]) for part in parts if part]
    names, wrong = [token.name.lower() for token in found], ""
    if unread := next((line for line, part in zip(lines, parts, strict=True) if part is None), None):
        wrong = (
            f"has {unread[:80]!r}; write zwx = cat, or zwx*4 = cat for 4 vectors (at most 32), with letters,"
            " digits, _ and - in the token"
        )
    elif again := next((name for name in names if names.count(name) > 1), ""):
        wrong = f"has the token {again} twice"
    elif len(found) > MOST_TOKENS:
        wrong = f"has {len(found)} tokens; every tool takes a file with at most {MOST_TOKENS}"
    if wrong:
        raise PydanticCustomError("patterns", "{text}", {"text": wrong})
    return found


def _check_new_tokens(lines: list[str]) -> list[str]:
    parse_new_tokens(lines)
    return lines


Rank = Annotated[int, Field(ge=0, le=1024)]
MOST_RESOLUTIONS = 4
"""Resolutions of one dataset; each makes an epoch longer."""
Alpha = Annotated[float, Field(gt=0.0)]
MAX_TIMESTEP = 1000
"""Unit of timestep settings, independent of the base's own count."""
MAX_RATE = 10.0
RATES = ("lr", "text_encoder_lr", "text_encoder_2_lr")
"""Settings of the optimizer that are a part's learning rate."""
NOT_AVERAGED = ("save.ema", "adapter.max_norm")
"""Settings that do not go with an optimizer that averages the adapter."""
NOTHING_TRAINED = (
    "Nothing would be trained: the learning rates or the ranks of all chosen layers are 0; see optimizer.lr,"
    " optimizer.text_encoder_lr, optimizer.block_lr and adapter.block_ranks."
)
Rate = Annotated[float, Field(ge=0.0, le=MAX_RATE)]


class ModelSection(Section):
    """The frozen base model."""

    base: str = Field("demo", title="Base model")
    """`demo` for the bundled one, a diffusers folder, a .safetensors file, or a hub id."""
    vae: str = Field("", title="VAE")
    """A separate VAE, a folder or a file, in place of the base's own. Empty: the base's own."""
    prediction: Annotated[str, RowOf(PREDICTIONS)] = Field("auto", title="Prediction")
    """What the base predicts: noise (epsilon) or velocity (v). Change it only if images come out as noise."""
    zero_terminal_snr: Annotated[str, RowOf(ZERO_TERMINAL_SNR)] = Field("auto", title="Zero terminal SNR")
    """Whether the base's last timestep is pure noise, as in NoobAI's velocity version. Set it where the
    base's page says so and its file does not."""


class AdapterSection(Section):
    """The trained low-rank layers."""

    kind: Annotated[str, RowOf(ADAPTER_KINDS)] = Field("lora", title="Kind")
    """How a layer's update is computed from the trained parameters."""
    rank: int = Field(16, title="Rank (size)", ge=1, le=1024)
    """How many directions each layer may learn. A higher rank learns more detail and makes a larger file."""
    auto_rank: bool = Field(False, title="Auto rank")
    """Trains at rank 16, or at Rank where that is higher, and cuts each layer of the file to the rank that
    keeps 99% of the gain on held-out images. In a file or on the command line, `adapter.rank = auto` does the
    same."""
    alpha: float = Field(16.0, title="Alpha", gt=0.0)
    """The update is scaled by alpha / rank. Keep it equal to rank unless a recipe says otherwise."""
    rslora: bool = Field(False, title="rsLoRA scaling")
    """Scales by alpha / sqrt(rank) instead of alpha / rank, so that large ranks learn as strongly as small
    ones (rsLoRA)."""
    conv_rank: int = Field(0, title="Rank of convolutions", ge=0, le=1024)
    """Rank of the convolutions larger than 1 x 1, where `targets` has them. 0: as the others."""
    conv_alpha: float = Field(0.0, title="Alpha of convolutions", ge=0.0, le=1e6)
    """Alpha of the convolutions larger than 1 x 1. 0: as the others."""
    targets: Annotated[str, RowOf(TARGETS)] = Field("attention", title="Layers")
    """Which layers of the base are adapted."""
    init: str = Field("default", title="Continue from LoRA")
    """The file of a LoRA, of any rank, to continue training, or of another kind that `kind` names; `default`
    starts from scratch."""
    block_ranks: Annotated[dict[str, Rank], Patterns] = Field({}, title="Ranks by block")
    """Rank for the layers whose path matches a pattern, such as "mid_block" = 4 or "unet.*attn2" = 32; 0
    leaves them out. If several patterns match, the last one counts."""
    block_alphas: Annotated[dict[str, Alpha], Patterns] = Field({}, title="Alphas by block")
    """Alpha for the layers whose path matches a pattern; the others keep alpha."""
    dropout: float = Field(0.0, title="Dropout", ge=0.0, le=0.99)
    """Share of an adapted layer's inputs set to zero."""
    rank_dropout: float = Field(0.0, title="Rank dropout", ge=0.0, le=0.99)
    """Share of the rank's directions dropped at each step."""
    module_dropout: float = Field(0.0, title="Module dropout", ge=0.0, le=0.99)
    """Probability of dropping a layer's entire update at a step."""
    new_tokens: Annotated[list[str], AfterValidator(_check_new_tokens)] = Field([], title="New tokens")
    """Caption words whose embeddings are trained with the LoRA, one a line with the words to start from: "zwx
    = cat", or "zwx*4 = cat" for 4 vectors. Saved in the LoRA's file and in separate embedding files (pivotal
    tuning)."""
    max_norm: float = Field(0.0, title="Max. norm of weights", ge=0.0, le=1000.0)
    """Each layer's update is scaled down to this norm after a step, which keeps an adapter from burning and
    lets it mix better with others; 1 is usual. 0: off."""

    @model_validator(mode="before")
    @classmethod
    def _raise_to_ceiling(cls, values: Any) -> Any:
        """The rank and alpha that `auto_rank` trains at, at the scale of those given."""
        if not isinstance(values, dict) or values.get("auto_rank") is not True:
            return values
        rank, alpha = (values.get(key, 0) for key in ("rank", "alpha"))
        # Invalid numbers are refused later.
        if rank in range(1, AUTO_RANK) and rank is not True and type(alpha) in (int, float):
            more = AUTO_RANK / rank
            alpha *= math.sqrt(more) if values.get("rslora") is True else more
            return {**values, "rank": AUTO_RANK, "alpha": alpha}
        return values

    @property
    def scale(self) -> float:
        """What the update is multiplied by, except where a block has its own; 1 where alpha means nothing."""
        if "adapter.block_alphas" in ADAPTER_KINDS[self.kind].unused:
            return 1.0
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class DatasetSection(Section):
    """The images and their captions."""

    path: str = Field("demo", title="Dataset")
    """A folder of images with captions beside them, a zip of one, or `demo`."""
    trigger: str = Field("", title="Trigger word")
    """The word that triggers the LoRA's subject or style; prepended to each caption that lacks it."""
    flip: bool = Field(False, title="Flip")
    """Mirror each image half of the time. Not for faces or writing."""
    resolutions: list[Annotated[int, Field(ge=16, le=4096)]] = Field(
        [], title="Several resolutions", max_length=MOST_RESOLUTIONS
    )
    """In pixels, one a line, instead of Resolution: an epoch shows each image at every size that it is large
    enough for. The largest needs the most memory and time. Empty: Resolution alone."""
    random_crop: float = Field(0.0, title="Random crop", ge=0.0, le=0.9)
    """Largest share of an image's sides that is cut off, another part in each variant: 0.2 shows at least 80%
    of them. Nothing is enlarged, and a focus point stays in sight. 0: off."""
    color_aug: float = Field(0.0, title="Colour augmentation", ge=0.0, le=1.0)
    """Random change of brightness, contrast and saturation between variants, and slightly of hue: 0.1 is up
    to 10%. Leave it off if the LoRA should learn colours. 0: off."""
    variants: int = Field(8, title="Variants", ge=2, le=64)
    """Number of encoded versions of each image if crop or colours vary; each training sample uses one."""
    caption_dropout: float = Field(0.05, title="Caption dropout", ge=0.0, le=1.0)
    """Share of training samples shown without their caption; keeps guidance working."""
    tag_dropout: float = Field(0.0, title="Tag dropout", ge=0.0, le=1.0)
    """Share of comma-separated tags dropped at random in each training sample."""
    shuffle_tags: bool = Field(False, title="Shuffle tags")
    """Shuffle the comma-separated tags in each training sample."""
    keep_tags: int = Field(0, title="Keep tags", ge=0, le=100)
    """This many tags at the start are neither shuffled nor dropped."""
    masks: Annotated[str, RowOf(MASKS)] = Field("on", title="Masks")
    """Weights the loss by masks: white counts fully, black by the weight outside masks."""
    background: Annotated[str, RowOf(BACKGROUNDS)] = Field("white", title="Background")
    """Background colour behind transparent parts of images."""
    reg_weight: float = Field(1.0, title="Weight of regularisation images", ge=0.0, le=10.0)
    """Loss weight of class images in a `reg` folder; half of the steps train on them, without the trigger. 0:
    not used."""

    @property
    def varies(self) -> bool:
        """Whether an image is shown in several variants."""
        return bool(self.random_crop or self.color_aug)


class SliderSection(Section):
    """A concept slider: an adapter from opposite prompts alone, whose strength is the dial.

    Source: Gandikota et al. 2023, "Concept Sliders: LoRA Adaptors for Precise Control in Diffusion Models".
    """

    positive: str = Field("", title="More of")
    """Words for what strength 1 adds, such as "very old". With them and their opposite a slider is trained
    from prompts alone, without images."""
    negative: str = Field("", title="Less of")
    """The opposite words, such as "very young": what strength -1 adds."""
    target: list[str] = Field([], title="Acts on")
    """What the slider changes, such as "a man": prompts, one a line, to which the two above are appended.
    Empty: any image."""
    preserve: list[str] = Field([], title="Leaves alone")
    """Prompts whose images must not change, one a line."""
    guidance: float = Field(1.0, title="Slider guidance", gt=0.0, le=100.0)
    """How far strength 1 goes, in differences between the two prompts (eta of Gandikota et al. 2023)."""

    @property
    def on(self) -> bool:
        """Whether a slider is trained."""
        return bool(self.positive or self.negative)

    def prompts(self) -> list[tuple[str, str, str]]:
        """Each target, with the positive and with the negative words."""

        def behind(target: str, words: str) -> str:
            return f"{target}, {words}" if target else words

        targets = self.target or [""]
        return [(one, behind(one, self.positive), behind(one, self.negative)) for one in targets]

    def kept(self) -> list[tuple[str, str, str]]:
        """Each prompt that is left alone, as its own opposite: the change that it asks for is none."""
        return [(prompt, prompt, prompt) for prompt in self.preserve]

    def captions(self) -> list[str]:
        """All texts that training encodes, guidance's negative prompt included; none if it is off."""
        prompts = ["", *(prompt for three in (*self.prompts(), *self.kept()) for prompt in three)]
        return list(dict.fromkeys(prompts)) if self.on else []

    def passes(self) -> int:
        """Predictions without a gradient that a micro-batch takes beside its training step."""
        return 3 + SLIDER_STEPS * (1 + bool(self.target or self.preserve))


class TrainSection(Section):
    """How long, how large and in which dtype."""

    steps: int = Field(800, title="Steps", ge=1, le=1_000_000)
    """100 per image is a good start (800 to 3,000)."""
    epochs: int = Field(0, title="Epochs", ge=0, le=100_000)
    """Length in passes over all training images, in place of steps. 0: as many steps as set."""
    batch_size: int = Field(1, title="Batch size", ge=1, le=256)
    """Images that go through the model at once."""
    gradient_accumulation_steps: int = Field(1, title="Gradient accumulation", ge=1, le=1024)
    """Batches summed into one step: a larger batch without more memory."""
    resolution: int = Field(0, title="Resolution", ge=0, le=4096)
    """In pixels: the side of a square with the area of a training image. 0: auto, the base's own."""
    device: Annotated[str, AfterValidator(_check_device)] = Field(AUTO, title="Device")
    """`auto` for the newest card, `cpu` for the processor, `cuda:0`, `cuda:1`, ... for a card by its number
    in nvidia-smi (ROCm's too), `mps` on a Mac, `xpu` for Intel's."""
    precision: Annotated[str, RowOf(PRECISIONS)] = Field("auto", title="Precision")
    """dtype of the frozen base; the adapter is always fp32."""
    gradient_checkpointing: bool = Field(False, title="Gradient checkpointing")
    """Recomputes activations in the backward pass instead of keeping them: less memory, about a third
    slower."""
    quantize_base: Annotated[str, RowOf(QUANTIZED)] = Field("none", title="Quantize base model")
    """Rounds the frozen weights of the UNet's blocks: much less memory, slightly longer steps, and the LoRA
    is trained beside a base that is very slightly off."""
    offload: bool = Field(False, title="Offload base to RAM")
    """Keeps the UNet's frozen weights outside of the device's memory and fetches each when it is used: far
    less memory, the same results, longer steps."""
    deterministic: bool = Field(False, title="Deterministic on GPU")
    """Uses only deterministic CUDA kernels, so that a resumed run equals an unbroken one to the bit; steps
    may be slower. Runs on the processor are deterministic anyway."""
    clip_skip: int = Field(1, title="Clip skip", ge=1, le=8)
    """Which layer of the text encoder, counted from the last, conditions the image. Many anime bases want
    2. Bases that always use the layer before the last, such as SDXL, treat 1 as 2."""
    max_token_length: Literal[75, 150, 225] = Field(75, title="Caption tokens")
    """How much of a caption is read: 75, 150 or 225 tokens."""

    def describe_epoch(self, step: int) -> str:
        """The epoch of a step of the run, such as "epoch 3 of 10"; "" where its length is in steps."""
        passed = max(0, step - 1) * self.epochs // self.steps
        return f"epoch {min(self.epochs, 1 + passed)} of {self.epochs}" if self.epochs else ""


class OptimizerSection(Section):
    """The optimizer and its learning rates."""

    name: Annotated[str, RowOf(OPTIMIZERS, classes=True)] = Field("adamw", title="Optimizer")
    """AdamW is the safe default; Prodigy finds its own learning rate. Or a class of an installed package, as
    module:Class. Choosing one also sets its usual learning rate, unless you set that too."""
    args: Annotated[dict[str, Any], Arguments] = Field({}, title="Optimizer arguments")
    """Further arguments of the optimizer, such as weight_decay = 0.1 or betas = [0.9, 0.99]; the others keep
    their defaults."""
    lr: Rate = Field(1e-4, title="Learning rate")
    """Learning rate of the UNet's adapter. Effective rate: this times alpha / rank."""
    range_test: bool = Field(False, title="Auto learning rate")
    """A short range test before the first step finds the learning rate; the others keep their ratio to it. In
    a file or on the command line, `optimizer.lr = auto` does the same."""
    text_encoder_lr: Rate = Field(5e-5, title="Text encoder rate")
    """Learning rate of the (first) text encoder's adapter. 0: not trained."""
    text_encoder_2_lr: Rate = Field(0.0, title="Second text encoder rate")
    """Learning rate of the second text encoder's adapter. 0: not trained."""
    token_lr: float = Field(1e-3, title="Rate of new tokens", gt=0.0, le=MAX_RATE)
    """Learning rate of the embeddings of `adapter.new_tokens`."""
    stop_text_encoder_at: float = Field(1.0, title="Stop text encoder at", ge=0.0, le=1.0)
    """Share of the steps after which the text encoders' adapter and new tokens are frozen; less keeps them
    from overfitting."""
    block_lr: Annotated[dict[str, Rate], Patterns] = Field({}, title="Rates by block")
    """Learning rate for the layers whose path matches a pattern; 0: they are not trained. If several patterns
    match, the last one counts."""
    lora_plus: float = Field(1.0, title="LoRA+ ratio", ge=1.0, le=64.0)
    """Learning rate of each layer's second matrix, which starts from zero, as a multiple of the first's. 1:
    the same."""
    schedule: Annotated[str, RowOf(SCHEDULES)] = Field("cosine", title="Schedule")
    """How the learning rate changes over the run."""
    warmup: float = Field(0.05, title="Warm-up", ge=0.0, le=1.0)
    """Share of the steps over which the learning rate rises from zero."""
    max_grad_norm: float = Field(1.0, title="Gradient clipping", ge=0.0, le=1000.0)
    """Largest norm of the gradient. 0: no clipping."""

    @property
    def row(self) -> OptimizerChoice:
        """The row of the optimizer."""
        return optimizer_row(self.name)

    def usual_for(self, name: str, lr: float | None = None) -> dict[str, Any]:
        """The usual settings of the optimizer `name`: learning rates, and its own schedule if it has one.

        Args:
            name: a row's, or a class.
            lr: its learning rate; None for one as far from its usual rate as this is from the usual rate of
                this optimizer. The other rates keep their ratio to it; untrained parts stay so, and no rate
                leaves the range of its row that was not out of range before.
        """
        old, new = self.row, optimizer_row(name)
        factor = lr / self.lr if lr and self.lr else new.lr / old.lr
        found: dict[str, Any] = {}
        for key in RATES:
            rate = (lr or new.lr) if new.one_rate else float(f"{getattr(self, key) * factor:.6g}")
            most = new.rates[1] if getattr(self, key) <= old.rates[1] else MAX_RATE
            found[key] = min(MAX_RATE, most, rate) if getattr(self, key) else 0.0
        return found | ({"schedule": "constant"} if new.averages else {})

    def several_rates(self, rates: Iterable[float]) -> str:
        """The problem with `rates`, those that something is trained at, for this optimizer, or ""."""
        if not self.row.one_rate or (len(set(rates)) < 2 and self.lora_plus == 1.0):
            return ""
        return (
            f"{self.row.title} works with one learning rate; set the rates of the text encoders to"
            f" optimizer.lr ({self.lr:g}) or to 0, optimizer.token_lr to optimizer.lr, optimizer.lora_plus to"
            " 1, and leave optimizer.block_lr empty."
        )

    def argument_problem(self) -> str:
        """The problem with the class or the `args` of this optimizer, in a sentence, or ""."""
        row, unknown = self.row, "" if self.name in OPTIMIZERS else _unknown_class(self.name)
        found = [unknown] if unknown else []
        refused = {
            **dict.fromkeys(("params", "lr"), "it is set by optimizer.lr"),
            "maximize": "it would train away from the images",
            "differentiable": "a step is never differentiated",
        }
        known = constructor_defaults(row.load) if self.args else None
        for name, value in self.args.items():
            if name in refused and value is not False:
                found.append(f"optimizer.args cannot have {name}: {refused[name]}.")
            elif known is not None and name not in known:
                takes = [one for one in known if one not in refused]
                close = difflib.get_close_matches(name, takes, n=1)
                hint = f"; did you mean {close[0]}?" if close else f"; it takes {', '.join(takes)}."
                found.append(f"optimizer.args has {name!r}, which {row.title} does not take{hint}")
            elif known is not None and (kind := _other_kind(value, known[name]) or _other_range(name, value)):
                found.append(f"optimizer.args has {name} = {value!r}, which should be {kind}.")
        return " ".join(found)


def _other_kind(value: Any, usual: Any) -> str:
    """The expected type of an argument with the default `usual`; "" if `value` fits, or if the default does
    not show it."""
    match usual:
        case bool():
            return "" if isinstance(value, bool) else "true or false"
        case int() | float():
            return "" if isinstance(value, int | float) and not isinstance(value, bool) else "a number"
        case str():
            return "" if isinstance(value, str) else "a text"
        case tuple() | list():
            fits = isinstance(value, list | tuple) and len(value) == len(usual)
            fits = fits and not any(map(_other_kind, value, usual))
            return "" if fits else f"a list of {len(usual)} numbers"
    return ""


def _other_range(name: str, value: Any) -> str:
    """The range of an argument, if `value` is not in it; else ""."""
    numbers = [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int | float)]
    if name not in NOT_NEGATIVE or all(0 <= one < (1 if name == "betas" else math.inf) for one in numbers):
        return ""
    return "from 0 to below 1" if name == "betas" else "0 or more"


class LossSection(Section):
    """The training loss."""

    type: Annotated[str, RowOf(LOSSES)] = Field("mse", title="Loss")
    """How an error is weighted."""
    huber_delta: float = Field(0.1, title="Huber delta", ge=0.001, le=10.0)
    """Errors well below it count squared, errors well above it linearly. Only for Huber."""
    huber_schedule: Annotated[str, RowOf(HUBER_SCHEDULES)] = Field("snr", title="Huber schedule")
    """How Huber's delta follows the noise level; it is larger at little noise. Only for Huber."""
    min_snr: Annotated[float, Field(ge=0.0, le=100.0)] | Auto = Field(AUTO, title="Min-SNR")
    """Evens out the weight of the noise levels (gamma of Hang et al. 2023). `auto`: 5 for a base that
    predicts noise, off for one that predicts velocity or with debiased estimation. 0: off."""
    debias: bool = Field(False, title="Debiased estimation")
    """Weights the noise levels by 1 / sqrt(SNR) (Yu et al. 2023): more weight on the composition, which is
    drawn first."""
    noise_offset: float = Field(0.0, title="Noise offset", ge=0.0, le=1.0)
    """Lets very dark and very bright images be learned; 0.05 is usual. 0: off."""
    multires_noise: int = Field(0, title="Multi-resolution noise", ge=0, le=10)
    """How many coarser noises are added to the noise (pyramid noise), in place of a noise offset; 6 to 10 is
    usual. 0: off."""
    multires_discount: float = Field(0.3, title="Multi-resolution discount", ge=0.0, le=1.0)
    """How strong each of the coarser noises is, as a multiple of the one before. Only for multi-resolution
    noise."""
    input_perturbation: float = Field(0.0, title="Input perturbation", ge=0.0, le=1.0)
    """Adds so much more noise to the input than is to be predicted, against errors that add up while
    sampling; 0.1 is usual. 0: off."""
    timesteps: Annotated[str, RowOf(TIMESTEPS)] = Field("uniform", title="Timesteps")
    """Which noise levels are trained on most."""
    timestep_mean: float = Field(0.0, title="Timestep mean", ge=-5.0, le=5.0)
    """Above 0 for more noise, below 0 for less: 1 centres on timestep 730, -1 on 270. Only for
    logit-normal."""
    timestep_std: float = Field(1.0, title="Timestep spread", ge=0.05, le=5.0)
    """A small spread keeps to few noise levels. Only for logit-normal."""
    timestep_shift: float = Field(1.0, title="Timestep shift", ge=0.05, le=20.0)
    """Above 1 trains on more noise, below 1 on less, for any distribution; use 3 for large images (Esser et
    al. 2024). 1: unchanged."""
    min_timestep: int = Field(0, title="Least timestep", ge=0, le=999)
    """The least noise that is trained on, of 1,000. Above 0 leaves fine detail to the base."""
    max_timestep: int = Field(1000, title="Greatest timestep", ge=1, le=1000)
    """The most noise that is trained on, of 1,000. Below 1,000 leaves composition to the base."""

    def timestep_at(self, quantile: float) -> float:
        """The timestep that `quantile` in [0, 1) of all draws are below, as a share of the base's timesteps,
        in [0, 1).

        Source: Esser et al. 2024, "Scaling Rectified Flow Transformers", section 3.1 (logit-normal) and
        equation 23 (shift).
        """
        share: float = chosen(TIMESTEPS, self.timesteps, "loss.timesteps").resolve()(quantile, self)
        share = self.timestep_shift * share / (1.0 + (self.timestep_shift - 1.0) * share)
        low, high = self.min_timestep / MAX_TIMESTEP, self.max_timestep / MAX_TIMESTEP
        return low + (high - low) * share

    def delta_at(self, noise: Any, timesteps: Any) -> Any:
        """Huber's delta at each of the timesteps, (B,), of a `NoiseSchedule`."""
        schedule = chosen(HUBER_SCHEDULES, self.huber_schedule, "loss.huber_schedule").resolve()
        return schedule(noise, timesteps, self.huber_delta)

    prior_preservation: float = Field(0.0, title="Prior preservation", ge=0.0, le=10.0)
    """Weight of prior preservation: keeps the base's predictions on images that it generates from the
    captions without the trigger word. 1 is usual; a step takes about twice as long. 0: off."""
    unmasked_weight: float = Field(0.1, title="Weight outside masks", ge=0.0, le=1.0)
    """Loss weight outside an image's mask; inside it is 1. 0: ignored; 1: as without masks."""

    def gamma(self, prediction: str) -> float:
        """gamma of min-SNR for a base that predicts `prediction`; 0: off.

        Off by default for velocity, which weights the noise levels evenly already: min-SNR would give the
        last timestep of a schedule with zero terminal SNR no weight at all.
        """
        if isinstance(self.min_snr, str):
            return MIN_SNR if prediction == "epsilon" and not self.debias else 0.0
        return self.min_snr


def uniform_timestep(quantile: float, rules: LossSection) -> float:
    """Each timestep as often."""
    return quantile


def logit_normal_timestep(quantile: float, rules: LossSection) -> float:
    """The logistic function of a normal variable."""
    # Neither end has a finite normal variable; the ends are farther out than any draw of a run.
    normal = NormalDist(rules.timestep_mean, rules.timestep_std).inv_cdf(min(max(quantile, 1e-9), 1 - 1e-9))
    return 1.0 / (1.0 + math.exp(-normal))


class ValidationSection(Section):
    """Measuring on held-out images."""

    every: int = Field(100, title="Validate every", ge=0, le=1_000_000)
    """Steps between two validations. 0: never."""
    every_epochs: int = Field(0, title="Validate every (epochs)", ge=0, le=100_000)
    """The same in epochs. 0: use the steps."""
    pictures: float = Field(0.1, title="Held-out images", ge=0.0, le=10_000.0)
    """Kept out of training and used to measure: a share below 1, or a number. 0: none."""
    draws_per_image: int = Field(4, title="Noise draws per image", ge=1, le=1000)
    """Fixed (noise, timestep) pairs for each held-out image."""
    max_time_share: float = Field(0.05, title="Max. time spent validating", ge=0.0, le=1.0)
    """Share of the training time; validation runs less often if it would take more. 0: no limit."""
    memorization: bool = Field(True, title="Measure overfitting")
    """Measure training images too: their gain beyond that of held-out images is memorization."""
    forgetting: int = Field(4, title="Prior images", ge=0, le=1000)
    """Images that the base generates before the first step, to measure forgetting. 0: none."""
    patience: int = Field(4, title="Patience", ge=0, le=1000)
    """Stop after this many validations without improvement if the last is clearly worse than the best, else
    after twice as many. 0: never stop early."""


class SampleSection(Section):
    """Samples generated while training."""

    every: int = Field(100, title="Sample every", ge=0, le=1_000_000)
    """Steps between two rounds of samples. 0: never."""
    every_epochs: int = Field(0, title="Sample every (epochs)", ge=0, le=100_000)
    """The same in epochs. 0: use the steps."""
    prompts: list[str] = Field([], title="Sample prompts")
    """One per line. Empty: captions of held-out or training images. `(word:1.2)`, `[word]` and BREAK act as
    in A1111. A line may end with kohya's options: `--n` negative prompt, `--w` width, `--h` height, `--d`
    seed, `--l` guidance, `--s` steps."""
    negative_prompt: str = Field("", title="Negative prompt")
    """Negative prompt of samples without `--n`."""
    seed: int = Field(0, title="Sample seed", ge=0, le=2**32 - 1)
    """The same noise in every round, so that only the adapter differs."""
    steps: int = Field(20, title="Sampler steps", ge=1, le=200)
    """Steps of the sampler for each sample."""
    cfg: float = Field(5.0, title="Guidance", ge=1.0, le=30.0)
    """How strongly a sample follows its prompt."""
    cfg_rescale: Annotated[float, Field(ge=0.0, le=1.0)] | Auto = Field(AUTO, title="CFG rescale")
    """Removes the contrast that guidance adds: 0 none of it, 1 all (phi of Lin et al. 2023). `auto`: 0.7 for
    a base with zero terminal SNR that predicts velocity, off for others and for the bundled base."""
    sampler: Annotated[str, RowOf(SAMPLERS)] = Field("ddim", title="Sampler")
    """DDIM is plain and deterministic; DPM++ 2M is sharp in 20 steps."""


class SaveSection(Section):
    """Checkpoints."""

    every: int = Field(100, title="Save every", ge=0, le=1_000_000)
    """Steps between two checkpoints. 0: only at the end."""
    every_epochs: int = Field(0, title="Save every (epochs)", ge=0, le=100_000)
    """The same in epochs. 0: use the steps."""
    keep_last: int = Field(3, title="Keep last", ge=1, le=1000)
    """How many of the newest checkpoints are kept."""
    keep_best: bool = Field(True, title="Keep best")
    """Also keep the checkpoint with the best validation."""
    ema: float = Field(0.0, title="EMA of weights", ge=0.0, le=0.99999)
    """Decay of a running average of the adapter, such as 0.99: it evens out the last steps. Average and raw
    adapter are both sampled, measured and exported (NAME and NAME-raw). 0: off."""
    tensorboard: bool = Field(False, title="TensorBoard")
    """Also write curves and samples for TensorBoard into the run's folder. Needs the package tensorboard."""
    wandb: bool = Field(False, title="Weights & Biases")
    """Also write curves and samples for Weights & Biases into the run's folder; `wandb sync` sends them, or
    the run itself where WANDB_MODE is set to online. Needs the package wandb."""
