"""Who may talk to the window: a pure-ASGI guard in front of every route, Gradio's own included.

A server on localhost is reachable by any page that the person has open. Plain Gradio answers a rebound page
(`Host: evil.example`) and takes uploads and events from other origins; a middleware of hosts alone stops only
the first. So three things are checked: the Host, the Origin, and what the browser says of where a request
comes from. A body that is larger than any page sends is refused too, before anything holds it in memory.
"""

import ipaddress
import re
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lora_core.spec.tensor_file import MAX_HEADER

LARGEST_BODY = 4_000_000
LARGEST_HEADER = MAX_HEADER + 8
UPLOADS = ("/easel/upload/", "/gradio_api/upload")
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
# A Host is a name or an address and a port, nothing else: `127.0.0.1:80/easel?` is a path that somebody
# hides.
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[\w.-]+)(?::\d{1,5})?", re.ASCII)


class Guard:
    """Refuses with 403 and a sentence what does not come from the window's own page."""

    def __init__(self, app: ASGIApp, allowed: Iterable[str] = ()) -> None:
        """Stand in front of `app`, letting through loopback names and those `allowed` besides."""
        self.app = app
        self.allowed = {name.lower() for name in (*LOOPBACK, *allowed)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        reason = refusal(Headers(scope=scope), scope.get("method", "GET"), self.allowed)
        if reason is None:
            await self._pass_on(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": reason})
        else:
            await PlainTextResponse(reason, status_code=403)(scope, receive, send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on, its body read first where its length is not said, unless it is too large."""
        most = _most_bytes(scope["path"]) if scope["type"] == "http" else None
        if most is None:
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        if "transfer-encoding" not in headers:
            # The server holds a body to the length that it says.
            too_large = not re.fullmatch("[0-9]{0,18}", length) or int(length or 0) > most
        else:
            body, more = b"", True
            while more and len(body) <= most:
                message = await receive()
                body += message.get("body", b"")
                more = message["type"] == "http.request" and message.get("more_body", False)
            too_large, receive = len(body) > most, _once(body, receive)
        if too_large:
            answer = PlainTextResponse(
                f"What was sent is larger than the {most:,} bytes that this address takes.", status_code=413
            )
            await answer(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def _once(body: bytes, after: Receive) -> Receive:
    """Gives out a body that was read already, then what comes after it."""
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return left.pop() if left else await after()

    return receive


def refusal(headers: Headers, method: str, allowed: set[str]) -> str | None:
    """Why a request is refused, in a sentence, or None."""
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
    if site not in ("none", "same-origin") and not _opens_the_page(headers, method):
        return "Another site asked for this; only LoRA Easel's own page may."
    return None


def _most_bytes(path: str) -> int | None:
    """How large the body of a request may be, in bytes; None for routes that count for themselves."""
    if path.startswith(UPLOADS):
        return None
    return LARGEST_HEADER if path == "/easel/like" else LARGEST_BODY


def _opens_the_page(headers: Headers, method: str) -> bool:
    """A link on another site may open the window, at the top level and by GET only."""
    return (
        method == "GET"
        and headers.get("sec-fetch-mode") == "navigate"
        and headers.get("sec-fetch-dest") == "document"
    )


def host_name(host: str) -> str:
    """The name in a Host header, without its port, or "" where it is none; an IPv6 address keeps its
    brackets."""
    found = HOST.fullmatch(host.strip().lower())
    return found[1] if found else ""


def is_loopback(host: str) -> bool:
    """Whether listening on `host` keeps the window on this computer."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
