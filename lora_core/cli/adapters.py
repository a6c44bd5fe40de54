"""Verbs about adapter files: inspect, convert."""

import argparse
from pathlib import Path

from lora_core.cli import Verbs, add_json, say, say_json
from lora_core.spec.errors import AdapterFileError


def add_verbs(verbs: Verbs) -> None:
    """Add this module's verbs."""
    inspect = verbs.add_parser("inspect", help="what an adapter file is, whoever wrote it")
    inspect.add_argument("file", type=Path)
    add_json(inspect)
    inspect.set_defaults(run=_inspect)
    convert = verbs.add_parser("convert", help="translate an adapter file to another format")
    convert.add_argument("source", metavar="IN", type=Path)
    convert.add_argument("target", metavar="OUT", type=Path)
    convert.add_argument("--to", required=True, choices=["kohya", "diffusers"])
    convert.add_argument("--keep-alphas", action="store_true", help="keep an alpha of its own for each layer")
    convert.set_defaults(run=_convert)


def _inspect(options: argparse.Namespace) -> int:
    from lora_core.formats.inspect import inspect_file

    report = inspect_file(options.file)
    if options.json:
        say_json(report)
        return 0
    for key, value in report.items():
        if key != "metadata":
            say(f"{key:13} {value}")
    for key, value in sorted(report["metadata"].items()):
        say(f"  {key}: {value if len(value) <= 100 else value[:97] + '...'}")
    return 0


def _convert(options: argparse.Namespace) -> int:
    if options.target.exists():
        raise AdapterFileError(f"{options.target} exists already; choose another name or remove it first.")
    from lora_core.formats.convert import converted

    for note in converted(options.source, options.target, options.to, options.keep_alphas):
        say(f"Note: {note}")
    say(str(options.target))
    return 0
