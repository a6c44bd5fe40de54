"""Nothing that the window or the worker does is without a command, and the table of verbs says the truth."""

import ast
import tempfile
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from app.page import TABS
from app.routes import add_routes
from app.state import AppState
from app.toolbox.view import TOOLS
from app.top_bar import add_project_routes
from lora_core.api import VERBS
from lora_core.cli.parser import parameters
from lora_core.verbs import GROUPS

ROOT = Path(__file__).resolve().parents[1]


def served() -> set[str]:
    """What a page may post or put below /easel/."""
    with tempfile.TemporaryDirectory() as folder:
        app_state = AppState(Path(folder), worker_command=["no-such-program"])
        app = FastAPI()
        for add in (add_routes, add_project_routes, *(tab.add_routes for tab in TABS)):
            add(app, app_state)
        app_state.close()
    routes = [
        route for route in app.routes if isinstance(route, APIRoute) and route.methods & {"POST", "PUT"}
    ]
    return {route.path.removeprefix("/easel/") for route in routes}


ROUTES = served()


DOES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "train": (("like", "settings/import"), ()),
    "forecast": (("run measure", "run unmeasure"), ("probe",)),
    "resume": (("run resume", "run accept"), ()),
    "stop": (("run stop",), ()),
    "pause": (("run pause",), ()),
    "save": (("run save",), ()),
    "preview": (("run preview",), ()),
    "delete": (("run delete",), ()),
    "queue move": (("queue move", "queue up", "queue down"), ()),
    "queue sweep": (("settings/sweep",), ()),
    "queue remove": (("queue remove",), ()),
    "queue run": (("queue start",), ()),
    "queue pause": (("queue pause",), ()),
    "audit": (("check",), ()),
    "probe": (("insights",), ("captions", "triggers")),
    "pictures": (("insights",), ("pictures",)),
    "leave-out": (("leave-out",), ()),
    "take-back": (("take-back",), ()),
    "hold-out": (("hold-out",), ()),
    "crop": (("crop",), ()),
    "concepts make": (("concepts",), ()),
    "concepts set": (("concepts",), ()),
    "concepts move": (("move",), ()),
    "captions set": (("caption",), ()),
    "caption": (("insights", "bulk"), ("caption",)),
    "masks make": (("insights", "bulk"), ("mask",)),
    "captions table": (("bulk",), ()),
    "captions replace": (("bulk",), ()),
    "captions prefix": (("bulk",), ()),
    "captions suffix": (("bulk",), ()),
    "captions rename-tag": (("bulk",), ()),
    "captions delete-tag": (("bulk",), ()),
    "captions trigger": (("bulk",), ()),
    "captions undo": (("bulk/undo",), ()),
    "generate": (("preview/generate",), ("generate",)),
    "grid": ((), ("sheet",)),
    "export": (("export/write", "export/copy"), ("export",)),
    "inspect": (("toolbox/start spectrum",), ("inspect", "spectrum")),
    "verify": (("toolbox/start check",), ("verify",)),
    "convert": (("toolbox/start convert",), ("convert",)),
    "merge": (("toolbox/start merge", "toolbox/start into-base", "toolbox/start plain"), ("merge", "into-base")),  # noqa: E501
    "shrink": (("toolbox/start shrink", "toolbox/start intrinsic", "toolbox/act shrink"), ("shrink", "intrinsic")),  # noqa: E501
    "extract": (("toolbox/start extract",), ("extract",)),
    "strength": (("toolbox/start strength", "toolbox/act bake"), ("strength", "bake")),
    "compare": (("toolbox/start compare",), ("compare",)),
    "stack": (("toolbox/start stack",), ("stack",)),
    "amplify": (("toolbox/start amplify",), ("amplify",)),
    "upload": (("export/upload",), ()),
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
    "mask": "paints `NAME-masklabel.png` beside an image, as any image editor can",
    "tokens": "counts tokens while a caption is typed; `audit` names captions that are too long",
    "run see": "has the Preview tab draw a strip of a run's strengths; `grid` draws one",
    "run download": "downloads a base of the hub; every verb with --base does where it is needed",
    "run download-cancel": "drops what the page has asked for; Ctrl-C on the command line",
    "run download-ask": "asks the hub again how large a base is",
    "run rates": "swaps the learning rates of the Train form for the optimizer's; `train --set optimizer.lr`",
    "run reset": "puts fields of the Train form back; `train --preset`",
    "run retry": "starts a failed run again with another value; `train --set`",
    "settings/take": "fills the Train form with the settings of a run; `train --config RUN/config.toml`",
    "settings/restore": "takes that back",
    "run show": "chooses the run that the Train tab shows",
    "preview/rows": "keeps the form of the Preview tab; `generate --lora FILE:STRENGTH`",
    "preview/loras": "draws the LoRAs of the Preview tab and keeps them; `generate --lora FILE:STRENGTH`",
    "preview/file": "a file that was dropped on the Preview tab; its path on the command line",
    "preview/start": "keeps an image that was dropped on the Preview tab; `generate --image FILE`",
    "preview/mask": "keeps a mask that was painted on the Preview tab; `generate --mask FILE`",
    "preview/infotext": "fills the form of the Preview tab with the settings in a PNG",
    "preview/put-back": "fills the form of the Preview tab with the settings of an image of the history",
    "export/choose": "keeps the form of the Export tab",
    "toolbox/form": "draws the Toolbox's form for what is chosen",
    "toolbox/file": "a file that was dropped on the Toolbox; its path on the command line",
    "preview/open": "the Preview tab was opened",
    "preview/cancel": "drops what the page has asked for; Ctrl-C on the command line",
    "preview/forget": "deletes a drawn image from the history; it is a PNG file",
    "preview/star": "stars an image of the history, for the eye alone",
    "preview/bring-back": "takes it out of the trash again; `trash restore`",
    "toolbox/go-on": "fills the Train form; `train --set adapter.init=FILE`",
    "toolbox/cancel": "drops what the page has asked for; Ctrl-C on the command line",
    "report/cancel": "drops what the page has asked for; Ctrl-C on the command line",
    "tensorboard": "opens TensorBoard on the runs; `tensorboard --logdir RUNS`",
    "show-file": "opens the file manager; the commands print the path",
    "quit": "ends the window itself",
}
"""Routes of the window that need no command, with the reason."""

WORKER_STATE = {
    "release": "frees the memory of the worker's base",
    "warm": "starts the worker ahead of time",
}
"""Requests of the worker that need no command, with the reason."""


def told_apart(function: ast.AST) -> set[str]:
    """The words that a function tells apart: its cases, else keys of its tables and what it compares with."""
    parts: list[ast.AST | None] = [n.value for n in ast.walk(function) if isinstance(n, ast.MatchValue)]
    for node in ast.walk(function) if not parts else ():
        if isinstance(node, ast.Dict):
            parts += node.keys
        elif isinstance(node, ast.DictComp):
            parts += [one for loop in node.generators for one in ast.walk(loop.iter)]
        elif isinstance(node, ast.Compare):
            parts += [one for part in node.comparators for one in ast.walk(part)]
    return {part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)}


def answered(*words: str) -> set[str]:
    """The values of `do` that the function of a route knows, which is the one that knows these words."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "app").rglob("*.py")]
    functions = [n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    (found,) = (known for known in map(told_apart, functions) if known >= set(words))
    return found


def several() -> dict[str, set[str]]:
    """Routes that do several things, and the values of `do` that they know."""
    return {
        "run": answered("accept", "unmeasure"),
        "queue": answered("up", "down"),
        "projects": answered("rename", "restore"),
        "toolbox/start": set(TOOLS),
        "toolbox/act": {"shrink", "bake"},
    }


def needed() -> set[str]:
    """All that the window can be asked to do."""
    parts = several()
    routes = {route for route in ROUTES if route not in parts}
    return routes | {f"{route} {do}" for route, acts in parts.items() for do in acts}


def requests() -> set[str]:
    """All that the warm worker can be asked to do."""
    files = (ROOT / "lora_core" / "worker.py", ROOT / "lora_core" / "generate" / "server.py")
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    functions = [node.name for node in nodes if isinstance(node, ast.FunctionDef)]
    return {name[3:].replace("_", "-") for name in functions if name.startswith("do_")} | {"warm"}


def test_every_route_that_changes_something_has_a_verb() -> None:
    known = {route for routes, _ in DOES.values() for route in routes}
    assert {"caption", "bulk", "run stop", "projects delete", "toolbox/start merge"} <= needed()
    assert needed() - known - set(VIEW_STATE) == set()
    assert known | set(VIEW_STATE) == needed(), "a row names what is not there any more"
    assert not known & set(VIEW_STATE)


def test_every_request_of_the_worker_has_a_verb() -> None:
    known = {request for _, requests in DOES.values() for request in requests}
    assert {"generate", "export", "spectrum", "shrink", "probe"} <= requests()
    assert known | set(WORKER_STATE) == requests()
    assert not known & set(WORKER_STATE)


def test_groups_are_those_of_the_verbs() -> None:
    assert set(VERBS) >= set(DOES)
    assert {words.split()[0] for words in VERBS if " " in words} == set(GROUPS)


@pytest.mark.parametrize("words", VERBS)
def test_every_option_has_one_name_and_a_help(words: str) -> None:
    found = parameters(words)
    assert len({one.name for one in found}) == len(found)
    nameable = {"find", "put", "text", "tag", "new", "word", "picture", "title", "to", "format", "out"}
    assert [one.name for one in found if not one.help and one.name not in nameable] == []


@pytest.mark.parametrize("words", VERBS)
def test_a_verb_explains_itself(words: str) -> None:
    first = str(VERBS[words].__doc__).splitlines()[0]
    assert first[0].isupper()
    assert first.endswith((".", ":"))


def test_each_exception_has_a_reason() -> None:
    assert all(len(reason.split()) >= 2 for reason in (*VIEW_STATE.values(), *WORKER_STATE.values()))
