"""Who may talk to the window: a pure-ASGI guard in front of every route, Gradio's own included.

A server on localhost is reachable by any page that the person has open. Plain Gradio answers a rebound page
(`Host: evil.example`) and takes uploads and events from other origins; a middleware of hosts alone stops only
the first. So three things are checked: the Host, the Origin, and what the browser says of where a request
comes from.
"""

import ipaddress
import re
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

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
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": reason})
        else:
            await PlainTextResponse(reason, status_code=403)(scope, receive, send)


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
    site = headers.get("sec-fetch-site", "none")
    if site in ("cross-site", "same-site") and not _opens_the_page(headers, method):
        return "Another site asked for this; only LoRA Easel's own page may."
    return None


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
