"""The command line's options by what they are about. Each module adds those of its verbs by `add_verbs`."""

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from lora_core.errors import AdapterFileError, RunError
from lora_core.runs.folder import RunFolder, find_run

Verbs = Mapping[str, argparse.ArgumentParser]
"""The parser of each verb by its name, as `lora_core.verbs` has it."""


_ERASE_LINE = "\r\x1b[2K"
_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters but tab and newline, and the marks that change the direction of text."""


def printable(text: str) -> str:
    """A text with control characters written out, such as `\\x1b`: names and files by others may hold any."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def say(text: str) -> None:
    """One line on stdout, seen at once also through a pipe."""
    write(sys.stdout, text + "\n")


def write(stream: TextIO, text: str, over: bool = False) -> None:
    """Write at once, for as long as there is somebody to read it.

    Work goes on when the reader of the output goes away: `train ... | head` is no reason to lose a run. What
    is still written then goes nowhere, so that the process does not fail on its last flush either.

    Args:
        stream: where.
        text: control characters in it are written out.
        over: whether it replaces the line that the cursor is in.
    """
    try:
        stream.write((_ERASE_LINE if over else "") + printable(text))
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say_json(document: Any) -> None:
    """One JSON document on stdout."""
    text = json.dumps(document, ensure_ascii=False, indent=1)
    # Within JSON a control character is written out as JSON does it, so that it is read back as it was.
    say(_CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def file_size(size: int) -> str:
    """Bytes in the largest fitting unit."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"


def add_workspace(verb: argparse.ArgumentParser) -> None:
    """The option that says where runs and caches are kept."""
    verb.add_argument("--workspace", type=Path, help="where runs and caches live; else LORA_EASEL_HOME")


def add_run(verb: argparse.ArgumentParser) -> None:
    """The argument that names a run, and the workspace that it may be in; `named_run` reads them."""
    verb.add_argument("run_name", metavar="RUN", help="a run's folder, or its name in the workspace")
    add_workspace(verb)


def named_run(options: argparse.Namespace) -> RunFolder:
    """The run that a command line names.

    Raises:
        RunError: there is none.
    """
    return find_run(options.run_name, options.workspace)


def add_file(verb: argparse.ArgumentParser, name: str, **how: Any) -> None:
    """An argument that names an adapter file, or a run's checkpoint as `adapter_file` does.

    `find_files` puts the file in its place; the verb has to have a workspace.
    """
    verb.add_argument(name, type=Path, **how)
    before = verb.get_default("file_arguments") or ()
    verb.set_defaults(file_arguments=(*before, name.lstrip("-")))


def find_files(options: argparse.Namespace) -> None:
    """Put the files in place of the runs that a command line names.

    Raises:
        LoraError: as `adapter_file`.
    """
    for name in getattr(options, "file_arguments", ()):
        path = getattr(options, name)
        # What looks like a file is the verb's to miss.
        if path is not None and not path.exists() and ("@" in path.name or not path.suffix):
            setattr(options, name, adapter_file(str(path), options.workspace))


def adapter_file(text: str, place: Path | None) -> Path:
    """An adapter file, or that of a run's checkpoint: RUN (the best one) or RUN@STEP; a file comes first.

    Raises:
        AdapterFileError: there is neither.
        RunError: the run has no such checkpoint.
    """
    if Path(text).exists():
        return Path(text)
    name, at, step = text.rpartition("@")
    name, step = (name, step) if at else (text, "best")
    try:
        run = find_run(name, place)
    except RunError as error:
        file = len(Path(text).parts) != 1 or Path(text).suffix
        raise AdapterFileError(f"The adapter {text} does not exist{'.' if file else f': {error}'}") from error
    return run.checkpoint(run.step_of(step)) / "adapter.safetensors"


def add_json(verb: argparse.ArgumentParser) -> None:
    """The option for machine-readable output."""
    verb.add_argument("--json", action="store_true", help="one JSON document and nothing else")
