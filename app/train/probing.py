"""Measures what a step takes before a first run of its kind: the warm worker takes a few, once the form has
been still for a moment.

Where that is a burden, a full-size base on a processor, it is done on a click only. It gives way to a run, to
a picture that somebody wants, and to a form that has changed meanwhile.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.worker_client import CANCELLED, Reply, WorkerClient
from lora_core.errors import RunError
from lora_core.model_files.detect import Base, lookup_base
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
"""Seconds without a change of the form before it is measured by itself."""
LOOK_EVERY = 0.4
BYTES_A_NUMBER, ROOM = 2, 2.0
"""On a card: half precision, and as much again for the steps."""


class Prober:
    """What was measured, what is being measured, and why something could not be."""

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
        self._in_hand = ""
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
        return bool(self._in_hand) or self._timer is not None

    def working(self, config: RunConfig | None = None) -> bool:
        """Whether something is being measured: of these settings, or at all."""
        return bool(self._in_hand) and (config is None or self._in_hand == cost_key(config))

    def steps_done(self) -> tuple[int, int]:
        """How many steps of how many were taken of what is in hand."""
        reply = self._reply
        return (reply.done, reply.total) if reply else (0, 0)

    def follow(self, config: RunConfig) -> bool:
        """Have the settings measured in a moment if nothing changes, where that is no burden.

        Returns:
            Whether they will be.
        """
        key = cost_key(config)
        with self._lock:
            changed, self._wanted = key != self._wanted, key
            if self.known(config) or key in self._problems or not self.gentle(config):
                self._stop_timer()
                return False
            if changed:
                self._stop_timer()
            if self._timer is None and not self._in_hand:
                self._timer = threading.Timer(STILL_FOR, self._by_itself, (config,))
                self._timer.daemon = True
                self._timer.start()
            return True

    def gentle(self, config: RunConfig) -> bool:
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
        """Measure now, because somebody asked for it.

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
        """Stop measuring; what is in hand is dropped at its next step."""
        with self._lock:
            self._stop_timer()
            if self._reply is not None:
                # Not again by itself, until the form changes or somebody asks.
                self._problems.setdefault(self._in_hand, "")
                self._worker.cancel(self._reply)

    def _by_itself(self, config: RunConfig) -> None:
        key = cost_key(config)
        # In one piece: a form that is looked at meanwhile would set another timer.
        with self._lock:
            self._timer = None
            if self._wanted != key or key in self._problems or self.known(config):
                return
            if self.gentle(config):
                self._measure(config)

    def _measure(self, config: RunConfig) -> None:
        with self._lock:
            if self._in_hand:
                return
            self._in_hand = cost_key(config)
            request = {"do": "probe", "config": config.to_dict(), "aside": str(self._workspace / "cache")}
            self._reply = self._worker.submit(request)
        watch = threading.Thread(target=self._attend, args=(config, self._reply), daemon=True, name="probe")
        watch.start()

    def _attend(self, config: RunConfig, reply: Reply) -> None:
        """Wait for the end; what it took is kept, and whoever needs the machine meanwhile gets it."""
        key = self._in_hand
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
            self._in_hand, self._reply = "", None

    def _cost(self, config: RunConfig, result: dict[str, Any]) -> StepCost:
        step, draw, peak = float(result["step"]), float(result["draw"]), int(result["peak"])
        return StepCost(step, draw, peak, config.model.base, self._hardware.device, step_passes(config))

    def _has_room(self, base: Base) -> bool:
        card = self._hardware.card()
        parameters = parameters_of(base)
        if card is None or not parameters:
            return False
        return card.total - card.used > parameters * BYTES_A_NUMBER * ROOM

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
