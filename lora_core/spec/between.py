"""The settings of what happens between two steps: validation, samples, checkpoints.

The others are in `spec/sections.py`.
"""

from dataclasses import dataclass

from lora_core.spec import choices
from lora_core.spec.setting import AUTO, NumberOrAuto, setting


@dataclass(frozen=True)
class ValidationSection:
    """The measurement on pictures that are kept out of training."""

    every: int = setting(
        100, "Validate every", "Steps between two validations. 0: never.", span=(0, 1_000_000)
    )
    pictures: float = setting(
        0.1,
        "Held-out pictures",
        "Kept out of training and used to measure: a share below 1, or a number. 0: none.",
        span=(0.0, 10_000.0),
    )
    triples: int = setting(
        4, "Looks a picture", "Fixed (noise, timestep) pairs for each held-out picture.", span=(1, 1000)
    )
    budget: float = setting(
        0.05,
        "Share of time",
        "Of the time that training takes: where validating costs more, it is done more rarely. 0: no limit.",
        span=(0.0, 1.0),
    )
    gauge: bool = setting(
        True,
        "Memorisation gauge",
        "Measure training pictures too: a gain on them that held-out pictures do not have is learned by"
        " heart.",
    )
    prior: int = setting(
        4,
        "Pictures of the base",
        "Made by the base itself before the first step, to measure what is forgotten. 0: none.",
        span=(0, 1000),
    )
    patience: int = setting(
        4,
        "Patience",
        "Stop after so many validations without a better one, if the last is clearly worse than the best, or"
        " after twice as many if it is not. 0: never stop early.",
        span=(0, 1000),
    )


@dataclass(frozen=True)
class PreviewSection:
    """The samples drawn while training."""

    every: int = setting(
        100, "Sample every", "Steps between two rounds of samples. 0: never.", span=(0, 1_000_000)
    )
    prompts: list[str] = setting(
        [], "Sample prompts", "One a line. Empty: captions of held-out or training pictures."
    )
    seed: int = setting(
        0,
        "Sample seed",
        "The same noise at every round, so that only the adapter differs.",
        span=(0, 2**32 - 1),
    )
    steps: int = setting(20, "Sampler steps", "Steps of the sampler for each sample.", span=(1, 200))
    cfg: float = setting(5.0, "Guidance", "How strongly a sample follows its prompt.", span=(1.0, 30.0))
    cfg_rescale: NumberOrAuto = setting(
        AUTO,
        "CFG rescale",
        "Takes back the contrast that guidance adds: 0 not at all, 1 all of it (phi of Lin et al. 2023)."
        " `auto`: 0.7 for a base with zero terminal SNR that predicts velocity, off for others and for the"
        " embedded base.",
        span=(0.0, 1.0),
    )
    sampler: str = setting("ddim", "Sampler", "The sampler.", table=choices.SAMPLERS)


@dataclass(frozen=True)
class SaveSection:
    """Checkpoints."""

    every: int = setting(
        100, "Save every", "Steps between two checkpoints. 0: only at the end.", span=(0, 1_000_000)
    )
    keep_last: int = setting(
        3, "Keep last", "How many of the newest checkpoints stay on disk.", span=(1, 1000)
    )
    keep_best: bool = setting(True, "Keep best", "Keep the checkpoint with the best validation too.")
    ema: float = setting(
        0.0,
        "Averaged adapter",
        "Decay of a running average of the adapter, 0.99 for instance: it evens out the last steps. Average"
        " and raw adapter are both sampled, measured and exported (NAME and NAME-raw). 0: off.",
        span=(0.0, 0.99999),
    )
    tensorboard: bool = setting(
        False,
        "TensorBoard",
        "Write curves and samples for TensorBoard too, into the run's folder. Needs the package tensorboard.",
    )
