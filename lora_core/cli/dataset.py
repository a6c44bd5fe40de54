"""The verb about a dataset: audit."""

import argparse
from pathlib import Path
from typing import Any

from lora_core.cli import Verbs, add_json, add_workspace, say, say_json
from lora_core.dataset.audit import audit
from lora_core.dataset.folder import open_dataset
from lora_core.spec.base_facts import base_facts
from lora_core.spec.paths import workspace

_MOST_TAGS = 20
_OFTEN = 2.0
"""A picture whose share of the looks is this many times the even one is named."""


def add_verbs(verbs: Verbs) -> None:
    """Add this module's verb."""
    verb = verbs.add_parser("audit", help="what is wrong with a dataset, and what will be learned from it")
    verb.add_argument("dataset", metavar="DATASET", help="a folder of pictures, a zip of one, or `demo`")
    verb.add_argument("--base", default="demo", metavar="B", help="the base that it is for")
    verb.add_argument(
        "--resolution", type=int, default=0, metavar="PX", help="0: what the base was trained at"
    )
    verb.add_argument("--trigger", default="", metavar="WORD", help="which may stand in every caption")
    add_workspace(verb)
    add_json(verb)
    verb.set_defaults(run=_audit)


def _audit(options: argparse.Namespace) -> int:
    facts = base_facts(options.base)
    dataset = open_dataset(options.dataset, workspace(options.workspace) / "cache" / "datasets")
    resolution = options.resolution or facts.resolution
    found = audit(dataset, resolution, facts.multiple, facts.tokenizer, options.trigger)
    if options.json:
        say_json(found)
    else:
        _say_findings(found)
    return 0


def _say_findings(found: dict[str, Any]) -> None:
    say(f"{found['pictures']} pictures, {found['captions']} with a caption.")
    for problem in found["problems"]:
        say(f"  {problem['kind']}: {problem['sentence']}")
    if not found["problems"]:
        say("Nothing is wrong with them.")
    tags = [f"{one['tag']} ({one['pictures']})" for one in found["tags"][:_MOST_TAGS]]
    if tags:
        say(f"Most frequent tags: {', '.join(tags)}.")
    even = 1 / max(1, found["pictures"])
    for share in found["shares"]:
        if share["share"] > _OFTEN * even:
            say(f"  {Path(share['picture']).name} gets {share['share']:.0%} of all looks, by its repeats.")
