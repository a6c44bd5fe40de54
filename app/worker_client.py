"""Client of the warm worker: a process that keeps a base model loaded and serves previews and exports.

The window itself never imports torch. Requests are queued and sent one at a time. If the worker dies, the
current request is answered with the reason and the next one starts a new process. On a GPU the process is
ended as soon as a run begins, because even an idle one holds memory; its request is queued again and
restarted when memory is free.
"""

import base64
import contextlib
import json
import subprocess
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from app.templates import _, pluralize
from lora_core.settings.schema import AUTO
from lora_core.system.processes import detached, last_log_line

CANCELLED = "Cancelled."
HOLDERS = ("generate", "captions", "triggers", "pictures")
"""Requests after which the worker holds a base."""
COMPUTING = (*HOLDERS, "caption", "probe", "intrinsic", "strength", "warm")
"""Requests that take memory of the device; others do with `measure` in them."""
CARDS = ("cuda", "xpu")
"""Devices with memory of their own."""
LOOK_AROUND_EVERY = 1.0
"""Seconds between two looks at whether somebody else needs the memory: a run imports torch for longer
than that before it takes any. A look at 200 runs takes a hundredth of it."""
LOOK_EVERY = 0.3
"""Seconds between two looks at whether a request should give way."""
GAVE_WAY = "Waiting: a run begins on the GPU."
STARTING_TAKES = "Starting the worker, which takes some seconds the first time."


@dataclass
class Reply:
    """Progress and result of one request."""

    request: dict[str, Any]
    state: str = "waiting"  # waiting, working, done, error
    done: int = 0
    total: int = 0
    message: str = ""
    phase: str = ""
    images: list[dict[str, Any]] = field(default_factory=list)
    look: bytes = b""
    looks: int = 0
    dropped: bool = False
    gave_way: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    finished: threading.Event = field(default_factory=threading.Event)


class WorkerClient:
    """Owns the worker process."""

    def __init__(self, command: list[str], environment: dict[str, str], log_file: Path) -> None:
        """Store the command; the process starts with the first request or `warm()`."""
        self.command = command
        self.environment = environment
        self.log_file = log_file
        self.ready = False
        self.found: dict[str, str] = {}
        """What the process says of its PyTorch (`describe_torch` of the engine), once known."""
        self.wanted_device: Callable[[], str] = lambda: ""
        """Gives the value of `train.device` that requests are answered on, "" to leave it."""
        self.waiting: list[Reply] = []
        """Waiting requests, in order."""
        self.in_hand: Reply | None = None
        self.is_needed_elsewhere: Callable[[float], bool] = lambda idle: False
        """Called with the seconds since the last request; returns whether the memory should be freed."""
        self.holds_memory = False
        self.in_the_way: Callable[[dict[str, Any]], str] = lambda request: ""
        """Says why a request that takes the device's memory has to wait, "" where it may begin."""
        self._idle_since = time.monotonic()
        self._asked = threading.Event()
        self._gave_way = False
        """Whether the process was ended for a run since something was begun, which then is not lost."""
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._starting = threading.Lock()
        """Held while the process is checked, started or ended, so that each sees what the others did."""
        self._closed = False

    @property
    def device(self) -> str:
        """Device type that torch computes on ("cuda", "cpu", ...), "" while unknown."""
        return self.found.get("device", "")

    def warm(self) -> None:
        """Start the process in the background, so that the first preview does not wait for it."""
        if not self.ready and not any(reply.request["do"] == "warm" for reply in list(self.waiting)):
            self.submit({"do": "warm"})

    def submit(self, request: dict[str, Any]) -> Reply:
        """Queue a request; the reply is filled in as the worker answers."""
        reply = Reply({"id": uuid.uuid4().hex, **request})
        self.waiting.append(reply)
        self._asked.set()
        with self._lock:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._serve, daemon=True, name="worker-client")
                self._thread.start()
        return reply

    def ask(self, request: dict[str, Any], timeout: float = 600.0) -> Reply:
        """Queue a request and wait for its result."""
        reply = self.submit(request)
        if not reply.finished.wait(timeout):
            reply.state, reply.message = "error", _("No answer came within {:.0f} seconds.", timeout)
        return reply

    def cancel(self, reply: Reply) -> None:
        """Cancel a request: at once while it waits, within one sampler step while it runs."""
        reply.dropped = True
        self._asked.set()
        if reply.state == "working":
            self._write({"id": uuid.uuid4().hex, "do": "cancel", "target": reply.request["id"]})

    def follow(self, reply: Reply, gives_way: Callable[[], str], ended: Callable[[], None]) -> None:
        """Call `ended` in a thread once a request has ended; cancel it as soon as `gives_way` says why."""

        def watch() -> None:
            while not reply.finished.wait(LOOK_EVERY):
                if not reply.dropped and (reason := gives_way()):
                    reply.gave_way = reason
                    self.cancel(reply)
            ended()

        threading.Thread(target=watch, daemon=True, name=reply.request["do"]).start()

    def describe(self, reply: Reply) -> str:
        """What a request waits for, else what the worker says of it."""
        if reply.state == "waiting" and not reply.message:
            may_begin = [one for one in list(self.waiting) if not one.message]
            ahead = next((n for n, one in enumerate(may_begin, 1) if one is reply), 0)
            if ahead:
                return _("Waiting: {} before this one.", pluralize(ahead, "request"))
        return _(reply.message)

    def release(self) -> None:
        """Free the worker's memory, on a GPU by ending the process."""
        if not self._on_card:
            if self.ready:
                self.submit({"do": "release"})
            return
        with self._starting:
            process = self._process
            if process is not None and process.poll() is None:
                self._gave_way = True
                self.ready = self.holds_memory = False
                _kill(process)

    @property
    def pid(self) -> int | None:
        """The process."""
        return self._process.pid if self._process else None

    @property
    def computes_on(self) -> str:
        """Device type that requests are served on, "" while unknown."""
        wanted = self.wanted_device()
        return self.device if wanted in ("", AUTO) else wanted.partition(":")[0]

    @property
    def _on_card(self) -> bool:
        return self.ready and self.computes_on in CARDS

    def close(self) -> None:
        """End the process."""
        with self._starting:
            self._closed = True
            process = self._process
        if process is not None:
            _kill(process)
            _close_pipes(process)

    def _serve(self) -> None:
        while not self._closed:
            self._asked.clear()
            reply = next(filter(self._may_begin, list(self.waiting)), None)
            if reply is None:
                # Without waiting requests or held memory there is nothing to poll for.
                holds = self.holds_memory or self._on_card
                asked = self._asked.wait(LOOK_AROUND_EVERY if holds or self.waiting else None)
                if holds and not asked and self.is_needed_elsewhere(time.monotonic() - self._idle_since):
                    self.release()
                continue
            self.in_hand = reply
            self.waiting.remove(reply)
            reply.state = "working"
            reply.message = "" if self.ready else STARTING_TAKES
            try:
                self._answer(reply)
            except (OSError, ValueError) as error:
                self._end(reply, "error", self._death(str(error)))
            self.in_hand, self._idle_since = None, time.monotonic()
            do = reply.request["do"]
            emptied = do in ("release", "probe", "caption")
            self.holds_memory = self.ready and (do in HOLDERS or (self.holds_memory and not emptied))

    def _may_begin(self, reply: Reply) -> bool:
        computes = reply.request["do"] in COMPUTING or "measure" in reply.request
        reply.message = self.in_the_way(reply.request) if computes and not reply.dropped else ""
        return not reply.message

    def _answer(self, reply: Reply) -> None:
        if reply.dropped:
            self._end(reply, "error", CANCELLED)
            return
        process = self._running_process()
        if process is None:
            self._end(reply, "error", self._death(_("it could not be started")))
            return
        if not self._may_begin(reply):
            # The device is known only now.
            self._put_back(reply)
            return
        if reply.request["do"] == "warm":
            self._end(reply, "done", "")
            return
        device = self.wanted_device()
        self._write({**({"device": device} if device else {}), **reply.request})
        if reply.dropped:
            # Cancelled while the process started.
            self.cancel(reply)
        last_look = time.monotonic()
        for message in _messages(process.stdout):
            if message.get("id") == reply.request["id"] and self._take(reply, message):
                return
            if self._on_card and time.monotonic() - last_look >= LOOK_AROUND_EVERY:
                last_look = time.monotonic()
                if self.is_needed_elsewhere(0.0):
                    self.release()
        self.ready = False
        code = process.wait()
        if not self._gave_way:
            self._end(reply, "error", self._death(_("it ended with code {code}", code=code)))
        elif reply.dropped:
            self._end(reply, "error", CANCELLED)
        else:
            reply.message, reply.done, reply.look, reply.images = GAVE_WAY, 0, b"", []
            self._put_back(reply)

    def _put_back(self, reply: Reply) -> None:
        """Requeue a request at the front."""
        reply.state = "waiting"
        self.waiting.insert(0, reply)

    def _take(self, reply: Reply, message: dict[str, Any]) -> bool:
        """Apply one message to the reply; returns whether it was the last."""
        match message.get("event"):
            case "progress":
                reply.done, reply.total = int(message.get("done", 0)), int(message.get("total", 0))
                reply.phase = str(message.get("phase", ""))
            case "look":
                with contextlib.suppress(ValueError):
                    reply.look = base64.b64decode(str(message.get("image", "")), validate=True)
                    reply.looks += 1
            case "picture":
                reply.images.append(message)
            case "done":
                reply.result = message
                self._end(reply, "done", "")
                return True
            case "error":
                self._end(
                    reply, "error", str(message.get("message", _("It failed without giving a reason.")))
                )
                return True
        return False

    def _end(self, reply: Reply, state: str, message: str) -> None:
        reply.state, reply.message = state, message
        reply.finished.set()

    def _running_process(self) -> subprocess.Popen[bytes] | None:
        with self._starting:
            self._gave_way = False
            if self._process is not None and self._process.poll() is None:
                return self._process
        if self._process is not None:
            _close_pipes(self._process)
        self.ready = False
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self._starting, open(self.log_file, "ab") as log:
            if self._closed:
                return None
            # Ctrl-C in the terminal reaches the window, which ends the worker itself.
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                env=self.environment, **detached(),
            )  # fmt: skip
        for message in _messages(self._process.stdout):
            if message.get("event") == "ready":
                self.ready = True
                self.found = {key: value for key, value in message.items() if isinstance(value, str)}
                return self._process
        return None

    def _write(self, request: dict[str, Any]) -> None:
        process = self._process
        if process is None or process.stdin is None:
            return
        # Where the process has ended, the reader of its output reports it.
        with self._lock, contextlib.suppress(OSError):
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()

    def _death(self, reason: str) -> str:
        last = last_log_line(self.log_file)
        return _("The worker process ended: {}. It restarts with the next request. {}", reason, last).strip()


def _messages(stream: IO[bytes] | None) -> Any:
    """Parse a stream of JSON lines; other output is skipped."""
    for line in stream or ():
        try:
            message = json.loads(line)
        except ValueError:
            continue
        if isinstance(message, dict):
            yield message


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a worker, which writes files atomically; asking it to quit would only make Ctrl-C slow."""
    process.kill()
    # It may hold gigabytes, which a busy system takes its time to free.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(60)


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            # Unwritten data has no reader any more.
            with contextlib.suppress(OSError, ValueError):
                pipe.close()
