"""Verbs about adapter files: inspect, convert, verify."""

import argparse
from pathlib import Path
from typing import Any

from lora_core import api
from lora_core.cli import Verbs, add_file, add_json, add_workspace, say, say_json
from lora_core.errors import AdapterFileError, RunError
from lora_core.runs.folder import find_run


def add_verbs(verbs: Verbs) -> None:
    """Add this module's verbs."""
    inspect = verbs["inspect"]
    add_file(inspect, "file")
    add_workspace(inspect)
    inspect.add_argument(
        "--spectrum", action="store_true", help="the singular values of each layer, and ranks"
    )
    add_json(inspect)
    inspect.set_defaults(run=_inspect)
    copy = verbs["copy"]
    copy.add_argument("file", metavar="FILE", type=Path, help="an adapter, or a run: its export")
    copy.add_argument("--to", required=True, metavar="FOLDER|TOOL", help="such as ~/loras, or comfyui")
    add_workspace(copy)
    copy.set_defaults(run=_copy)
    convert = verbs["convert"]
    add_file(convert, "source", metavar="IN")
    add_workspace(convert)
    convert.add_argument("target", metavar="OUT", type=Path)
    convert.add_argument("--to", required=True, choices=["kohya", "diffusers"])
    convert.add_argument("--keep-alphas", action="store_true", help="keep an alpha of its own for each layer")
    convert.set_defaults(run=_convert)
    verify = verbs["verify"]
    add_file(verify, "file")
    add_workspace(verify)
    verify.add_argument("--base", default="", help="the base that it is for, where the file does not say it")
    add_json(verify)
    verify.set_defaults(run=_verify)


def _inspect(options: argparse.Namespace) -> int:
    report = api.inspect(options.file, options.spectrum)
    if options.json:
        say_json(report)
    else:
        for key, value in report.items():
            if key not in ("metadata", "problem", "layers", "left_out", "extras"):
                say(f"{key:13} {value}")
        for key, value in sorted(report["metadata"].items()):
            say(f"  {key}: {value if len(value) <= 100 else value[:97] + '...'}")
        _say_spectrum(report)
        if report["extras"]:
            say(f"Note: {report['extras']}")
    if report["problem"]:
        raise AdapterFileError(report["problem"])
    return 0


def _say_spectrum(spectrum: dict[str, Any]) -> None:
    for row in spectrum.get("layers", ()):
        say(
            f"{row['part']}.{row['module']}: rank {row['rank']}, effective {row['effective_rank']:.1f}, 90%"
            f" of the energy in {row['rank90']}, 99% in {row['rank99']}, norm {row['norm']:.4g}"
        )
    for row in spectrum.get("left_out", ()):
        say(f"{row['part']}.{row['module']} is left out: {row['reason']}")


def _copy(options: argparse.Namespace) -> int:
    file = options.file
    if not file.exists() and not file.suffix:
        run = find_run(file, options.workspace)
        file = run.path / (run.progress().export or "export")
        if not file.is_file():
            raise RunError(f"The run {run.name} has no exported file; make one by `export {run.name}`.")
    done = api.copy(file, options.to, options.workspace)
    if done["kept"]:
        say(f"Note: {', '.join(done['kept'])} differs and stays as it is.")
    say(done["file"])
    return 0


def _convert(options: argparse.Namespace) -> int:
    for note in api.convert(options.source, options.target, options.to, options.keep_alphas):
        say(f"Note: {note}")
    say(str(options.target))
    return 0


def _verify(options: argparse.Namespace) -> int:
    report = api.verify(options.file, options.base)
    if options.json:
        say_json(report)
    else:
        say(f"{options.file.name}: {report['kind']} in the {report['format']} format, for {report['family']}")
        for row in report["tools"]:
            say(
                f"{'✓' if row['ok'] else '✗'} {row['tool']:10} {row['matched']:5} of {row['keys']} keys "
                f" {row['note']}"
            )
        if report["extras"]:
            say(f"convert, merge and generate: {report['extras']}")
    return 0 if report["ok"] else 1
