"""The password page, needed only when the window listens beyond this computer.

It stands in front of every route, Gradio's and our own, so that no picture, preview or download can be had
without it. The cookie holds a key drawn at start: it means nothing to another server, and a restart asks
again.
"""

import asyncio
import hmac
import html
import secrets
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

COOKIE = "lora_easel_login"
# What a stranger may see: the page's look, and whether it is this app at all.
OPEN_PATHS = ("/easel", "/easel/assets/style.css", "/easel/assets/icon.svg")
LARGEST_FORM = 4096

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport"
content="width=device-width"> <title>LoRA Easel</title>
<link rel="stylesheet" href="/easel/assets/style.css"><link rel="icon" href="/easel/assets/icon.svg">
<body class="login"><main><form method="post" action="/easel/login" class="panel">
<h1>LoRA Easel</h1><label>Password<input name="password" type="password" autofocus
autocomplete="current-password"></label>
<button class="own primary">Open</button><p role="alert" class="small">{note}</p></form></main></body>
</html>"""


class Login:
    """Asks for the password once a browser, and lets nothing through before."""

    def __init__(self, app: ASGIApp, password: str) -> None:
        """Stand in front of `app`."""
        self.app = app
        self.password = password.encode()
        self.key = secrets.token_urlsafe(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on if its browser is logged in; else show the password page."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        request = Request(scope, receive)
        if hmac.compare_digest(request.cookies.get(COOKIE, "").encode(), self.key.encode()) or (
            scope["path"] in OPEN_PATHS and request.method == "GET"
        ):
            await self.app(scope, receive, send)
        else:
            response = await self._answer(request)
            await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        if request.scope["path"] == "/easel/login" and request.method == "POST":
            body = (await _small_body(request)).decode("ascii", errors="replace")
            given = parse_qs(body).get("password", [""])[0]
            if hmac.compare_digest(given.encode(), self.password):
                response = RedirectResponse("/", status_code=303)
                response.set_cookie(COOKIE, self.key, httponly=True, samesite="strict")
                return response
            # A guess costs half a second, which a person does not notice and a program does.
            await asyncio.sleep(0.5)
            return _page("That is not the password.", 401)
        if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
            return _page("", 200)
        return _page("Please log in.", 401)


async def _small_body(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST_FORM:
            return b""
    return body


def _page(note: str, status: int) -> HTMLResponse:
    return HTMLResponse(PAGE.format(note=html.escape(note)), status_code=status)
