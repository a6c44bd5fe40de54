"""The verb about a dataset: audit."""

import argparse
from pathlib import Path
from typing import Any

from lora_core.cli import Verbs, add_json, add_workspace, say, say_json
from lora_core.dataset.audit import audit
from lora_core.dataset.folder import open_dataset
from lora_core.dataset.learned import Training
from lora_core.spec.base_facts import base_facts
from lora_core.spec.errors import ConfigError
from lora_core.spec.paths import workspace

_MOST_TAGS = 20
_MOST_NAMES = 6


def add_verbs(verbs: Verbs) -> None:
    """Add this module's verb."""
    verb = verbs.add_parser("audit", help="what is wrong with a dataset, and what will be learned from it")
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


def _audit(options: argparse.Namespace) -> int:
    if not 1 <= options.batch <= 1024:
        raise ConfigError(f"--batch {options.batch} is out of range; it goes from 1 to 1024.")
    facts = base_facts(options.base)
    dataset = open_dataset(options.dataset, workspace(options.workspace) / "cache" / "datasets")
    resolution = options.resolution or facts.resolution
    training = Training(resolution, facts.multiple, facts.tokenizer, options.trigger, options.batch)
    found = audit(dataset, training)
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
    if found["learned"]:
        say("What will be learned:")
    for row in found["learned"]:
        say(f"  {row['kind']}: {row['sentence']}")
        if row["kind"] == "absorbed":
            shown = [Path(path).name for path in row["pictures"][:_MOST_NAMES]]
            more = len(row["pictures"]) - len(shown)
            say(f"    {', '.join(shown)}{f' and {more} more' if more else ''}")
