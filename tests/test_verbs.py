"""Nothing that the window or the worker does is without a command, and the table of verbs says the truth."""

import argparse
import ast
import re
from pathlib import Path

import pytest

from app.export.lora_tools import TOOLS
from lora_core.__main__ import parser
from lora_core.verbs import GROUPS, VERBS, VIEW_STATE, WORKER_STATE

ROOT = Path(__file__).resolve().parents[1]
WINDOW = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "app").rglob("*.py"))
ROUTES = set(re.findall(r'@app\.(?:post|put)\(\s*f?"/easel/([^"]+)"', WINDOW))


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
    known = {route for row in VERBS for route in row.routes}
    assert {"caption", "bulk", "run stop", "projects delete", "inside/start merge"} <= needed()
    assert needed() - known - set(VIEW_STATE) == set()
    assert known | set(VIEW_STATE) == needed(), "a row names what is not there any more"
    assert not known & set(VIEW_STATE)


def test_every_request_of_the_worker_has_a_verb() -> None:
    known = {request for row in VERBS for request in row.requests}
    assert {"generate", "export", "spectrum", "shrink", "probe"} <= requests()
    assert known | set(WORKER_STATE) == requests()
    assert not known & set(WORKER_STATE)


def test_every_verb_has_one_parser_and_a_function() -> None:
    (tops,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    names = {}
    for top, sub in tops.choices.items():
        inner = [a for a in sub._actions if isinstance(a, argparse._SubParsersAction)]
        names |= {f"{top} {part}": p for part, p in inner[0].choices.items()} if inner else {top: sub}
    assert set(names) == {row.name for row in VERBS}
    assert len(names) == len(VERBS)
    assert {row.name.split()[0] for row in VERBS if " " in row.name} == set(GROUPS)
    assert all(callable(sub.get_default("run")) for sub in names.values())


@pytest.mark.parametrize("row", VERBS, ids=lambda row: row.name)
def test_a_row_explains_itself(row) -> None:
    assert row.help[0].islower() or row.help.startswith("a LoRA")
    assert len(row.help) <= 80
    assert not row.help.endswith(".")
    assert not (row.routes or row.requests) or row.window


def test_each_exception_has_a_reason() -> None:
    assert all(len(reason.split()) >= 2 for reason in (*VIEW_STATE.values(), *WORKER_STATE.values()))
