"""What happens between steps with the adapter as it stands: samples, and what a measurement needs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from lora_core.adapters.inject import Injected
from lora_core.sampling.generate import Picture, generated, infotext, save_png
from lora_core.spec.between import PreviewSection
from lora_core.training.prepare import Session

Note = Callable[[int, int], None]
"""Called with (done, all); what it raises ends the work."""


def drawn_samples(
    session: Session, section: PreviewSection, stem: Path, name: str, note: Note, averaged: bool = True
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
    base = session.trainee.base
    how = Picture(section.seed, section.steps, section.cfg, section.sampler, cfg_rescale=section.cfg_rescale)
    used = [(name, 1.0)] if name else []
    files = []
    injected = session.trainee.injected
    with evaluating(session, averaged), torch.no_grad(), at_strength(injected, 1.0 if name else 0.0):
        negative = session.text.negative()
        for number, prompt in enumerate(session.prompts):
            image = generated(base, how, session.text.condition(prompt), negative, note)
            path = stem.with_name(f"{stem.name}-{number}.png")
            save_png(image, path, infotext(base, how, prompt, "", used))
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
def evaluating(session: Session, averaged: bool = True) -> Iterator[None]:
    """Dropout off in the adapted parts, and the average in the adapter's place, where one is kept and is
    asked for, while the context is open."""
    modules = session.trainee.base.modules.values()
    average = session.trainee.average if averaged else None
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
