"""What to tell a person about how a tool reads an adapter file: one sentence, with what to do."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lora_core.formats.compat.rules import KRON
from lora_core.formats.compat.scales import Used
from lora_core.formats.detect import extra_keys
from lora_core.formats.names import first_few
from lora_core.lora.weights import AdapterWeights, LayerKey
from lora_core.model_files.families import Family


@dataclass(frozen=True)
class Outcome:
    """What a tool makes of a file.

    Attributes:
        refused: why it loads nothing, or "".
        keys: how many the file has.
        dropped: those that it makes no use of.
        used: what it does to each layer.
        meant: what the file means.
        errors: relative error of each layer's update; None where it is unknown.
        tolerance: the error that is none.
        unused: keys that it reads without effect.
    """

    refused: str
    keys: int
    dropped: list[str]
    used: dict[LayerKey, Used]
    meant: AdapterWeights
    errors: dict[LayerKey, float | None]
    tolerance: float
    unused: Sequence[str] = ()

    @property
    def max_error(self) -> float | None:
        """The largest error; None where it is unknown."""
        known = [error for error in self.errors.values() if error is not None]
        worst = max(known, default=0.0)
        if self.unknown and worst <= self.tolerance:
            return None
        return worst if known else None if self.used else 1.0

    @property
    def unknown(self) -> bool:
        """Whether the error of a layer is unknown."""
        return any(error is None for error in self.errors.values())

    @property
    def wrong(self) -> list[LayerKey]:
        """The layers that are applied, but at a wrong strength."""
        return [
            layer
            for layer, error in self.errors.items()
            if layer in self.used and layer not in self.lost and error is not None and error > self.tolerance
        ]

    @property
    def dora(self) -> bool:
        """Whether it applies magnitudes in another way than the file means."""
        return any(
            self.used[layer].norm and error != 0 for layer, error in self.errors.items() if layer in self.used
        )

    @property
    def lost(self) -> list[LayerKey]:
        """The layers that it fails at and leaves as they are."""
        return [layer for layer, used in self.used.items() if used.lost]

    @property
    def fine(self) -> bool:
        """Whether the tool takes every key at the right strength."""
        missing = any(error is not None and error > self.tolerance for error in self.errors.values())
        return not (self.refused or self.dropped or missing or self.unknown)


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
    if outcome.lost:
        layers = f"{len(outcome.lost)} {'layer' if len(outcome.lost) == 1 else 'layers'} of Tucker form"
        return f"reads every key, but skips {layers} with an error in its log, since {KRON}; {advice}"
    if outcome.dora:
        return (
            f"norms the DoRA magnitudes in another way than the file means, {_dora_error(outcome)}; {advice}"
        )
    if outcome.wrong:
        return f"applies {_strength(outcome)}; {advice}"
    if not outcome.fine:
        return "reads every key, but the file lacks layers of the adapter; export it again"
    if not family.portable:
        return f"reads every key; the file is of use only with the {family.title.lower()}"
    if outcome.unused:
        return f"reads every key at the right strength, but makes no use of {first_few(outcome.unused, 1)}"
    return "reads every key at the right strength"


def _dora_error(outcome: Outcome) -> str:
    error = outcome.max_error
    return "--base measures how far off" if error is None else f"{error:.2g} of the update off"


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
    if any(used.kind == "DoRA" for used in outcome.used.values()) or any(
        map(_MERGED.search, outcome.dropped)
    ):
        return "merge it into a plain LoRA with --rank"
    extras = extra_keys(outcome.dropped)
    if extras and len(extras) == outcome.keys:
        return "no plain LoRA can hold it"
    if extras and len(extras) == len(outcome.dropped):
        return "only a file without them suits it; convert leaves them out"
    if outcome.wrong and not outcome.dropped:
        return "convert it to kohya, which gives all layers one alpha"
    return f"convert it to {format}, which writes the names that all tools know"


_MERGED = re.compile(r"\.(?:hada|lokr)_|\.dora_scale$|\.lora_magnitude_vector")
"""Names of tensors in kinds of adapters that `merge --rank` makes plain."""
