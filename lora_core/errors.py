"""The errors that a person can cause. Each message names the thing, the value and what to do.

Everything that is not a `LoraError` is a defect of the program and keeps its traceback.
"""


class LoraError(Exception):
    """A problem that a person can fix: shown as one sentence, exit code 1."""


class ConfigError(LoraError):
    """A setting that does not exist, has the wrong type or lies out of range."""


class DatasetError(LoraError):
    """Pictures or captions that cannot be used as they are."""


class ModelFileError(LoraError):
    """A base model that is missing, broken, or of a kind that cannot be trained here."""


class AdapterFileError(LoraError):
    """An adapter file that is missing, broken, or does not fit the base."""


class RunError(LoraError):
    """A run folder in a state that does not allow what was asked."""


class InputsChanged(RunError):
    """What a run follows from is not what it began with; it goes on only if a person accepts that."""

    def __init__(self, sentence: str, changed: list[str]) -> None:
        """Say it in `sentence`; `changed` names all that differs."""
        super().__init__(sentence)
        self.changed = changed


class NoRoom(RunError):
    """The drive of a run is full, gone or read-only: the run is paused, and goes on when that is mended."""


class OutOfMemory(LoraError):
    """The device has too little memory for the settings; names the two settings to lower."""
