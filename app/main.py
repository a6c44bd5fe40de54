"""Start of the window: options, port, guard, server. torch is never imported here."""

import argparse
import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import urllib.request
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from app import gradio_modules, page  # noqa: F401 - before what imports Gradio
from app.guard import Connection, Guard, Login, is_loopback
from app.live import add_live_route
from app.routes import Traffic, add_routes
from app.state import AppState
from app.top_bar import add_project_routes
from lora_core.errors import LoraError, RunError
from lora_core.system.files import workspace, write_atomically
from lora_core.system.processes import FIRST_PORT, PORTS_TRIED

PASSWORD_VARIABLE = "LORA_EASEL_PASSWORD"


def build_parser() -> argparse.ArgumentParser:
    """The command line of `launch.py` and of `lora-easel-window`."""
    made = argparse.ArgumentParser(description="Open the window of LoRA Easel.")
    made.add_argument(
        "--port", type=int, help=f"the port to listen on; without it, {FIRST_PORT} or the next free one"
    )
    made.add_argument(
        "--host", default="127.0.0.1", help="the address to listen on; beyond 127.0.0.1 only with a password"
    )
    made.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a host name under which browsers may open it",
    )
    made.add_argument(
        "--password-file",
        type=Path,
        metavar="FILE",
        help=f"file with the password; or set {PASSWORD_VARIABLE}",
    )
    made.add_argument("--no-browser", action="store_true", help="do not open a browser")
    made.add_argument("--workspace", metavar="DIR", help="where runs, projects and images are kept")
    return made


def run() -> None:
    """Entry point of the `lora-easel-window` command."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: list[str]) -> int:
    """Open the window and serve it until Ctrl-C. Returns the exit code."""
    options = build_parser().parse_args(arguments)
    try:
        password = _password(options.password_file)
        if not is_loopback(options.host) and not password:
            raise RunError(
                f"Listening on {options.host} lets other computers in; give a password with --password-file"
                f" or {PASSWORD_VARIABLE}."
            )
        app_state = AppState(workspace(options.workspace))
        app_state.files.shared = not is_loopback(options.host)
        running = _already_open(app_state)
        if running is not None and options.port in (None, running):
            return _point_to(running, options)
        listener = _listener(options.host, options.port)
    except LoraError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return _serve(app_state, listener, options, password)


def build_app(app_state: AppState, allowed: list[str], password: str = "") -> Any:
    """Build the server as one ASGI app: guard, login, our routes, Gradio."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    add_routes(app, app_state)
    add_live_route(app, app_state.live)
    app.add_middleware(Traffic, app_state=app_state)
    add_project_routes(app, app_state)
    for tab in page.TABS:
        tab.add_routes(app, app_state)
    app_state.has_password = bool(password)
    inner: Any = page.mount(app, app_state, app_state.workspace / "tmp")
    if password:
        inner = Login(inner, password)
    return Guard(inner, allowed)


def _serve(app_state: AppState, listener: socket.socket, options: argparse.Namespace, password: str) -> int:
    port = listener.getsockname()[1]
    allowed = [*options.allow_host]
    if not is_loopback(options.host) and options.host not in ("0.0.0.0", "::"):
        allowed.append(f"[{options.host}]" if ":" in options.host else options.host)
    # By default Ctrl-C would wait until all pages are closed.
    config = uvicorn.Config(
        build_app(app_state, allowed, password),
        log_level="warning",
        timeout_graceful_shutdown=1,
        lifespan="on",
        http=Connection,
    )
    server = _Server(config, f"http://127.0.0.1:{port}", not options.no_browser, app_state.prepare)
    app_state.on_quit = server.quit
    # On a full disk the window opens, and says what it cannot write.
    with contextlib.suppress(OSError):
        write_atomically(app_state.workspace / "window.json", json.dumps({"port": port}).encode())
    # uvicorn raises the signal again once it has shut down; without this the worker would be left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Each thread that reads a folder may keep an answer waiting for so long, again and again; 5 ms is usual.
    sys.setswitchinterval(0.001)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        sys.stderr.write("\nLoRA Easel is closed. Runs continue.\n")
    finally:
        app_state.close()
    return 0


class _Server(uvicorn.Server):
    """Prints the line that scripts wait for once it is ready."""

    def __init__(
        self, config: uvicorn.Config, address: str, browser: bool, prepare: Callable[[], None]
    ) -> None:
        """`prepare` is called once it is ready, while the browser comes up."""
        super().__init__(config)
        self.address, self.browser, self.prepare = address, browser, prepare

    def quit(self) -> None:
        """End the server; runs are processes of their own and continue."""
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        # uvicorn asks ten times a second whether it should end, which takes more than an open page.
        await asyncio.sleep(0.4)
        return await super().on_tick(0)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # An open page holds a stream that is cut off here; uvicorn would print a traceback for each.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            _say_ready(self.address, self.browser)
            threading.Thread(target=self.prepare, daemon=True).start()


def _say_ready(address: str, browser: bool) -> None:
    sys.stdout.write(f"Ready at {address}\n")
    sys.stdout.flush()
    if browser:
        # On some platforms this blocks until the browser is up.
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()


def _password(file: Path | None) -> str:
    if file is None:
        return os.environ.get(PASSWORD_VARIABLE, "")
    try:
        password = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"The password file {file} cannot be read: {error}.") from error
    if not password:
        raise RunError(f"The password file {file} is empty.")
    return password


def _listener(host: str, port: int | None) -> socket.socket:
    """Open a listening socket on the port asked for, or on the first free one.

    Raises:
        RunError: the port asked for is busy, or none is free, or the address is not this computer's.
    """
    for candidate in [port] if port is not None else range(FIRST_PORT, FIRST_PORT + PORTS_TRIED):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        if os.name != "nt":
            # On Windows this option lets two servers share a port.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, candidate))
            listener.listen(128)
        except OSError as error:
            listener.close()
            if port is not None:
                raise RunError(
                    f"Port {port} on {host} cannot be used ({error.strerror or error})."
                ) from error
            continue
        if candidate not in (port, FIRST_PORT):
            sys.stdout.write(f"Port {FIRST_PORT} is taken by another program; using {candidate}.\n")
        return listener
    raise RunError(
        f"No port between {FIRST_PORT} and {FIRST_PORT + PORTS_TRIED - 1} is free on {host}; give one with"
        " --port."
    )


def _already_open(app_state: AppState) -> int | None:
    """The port of a window that is already open on this workspace; a busy one is waited for."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        port = int(json.loads((app_state.workspace / "window.json").read_text())["port"])
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(f"http://127.0.0.1:{port}/easel", timeout=20) as answer:
            known = json.loads(answer.read(1000))
        if known.get("app") == "lora-easel" and known.get("workspace") == app_state.identity:
            return port
    return None


def _point_to(port: int, options: argparse.Namespace) -> int:
    sys.stdout.write("LoRA Easel is already open on this workspace.\n")
    _say_ready(f"http://127.0.0.1:{port}", False)
    if not options.no_browser:
        webbrowser.open(f"http://127.0.0.1:{port}")
    return 0
