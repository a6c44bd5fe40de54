"""Measures the strength at which an adapter gains most, and which strengths are as good within noise.

The gain is a smooth curve of the strength: a few coarse points find where it is highest, and parabolas
through the best three find the top (successive parabolic interpolation; Brent 1973, section 5.2). All points
are measured on the same draws, so their differences have small errors. The interval holds the strengths whose
loss of gain against the best is within two standard errors of that paired difference; between the measured
points the curve of each draw is a polynomial through its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_core.errors import ConfigError
from lora_core.evaluate.validator import MeasureGains, clustered_error
from lora_core.formats.io import AS_IT_IS
from lora_core.lora.weights import AdapterWeights, LoadedLora
from lora_core.model_files.families import Family, is_text_encoder
from lora_core.tools.delta import Rewrite, check_out, load_plain_lora

BAKED_KEY = "lora_easel.strength"
"""Our own key of a header: which strength was baked in, as JSON."""

COARSE = (0.5, 1.0, 1.5)
HIGHEST = 4.0
STEP = 0.01
"""Strengths have two decimals, as users set them."""
_BEYOND = 0.75
_REFINEMENTS = 4
_DEGREE = 4

GainsAt = Callable[[float], torch.Tensor]
"""From a strength to the gain on each draw, (images, K)."""


@dataclass(frozen=True)
class StrengthFit:
    """The best strength.

    Attributes:
        strength: the best of those measured.
        low, high: the ends of the strengths around it that are as good within noise.
        gain, standard_error: at the best.
        curve: (strength, gain, standard error) of each measured strength, ascending.
    """

    strength: float
    low: float
    high: float
    gain: float
    standard_error: float
    curve: tuple[tuple[float, float, float], ...]

    def sentence(self, what: str = "The adapter") -> str:
        """The result in words."""
        if self.strength <= 0:
            return f"{what} gains at no strength on these images: the base predicts them better without it."
        edge = " and may be best beyond that, where nothing was tried" if self.strength >= HIGHEST else ""
        return (
            f"{what} gains most at strength {self.strength:.2f}{edge}: {self.gain:+.4f} (standard error"
            f" {self.standard_error:.4f}); from {self.low:.2f} to {self.high:.2f} the difference is within"
            " noise."
        )

    def document(self) -> dict[str, Any]:
        """The result for JSON."""
        rows = [{"strength": s, "gain": g, "standard_error": e} for s, g, e in self.curve]
        return {**vars(self), "curve": rows}


def fit_strength_curve(gains_at: GainsAt) -> StrengthFit:
    """The strength of the highest mean gain, with about eight measurements on the same draws."""
    found = {strength: gains_at(strength) for strength in COARSE}
    found[0.0] = torch.zeros_like(found[1.0])
    if _best(found) == 0.0:
        found[0.2] = gains_at(0.2)
    while _best(found) == max(found) and max(found) < HIGHEST:
        further = min(HIGHEST, max(found) + _BEYOND)
        found[further] = gains_at(further)
    for _ in range(_REFINEMENTS):
        strength = _next_strength(found)
        if strength is None:
            break
        found[strength] = gains_at(strength)
    best = _best(found)
    low, high = _interval(found, best)
    curve = tuple((s, float(g.mean()), clustered_error(g)) for s, g in sorted(found.items()))
    return StrengthFit(best, low, high, float(found[best].mean()), clustered_error(found[best]), curve)


def _best(found: dict[float, torch.Tensor]) -> float:
    """The strength of the highest mean; the lower of equal ones."""
    return max(sorted(found), key=lambda strength: float(found[strength].mean()))


def _next_strength(found: dict[float, torch.Tensor]) -> float | None:
    """The top of the parabola through the best point and its neighbours; None where it is known well
    enough."""
    strengths = sorted(found)
    at = strengths.index(_best(found))
    if at in (0, len(strengths) - 1):
        return None
    a, b, c = strengths[at - 1 : at + 2]
    fa, fb, fc = (float(found[x].mean()) for x in (a, b, c))
    steeper, flatter = (b - a) * (fb - fc), (b - c) * (fb - fa)
    bend = steeper - flatter
    top = b if bend == 0 else b - ((b - a) * steeper - (b - c) * flatter) / (2 * bend)
    top = round(min(max(top, a), c), 2)
    if top in found:
        # The other side of the best, so that it is bracketed closely.
        wide = (a, b) if b - a > c - b else (b, c)
        top = round((wide[0] + 2 * wide[1]) / 3 if wide[1] == b else (2 * wide[0] + wide[1]) / 3, 2)
    return None if top in found or c - a <= 4 * STEP else top


def _interval(found: dict[float, torch.Tensor], best: float) -> tuple[float, float]:
    """The strengths around the best whose paired loss of gain is within two standard errors."""
    strengths = sorted(found)
    shape = found[best].shape
    values = np.stack([found[strength].flatten().numpy() for strength in strengths])
    scale = max(strengths)
    powers = np.polynomial.polynomial
    fit = powers.polyfit(np.array(strengths) / scale, values, min(_DEGREE, len(strengths) - 1))

    def differs(strength: float) -> bool:
        curve = powers.polyval(strength / scale, fit) - powers.polyval(best / scale, fit)
        difference = torch.from_numpy(np.asarray(curve)).reshape(shape)
        return -float(difference.mean()) > 2 * clustered_error(difference)

    ends = []
    for direction in (-STEP, STEP):
        end = best
        while 0 <= end + direction <= scale and not differs(end + direction):
            end += direction
        ends.append(round(min(max(end, 0.0), scale), 2))
    return ends[0], ends[1]


def fit_strength(weights: AdapterWeights, measure: MeasureGains) -> StrengthFit:
    """The best strength of an adapter, the same on UNet and text encoders."""
    return fit_strength_curve(lambda strength: measure([LoadedLora(weights, strength)]))


def fit_strengths_apart(weights: AdapterWeights, measure: MeasureGains) -> tuple[StrengthFit, StrengthFit]:
    """The best strengths on the UNet and on the text encoders.

    First both alike, then the text encoders' with the UNet's held, then the UNet's once more.

    Raises:
        ConfigError: the adapter is on one of the two alone.
    """
    parts = weights.parts()
    if len({is_text_encoder(part) for part in parts}) < 2:
        raise ConfigError(
            f"The adapter changes {', '.join(parts)} alone, so there are no strengths to tell apart; leave"
            " --apart out."
        )
    unet = fit_strength(weights, measure).strength
    text = fit_strength_curve(_gains_beyond_zero(measure, lambda s: LoadedLora(weights, unet, s)))
    again = fit_strength_curve(_gains_beyond_zero(measure, lambda s: LoadedLora(weights, s, text.strength)))
    return again, text


def _gains_beyond_zero(measure: MeasureGains, at: Callable[[float], LoadedLora]) -> GainsAt:
    """What one of two strengths adds to the gain of the other alone."""
    alone = measure([at(0.0)])
    return lambda strength: measure([at(strength)]) - alone


def measure_strength(
    file: Path, family: Family, measure: MeasureGains, apart: bool = False
) -> dict[str, Any]:
    """The best strength of an adapter file, or one for the UNet and one for the text encoders.

    Returns:
        `fits`: rows of `part` ("" for the whole adapter, else "UNet" or "text encoders") and `StrengthFit`;
        `strengths`: to bake in; `sentences`.

    Raises:
        LoraError: it is no plain LoRA, or `apart` and on one of the two alone.
    """
    weights = load_plain_lora(file, family)[0]
    if apart:
        unet, text = fit_strengths_apart(weights, measure)
        fits = [
            ("UNet", "On the UNet the adapter", unet),
            ("text encoders", "On the text encoders the adapter", text),
        ]
    else:
        fits = [("", "The adapter", fit_strength(weights, measure))]
    return {
        "fits": [{"part": part, **fit.document()} for part, _, fit in fits],
        "strengths": [fit.strength for _, _, fit in fits],
        "sentences": [fit.sentence(what) for _, what, fit in fits],
    }


def scale_alphas(
    weights: AdapterWeights, strength: float, text_strength: float | None = None
) -> AdapterWeights:
    """The adapter that at strength 1 is what this one is at another: alphas change, factors do not.

    Raises:
        ConfigError: a strength is not above 0.
    """
    at = LoadedLora(weights, strength, text_strength)
    for part in weights.parts():
        if not 0 < at.on(part) < float("inf"):
            raise ConfigError(
                f"A strength of {at.on(part):g} on the {part.replace('_', ' ')} cannot be baked in; it has to"
                " be above 0."
            )
    layers = {key: replace(layer, alpha=layer.alpha * at.on(key[0])) for key, layer in weights.layers.items()}
    return replace(weights, layers=layers)


def bake_strength(to: Rewrite, known: Family | None, strengths: Sequence[float]) -> str:
    """Save an adapter file at a strength of its own; the bits of the factors stay.

    Args:
        to: the files; the precision is the source's.
        strengths: one, or one for the UNet and one for the text encoders.

    Returns:
        What was done, in a sentence.

    Raises:
        LoraError: a strength is not above 0, or the file is no plain LoRA or cannot be written.
    """
    check_out(to.out)
    weights, family = load_plain_lora(to.source, known)
    record = dict(zip(("strength", "text_strength"), strengths, strict=False))
    replace(to, precision=AS_IT_IS).save(scale_alphas(weights, *strengths), family, BAKED_KEY, record)
    return f"Strength {' and '.join(f'{strength:g}' for strength in strengths)} is now strength 1."
