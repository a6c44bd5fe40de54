"""What is due between two steps: validation, checkpoint and samples, and the export at the end.

Validation and samples look at a run and are no part of it: where memory is too short for them, they are left
out with a word, and training goes on.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

from lora_core.adapters.inject import adapter_weights
from lora_core.spec import events
from lora_core.spec.config import RunConfig
from lora_core.spec.room import preview_bytes, require_room
from lora_core.spec.run_folder import RunFolder
from lora_core.training.between import HeldOut, drawn_samples, due
from lora_core.training.checkpoint import TrainState, amend_record
from lora_core.training.export import newest_sample, run_header, write_export
from lora_core.training.guards import Health
from lora_core.training.keeping import Keeper
from lora_core.training.memory import free_memory, out_of_memory
from lora_core.training.prepare import Session

EXPORT_PRECISION = "fp16"
SECONDS_BETWEEN_NOTES = 0.5
"""Long work says how far it is this often."""


class Notes:
    """Says now and then how far long work is."""

    def __init__(self, emit: Callable[[events.Event], None], check: Callable[[], None]) -> None:
        """`check` is called each time, and may end the work by what it raises."""
        self._emit = emit
        self._check = check
        self._noted = 0.0

    def preparing(self, phase: str, done: int, total: int) -> None:
        """Of work before the first step; its beginning and end are always said."""
        if done in (0, total) or self._due():
            self._noted = time.monotonic()
            self._emit(events.Preparing(phase=phase, done=done, total=total))
        self._check()

    def working(self, step: int, phase: str) -> Callable[[int, int], None]:
        """A callback for work after `step`, called with (done, all)."""

        def note(done: int, total: int) -> None:
            if self._due():
                self._noted = time.monotonic()
                self._emit(events.Working(step=step, phase=phase, done=done, total=total))
            self._check()

        return note

    def _due(self) -> bool:
        return time.monotonic() - self._noted > SECONDS_BETWEEN_NOTES


class Duties:
    """Does for one run what is due after a step."""

    def __init__(
        self,
        run: RunFolder,
        config: RunConfig,
        session: Session,
        keeper: Keeper,
        emit: Callable[[events.Event], None],
        notes: Notes,
    ) -> None:
        """Nothing is measured yet."""
        self.best: dict[str, float] = {}
        self._run = run
        self._config = config
        self._session = session
        self._keeper = keeper
        self._emit = emit
        self._notes = notes
        self._held_out = HeldOut()
        self._started_at = run.config_file.stat().st_mtime

    def saves(self, step: int, last: bool, asked: bool) -> bool:
        """Whether a checkpoint is written after `step`."""
        return step > 0 and (last or asked or due(step, self._config.save.every, last))

    def do(self, step: int, last: bool, asked: set[str], health: Health) -> bool:
        """What is due after a step, in the order validation, checkpoint, samples; whether anything was.

        Args:
            step: steps done.
            last: whether it was the last.
            asked: "save" and "preview" as people asked for them.
            health: of the run, for the checkpoint.
        """
        config = self._config
        validates = step > 0 and bool(self._session.held_out) and due(step, config.validation.every, last)
        saves = self.saves(step, last, "save" in asked)
        samples = "preview" in asked or due(step, config.preview.every, last)
        if validates:
            self._aside(step, "The validation was", self._validate)
        if saves:
            self.save(step, last, asked, health)
        if samples:
            self._aside(step, "The samples were", self._preview)
        return validates or saves or samples

    def make_up(self, step: int, last: bool, validated: set[int], sampled: set[int]) -> None:
        """What was due at the step that a run is gone on from and did not come about: a stop came first.

        Args:
            step, last: as of `do`.
            validated, sampled: steps after which that was done.
        """
        config = self._config
        validates = step > 0 and bool(self._session.held_out) and due(step, config.validation.every, last)
        if validates and step not in validated:
            self._aside(step, "The validation was", self._validate)
            # The checkpoint was written without it.
            amend_record(self._run.checkpoint(step), {"best": self.best})
        if due(step, config.preview.every, last) and step not in sampled:
            self._aside(step, "The samples were", self._preview)

    def save(self, step: int, last: bool, asked: set[str], health: Health) -> None:
        """Write a checkpoint; arguments as of `do`."""
        planned = due(step, self._config.save.every, last) and health.calm
        state = TrainState(
            step, {}, best=dict(self.best), health=health.record(), planned=planned, marked="save" in asked
        )
        path = self._keeper.save(state, self._header(step))
        self._emit(events.CheckpointDone(step=step, path=self._below(path)))

    def export(self, step: int) -> Path:
        """Write the file for other tools: the average of the adapter, where one is kept."""
        path = self._run.exports / f"{self._run.name}.safetensors"
        trainee = self._session.trainee
        weights = trainee.average.weights() if trainee.average else adapter_weights(trainee.injected)
        numbers = sum(layer.down.numel() + layer.up.numel() for layer in weights.layers.values())
        require_room(self._run.path, 2 * numbers, "The exported file")
        how = ("kohya", EXPORT_PRECISION)
        picture = newest_sample(self._run, step)
        return write_export(weights, path, how, trainee.base.family, self._header(step), picture)

    def _aside(self, step: int, what: str, work: Callable[[int], None]) -> None:
        try:
            work(step)
            return
        except Exception as error:
            if not out_of_memory(error):
                raise
            free_memory(self._session.trainee, error)
        thing, _, verb = what.rpartition(" ")
        message = f"{thing} of step {step} did not fit into memory and {verb} left out; training goes on."
        self._emit(events.Warned(step=step, message=message))

    def _validate(self, step: int) -> None:
        gain = self._held_out.gain(self._session, self._notes.working(step, "Validating"))
        best = math.isfinite(gain.gain) and (not self.best or gain.gain > self.best["gain"])
        if best:
            self.best = {"step": step, "gain": gain.gain}
        self._emit(events.Validated(step=step, best=best, **vars(gain)))

    def _preview(self, step: int) -> None:
        require_room(self._run.path, preview_bytes(self._config), f"The samples of step {step}")
        stem = self._run.previews / f"step-{step:06d}"
        name = self._run.name if step else ""
        note = self._notes.working(step, "Sampling")
        paths = drawn_samples(self._session, self._config.preview, stem, name, note)
        files = [self._below(path) for path in paths]
        self._emit(events.PreviewDone(step=step, files=files, prompts=self._session.prompts))

    def _header(self, step: int) -> dict[str, str]:
        session = self._session
        return run_header(self._config, session.trainee.base, session.train_items, step, self._started_at)

    def _below(self, path: Path) -> str:
        return path.relative_to(self._run.path).as_posix()
