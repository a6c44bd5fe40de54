"""What to tell a person about how a tool reads an adapter file: one sentence, with what to do."""

from dataclasses import dataclass

from lora_core.adapters.weights import AdapterWeights, LayerKey
from lora_core.formats.names import first_few
from lora_core.formats.scales import Used
from lora_core.spec.families import Family


@dataclass(frozen=True)
class Outcome:
    """What a tool makes of a file.

    Attributes:
        refused: why it loads nothing, or "".
        keys: how many the file has.
        dropped: those that it makes no use of.
        used: what it does to each layer.
        meant: what the file means.
        errors: relative error of each layer's update; None where the kind of adapter leaves it open.
        tolerance: the error that is none.
    """

    refused: str
    keys: int
    dropped: list[str]
    used: dict[LayerKey, Used]
    meant: AdapterWeights
    errors: dict[LayerKey, float | None]
    tolerance: float

    @property
    def max_error(self) -> float | None:
        """The largest error; None if all are open."""
        known = [error for error in self.errors.values() if error is not None]
        if known:
            return max(known)
        return None if self.used else 1.0

    @property
    def wrong(self) -> list[LayerKey]:
        """The layers that are applied, but at a wrong strength."""
        return [
            layer
            for layer, error in self.errors.items()
            if layer in self.used and error is not None and error > self.tolerance
        ]

    @property
    def dora(self) -> bool:
        """Whether a layer is applied by its magnitude, which tools do in different ways."""
        return any(used.kind == "DoRA" for used in self.used.values())

    @property
    def fine(self) -> bool:
        """Whether the tool takes every key at the right strength."""
        missing = any(error is not None and error > self.tolerance for error in self.errors.values())
        return not (self.refused or self.dropped or missing or self.dora)


def note(outcome: Outcome, meant_for: bool, format: str, family: Family) -> str:
    """The sentence on an outcome.

    Args:
        outcome: of one tool.
        meant_for: whether the file's format is meant for the tool.
        format: of the file.
        family: of the base.
    """
    advice = _advice(outcome, meant_for, format)
    if outcome.refused:
        return f"loads nothing: {outcome.refused}; {advice}"
    if not outcome.used:
        return f"loads nothing and says nothing, for it knows none of the {outcome.keys} keys; {advice}"
    if outcome.dropped:
        wrong = f" and applies {_strength(outcome)}" if outcome.wrong else ""
        share = f"{len(outcome.dropped)} of {outcome.keys} keys, such as {first_few(outcome.dropped, 1)},"
        return f"drops {share} without a word{wrong}; {advice}"
    if outcome.wrong:
        return f"applies {_strength(outcome)}; {advice}"
    if outcome.dora:
        return "tools apply DoRA magnitudes in different ways; merge it into a plain LoRA"
    if not outcome.fine:
        return "reads every key, but the file lacks layers of the adapter; export it again"
    if not family.portable:
        return f"reads every key; the file is of use only with the {family.title.lower()}"
    return "reads every key at the right strength"


def _strength(outcome: Outcome) -> str:
    """How many layers are how far off, in words."""
    worst = max(outcome.wrong, key=lambda layer: outcome.errors[layer] or 0.0)
    used, right = outcome.used[worst].scale, outcome.meant.layers[worst].scale
    layers = f"{len(outcome.wrong)} of {len(outcome.errors)} layers at the wrong strength"
    if used is None or right == 0 or used / right <= 0:
        return layers
    ratio = used / right
    if abs(ratio - 1) <= outcome.tolerance:
        return layers
    return f"{layers}, up to {max(ratio, 1 / ratio):.3g} times too {'strong' if ratio > 1 else 'weak'}"


def _advice(outcome: Outcome, meant_for: bool, format: str) -> str:
    if not meant_for:
        return "export as kohya for it"
    if any(key.endswith(".dora_scale") for key in outcome.dropped):
        return "merge it into a plain LoRA"
    if outcome.wrong and not outcome.dropped:
        return "convert it to kohya, which gives all layers one alpha"
    return f"convert it to {format}, which writes the names that all tools know"
