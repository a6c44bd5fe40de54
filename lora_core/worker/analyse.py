"""The worker's verbs that look into adapter files: `spectrum`, `compare`, `stack`, `amplify`, and, measured
on pictures, `intrinsic` and `strength`; and `report`, which puts all of it on one page.

They answer plain numbers, as the command line's `--json` has them; what they measure on is either a run, with
its base and the pictures that it held out, or a base and a folder.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_core.data.dataset import open_dataset, require_clean
from lora_core.errors import AdapterFileError, OutOfMemory
from lora_core.formats.inspect import inspect_file
from lora_core.generate.request import WeightedLora
from lora_core.model_files.header import read_header
from lora_core.models.device import best_device, out_of_memory
from lora_core.models.load import load_base
from lora_core.models.weight_files import PRECISIONS
from lora_core.report.data import RunEvaluator, measure_rank, measure_strength, run_evaluator
from lora_core.report.report import FILE_NAME, write_report
from lora_core.runs.folder import RunFolder
from lora_core.system.paths import workspace
from lora_core.tools.amplification import file_amplification
from lora_core.tools.base_weights import BaseWeights
from lora_core.tools.evaluator import Evaluator
from lora_core.tools.interference import file_similarity, interference_report, measure_stack
from lora_core.tools.svd import file_spectrum
from lora_core.worker.insights import model_of
from lora_core.worker.telling import Telling

Request = dict[str, Any]
Verb = Callable[[Request], dict[str, Any]]
LOOKS = 8


def files_of(request: Request) -> list[WeightedLora]:
    """The files that a request names: `files`, paths or objects {file, strength, text_strength}."""
    return [_file_at(row) for row in request["files"]]


def _file_at(row: Any) -> WeightedLora:
    if isinstance(row, str):
        return WeightedLora(row)
    text = row.get("text_strength")
    strength = float(row.get("strength", 1.0))
    return WeightedLora(str(row["file"]), strength, None if text is None else float(text))


class Analysing:
    """The verbs, and how they tell and are told."""

    def __init__(
        self, answer: Callable[[dict[str, Any]], None], cancelled: set[str], release: Callable[[Request], Any]
    ) -> None:
        """Send answers through `answer`; `cancelled` holds ids to be dropped; `release` empties the memory
        of what is kept for drawing."""
        self._answer, self._cancelled, self._release = answer, cancelled, release

    def verbs(self) -> dict[str, Verb]:
        """By name."""
        return {
            "spectrum": self.spectrum, "compare": self.compare, "stack": self.stack, "amplify": self.amplify,
            "intrinsic": self.intrinsic, "strength": self.strength, "report": self.report,
        }  # fmt: skip

    def telling(self, request: Request) -> Telling:
        """Of a request."""
        return Telling(self._answer, self._cancelled, str(request["id"]))

    def spectrum(self, request: Request) -> dict[str, Any]:
        """What a file is, and the singular values of its layers."""
        file, telling = Path(str(request["file"])), self.telling(request)
        telling.phase("Reading the file")
        report = inspect_file(file)
        telling.phase("Layers")
        return {"report": report, "spectrum": file_spectrum(file, telling.step)}

    def compare(self, request: Request) -> dict[str, Any]:
        """How alike two files are."""
        files, telling = files_of(request), self.telling(request)
        if len(files) != 2:
            raise AdapterFileError("Two files are compared, no more and no fewer.")
        telling.phase("Layers")
        return {"compare": file_similarity(Path(files[0].file), Path(files[1].file), telling.step)}

    def stack(self, request: Request) -> dict[str, Any]:
        """What happens when several files are on at once; with `measure`, what they gain."""
        files, telling = files_of(request), self.telling(request)
        telling.phase("Layers")
        report = interference_report(files, telling.step)
        if request.get("measure"):
            with self._measuring(request, telling) as found:
                report["validation"] = measure_stack(files, found.base.family, found.bench.gains)
        return {"stack": report}

    def amplify(self, request: Request) -> dict[str, Any]:
        """What a file brings out of its base."""
        telling = self.telling(request)
        telling.phase("Layers")
        file, base = Path(str(request["file"])), BaseWeights(str(request["base"]))
        return {"amplify": file_amplification(file, base, telling.step)}

    def intrinsic(self, request: Request) -> dict[str, Any]:
        """The lowest rank that keeps nearly all of a file's gain."""
        file, telling = Path(str(request["file"])), self.telling(request)
        # What is no such file is told before a base is opened.
        read_header(file)
        with self._measuring(request, telling) as found:
            document = measure_rank(file, found.base.family, found.bench.gains)
        return {"intrinsic": document, **_on(found)}

    def strength(self, request: Request) -> dict[str, Any]:
        """The strength at which a file gains most."""
        file, telling = Path(str(request["file"])), self.telling(request)
        read_header(file)
        with self._measuring(request, telling) as found:
            apart = bool(request.get("apart"))
            document = measure_strength(file, found.base.family, found.bench.gains, apart)
        return {"strength": document, **_on(found)}

    def report(self, request: Request) -> dict[str, Any]:
        """A run as one page."""
        run, telling = RunFolder.open(Path(str(request["run"]))), self.telling(request)
        out = Path(str(request.get("out") or run.path / FILE_NAME))
        measure = bool(request.get("measure"))
        telling.phase("Reading the run")
        if measure:
            self._release(request)
        with self._memory():
            size = write_report(run, out, measure, telling.both, time.time())
        return {"file": str(out), "bytes": size}

    @contextmanager
    def _measuring(self, request: Request, telling: Telling) -> Iterator[RunEvaluator]:
        """A bench for a request; never two bases at once, as there may be memory for one."""
        self._release(request)
        telling.phase("Opening the base and encoding the pictures")
        with self._memory():
            yield _bench(request["measure"], telling)

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
            self._release({})


def _on(found: RunEvaluator) -> dict[str, Any]:
    return {"pictures": found.pictures, "note": found.note}


def _bench(measure: Any, telling: Telling) -> RunEvaluator:
    if measure.get("run"):
        run = RunFolder.open(Path(str(measure["run"])))
        return run_evaluator(run, run.config(), telling.phase, telling.step)
    dataset = open_dataset(str(measure["dataset"]), workspace() / "cache" / "datasets")
    require_clean(dataset)
    model = model_of(measure)
    base = load_base(
        model.base, best_device(), PRECISIONS["fp32"], model.prediction, model.vae,
        zero_snr=model.zero_terminal_snr,
    )  # fmt: skip
    records: Sequence[Any] = dataset.records
    bench = Evaluator(base, list(records), LOOKS, 0, telling.phase, telling.step)
    return RunEvaluator(bench, base, len(records))
