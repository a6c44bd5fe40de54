"""Nothing that the window or the worker does is without a command, and the table of verbs says the truth."""

import argparse
import ast
import re
from pathlib import Path

import pytest

from app.export.lora_tools import TOOLS
from lora_core.__main__ import parser
from lora_core.api import VERBS
from lora_core.verbs import GROUPS

ROOT = Path(__file__).resolve().parents[1]
WINDOW = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "app").rglob("*.py"))
ROUTES = set(re.findall(r'@app\.(?:post|put)\(\s*f?"/easel/([^"]+)"', WINDOW))


DOES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "train": (("like",), ()),
    "forecast": (("run measure", "run unmeasure"), ("probe",)),
    "resume": (("run resume", "run accept"), ()),
    "stop": (("run stop",), ()),
    "pause": (("run pause",), ()),
    "save": (("run save",), ()),
    "preview": (("run preview",), ()),
    "delete": (("run delete",), ()),
    "queue move": (("queue up", "queue down"), ()),
    "queue remove": (("queue remove",), ()),
    "queue run": (("queue start",), ()),
    "queue pause": (("queue pause",), ()),
    "audit": (("check",), ()),
    "probe": (("insights",), ("captions", "triggers")),
    "pictures": (("insights",), ("pictures",)),
    "leave-out": (("leave-out",), ()),
    "take-back": (("take-back",), ()),
    "hold-out": (("hold-out",), ()),
    "captions set": (("caption",), ()),
    "captions replace": (("bulk",), ()),
    "captions prefix": (("bulk",), ()),
    "captions suffix": (("bulk",), ()),
    "captions rename-tag": (("bulk",), ()),
    "captions delete-tag": (("bulk",), ()),
    "captions trigger": (("bulk",), ()),
    "captions undo": (("bulk/undo",), ()),
    "generate": ((), ("generate",)),
    "grid": ((), ("sheet",)),
    "export": ((), ("export",)),
    "inspect": (("inside/start spectrum",), ("inspect", "spectrum")),
    "verify": ((), ("verify",)),
    "convert": (("inside/start convert",), ("convert",)),
    "merge": (("inside/start merge", "inside/start into-base", "inside/start plain"), ("merge", "into-base")),
    "shrink": (("inside/start shrink", "inside/start intrinsic", "inside/act shrink"), ("shrink", "intrinsic")),  # noqa: E501
    "extract": (("inside/start extract",), ("extract",)),
    "strength": (("inside/start strength", "inside/act bake"), ("strength", "bake")),
    "compare": (("inside/start compare",), ("compare",)),
    "stack": (("inside/start stack",), ("stack",)),
    "amplify": (("inside/start amplify",), ("amplify",)),
    "report": (("report/start",), ("report",)),
    "projects new": (("projects new",), ()),
    "projects import": (("import", "upload", "upload/{batch}"), ()),
    "projects open": (("projects open",), ()),
    "projects rename": (("projects rename",), ()),
    "projects delete": (("projects delete",), ()),
    "caches clean": (("projects clean",), ()),
    "trash restore": (("projects restore",), ()),
    "trash empty": (("projects empty",), ()),
}  # fmt: skip
"""The routes of the window below /easel/ that do what a verb does, where one route does several things with
the value of its `do`; and the requests of the worker. The other verbs are for the command line alone."""

VIEW_STATE = {
    "tokens": "counts tokens while a caption is typed; `audit` names captions that are too long",
    "run see": "has the Preview tab draw a strip of a run's strengths; `grid` draws one",
    "run download": "downloads a base of the hub; every verb with --base does where it is needed",
    "run download-cancel": "drops what the page has asked for; Ctrl-C on the command line",
    "run download-ask": "asks the hub again how large a base is",
    "run show": "chooses the run that the Train tab shows",
    "preview/rows": "the sliders of the Preview tab; `generate --lora FILE:STRENGTH`",
    "preview/open": "the Preview tab was opened",
    "preview/cancel": "drops what the page has asked for; Ctrl-C on the command line",
    "preview/forget": "deletes a drawn picture from the history; it is a PNG file",
    "inside/go-on": "fills the Train form; `train --set adapter.init=FILE`",
    "inside/cancel": "drops what the page has asked for; Ctrl-C on the command line",
    "report/cancel": "drops what the page has asked for; Ctrl-C on the command line",
    "show-file": "opens the file manager; the commands print the path",
    "quit": "ends the window itself",
}
"""Routes of the window that need no command, with the reason."""

WORKER_STATE = {
    "release": "frees the memory of the worker's base",
    "warm": "starts the worker ahead of time",
}
"""Requests of the worker that need no command, with the reason."""


def several() -> dict[str, set[str]]:
    """Routes that do several things, and the values of `do` that they know."""
    steer = WINDOW[WINDOW.index("def steer(") : WINDOW.index("current = desk.jobs.current()")]
    line = WINDOW[
        WINDOW.index("def act(self, do: str, name: str)") : WINDOW.index(
            "if do not in acts:\n            raise"
        )
    ]
    projects = WINDOW[WINDOW.index("def _changed(") : WINDOW.index("def _shelves(")]
    quoted = set(re.findall(r'"([a-z-]+)"(?::|,|\)|:$)', steer[steer.index("if do in") :]))
    return {
        "run": quoted | set(re.findall(r'do == "([a-z-]+)"', steer)),
        "queue": set(re.findall(r'"([a-z-]+)":', line)),
        "projects": set(re.findall(r'case "([a-z-]+)"', projects)),
        "inside/start": set(TOOLS),
        "inside/act": {"shrink", "bake"},
    }


def needed() -> set[str]:
    """All that the window can be asked to do."""
    parts = several()
    routes = {route for route in ROUTES if route not in parts}
    # One function makes the routes of two jobs.
    routes = {r for r in routes if "{name}" not in r} | {"inside/cancel", "report/cancel"}
    return routes | {f"{route} {do}" for route, acts in parts.items() for do in acts}


def requests() -> set[str]:
    """All that the warm worker can be asked to do."""
    tree = ast.parse((ROOT / "lora_core" / "serve.py").read_text(encoding="utf-8"))
    tables = [tree, *(ast.parse(p.read_text()) for p in (ROOT / "lora_core" / "worker").glob("*.py"))]
    found = set()
    for function in (
        node for table in tables for node in ast.walk(table) if isinstance(node, ast.FunctionDef)
    ):
        if function.name in ("__init__", "verbs"):
            for table in (node for node in ast.walk(function) if isinstance(node, ast.Dict)):
                found |= {key.value for key in table.keys if isinstance(key, ast.Constant)}
    return found | {"warm"}


def test_every_route_that_changes_something_has_a_verb() -> None:
    known = {route for routes, _ in DOES.values() for route in routes}
    assert {"caption", "bulk", "run stop", "projects delete", "inside/start merge"} <= needed()
    assert needed() - known - set(VIEW_STATE) == set()
    assert known | set(VIEW_STATE) == needed(), "a row names what is not there any more"
    assert not known & set(VIEW_STATE)


def test_every_request_of_the_worker_has_a_verb() -> None:
    known = {request for _, requests in DOES.values() for request in requests}
    assert {"generate", "export", "spectrum", "shrink", "probe"} <= requests()
    assert known | set(WORKER_STATE) == requests()
    assert not known & set(WORKER_STATE)


def test_every_verb_has_one_parser_and_a_function() -> None:
    (tops,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    names = {}
    for top, sub in tops.choices.items():
        inner = [a for a in sub._actions if isinstance(a, argparse._SubParsersAction)]
        names |= {f"{top} {part}": p for part, p in inner[0].choices.items()} if inner else {top: sub}
    assert set(names) == set(VERBS) >= set(DOES)
    assert {words.split()[0] for words in VERBS if " " in words} == set(GROUPS)
    assert all(callable(sub.get_default("run")) for sub in names.values())


@pytest.mark.parametrize("words", VERBS)
def test_a_verb_explains_itself(words: str) -> None:
    first = str(VERBS[words].__doc__).splitlines()[0]
    assert first[0].isupper()
    assert first.endswith((".", ":"))


def test_each_exception_has_a_reason() -> None:
    assert all(len(reason.split()) >= 2 for reason in (*VIEW_STATE.values(), *WORKER_STATE.values()))
