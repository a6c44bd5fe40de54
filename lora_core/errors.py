"""The errors that a user can cause. Each message names the thing, the value and what to do.

Everything that is not a `LoraError` is a defect of the program and keeps its traceback.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import ClassVar

LONGEST_SENTENCE = 10_000
"""Characters of a message; what others send can be of any length."""
LONGEST_REASON = 300
_LONG_WORD = re.compile(r"(\S{200})\S{250,}(\S{50})")


def clip_message(text: str) -> str:
    """A message without the middle of a very long word and without a very long end."""
    short = _LONG_WORD.sub(r"\1…\2", text)
    return short if len(short) <= LONGEST_SENTENCE else f"{short[: LONGEST_SENTENCE - 1]}…"


class LoraError(Exception):
    """A problem that a user can fix: one sentence, exit code 1.

    Attributes:
        cause: the kind of problem in a run's events; see `runs.events.Failed`.
    """

    cause: ClassVar[str] = "other"

    def __init__(self, sentence: str = "") -> None:
        """`sentence` is clipped by `clip_message`."""
        super().__init__(clip_message(sentence))


class ConfigError(LoraError):
    """A setting that does not exist, has the wrong type or is out of range."""

    cause = "settings"


class DatasetError(LoraError):
    """Images or captions that cannot be used as they are."""

    cause = "data"


class ModelFileError(LoraError):
    """A base model that is missing, broken, or of a kind that cannot be trained here."""

    cause = "base"


class AdapterFileError(LoraError):
    """An adapter file that is missing, broken, or does not fit the base."""

    cause = "adapter"


class RunError(LoraError):
    """A run folder whose state does not allow the request."""

    cause = "run"


class InputsChanged(RunError):
    """The inputs of a run have changed since it began; it continues only if the user accepts that."""

    cause = "inputs_changed"

    def __init__(self, sentence: str, changed: list[str]) -> None:
        super().__init__(sentence)
        self.changed = changed


class NoRoom(RunError):
    """The drive of a run is full, gone or read-only: the run is paused and can be resumed later."""

    cause = "disk_full"


class Diverged(RunError):
    """Training diverged again after all rollbacks."""

    cause = "diverged"


class ProcessLost(RunError):
    """Another process of a run ended."""

    cause = "process_lost"


class OutOfMemory(LoraError):
    """The device has too little memory for the settings; names the two settings to lower."""

    cause = "out_of_memory"


def count_words(count: int, noun: str) -> str:
    """`1 layer`, `2 layers`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def first_line(error: Exception) -> str:
    """The first line of what a library says, without a period, or the name of the error where it says
    nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:LONGEST_REASON].rstrip(".")


@contextlib.contextmanager
def wrap_os_errors(kind: type[LoraError], failed: str, advice: str = ".") -> Iterator[None]:
    """Raise an OSError of the body as a `kind`: `failed` ("X cannot be written"), the reason that the system
    gives, and `advice`, which ends the sentence ("; free some space.")."""
    try:
        yield
    except OSError as error:
        raise kind(f"{failed}: {error.strerror or error}{advice}") from error
