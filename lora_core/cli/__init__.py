"""The verbs of the command line by what they are about. Each module adds its verbs by `add_verbs`."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

Verbs = Any
"""What `argparse.ArgumentParser.add_subparsers` gives."""


def say(text: str) -> None:
    """One line on stdout, seen at once also through a pipe."""
    write(sys.stdout, text + "\n")


def write(stream: TextIO, text: str) -> None:
    """Write at once, for as long as there is somebody to read it.

    Work goes on when the reader of the output goes away: `train ... | head` is no reason to lose a run. What
    is still written then goes nowhere, so that the process does not fail on its last flush either.
    """
    try:
        stream.write(text)
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say_json(document: Any) -> None:
    """One JSON document on stdout."""
    say(json.dumps(document, ensure_ascii=False, indent=1))


def add_workspace(verb: argparse.ArgumentParser) -> None:
    """The option that says where runs and caches are kept."""
    verb.add_argument("--workspace", type=Path, help="where runs and caches live; else LORA_EASEL_HOME")


def add_json(verb: argparse.ArgumentParser) -> None:
    """The option for machine-readable output."""
    verb.add_argument("--json", action="store_true", help="one JSON document and nothing else")
