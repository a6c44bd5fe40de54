"""How a setting is declared: a dataclass field that carries all there is to know of it."""

from dataclasses import field
from typing import Any, Literal, NamedTuple

from lora_core.spec.choices import Table

AUTO: Literal["auto"] = "auto"
NumberOrAuto = float | Literal["auto"]
"""Type of a setting that is a number, or `auto` where the base decides it."""


class Form(NamedTuple):
    """The form of a text: a regular expression that it has to match, and the legal texts in words."""

    pattern: str
    words: str


def setting(
    default: Any,
    title: str,
    help: str,
    *,
    span: tuple[float, float] | None = None,
    above: float | None = None,
    among: "tuple[int, ...] | Form | None" = None,
    table: Table | None = None,
) -> Any:
    """A dataclass field that carries what people and programs need to know of it.

    Args:
        default: the value where none is given; a list or a table of patterns is copied for each config.
        title: the label in the window.
        help: one or two sentences: what it does and when to change it.
        span: smallest and largest legal value, both included; of a table, each of its values.
        above: values must be larger than this.
        among: the only legal numbers, or the form of the legal texts.
        table: the legal names, as a table of choices.
    """
    metadata = {
        "title": title,
        "help": help,
        "span": span,
        "above": above,
        "among": among,
        "table": table,
    }
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)
