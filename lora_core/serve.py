"""The warm worker: one process that keeps a base model loaded and answers a line of JSON with lines of JSON.

Requests come on stdin, one object a line, each with an "id" and what to "do"; answers go to stdout and carry
the id. The first line says that it is ready, on which kind of device it computes and with which torch
(`describe_torch`). A request may name another "device", as `train.device` does, which counts from then on.
`cancel` is read while a picture is made. What the verbs do is in `worker/`.
"""

import io
import json
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, TextIO

import torch

from lora_core.errors import ConfigError, LoraError
from lora_core.models.device import best_device, describe_torch, out_of_memory, use_device
from lora_core.settings.config import checked_value
from lora_core.system.cpu_threads import others_spin
from lora_core.worker import files
from lora_core.worker.analyse import Analysing
from lora_core.worker.draw import Cancelled, Drawing
from lora_core.worker.insights import Insights
from lora_core.worker.probe import Probe
from lora_core.worker.remake import Remaking

Request = dict[str, Any]
Answer = Callable[..., None]


class Worker:
    """Passes requests to verbs and answers for them."""

    def __init__(self, answer: Callable[[dict[str, Any]], None]) -> None:
        """Send answers through `answer`."""
        self.cancelled: set[str] = set()
        self._answer = answer
        self._threads = torch.get_num_threads()
        drawing = Drawing(answer, self.cancelled)
        insights = Insights(answer, self.cancelled, drawing.bare_base)
        self._release = drawing.release
        analysing = Analysing(answer, self.cancelled, drawing.release)
        self._verbs: dict[str, Callable[[Request], dict[str, Any]]] = {
            "generate": drawing.generate, "sheet": drawing.sheet, "export": files.export,
            "inspect": files.inspect, "verify": files.verify, "release": drawing.release,
            "captions": insights.captions, "triggers": insights.triggers, "pictures": insights.pictures,
            "probe": Probe(answer, self.cancelled, drawing.release).probe,
            **analysing.verbs(), **Remaking(analysing.telling).verbs(),
        }  # fmt: skip

    def handle(self, request: Request) -> None:
        """Do one request; every problem becomes an answer, so that the worker goes on.

        With one thread where a training is going on, which is left the other cores.
        """
        torch.set_num_threads(1 if others_spin() else self._threads)
        name = str(request.get("id", ""))
        began = time.monotonic()
        try:
            verb = self._verb(request)
            self._move(request)
            result = verb(request)
            self._answer({"id": name, "event": "done", "seconds": time.monotonic() - began, **result})
        except Cancelled:
            self._answer({"id": name, "event": "error", "message": "Cancelled."})
        except LoraError as error:
            self._answer({"id": name, "event": "error", "message": str(error)})
        except (KeyError, TypeError, ValueError) as error:
            message = f"The request is not understood: {type(error).__name__} {error}."
            self._answer({"id": name, "event": "error", "message": message})
        except Exception as error:  # noqa: BLE001 - a defect costs one request, and its traceback is kept
            if out_of_memory(error):
                message = "The device ran out of memory; ask for a smaller picture."
            else:
                traceback.print_exc()
                message = f"A defect of the program: {type(error).__name__} {error}."
            self._answer({"id": name, "event": "error", "message": message})
        finally:
            self.cancelled.discard(name)

    def _move(self, request: Request) -> None:
        """Go to the device that a request names; a base on another one is let go."""
        if "device" in request:
            before = best_device()
            if use_device(checked_value("train.device", request["device"], "device")) != before:
                self._release({})

    def _verb(self, request: Request) -> Callable[[Request], dict[str, Any]]:
        if str(request.get("id", "")) in self.cancelled:
            raise Cancelled
        verb = self._verbs.get(str(request.get("do")))
        if verb is None:
            raise ConfigError(
                f"The worker does not know {request.get('do')!r}; it can {', '.join(self._verbs)}."
            )
        return verb


def serve(incoming: TextIO, outgoing: TextIO) -> None:
    """Answer requests until `quit` or the end of `incoming`."""
    lock = threading.Lock()

    def answer(line: dict[str, Any]) -> None:
        with lock:
            outgoing.write(json.dumps(line, ensure_ascii=False) + "\n")
            outgoing.flush()

    worker = Worker(answer)
    waiting: queue.Queue[Request | None] = queue.Queue()
    reader = threading.Thread(target=_read, args=(incoming, waiting, worker, answer), daemon=True)
    reader.start()
    answer({"id": None, "event": "ready", **describe_torch()})
    while (request := waiting.get()) is not None:
        worker.handle(request)


def _read(incoming: TextIO, waiting: "queue.Queue[Request | None]", worker: Worker, answer: Answer) -> None:
    for line in incoming:
        try:
            request = json.loads(line)
            do = request["do"]
        except (ValueError, KeyError, TypeError):
            answer(
                {
                    "id": None,
                    "event": "error",
                    "message": "A request is one JSON object a line, with id and do.",
                }
            )
            continue
        if do == "cancel":
            worker.cancelled.add(str(request.get("target", "")))
        elif do == "quit":
            break
        else:
            waiting.put(request)
    waiting.put(None)


def main() -> None:
    """Serve on the process's own stdin and stdout, in UTF-8; what libraries print goes to stderr."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    outgoing = sys.stdout
    sys.stdout = sys.stderr
    serve(sys.stdin, outgoing)
