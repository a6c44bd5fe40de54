"""The password page, needed only when the window listens beyond this computer.

It stands in front of every route, Gradio's and our own, so that no picture, preview or download can be had
without it. The cookie holds a key drawn at login: it means nothing to another server, and a restart or
logging out ends it.
"""

import asyncio
import hmac
import html
import ipaddress
import secrets
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

COOKIE = "lora_easel_login"
# What a stranger may see: the page's look, and whether it is this app at all.
OPEN_PATHS = ("/easel", "/easel/assets/style.css", "/easel/assets/icon.svg")
LARGEST_FORM, SLOWEST_FORM = 4096, 5.0
LOGOUT = ("/easel/logout", "/logout")
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0
"""Seconds before the guess after a wrong one is compared, at first and at most."""

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport"
content="width=device-width"> <title>LoRA Easel</title>
<link rel="stylesheet" href="/easel/assets/style.css"><link rel="icon" href="/easel/assets/icon.svg">
<body class="login"><main><form method="post" action="/easel/login" class="panel">
<h1>LoRA Easel</h1><label>Password<input name="password" type="password" autofocus
autocomplete="current-password"></label>
<button class="own primary">Open</button><p role="alert" class="small">{note}</p></form></main></body>
</html>"""


class Login:
    """Asks for the password once a browser, and lets nothing through before.

    Guesses are compared one after the other, whoever makes them, each after a pause that doubles with every
    wrong one up to `LONGEST_PAUSE` and is gone after a right one. Of each address one guess waits; more are
    refused unread, so that a flood from one place cannot keep the others out.
    """

    def __init__(self, app: ASGIApp, password: str) -> None:
        """Stand in front of `app`."""
        self.app = app
        self.password = password.encode()
        self._keys: set[str] = set()
        self._turn = asyncio.Lock()
        self._waiting: set[str] = set()
        self._pause = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on if its browser is logged in; else show the password page."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        key = request.cookies.get(COOKIE, "")
        inside = any(hmac.compare_digest(key.encode(), one.encode()) for one in self._keys)
        if inside and scope["path"] in LOGOUT:
            self._keys.discard(key)
            response: Response = RedirectResponse("/", status_code=303)
            response.delete_cookie(COOKIE)
            await response(scope, receive, send)
        elif inside or (scope["path"] in OPEN_PATHS and request.method == "GET"):
            await self.app(scope, receive, send)
        else:
            response = await self._answer(request)
            await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        if request.scope["path"] == "/easel/login" and request.method == "POST":
            address = _network(request.client.host if request.client else "")
            if address in self._waiting:
                return _page("Another guess from your address is being looked at; wait for it.", 429)
            self._waiting.add(address)
            try:
                return await self._guessed(request)
            except TimeoutError:
                return _page("The password came too slowly.", 408)
            finally:
                self._waiting.discard(address)
        if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
            return _page("", 200)
        return _page("Please log in.", 401)

    async def _guessed(self, request: Request) -> Response:
        async with asyncio.timeout(SLOWEST_FORM):
            body = (await _small_body(request)).decode("ascii", errors="replace")
        given = parse_qs(body).get("password", [""])[0]
        async with self._turn:
            # A right guess waits as long as a wrong one, so that the time says nothing.
            await asyncio.sleep(self._pause)
            if not hmac.compare_digest(given.encode("utf-8", "replace"), self.password):
                self._pause = min(LONGEST_PAUSE, max(FIRST_PAUSE, 2 * self._pause))
                return _page("That is not the password.", 401)
            self._pause = 0.0
        key = secrets.token_urlsafe(32)
        self._keys.add(key)
        response = RedirectResponse("/", status_code=303)
        secure = request.scope.get("scheme") == "https"
        response.set_cookie(COOKIE, key, httponly=True, samesite="strict", secure=secure)
        return response


def _network(address: str) -> str:
    """Whom an address belongs to: itself, or of IPv6 the first half, as that is what one subscriber gets."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(ipaddress.ip_network((found, 64), strict=False)) if found.version == 6 else address


async def _small_body(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST_FORM:
            return b""
    return body


def _page(note: str, status: int) -> HTMLResponse:
    return HTMLResponse(PAGE.format(note=html.escape(note)), status_code=status)
