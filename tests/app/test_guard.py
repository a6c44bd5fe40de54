"""The table of who is let in. The cases are those that plain Gradio lets through, and those that a guard must
not break."""

from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from app.guard import Guard, host_name, is_loopback
from app.login import COOKIE, Login

HERE = "127.0.0.1:7860"
ORIGIN = f"http://{HERE}"
NAVIGATION = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}


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
    ("GET", {"host": HERE, **NAVIGATION}, 200),
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


@pytest.mark.parametrize(
    ("host", "local"), [("127.0.0.1", True), ("::1", True), ("0.0.0.0", False), ("10.0.0.5", False)]
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
