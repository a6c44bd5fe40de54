"""A whole run's settings: reading them from TOML and the command line, checking them, writing them out.

The settings themselves are declared in `settings/schema.py` and `settings/schema.py`.
"""

import dataclasses
import difflib
import math
import re
import stat
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from lora_core.errors import ConfigError
from lora_core.settings import choices
from lora_core.settings.patterns import LONGEST, MOST, PatternError, check_pattern
from lora_core.settings.schema import (
    AUTO,
    AdapterSection,
    DatasetSection,
    Form,
    LossSection,
    ModelSection,
    NumberOrAuto,
    OptimSection,
    PreviewSection,
    SaveSection,
    TrainSection,
    ValidationSection,
    setting,
)
from lora_core.system.paths import valid_text

SWITCHES = {"optim.lr": "optim.range_test"}
"""Settings that may be `auto` in place of a number, and the switch that this turns on."""
RETIRED: dict[str, tuple[Any, str]] = {
    "adapter.kind": (
        "lora",
        "lora is the one kind that can be trained today. LoHa, LoKr and DoRA files can be read, merged and"
        " turned into a LoRA.",
    ),
    "dataset.repeats": (
        1,
        "it changes nothing that is learned, as a run's length is counted in steps. Set train.steps, or put"
        " pictures that should come more often into a folder named like 10_name.",
    ),
}
"""Settings that are no more: the value that still means something, and why no other does."""
MAX_TOML_BYTES = 1_000_000
MAX_TOML_DEPTH = 20
MAX_INTEGER = 2**63
_LONGEST_SHOWN = 80


@dataclass(frozen=True)
class RunConfig:
    """All settings of one run; immutable, so that nothing can change it while the run goes on."""

    name: str = setting("", "Name", "The run's name. Empty: date and dataset.")
    seed: int = setting(0, "Seed", "Every random draw of the run follows from it.", span=(0, 2**32 - 1))
    model: ModelSection = field(default_factory=ModelSection)
    adapter: AdapterSection = field(default_factory=AdapterSection)
    dataset: DatasetSection = field(default_factory=DatasetSection)
    train: TrainSection = field(default_factory=TrainSection)
    optim: OptimSection = field(default_factory=OptimSection)
    loss: LossSection = field(default_factory=LossSection)
    validation: ValidationSection = field(default_factory=ValidationSection)
    preview: PreviewSection = field(default_factory=PreviewSection)
    save: SaveSection = field(default_factory=SaveSection)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunConfig":
        """A config from nested tables as TOML gives them; what is absent takes its default.

        Settings that an earlier version wrote and that are no more are left out; `retired` names them.

        Raises:
            ConfigError: names every setting that is unknown, mistyped or out of range, all at once.
        """
        flat = flattened(values)
        return cls().changed({name: value for name, value in flat.items() if name not in RETIRED})

    def changed(self, changes: Mapping[str, Any]) -> "RunConfig":
        """This config with some settings replaced.

        Args:
            changes: dotted name ("adapter.rank") to value.

        Raises:
            ConfigError: names every setting that is unknown, mistyped or out of range, all at once.
        """
        problems: list[str] = []
        by_section: dict[str, dict[str, Any]] = {}
        known = {name: info for name, info, _ in settings()}
        for name, value in with_switches(changes):
            if name in RETIRED:
                problems += retired([(name, value)])
                continue
            if name not in known:
                problems.append(_unknown(name, list(known)))
                continue
            try:
                checked = checked_value(name, known[name], value)
            except ConfigError as error:
                problems.append(str(error))
                continue
            section, _, key = name.rpartition(".")
            by_section.setdefault(section, {})[key] = checked
        if problems:
            raise ConfigError(" ".join(problems))
        top = by_section.pop("", {})
        sections = {s: dataclasses.replace(getattr(self, s), **values) for s, values in by_section.items()}
        return dataclasses.replace(self, **top, **sections)

    def to_dict(self) -> dict[str, Any]:
        """Nested tables with every setting written out."""
        return dataclasses.asdict(self)

    def get(self, name: str) -> Any:
        """The value of a setting by its dotted name.

        Raises:
            ConfigError: there is no such setting.
        """
        value: Any = self
        for key in name.split("."):
            if not hasattr(value, key):
                raise ConfigError(_unknown(name, [known for known, _, _ in settings()]))
            value = getattr(value, key)
        return value


def with_switches(changes: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The changes, with the word `auto` as the switch that it stands for; a number turns that off, where the
    switch is not set beside it."""
    for name, value in changes.items():
        switch = SWITCHES.get(name, "")
        if switch and isinstance(value, str) and value.strip().lower() == AUTO:
            yield switch, True
            continue
        yield name, value
        if switch and switch not in changes:
            yield switch, False


def retired(changes: Iterable[tuple[str, Any]]) -> list[str]:
    """A sentence for each setting that is no more and has a value that means nothing today."""
    found = []
    for name, value in changes:
        if name in RETIRED:
            kept, why = RETIRED[name]
            plain = value.strip().lower() if isinstance(value, str) else value
            if isinstance(plain, bool) or plain != kept:
                found.append(f"{name} = {repr(value)[:80]} cannot be used: {why}")
    return found


def settings() -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Each setting as (dotted name, dataclass field, default), in the order of declaration."""
    default = RunConfig()
    for top in dataclasses.fields(RunConfig):
        value = getattr(default, top.name)
        if not dataclasses.is_dataclass(value):
            yield top.name, top, value
            continue
        for info in dataclasses.fields(value):
            yield f"{top.name}.{info.name}", info, getattr(value, info.name)


def is_pattern_table(info: dataclasses.Field[Any]) -> bool:
    """Whether a setting is a table of pattern to number, such as `adapter.block_ranks`."""
    return typing.get_origin(info.type) is dict


def pattern_lines(table: Mapping[str, float]) -> str:
    """A table of patterns as a person types it, one `pattern = number` a line."""
    return "\n".join(f"{pattern} = {number}" for pattern, number in table.items())


def patterns_of_lines(name: str, text: str) -> dict[str, float]:
    """The table that the lines of `pattern_lines` stand for; the number comes after the last `=`.

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


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted names; a setting that is itself a table stays whole."""
    whole = {name for name, info, _ in settings() if is_pattern_table(info)}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and f"{prefix}{key}" not in whole:
            flat.update(flattened(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def checked_value(name: str, info: dataclasses.Field[Any], value: Any) -> Any:
    """`value` as the field's type, if it is legal.

    Raises:
        ConfigError: wrong type, out of range, not among the choices, or a pattern that cannot be
        used.
    """
    if is_pattern_table(info):
        return _checked_table(name, info, value)
    return _checked_one(name, info, info.type, value)


def checked_option(option: str, name: str, value: Any) -> Any:
    """An option of the command line that stands for a setting, checked as the setting is.

    Raises:
        ConfigError: it is not legal; the message names the option.
    """
    return checked_value(option, FIELDS[name], value)


def _checked_table(name: str, info: dataclasses.Field[Any], value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{name} = {in_short(value)} should be a table of patterns, such as {{'mid_block' = 4}}; in TOML"
            " a pattern with a backslash stands in single quotes."
        )
    if len(value) > MOST:
        raise ConfigError(f"{name} has {len(value):,} patterns; at most {MOST} can be used.")
    kind = typing.get_args(info.type)[1]
    checked = {}
    for pattern, one in value.items():
        try:
            check_pattern(pattern)
        except PatternError as error:
            shown = pattern if len(pattern) <= LONGEST else f"{pattern[:LONGEST]}…"
            raise ConfigError(f"{name} has the pattern {shown!r}, which cannot be used: {error}.") from error
        if isinstance(one, Mapping):
            raise ConfigError(
                f"{name}: the pattern that begins with {pattern!r} holds a dot; put it into quotes."
            )
        checked[pattern] = _checked_one(f"{name} {pattern!r}", info, kind, one)
    return checked


def _checked_one(name: str, info: dataclasses.Field[Any], kind: Any, value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} = {value} is not a number that can be used.")
    if kind == NumberOrAuto:
        if isinstance(value, str) and value.strip().lower() == AUTO:
            return AUTO
        if isinstance(value, str):
            raise ConfigError(f"{name} = {value!r} should be a number or {AUTO}.")
        kind = float
    typed = _as_type(name, kind, value)
    span, above, table = info.metadata["span"], info.metadata["above"], info.metadata["table"]
    if span is not None and not span[0] <= typed <= span[1]:
        raise ConfigError(
            f"{name} = {in_short(value)} is out of range; it goes from {span[0]:.10g} to {span[1]:.10g}."
        )
    if above is not None and not typed > above:
        raise ConfigError(f"{name} = {in_short(value)} is out of range; it must be above {above:g}.")
    among = info.metadata["among"]
    if isinstance(among, Form):
        typed = typed.strip().lower()
        if not re.fullmatch(among.pattern, typed):
            raise ConfigError(f"{name} = {in_short(value)} is not known; choose {among.words}.")
    elif among is not None and typed not in among:
        raise ConfigError(
            f"{name} = {in_short(value)} is not possible; choose one of {', '.join(map(str, among))}."
        )
    if table is not None:
        choices.chosen(table, typed, name)
        typed = next(key for key, row in table.items() if typed.strip().lower() in (key, row.title.lower()))
    return typed


def _as_type(name: str, kind: Any, value: Any) -> Any:
    if isinstance(kind, types.GenericAlias) or typing.get_origin(kind) is list:
        if isinstance(value, list) and all(isinstance(v, str) and is_unicode(v) for v in value):
            return value
        raise ConfigError(f"{name} = {in_short(value)} should be a list of texts.")
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int | float) and not isinstance(value, bool) and value == int(value):
        return int(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if abs(value) < MAX_INTEGER:
            return float(value)
        raise ConfigError(f"{name} = {in_short(value)} is too large.")
    if kind is str and isinstance(value, str):
        if not is_unicode(value):
            raise ConfigError(f"{name} = {in_short(value)} holds bytes that are not UTF-8; rename it.")
        return value
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    raise ConfigError(f"{name} = {in_short(value)} should be {words[kind]}.")


def in_short(value: Any) -> str:
    """`repr` of a value for a message, cut to 80 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of over 4,300 digits, or a deep list
        text = f"a {type(value).__name__} too long to print"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 1]}…"


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: it holds no lone surrogate."""
    return text == valid_text(text)


def _unknown(name: str, known: list[str]) -> str:
    if len(name) > _LONGEST_SHOWN:
        return f"{name[: _LONGEST_SHOWN - 1]}… is not a setting."
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"; did you mean {close[0]}?" if close else f". The sections are {', '.join(_sections())}."
    return f"{name} is not a setting{hint}"


def _sections() -> list[str]:
    return [f.name for f in dataclasses.fields(RunConfig) if f.default_factory is not dataclasses.MISSING]


def parsed_assignment(text: str) -> tuple[str, Any]:
    """A `section.key=value` of the command line as (name, value).

    The value is read as TOML; what is not TOML is a text, so that nobody has to quote twice.

    Raises:
        ConfigError: there is no `=` or nothing before it, or the value is nested too deeply.
    """
    name, equals, raw = text.partition("=")
    name = name.strip()
    if not equals or not name:
        raise ConfigError(f"--set {in_short(text)} should read section.key=value.")
    try:
        value = parse_toml(f"value = {raw}", f"--set {name}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw
    kinds = {known: info.type for known, info, _ in settings()}
    return name, raw if kinds.get(name) is str and not isinstance(value, str) else value


def load_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ConfigError: the file cannot be read, is no regular file, is larger than 1 MB, or is not TOML.
    """
    try:
        # Opening a pipe would wait for its writer, and a device may never end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConfigError(f"The config {path} is not a regular file.")
        with open(path, "rb") as file:
            data = file.read(MAX_TOML_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"The config {path} cannot be read: {error.strerror or error}.") from error
    if len(data) > MAX_TOML_BYTES:
        raise ConfigError(f"The config {path} is larger than {MAX_TOML_BYTES / 1e6:.0f} MB.")
    try:
        return parse_toml(data.decode("utf-8-sig"), f"The config {path}")
    except UnicodeDecodeError as error:
        raise ConfigError(f"The config {path} cannot be read: it is not UTF-8 text.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"The config {path} is not valid TOML: {error}.") from error


def parse_toml(text: str, source: str) -> dict[str, Any]:
    """The tables of a TOML text by anybody.

    Args:
        text: the TOML.
        source: what messages call it.

    Raises:
        ConfigError: it is nested more than 20 levels deep, or holds an integer of over 64 bits.
        tomllib.TOMLDecodeError: it is not TOML.
    """
    deep = ConfigError(f"{source} is nested more than {MAX_TOML_DEPTH} levels deep.")
    large = ConfigError(f"{source} holds a number that is too large.")
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
        if any(isinstance(v, int) and abs(v) >= MAX_INTEGER for v in level):
            raise large
        inner = [v for v in level if isinstance(v, dict | list)]
        level = [v for table in inner for v in (table.values() if isinstance(table, dict) else table)]
    if level:
        raise deep
    return tables


def to_toml(config: RunConfig) -> str:
    """The config as TOML, complete."""
    return tomli_w.dumps(config.to_dict())


FIELDS: dict[str, dataclasses.Field[Any]] = {name: info for name, info, _ in settings()}
"""Each setting by its dotted name."""
