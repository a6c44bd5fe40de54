"""Verbs about what a workspace keeps (caches, trash, who is told when a run ends) and about the computer."""

import argparse
import time

from lora_core import api
from lora_core.cli import Verbs, add_json, add_workspace, file_size, say, say_json


def add_verbs(verbs: Verbs) -> None:
    """Add this module's verbs."""
    functions = {
        "caches list": _caches, "caches clean": _clean,
        "doctor": _doctor, "trash list": _trash, "trash restore": _restore, "trash empty": _empty,
    }  # fmt: skip
    notify = verbs["notify"]
    notify.add_argument("whom", metavar="COMMAND|URL", nargs="?", help="keep it; '' for nobody")
    notify.add_argument("--test", action="store_true", help="tell them now")
    add_workspace(notify)
    notify.set_defaults(run=_notify)
    verbs["trash restore"].add_argument("name", metavar="NAME", help="its name, or the id that `list` shows")
    for name, function in functions.items():
        add_workspace(verbs[name])
        verbs[name].set_defaults(run=function)
    for name in ("caches list", "trash list", "doctor"):
        add_json(verbs[name])


def _notify(options: argparse.Namespace) -> int:
    say(api.notify(options.whom, options.test, options.workspace) or "Nobody is told when a run ends.")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    found = api.doctor(options.workspace)
    if options.json:
        say_json(found)
        return 0 if found["ok"] else 1
    for row in found["checks"]:
        say(f"{'ok   ' if row['ok'] else 'WRONG'}  {row['name']}: {row['found']}")
        if row["fix"]:
            say(f"       {row['fix']}")
    wrong = sum(not row["ok"] for row in found["checks"])
    say("Nothing is wrong." if found["ok"] else f"{wrong} wrong; the line below each says what to do.")
    return 0 if found["ok"] else 1


def _caches(options: argparse.Namespace) -> int:
    sizes = api.caches_list(options.workspace)
    if options.json:
        say_json(sizes)
        return 0
    for name, size in sizes.items():
        say(f"{name:10} {file_size(size)}")
    if not sizes:
        say("There are no caches.")
    return 0


def _clean(options: argparse.Namespace) -> int:
    say(f"{file_size(api.caches_clean(options.workspace))} freed")
    return 0


def _trash(options: argparse.Namespace) -> int:
    rows = api.trash_list(options.workspace)
    if options.json:
        say_json(rows)
        return 0
    for row in rows:
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["time"]))
        say(f"{row['id']}  {day}  {row['kind']:8} {row['name']}")
    if not rows:
        say("The trash is empty.")
    return 0


def _restore(options: argparse.Namespace) -> int:
    say(str(api.trash_restore(options.name, options.workspace)))
    return 0


def _empty(options: argparse.Namespace) -> int:
    say(f"{file_size(api.trash_empty(options.workspace))} freed")
    return 0
