"""Who is let in, and to what: the guard alone, then the whole window with every route that it has, then
files that somebody made to do harm."""

import asyncio
import contextlib
import functools
import io
import json
import re
import socket
import struct
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from app import guard, main
from app.dataset.view import add_dataset_routes
from app.guard import COOKIE, OPEN_PATHS, Guard, Login, host_name, is_loopback
from app.routes import add_assets, add_routes
from app.state import AppState
from tests.waiting import PATIENCE, run_async, wait_for

HERE = "127.0.0.1:7860"
ORIGIN = f"http://{HERE}"
NAVIGATION = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
MARK = b"nobody outside may read this"


async def hello(request: Any) -> PlainTextResponse:
    return PlainTextResponse("hello")


def site() -> Starlette:
    return Starlette(routes=[Route("/{path:path}", hello, methods=["GET", "POST"])])


CASES = [
    ("GET", {"host": HERE}, 200),
    ("GET", {"host": "localhost:7860"}, 200),
    ("GET", {"host": "LocalHost"}, 200),
    ("GET", {"host": "[::1]:7860"}, 200),
    ("GET", {"host": "studio.lan:7860"}, 200),
    ("GET", {"host": "evil.example"}, 403),
    ("GET", {"host": "evil.example:7860"}, 403),
    ("GET", {"host": "127.0.0.1.evil.example"}, 403),
    ("GET", {"host": "127.0.0.1:80@evil.example"}, 403),
    ("GET", {"host": "127.0.0.1:7860/easel?"}, 403),
    ("GET", {"host": "[::1].evil.example"}, 403),
    ("GET", {"host": "[::2]:7860"}, 403),
    ("GET", {"host": ""}, 403),
    ("POST", {"host": HERE}, 200),
    ("POST", {"host": HERE, "origin": ORIGIN}, 200),
    ("POST", {"host": HERE, "origin": ORIGIN, "sec-fetch-site": "same-origin"}, 200),
    ("POST", {"host": HERE, "origin": "http://evil.example"}, 403),
    ("POST", {"host": HERE, "origin": "null"}, 403),
    ("POST", {"host": HERE, "origin": "http://127.0.0.1:9999"}, 403),
    ("POST", {"host": "[::1]:7860", "origin": "http://[::1]:7860"}, 200),
    ("POST", {"host": HERE, "sec-fetch-site": "cross-site"}, 403),
    ("POST", {"host": HERE, **NAVIGATION}, 403),
    ("GET", {"host": HERE, "sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
    ("GET", {"host": HERE, "sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"}, 403),
    ("GET", {"host": HERE, **NAVIGATION}, 403),
    ("GET", {"host": HERE, **NAVIGATION, "sec-fetch-dest": "iframe"}, 403),
    ("GET", {"host": HERE, "sec-fetch-site": "none"}, 200),
]


@pytest.mark.parametrize(("method", "headers", "status"), CASES)
def test_who_is_let_in(method: str, headers: dict[str, str], status: int) -> None:
    answer = TestClient(Guard(site(), ["studio.lan"])).request(method, "/anything", headers=headers)
    assert answer.status_code == status
    assert answer.text.endswith(".") is (status == 403)


def test_a_name_in_a_host_header() -> None:
    assert host_name("LocalHost:80") == "localhost"
    assert host_name("[::1]:7860") == "[::1]"
    assert host_name("localhost:80:80") == ""


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.8.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.5", False),
        ("127.evil.example", False),
    ],
)
def test_which_addresses_stay_on_this_computer(host: str, local: bool) -> None:
    assert is_loopback(host) is local


def test_without_the_password_nothing_is_shown() -> None:
    client = TestClient(Login(site(), "open sesame"))
    assert client.get("/easel/picture/run/a.png").status_code == 401
    assert client.post("/gradio_api/run/predict").status_code == 401
    page = client.get("/", headers={"accept": "text/html"})
    assert "Password" in page.text
    assert "hello" not in page.text


def test_the_password_opens_the_window() -> None:
    client = TestClient(Login(site(), "open sésame"))
    wrong = client.post("/easel/login", data={"password": "no"}, follow_redirects=False)
    assert (wrong.status_code, COOKIE in wrong.cookies) == (401, False)
    right = client.post("/easel/login", data={"password": "open sésame"}, follow_redirects=False)
    assert right.status_code == 303
    assert client.get("/").text == "hello"


def test_a_made_up_cookie_opens_nothing() -> None:
    assert TestClient(Login(site(), "x"), cookies={COOKIE: "made-up"}).get("/a").status_code == 401


# ---- the whole window
# ----------------------------------------------------------------------------------------------


class Whole:
    """The window as it is served, over a workspace with something in it, and what lies around it."""

    def __init__(self, folder: Path) -> None:
        self.outside = folder / "home"
        workspace = self.outside / "easel"
        workspace.mkdir(parents=True)
        self.app_state = AppState(workspace, worker_command=["no-such-program"])
        for place in (self.outside, workspace, workspace / "projects" / "other" / "pictures"):
            place.mkdir(parents=True, exist_ok=True)
            for name in ("secret.png", "secret.txt", "secret.safetensors", "config.toml"):
                (place / name).write_bytes(png(64, 64) + MARK)
        self.picture = self.app_state.project.image_folder / "own.png"
        self.picture.write_bytes(png(64, 64) + MARK)
        self.picture.with_suffix(".txt").write_text("a caption")
        run = workspace / "runs" / "first"
        (run / "export").mkdir(parents=True)
        (run / "export" / "first.safetensors").write_bytes(MARK)
        (run / "config.toml").write_text('name = "first"\n')

    def client(self, password: str = "", allowed: tuple[str, ...] = ()) -> TestClient:
        app = main.build_app(self.app_state, list(allowed), password)
        return TestClient(app, base_url=ORIGIN, raise_server_exceptions=False)

    def own(self) -> TestClient:
        """The own routes alone, which are made quicker."""
        app = FastAPI()
        add_routes(app, self.app_state)
        add_assets(app, {"page.css": b"body {}"}, self.outside / "easel" / "cache")
        add_dataset_routes(app, self.app_state)
        return TestClient(app)

    def around(self) -> dict[str, bytes]:
        """All files that no request of the open project may touch."""
        easel = self.outside / "easel"
        ours = [easel / name for name in ("tmp", "cache", "logs", "places.json")]
        ours += [easel / "projects" / name for name in ("default", "open.json")]
        return {
            str(path): path.read_bytes()
            for path in self.outside.rglob("*")
            if path.is_file() and not any(map(path.is_relative_to, ours))
        }


def png(width: int, height: int, body: bytes = b"") -> bytes:
    """A black PNG of one bit a pixel, written by hand so that it may be of any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = body or zlib.compress(bytes(height * (1 + (width + 7) // 8)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(tmp_path_factory.mktemp("guard"))


@pytest.fixture(scope="module")
def client(whole: Whole) -> TestClient:
    return whole.client()


@pytest.fixture(scope="module")
def locked(whole: Whole) -> TestClient:
    return whole.client("open sesame", ("studio.lan",))


OWN = "/easel/picture/dataset/own.png"
UPLOAD = "/gradio_api/upload"
CROSS = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
REQUESTS = [
    ("the page itself", "GET", "/", {}, 200),
    ("its image", "GET", OWN, {"sec-fetch-site": "same-origin", "sec-fetch-dest": "image"}, 200),
    ("a link to it on another site", "GET", "/", NAVIGATION, 200),
    ("a link to a file of it on another site", "GET", OWN, NAVIGATION, 403),
    ("a link that begins work", "GET", "/easel/doctor.zip", NAVIGATION, 403),
    ("by IPv6", "GET", OWN, {"host": "[::1]:7860"}, 200),
    ("rebound, the page", "GET", "/", {"host": "evil.example"}, 403),
    ("rebound, an image", "GET", OWN, {"host": "evil.example:7860"}, 403),
    ("rebound, Gradio's settings", "GET", "/config", {"host": "evil.example"}, 403),
    ("a host not allowed", "GET", OWN, {"host": "studio.lan"}, 403),
    ("a path in the host", "GET", OWN, {"host": "127.0.0.1:7860/easel?"}, 403),
    ("an image in another site's page", "GET", OWN, {**CROSS, "sec-fetch-dest": "image"}, 403),
    ("a frame in another site's page", "GET", "/", {**NAVIGATION, "sec-fetch-dest": "iframe"}, 403),
    ("another port of this computer", "POST", "/easel/quit", {"origin": "http://127.0.0.1:1"}, 403),
    ("an upload by another site", "POST", UPLOAD, {"origin": "http://evil.example"}, 403),
    ("an upload with no origin", "POST", UPLOAD, CROSS, 403),
    ("our own upload by another site", "POST", "/easel/upload", CROSS, 403),
    ("an event by another site", "POST", "/gradio_api/run/predict", {"origin": "null"}, 403),
    ("a form of another site", "POST", "/easel/quit", NAVIGATION, 403),
]


@pytest.mark.parametrize(("_what", "method", "path", "headers", "status"), REQUESTS)
def test_requests_to_the_window(
    client: TestClient, _what: str, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    answer = client.request(method, path, headers=headers)
    assert answer.status_code == status
    if status == 403:
        assert "host" in answer.text or "Another site" in answer.text


def test_names_that_are_allowed(locked: TestClient) -> None:
    assert locked.get("/easel", headers={"host": "studio.lan:7860"}).status_code == 200
    assert locked.get("/easel", headers={"host": "evil.lan:7860"}).status_code == 403


def test_gradio_gives_out_no_file_of_ours(client: TestClient, whole: Whole) -> None:
    for file in (whole.picture, whole.outside / "secret.txt", whole.app_state.workspace / "secret.png"):
        for path in (
            f"/gradio_api/file={file}",
            f"/gradio_api/file/{file}",
            f"/file={file}",
            f"/static/{file}",
        ):
            answer = client.get(path)
            assert answer.status_code in (403, 404), path
            assert MARK not in answer.content


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/custom_component/%1b]0;evil%07/client/x/y", "/gradio_api/upload_progress?upload_id=x",
        "/gradio_api/file=https://example.com/x.png", "/gradio_api/queue/status", "/gradio_api/info",
    ],
)  # fmt: skip
def test_gradio_answers_nothing_that_the_page_does_not_ask(
    client: TestClient, path: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """It would write another site's escape sequences to the terminal, and fetch its files."""
    for answer in (client.get(path), client.post(path)):
        assert (answer.status_code, answer.text) == (404, "There is no such address here.")
    assert "\x1b" not in "".join(capfd.readouterr())


def test_every_answer_keeps_to_this_site(client: TestClient) -> None:
    refused = client.get("/", headers={"host": "evil.example"})
    for answer in (
        client.get("/"),
        client.get(OWN),
        client.get("/nowhere"),
        client.get("/theme.css"),
        refused,
    ):
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert (
            answer.headers["cross-origin-resource-policy"]
            == answer.headers["referrer-policy"]
            == "same-origin"
        )
        assert "frame-ancestors 'self'" in answer.headers["content-security-policy"]


def all_routes(app: Any, before: str = "") -> Iterator[tuple[str, str]]:
    """Every method and path that an app answers, of what is mounted in it too."""
    for route in app.routes:
        inner = getattr(route, "app", None) if type(route).__name__ == "Mount" else None
        inner = inner or getattr(route, "original_router", None)
        path = before + (getattr(route, "path", "") or "").rstrip("/")
        if hasattr(inner, "routes"):
            yield from all_routes(inner, path)
        else:
            for method in getattr(route, "methods", None) or ():
                yield method, path or "/"


def routes_of(client: TestClient) -> list[tuple[str, str]]:
    app: Any = client.app
    while isinstance(app, Guard | Login):
        app = app.app
    return sorted(set(all_routes(app)))


def test_without_the_login_no_route_gives_anything(locked: TestClient) -> None:
    routes = routes_of(locked)
    assert sum(path.startswith("/easel") for _, path in routes) >= 35
    assert sum(path.startswith("/gradio_api") for _, path in routes) >= 10
    shown = {(method, path): asked(locked, method, path) for method, path in routes}
    wide_open = [route for route, text in shown.items() if "Password" not in text and route[0] != "HEAD"]
    assert wide_open == [("GET", "/easel")]
    for path in OPEN_PATHS:
        assert locked.get(path).status_code == 200
        assert locked.post(path).status_code == 401
    with pytest.raises(WebSocketDisconnect), locked.websocket_connect("/gradio_api/queue/join"):
        pass


def asked(client: TestClient, method: str, path: str) -> str:
    path = re.sub(r"\{[^}]*\}", "x", path)
    answer = client.request(method, path)
    with_page = client.request(method, path, headers={"accept": "text/html"})
    assert MARK not in answer.content + with_page.content
    assert path in OPEN_PATHS or (answer.status_code == 401 and with_page.status_code in (200, 401))
    return answer.text + (with_page.text if with_page.status_code == 200 else "Password")


def test_with_the_login_the_picture_is_there(locked: TestClient) -> None:
    for path in (OWN, "/easel/thumb/dataset/own.png", "/easel/download/first/first.safetensors", "/config"):
        assert locked.get(path).status_code == 401
    locked.post("/easel/login", data={"password": "open sesame"}, headers={"origin": ORIGIN})
    try:
        for path in (
            OWN,
            "/easel/thumb/dataset/own.png",
            "/easel/download/first/first.safetensors",
            "/config",
        ):
            assert locked.get(path).status_code == 200
    finally:
        locked.cookies.clear()


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_listening_wider_only_with_a_password(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served: list[str] = []
    monkeypatch.setattr(
        main, "_serve", lambda app_state, listener, options, password: served.append(password) or 0
    )
    monkeypatch.setattr(main, "_listener", lambda host, port: None)
    arguments = ["--host", host, "--no-browser", "--workspace", str(tmp_path)]
    monkeypatch.delenv(main.PASSWORD_VARIABLE, raising=False)
    assert main.main(arguments) == 1
    assert (served, "--password-file" in capsys.readouterr().err) == ([], True)
    monkeypatch.setenv(main.PASSWORD_VARIABLE, "open sesame")
    assert main.main(arguments) == 0
    assert served == ["open sesame"]


# ---- paths that lead out, in every own route
# -------------------------------------------------------------------------

Asked = tuple[str, Any]
"""An address and what is sent to it."""

NO_PATHS = {
    # Neither in the address nor in what is sent is there a name of anything on disk.
    ("GET", "/easel"), ("GET", "/easel/dataset"), ("GET", "/easel/live"), ("GET", "/easel/tags"),
    ("GET", "/easel/concepts"),
    ("GET", "/easel/doctor"), ("GET", "/easel/doctor.zip"),
    ("GET", "/easel/check"), ("POST", "/easel/check"), ("GET", "/easel/projects"), ("POST", "/easel/tokens"),
    ("POST", "/easel/quit"), ("POST", "/easel/upload"), ("POST", "/easel/bulk/undo"),
    ("GET", "/easel/preview/look"), ("POST", "/easel/preview/open"),
    ("POST", "/easel/preview/cancel"), ("GET", "/easel/preview/strip.png"),
    ("GET", "/easel/insights"), ("POST", "/easel/toolbox/form"),
    ("GET", "/easel/toolbox/numbers.json"), ("POST", "/easel/toolbox/act"),
    ("POST", "/easel/toolbox/cancel"), ("POST", "/easel/report/cancel"),
    # A folder or a file of this computer is what these ask for; the person types it.
    ("POST", "/easel/settings/import"), ("POST", "/easel/settings/restore"),
    ("POST", "/easel/settings/sweep"),
    ("POST", "/easel/import"), ("POST", "/easel/preview/rows"), ("POST", "/easel/preview/loras"),
    ("POST", "/easel/toolbox/start"),
    ("POST", "/easel/insights"), ("POST", "/easel/preview/mask"),
    ("POST", "/easel/toolbox/go-on"),
    ("POST", "/easel/preview/generate"), ("POST", "/easel/export/copy"), ("POST", "/easel/export/upload"),
    # What is kept is looked up later among what there is.
    ("POST", "/easel/export/choose"), ("GET", "/easel/preview/axes"), ("POST", "/easel/preview/infotext"),
    # Only a file that the window has named itself is shown.
    ("POST", "/easel/show-file"), ("POST", "/easel/tensorboard"),
}  # fmt: skip
SENT: dict[tuple[str, str], Callable[[str], list[Asked]]] = {
    ("GET", "/easel/assets/{name}"): lambda evil: [(f"/easel/assets/{evil}", None)],
    ("GET", "/easel/picture/{kind}/{path:path}"): lambda evil: [
        *((f"/easel/picture/{kind}/{evil}", None) for kind in ("dataset", "left-out", "run", "generated")),
        (f"/easel/picture/{evil}/own.png", None),
    ],
    ("GET", "/easel/thumb/{kind}/{path:path}"): lambda evil: [
        *((f"/easel/thumb/{kind}/{evil}", None) for kind in ("dataset", "left-out", "run", "generated")),
        (f"/easel/thumb/{evil}/own.png", None),
    ],
    ("GET", "/easel/download/{run}/{file}"): lambda evil: [
        (f"/easel/download/first/{evil}", None),
        (f"/easel/download/{evil}/first.safetensors", None),
    ],
    ("GET", "/easel/docs/{path:path}"): lambda evil: [(f"/easel/docs/{evil}", None)],
    ("GET", "/easel/debug/{name}"): lambda evil: [(f"/easel/debug/{evil}", None)],
    ("POST", "/easel/caption"): lambda evil: [("/easel/caption", {"picture": evil, "text": "x"})],
    ("POST", "/easel/leave-out"): lambda evil: [("/easel/leave-out", {"pictures": [evil]})],
    ("POST", "/easel/take-back"): lambda evil: [("/easel/take-back", {"pictures": [evil]})],
    ("POST", "/easel/hold-out"): lambda evil: [("/easel/hold-out", {"pictures": [evil], "on": True})],
    ("POST", "/easel/crop"): lambda evil: [("/easel/crop", {"picture": evil, "box": [0.0, 0.0, 0.5, 0.5]})],
    ("POST", "/easel/move"): lambda evil: [
        ("/easel/move", {"folders": folders}) for folders in ({evil: "."}, {"own.png": evil})
    ],
    ("POST", "/easel/concepts"): lambda evil: [
        ("/easel/concepts", {"do": "set", "number": 0, "key": evil, "value": "2"})
    ],
    ("POST", "/easel/mask"): lambda evil: [("/easel/mask", {"picture": evil, "png": None})],
    ("POST", "/easel/bulk"): lambda evil: [
        ("/easel/bulk", {"do": "append", "put": "x", "pictures": [evil], "apply": True})
    ],
    ("POST", "/easel/run"): lambda evil: [
        ("/easel/run", {"do": do, "run": evil}) for do in ("see", "resume", "show", "delete")
    ],
    ("POST", "/easel/settings/take"): lambda evil: [("/easel/settings/take", {"run": evil})],
    ("GET", "/easel/curves/{name}"): lambda evil: [
        (f"/easel/curves/{evil}", None),
        (f"/easel/curves/first?compare={quote(evil, safe='')}", None),
    ],
    ("POST", "/easel/queue"): lambda evil: [
        ("/easel/queue", {"do": do, "run": evil}) for do in ("up", "down", "remove")
    ],
    ("POST", "/easel/projects"): lambda evil: [
        ("/easel/projects", {"do": do, "project": evil, "title": "t"})
        for do in ("open", "rename", "delete", "restore")
    ],
    ("POST", "/easel/language"): lambda evil: [("/easel/language", {"language": evil})],
    ("POST", "/easel/like"): lambda evil: [(f"/easel/like?size=9&name={quote(evil, safe='')}", {})],
    ("PUT", "/easel/upload/{batch}"): lambda evil: [(f"/easel/upload/{evil}", {})],
    ("POST", "/easel/upload/{batch}"): lambda evil: [
        (f"/easel/upload/{evil}", {}),
        (f"/easel/upload/{evil}", {"give_up": True}),
    ],
    ("GET", "/easel/made/{file}"): lambda evil: [(f"/easel/made/{evil}", None)],
    ("GET", "/easel/report/of/{run}"): lambda evil: [(f"/easel/report/of/{evil}", None)],
    ("POST", "/easel/report/start"): lambda evil: [
        ("/easel/report/start", {"run": evil, "measure": measure}) for measure in (True, False)
    ],
    ("POST", "/easel/preview/forget"): lambda evil: [("/easel/preview/forget", {"file": evil})],
    ("POST", "/easel/preview/star"): lambda evil: [("/easel/preview/star", {"file": evil, "on": True})],
    ("POST", "/easel/preview/put-back"): lambda evil: [("/easel/preview/put-back", {"file": evil})],
    ("POST", "/easel/preview/bring-back"): lambda evil: [("/easel/preview/bring-back", {"place": evil})],
    ("POST", "/easel/preview/file"): lambda evil: [
        (f"/easel/preview/file?name={quote(evil, safe='')}", {"not": "an image"})
    ],
    ("POST", "/easel/preview/start"): lambda evil: [
        (f"/easel/preview/start?name={quote(evil, safe='')}", {"not": "an image"})
    ],
    ("POST", "/easel/toolbox/file"): lambda evil: [
        (f"/easel/toolbox/file?name={quote(evil, safe='')}", {"kept": "under its last name alone"})
    ],
    ("POST", "/easel/export/write"): lambda evil: [
        ("/easel/export/write", {"run": evil}),
        ("/easel/export/write", {"run": "first", "name": evil}),
    ],
}
LEADING_OUT = [
    "../secret.png",
    "../../secret.png",
    "../../../secret.txt",
    "../../../../secret.safetensors",
    "../../other/pictures/secret.png",
    "../../config.toml",
    "../",
    "..\\..\\secret.png",
    "own.png/../../../secret.png",
    "a\0/../secret.png",
]


def test_each_own_route_is_in_one_of_the_tables(client: TestClient) -> None:
    own = {route for route in routes_of(client) if route[1].startswith("/easel")}
    assert own == NO_PATHS | SENT.keys()


@pytest.mark.parametrize(("method", "path"), SENT, ids=lambda one: one.strip("/"))
def test_paths_that_lead_out_lead_nowhere(client: TestClient, whole: Whole, method: str, path: str) -> None:
    before = whole.around()
    for evil in [
        *LEADING_OUT,
        str(whole.outside / "secret.png"),
        str(whole.app_state.workspace / "secret.txt"),
    ]:
        # In an address the client itself would resolve plain dots before it is sent.
        written = (quote(evil, safe=""), f"x%2f{quote(evil, safe='')}") if "{" in path else (evil,)
        for one in written:
            for address, sent in SENT[method, path](one.replace("\0", "%00") if "{" in path else one):
                answer = client.request(method, address, json=sent)
                assert MARK not in answer.content, address
                assert refused(answer), (address, sent, answer.text[:200])
    assert whole.around() == before
    assert whole.picture.with_suffix(".txt").read_text() == "a caption"


def refused(answer: Any) -> bool:
    """Not there, or a sentence, or told that nothing was changed, or a copy among the dropped files."""
    if answer.status_code in (404, 405) or (answer.status_code == 204 and not answer.content):
        return True
    said = answer.json()
    nothing = said.get("given_up") is True or said.get("changed") == 0 or said.keys() == {"revision"}
    dropped = Path(said.get("file", "")).parent.parts[-3:-1] == ("tmp", "dropped")
    return answer.status_code == 200 and ("problem" in said or nothing or dropped)


# ---- files that were made to do harm
# -----------------------------------------------------------------------------------


def taken(whole: Whole, name: str, data: bytes) -> dict[str, Any]:
    """What the window says after a file was dropped on it."""
    client, importer = whole.own(), whole.app_state.importer
    batch = client.post("/easel/upload").json()["batch"]
    line = json.dumps([[0, name, len(data)]]).encode()
    assert client.put(f"/easel/upload/{batch}", content=line + b"\n" + data).json() == {"received": 1}
    client.post(f"/easel/upload/{batch}", json={})
    wait_for(lambda: not importer.working)
    return importer.state()


def zipped(*entries: tuple[zipfile.ZipInfo | str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return made.getvalue()


def with_a_link() -> bytes:
    link = zipfile.ZipInfo("link.png")
    link.external_attr = 0o120777 << 16
    return zipped(("good.png", png(64, 64)), (link, b"/etc/passwd"))


@functools.cache
def a_gigabyte() -> bytes:
    made = io.BytesIO()
    archive = zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with archive, archive.open("bomb.png", "w", force_zip64=True) as entry:
        for _ in range(1024):
            entry.write(bytes(2**20))
    return made.getvalue()


def a_lie(size: int = 100) -> bytes:
    """A zip whose table of contents says that a gigabyte is a hundred bytes."""
    packed = bytearray(a_gigabyte())
    central = packed.rindex(b"PK\x01\x02")
    packed[central + 24 : central + 28] = struct.pack("<I", size)
    return bytes(packed)


def a_hundred_thousand() -> bytes:
    return zipped(*((f"{index}.txt", b"x") for index in range(100_001)))


def a_huge_picture() -> bytes:
    pack, row = zlib.compressobj(1), bytes(6251)
    body = b"".join(pack.compress(row * 1000) for _ in range(50)) + pack.flush()
    return png(50_000, 50_000, body)


HARMFUL = [
    ("link.zip", with_a_link, "is a symbolic link"),
    ("out.zip", lambda: zipped(("../../out.png", png(64, 64))), "leads out of the folder"),
    ("absolute.zip", lambda: zipped(("/tmp/out.png", png(64, 64))), "has an absolute path"),
    ("bomb.zip", a_gigabyte, "'bomb.png' is larger than 500 MB"),
    ("lie.zip", a_lie, "cannot be unpacked"),
    ("many.zip", a_hundred_thousand, "has 100001 entries, more than 100000"),
    ("huge.png", a_huge_picture, "million pixels, too many"),
]


@pytest.mark.parametrize(("name", "made", "said"), HARMFUL, ids=[row[0] for row in HARMFUL])
def test_files_that_were_made_to_do_harm(
    tmp_path: Path, name: str, made: Callable[[], bytes], said: str
) -> None:
    whole = Whole(tmp_path)
    around = whole.around()
    before = sorted(whole.app_state.project.image_folder.rglob("*"))
    state = taken(whole, name, made())
    notes = " ".join(note.sentence for note in whole.app_state.project.notes)
    assert state["state"] == "failed"
    assert said in state["note"] + notes
    assert sorted(whole.app_state.project.image_folder.rglob("*")) == before
    assert whole.around() == around
    assert not list((whole.app_state.workspace / "tmp" / "incoming").iterdir())


@pytest.mark.parametrize(
    "name", ["../../../out.png", "/tmp/out.png", "..\\out.png", "C:\\out.png", "a\0.png"]
)
def test_names_of_dropped_files_lead_nowhere(tmp_path: Path, name: str) -> None:
    whole = Whole(tmp_path)
    around = whole.around()
    taken(whole, name, png(64, 64))
    assert whole.around() == around
    assert len(list(whole.app_state.project.image_folder.rglob("*.png"))) == 2


def test_a_huge_picture_that_lies_there_already_is_not_opened(tmp_path: Path) -> None:
    whole = Whole(tmp_path)
    (whole.app_state.project.image_folder / "huge.png").write_bytes(a_huge_picture())
    for size in ("thumb", "picture"):
        answer = whole.own().get(f"/easel/{size}/dataset/huge.png")
        assert "million pixels" in answer.json()["problem"]


# ---- guesses, sessions, sizes
# ----------------------------------------------------------------------------------------------


async def guesses(door: Login, passwords: list[tuple[str, str]]) -> list[int]:
    """The answers to guesses that are made at the same time, each (address, password)."""

    async def one(address: str, password: str) -> int:
        transport = httpx.ASGITransport(door, client=(address, 1))
        async with httpx.AsyncClient(transport=transport, base_url=ORIGIN) as client:
            return (await client.post("/easel/login", data={"password": password})).status_code

    return await asyncio.gather(*(one(*guess) for guess in passwords))


def test_guesses_from_many_places_come_one_by_one_and_ever_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    at_once: list[int] = []
    sleeping = 0

    async def sleep(seconds: float) -> None:
        nonlocal sleeping
        sleeping += 1
        at_once.append(sleeping)
        pauses.append(seconds)
        await real_sleep(0)
        sleeping -= 1

    real_sleep = asyncio.sleep
    monkeypatch.setattr("app.guard.asyncio.sleep", sleep)
    door = Login(site(), "open sesame")
    wrong = [(f"10.0.0.{n}", f"guess {n}") for n in range(40)]
    assert run_async(guesses(door, wrong)) == [401] * 40
    assert max(at_once) == 1
    assert pauses[:6] == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0]
    assert set(pauses[6:]) == {8.0}
    # Nobody is kept out for ever, and who is right begins anew.
    assert run_async(guesses(door, [("10.0.0.200", "open sesame")])) == [303]
    assert run_async(guesses(door, [("10.0.0.1", "no")])) == [401]
    assert pauses[-2:] == [8.0, 0.0]


def test_400_guesses_at_once_from_one_place_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """They took 1.02 s and were all compared, when each waited for itself alone."""
    monkeypatch.setattr("app.guard.FIRST_PAUSE", 0.05)
    door = Login(site(), "open sesame")
    answers = run_async(guesses(door, [("10.0.0.1", f"guess {n}") for n in range(400)]))
    assert answers.count(401) <= 2
    assert answers.count(401) + answers.count(429) == 400
    halves = [(f"2001:db8::{n:x}", "no") for n in range(1, 20)]
    assert run_async(guesses(door, halves)).count(401) <= 2


def test_logging_out_ends_the_session_of_that_browser_alone() -> None:
    door = Login(site(), "open sesame")
    one, other = TestClient(door), TestClient(door)
    for client in (one, other):
        client.post("/easel/login", data={"password": "open sesame"}, follow_redirects=False)
    key = one.cookies[COOKIE]
    one.get("/easel/logout", follow_redirects=False)
    assert one.get("/").status_code == 401
    assert TestClient(door, cookies={COOKIE: key}).get("/").status_code == 401
    assert other.get("/").text == "hello"


@pytest.mark.parametrize("site_said", ["Cross-Site", "SAME-SITE", "something new", " cross-site"])
def test_where_a_request_comes_from_is_no_matter_of_case(site_said: str) -> None:
    headers = {"host": HERE, "sec-fetch-site": site_said, "sec-fetch-mode": "no-cors"}
    assert TestClient(Guard(site())).post("/anything", headers=headers).status_code == 403


def test_a_body_that_no_page_sends_is_refused_before_it_is_held() -> None:
    client = TestClient(Guard(site()), base_url=ORIGIN)
    assert client.post("/gradio_api/run/predict", content=b"x" * 4_000_001).status_code == 413
    seen = 0

    def chunks() -> Iterator[bytes]:
        nonlocal seen
        for _ in range(1000):
            seen += 100_000
            yield b"x" * 100_000

    answer = client.post("/anything", content=chunks())
    assert answer.status_code == 413
    assert "larger than the 4,000,000 bytes" in answer.text
    assert client.post("/anything", content=iter([b"a", b"b"])).text == "hello"
    for route in ("/easel/upload/abc", "/easel/bulk"):
        assert client.post(route, content=b"x" * 5_000_000).text == "hello"
    # Names of many images, but not before it is known how many, as whoever sends may not be logged in.
    assert client.post("/easel/bulk", content=chunks()).status_code == 413
    answer = client.post("/easel/bulk", content=b"x" * 32_000_001)
    assert "larger than the 32,000,000 bytes" in answer.text


async def slow_hello(request: Any) -> PlainTextResponse:
    await asyncio.sleep(1.5)
    return PlainTextResponse("hello")


def exchange(port: int, *parts: bytes, pause: float = 0.0) -> bytes:
    """What the server answers to a request that comes in parts."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as connection:
        answer = b""
        with contextlib.suppress(ConnectionError):
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
            while more := connection.recv(9999):
                answer += more
        return answer


def test_half_open_connections_are_few_and_do_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "SLOWEST_REQUEST", PATIENCE)
    monkeypatch.setattr(guard, "HALF_OPEN", 5)
    server = uvicorn.Server(
        uvicorn.Config(
            Starlette(routes=[Route("/slow", slow_hello), Route("/", hello)]),
            http=guard.Connection, log_level="error", lifespan="off",
        )
    )  # fmt: skip
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        get = b"GET / HTTP/1.1\r\nHost: x\r\n"
        held = [socket.create_connection(("127.0.0.1", port), PATIENCE) for _ in range(40)]
        for connection in held:
            connection.sendall(get)
        # Who sends a whole request is answered meanwhile, and a second one on the same connection.
        assert exchange(port, get + b"Connection: close\r\n\r\n").endswith(b"hello")
        wait_for(lambda: 1 <= len(server.server_state.connections) <= 5)
        both = exchange(port, get + b"\r\n", get + b"Connection: close\r\n\r\n", pause=0.1)
        assert both.count(b"hello") == 2
        for connection in held:
            connection.close()
        wait_for(lambda: not server.server_state.connections)
        # Half a request is not waited for, but a slow answer is.
        monkeypatch.setattr(guard, "SLOWEST_REQUEST", 1.0)
        held = [socket.create_connection(("127.0.0.1", port), PATIENCE) for _ in range(3)]
        for connection in held:
            connection.sendall(get)
        slow = get.replace(b"/ ", b"/slow ", 1) + b"Connection: close\r\n\r\n"
        assert exchange(port, slow).endswith(b"hello")
        wait_for(lambda: not server.server_state.connections)
        # Letters that trickle in give it no more time.
        assert exchange(port, *(get[n : n + 1] for n in range(len(get))), pause=0.05) == b""
        for connection in held:
            connection.close()
    finally:
        server.should_exit = True
        thread.join(PATIENCE)


def test_a_body_that_trickles_in_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "SLOWEST_BODY", 0.1)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.03)
        return {"type": "http.request", "body": b"x", "more_body": True}

    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/easel/run", "query_string": b"",
        "headers": [(b"host", HERE.encode()), (b"transfer-encoding", b"chunked")],
    }  # fmt: skip
    run_async(Guard(site())(scope, receive, send))
    assert sent[0]["status"] == 408


def test_a_fault_of_the_program_is_one_sentence(whole: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(app_state: AppState, text: str) -> None:
        raise KeyError("secret")

    monkeypatch.setattr("app.routes._tokens", broken)
    client = whole.client()
    answer = client.post("/easel/tokens", json={"text": "a"})
    assert answer.status_code == 500
    assert answer.json() == {
        "problem": "This failed because of a bug in LoRA Easel; its log has the details."
    }
