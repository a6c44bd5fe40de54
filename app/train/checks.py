"""Preflight in the background, since a page that polls must not wait for it."""

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

from lora_core.data.scan import Dataset
from lora_core.errors import LoraError
from lora_core.runs.preflight import RunProblem, preflight
from lora_core.settings.config import FIELDS, OLD_NAMES, RunConfig, label_of
from lora_core.system.hardware import Hardware

FRESH_SECONDS = 60.0
"""Checked again after so long, as drives fill up and other programs take memory."""
ELSEWHERE = ("busy", "dataset")
"""Kinds for which the window has sentences of its own, which name its tabs."""
_NAMES = re.compile(
    "|".join(sorted((re.escape(n) for n in (*FIELDS, *OLD_NAMES) if "." in n), key=len, reverse=True))
)


class Checks:
    """The problems of the newest plan that was asked about."""

    def __init__(self, workspace: Path, hardware: Hardware) -> None:
        """Nothing is checked before the first question."""
        self._workspace = workspace
        self._hardware = hardware
        self._lock = threading.Lock()
        self._asked: tuple[RunConfig, Dataset, float] | None = None
        self._found: list[RunProblem] = []
        self._busy = False

    def known(self, config: RunConfig, dataset: Dataset) -> list[RunProblem]:
        """What was found last; where that is of another plan it is looked up meanwhile."""
        now = time.monotonic()
        with self._lock:
            asked = self._asked
            same = asked is not None and asked[0] == config and asked[1] is dataset
            if not self._busy and not (same and asked is not None and now - asked[2] < FRESH_SECONDS):
                self._asked, self._busy = (config, dataset, now), True
                threading.Thread(
                    target=self._look, args=(config, dataset), daemon=True, name="preflight"
                ).start()
            return list(self._found)

    def now(self, config: RunConfig, dataset: Dataset) -> list[RunProblem]:
        """Look it up and wait for it."""
        found = [
            RunProblem(one.kind, with_labels(one.sentence), one.blocking)
            for one in preflight(config, self._workspace, dataset, self._free_on_card)
            if one.kind not in ELSEWHERE
        ]
        with self._lock:
            self._asked, self._found = (config, dataset, time.monotonic()), found
        return found

    def _look(self, config: RunConfig, dataset: Dataset) -> None:
        try:
            self.now(config, dataset)
        except (LoraError, OSError) as error:
            with self._lock:
                self._found = [RunProblem("check", f"The check before Start failed: {error}", False)]
        finally:
            self._busy = False

    def _free_on_card(self) -> int | None:
        card = self._hardware.card()
        return card.total - card.used if card else None


def with_labels(sentence: str, title: Callable[[str], str] = label_of) -> str:
    """A sentence with the settings called as the form calls them."""
    return _NAMES.sub(lambda found: title(OLD_NAMES.get(found[0], found[0])), sentence)
