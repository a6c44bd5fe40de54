"""The worker's verbs that measure a dataset with the base that it holds: `captions`, `triggers` and
`pictures`.

The base is the one that pictures are drawn with, with its adapters taken out; nothing is opened twice.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_core.data.dataset import scan
from lora_core.data.scan import ImageRecord
from lora_core.evaluate.caption_scores import OnProgress, score_captions
from lora_core.evaluate.learned import measure_run_images
from lora_core.evaluate.triggers import propose_triggers
from lora_core.models.load import BaseModel
from lora_core.runs.folder import RunFolder
from lora_core.settings.config import RunConfig
from lora_core.settings.schema import ModelSection
from lora_core.worker.telling import Telling

Request = dict[str, Any]
Lend = Callable[[ModelSection], BaseModel]
"""From what names a base to the base with no adapter in it."""


class Insights:
    """The verbs, and how they tell and are told."""

    def __init__(self, answer: Callable[[dict[str, Any]], None], cancelled: set[str], lend: Lend) -> None:
        """Send answers through `answer`; `cancelled` holds ids to be dropped; `lend` gives a base."""
        self._answer = answer
        self._cancelled = cancelled
        self._lend = lend

    def captions(self, request: Request) -> dict[str, Any]:
        """How well the captions of the folder `dataset` fit, by the base `base`: as `caption_probe`."""
        said = self._teller(request)
        base, records = self._base(request), _records(request)
        return {"found": score_captions(base, records, *_how(request), said=said)}

    def triggers(self, request: Request) -> dict[str, Any]:
        """Trigger words for the folder `dataset`, beside the word `trigger`: as `trigger_words`."""
        said = self._teller(request)
        base, records = self._base(request), _records(request)
        given = str(request.get("trigger", ""))
        return {"found": propose_triggers(base, records, given, *_how(request), said=said)}

    def pictures(self, request: Request) -> dict[str, Any]:
        """What the run `run` has learned of each of its pictures: as `run_pictures`, which writes it down."""
        run, said = RunFolder.open(Path(str(request["run"]))), self._teller(request)
        which, triples = str(request.get("checkpoint", "best")), int(request.get("triples", 8))
        return {"found": measure_run_images(run, which, triples, said, self._lend)}

    def _base(self, request: Request) -> BaseModel:
        return self._lend(model_of(request))

    def _teller(self, request: Request) -> OnProgress:
        """Says how far a request is, and ends it if it is cancelled."""
        return Telling(self._answer, self._cancelled, str(request["id"])).step


def model_of(request: Request) -> ModelSection:
    """What names the base of a request."""
    names = ("base", "vae", "prediction", "zero_terminal_snr")
    given = {f"model.{name}": str(request[name]) for name in names if name in request}
    return RunConfig().changed(given).model


def _how(request: Request) -> tuple[int, int]:
    return int(request.get("triples", 4)), int(request.get("seed", 0))


def _records(request: Request) -> Sequence[ImageRecord]:
    """The usable pictures of the folder; what is wrong with others is the window's to say."""
    return scan(Path(str(request["dataset"]))).records
