"""The worker's verbs that make adapter files of others: `shrink`, `bake`, `merge` and `extract`.

Each answers the file, its size, and what was done in sentences.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_core.analysis.extract import extract_file
from lora_core.analysis.merge import Ingredient, Wanted, merge_files
from lora_core.analysis.rewrite import AS_IT_IS, Rewriting, check_out, own_precision
from lora_core.analysis.shrink import Wish, shrink_file
from lora_core.analysis.strength import bake
from lora_core.report.measured import cut_file
from lora_core.worker.analyse import files_of
from lora_core.worker.telling import Telling

Request = dict[str, Any]
Verb = Callable[[Request], dict[str, Any]]


class Remaking:
    """The verbs, and how they tell and are told."""

    def __init__(self, telling: Callable[[Request], Telling]) -> None:
        """Tell through what `telling` gives for a request."""
        self._telling = telling

    def verbs(self) -> dict[str, Verb]:
        """By name."""
        return {"shrink": self.shrink, "bake": self.bake, "merge": self.merge, "extract": self.extract}

    def shrink(self, request: Request) -> dict[str, Any]:
        """A smaller file: by `rank`, by `energy`, or by `ranks`, rows {part, module, rank}, as measured."""
        source, out = Path(str(request["file"])), Path(str(request["out"]))
        telling = self._telling(request)
        telling.phase("Cutting the layers")
        check_out(out)
        to = Rewriting(source, out, "", time.time())
        if request.get("ranks"):
            ranks = {(str(r["part"]), str(r["module"])): int(r["rank"]) for r in request["ranks"]}
            return _made(out, [cut_file(to, None, ranks, {"measured": True})])
        return _made(out, shrink_file(to, _wish(request), None, telling.step))

    def bake(self, request: Request) -> dict[str, Any]:
        """A file that has other `strengths` at strength 1."""
        source, out = Path(str(request["file"])), Path(str(request["out"]))
        to = Rewriting(source, out, AS_IT_IS, time.time())
        return _made(out, [bake(to, None, [float(one) for one in request["strengths"]])])

    def merge(self, request: Request) -> dict[str, Any]:
        """Several files as one; without a `rank`, exactly."""
        files, out, telling = files_of(request), Path(str(request["out"])), self._telling(request)
        telling.phase("Merging the layers")
        ingredients = [Ingredient(file.path, file.strength, file.text_strength) for file in files]
        rank = request.get("rank")
        wanted = Wanted(int(rank) if rank else None, "", own_precision(files[0].path))
        return _made(out, merge_files(ingredients, out, wanted, time.time(), telling.step))

    def extract(self, request: Request) -> dict[str, Any]:
        """The LoRA between a fine-tuned model and its base."""
        out, telling = Path(str(request["out"])), self._telling(request)
        telling.phase("Comparing the layers of the two models")
        tuned, base = str(request["tuned"]), str(request["base"])
        said = extract_file(tuned, base, out, _wish(request), "fp16", time.time(), telling.step)
        return _made(out, said)


def _wish(request: Request) -> Wish:
    if request.get("energy"):
        return Wish(energy=float(request["energy"]))
    return Wish(rank=int(request["rank"]))


def _made(out: Path, sentences: list[str]) -> dict[str, Any]:
    return {"file": str(out), "bytes": out.stat().st_size, "sentences": sentences}
