"""TensorBoard, for those who like it: the events of a run as its curves, and its samples as pictures.

It shows what `events.jsonl` says and decides nothing; a run that cannot write it goes on without.
"""

import importlib
import math
from typing import Any

import numpy as np
from PIL import Image

from lora_core.spec import events
from lora_core.spec.run_folder import RunFolder

FOLDER = "tensorboard"


class Board:
    """Writes one run's curves; feed it events in their order."""

    def __init__(self, run: RunFolder, done: int) -> None:
        """Write below the run's folder, from `done` steps on. `preflight.require_packages` comes first."""
        self._run = run
        self._writer: Any = self._opened(done)

    def show(self, event: events.Event) -> None:
        """Add what an event says."""
        match event:
            case events.Resumed():
                # Later steps of an earlier process are void.
                self._writer.close()
                self._writer = self._opened(event.step)
            case events.StepDone():
                self._add(event, {"train/loss": event.loss, "train/lr": event.lr, "train/s": event.seconds})
            case events.Validated():
                self._add(
                    event,
                    {
                        "validation/gain": event.gain,
                        "validation/standard error": event.standard_error,
                        "validation/loss": event.adapted_loss,
                        "validation/gauge": event.gauge,
                        "validation/prior": event.prior,
                        "validation/raw gain": event.raw_gain,
                    },
                )
            case events.PreviewDone():
                drawn = {"samples": event.files, "samples, raw": event.raw_files}
                for name, number, file in (
                    (n, *row) for n, files in drawn.items() for row in enumerate(files)
                ):
                    with Image.open(self._run.path / file) as picture:
                        pixels = np.asarray(picture.convert("RGB"))
                    self._writer.add_image(f"{name}/{number}", pixels, event.step, dataformats="HWC")

    def close(self) -> None:
        """Write out what waits."""
        self._writer.close()

    def _add(self, event: events.Event, values: dict[str, float]) -> None:
        for name, value in values.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, event.step, walltime=event.time)

    def _opened(self, done: int) -> Any:
        made = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        return made(str(self._run.path / FOLDER), purge_step=done + 1)
