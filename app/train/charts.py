"""The two charts of a run as inline SVG: one small piece of text a poll, no library, no node a point."""

import html
import math
from collections.abc import Sequence

from lora_core.spec.events import StepDone, Validated
from lora_core.spec.progress import smoothed

WIDTH, HEIGHT = 576, 200
LEFT, RIGHT, TOP, BOTTOM = 52, 556, 20, 172
MOST_POINTS = 300

Points = list[tuple[float, float]]


class Axes:
    """The map from data to the drawing, with ends at round numbers."""

    def __init__(self, xs: Sequence[float], lowest: float, highest: float) -> None:
        """Axes that hold `xs` and the values from `lowest` to `highest`."""
        self.x0, self.x1 = min(xs), max(max(xs), min(xs) + 1)
        step = _round_step((highest - lowest) / 3 or abs(highest) / 3 or 1.0)
        self.y0 = math.floor(lowest / step + 1e-9) * step
        self.lines = max(2, math.ceil((highest - self.y0) / step - 1e-9)) + 1
        self.y1 = self.y0 + step * (self.lines - 1)
        self.digits = max(0, math.ceil(-math.log10(step) - 1e-9))

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of the data lies in the drawing."""
        right = LEFT + (x - self.x0) / (self.x1 - self.x0) * (RIGHT - LEFT)
        return right, BOTTOM - (y - self.y0) / (self.y1 - self.y0) * (BOTTOM - TOP)

    def path(self, points: Points) -> str:
        """Points as an SVG attribute."""
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.at(*point) for point in points))

    def frame(self) -> str:
        """Grid lines and their numbers."""
        parts = []
        for row in range(self.lines):
            value = self.y0 + (self.y1 - self.y0) * row / (self.lines - 1)
            _, y = self.at(self.x0, value)
            parts.append(f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(
                f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.{self.digits}f}</text>'
            )
        # A run of few steps has fewer whole numbers than places for them.
        ticks = {round(self.x0 + (self.x1 - self.x0) * column / 4) for column in range(5)}
        for step in sorted(ticks):
            x, _ = self.at(step, self.y0)
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{step:,}</text>')
        return "".join(parts)


def _round_step(rough: float) -> float:
    scale = 10.0 ** math.floor(math.log10(rough))
    return next(scale * nice for nice in (1, 2, 5, 10) if scale * nice >= rough * 0.999)


def _svg(label: str, inside: str) -> str:
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"'
        f' aria-label="{html.escape(label)}">{inside}</svg>'
    )


def _empty(text: str) -> str:
    return f'<p class="plot-empty small">{html.escape(text)}</p>'


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """At most `most` points: the mean of each stretch."""
    stride = math.ceil(len(points) / most) or 1
    if stride == 1:
        return points
    parts = [points[i : i + stride] for i in range(0, len(points), stride)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def loss_chart(losses: Sequence[StepDone]) -> str:
    """Training loss, raw and smoothed."""
    points = [(float(e.step), e.loss) for e in losses if math.isfinite(e.loss)]
    if len(points) < 2:
        return _empty("The curve begins with the first steps.")
    calm = thinned([(x, y) for (x, _), y in zip(points, smoothed([y for _, y in points]), strict=True)])
    raw = thinned(points)
    stride = math.ceil(len(points) / MOST_POINTS) or 1
    ys = sorted(y for _, y in raw)
    # A single wild step must not flatten the rest of the curve.
    top = max(ys[int(0.98 * (len(ys) - 1))], max(y for _, y in calm))
    axes = Axes([x for x, _ in raw], min(ys[0], min(y for _, y in calm)), top)
    raw = [(x, min(y, axes.y1)) for x, y in raw]
    inside = (
        axes.frame() + f'<polyline class="raw" data-stride="{stride}" points="{axes.path(raw)}"/><polyline'
        f' class="smooth" points="{axes.path(calm)}"/>'
    )
    return _svg(f"Training loss, now {calm[-1][1]:.4f} smoothed", inside)


def gain_chart(validations: Sequence[Validated]) -> str:
    """Gain on held-out pictures with a band of two standard errors, the best marked."""
    found = [e for e in validations if math.isfinite(e.gain)]
    if not found:
        return _empty("Measured from time to time on the pictures that are held out.")
    errors = [2 * e.standard_error if math.isfinite(e.standard_error) else 0.0 for e in found]
    steps = [float(e.step) for e in found]
    lows = [e.gain - error for e, error in zip(found, errors, strict=True)]
    highs = [e.gain + error for e, error in zip(found, errors, strict=True)]
    axes = Axes([0.0, *steps], min(0.0, *lows), max(*highs, 1e-6))
    band = [*zip(steps, highs, strict=True), *reversed(list(zip(steps, lows, strict=True)))]
    best = max(found, key=lambda e: e.gain)
    x, y = axes.at(float(best.step), best.gain)
    line = axes.path([(float(e.step), e.gain) for e in found])
    anchor = "end" if x > (LEFT + RIGHT) / 2 else "start"
    inside = (
        axes.frame()
        + f'<polygon class="band" points="{axes.path(band)}"/><polyline class="smooth" points="{line}"/>'
        + f'<circle class="best" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
        + f'<text x="{x:.1f}" y="{max(12.0, y - 12):.1f}" text-anchor="{anchor}">best, step'
        f" {best.step:,}</text>"
    )
    return _svg(f"Gain on held-out pictures, best {best.gain:+.4f} at step {best.step}", inside)
