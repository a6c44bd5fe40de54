"""Access control in front of every route, Gradio's included: `Guard` checks where a request comes from,
`Login` asks for the password when the window listens beyond this computer, and a `Connection` that brings no
request is closed.

Any page open in the user's browser can reach a server on localhost. Plain Gradio answers a rebound page
(`Host: evil.example`) and accepts uploads and events from other origins, and a host allow-list alone stops
only the first. So Host, Origin and Sec-Fetch-Site are all checked, and bodies larger than any page sends are
refused before anything holds them in memory. The login cookie holds a random key per login: it is worthless
on another server and ends with a restart or logout.
"""

import asyncio
import hmac
import ipaddress
import re
import secrets
from collections.abc import Iterable
from typing import ClassVar
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from app.templates import _, render
from lora_core.model_files.header import MAX_HEADER

COOKIE = "lora_easel_login"
# Accessible without login: style and identity of the app.
OPEN_PATHS = ("/easel", "/easel/assets/page.css", "/easel/assets/icon.svg")
LARGEST_FORM, SLOWEST_FORM = 4096, 5.0
LOGOUT = ("/easel/logout", "/logout")
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0
"""Seconds before the guess after a wrong one is compared, at first and at most."""


class Login:
    """Lets nothing through before the password was entered, once per browser.

    Guesses are compared one at a time, each after a pause that doubles with every wrong guess up to
    `LONGEST_PAUSE` and resets after a right one. One guess per address may wait; further ones are refused
    unread, so that a flood from one address cannot lock out the others.
    """

    def __init__(self, app: ASGIApp, password: str) -> None:
        self.app = app
        self.password = password.encode()
        self._keys: set[str] = set()
        self._turn = asyncio.Lock()
        self._waiting: set[str] = set()
        self._pause = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on if its browser is logged in, else show the password page."""
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
                return _page(_("Another attempt from your address is being checked; wait for it."), 429)
            self._waiting.add(address)
            try:
                return await self._guessed(request)
            except TimeoutError:
                return _page(_("The password came too slowly."), 408)
            finally:
                self._waiting.discard(address)
        if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
            return _page("", 200)
        return _page(_("Please log in."), 401)

    async def _guessed(self, request: Request) -> Response:
        async with asyncio.timeout(SLOWEST_FORM):
            body = (await read_body(request, LARGEST_FORM) or b"").decode("ascii", errors="replace")
        given = parse_qs(body).get("password", [""])[0]
        async with self._turn:
            # Right and wrong guesses take equally long, so that timing reveals nothing.
            await asyncio.sleep(self._pause)
            if not hmac.compare_digest(given.encode("utf-8", "replace"), self.password):
                self._pause = min(LONGEST_PAUSE, max(FIRST_PAUSE, 2 * self._pause))
                return _page(_("Wrong password."), 401)
            self._pause = 0.0
        key = secrets.token_urlsafe(32)
        self._keys.add(key)
        response = RedirectResponse("/", status_code=303)
        secure = request.scope.get("scheme") == "https"
        response.set_cookie(COOKIE, key, httponly=True, samesite="strict", secure=secure)
        return response


def _network(address: str) -> str:
    """The network of an address: itself, or the first half of an IPv6 address (one subscriber)."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(ipaddress.ip_network((found, 64), strict=False)) if found.version == 6 else address


async def read_body(request: Request, most: int) -> bytes | None:
    """The request's body, None where it has more than `most` bytes."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            return None
    return bytes(body)


def _page(note: str, status: int) -> HTMLResponse:
    return HTMLResponse(render("login.html", note=note), status_code=status)


HALF_OPEN, SLOWEST_REQUEST = 100, 10.0
"""How many connections may wait for the rest of a request at once, and for how many seconds."""


class Connection(H11Protocol):
    """An HTTP connection that is closed where a request does not arrive in time.

    uvicorn waits for the first request without a limit, so that clients that send none could take all file
    handles of the process. Of too many that wait, the oldest is closed: an honest one waits milliseconds.
    """

    _waiting: ClassVar[dict["Connection", asyncio.TimerHandle]] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """A part of a request has come; what trickles in does not give it more time."""
        super().data_received(data)
        own = self.transport.get_protocol() is self  # else a websocket's
        if own and (self.cycle is None or self.cycle.response_complete):
            self._wait()
        else:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self in self._waiting or self.transport.is_closing():
            return
        if len(self._waiting) >= HALF_OPEN:
            oldest = next(iter(self._waiting))
            oldest._stop_waiting()
            oldest.transport.abort()
        self._waiting[self] = self.loop.call_later(SLOWEST_REQUEST, self.transport.abort)

    def _stop_waiting(self) -> None:
        if timer := self._waiting.pop(self, None):
            timer.cancel()


LARGEST_BODY = 4_000_000
LARGEST_JSON = 32_000_000
"""Bytes that a page posts at most: 100,000 long names."""
LARGEST_HEADER = MAX_HEADER + 8
SLOWEST_BODY = 30.0
"""Seconds for a body of unknown length, which no page of the window sends."""
SAFE = {
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:;"
    " object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",  # without any referrer, forms would have no origin either
    "X-Content-Type-Options": "nosniff",
}
"""Headers of every answer: pages of other sites show nothing of ours, and ours load nothing from there."""
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
# A Host is a name or an address and a port, nothing else: `127.0.0.1:80/easel?` is a path that somebody
# hides.
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[\w.-]+)(?::\d{1,5})?", re.ASCII)


class Guard:
    """Refuses with 403 and a reason everything that does not come from the window's own page."""

    def __init__(self, app: ASGIApp, allowed: Iterable[str] = ()) -> None:
        """Wrap `app`; loopback names and `allowed` are accepted as hosts."""
        self.app = app
        self.allowed = {name.lower() for name in (*LOOPBACK, *allowed)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        reason = refusal(Headers(scope=scope), scope.get("method", "GET"), scope["path"], self.allowed)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SAFE.items():
                    headers.append(name, value)
            await send(message)

        if reason is None:
            await self._pass_on(scope, receive, answer)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": reason})
        else:
            await PlainTextResponse(reason, status_code=403)(scope, receive, answer)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on unless its body is too large; a body of unknown length is read first."""
        headers = Headers(scope=scope)
        held = "transfer-encoding" in headers
        most = _most_bytes(scope["path"], held) if scope["type"] == "http" else None
        if most is None:
            await self.app(scope, receive, send)
            return
        length = headers.get("content-length", "")
        if not held:
            # The server holds a body to the length that it says.
            too_large = not re.fullmatch("[0-9]{0,18}", length) or int(length or 0) > most
        else:
            try:
                async with asyncio.timeout(SLOWEST_BODY):
                    body = await read_body(Request(scope, receive), most)
            except (TimeoutError, ClientDisconnect):
                await PlainTextResponse("The request came too slowly.", 408)(scope, receive, send)
                return
            too_large, receive = body is None, _once(body or b"", receive)
        if too_large:
            answer = PlainTextResponse(
                f"The request is larger than the {most:,} bytes that this address accepts.", status_code=413
            )
            await answer(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def _once(body: bytes, after: Receive) -> Receive:
    """Replay a body that was already read, then continue with `after`."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return left.pop() if left else await after()

    return receive


def refusal(headers: Headers, method: str, path: str, allowed: set[str]) -> str | None:
    """Why a request is refused, or None."""
    host = headers.get("host", "")
    if host_name(host) not in allowed:
        return (
            f"The host {host!r} is not this computer. Open the address that LoRA Easel printed, or start it"
            " with --allow-host."
        )
    origin = headers.get("origin")
    if origin is not None and origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower()):
        return f"Another site ({origin}) asked for this; only LoRA Easel's own page may."
    site = headers.get("sec-fetch-site", "none").strip().lower()
    if site not in ("none", "same-origin") and not _opens_the_page(headers, method, path):
        return "Another site asked for this; only LoRA Easel's own page may."
    return None


def _most_bytes(path: str, held: bool) -> int | None:
    """The largest body accepted on `path`, in bytes; None for routes that count for themselves. `held` is one
    of unknown length, which has to be in memory before anyone has logged in."""
    if path.startswith("/easel/upload/"):
        return None
    if path == "/easel/like":
        return LARGEST_HEADER
    return LARGEST_JSON if path.startswith("/easel/") and not held else LARGEST_BODY


def _opens_the_page(headers: Headers, method: str, path: str) -> bool:
    """Whether this is a top-level GET navigation to the page: other sites may link to the window."""
    return (
        (method, path) == ("GET", "/")
        and headers.get("sec-fetch-mode") == "navigate"
        and headers.get("sec-fetch-dest") == "document"
    )


def host_name(host: str) -> str:
    """The name in a Host header without its port, "" if malformed; IPv6 addresses keep their brackets."""
    found = HOST.fullmatch(host.strip().lower())
    return found[1] if found else ""


def is_loopback(host: str) -> bool:
    """Whether listening on `host` keeps the window on this computer."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
