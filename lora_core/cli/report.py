"""The verb `report`: a run as one HTML file that can be passed on."""

import argparse
import sys
import time
from pathlib import Path

from lora_core.cli import Verbs, add_json, add_run, named_run, say, say_json, write
from lora_core.cli.combine import SECONDS_BETWEEN_NOTES


def add_verbs(verbs: Verbs) -> None:
    """Add this module's verbs."""
    report = verbs.add_parser("report", help="a run as one self-contained page")
    add_run(report)
    report.add_argument("--out", type=Path, metavar="F.html", help="else report.html in the run's folder")
    report.add_argument(
        "--no-measure", action="store_true", help="without intrinsic rank and strength, which need the base"
    )
    add_json(report)
    report.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    run = named_run(options)
    from lora_core.report.page import FILE_NAME, write_report

    out = options.out or run.path / FILE_NAME
    last = time.monotonic()

    def tell(words: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > SECONDS_BETWEEN_NOTES:
            last = time.monotonic()
            write(sys.stderr, f"{words}, {done} of {total}\n")

    size = write_report(run, out, not options.no_measure, tell, time.time())
    if options.json:
        say_json({"file": str(out), "bytes": size})
    else:
        say(str(out))
    return 0
