"""Problems of a run that has not started: what one is, and those of its learning rates."""

import math
from dataclasses import dataclass

from lora_core.spec.choices import OPTIMIZERS, TARGETS, chosen
from lora_core.spec.config import RunConfig
from lora_core.spec.errors import RunError
from lora_core.spec.families import Family

RATES: dict[str, tuple[float, float]] = {
    "adamw": (1e-6, 3e-3),
    "adam": (1e-6, 3e-3),
    "nadam": (1e-6, 3e-3),
    "radam": (1e-6, 5e-3),
    "adafactor": (1e-6, 5e-3),
    "sgd": (1e-4, 10.0),
    "lion": (3e-7, 6e-4),
    "prodigy": (0.1, 3.0),
}
"""Learning rate x alpha / rank outside of which a run hardly learns, or burns; of an optimizer that finds its
own rate, the setting alone. Wide: a factor of ten around what guides and peers use."""


@dataclass(frozen=True)
class Problem:
    """One thing that stands in the way, or that a person should know before Start.

    Attributes:
        kind: for programs: name, package, base, vae, adapter, loss, targets, rate, disk, memory, busy,
            dataset, picture, caption, validation, or what a note on the dataset is of.
        sentence: for people, with what to do.
        blocking: whether the run would fail.
    """

    kind: str
    sentence: str
    blocking: bool = True


def refuse(problems: list[Problem]) -> None:
    """Refuse what cannot work, all of it at once.

    Raises:
        RunError: at least one problem blocks.
    """
    sentences = [problem.sentence for problem in problems if problem.blocking]
    if sentences:
        raise RunError(" ".join(sentences))


def _part_rates(config: RunConfig, family: Family | None) -> dict[str, float]:
    """The learning rate of each part that has layers to train."""
    optim, row = config.optim, TARGETS[config.adapter.targets].defaults
    settings = ("optim.lr", "optim.text_encoder_lr", "optim.text_encoder_2_lr")
    values = (optim.lr, optim.text_encoder_lr, optim.text_encoder_2_lr)
    parts = len(family.parts) if family else len(settings)
    patterns = (row["unet"], row["text"], row["text"])
    known = list(zip(settings, values, patterns, strict=True))[:parts]
    return {name: rate for name, rate, pattern in known if pattern and rate > 0}


def rate_problems(config: RunConfig, family: Family | None) -> list[Problem]:
    """Something is trained, at rates that the optimizer can work with and that are in a sane range.

    Args:
        config: of the run to come.
        family: of its base, where that is known.
    """
    optim, row = config.optim, chosen(OPTIMIZERS, config.optim.name, "optim.name")
    rates = _part_rates(config, family)
    if not rates and not any(rate > 0 for rate in optim.block_lr.values()):
        return [
            Problem(
                "rate",
                "Nothing would be trained: the learning rates of all chosen layers are 0; see optim.lr,"
                " optim.text_encoder_lr and optim.block_lr.",
            )
        ]
    if row.one_rate and (len(set(rates.values())) > 1 or optim.lora_plus != 1.0):
        return [
            Problem(
                "rate",
                f"{row.title} works with one learning rate; set the rates of the text encoders to optim.lr"
                f" ({optim.lr:g}) or to 0, and optim.lora_plus to 1.",
            )
        ]
    if optim.range_test and (row.one_rate or not optim.lr):
        why = "finds its own rate" if row.one_rate else "has nothing to begin with where optim.lr is 0"
        what = row.title if row.one_rate else "The range test"
        return [Problem("rate", f"{what} {why}; turn optim.range_test off.")]
    if optim.range_test:
        return []
    low, high = RATES.get(optim.name, (0.0, math.inf))
    scale, product = (1.0, "") if row.one_rate else (config.adapter.scale, " x alpha / rank")
    found = []
    for name, rate in rates.items():
        effective = rate * scale
        if not low <= effective <= high:
            much = "much" if effective > high else "little"
            what = "pictures may burn" if effective > high else "hardly anything may be learned"
            sentence = (
                f"{name}{product} = {effective:.3g} is {much} for {row.title}, which is usually given"
                f" {low:g} to {high:g}; {what}."
            )
            found.append(Problem("rate", sentence, False))
    return found
