"""The settings of a run: reading them from TOML and the command line, checking them, writing them out.

The settings themselves are declared in `settings/schema.py`.
"""

import ast
import contextlib
import difflib
import functools
import inspect
import itertools
import json
import logging
import math
import re
import tomllib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tomli_w
from annotated_types import Ge, Le
from pydantic import Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from lora_core.errors import ConfigError, wrap_os_errors
from lora_core.settings import schema
from lora_core.system.files import read_small_file, read_table

SWITCHES = {"optimizer.lr": "optimizer.range_test", "adapter.rank": "adapter.auto_rank"}
"""Settings that may be `auto` in place of a number, and the switch that this turns on."""
_FORMER = read_table("old_settings.toml")
RETIRED: dict[str, tuple[Any, str]] = {
    name: (row["accepted"], row["why"]) for name, row in _FORMER["retired"].items()
}
"""Removed settings: the one value that is still accepted, and why no other is."""
BEFORE: dict[str, Any] = _FORMER["before"]
"""Settings and what a run did that began before there were any."""
OLD_SWITCHES: dict[str, dict[str, Any]] = _FORMER["switches"]
"""Switches of earlier versions and what `true` sets today."""
OLD_NAMES: dict[str, str] = {
    **_FORMER["names"],
    **{f"optim.{key}": f"optimizer.{key}" for key in schema.OptimizerSection.model_fields},
    **{f"preview.{key}": f"sample.{key}" for key in schema.SampleSection.model_fields},
}
"""Names of earlier versions, in the files of their users, and what the settings are called today."""
MAX_TOML_BYTES = 1_000_000
MAX_TOML_DEPTH = 20
MAX_INTEGER = 2**63
_STRING = re.compile(
    r'''"""(?:\\.|[^\\])*?(?:"{3,5}|\Z)|"(?:\\.|[^"\\\n])*"?'''
    r"""|'{3}.*?(?:'{3,5}|\Z)|'[^'\n]*'?|#[^\n]*""",
    re.S,
)
"""A string or a comment of TOML; also an unclosed one, so that the time is linear."""
_DEEP_KEY = re.compile(rf"(?<![\w-])(?:[\w-]+[ \t]*\.[ \t]*){{{MAX_TOML_DEPTH + 1}}}")
_LONGEST_SHOWN = 80
_MOST_UNKNOWN = 10


class RunConfig(schema.Section):
    """All settings of one run; immutable, so that nothing can change them while it trains."""

    name: str = Field("", title="Name")
    """The run's name. Empty: date and dataset."""
    seed: int = Field(0, title="Seed", ge=0, le=2**32 - 1)
    """Every random draw of the run follows from it."""
    model: schema.ModelSection = Field(default_factory=schema.ModelSection)
    adapter: schema.AdapterSection = Field(default_factory=schema.AdapterSection)
    dataset: schema.DatasetSection = Field(default_factory=schema.DatasetSection)
    slider: schema.SliderSection = Field(default_factory=schema.SliderSection)
    train: schema.TrainSection = Field(default_factory=schema.TrainSection)
    optimizer: schema.OptimizerSection = Field(default_factory=schema.OptimizerSection)
    loss: schema.LossSection = Field(default_factory=schema.LossSection)
    validation: schema.ValidationSection = Field(default_factory=schema.ValidationSection)
    sample: schema.SampleSection = Field(default_factory=schema.SampleSection)
    save: schema.SaveSection = Field(default_factory=schema.SaveSection)

    @property
    def keeps_prior(self) -> bool:
        """Whether steps preserve the base's predictions on its own images; a concept slider does so by
        itself."""
        return self.loss.prior_preservation > 0 and not self.slider.on

    def resolution(self, own: int) -> int:
        """The resolution in pixels, the largest where there are several; `own` is the base's."""
        several = [] if self.slider.on else self.dataset.resolutions
        return max(several, default=self.train.resolution or own)

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], say: bool = True, absent: Mapping[str, Any] | None = None
    ) -> "RunConfig":
        """A config from nested tables as TOML gives them; absent settings take their default, or their value
        in `absent`. Settings that an earlier version wrote and this one does not have are left out; `retired`
        names them.

        Args:
            values: the tables, with names of today or of earlier versions.
            say: log the new name of each old one, once in a process.
            absent: dotted name to value.

        Raises:
            ConfigError: names every setting that is unknown, mistyped or out of range, all at once.
        """
        flat = flattened(values, say)
        kept = {name: value for name, value in flat.items() if name not in RETIRED}
        return cls().changed({**(absent or {}), **kept})

    def changed(self, changes: Mapping[str, Any]) -> "RunConfig":
        """This config with some settings replaced.

        Args:
            changes: dotted name ("adapter.rank") to value.

        Raises:
            ConfigError: names every setting that is unknown, mistyped or out of range, all at once.
        """
        problems: list[str] = []
        unknown: list[str] = []
        tables = self.to_dict()
        for name, value in self._with_usual(with_switches(current_names(changes))):
            section, _, key = name.rpartition(".")
            if name in RETIRED:
                problems += retired([(name, value)])
            elif name not in FIELDS:
                unknown.append(name)
            else:
                (tables[section] if section else tables)[key] = value
        try:
            config = RunConfig.model_validate(tables)
        except ValidationError as error:
            problems += _sentences(error, tables)
        problems += map(_unknown, unknown[:_MOST_UNKNOWN])
        if len(unknown) > _MOST_UNKNOWN:
            problems.append(f"And {len(unknown) - _MOST_UNKNOWN:,} more are not settings.")
        if problems:
            raise ConfigError(" ".join(problems))
        return config

    def _with_usual(self, changes: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """The changes; one that names another optimizer and no learning rate adds that optimizer's usual
        rates."""
        given = dict(changes)
        yield from given.items()
        name = given.get("optimizer.name")
        if isinstance(name, str) and "optimizer.lr" not in given:
            with contextlib.suppress(ConfigError):  # validation reports the name
                if schema.optimizer_row(name) != self.optimizer.row:
                    usual = {f"optimizer.{key}": one for key, one in self.optimizer.usual_for(name).items()}
                    yield from ((key, one) for key, one in usual.items() if key not in given)

    def to_dict(self) -> dict[str, Any]:
        """Nested tables with every setting written out."""
        return self.model_dump()

    def get(self, name: str) -> Any:
        """The value of a setting by its dotted name.

        Raises:
            ConfigError: no such setting.
        """
        name = OLD_NAMES.get(name, name)
        if name not in FIELDS:
            raise ConfigError(_unknown(name))
        return functools.reduce(getattr, name.split("."), self)


SECTIONS: dict[str, type[schema.Section]] = {
    name: info.annotation
    for name, info in RunConfig.model_fields.items()
    if isinstance(info.annotation, type) and issubclass(info.annotation, schema.Section)
}
FIELDS: dict[str, FieldInfo] = {
    name: info for name, info in RunConfig.model_fields.items() if name not in SECTIONS
} | {
    f"{section}.{key}": info
    for section, model in SECTIONS.items()
    for key, info in model.model_fields.items()
}
"""Each setting by its dotted name, in the order of declaration."""


def label_of(name: str) -> str:
    """The label of a setting in the window."""
    return str(FIELDS[name].title)


def help_of(name: str) -> str:
    """The help of a setting."""
    section, _, key = name.rpartition(".")
    model = SECTIONS.get(section, RunConfig)
    return _help_texts(inspect.getfile(model))[model.__name__, key]


@functools.cache
def _help_texts(file: str) -> dict[tuple[str, str], str]:
    """The docstrings below the fields of the models in a file, by model and field.

    pydantic's `use_attribute_docstrings` does the same for every process at its start, which costs 40 ms.
    """
    models = [one for one in ast.parse(Path(file).read_bytes()).body if isinstance(one, ast.ClassDef)]
    found = {}
    for model in models:
        for field, doc in itertools.pairwise(model.body):
            match field, doc:
                case ast.AnnAssign(target=ast.Name(id=key)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[model.name, key] = " ".join(text.split())
    return found


def choices_of(name: str) -> schema.Table | None:
    """The table whose keys a setting may name, or None where there is none."""
    return next((mark.table for mark in FIELDS[name].metadata if isinstance(mark, schema.RowOf)), None)


def limits_of(name: str) -> tuple[float, float] | None:
    """The smallest and the largest value of a setting, or of each value in its table."""
    info = FIELDS[name]
    inner = [mark for kind in typing.get_args(info.annotation) for mark in getattr(kind, "__metadata__", ())]
    marks = [mark for one in (info, *inner) if isinstance(one, FieldInfo) for mark in one.metadata]
    low = next((mark.ge for mark in marks if isinstance(mark, Ge)), None)
    high = next((mark.le for mark in marks if isinstance(mark, Le)), None)
    return None if low is None or high is None else (low, high)  # type: ignore[return-value]


def takes_auto(name: str) -> bool:
    """Whether a setting is a number or `auto`."""
    return schema.Auto in typing.get_args(FIELDS[name].annotation)


def takes_class(name: str) -> bool:
    """Whether a setting names a row or, as "module:Class", a class of an installed package."""
    return any(isinstance(mark, schema.RowOf) and mark.classes for mark in FIELDS[name].metadata)


def is_table(name: str) -> bool:
    """Whether a setting is itself a table: of patterns, or of an optimizer's arguments."""
    return typing.get_origin(FIELDS[name].annotation) is dict


def item_type(name: str) -> type | None:
    """The item type of a list setting, int or str; None for other settings."""
    annotation = FIELDS[name].annotation
    inner = typing.get_args(annotation)[0] if typing.get_origin(annotation) is list else None
    return typing.get_args(inner)[0] if typing.get_args(inner) else inner


def is_pattern_table(name: str) -> bool:
    """Whether a setting is a table of pattern to number, such as `adapter.block_ranks`."""
    return is_table(name) and typing.get_args(FIELDS[name].annotation)[1] is not Any


def checked_value(name: str, value: Any, called: str = "") -> Any:
    """A value as the setting's type, if it is legal.

    Args:
        name: of the setting.
        value: as TOML, JSON or a widget gives it.
        called: what messages call the setting, such as the option of a verb.

    Raises:
        ConfigError: no such setting, wrong type, out of range, not a choice, or an unusable pattern.
    """
    if name not in FIELDS:
        raise ConfigError(_unknown(name))
    section, _, key = name.rpartition(".")
    tables: dict[str, Any] = {section: {key: value}} if section else {key: value}
    try:
        return RunConfig.model_validate(tables).get(name)
    except ValidationError as error:
        raise ConfigError(" ".join(_sentences(error, tables, called))) from error


def parse_cfg_rescale(value: Any) -> schema.NumberOrAuto:
    """CFG rescale from a form, an option or JSON.

    Raises:
        ConfigError: it is neither `auto` nor a number from 0 to 1.
    """
    if isinstance(value, str) and value.strip().lower() == schema.AUTO:
        return schema.AUTO
    try:
        number = float(str(value).replace(",", "."))
    except ValueError as error:
        raise ConfigError(f"CFG rescale {str(value)[:40]!r} should be a number or {schema.AUTO}.") from error
    if not 0.0 <= number <= 1.0:
        raise ConfigError(f"CFG rescale {number:g} is out of range; it must be between 0 and 1.")
    return number


SAMPLE_OPTIONS = {
    "n": ("negative", "sample.negative_prompt"), "w": ("width", "train.resolution"),
    "h": ("height", "train.resolution"), "d": ("seed", "sample.seed"), "l": ("cfg", "sample.cfg"),
    "s": ("steps", "sample.steps"), "ss": ("sampler", "sample.sampler"),
}  # fmt: skip
"""Options of a sample prompt, as in kohya's `train_util.py`: the field of a generation request that each
sets, and a setting with the same legal values."""
_SAMPLE_OPTION = re.compile(r"(?<!\S)--([A-Za-z]+)(?:\s+|$)")


def split_sample(line: str) -> tuple[str, str]:
    """A line of `sample.prompts` as the prompt, and the options at its end or ""."""
    found = _SAMPLE_OPTION.search(line)
    return (line[: found.start()].rstrip(), line[found.start() :]) if found else (line, "")


def parse_sample(section: schema.SampleSection, line: str) -> dict[str, Any]:
    """A line of `sample.prompts` as fields of a generation request; the line's options override the section's
    values. A size of 0 is the base's resolution.

    Raises:
        ConfigError: an option is unknown, or its value is wrong.
    """
    prompt, rest = split_sample(line)
    fields: dict[str, Any] = {
        "prompt": prompt, "negative": section.negative_prompt, "width": 0, "height": 0, "seed": section.seed,
        "steps": section.steps, "cfg": section.cfg, "cfg_rescale": section.cfg_rescale,
        "sampler": section.sampler,
    }  # fmt: skip
    _, *options = _SAMPLE_OPTION.split(rest)
    for letter, text in zip(options[::2], options[1::2], strict=True):
        called = f"--{letter} in the sample prompt {in_short(line)}"
        if letter.lower() not in SAMPLE_OPTIONS:
            known = ", ".join(f"--{each}" for each in SAMPLE_OPTIONS)
            raise ConfigError(f"{called} is not known; there are {known}.")
        name, setting = SAMPLE_OPTIONS[letter.lower()]
        value: str | float = text.strip()
        if name not in ("negative", "sampler"):
            with contextlib.suppress(ValueError):
                value = float(value)
                value = int(value) if value.is_integer() else value
        fields[name] = checked_value(setting, value, called)
    return fields


def sample_fields(section: schema.SampleSection, line: str) -> dict[str, Any]:
    """Like `parse_sample`, but a line with a wrong option is all prompt, as in runs of earlier versions."""
    try:
        return parse_sample(section, line)
    except ConfigError:
        return {**parse_sample(section, ""), "prompt": line}


def _sentences(error: ValidationError, tables: Mapping[str, Any], called: str = "") -> list[str]:
    """A sentence for each setting that pydantic refused."""
    found: dict[str, str] = {}
    for problem in error.errors(include_url=False, include_input=False):
        name, *inside = map(str, problem["loc"])
        value = tables[name]
        if name in SECTIONS:
            key, *inside = inside
            name, value = f"{name}.{key}", value[key]
        shown_name = called or name
        if inside and is_pattern_table(name):
            value, shown_name = value[inside[0]], f"{shown_name} {inside[0]!r}"
        # A union and a list have several problems; the first says enough.
        found.setdefault(name, f"{shown_name} {_predicate(problem, name, value)}.")
    return list(found.values())


_TYPES = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text",
    "dict_type": "a table of patterns, such as {'mid_block' = 4}; in TOML, quote a pattern that holds a"
    " backslash with single quotes",
}


def _predicate(problem: ErrorDetails, name: str, value: Any) -> str:
    shown, info = in_short(value), FIELDS[name]
    if isinstance(value, float) and not math.isfinite(value):
        return f"= {value} is not a number that can be used"
    match problem["type"]:
        case "patterns":
            return problem["msg"]
        case "value_error":
            return f"= {shown} {problem['ctx']['error']}"
        case "greater_than":
            return f"= {shown} is out of range; it must be above {problem['ctx']['gt']:g}"
        case "greater_than_equal" | "less_than_equal":
            low, high = limits_of(name) or (-math.inf, math.inf)
            return f"= {shown} is out of range; it must be between {low:,.10g} and {high:,.10g}"
        case "literal_error":
            known = ", ".join(map(str, typing.get_args(info.annotation)))
            return f"= {shown} is not possible; choose one of {known}"
    if item_type(name):
        most = f"at most {problem['ctx']['max_length']} " if problem["type"] == "too_long" else ""
        kind = f"a list of {most}{'integers' if item_type(name) is int else 'texts'}"
    else:
        kind = _TYPES[problem["type"]]
    return f"= {shown} should be {kind}{f' or {schema.AUTO}' if takes_auto(name) else ''}"


def with_switches(changes: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The changes, with `auto` replaced by the switch that it turns on; a number turns the switch off unless
    the changes set it too. Switches of earlier versions set what they mean today."""
    for name, value in changes.items():
        if name in OLD_SWITCHES and isinstance(value, bool):
            yield from OLD_SWITCHES[name].items() if value else ()
            continue
        switch = SWITCHES.get(name, "")
        if switch and isinstance(value, str) and value.strip().lower() == schema.AUTO:
            yield switch, True
            continue
        yield name, value
        if switch and switch not in changes:
            yield switch, False


def retired(changes: Iterable[tuple[str, Any]]) -> list[str]:
    """A sentence for each removed setting whose value can no longer be used."""
    found = []
    for name, value in changes:
        if name in RETIRED:
            kept, why = RETIRED[name]
            plain = value.strip().lower() if isinstance(value, str) else value
            if isinstance(plain, bool) or plain != kept:
                found.append(f"{name} = {repr(value)[:80]} cannot be used: {why}")
    return found


def pattern_lines(table: Mapping[str, Any]) -> str:
    """A table as a user types it, one `pattern = number` or `argument = value` a line."""
    return "\n".join(f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in table.items())


def arguments_of_lines(name: str, text: str) -> dict[str, Any]:
    """Parse the lines of `pattern_lines` for arguments, whose values are TOML.

    Raises:
        ConfigError: a line is not TOML; `name` is the setting's.
    """
    table: dict[str, Any] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        try:
            table |= parse_toml(line, name)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(
                f"{name} has the line {in_short(line)}, which should read: argument = value."
            ) from error
    return table


def patterns_of_lines(name: str, text: str) -> dict[str, float]:
    """Parse the lines of `pattern_lines`; the number comes after the last `=`.

    Raises:
        ConfigError: a line has no number; `name` is the setting's.
    """
    table = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        pattern, _, number = line.rpartition("=")
        try:
            table[pattern.strip().strip("\"'")] = float(number.replace(",", "."))
        except ValueError as error:
            raise ConfigError(
                f"{name} has the line {line!r}, which should read: pattern = number."
            ) from error
    return table


def current_names(values: Mapping[str, Any], say: bool = True) -> dict[str, Any]:
    """Values by the names that their settings have today.

    Args:
        values: dotted name to value; names of earlier versions are accepted.
        say: log the new name of each old one, once in a process.

    Raises:
        ConfigError: a setting is given by its old and its new name.
    """
    old = {name: OLD_NAMES[name] for name in values if name in OLD_NAMES}
    for name, new in old.items():
        if new in values:
            raise ConfigError(f"{name} is the old name of {new}, which is given too; remove {name}.")
    if say and (untold := old.keys() - _TOLD):
        _TOLD.update(untold)
        names = ", ".join(f"{name} is now {new}" for name, new in old.items() if name in untold)
        logging.getLogger(__name__).warning("Old names of settings still work: %s.", names)
    return {old.get(name, name): value for name, value in values.items()}


_TOLD: set[str] = set()
"""Old names whose new ones this process has logged."""


def flattened(values: Mapping[str, Any], say: bool = True) -> dict[str, Any]:
    """Nested tables as dotted names; a setting that is itself a table stays in one piece.

    Args:
        values: as TOML gives them, with names of today or of earlier versions.
        say: log the new name of each old one, once in a process.

    Raises:
        ConfigError: a setting is given by its old and its new name.
    """
    return current_names(dict(leaves(values)), say)


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names in nested tables with their values, as TOML takes an unquoted `up_blocks.1` for a table in
    a table."""
    for key, value in values.items():
        old = f"{prefix}{key}"
        name = OLD_NAMES.get(old, old)
        if isinstance(value, Mapping) and not (name in FIELDS and is_table(name)):
            yield from leaves(value, f"{old}.")
        else:
            yield old, value


def in_short(value: Any, show: Callable[[Any], str] = repr) -> str:
    """A value for a message, as `show` writes it, in one line of at most 80 characters."""
    try:
        text = " ".join(show(value).split())
    except (ValueError, RecursionError):  # an integer of over 4,300 digits, or a deep list
        text = f"a {type(value).__name__} too long to print"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 1]}…"


def _unknown(name: str) -> str:
    if len(name) > _LONGEST_SHOWN:
        return f"{name[: _LONGEST_SHOWN - 1]}… is not a setting."
    close = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.6)
    hint = f"; did you mean {close[0]}?" if close else f". The sections are {', '.join(SECTIONS)}."
    return f"{name} is not a setting{hint}"


def parsed_assignment(text: str) -> tuple[str, Any]:
    """Parse a `section.key=value` of the command line into (name, value).

    The value is parsed as TOML, else taken as text, which saves a second level of quotes.

    Raises:
        ConfigError: `=` or the name before it is missing, or the value is nested too deeply.
    """
    given, equals, raw = text.partition("=")
    (name,) = current_names({given.strip(): raw})
    if not equals or not name:
        raise ConfigError(f"--set {in_short(text)} should read section.key=value.")
    try:
        value = parse_toml(f"value = {raw}", f"--set {given.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw
    is_text = name in FIELDS and FIELDS[name].annotation is str
    return name, raw if is_text and not isinstance(value, str) else value


def load_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ConfigError: the file cannot be read, is not a regular file, is larger than 1 MB, or is not TOML.
    """
    text = _read_small(path, f"The config {path}")
    try:
        return parse_toml(text, f"The config {path}")
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"The config {path} is not valid TOML: {error}.") from error


def _read_small(path: Path, called: str) -> str:
    with wrap_os_errors(ConfigError, f"{called} cannot be read"):
        data = read_small_file(path, MAX_TOML_BYTES)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{called} cannot be read: it is not UTF-8 text.") from error


def read_prompts(path: Path) -> list[str]:
    """The lines of a file of sample prompts as kohya reads it: not those that are empty or begin with #.

    Raises:
        ConfigError: the file cannot be read, is not a regular file, is larger than 1 MB, or is not UTF-8
            text.
    """
    lines = _read_small(path, f"The file of sample prompts {path}").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def parse_toml(text: str, source: str, largest: float = MAX_INTEGER) -> dict[str, Any]:
    """Parse a TOML text that may come from anyone.

    Args:
        text: the TOML.
        source: what messages call it.
        largest: integers must be smaller.

    Raises:
        ConfigError: it is nested more than 20 levels deep, holds an integer that is too large, or has more
            than a million characters.
        tomllib.TOMLDecodeError: it is not TOML.
    """
    deep = ConfigError(f"{source} is nested more than {MAX_TOML_DEPTH} levels deep.")
    large = ConfigError(f"{source} holds a number that is too large.")
    if len(text) > MAX_TOML_BYTES:
        raise ConfigError(f"{source} is larger than {MAX_TOML_BYTES:,} characters.")
    # The library's time grows with the square of a key's parts.
    if _DEEP_KEY.search(_STRING.sub("_", text)):
        raise deep
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except RecursionError as error:
        raise deep from error
    except (ValueError, OverflowError) as error:  # more digits than Python converts
        raise large from error
    level: list[Any] = [tables]
    for _ in range(MAX_TOML_DEPTH):
        if any(isinstance(v, int) and abs(v) >= largest for v in level):
            raise large
        inner = [v for v in level if isinstance(v, dict | list)]
        level = [v for table in inner for v in (table.values() if isinstance(table, dict) else table)]
    if level:
        raise deep
    return tables


def to_toml(config: RunConfig) -> str:
    """The config as TOML, complete."""
    return tomli_w.dumps(config.to_dict())
