"""A weight for each block of a model: patterns over layer names, from a TOML file or from the command
line."""

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_core.adapters.weights import LayerKey
from lora_core.spec.config import load_toml, parse_toml
from lora_core.spec.errors import ConfigError
from lora_core.spec.patterns import Pattern, PatternError

_INLINE = re.compile(r"\s*([^=,]+?)\s*=\s*(\[[^\]]*\]|[^,\[\]]+?)\s*(?:,|$)")


@dataclass(frozen=True)
class Blocks:
    """Weights of layers, one for each of the merged files; of the rows that match a layer the last counts.

    Attributes:
        rows: a pattern that is looked for in "part.path", and a weight for each file.
    """

    rows: tuple[tuple[Pattern, tuple[float, ...]], ...] = ()

    def weight(self, layer: LayerKey, file: int) -> float:
        """The weight of a layer in the file of that number; 1 where no row matches."""
        name = ".".join(layer)
        return next((weights[file] for row, weights in reversed(self.rows) if row.search(name)), 1.0)

    def check(self, layers: Iterable[LayerKey]) -> None:
        """Refuse a row that changes nothing, which is a slip of the pen.

        Raises:
            ConfigError: names the pattern that matches no layer.
        """
        names = [".".join(layer) for layer in layers]
        for row, _ in self.rows:
            if not any(map(row.search, names)):
                raise ConfigError(
                    f"The pattern {row.text!r} of --blocks matches no layer of these files; their layers"
                    f" are named like {names[0] if names else 'unet.mid_block...'}."
                )


def blocks_of(text: str, files: int) -> Blocks:
    """The table that `--blocks` gives.

    Args:
        text: a TOML file of `pattern = weight` and `pattern = [weight, ...]`, or the same rows inline with
            commas between.
        files: how many are merged; a list has one weight for each.

    Raises:
        ConfigError: a row is no such thing.
    """
    path = Path(text).expanduser()
    rows = dict(_flattened(_from_file(path))) if path.is_file() or path.suffix == ".toml" else _inline(text)
    return Blocks(tuple((_pattern(name), _weights(name, value, files)) for name, value in rows.items()))


def _from_file(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ConfigError(f"The table {path} of --blocks does not exist.")
    return load_toml(path)


def _flattened(table: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    """Rows of nested tables joined by dots, since TOML takes an unquoted `up_blocks.1` for a nested table."""
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _inline(text: str) -> dict[str, Any]:
    rows, place = {}, 0
    while match := _INLINE.match(text, place):
        rows[match[1]] = match[2]
        place = match.end()
    if not rows or text[place:].strip():
        raise ConfigError(
            f"--blocks {text!r} is neither a TOML file nor a table such as 'mid_block=0.5,up_blocks.1=0'."
        )
    try:
        return {
            name: parse_toml(f"value = {value}", f"--blocks {name}")["value"] for name, value in rows.items()
        }
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--blocks {text!r} holds a weight that is not a number.") from error


def _pattern(name: str) -> Pattern:
    try:
        return Pattern(name)
    except PatternError as error:
        raise ConfigError(f"The pattern {name!r} of --blocks cannot be used: {error}.") from error


def _weights(name: str, value: Any, files: int) -> tuple[float, ...]:
    values = value if isinstance(value, list) else [value] * files
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e6]
    if len(numbers) != len(values):
        raise ConfigError(f"{name} = {value!r} of --blocks should be a number, or a list of numbers.")
    if len(numbers) != files:
        raise ConfigError(
            f"{name} of --blocks lists {len(numbers)} weights for {files} files; give one number for all or"
            " one for each file."
        )
    return tuple(float(number) for number in numbers)
