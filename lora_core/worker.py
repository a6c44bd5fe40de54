"""The warm worker: one process that keeps a base loaded and answers a line of JSON with lines of JSON.

Requests come on stdin, one object per line, each with an "id" and what to "do"; answers go to stdout and
carry the id. The first line says that the worker is ready, on which kind of device it computes and with which
torch. A request may name another "device", as `train.device` does, which is used from then on. "cancel" is
read while a request is worked on, and "quit" ends the worker.

Each method `do_...` of `Worker` is a request: most call a verb and answer its result under a key. The base is
the one that images are drawn with; never two at once, since there may be memory for one.
"""

import base64
import functools
import gc
import inspect as signatures
import io
import json
import math
import queue
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from PIL import Image, UnidentifiedImageError

from lora_core.data.dataset import scan
from lora_core.errors import AdapterFileError, ConfigError, LoraError, OutOfMemory
from lora_core.evaluate.caption_scores import measure_run_images, propose_triggers, score_captions
from lora_core.evaluate.validator import Evaluator
from lora_core.generate.pipeline import (
    OnLatents,
    Pipeline,
    latent_preview,
    make_image_grid,
    open_pipeline,
    save_png,
)
from lora_core.generate.request import GenerationRequest, WeightedLora, parse_cfg_rescale
from lora_core.model_files.header import read_header
from lora_core.models.device import best_device, describe_torch, out_of_memory, use_device
from lora_core.models.load import BaseModel
from lora_core.report.report import RunEvaluator, run_evaluator
from lora_core.runs.folder import RunFolder
from lora_core.settings.config import RunConfig, checked_value
from lora_core.settings.schema import ModelSection
from lora_core.system.files import folder_bytes
from lora_core.system.processes import others_spin
from lora_core.tools.analysis import measure_stack
from lora_core.tools.delta import Rewrite, check_out, file_precision
from lora_core.tools.shrink import measure_rank, truncate_file
from lora_core.tools.strength import bake_strength, measure_strength
from lora_core.tools.svd import file_spectrum, truncate_adapter
from lora_core.train.autotune import time_steps
from lora_core.verbs import Measure, adapters, runs

Request = dict[str, Any]
Result = dict[str, Any]
Answer = Callable[[dict[str, Any]], None]
SECONDS_BETWEEN_PROGRESS = 0.1
"""So that a file of many layers does not fill the pipe."""
SECONDS_BETWEEN_PREVIEWS = 0.25
PREVIEW_SIDE = 128
"""The longer side of a preview, in pixels."""

PHASES = {
    "spectrum": "Reading the file", "compare": "Layers", "stack": "Layers", "amplify": "Layers",
    "report": "Reading the run", "shrink": "Cutting the layers", "merge": "Merging the layers",
    "into-base": "Writing a copy of the base", "convert": "Writing the file",
    "extract": "Comparing the layers of the two models",
}  # fmt: skip
"""What is said when a request begins, of those that take a while."""


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
        """Say what is being done, and how far that is."""
        if words != self._phase:
            self._phase, self._sent_at = words, 0.0
        self.step(done, total)

    def step(self, done: int, total: int) -> None:
        """Say how far it is, unless that was said a moment ago."""
        self.check()
        if time.monotonic() - self._sent_at >= SECONDS_BETWEEN_PROGRESS:
            self._sent_at = time.monotonic()
            self.send("progress", done=done, total=total, phase=self._phase)


class Worker:
    """Does requests, one at a time, and keeps the base and the adapters that were used last."""

    def __init__(self, answer: Answer) -> None:
        """Send answers through `answer`."""
        self.cancelled: set[str] = set()
        self._answer = answer
        self._threads = torch.get_num_threads()
        self._pipeline: Pipeline | None = None
        self._opened_as: tuple[str, ...] = ()

    def handle(self, request: Request) -> None:
        """Do one request; every problem becomes an answer, and the worker stays up.

        It uses one thread while another process trains, which is left the other cores.
        """
        torch.set_num_threads(1 if others_spin() else self._threads)
        name = str(request.get("id", ""))
        began = time.monotonic()
        try:
            result = self._do(request, Reporter(self._answer, self.cancelled, name))
            last = {"event": "done", "seconds": time.monotonic() - began, **result}
        except Cancelled:
            last = {"event": "error", "message": "Cancelled."}
        except LoraError as error:
            last = {"event": "error", "message": str(error)}
        except (KeyError, TypeError, ValueError) as error:
            message = f"The request is not understood: {type(error).__name__} {error}."
            last = {"event": "error", "message": message}
        except Exception as error:  # noqa: BLE001 - a defect costs one request, and its traceback is kept
            message = "The device ran out of memory; ask for a smaller image."
            if not out_of_memory(error):
                traceback.print_exc()
                message = f"A defect of the program: {type(error).__name__} {error}."
            last = {"event": "error", "message": message}
        finally:
            self.cancelled.discard(name)
        self._answer({"id": name, **last})

    def _do(self, request: Request, report: Reporter) -> Result:
        report.check()
        known = {name[3:].replace("_", "-"): name for name in dir(self) if name.startswith("do_")}
        name = known.get(str(request.get("do")))
        if name is None:
            raise ConfigError(f"The worker does not know {request.get('do')!r}; it can {', '.join(known)}.")
        if "device" in request:
            before = best_device()
            if use_device(checked_value("train.device", request["device"], "device")) != before:
                self._release()
        if words := PHASES.get(str(request["do"])):
            report.phase(words)
        result: Result = getattr(self, name)(request, report)
        return result

    # Images

    def do_generate(self, request: Request, report: Reporter) -> Result:
        """One image for each of `strengths`, which multiply those of all adapters; all from one noise."""
        strengths = [float(s) for s in request.get("strengths", [1.0])]
        if not all(map(math.isfinite, strengths)):
            raise ConfigError(f"The strengths {strengths} should be finite numbers.")
        shot, folder = generation_request(request), Path(str(request["out"]))
        pipeline = self._pipeline_for(shot)
        files: list[str] = []
        preview = _previewer(report, pipeline.rgb_matrix) if request.get("look") else None
        for index, factor in enumerate(strengths):

            def on_step(done: int, total: int, before: int = index) -> None:
                report.send("progress", done=before * total + done, total=total * len(strengths))

            loras = tuple(lora.times(factor) for lora in shot.loras)
            scaled = GenerationRequest(**{**vars(shot), "loras": loras})
            image = pipeline(scaled, on_step, preview)
            stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{shot.seed}-{factor:g}"
            path = adapters.unused_png(folder, stem)
            save_png(image, path, pipeline.infotext(scaled))
            files.append(str(path))
            made = {"index": index, "strength": factor, "file": str(path), "ready_in": pipeline.ready_in}
            size = {"width": image.width, "height": image.height, "note": pipeline.note}
            self._answer({"id": request["id"], "event": "picture", **made, **size})
        return {"files": files}

    def do_sheet(self, request: Request, report: Reporter) -> Result:
        """Images that exist as one labelled PNG; `cells` holds rows of paths, null where one is missing."""
        cells = request["cells"]
        if not isinstance(cells, list) or not all(isinstance(row, list) for row in cells):
            raise TypeError("cells should be a list of lists")
        images = [[_open_image(path) for path in row] for row in cells]
        labels = ([str(label) for label in request.get(side, [])] for side in ("rows", "columns"))
        made = make_image_grid(images, *labels)
        path = Path(str(request["out"]))
        save_png(made, path, str(request.get("parameters", "")))
        return {"files": [str(path)], "width": made.width, "height": made.height}

    def do_release(self, request: Request, report: Reporter) -> Result:
        """Free the memory of base and adapters."""
        self._release()
        return {}

    def _release(self) -> None:
        self._pipeline, self._opened_as = None, ()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        elif torch.backends.mps.is_available():
            torch.mps.empty_cache()

    def _pipeline_for(self, shot: GenerationRequest) -> Pipeline:
        """The pipeline of a request's base, prediction type, noise schedule and VAE."""
        wanted = (shot.base, shot.prediction, shot.vae, shot.zero_terminal_snr)
        if self._pipeline is None or self._opened_as != wanted:
            self._release()
            self._pipeline, self._opened_as = open_pipeline(shot, truncate_adapter), wanted
        return self._pipeline

    def _bare_base(self, model: ModelSection) -> BaseModel:
        """A base with no adapter in it: the loaded one, or this one in its place."""
        pipeline = self._pipeline_for(GenerationRequest(**vars(model)))
        pipeline.set_adapters(())
        return pipeline.base

    # Datasets

    def do_captions(self, request: Request, report: Reporter) -> Result:
        """How well the captions of the folder `dataset` fit, according to the base."""
        base, records, draws = self._open_dataset(request)
        return {"found": score_captions(base, records, *draws, on_progress=report.step)}

    def do_triggers(self, request: Request, report: Reporter) -> Result:
        """Trigger words for the folder `dataset`, beside the word `trigger`."""
        base, records, draws = self._open_dataset(request)
        given = str(request.get("trigger", ""))
        return {"found": propose_triggers(base, records, given, *draws, on_progress=report.step)}

    def _open_dataset(self, request: Request) -> tuple[BaseModel, list[Any], tuple[int, int]]:
        """The bare base, the images, and (triples, seed) of a request."""
        records = list(scan(Path(str(request["dataset"]))).records)
        draws = int(request.get("triples", 4)), int(request.get("seed", 0))
        return self._bare_base(_model(request)), records, draws

    def do_pictures(self, request: Request, report: Reporter) -> Result:
        """What the run `run` has learned of each of its images."""
        run, which = RunFolder.open(Path(str(request["run"]))), str(request.get("checkpoint", "best"))
        triples = int(request.get("triples", 8))
        return {"found": measure_run_images(run, which, triples, report.step, self._bare_base)}

    def do_probe(self, request: Request, report: Reporter) -> Result:
        """Time some training steps of `config`; `aside` is a folder that weights may be offloaded to."""

        def on_step(done: int, total: int) -> None:
            if done:
                report.send("progress", done=done, total=total)
            report.check()

        self._release()
        try:
            folder = Path(str(request.get("aside") or tempfile.gettempdir()))
            return time_steps(RunConfig.from_dict(request["config"]), folder, on_step)
        finally:
            self._release()

    # Adapter files: most requests have the keys of a verb's parameters

    def do_export(self, request: Request, report: Reporter) -> Result:
        """Write a run's checkpoint as a file for other tools."""
        result: Result = _call(runs.export, {"checkpoint": "last"} | request, report)
        return result

    def do_inspect(self, request: Request, report: Reporter) -> Result:
        """What a file is."""
        return {"report": adapters.inspect(request["file"])}

    def do_verify(self, request: Request, report: Reporter) -> Result:
        """What a file is, and what each tool makes of it; for a kind that cannot be verified, why not."""
        about = adapters.inspect(request["file"])
        try:
            return {"report": about, "verify": adapters.verify(request["file"])}
        except AdapterFileError as error:
            return {"report": about, "problem": str(error)}

    def do_spectrum(self, request: Request, report: Reporter) -> Result:
        """What a file is, and the singular values of its layers."""
        about = adapters.inspect(request["file"])
        report.phase("Layers")
        return {"report": about, "spectrum": file_spectrum(Path(str(request["file"])), report.step)}

    def do_compare(self, request: Request, report: Reporter) -> Result:
        """How alike two files are."""
        files = _loras(request)
        if len(files) != 2:
            raise AdapterFileError("Two files are compared, no more and no fewer.")
        return {"compare": adapters.compare(files[0].file, files[1].file, report.step)}

    def do_stack(self, request: Request, report: Reporter) -> Result:
        """What happens when several files are on at once; with `measure`, what they gain."""
        loras = _loras(request)
        found = adapters.stack(loras, note=report.step)
        if request.get("measure"):
            with self._evaluator(request["measure"], report) as on:
                found["validation"] = measure_stack(loras, on.base.family, on.evaluator.gains)
        return {"stack": found}

    def do_amplify(self, request: Request, report: Reporter) -> Result:
        """What a file amplifies of its base."""
        return {"amplify": _call(adapters.amplify, request, report)}

    def do_intrinsic(self, request: Request, report: Reporter) -> Result:
        """The lowest rank that keeps nearly all of a file's gain."""
        return self._measured("intrinsic", measure_rank, request, report)

    def do_strength(self, request: Request, report: Reporter) -> Result:
        """The strength at which a file gains most."""
        measure = functools.partial(measure_strength, apart=bool(request.get("apart")))
        return self._measured("strength", measure, request, report)

    def do_report(self, request: Request, report: Reporter) -> Result:
        """A run as one page."""
        if request.get("measure"):
            self._release()
        with self._memory():
            page = _call(runs.report, {"measure": False} | request, report)
        return _made(page)

    def _measured(
        self, key: str, measure: Callable[..., dict[str, Any]], request: Request, report: Reporter
    ) -> Result:
        file = Path(str(request["file"]))
        read_header(file)  # before a base is opened
        with self._evaluator(request["measure"], report) as on:
            found = measure(file, on.base.family, on.evaluator.gains)
        return {key: found, "pictures": on.pictures, "note": on.note}

    @contextmanager
    def _evaluator(self, measure: Request, report: Reporter) -> Iterator[RunEvaluator]:
        """What measures adapters on a `run`'s held-out images, or on a `dataset` with a `base`."""
        self._release()
        report.phase("Opening the base and encoding the images")
        with self._memory():
            if measure.get("run"):
                run = RunFolder.open(Path(str(measure["run"])))
                yield run_evaluator(run, run.config(), report.phase, report.step)
            else:
                on = _call(Measure, measure, report)
                base, records = on.load()
                evaluator = Evaluator(base, list(records), on.triples, on.seed, report.phase, report.step)
                yield RunEvaluator(evaluator, base, len(records))

    @contextmanager
    def _memory(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, MemoryError, OutOfMemory) as error:
            if not (out_of_memory(error) or isinstance(error, OutOfMemory)):
                raise
            raise OutOfMemory(
                "Measuring opens the base in full precision, and the device ran out of memory; close what"
                " else uses it, or measure on the processor with CUDA_VISIBLE_DEVICES= before the command."
            ) from error
        finally:
            self._release()

    def do_shrink(self, request: Request, report: Reporter) -> Result:
        """A smaller file: by `rank`, by `energy`, or by `ranks`, rows {part, module, rank}, as measured."""
        if not request.get("ranks"):
            made = _call(adapters.shrink, request, report)
            return _made(request["out"], made["sentences"])
        ranks = {(str(r["part"]), str(r["module"])): int(r["rank"]) for r in request["ranks"]}
        return _made(request["out"], [truncate_file(_rewrite(request), None, ranks, {"measured": True})])

    def do_bake(self, request: Request, report: Reporter) -> Result:
        """A file that has other `strengths` at strength 1."""
        strengths = [float(one) for one in request["strengths"]]
        return _made(request["out"], [bake_strength(_rewrite(request), None, strengths)])

    def do_merge(self, request: Request, report: Reporter) -> Result:
        """Several files as one, in the dtype of the first; exact without `rank`. DoRAs need their `base`."""
        loras = _loras(request)
        precision = file_precision(Path(loras[0].file))
        return _made(request["out"], _call(adapters.merge, request, report, loras=loras, precision=precision))

    def do_into_base(self, request: Request, report: Reporter) -> Result:
        """A copy of a base with files merged into it."""
        done = _call(adapters.merge_into_base, request, report, loras=_loras(request))
        return _made(request["out"], done)

    def do_convert(self, request: Request, report: Reporter) -> Result:
        """The same LoRA in another format."""
        check_out(Path(str(request["out"])))
        names = {"source": request["file"], "target": request["out"], "to": request["format"]}
        notes = _call(adapters.convert, request, report, **names)
        return _made(request["out"], [f"{note[:1].upper()}{note[1:]}" for note in notes])

    def do_extract(self, request: Request, report: Reporter) -> Result:
        """The LoRA between a fine-tuned model and its base, in fp16."""
        return _made(request["out"], _call(adapters.extract, request, report, precision="fp16"))


def _call(function: Callable[..., Any], request: Request, report: Reporter, **given: Any) -> Any:
    """Call a function with the keys of a request that it has parameters for, and to report its progress."""
    offered = {"note": report.step, "said": report.phase, **request, **given}
    known = signatures.signature(function).parameters
    return function(**{key: value for key, value in offered.items() if key in known})


def _rewrite(request: Request) -> Rewrite:
    return Rewrite(Path(str(request["file"])), Path(str(request["out"])))


def generation_request(request: Request) -> GenerationRequest:
    """The image that a request asks for; what it leaves out is as in `GenerationRequest`."""
    usual = GenerationRequest()
    values: dict[str, Any] = {
        key: type(value)(request.get(key, value))
        for key, value in vars(usual).items()
        if key not in ("loras", "cfg_rescale")
    }
    rescale = parse_cfg_rescale(request.get("cfg_rescale", usual.cfg_rescale))
    return GenerationRequest(**values, cfg_rescale=rescale, loras=tuple(_loras(request, "loras")))


def _lora(row: Any) -> WeightedLora:
    """An adapter of a request: a path, or {file, strength, text_strength, rank}."""
    if isinstance(row, str):
        return WeightedLora(row)
    text = row.get("text_strength")
    lora = WeightedLora(
        str(row["file"]), float(row.get("strength", 1.0)), None if text is None else float(text),
        int(row.get("rank", 0)),
    )  # fmt: skip
    if not all(map(math.isfinite, (lora.strength, lora.text_strength or 0.0))):
        raise ConfigError(f"The strength of {lora.file} is not a finite number.")
    return lora


def _loras(request: Request, key: str = "files") -> list[WeightedLora]:
    rows = request["files"] if key == "files" else request.get(key, [])
    if not isinstance(rows, list):
        raise TypeError(f"{key} should be a list")
    return [_lora(row) for row in rows]


def _model(request: Request) -> ModelSection:
    """What names the base of a request."""
    names = ("base", "vae", "prediction", "zero_terminal_snr")
    given = {f"model.{name}": str(request[name]) for name in names if name in request}
    return RunConfig().changed(given).model


def _made(out: object, sentences: Sequence[str] = ()) -> Result:
    file = Path(str(out))
    size = folder_bytes(file) if file.is_dir() else file.stat().st_size
    return {"file": str(file), "bytes": size, "sentences": list(sentences)}


def _previewer(report: Reporter, matrix: torch.Tensor) -> OnLatents:
    """Sends the image as it is so far, now and then."""
    sent_at = time.monotonic()

    def on_preview(latents: Callable[[], torch.Tensor]) -> None:
        nonlocal sent_at
        if time.monotonic() - sent_at >= SECONDS_BETWEEN_PREVIEWS:
            sent_at = time.monotonic()
            image = latent_preview(latents(), matrix)
            image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
            data = io.BytesIO()
            image.save(data, format="JPEG", quality=85)
            report.send("look", image=base64.b64encode(data.getvalue()).decode())

    return on_preview


def _open_image(path: Any) -> Image.Image | None:
    if path is None:
        return None
    try:
        with Image.open(Path(str(path))) as opened:
            return opened.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ConfigError(f"The image {path} cannot be read; draw it again.") from error


def serve(incoming: TextIO, outgoing: TextIO) -> None:
    """Answer requests until `quit` or the end of `incoming`."""
    lock = threading.Lock()

    def answer(line: dict[str, Any]) -> None:
        with lock:
            outgoing.write(json.dumps(line, ensure_ascii=False) + "\n")
            outgoing.flush()

    worker = Worker(answer)
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


def main() -> None:
    """Serve on the process's own stdin and stdout, in UTF-8; what libraries print goes to stderr."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    outgoing = sys.stdout
    sys.stdout = sys.stderr
    serve(sys.stdin, outgoing)
