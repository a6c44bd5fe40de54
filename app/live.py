"""The live stream: what moves on the page, as server-sent events.

Each part of the page, HTML of a card or state of work under way, has a name and the number of the look at
which it last changed. A page says which number it has seen and is sent the parts that changed since, so an
older state never replaces a newer one; nothing is sent while nothing changes, but a beat. All pages share the
looks, which are taken one after the other and only while a page is open.
"""

import asyncio
import contextlib
import json
import logging
import secrets
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse

from lora_core.system.files import clean_value

WORK_EVERY, LIVE_EVERY, IDLE_EVERY, HIDDEN_EVERY = 0.25, 1.0, 5.0, 10.0
"""Seconds from look to look: at work under way, at everything while a run is live, at
everything when idle, of a hidden page."""
BEAT, RECONNECT = 20.0, 1.0
FOR_HIDDEN = ("run-bar",)
"""What a hidden page still follows, for its title and the notification at a run's end."""


class LiveStream:
    """Looks at the parts of the page, numbers their changes, and sends each page those it has not seen.

    Attributes:
        look: returns all parts by name, and whether something changes by itself.
        feeds: the state of work by name, as data for scripts; looked at more often while it is "working", and
            everything is once it has "made" something.
    """

    def __init__(self) -> None:
        self.look: Callable[[], tuple[Mapping[str, Any], bool]] = lambda: ({}, False)
        self.feeds: dict[str, Callable[[], Mapping[str, Any]]] = {}
        self._epoch = secrets.token_hex(4)
        self._number = 0
        self._parts: dict[str, tuple[int, str]] = {}
        self._lock = threading.Lock()
        self._stale, self._busy, self._working, self._looked_at = True, False, False, 0.0
        self._marks: dict[str, tuple[bool, object]] = {}
        self._changed = asyncio.Event()

    def wake(self) -> None:
        """Look at once, as something has changed; called in the server's loop."""
        self._stale = True
        self._signal()

    def _signal(self) -> None:
        event, self._changed = self._changed, asyncio.Event()
        event.set()

    async def events(self, seen: str, hidden: bool = False) -> AsyncIterator[str]:
        """What a page is sent: first the parts that it has not seen, then each change.

        Args:
            seen: id of the last event that the page got, "" for none.
            hidden: sends the parts of a hidden page and ends; the browser asks again later.
        """
        self._stale = True
        epoch, _, number = seen.partition("-")
        last = int(number) if epoch == self._epoch and number.isdecimal() else 0
        yield f"retry: {1000 * (HIDDEN_EVERY if hidden else RECONNECT):.0f}\n\n"
        sent_at = 0.0
        while True:
            changed, before = self._changed, self._number
            try:
                await asyncio.to_thread(self._look_if_due)
            except Exception:
                # The pages stay as they are, and the next look may succeed.
                logging.getLogger(__name__).exception("What the page shows cannot be made")
            if self._number != before:
                self._signal()
            now, parts = self._number, self._parts
            names = [name for name in (FOR_HIDDEN if hidden else parts) if parts.get(name, (0,))[0] > last]
            if names or time.monotonic() - sent_at > BEAT:
                number = "" if hidden else f"id: {self._epoch}-{now}\n"
                data = ",".join(f"{json.dumps(name)}:{parts[name][1]}" for name in names)
                yield f"{number}data: {{{data}}}\n\n"
                last, sent_at = now, time.monotonic()
            if hidden:
                return
            pause = WORK_EVERY if self._working else LIVE_EVERY if self._busy else IDLE_EVERY
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), pause)

    def _look_if_due(self) -> None:
        """Take the look that is due: at everything, or at work under way alone."""
        with self._lock:
            since = time.monotonic() - self._looked_at
            every = LIVE_EVERY if self._busy or self._working else IDLE_EVERY
            all_due = self._stale or since > every - 0.05  # Timers may ring a little early.
            if not all_due and not self._working:
                return
            self._stale = self._stale and not all_due
            states = {name: feed() for name, feed in self.feeds.items()}
            marks = {name: (state["state"] == "working", state.get("made")) for name, state in states.items()}
            values: dict[str, Any] = {}
            # What work came to shows elsewhere too.
            if all_due or marks != self._marks:
                self._looked_at = time.monotonic()
                shown, busy = self.look()
                values = dict(shown)
                self._busy = busy
            self._marks, self._working = marks, any(working for working, _ in marks.values())
            self._keep(values | states)

    def _keep(self, values: Mapping[str, Any]) -> None:
        number = self._number + 1
        texts = {name: json.dumps(clean_value(value)) for name, value in values.items()}
        changed = {n: (number, text) for n, text in texts.items() if self._parts.get(n, (0, ""))[1] != text}
        if changed:
            self._parts = self._parts | changed
            self._number = number


def add_live_route(app: FastAPI, live: LiveStream) -> None:
    """Serve the stream at /easel/live."""
    # Gradio's own stream would take one of the six connections that a browser has, for each open page.
    app.get("/gradio_api/heartbeat/{session}")(lambda session: Response(media_type="text/event-stream"))

    @app.get("/easel/live")
    async def stream(request: Request, seen: str = "", hidden: bool = False) -> StreamingResponse:
        # The browser names the last event when it reconnects by itself.
        events = live.events(request.headers.get("last-event-id") or seen, hidden)
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", "Content-Encoding": "gzip"}
        return StreamingResponse(_compress(events), media_type="text/event-stream", headers=headers)


async def _compress(texts: AsyncIterator[str]) -> AsyncIterator[bytes]:
    """Compress each event and flush it."""
    made = zlib.compressobj(wbits=31)
    async for text in texts:
        yield made.compress(text.encode()) + made.flush(zlib.Z_SYNC_FLUSH)
    yield made.flush()
