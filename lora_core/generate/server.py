"""The process of the warm worker: lines of JSON in and out, and a base that stays loaded for images.

Requests come on stdin, one object per line, each with an "id" and what to "do"; answers go to stdout and
carry the id. The first line says that the worker is ready, on which kind of device it computes and with which
torch. A request may name another "device", as `train.device` does, which later ones use too. "cancel" is read
while a request is worked on, and "quit" ends the worker.

Each method `do_...` is a request; `lora_core.worker` adds those about datasets and adapter files.
"""

import functools
import json
import math
import queue
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TextIO

import torch

from lora_core.data.images import save_png
from lora_core.errors import ConfigError, LoraError
from lora_core.generate.latent_preview import previewer
from lora_core.generate.pipeline import Pipeline, Truncate, open_pipeline
from lora_core.generate.request import GenerationRequest
from lora_core.models.device import best_device, describe_torch, out_of_memory, release_failed, use_device
from lora_core.settings.config import checked_value
from lora_core.system.files import unused_path
from lora_core.system.processes import others_spin

Request = dict[str, Any]
Result = dict[str, Any]
Answer = Callable[[dict[str, Any]], None]
SECONDS_BETWEEN_PROGRESS = 0.1
"""So that a file of many layers does not fill the pipe."""


class Cancelled(Exception):
    """The request was cancelled by its sender."""


class Reporter:
    """Answers progress for one request; every method raises Cancelled once the sender has cancelled it."""

    def __init__(self, answer: Answer, cancelled: set[str], name: str) -> None:
        """Answer through `answer` under the id `name`; `cancelled` holds the ids of cancelled requests."""
        self._answer, self._cancelled, self._name = answer, cancelled, name
        self._phase, self._sent_at = "", 0.0

    def check(self) -> None:
        """Do nothing but raise."""
        if self._name in self._cancelled:
            raise Cancelled

    def send(self, event: str, **what: Any) -> None:
        """Answer at once."""
        self.check()
        self._answer({"id": self._name, "event": event, **what})

    def phase(self, words: str, done: int = 0, total: int = 0) -> None:
        """Report the current phase and its progress."""
        if words != self._phase:
            self._phase, self._sent_at = words, 0.0
        self.step(done, total)

    def step(self, done: int, total: int) -> None:
        """Report progress, at most every `SECONDS_BETWEEN_PROGRESS`."""
        self.check()
        if time.monotonic() - self._sent_at >= SECONDS_BETWEEN_PROGRESS:
            self._sent_at = time.monotonic()
            self.send("progress", done=done, total=total, phase=self._phase)


class ImageWorker:
    """Does requests, one at a time, and keeps the base and the adapters that were used last."""

    phases: ClassVar[Mapping[str, str]] = {}
    """The phase that a slow request begins with."""

    def __init__(self, answer: Answer, truncate: Truncate) -> None:
        """Send answers through `answer`; `truncate` is that of the pipeline."""
        self.cancelled: set[str] = set()
        self._answer, self._truncate = answer, truncate
        self._threads = torch.get_num_threads()
        self._pipeline: Pipeline | None = None
        self._opened_as: tuple[str, ...] = ()

    def handle(self, request: Request) -> None:
        """Do one request; every problem becomes an answer, and the worker stays up.

        It uses one thread while another process trains, which is left the other cores.
        """
        torch.set_num_threads(1 if others_spin() else self._threads)
        name, began = str(request.get("id", "")), time.monotonic()
        try:
            result = self._do(request, Reporter(self._answer, self.cancelled, name))
            last = {"event": "done", "seconds": time.monotonic() - began, **result}
        except Exception as error:  # noqa: BLE001 - a defect costs one request
            last = {"event": "error", "message": _problem(error)}
        finally:
            self.cancelled.discard(name)
        self._answer({"id": name, **last})

    def _do(self, request: Request, report: Reporter) -> Result:
        report.check()
        known = {name[3:].replace("_", "-"): name for name in dir(self) if name.startswith("do_")}
        do = str(request.get("do"))
        if do not in known:
            raise ConfigError(f"The worker does not know {do!r}; it can {', '.join(known)}.")
        if "device" in request:
            before = best_device()
            if use_device(checked_value("train.device", request["device"], "device")) != before:
                self.release()
        if do in self.phases:
            report.phase(self.phases[do])
        result: Result = getattr(self, known[do])(request, report)
        return result

    def do_generate(self, request: Request, report: Reporter) -> Result:
        """One image for each of `strengths`, which multiply those of all adapters; all from one noise."""
        strengths = [float(s) for s in request.get("strengths", [1.0])]
        if not all(map(math.isfinite, strengths)):
            raise ConfigError(f"The strengths {strengths} should be finite numbers.")
        shot, folder = GenerationRequest.from_json(request), Path(str(request["out"]))
        pipeline = self.pipeline_for(shot)
        send = functools.partial(report.send, "look")
        preview = previewer(pipeline.rgb_matrix, send) if request.get("look") else None
        files: list[str] = []
        for index, factor in enumerate(strengths):

            def on_step(done: int, total: int, before: int = index) -> None:
                report.send("progress", done=before * total + done, total=total * len(strengths))

            scaled = replace(shot, loras=tuple(lora.times(factor) for lora in shot.loras))
            image = pipeline(scaled, on_step, preview)
            path = unused_path(folder, f"{time.strftime('%Y%m%d-%H%M%S')}-{shot.seed}-{factor:g}", ".png")
            save_png(image, path, pipeline.infotext(scaled))
            files.append(str(path))
            made = {"index": index, "strength": factor, "file": str(path), "ready_in": pipeline.ready_in}
            size = {"width": image.width, "height": image.height, "note": pipeline.note}
            self._answer({"id": request["id"], "event": "picture", **made, **size})
        return {"files": files}

    def do_release(self, request: Request, report: Reporter) -> Result:
        """Free the memory of base and adapters."""
        self.release()
        return {}

    def release(self) -> None:
        """Free the memory of base and adapters; never two bases at once, as there may be memory for one."""
        self._pipeline, self._opened_as = None, ()
        release_failed(None, best_device())

    def pipeline_for(self, shot: GenerationRequest) -> Pipeline:
        """The pipeline of a request's base, prediction type, noise schedule and VAE."""
        wanted = (shot.base, shot.prediction, shot.vae, shot.zero_terminal_snr)
        if self._pipeline is None or self._opened_as != wanted:
            self.release()
            self._pipeline, self._opened_as = open_pipeline(shot, self._truncate), wanted
        return self._pipeline


def _problem(error: Exception) -> str:
    """The answer to the sender; the traceback of a defect goes to the log."""
    match error:
        case Cancelled():
            return "Cancelled."
        case LoraError():
            return str(error)
        case KeyError() | TypeError() | ValueError():
            return f"The request is not understood: {type(error).__name__} {error}."
    if out_of_memory(error):
        return "The device ran out of memory; ask for a smaller image."
    traceback.print_exception(error)
    return f"A defect of the program: {type(error).__name__} {error}."


def serve(make_worker: Callable[[Answer], ImageWorker], incoming: TextIO, outgoing: TextIO) -> None:
    """Answer requests until `quit` or the end of `incoming`."""
    lock = threading.Lock()

    def answer(line: dict[str, Any]) -> None:
        with lock:
            outgoing.write(json.dumps(line, ensure_ascii=False) + "\n")
            outgoing.flush()

    worker = make_worker(answer)
    waiting: queue.Queue[Request | None] = queue.Queue()

    def read() -> None:
        for line in incoming:
            try:
                request = json.loads(line)
                do = request["do"]
            except (ValueError, KeyError, TypeError):
                message = "A request is one JSON object a line, with id and do."
                answer({"id": None, "event": "error", "message": message})
                continue
            if do == "cancel":
                worker.cancelled.add(str(request.get("target", "")))
            elif do == "quit":
                break
            else:
                waiting.put(request)
        waiting.put(None)

    threading.Thread(target=read, daemon=True).start()
    answer({"id": None, "event": "ready", **describe_torch()})
    while (request := waiting.get()) is not None:
        worker.handle(request)
