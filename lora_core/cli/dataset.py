"""Verbs about the pictures of a dataset: audit, probe, pictures."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_core import api
from lora_core.cli import Verbs, add_json, add_run, add_workspace, named_run, say, say_json, write
from lora_core.data.dataset import summarize_notes
from lora_core.data.scan import FileProblem

_MOST_TAGS = 20
_MOST_NAMES = 6
_MOST_WEAK = 5


def add_verbs(verbs: Verbs) -> None:
    """Add this module's verbs."""
    verb = verbs["audit"]
    verb.add_argument("dataset", metavar="DATASET", help="a folder of pictures, a zip of one, or `demo`")
    verb.add_argument("--base", default="demo", metavar="B", help="the base that it is for")
    verb.add_argument(
        "--resolution", type=int, default=0, metavar="PX", help="0: what the base was trained at"
    )
    verb.add_argument("--trigger", default="", metavar="WORD", help="which may stand in every caption")
    verb.add_argument(
        "--batch", type=int, default=1, metavar="N", help="pictures a batch, for the shares of the steps"
    )
    add_workspace(verb)
    add_json(verb)
    verb.set_defaults(run=_audit)
    _add_probe(verbs)
    _add_pictures(verbs)


def _add_probe(verbs: Verbs) -> None:
    verb = verbs["probe"]
    verb.add_argument("dataset", metavar="DATASET", help="a folder of pictures, a zip of one, or `demo`")
    verb.add_argument("--base", default="demo", metavar="B", help="the base that is asked")
    verb.add_argument("--triples", type=int, default=4, help="looks a picture")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--trigger", default="", metavar="WORD", help="the trigger word, to be measured too")
    add_workspace(verb)
    add_json(verb)
    verb.set_defaults(run=_probe)


def _add_pictures(verbs: Verbs) -> None:
    verb = verbs["pictures"]
    add_run(verb)
    verb.add_argument(
        "--checkpoint", default="best", metavar="STEP", help="best, last, or the step of a checkpoint"
    )
    verb.add_argument("--triples", type=int, default=8, help="looks a picture")
    add_json(verb)
    verb.set_defaults(run=_pictures)


def _audit(options: argparse.Namespace) -> int:
    how = (options.base, options.resolution, options.trigger, options.batch, options.workspace)
    found = api.audit(options.dataset, *how)
    if options.json:
        say_json(found)
    else:
        _say_findings(found)
    return 0


def _say_findings(found: dict[str, Any]) -> None:
    say(f"{found['pictures']} pictures, {found['captions']} with a caption.")
    rows = [FileProblem(Path(row["picture"]), row["kind"], row["sentence"]) for row in found["problems"]]
    for row in summarize_notes(rows):
        say(f"  {row.kind}: {row.sentence}")
    if all(row.kind == "hidden" for row in rows):
        say("Nothing is wrong with them.")
    tags = [f"{one['tag']} ({one['pictures']})" for one in found["tags"][:_MOST_TAGS]]
    if tags:
        say(f"Most frequent tags: {', '.join(tags)}.")
    if found["learned"]:
        say("What will be learned:")
    for row in found["learned"]:
        say(f"  {row['kind']}: {row['sentence']}")
        if row["kind"] in ("absorbed", "meaning"):
            shown = [Path(path).name for path in row["pictures"][:_MOST_NAMES]]
            more = len(row["pictures"]) - len(shown)
            say(f"    {', '.join(shown)}{f' and {more} more' if more else ''}")


def _probe(options: argparse.Namespace) -> int:
    how = (options.base, options.triples, options.seed, options.trigger, options.workspace)
    found = api.probe(options.dataset, *how, note=_counter("captions and words"))
    if options.json:
        say_json(found)
        return 0
    say(
        f"With captions the base's loss is lower by {found['helped']:.4f} (standard error"
        f" {found['standard_error']:.4f}) than without, over {len(found['rows'])} pictures."
    )
    suspects = [row for row in found["rows"] if row["suspect"]]
    for row in suspects:
        say(f"  {row['sentence']}")
    if not suspects:
        say("No caption fits another picture better than its own. The weakest:")
        for row in found["rows"][:_MOST_WEAK]:
            say(
                f"  {row['fits']:+.3f} ± {row['fits_error']:.3f}  {Path(row['picture']).name}:"
                f" {row['caption']}"
            )
    say("Words for a trigger, by how little the base reacts to them:")
    for row in found["trigger"]["rows"]:
        say(f"  {row['sentence']}")
    return 0


def _pictures(options: argparse.Namespace) -> int:
    run = named_run(options)
    found = api.pictures(run.path, options.checkpoint, options.triples, note=_counter("pictures"))
    if options.json:
        say_json(found)
        return 0
    say(
        f"Step {found['step']}, those that stand out first, then by what was learned; in"
        f" {run.path / 'pictures.json'}."
    )
    for row in found["rows"]:
        held = "  held out" if row["held_out"] else f"  {row['share']:.1%} of the steps"
        helps = "" if row["helps"] is None else f"  caption {row['helps']:+.4f}"
        say(
            f"  {row['learned']:4.0%}  gain {row['gain']:+.4f} ± {row['standard_error']:.4f} of"
            f" {row['base_loss']:.4f}{helps}{held}  {Path(row['picture']).name}"
        )
    for row in found["rows"]:
        if row["suspect"]:
            say(row["sentence"])
    return 0


def _counter(what: str) -> Callable[[int, int], None] | None:
    """Counts on a terminal's last line, where there is one."""
    if not sys.stderr.isatty():
        return None

    def said(done: int, total: int) -> None:
        end = "\n" if done == total else ""
        write(sys.stderr, f"Measuring {what}: {done} of {total}{end}", over=True)

    return said
