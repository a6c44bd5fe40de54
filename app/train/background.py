"""What the Train tab's form learns in the background, since a look at the state must not wait: the problems
of the run to come, bases of the hub with their downloads, and the time of a step.

All of it runs in threads of the window or in the warm worker; nothing here imports torch.
"""

import dataclasses
import functools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from app.templates import _, with_labels
from app.worker_client import CANCELLED, Reply, WorkerClient
from lora_core.data.images import Dataset
from lora_core.errors import LoraError, RunError
from lora_core.model_files.detect import BaseFacts, clear_base_cache, lookup_base
from lora_core.model_files.hub import Download, DownloadCancelled, download, find_download
from lora_core.runs.costs import (
    StepCost,
    cost_key,
    costs_file,
    keep_cost,
    parameters_of,
    read_costs,
    step_passes,
)
from lora_core.runs.preflight import RunProblem, preflight
from lora_core.settings.config import RunConfig
from lora_core.system.files import file_stamp
from lora_core.system.hardware import Hardware

FRESH_SECONDS = 60.0
"""Checked again after so long, as drives fill up and other programs take memory."""
ELSEWHERE = ("busy", "dataset")
"""Kinds for which the window has sentences of its own, which name its tabs."""
STILL_FOR = 1.5
"""Seconds without a change of the form before measuring starts by itself."""
BYTES_A_NUMBER, ROOM = 2, 2.0
"""On a card: half precision, and as much again for the steps."""


class Checks:
    """The problems of the newest plan that was asked about."""

    def __init__(self, workspace: Path, free_on_card: Callable[[], int | None]) -> None:
        """Nothing is checked before the first question; `free_on_card` gives free bytes of the card."""
        self._workspace = workspace
        self._free_on_card = free_on_card
        self._lock = threading.Lock()
        self._asked: tuple[RunConfig, Dataset] | None = None
        self._looked_at = 0.0
        self._found: list[RunProblem] = []
        self._busy = False

    def known(self, config: RunConfig, dataset: Dataset) -> list[RunProblem]:
        """The last result; if it is for another plan, a new lookup starts."""
        now = time.monotonic()
        with self._lock:
            fresh = self._is_asked(config, dataset) and now - self._looked_at < FRESH_SECONDS
            if not self._busy and not fresh:
                self._asked, self._looked_at, self._busy = (config, dataset), now, True
                threading.Thread(
                    target=self._look, args=(config, dataset), daemon=True, name="preflight"
                ).start()
            return list(self._found)

    def now(self, config: RunConfig, dataset: Dataset) -> list[RunProblem]:
        """Look it up and wait for it."""
        found = [
            dataclasses.replace(one, sentence=with_labels(one.sentence))
            for one in preflight(config, self._workspace, dataset, self._free_on_card)
            if one.kind not in ELSEWHERE
        ]
        with self._lock:
            # What a name or a sweep adds to the form is not what `known` was asked about.
            if self._is_asked(config, dataset):
                self._looked_at, self._found = time.monotonic(), found
        return found

    def _is_asked(self, config: RunConfig, dataset: Dataset) -> bool:
        return self._asked is not None and self._asked[0] == config and self._asked[1] is dataset

    def _look(self, config: RunConfig, dataset: Dataset) -> None:
        try:
            self.now(config, dataset)
        except (LoraError, OSError) as error:
            with self._lock:
                self._found = [RunProblem("check", _("The check before Start failed: {}", error), False)]
        finally:
            self._busy = False


@dataclass
class DownloadOffer:
    """A base of the hub.

    Attributes:
        repo: the hub id.
        state: "asking" for its size, "offered", "downloading", "done" or "failed".
        found: its files, once the hub has named them.
        here: bytes that are on this computer.
        problem: why the last attempt failed, or "".
    """

    repo: str
    state: str = "asking"
    found: Download | None = None
    here: int = 0
    problem: str = ""


class Downloads:
    """Bases of the hub that were asked about: how large they are, and the download that is under way.

    Partial downloads stay in the cache; a cancelled one continues from there.
    """

    def __init__(self) -> None:
        self.finished: Callable[[str], None] = lambda repo: None
        """Called with each base that has arrived."""
        self.arrived = 0
        """How many have, each counted after `finished` was called."""
        self._offers: dict[str, DownloadOffer] = {}
        self._lock = threading.Lock()
        self._cancelled = threading.Event()

    @property
    def active(self) -> bool:
        """Whether a question or a download is under way."""
        return any(offer.state in ("asking", "downloading") for offer in list(self._offers.values()))

    def offer(self, repo: str, again: bool = False) -> DownloadOffer:
        """The facts of a base; the hub is queried if there are none yet, or `again` where it did not
        answer."""
        with self._lock:
            known = self._offers.get(repo)
            if known is not None and known.state not in ("done", "failed" if again else ""):
                return known
            made = self._offers[repo] = DownloadOffer(repo)
        self._begin(made, self._ask)
        return made

    def start(self, repo: str) -> None:
        """Begin or continue a download.

        Raises:
            RunError: another one is under way, or its size is not known yet.
        """
        with self._lock:
            busy = next((one.repo for one in self._offers.values() if one.state == "downloading"), "")
            if busy:
                raise RunError(_("{busy} is being downloaded; wait for it, or cancel it.", busy=busy))
            offer = self._offers.get(repo)
            if offer is None or offer.found is None:
                raise RunError(_("The hub has not yet answered how large {repo} is.", repo=repo))
            offer.state, offer.problem = "downloading", ""
            self._cancelled.clear()
        self._begin(offer, self._download)

    def cancel(self) -> None:
        """Cancel the download; the partial file stays."""
        self._cancelled.set()

    def _begin(self, offer: DownloadOffer, work: Callable[[DownloadOffer], None]) -> None:
        threading.Thread(target=work, args=(offer,), daemon=True, name="hub").start()

    def _ask(self, offer: DownloadOffer) -> None:
        try:
            found = find_download(offer.repo)
        except LoraError as error:
            offer.problem, offer.state = str(error), "failed"
            return
        offer.found, offer.here, offer.state = found, found.here, "offered"

    def _download(self, offer: DownloadOffer) -> None:
        assert offer.found is not None

        def progress(here: int, size: int) -> None:
            offer.here = here

        try:
            download(offer.found, progress, self._cancelled.is_set)
        except DownloadCancelled:
            offer.state = "offered"
        except LoraError as error:
            offer.problem, offer.state = str(error), "offered"
        else:
            clear_base_cache()
            self.finished(offer.repo)
            self.arrived += 1
            offer.state = "done"


@functools.lru_cache(maxsize=1)
def _read_costs(workspace: Path, device: str, stamp: object) -> dict[str, StepCost]:
    return read_costs(workspace, device)


class Prober:
    """Times a few steps in the warm worker before the first run of its kind, once the form rests.

    Where that is a burden (a full-size base on the CPU) it needs a click. It yields to runs, to images that a
    user asks for, and to changes of the form.
    """

    def __init__(
        self, workspace: Path, worker: WorkerClient, hardware: Hardware, occupied: Callable[[], str]
    ) -> None:
        """`occupied` says in a sentence what else needs the machine now, "" where nothing does."""
        self._workspace = workspace
        self._worker = worker
        self._hardware = hardware
        self._occupied = occupied
        self._lock = threading.RLock()
        self._wanted = ""
        self._since: float | None = None
        """When these settings were first asked for, while they are to be measured."""
        self._current_key = ""
        self._reply: Reply | None = None
        self._problems: dict[str, str] = {}

    def costs(self) -> dict[str, StepCost]:
        """The measurements on this machine's device, read again if the file has changed."""
        stamp = file_stamp(costs_file(self._workspace))
        return _read_costs(self._workspace, self._hardware.device, stamp)

    def known(self, config: RunConfig) -> StepCost | None:
        """What a step of these settings took here."""
        return self.costs().get(cost_key(config))

    def problem(self, config: RunConfig) -> str:
        """Why these settings could not be measured, "" where nothing was in the way."""
        return self._problems.get(cost_key(config), "")

    @property
    def active(self) -> bool:
        """Whether something is being measured or will be in a moment."""
        waits = self._since is not None and time.monotonic() - self._since < 3 * STILL_FOR
        return bool(self._current_key) or waits

    def working(self, config: RunConfig | None = None) -> bool:
        """Whether something is being measured: of these settings, or at all."""
        return bool(self._current_key) and (config is None or self._current_key == cost_key(config))

    def steps_done(self) -> tuple[int, int]:
        """Steps done, and in all, of the measurement under way."""
        reply = self._reply
        return (reply.done, reply.total) if reply else (0, 0)

    def schedule(self, config: RunConfig) -> bool:
        """Measure the settings once they have stayed for a while, if that is cheap.

        Returns:
            Whether they will be.
        """
        key, now = cost_key(config), time.monotonic()
        with self._lock:
            if self.known(config) or key in self._problems or not self.is_no_burden(config):
                self._wanted, self._since = key, None
                return False
            if key != self._wanted or self._since is None:
                self._wanted, self._since = key, now
            if now - self._since >= STILL_FOR:
                self._measure(config)
            return True

    def is_no_burden(self, config: RunConfig) -> bool:
        """Whether measuring disturbs nobody: a small base or room on the card, and a worker that rests."""
        base, worker = lookup_base(config.model.base), self._worker
        if base.facts is None or not self._hardware.known or not (base.embedded or self._has_room(base)):
            return False
        asked = [one for one in (*worker.waiting, worker.in_hand) if one not in (None, self._reply)]
        warming = any(one.request["do"] == "warm" for one in asked if one)
        others = any(one.request["do"] != "warm" for one in asked if one)
        # A base that is held for images would have to be opened again for the next one.
        if others or worker.holds_memory or not (worker.ready or warming):
            return False
        return not self._occupied()

    def begin(self, config: RunConfig) -> None:
        """Measure now, on request.

        Raises:
            RunError: something else is running, or the base cannot be used.
        """
        base, busy = lookup_base(config.model.base), self._occupied()
        if base.facts is None or busy:
            raise RunError(busy or base.problem)
        with self._lock:
            self._problems.pop(cost_key(config), None)
            self._wanted = cost_key(config)
        self._measure(config)

    def cancel(self) -> None:
        """Stop measuring at the next step."""
        with self._lock:
            if self._reply is not None:
                # Not again until the form changes or a user asks.
                self._problems.setdefault(self._current_key, "")
                self._worker.cancel(self._reply)

    def _measure(self, config: RunConfig) -> None:
        with self._lock:
            if self._current_key:
                return
            key = self._current_key = cost_key(config)
            request = {"do": "probe", "config": config.to_dict(), "aside": str(self._workspace / "cache")}
            reply = self._reply = self._worker.submit(request)

        def gives_way() -> str:
            others = any(one is not reply for one in list(self._worker.waiting))
            return _("Something else is asked for.") if self._wanted != key or others else self._occupied()

        self._worker.follow(reply, gives_way, functools.partial(self._keep, config, reply))

    def _keep(self, config: RunConfig, reply: Reply) -> None:
        """Keep what a measurement took."""
        key = self._current_key
        try:
            if reply.state == "done":
                step, draw, peak = (float(reply.result[key]) for key in ("step", "draw", "peak"))
                on, passes = self._hardware.device, step_passes(config)
                cost = StepCost(step, draw, int(peak), config.model.base, on, passes)
                keep_cost(self._workspace, config, cost)
            elif reply.message != CANCELLED:
                self._problems[key] = reply.message
        except (OSError, KeyError, TypeError, ValueError) as error:
            self._problems[key] = _("The measurement could not be saved: {error}.", error=error)
        with self._lock:
            self._current_key, self._reply = "", None

    def _has_room(self, base: BaseFacts) -> bool:
        card = self._hardware.card()
        parameters = parameters_of(base)
        if card is None or not parameters:
            return False
        return card.total - card.used > parameters * BYTES_A_NUMBER * ROOM
