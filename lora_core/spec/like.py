"""What a LoRA file says of its training, value by value, each checked as if a person had typed it."""

from dataclasses import dataclass, field
from typing import Any

from lora_core.spec.config import FIELDS, checked_value
from lora_core.spec.errors import ConfigError

LONGEST = 80


@dataclass
class Like:
    """What a file says of its training.

    Attributes:
        source: who wrote that down, in words.
        values: dotted name to value, each legal.
        left: a sentence for each thing that could not be taken.
        base: what it was trained on, "" where the file does not say.
    """

    source: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    base: str = ""

    def take(self, name: str, value: Any, called: str = "") -> None:
        """Take a value if it is legal, else say so."""
        try:
            self.values[name] = checked_value(name, FIELDS[name], value)
        except (ConfigError, ValueError, OverflowError):
            title = called or FIELDS[name].metadata["title"]
            self.left.append(f"{title} is {in_short(value)} there, which cannot be set here.")


def in_short(value: Any) -> str:
    """A value as one line that is never long."""
    try:
        text = " ".join(str(value).split())
    except (ValueError, RecursionError):  # an integer of over 4,300 digits, or a deep list
        text = f"a {type(value).__name__} too long to print"
    return f"{text[: LONGEST - 1]}…" if len(text) > LONGEST else text
