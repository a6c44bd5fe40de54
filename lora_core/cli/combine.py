"""The verb that puts adapters together: merge."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lora_core import api
from lora_core.cli import Verbs, add_workspace, say, write
from lora_core.cli.pictures import loras_of
from lora_core.errors import ConfigError


def add_verbs(verbs: Verbs) -> None:
    """Add this module's verbs."""
    merge = verbs["merge"]
    merge.add_argument(
        "files",
        nargs="+",
        metavar="FILE[:STRENGTH[:TEXT_STRENGTH]]",
        help="an adapter, LoHa, LoKr and DoRA too",
    )
    merge.add_argument(
        "--out", type=Path, required=True, help="the file, or for a base's folder the folder, to make"
    )
    merge.add_argument(
        "--rank", type=int, help="the best LoRA of this rank; else ranks add and nothing is lost"
    )
    merge.add_argument(
        "--blocks",
        default="",
        metavar="TABLE",
        help="a TOML file of pattern = weight, or 'mid_block=0.5,...'",
    )
    merge.add_argument("--precision", choices=["fp32", "fp16", "bf16"], help="of the merged file, else fp32")
    merge.add_argument("--base", default="", help="the base of a DoRA, whose weights its update depends on")
    merge.add_argument("--into-base", default="", metavar="B", help="merge into a copy of this base instead")
    add_workspace(merge)
    merge.set_defaults(run=_merge)


SECONDS_BETWEEN_NOTES = 5.0


def slow_note() -> Callable[[int, int], None]:
    """Says on stderr now and then how far long work is."""
    last = time.monotonic()

    def note(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > SECONDS_BETWEEN_NOTES:
            last = time.monotonic()
            write(sys.stderr, f"{done} of {total} layers\n")

    return note


def _merge(options: argparse.Namespace) -> int:
    loras = loras_of(options.files, options.workspace)
    if options.into_base:
        given = [f"--{n}" for n in ("rank", "base", "precision") if getattr(options, n) not in (None, "")]
        if given:
            raise ConfigError(
                f"{given[0]} goes with a merged adapter, not with --into-base: there the base's own precision"
                " stays and nothing is approximated."
            )
    if options.into_base:
        said = api.merge_into_base(loras, options.into_base, options.out, options.blocks)
    else:
        how = (options.rank, options.blocks, options.precision or "fp32", options.base, slow_note())
        said = api.merge(loras, options.out, *how)
    for sentence in said:
        say(sentence)
    say(str(options.out))
    return 0
