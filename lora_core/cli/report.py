"""The verb `report`: a run as one HTML file that can be passed on."""

import argparse
import sys
import time
from pathlib import Path

from lora_core import api
from lora_core.cli import Verbs, add_json, add_run, named_run, say, say_json, write
from lora_core.cli.combine import SECONDS_BETWEEN_NOTES


def add_verbs(verbs: Verbs) -> None:
    """Add this module's verbs."""
    report = verbs["report"]
    add_run(report)
    report.add_argument("--out", type=Path, metavar="F.html", help="else report.html in the run's folder")
    report.add_argument(
        "--no-measure", action="store_true", help="without intrinsic rank and strength, which need the base"
    )
    add_json(report)
    report.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    run = named_run(options)
    last = time.monotonic()

    def tell(words: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > SECONDS_BETWEEN_NOTES:
            last = time.monotonic()
            write(sys.stderr, f"{words}, {done} of {total}\n")

    page = api.report(run.path, options.out, not options.no_measure, said=tell)
    if options.json:
        say_json({"file": str(page), "bytes": page.stat().st_size})
    else:
        say(str(page))
    return 0
