"""Cleans text and JSON from files and pages, so that they can be kept, written and shown."""

import dataclasses
import json
import math
import re
import types
import typing
from typing import Any, TypeVar

from lora_core.system.paths import clean_text

_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_DECODER = json.JSONDecoder(parse_constant=lambda _: None)
LARGEST = 2**63 - 1

T = TypeVar("T")


def clean_value(value: Any) -> Any:
    """A JSON value with valid texts alone, and null for numbers that JSON or 64 bits cannot hold."""
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, dict):
        return {clean_text(k) if isinstance(k, str) else k: clean_value(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean_value(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if not isinstance(value, int) or abs(value) <= LARGEST else None


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text, its texts made valid; NaN and Infinity, which are no JSON, become null.

    Raises:
        ValueError: it is not JSON, or nested too deep to be read.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        value = _DECODER.decode(text)
        return clean_value(value) if _ESCAPED_SURROGATE.search(text) else value
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def check_fields(kind: type[T], values: Any) -> T:
    """An instance of a dataclass, each value of the type that its field says.

    Raises:
        TypeError: `values` is no table, lacks a field or has one that is unknown or of another type.
    """
    fields = {one.name: one.type for one in dataclasses.fields(typing.cast(Any, kind))}
    for name, value in dict(values).items():
        if name in fields and not _fits(value, fields[name]):
            raise TypeError(f"{name} = {str(value)[:80]!r}")
    return kind(**values)


def _fits(value: Any, kind: Any) -> bool:
    if kind is float:
        return type(value) in (int, float) and (math.isnan(value) or abs(value) <= LARGEST)
    if kind is int:
        return type(value) is int and abs(value) <= LARGEST
    if kind in (str, bool):
        return isinstance(value, kind)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return value in inner
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(one, inner[0]) for one in value)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, one) for one in inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(one, inner[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(one, inner[1]) for one in value.values())
    return kind is Any or isinstance(value, kind)
