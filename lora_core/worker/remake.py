"""The worker's verbs that make files of adapters: `shrink`, `bake`, `merge`, `into-base`, `convert` and
`extract`.

Each answers the file, its size, and what was done in sentences.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_core.formats.io import convert_adapter
from lora_core.report.data import cut_file
from lora_core.system.disk_space import folder_bytes
from lora_core.tools.extract import extract_file
from lora_core.tools.merge import MergeOptions, merge_files, merge_files_into_base
from lora_core.tools.rewrite import AS_IT_IS, Rewrite, check_out, file_precision
from lora_core.tools.shrink import ShrinkTarget, shrink_file
from lora_core.tools.strength import bake_strength
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
        return {
            "shrink": self.shrink, "bake": self.bake, "merge": self.merge, "into-base": self.into_base,
            "convert": self.convert, "extract": self.extract,
        }  # fmt: skip

    def shrink(self, request: Request) -> dict[str, Any]:
        """A smaller file: by `rank`, by `energy`, or by `ranks`, rows {part, module, rank}, as measured."""
        source, out = Path(str(request["file"])), Path(str(request["out"]))
        telling = self._telling(request)
        telling.phase("Cutting the layers")
        check_out(out)
        to = Rewrite(source, out, "", time.time())
        if request.get("ranks"):
            ranks = {(str(r["part"]), str(r["module"])): int(r["rank"]) for r in request["ranks"]}
            return _made(out, [cut_file(to, None, ranks, {"measured": True})])
        return _made(out, shrink_file(to, _wish(request), None, telling.step))

    def bake(self, request: Request) -> dict[str, Any]:
        """A file that has other `strengths` at strength 1."""
        source, out = Path(str(request["file"])), Path(str(request["out"]))
        to = Rewrite(source, out, AS_IT_IS, time.time())
        return _made(out, [bake_strength(to, None, [float(one) for one in request["strengths"]])])

    def merge(self, request: Request) -> dict[str, Any]:
        """Several files as one; without a `rank`, exactly. A DoRA needs its `base`.

        `blocks` are weights of layers, as `merge --blocks` takes them.
        """
        files, out, telling = files_of(request), Path(str(request["out"])), self._telling(request)
        telling.phase("Merging the layers")
        rank, blocks = request.get("rank"), str(request.get("blocks") or "")
        precision, base = file_precision(Path(files[0].file)), str(request.get("base") or "")
        wanted = MergeOptions(int(rank) if rank else None, blocks, precision, base)
        return _made(out, merge_files(files, out, wanted, time.time(), telling.step))

    def into_base(self, request: Request) -> dict[str, Any]:
        """A copy of a base with files merged into it."""
        files, out = files_of(request), Path(str(request["out"]))
        self._telling(request).phase("Writing a copy of the base")
        blocks = str(request.get("blocks") or "")
        return _made(out, merge_files_into_base(files, str(request["base"]), out, blocks))

    def convert(self, request: Request) -> dict[str, Any]:
        """The same LoRA in another format."""
        source, out = Path(str(request["file"])), Path(str(request["out"]))
        self._telling(request).phase("Writing the file")
        check_out(out)
        notes = convert_adapter(source, out, str(request["format"]), bool(request.get("keep_alphas")))
        return _made(out, [f"{note[:1].upper()}{note[1:]}" for note in notes])

    def extract(self, request: Request) -> dict[str, Any]:
        """The LoRA between a fine-tuned model and its base."""
        out, telling = Path(str(request["out"])), self._telling(request)
        telling.phase("Comparing the layers of the two models")
        tuned, base = str(request["tuned"]), str(request["base"])
        said = extract_file(tuned, base, out, _wish(request), "fp16", time.time(), telling.step)
        return _made(out, said)


def _wish(request: Request) -> ShrinkTarget:
    if request.get("energy"):
        return ShrinkTarget(energy=float(request["energy"]))
    return ShrinkTarget(rank=int(request["rank"]))


def _made(out: Path, sentences: list[str]) -> dict[str, Any]:
    size = folder_bytes(out) if out.is_dir() else out.stat().st_size
    return {"file": str(out), "bytes": size, "sentences": sentences}
