"""Verbs about projects, their pictures and captions."""

import argparse
from collections.abc import Callable
from typing import Any

from lora_core import api
from lora_core.cli import Verbs, add_json, add_workspace, file_size, say, say_json

DATASET = "a folder of pictures, or a project's name"


def add_verbs(verbs: Verbs) -> None:
    """Add this module's verbs."""
    _add_projects(verbs)
    _add_pictures(verbs)
    _add_captions(verbs)


def _add_projects(verbs: Verbs) -> None:
    functions = {
        "list": _list,
        "new": _new,
        "open": _open,
        "rename": _rename,
        "delete": _delete,
        "import": _import,
    }
    for part, function in functions.items():
        verb = verbs[f"projects {part}"]
        add_workspace(verb)
        verb.set_defaults(run=function)
        if part not in ("list", "new"):
            verb.add_argument("project", metavar="PROJECT", help="its title, or its folder's name")
        if part in ("new", "rename"):
            verb.add_argument("title", metavar="TITLE")
    add_json(verbs["projects list"])
    verbs["projects import"].add_argument("source", metavar="SOURCE", help="a folder, a zip or a picture")
    verbs["projects import"].add_argument(
        "--link", action="store_true", help="link files in place of copying"
    )


def _add_pictures(verbs: Verbs) -> None:
    for name, function in (("leave-out", _leave_out), ("take-back", _take_back), ("hold-out", _hold_out)):
        verb = verbs[name]
        verb.add_argument("dataset", metavar="DATASET", help=DATASET)
        many = "*" if name == "take-back" else "+"
        verb.add_argument("pictures", metavar="PICTURE", nargs=many, help="its path below the folder")
        add_workspace(verb)
        verb.set_defaults(run=function)
    verbs["hold-out"].add_argument("--undo", action="store_true", help="have them trained on again")


def _add_captions(verbs: Verbs) -> None:
    words = {
        "replace": ("FIND", "PUT"), "prefix": ("TEXT",), "suffix": ("TEXT",), "rename-tag": ("TAG", "NEW"),
        "delete-tag": ("TAG",), "trigger": ("WORD",), "set": ("PICTURE", "TEXT"), "undo": (),
    }  # fmt: skip
    functions: dict[str, Callable[[argparse.Namespace], int]] = {"set": _set, "undo": _undo}
    for part, names in words.items():
        verb = verbs[f"captions {part}"]
        verb.add_argument("dataset", metavar="DATASET", help=DATASET)
        for name in names:
            verb.add_argument(name.lower(), metavar=name)
        if part not in functions:
            verb.add_argument("--dry-run", action="store_true", help="show what would change, change nothing")
            add_json(verb)
        add_workspace(verb)
        verb.set_defaults(run=functions.get(part, _change))
    replace = verbs["captions replace"]
    replace.add_argument("--regex", action="store_true", help="FIND is a regular expression")
    replace.add_argument("--any-case", action="store_true", help="capitals and small letters are the same")


def _list(options: argparse.Namespace) -> int:
    rows = api.projects_list(options.workspace)
    if options.json:
        say_json(rows)
        return 0
    for row in rows:
        mark = "*" if row["is_open"] else " "
        size = file_size(row["size"])
        say(
            f"{mark} {row['title']:30}  {row['pictures']} pictures, {row['runs']} runs, {size}  {row['path']}"
        )
    return 0


def _new(options: argparse.Namespace) -> int:
    say(str(api.projects_new(options.title, options.workspace)))
    return 0


def _open(options: argparse.Namespace) -> int:
    api.projects_open(options.project, options.workspace)
    return 0


def _rename(options: argparse.Namespace) -> int:
    api.projects_rename(options.project, options.title, options.workspace)
    return 0


def _delete(options: argparse.Namespace) -> int:
    place = api.projects_delete(options.project, options.workspace)
    say(f"In the trash; `lora-easel trash restore {place.parent.name}` puts it back.")
    return 0


def _import(options: argparse.Namespace) -> int:
    made = api.projects_import(options.project, options.source, options.link, options.workspace)
    for sentence in made["skipped"]:
        say(sentence)
    say(f"{made['added']} files added.")
    return 0


def _leave_out(options: argparse.Namespace) -> int:
    count = api.leave_out(options.dataset, options.pictures, options.workspace)
    say(f"{count} left out.")
    return 0


def _take_back(options: argparse.Namespace) -> int:
    if options.pictures:
        say(f"{api.take_back(options.dataset, options.pictures, options.workspace)} taken back.")
        return 0
    for name in api.left_out(options.dataset, options.workspace):
        say(name)
    return 0


def _hold_out(options: argparse.Namespace) -> int:
    api.hold_out(options.dataset, options.pictures, not options.undo, options.workspace)
    return 0


def _set(options: argparse.Namespace) -> int:
    api.captions_set(options.dataset, options.picture, options.text, options.workspace)
    return 0


def _change(options: argparse.Namespace) -> int:
    match options.part:
        case "replace":
            given: Any = (options.find, options.put, options.regex, options.any_case)
        case "rename-tag":
            given = (options.tag, options.new)
        case "delete-tag":
            given = (options.tag,)
        case "trigger":
            given = (options.word,)
        case _:
            given = (options.text,)
    function = getattr(api, f"captions_{options.part.replace('-', '_')}")
    found = function(options.dataset, *given, dry_run=options.dry_run, workspace=options.workspace)
    if options.json:
        say_json(found)
        return 0
    marks = {"same": "{}", "old": "[-{}-]", "new": "{{+{}+}}"}
    for row in found["rows"] if options.dry_run else ():
        say(f"{row['picture']}: {''.join(marks[kind].format(text) for kind, text in row['pieces'])}")
    more = found["changed"] - len(found["rows"])
    if options.dry_run and more:
        say(f"and {more} more")
    would = "would change" if options.dry_run else "changed; `captions undo` takes it back"
    say(f"{found['changed']} of {found['asked']} captions {would}.")
    return 0


def _undo(options: argparse.Namespace) -> int:
    found = api.captions_undo(options.dataset, options.workspace)
    kept = f", {found['kept']} changed since and kept" if found["kept"] else ""
    say(f"{found['undone']} captions are as before{kept}.")
    return 0
