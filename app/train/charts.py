"""The two charts of a run and what they mean: one small piece of text a poll, no library, no node a point."""

import html
import math
from collections.abc import Callable, Sequence

from lora_core.spec.events import StepDone, Validated
from lora_core.spec.plot import MOST_POINTS, Curve, Mark, curves_plot, thinned
from lora_core.spec.progress import smoothed
from lora_core.spec.verdict import SURE, best_of, error_of, measured, verdict

DIGITS = 7


def _empty(text: str) -> str:
    return f'<p class="plot-empty small">{html.escape(text)}</p>'


def loss_chart(losses: Sequence[StepDone]) -> str:
    """Training loss, raw and smoothed."""
    points = [(float(e.step), round(e.loss, DIGITS)) for e in losses if math.isfinite(e.loss)]
    if len(points) < 2:
        return _empty("The curve begins with the first steps.")
    # Rounded, so that a loss that stands still is no picture of rounding errors.
    means = [round(y, DIGITS) for y in smoothed([y for _, y in points])]
    calm = thinned([(x, y) for (x, _), y in zip(points, means, strict=True)])
    raw = thinned(points)
    stride = math.ceil(len(points) / MOST_POINTS) or 1
    ys = sorted(y for _, y in raw)
    # A single wild step must not flatten the rest of the curve.
    top = max(ys[int(0.98 * (len(ys) - 1))], max(y for _, y in calm))
    label = f"Training loss, now {calm[-1][1]:.4f} smoothed"
    drawn = curves_plot(
        label,
        [Curve("each step", raw, (), "raw"), Curve("smoothed", calm)],
        highest=top if top > ys[0] else None,
    )
    # The slider in the page smooths the drawn points, so it has to know how many steps each stands for.
    return drawn.replace('<polyline class="raw"', f'<polyline class="raw" data-stride="{stride}"', 1)


def gain_chart(validations: Sequence[Validated]) -> str:
    """Gain on held-out pictures with a band of two standard errors, beside it that on training pictures; the
    best step marked."""
    found = measured(validations)
    if not found:
        return _empty("Measured from time to time on the pictures that are held out.")
    trained = [one for one in found if math.isfinite(one.train_gain)]
    curves = [_curve("held-out pictures", found, "smooth", lambda e: e.gain, lambda e: e.standard_error)]
    if trained:
        curves.append(_curve("training pictures", trained, "second", lambda e: e.train_gain))
    best = best_of(found)
    raw = [one for one in found if math.isfinite(one.raw_gain)]
    if raw:
        curves.append(_curve("held-out pictures, raw adapter", raw, "third", lambda e: e.raw_gain))
    mark = Mark(float(best.step), best.gain, f"best, step {best.step:,}") if best else None
    words = f", best {best.gain:+.4f} at step {best.step}" if best else ""
    return curves_plot(f"Gain on held-out pictures{words}", curves, mark)


def _curve(
    name: str,
    found: Sequence[Validated],
    style: str,
    value: Callable[[Validated], float],
    error: Callable[[Validated], float] | None = None,
) -> Curve:
    # Step 0 is the base, which gains nothing over itself.
    points = [(0.0, 0.0), *((float(one.step), value(one)) for one in found)]
    errors = [0.0, *(SURE * error_of(error(one)) for one in found)] if error else ()
    return Curve(name, points, errors, style)


def meaning(validations: Sequence[Validated]) -> str:
    """What the curve of the gain means, in a sentence or two, and the two gauges behind it."""
    said = verdict(validations)
    if not said:
        return ""
    last = measured(validations)[-1]
    gauges = _gauge("Learning by heart", last.gauge, last.gauge_error)
    gauges += _gauge("The base's own pictures", last.prior, last.prior_error)
    row = f'<p class="small num gauges">{gauges}</p>' if gauges else ""
    return f'<div class="meaning" id="verdict"><p role="status">{html.escape(said)}</p>{row}</div>'


def _gauge(name: str, value: float, error: float) -> str:
    """A measurement with its error; told strongly where it stands out of it."""
    if not math.isfinite(value):
        return ""
    tips = {
        "Learning by heart": "How much more training pictures gain than held-out ones.",
        "The base's own pictures": "Gain on pictures that the base made; below 0 they are being forgotten.",
    }
    words = f"{value:+.4f} ± {error_of(error):.4f}".replace("-", "\N{MINUS SIGN}")
    return f'<span title="{html.escape(tips[name])}">{html.escape(name)} {words}</span>'
