"""Times a few steps in the warm worker before the first run of its kind, once the form rests for a moment.

Where that is a burden (a full-size base on the CPU) it needs a click. It yields to runs, to images that a
user asks for, and to changes of the form.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.worker_client import CANCELLED, Reply, WorkerClient
from lora_core.errors import RunError
from lora_core.model_files.detect import BaseFacts, lookup_base
from lora_core.runs.costs import (
    StepCost,
    cost_key,
    costs_file,
    keep_cost,
    parameters_of,
    read_costs,
    step_passes,
)
from lora_core.settings.config import RunConfig
from lora_core.system.hardware import Hardware

STILL_FOR = 1.5
"""Seconds without a change of the form before measuring starts by itself."""
LOOK_EVERY = 0.4
BYTES_A_NUMBER, ROOM = 2, 2.0
"""On a card: half precision, and as much again for the steps."""


class Prober:
    """What was measured, what is being measured, and why a measurement failed."""

    def __init__(
        self, workspace: Path, worker: WorkerClient, hardware: Hardware, occupied: Callable[[], str]
    ) -> None:
        """`occupied` says in a sentence what else needs the machine now, "" where nothing does."""
        self._workspace = workspace
        self._worker = worker
        self._hardware = hardware
        self._occupied = occupied
        self._lock = threading.RLock()
        self._timer: threading.Timer | None = None
        self._wanted = ""
        self._current_key = ""
        self._reply: Reply | None = None
        self._problems: dict[str, str] = {}
        self._costs: dict[str, StepCost] = {}
        self._read_at: tuple[int, str] = (0, "")

    def costs(self) -> dict[str, StepCost]:
        """What was measured on this machine's device, read again where the file has changed."""
        try:
            read_at = costs_file(self._workspace).stat().st_mtime_ns, self._hardware.device
        except OSError:
            return {}
        with self._lock:
            if read_at != self._read_at:
                self._costs, self._read_at = read_costs(self._workspace, self._hardware.device), read_at
            return self._costs

    def known(self, config: RunConfig) -> StepCost | None:
        """What a step of these settings took here."""
        return self.costs().get(cost_key(config))

    def problem(self, config: RunConfig) -> str:
        """Why these settings could not be measured, "" where nothing was in the way."""
        return self._problems.get(cost_key(config), "")

    @property
    def active(self) -> bool:
        """Whether something is being measured or will be in a moment."""
        return bool(self._current_key) or self._timer is not None

    def working(self, config: RunConfig | None = None) -> bool:
        """Whether something is being measured: of these settings, or at all."""
        return bool(self._current_key) and (config is None or self._current_key == cost_key(config))

    def steps_done(self) -> tuple[int, int]:
        """Steps done, and in all, of the measurement under way."""
        reply = self._reply
        return (reply.done, reply.total) if reply else (0, 0)

    def schedule(self, config: RunConfig) -> bool:
        """Schedule a measurement of the settings, where that is no burden.

        Returns:
            Whether they will be.
        """
        key = cost_key(config)
        with self._lock:
            changed, self._wanted = key != self._wanted, key
            if self.known(config) or key in self._problems or not self.is_no_burden(config):
                self._stop_timer()
                return False
            if changed:
                self._stop_timer()
            if self._timer is None and not self._current_key:
                self._timer = threading.Timer(STILL_FOR, self._on_timer, (config,))
                self._timer.daemon = True
                self._timer.start()
            return True

    def is_no_burden(self, config: RunConfig) -> bool:
        """Whether measuring disturbs nobody: a small base or room on the card, and a worker that rests."""
        base, worker = lookup_base(config.model.base), self._worker
        if base.facts is None or not self._hardware.known or not (base.embedded or self._has_room(base)):
            return False
        asked = [one for one in (*worker.waiting, worker.in_hand) if one not in (None, self._reply)]
        warming = any(one.request["do"] == "warm" for one in asked if one)
        others = any(one.request["do"] != "warm" for one in asked if one)
        # A base that is held for pictures would have to be opened again for the next one.
        if others or worker.holds_memory or not (worker.ready or warming):
            return False
        return not self._occupied()

    def begin(self, config: RunConfig) -> None:
        """Measure now, on request.

        Raises:
            RunError: something else is going on, or the base cannot be used.
        """
        base, busy = lookup_base(config.model.base), self._occupied()
        if base.facts is None or busy:
            raise RunError(busy or base.problem)
        with self._lock:
            self._stop_timer()
            self._problems.pop(cost_key(config), None)
            self._wanted = cost_key(config)
        self._measure(config)

    def cancel(self) -> None:
        """Stop measuring at the next step."""
        with self._lock:
            self._stop_timer()
            if self._reply is not None:
                # Not again until the form changes or a user asks.
                self._problems.setdefault(self._current_key, "")
                self._worker.cancel(self._reply)

    def _on_timer(self, config: RunConfig) -> None:
        key = cost_key(config)
        # Under the lock, so that a page that polls meanwhile sets no other timer.
        with self._lock:
            self._timer = None
            if self._wanted != key or key in self._problems or self.known(config):
                return
            if self.is_no_burden(config):
                self._measure(config)

    def _measure(self, config: RunConfig) -> None:
        with self._lock:
            if self._current_key:
                return
            self._current_key = cost_key(config)
            request = {"do": "probe", "config": config.to_dict(), "aside": str(self._workspace / "cache")}
            self._reply = self._worker.submit(request)
        watch = threading.Thread(
            target=self._wait_for_reply, args=(config, self._reply), daemon=True, name="probe"
        )
        watch.start()

    def _wait_for_reply(self, config: RunConfig, reply: Reply) -> None:
        """Wait for the end; what it took is kept, and whoever needs the machine meanwhile gets it."""
        key = self._current_key
        while not reply.finished.wait(LOOK_EVERY):
            others = [one for one in self._worker.waiting if one is not reply]
            if not reply.dropped and (self._wanted != key or others or self._occupied()):
                self._worker.cancel(reply)
        try:
            if reply.state == "done":
                keep_cost(self._workspace, config, self._cost(config, reply.result))
            elif reply.message != CANCELLED:
                self._problems[key] = reply.message
        except (OSError, KeyError, TypeError, ValueError) as error:
            self._problems[key] = f"What was measured could not be kept: {error}."
        with self._lock:
            self._current_key, self._reply = "", None

    def _cost(self, config: RunConfig, result: dict[str, Any]) -> StepCost:
        step, draw, peak = float(result["step"]), float(result["draw"]), int(result["peak"])
        return StepCost(step, draw, peak, config.model.base, self._hardware.device, step_passes(config))

    def _has_room(self, base: BaseFacts) -> bool:
        card = self._hardware.card()
        parameters = parameters_of(base)
        if card is None or not parameters:
            return False
        return card.total - card.used > parameters * BYTES_A_NUMBER * ROOM

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
