"""All requests of the warm worker: those for images (`generate/server`), and those about datasets and adapter
files, most of which call a verb and answer its result under a key."""

import functools
import inspect as signatures
import io
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from lora_core.data.dataset import scan
from lora_core.data.images import save_png
from lora_core.errors import AdapterFileError, ConfigError, OutOfMemory
from lora_core.evaluate.annotation import make_masks, write_texts
from lora_core.evaluate.caption_scores import measure_run_images, propose_triggers, score_captions
from lora_core.evaluate.validator import Evaluator
from lora_core.generate.grid import make_image_grid
from lora_core.generate.request import GenerationRequest, WeightedLora
from lora_core.generate.server import Answer, ImageWorker, Reporter, Request, Result, serve
from lora_core.model_files.header import read_header
from lora_core.models.device import best_device, out_of_memory
from lora_core.models.load import BaseModel
from lora_core.projects.caption_edits import Captioner, Masker
from lora_core.projects.project import relative_name
from lora_core.report.report import RunEvaluator, run_evaluator
from lora_core.runs.folder import RunFolder
from lora_core.settings.config import RunConfig
from lora_core.settings.schema import ModelSection
from lora_core.system.files import folder_bytes
from lora_core.tools.analysis import bake_strength, measure_stack, measure_strength
from lora_core.tools.delta import Rewrite, check_out, file_precision
from lora_core.tools.shrink import measure_rank, truncate_file
from lora_core.tools.svd import file_spectrum, truncate_adapter
from lora_core.train.autotune import time_steps
from lora_core.verbs import Measure, adapters, runs


class Worker(ImageWorker):
    """Does all requests, one at a time."""

    phases = {
        "spectrum": "Reading the file", "compare": "Layers", "stack": "Layers", "amplify": "Layers",
        "report": "Reading the run", "shrink": "Cutting the layers", "merge": "Merging the layers",
        "into-base": "Writing a copy of the base", "convert": "Writing the file",
        "extract": "Comparing the layers of the two models", "caption": "Opening the captioner",
        "mask": "Opening the mask model",
    }  # fmt: skip

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer, truncate_adapter)

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

    def _bare_base(self, model: ModelSection) -> BaseModel:
        """A base with no adapter in it: the loaded one, or this one in its place."""
        pipeline = self.pipeline_for(GenerationRequest(**vars(model)))
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

    def do_caption(self, request: Request, report: Reporter) -> Result:
        """What the captioner of a request says of the `pictures` in the folder `dataset`; writes nothing."""
        return self._annotate(Captioner, write_texts, request, report)

    def do_mask(self, request: Request, report: Reporter) -> Result:
        """The masks that a mask model makes of the `pictures` in the folder `dataset`; writes nothing."""
        return self._annotate(Masker, make_masks, request, report)

    def _annotate(
        self, kind: Callable[..., Any], work: Callable[..., Any], request: Request, report: Reporter
    ) -> Result:
        folder, wanted = Path(str(request["dataset"])), set(request["pictures"])
        found = scan(folder)
        records = {relative_name(record.path, folder): record for record in (*found.records, *found.reg)}
        asked = {name: record for name, record in records.items() if name in wanted}
        self.release()
        annotator = _call(kind, request, report)
        try:
            return {"found": {"texts": work(annotator, asked, best_device(), report.phase)}}
        finally:
            self.release()

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

        self.release()
        try:
            folder = Path(str(request.get("aside") or tempfile.gettempdir()))
            return time_steps(RunConfig.from_dict(request["config"]), folder, on_step)
        finally:
            self.release()

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
        """The effect of several files at once; with `measure`, their gain."""
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
            self.release()
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
        self.release()
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
            self.release()

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
    offered = {"note": report.step, "on_phase": report.phase, **request, **given}
    known = signatures.signature(function).parameters
    return function(**{key: value for key, value in offered.items() if key in known})


def _rewrite(request: Request) -> Rewrite:
    return Rewrite(Path(str(request["file"])), Path(str(request["out"])))


def _loras(request: Request) -> list[WeightedLora]:
    """The `files` of a request: paths, or {file, strength, text_strength, rank}."""
    return list(GenerationRequest.from_json({"loras": request["files"]}).loras)


def _model(request: Request) -> ModelSection:
    """What names the base of a request."""
    names = ("base", "vae", "prediction", "zero_terminal_snr")
    given = {f"model.{name}": str(request[name]) for name in names if name in request}
    return RunConfig().changed(given).model


def _made(out: object, sentences: Sequence[str] = ()) -> Result:
    file = Path(str(out))
    size = folder_bytes(file) if file.is_dir() else file.stat().st_size
    return {"file": str(file), "bytes": size, "sentences": list(sentences)}


def _open_image(path: Any) -> Image.Image | None:
    if path is None:
        return None
    try:
        with Image.open(Path(str(path))) as opened:
            return opened.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ConfigError(f"The image {path} cannot be read; draw it again.") from error


def main() -> None:
    """Serve on the process's own stdin and stdout, in UTF-8; what libraries print goes to stderr."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    outgoing = sys.stdout
    sys.stdout = sys.stderr
    serve(Worker, sys.stdin, outgoing)
