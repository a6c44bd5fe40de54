"""Routes shared by the tabs: images, thumbnails, downloads and captions, confined to known folders.

Gradio serves static files without login and copies every original into its cache; these routes are behind
guard and login. A path sent by the page is resolved and has to stay below its root.
"""

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote

import brotli
from fastapi import Depends, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.dataset.gallery import count_caption_tokens, versioned
from app.dataset.uploads import ROOM_LEFT
from app.guard import LARGEST_JSON, LOOPBACK, host_name, is_loopback, read_body
from app.state import SHARED, AppState
from app.templates import _
from app.train.form import Plan
from lora_core.data.captions import rules_of
from lora_core.data.images import IMAGE_SUFFIXES
from lora_core.errors import LoraError, RunError
from lora_core.projects.project import MEANT, relative_name
from lora_core.runs.folder import runs_folder
from lora_core.system.files import DEMO_TRAIN, clean_value, parse_json, safe_name, write_atomically

IMAGE_TYPES = set(IMAGE_SUFFIXES)
# Types that browsers render; others are sent as a large thumbnail.
SHOWN = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
ASSET_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
LARGEST_FILE = 2_000_000_000
MOST_SENT = 8
"""Files that were sent last are kept: several may arrive at once, or be compared or merged."""
SMALL = 1000
"""Bytes below which an answer is sent as it is."""
COMPRESSED = re.compile(r"/|/theme\.css|/easel/(dataset|insights|check|curves/.*)")
# URLs contain the file's time, so they can be cached indefinitely.
FRESH = {"Cache-Control": "no-store"}
KEEP = {"Cache-Control": "private, max-age=31536000, immutable"}


class BadRequest(Exception):
    """The path leads out of its root, or the request is malformed; answered with 404."""


class NotFound(Exception):
    """An image was moved or deleted after the page learned of it; answered with 204."""


def below(root: Path, path: str, suffixes: set[str], also: Sequence[Path] = ()) -> Path:
    """Resolve `path` below `root`.

    Args:
        root: the folder.
        path: relative to it.
        suffixes: the file types that may be served.
        also: other folders that a link below `root` may point into.

    Raises:
        BadRequest: the path leads out (`..`, absolute, a link), names no file, or is of another type.
    """
    plain = _join_below(root, path)
    try:
        found = plain.resolve(strict=True)
        tops = [root.resolve(strict=True), *(folder.resolve() for folder in also)]
    except (OSError, ValueError, RuntimeError) as error:
        raise BadRequest(path) from error
    allowed = any(map(found.is_relative_to, tops)) and found.suffix.lower() in suffixes
    if not allowed or not found.is_file():
        raise BadRequest(path)
    return found


def _join_below(root: Path, path: str) -> Path:
    """`root / path` with `..` resolved and links not followed.

    Raises:
        BadRequest: the path leads out of `root`.
    """
    plain = Path(os.path.abspath(root / path))
    if "\0" in path or not plain.is_relative_to(os.path.abspath(root)):
        raise BadRequest(path)
    return plain


def add_routes(app: FastAPI, app_state: AppState) -> None:
    """Add the shared routes to `app`."""
    _answer_problems(app)

    # Before what does not lock the project, such as a start of a run; see `Traffic`.
    async def same_project(request: Request) -> None:
        app_state.project.require_meant(_meant(request.headers))

    # Applies to all routes added from here on.
    app.router.dependencies.append(Depends(same_project))

    app.get("/easel")(lambda: Answer({"app": "lora-easel", "workspace": app_state.identity}))

    @app.get("/easel/picture/{kind}/{path:path}")
    async def image(kind: str, path: str) -> Response:
        file = _resolve_image(app_state, kind, path)
        if file.suffix.lower() in SHOWN and kind not in ("dataset", "left-out"):
            return FileResponse(file, media_type=SHOWN[file.suffix.lower()], headers=KEEP)
        return await _small(app_state, file, 1024)

    @app.get("/easel/thumb/{kind}/{path:path}")
    async def thumb(kind: str, path: str) -> Response:
        return await _small(app_state, _resolve_image(app_state, kind, path), 256)

    @app.get("/easel/download/{run}/{file}")
    def download(run: str, file: str) -> Response:
        whole = below(runs_folder(app_state.workspace), f"{run}/export/{file}", {".safetensors"})
        return FileResponse(whole, filename=whole.name, media_type="application/octet-stream")

    def save_caption(sent: dict[str, Any]) -> dict[str, Any]:
        text, before = str(sent.get("text", "")), app_state.project.revision
        app_state.project.save_caption(str(sent.get("picture", "")), text)
        revisions = {"before": before, "revision": app_state.project.revision}
        return {"saved": True, **revisions, **_tokens(app_state, sent)}

    add_actions(app, {"caption": save_caption, "tokens": lambda sent: _tokens(app_state, sent)})
    show = {"show-file": lambda sent: app_state.files.show(str(sent.get("file", "")))}
    add_actions(app, show, lambda: SHARED)
    board = {"tensorboard": lambda sent: {"address": app_state.tensorboard.open()}}
    add_actions(app, board, lambda: _("TensorBoard opens only on the computer that runs this window."))


def _meant(headers: Headers) -> str:
    """The project that a page shows, for `Project.require_meant`."""
    return unquote(headers.get("x-easel-project", ""))


def _require_near(request: Request, else_: str) -> None:
    """Refuse a page on another computer, with the sentence `else_`."""
    asker, host = request.client, request.headers.get("host", "")
    # A local proxy may speak for a remote client.
    near = asker is not None and is_loopback(asker.host) and "x-forwarded-for" not in request.headers
    if not near or host_name(host) not in LOOPBACK:
        raise RunError(else_)


def add_assets(app: FastAPI, files: Mapping[str, bytes], cache: Path) -> None:
    """Serve the page's own `files`, by name; compressed, they are kept in the folder `cache`."""

    def used() -> set[str]:
        return set(map(_packed_name, files.values()))

    @app.get("/easel/assets/{name}")
    async def asset(request: Request, name: str, v: str = "") -> Response:
        if name not in files:
            raise BadRequest(name)
        data, headers = files[name], {"Cache-Control": KEEP["Cache-Control"] if v else "no-cache"}
        if "br" in request.headers.get("accept-encoding", ""):
            data = await asyncio.to_thread(_compress, data, cache, used)
            headers |= {"Content-Encoding": "br", "Vary": "Accept-Encoding"}
        return Response(data, media_type=ASSET_TYPES[Path(name).suffix], headers=headers)


@functools.lru_cache(maxsize=8)
def _compress(data: bytes, cache: Path, used: Callable[[], set[str]]) -> bytes:
    """Quality 10 takes half a second of processor time, so only the first start of a version does it; what
    that does not use is removed then."""
    kept = cache / _packed_name(data)
    with contextlib.suppress(OSError, brotli.error):
        packed = kept.read_bytes()
        if brotli.decompress(packed) == data:
            return packed
    packed = bytes(brotli.compress(data, quality=10))
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, packed, sync=False)
        names = used()
        for old in cache.glob("*.br"):
            if old.name not in names:
                old.unlink(missing_ok=True)
    return packed


def _packed_name(data: bytes) -> str:
    return f"{hashlib.sha256(data).hexdigest()}.br"


@functools.lru_cache(maxsize=2)
def _compress_answer(data: bytes) -> bytes:
    return bytes(brotli.compress(data, quality=5))


def _compressed(send: Send) -> Send:
    """`send` for an answer that is compressed with Brotli, a sixth less than gzip, if it is in one piece."""
    start: Message = {}

    async def pass_on(message: Message) -> None:
        nonlocal start
        if message["type"] == "http.response.start":
            start = message
            return
        if start:
            body, headers = message.get("body", b""), MutableHeaders(raw=start["headers"])
            if len(body) >= SMALL and not message.get("more_body"):
                message = {**message, "body": _compress_answer(body)}
                headers["Content-Encoding"] = "br"
                headers["Content-Length"] = str(len(message["body"]))
                headers.add_vary_header("Accept-Encoding")
            await send(start)
            start = {}
        await send(message)

    return pass_on


OF_GRADIO = ("/gradio_api/run/", "/gradio_api/heartbeat/")
"""What the page uses of Gradio's API; the rest fetches from the web, takes files and prints in the terminal,
unescaped."""


class Traffic:
    """Compresses the page, lets browsers keep Gradio's files, which are named by their content, has pages
    look at the state after each POST, and says which project a page means, also in Gradio's events."""

    def __init__(self, app: ASGIApp, app_state: AppState) -> None:
        self.app, self.state, self.compressing = app, app_state, GZipMiddleware(app, minimum_size=SMALL)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on and the answer back."""
        path, asked = scope.get("path", ""), Headers(raw=scope.get("headers", []))
        if path.startswith("/gradio_api/") and not path.startswith(OF_GRADIO):
            await PlainTextResponse("There is no such address here.", 404)(scope, receive, send)
            return

        async def answer(message: Message) -> None:
            if path.startswith("/assets/") and message.get("status") == 200:
                MutableHeaders(scope=message)["Cache-Control"] = KEEP["Cache-Control"]
            await send(message)

        MEANT.set(_meant(asked))
        if path == "/":
            self.state.greet(asked.get("accept-language", ""))
        try:
            large = COMPRESSED.fullmatch(path)
            if large and "br" in asked.get("accept-encoding", ""):
                await self.app(scope, receive, _compressed(answer))
            else:
                compress = large or path.startswith("/easel/assets/")
                await (self.compressing if compress else self.app)(scope, receive, answer)
        finally:
            if scope.get("method") == "POST":
                self.state.live.wake()


def _answer_problems(app: FastAPI) -> None:
    """Answer each kind of exception with a sentence, never a traceback."""
    fault = "This failed because of a bug in LoRA Easel; its log has the details."
    answers: dict[type[Exception], Callable[[Request, Any], Response]] = {
        BadRequest: lambda request, error: PlainTextResponse("There is no such file here.", status_code=404),
        # The page is about to update by itself.
        NotFound: lambda request, error: Response(status_code=204),
        # The page shows the sentence; an error status would only log to the console.
        LoraError: lambda request, error: Answer({"problem": _(str(error))}),
        OSError: _disk_problem,
        # The traceback goes to the server's log.
        Exception: lambda request, error: Answer({"problem": _(fault)}, status_code=500),
    }
    for kind, answer in answers.items():
        app.add_exception_handler(kind, answer)


def _disk_problem(request: Request, error: OSError) -> Response:
    logging.getLogger(__name__).warning("%s %s: %r", request.method, request.url.path, error)
    return Answer({"problem": _("A file or folder cannot be used: {}.", error.strerror or error)})


class Answer(JSONResponse):
    """A JSON response that no browser keeps, and that tolerates invalid text and non-finite numbers."""

    def __init__(self, content: Any, status_code: int = 200) -> None:
        super().__init__(content, status_code, FRESH)

    def render(self, content: Any) -> bytes:
        """Encode the body, replacing what JSON cannot hold; bytes are JSON already."""
        if isinstance(content, bytes):
            return content
        try:
            return super().render(content)
        except ValueError:
            return super().render(clean_value(content))


def _resolve_image(app_state: AppState, kind: str, path: str) -> Path:
    roots = {
        "dataset": app_state.project.dataset_folder,
        "left-out": app_state.project.left_out_folder,
        "run": runs_folder(app_state.workspace),
        "generated": app_state.generated,
        "demo": DEMO_TRAIN.parent,
    }
    if kind not in roots:
        raise BadRequest(kind)
    root = roots[kind]
    try:
        return below(root, path, IMAGE_TYPES, app_state.project.linked_folders)
    except BadRequest as error:
        plain = _join_below(root, path)
        if plain.suffix.lower() in IMAGE_TYPES and not os.path.lexists(plain):
            raise NotFound(path) from error
        raise


def too_many() -> RunError:
    """What to answer where a page has sent more than is taken."""
    return RunError(_("That is more than can be sent at once; choose fewer images."))


async def _read_sent(request: Request) -> dict[str, Any]:
    body = await read_body(request, LARGEST_JSON)
    if body is None:
        raise too_many()
    try:
        sent = parse_json(body or "{}")
    except ValueError as error:
        raise BadRequest("not JSON") from error
    if not isinstance(sent, dict):
        raise BadRequest("not an object")
    return sent


Sent = Annotated[dict[str, Any], Depends(_read_sent)]
"""What a page posted: a JSON object, {} without a body."""


def add_reads(app: FastAPI, reads: Mapping[str, Callable[[], Any]]) -> None:
    """Add a GET route below /easel for each function; it answers with what that returns."""

    def route(read: Callable[[], Any]) -> Callable[[], Response]:
        return lambda: Answer(read())

    for path, read in reads.items():
        app.get(f"/easel/{path}")(route(read))


def add_actions(
    app: FastAPI,
    actions: Mapping[str, Callable[[dict[str, Any]], Any]],
    near: Callable[[], str] | None = None,
) -> None:
    """Add a POST route below /easel for each action, which is called with what a page sent; it answers with
    what that returns, or that it is done. With `near`, a page on another computer is refused with that."""

    def route(act: Callable[[dict[str, Any]], Any]) -> Any:
        def answer(request: Request, sent: Sent) -> Response:
            if near is not None:
                _require_near(request, near())
            return Answer(act(sent) or {"done": True})

        return answer

    for path, act in actions.items():
        app.post(f"/easel/{path}")(route(act))


async def receive_file(request: Request, folder: Path, name: str) -> Path:
    """Write the request's body below `folder` under its own name, and remove older ones.

    Raises:
        RunError: it is too large, or the disk is full.
    """
    await asyncio.to_thread(_remove_old, folder)
    place = folder / uuid.uuid4().hex
    place.mkdir(parents=True)
    path = place / safe_name(name).name
    room = min(LARGEST_FILE, shutil.disk_usage(place).free - ROOM_LEFT)
    with open(path, "wb") as file:
        async for chunk in request.stream():
            room -= len(chunk)
            if room < 0:
                raise RunError(_("{name} is too large; give its path instead.", name=name))
            file.write(chunk)
    return path


def _remove_old(folder: Path) -> None:
    """Remove all but the files that were sent last."""
    with contextlib.suppress(OSError):
        sent = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)
        for path in sent[:-MOST_SENT]:
            shutil.rmtree(path, ignore_errors=True)


def _tokens(app_state: AppState, sent: dict[str, Any]) -> dict[str, Any]:
    """The tokens of a text as the caption of an image, by the rules of its concept if it has one."""
    text, plan, trigger = str(sent.get("text", "")), Plan(app_state.project), None
    record = app_state.project.images().get(str(sent.get("picture", "")))
    if record and record.concept:
        text = dataclasses.replace(record, caption=text).full_caption
        trigger = rules_of(record, plan.config.dataset).trigger
    return dataclasses.asdict(count_caption_tokens(text, plan, trigger))


async def _small(app_state: AppState, file: Path, side: int) -> Response:
    try:
        data = await app_state.thumbs.webp(file, side)
    except FileNotFoundError as error:
        raise NotFound(file.name) from error
    return Response(data, media_type="image/webp", headers=KEEP)


def image_url(kind: str, root: Path, file: Path, size: str = "picture") -> str:
    """URL of an image; it contains the file's time, so browsers may cache it indefinitely."""
    return f"/easel/{size}/{kind}/{versioned(file, relative_name(file, root))}"


def run_url(app_state: AppState) -> Callable[..., str]:
    """Gives the URL of an image in a run's folder, as `image_url`."""
    return functools.partial(image_url, "run", runs_folder(app_state.workspace))
