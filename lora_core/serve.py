"""The warm worker: one process that keeps a base model loaded and answers a line of JSON with lines of JSON.

Requests come on stdin, one object a line, each with an "id" and what to "do"; answers go to stdout and carry
the id. A strength that changes costs a merge of the factors, never a reload. `cancel` is read while a picture
is made.
"""

import io
import json
import math
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

from lora_core.adapters.inject import Merger, Strengthened
from lora_core.formats.file import read_adapter
from lora_core.formats.inspect import inspect_file
from lora_core.formats.verify import verified
from lora_core.models.device import best_device, dtype_of
from lora_core.models.encode import negative_condition, text_condition
from lora_core.models.load import BaseModel, load_base
from lora_core.sampling.generate import Picture, generated, infotext, save_png
from lora_core.spec.errors import AdapterFileError, ConfigError, LoraError
from lora_core.spec.run_folder import RunFolder
from lora_core.training.export import exported_checkpoint

Request = dict[str, Any]
Answer = Callable[..., None]

_BASE_KEYS = {"base": "demo", "prediction": "auto", "vae": ""}
"""What a request may say of its base, and what it is where it says nothing."""


class Cancelled(Exception):
    """The request was cancelled by its sender."""


class Worker:
    """What is kept between requests: the base, and the adapters that were read."""

    def __init__(self, answer: Callable[[dict[str, Any]], None]) -> None:
        """Send answers through `answer`."""
        self.cancelled: set[str] = set()
        self._answer = answer
        self._base: BaseModel | None = None
        self._merger: Merger | None = None
        self._opened_as: tuple[str, ...] = ()
        self._adapters: dict[tuple[str, int, int], Any] = {}

    def handle(self, request: Request) -> None:
        """Do one request; every problem becomes an answer, so that the worker goes on."""
        name = str(request.get("id", ""))
        verbs = {
            "generate": self._generate, "export": self._export, "inspect": self._inspect, "verify":
            self._verify, "release": self._release,
        }  # fmt: skip
        try:
            verb = verbs.get(str(request.get("do")))
            if verb is None:
                raise ConfigError(
                    f"The worker does not know {request.get('do')!r}; it can {', '.join(verbs)}."
                )
            began = time.monotonic()
            result = verb(request)
            self._answer({"id": name, "event": "done", "seconds": time.monotonic() - began, **result})
        except Cancelled:
            self._answer({"id": name, "event": "error", "message": "Cancelled."})
        except LoraError as error:
            self._answer({"id": name, "event": "error", "message": str(error)})
        except (KeyError, TypeError, ValueError) as error:
            message = f"The request is not understood: {type(error).__name__} {error}."
            self._answer({"id": name, "event": "error", "message": message})
        except torch.OutOfMemoryError:
            message = "The device ran out of memory; ask for a smaller picture."
            self._answer({"id": name, "event": "error", "message": message})
        except Exception as error:  # noqa: BLE001 - a defect costs one request, and its traceback is kept
            traceback.print_exc()
            message = f"A defect of the program: {type(error).__name__} {error}."
            self._answer({"id": name, "event": "error", "message": message})
        finally:
            self.cancelled.discard(name)

    def _opened(self, request: Request) -> tuple[BaseModel, Merger]:
        """The base that a request names, with the prediction and the VAE that it asks for; kept if it is the
        same as before."""
        wanted = tuple(str(request.get(key, usual)) for key, usual in _BASE_KEYS.items())
        if self._base is None or self._merger is None or self._opened_as != wanted:
            self._base = self._merger = None
            name, prediction, vae = wanted
            device = best_device()
            self._base = load_base(name, device, dtype_of("auto", device), prediction, vae)
            self._merger = Merger(self._base.modules)
            self._opened_as = wanted
        return self._base, self._merger

    def _adapter(self, file: str, base: BaseModel) -> Any:
        path = Path(file)
        found = path.stat() if path.is_file() else None
        key = (str(path), found.st_mtime_ns if found else 0, found.st_size if found else 0)
        if key not in self._adapters:
            self._adapters = {k: v for k, v in self._adapters.items() if k[0] != key[0]}
            self._adapters[key] = read_adapter(path, base.family)
        return self._adapters[key]

    def _generate(self, request: Request) -> dict[str, Any]:
        """One picture for each of `strengths`, which multiply the strengths of all adapters; all from one
        noise."""
        name = str(request["id"])
        base, merger = self._opened(request)
        how = Picture(
            seed=int(request.get("seed", 0)), steps=int(request.get("steps", 20)),
            cfg=float(request.get("cfg", 5.0)), sampler=str(request.get("sampler", "ddim")),
            width=int(request.get("width", 0)), height=int(request.get("height", 0)),
        )  # fmt: skip
        prompt, negative = str(request.get("prompt", "")), str(request.get("negative", ""))
        read = (int(request.get("clip_skip", 1)), int(request.get("tokens", 75)))
        loras = [(row, self._adapter(str(row["file"]), base)) for row in request.get("loras", [])]
        strengths = [float(s) for s in request.get("strengths", [1.0])]
        if not all(map(math.isfinite, strengths)):
            raise ConfigError(f"The strengths {strengths} should be finite numbers.")
        folder = Path(str(request["out"]))
        files: list[str] = []
        done = 0

        def on_step(step: int, steps: int) -> None:
            if name in self.cancelled:
                raise Cancelled
            self._answer(
                {
                    "id": name,
                    "event": "progress",
                    "done": done * steps + step,
                    "total": steps * len(strengths),
                }
            )

        try:
            for index, factor in enumerate(strengths):
                merger.apply([_strengthened(row, weights, factor) for row, weights in loras])
                text, unwanted = (
                    text_condition(base, [prompt], *read),
                    negative_condition(base, negative, *read),
                )
                image = generated(base, how, text, unwanted, on_step)
                used = [
                    (Path(row["file"]).stem, float(row.get("strength", 1.0)) * factor) for row, _ in loras
                ]
                path = _free_name(folder, f"{time.strftime('%Y%m%d-%H%M%S')}-{how.seed}-{factor:g}")
                save_png(image, path, infotext(base, how, prompt, negative, used))
                files.append(str(path))
                done += 1
                self._answer(
                    {"id": name, "event": "picture", "index": index, "strength": factor, "file": str(path)}
                )
        finally:
            merger.apply([])
        return {"files": files}

    def _export(self, request: Request) -> dict[str, Any]:
        run = RunFolder.open(Path(str(request["run"])))
        return exported_checkpoint(
            run, str(request.get("checkpoint", "last")), str(request.get("name", run.name)),
            (str(request.get("format", "kohya")), str(request.get("precision", "fp16"))),
        )  # fmt: skip

    def _inspect(self, request: Request) -> dict[str, Any]:
        return {"report": inspect_file(Path(str(request["file"])))}

    def _verify(self, request: Request) -> dict[str, Any]:
        """What a file is, and what each tool makes of it; for a kind that cannot be verified, why not."""
        file = Path(str(request["file"]))
        report = inspect_file(file)
        try:
            return {"report": report, "verify": verified(file)}
        except AdapterFileError as error:
            return {"report": report, "problem": str(error)}

    def _release(self, request: Request) -> dict[str, Any]:
        self._base = self._merger = None
        self._adapters.clear()
        return {}


def _strengthened(row: dict[str, Any], weights: Any, factor: float) -> Strengthened:
    strength = float(row.get("strength", 1.0))
    text = row.get("text_strength")
    return Strengthened(weights, strength * factor, (strength if text is None else float(text)) * factor)


def _free_name(folder: Path, stem: str) -> Path:
    path, number = folder / f"{stem}.png", 2
    while path.exists():
        path, number = folder / f"{stem}-{number}.png", number + 1
    return path


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
    answer({"id": None, "event": "ready"})
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
