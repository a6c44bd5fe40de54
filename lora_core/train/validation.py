"""What happens between steps with the adapter as it stands: samples, and what a measurement needs."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lora_core.backends.int8 import is_quantized
from lora_core.evaluate.early_stopping import is_better, paired_difference
from lora_core.evaluate.validator import (
    EvalImage,
    clustered_error,
    eval_losses,
    gain_by_timestep,
    paired_gain,
)
from lora_core.generate.pipeline import infotext, sample_image, save_png
from lora_core.generate.request import GenerationRequest, WeightedLora
from lora_core.lora.inject import Injected
from lora_core.runs import events
from lora_core.settings.schema import SampleSection
from lora_core.train.setup import TrainSession

Note = Callable[[int, int], None]
"""Called with (done, all); what it raises ends the work."""


def draw_samples(
    session: TrainSession, section: SampleSection, stem: Path, name: str, note: Note, averaged: bool = True
) -> list[Path]:
    """Draw one picture for each of the session's prompts, all with the section's seed.

    Args:
        session: the run.
        section: how to sample.
        stem: where to write, `-0.png`, `-1.png`, ... appended.
        name: of the adapter, for the pictures' settings; "" for pictures of the base without it.
        note: called as each picture is denoised.
        averaged: with the average in the adapter's place, where one is kept.
    """
    base = session.state.base
    request = GenerationRequest(
        seed=section.seed, steps=section.steps, cfg=section.cfg, cfg_rescale=section.cfg_rescale,
        sampler=section.sampler, loras=(WeightedLora(name),) if name else (),
    )  # fmt: skip
    files = []
    injected = session.state.injected
    with evaluating(session, averaged), torch.no_grad(), at_strength(injected, 1.0 if name else 0.0):
        negative = session.text.negative()
        for number, prompt in enumerate(session.prompts):
            image = sample_image(base, request, session.text.condition(prompt), negative, note)
            path = stem.with_name(f"{stem.name}-{number}.png")
            save_png(image, path, infotext(base, replace(request, prompt=prompt)))
            files.append(path)
    return files


@contextmanager
def at_strength(injected: Injected, strength: float) -> Iterator[None]:
    """The adapter at `strength` while the context is open, at 1 afterwards."""
    injected.set_strength(strength)
    try:
        yield
    finally:
        injected.set_strength(1.0)


@contextmanager
def evaluating(session: TrainSession, averaged: bool = True) -> Iterator[None]:
    """Dropout off in the adapted parts, and the average in the adapter's place, where one is kept and is
    asked for, while the context is open."""
    modules = session.state.base.modules.values()
    average = session.state.average if averaged else None
    for module in modules:
        module.eval()
    try:
        with average.in_place() if average is not None else nullcontext():
            yield
    finally:
        for module in modules:
            module.train()


def due(step: int, every: int, last: bool) -> bool:
    """Whether what is done `every` so many steps is due now: then, and at the end, but never where `every` is
    0."""
    return every > 0 and (last or step % every == 0)


# The validation of a run: the adapter as it stands, measured on the same fixed triples each time.
#
# Three groups of pictures answer three questions. Held-out ones: does it gain? Training ones: how much of
# that is learned by heart? The base's own: what is forgotten? The base's losses on them are measured once.


RAW = "raw"
"""The held-out pictures with the raw adapter, where what is measured else is its average."""
OnDone = Callable[[int, int], None]
"""Called with (done, all); what it raises ends the work."""


@dataclass
class BestStep:
    """The best step so far: its gain, and its losses on the held-out triples, (pictures, K)."""

    step: int = 0
    gain: float = math.nan
    losses: torch.Tensor | None = None

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "BestStep":
        """As a checkpoint keeps it."""
        if not record:
            return cls()
        losses = record.get("losses")
        found = torch.tensor(losses, dtype=torch.float64) if losses else None
        return cls(int(record["step"]), float(record["gain"]), found)

    def record(self) -> dict[str, Any]:
        """For a checkpoint; empty where nothing was measured yet."""
        if not self.step:
            return {}
        losses = [] if self.losses is None else self.losses.tolist()
        return {"step": self.step, "gain": self.gain, "losses": losses}


@dataclass
class Validator:
    """Measures one run's adapter.

    Attributes:
        session: the run.
        best: the best step so far, which `validated` keeps.
        seconds: that the last measurement of the adapter took, those of the base not counted.
    """

    session: TrainSession
    best: BestStep = field(default_factory=BestStep)
    seconds: float = 0.0
    _base_losses: dict[str, torch.Tensor] = field(default_factory=dict)
    _packed: bool = False

    def validated(self, step: int, note: OnDone) -> events.Validated:
        """Measure the adapter; if it is the best so far, `best` is this step afterwards.

        Args:
            step: optimizer steps done.
            note: called as pictures are done.
        """
        with evaluating(self.session):
            with at_strength(self.session.state.injected, 0.0):
                groups = self.session.measured.by_name(note)
                if self._packed != is_quantized(self.session.state.base.denoiser):
                    # A base in 8 bits is another base.
                    self._packed = not self._packed
                    self._base_losses.clear()
                for name, pictures in groups.items():
                    if name not in self._base_losses:
                        self._base_losses[name] = self._losses(pictures, note)
            began = time.monotonic()
            adapted = {name: self._losses(pictures, note) for name, pictures in groups.items()}
        if self.session.state.average is not None:
            with evaluating(self.session, averaged=False):
                adapted[RAW] = self._losses(groups["held out"], note)
        self.seconds = time.monotonic() - began
        return self._event(step, groups["held out"], adapted)

    def _is_best(self, step: int, gain: float, against: float, error: float) -> bool:
        if self.best.step in (0, step):
            return True
        # Without the best one's own losses the gains are all there is.
        return gain > self.best.gain if math.isnan(against) else is_better(against, error)

    def _losses(self, pictures: list[EvalImage], note: OnDone) -> torch.Tensor:
        session = self.session
        return eval_losses(session.state.base, pictures, session.text.condition, note)

    def _event(
        self, step: int, held_out: list[EvalImage], adapted: dict[str, torch.Tensor]
    ) -> events.Validated:
        base, now = self._base_losses, adapted["held out"]
        gain = paired_gain(base["held out"], now)
        against, error = paired_difference(self.best.losses, now)
        best = math.isfinite(gain.gain) and self._is_best(step, gain.gain, against, error)
        if best:
            self.best = BestStep(step, gain.gain, now)
        found: dict[str, Any] = {}
        if "training" in adapted:
            learned = base["training"] - adapted["training"]
            by_heart = float(learned.mean()) - gain.gain
            spread = math.hypot(clustered_error(learned), gain.standard_error)
            found = {"train_gain": float(learned.mean()), "gauge": by_heart, "gauge_error": spread}
        if "prior" in adapted:
            kept = base["prior"] - adapted["prior"]
            found |= {"prior": float(kept.mean()), "prior_error": clustered_error(kept)}
        if RAW in adapted:
            less, spread = paired_difference(now, adapted[RAW])
            raw = paired_gain(base["held out"], adapted[RAW]).gain
            found |= {"raw_gain": raw, "raw_against": less, "raw_against_error": spread}
        timesteps = torch.stack([picture.draws.timesteps for picture in held_out])
        highest = self.session.state.base.noise.num_timesteps
        bands = gain_by_timestep(base["held out"], now, timesteps, highest)
        return events.Validated(
            step=step, best=best, against_best=against, against_best_error=error, bands=bands,
            **vars(gain), **found,
        )  # fmt: skip
