"""Plots as inline SVG: curves with bands, bars, heat maps. One piece of text each, no library and no script.

Window and report draw with the same code; colours and type come from the page's own style by these classes:
`plot`, `axis`, `raw`, `smooth`, `second`, `band`, `best`, `bar`, `weak`, `zero`, and for heat maps `cell`
with the share of its colour as `fill-opacity`. What a plot shows is said in its label, and wherever the
numbers matter a table stands beside it.
"""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 576, 200
LEFT, RIGHT, TOP, BOTTOM = 52, 556, 20, 172
MOST_POINTS = 300
MOST_DOTS = 40
"""Measurements are marked one by one where there are no more."""
MOST_LETTERS = 28

Points = list[tuple[float, float]]


def safe(text: object) -> str:
    """Text for HTML, in attributes too."""
    return html.escape(str(text), quote=True)


def round_step(rough: float) -> float:
    """The next larger number of 1, 2, 5 times a power of ten."""
    scale = 10.0 ** math.floor(math.log10(rough))
    return next(scale * nice for nice in (1, 2, 5, 10) if scale * nice >= rough * 0.999)


class Axes:
    """The map from data to the drawing, with ends at round numbers."""

    def __init__(
        self,
        xs: Sequence[float],
        lowest: float,
        highest: float,
        whole: bool = True,
        ticks: Callable[[float], str] | None = None,
    ) -> None:
        """Axes that hold `xs` and the values from `lowest` to `highest`.

        Below stand numbers of steps where it is `whole`, else what `ticks` says, or two decimals.
        """
        self.ticks = ticks or (lambda x: f"{x:.2f}")
        self.x0 = min(xs)
        self.x1 = max(max(xs), self.x0 + 1) if whole else max(max(xs), self.x0 + 1e-9)
        self.whole = whole
        step = round_step((highest - lowest) / 3 or abs(highest) / 3 or 1.0)
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
        for tick, words in self._ticks():
            x, _ = self.at(tick, self.y0)
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{words}</text>')
        return "".join(parts)

    def _ticks(self) -> list[tuple[float, str]]:
        places = [self.x0 + (self.x1 - self.x0) * column / 4 for column in range(5)]
        if self.whole:
            # A run of few steps has fewer whole numbers than places for them.
            return [(float(step), f"{step:,}") for step in sorted({round(place) for place in places})]
        return [(place, self.ticks(place)) for place in places]


def svg(label: str, inside: str, height: float = HEIGHT) -> str:
    """A drawing with the words that stand for it where it is not seen."""
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{safe(label)}">'
        f"{inside}</svg>"
    )


def downsample(points: Points, most: int = MOST_POINTS) -> Points:
    """At most `most` points: the mean of each stretch."""
    stride = math.ceil(len(points) / most) or 1
    if stride == 1:
        return points
    parts = [points[i : i + stride] for i in range(0, len(points), stride)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


@dataclass(frozen=True)
class Curve:
    """A line over x.

    Attributes:
        name: for the legend, "" for none.
        points: (x, y), x rising.
        errors: half the height of its band at each point; () for none.
        style: "smooth", "second", "third" or "raw".
    """

    name: str
    points: Points
    errors: Sequence[float] = ()
    style: str = "smooth"

    @property
    def low(self) -> float:
        """The lowest that is drawn."""
        return min(y - e for (_, y), e in self._with_errors())

    @property
    def high(self) -> float:
        """The highest that is drawn."""
        return max(y + e for (_, y), e in self._with_errors())

    def _with_errors(self) -> list[tuple[tuple[float, float], float]]:
        return list(zip(self.points, self.errors or [0.0] * len(self.points), strict=True))

    def band(self) -> Points:
        """The outline of its band."""
        above = [(x, y + e) for (x, y), e in self._with_errors()]
        return above + [(x, y - e) for (x, y), e in reversed(self._with_errors())]


@dataclass(frozen=True)
class Mark:
    """A point that matters, and what it is."""

    x: float
    y: float
    words: str


def curves_plot(
    label: str,
    curves: Sequence[Curve],
    mark: Mark | None = None,
    whole: bool = True,
    between: tuple[float, float] | None = None,
    highest: float | None = None,
    ticks: Callable[[float], str] | None = None,
) -> str:
    """Curves with their bands over one axis.

    Args:
        label: what it shows.
        curves: at least one, each of a point or more.
        mark: a point that matters.
        whole: whether x counts steps.
        between: two values of x; what lies between is shaded.
        highest: where the axis ends; what lies above is drawn at the edge.
        ticks: says a value of x below the axis, where x counts no steps.
    """
    xs = [x for curve in curves for x, _ in curve.points]
    low, high = min(curve.low for curve in curves), max(curve.high for curve in curves)
    axes = Axes(xs, low, high if highest is None else max(highest, low + 1e-12), whole and not ticks, ticks)
    parts = [axes.frame()]
    if low < 0 < high:
        _, y = axes.at(axes.x0, 0.0)
        parts.append(f'<line class="zero" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    if between is not None:
        (left, _), (right, _) = axes.at(between[0], axes.y0), axes.at(between[1], axes.y0)
        parts.append(
            f'<rect class="band" x="{left:.1f}" y="{TOP}" width="{max(2.0, right - left):.1f}"'
            f' height="{BOTTOM - TOP}"/>'
        )
    for curve in curves:
        if curve.errors:
            parts.append(f'<polygon class="band {curve.style}" points="{axes.path(curve.band())}"/>')
    for curve in curves:
        inside = [(x, min(y, axes.y1)) for x, y in curve.points]
        parts.append(f'<polyline class="{curve.style}" points="{axes.path(inside)}"/>')
        if curve.errors and len(inside) <= MOST_DOTS:
            parts += [
                f'<circle class="dot {curve.style}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>'
                for x, y in (axes.at(*p) for p in inside)
            ]
    if mark is not None:
        parts.append(_marked(axes, mark))
    return _legend(curves) + svg(label, "".join(parts))


def _marked(axes: Axes, mark: Mark) -> str:
    x, y = axes.at(mark.x, min(mark.y, axes.y1))
    anchor = "end" if x > (LEFT + RIGHT) / 2 else "start"
    return (
        f'<circle class="best" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
        f'<text x="{x:.1f}" y="{max(12.0, y - 12):.1f}" text-anchor="{anchor}">{safe(mark.words)}</text>'
    )


def _legend(curves: Sequence[Curve]) -> str:
    named = [curve for curve in curves if curve.name]
    if not named:
        return ""
    rows = "".join(f'<span class="key {curve.style}">{safe(curve.name)}</span>' for curve in named)
    return f'<p class="keys small">{rows}</p>'


@dataclass(frozen=True)
class Bar:
    """A bar of a bar chart: its name, value, half its error bar, and what is written behind it."""

    name: str
    value: float
    error: float = 0.0
    words: str = ""
    weak: bool = False


def bars_plot(label: str, bars: Sequence[Bar], names: float = 182) -> str:
    """Horizontal bars, one a row, from zero to either side, with error bars.

    Args:
        label: what it shows.
        bars: one or more.
        names: how much of the width the names take.
    """
    row = 24
    low = min(0.0, *(bar.value - bar.error for bar in bars))
    high = max(0.0, *(bar.value + bar.error for bar in bars))
    span = (high - low) or 1.0
    room = WIDTH - names - 96

    def place(value: float) -> float:
        return names + 8 + (value - low) / span * room

    parts = []
    for index, bar in enumerate(bars):
        y = index * row + 4
        left, right = sorted((place(0.0), place(bar.value)))
        parts.append(
            f'<text x="{names}" y="{y + 13}" text-anchor="end">{safe(shortened(bar.name))}</text>'
            f'<rect class="bar{" weak" if bar.weak else ""}" x="{left:.1f}" y="{y + 2}"'
            f' width="{max(1.0, right - left):.1f}" height="14" rx="2"/>'
        )
        if bar.error:
            a, b = place(bar.value - bar.error), place(bar.value + bar.error)
            parts.append(f'<line class="error" x1="{a:.1f}" x2="{b:.1f}" y1="{y + 9}" y2="{y + 9}"/>')
        end = max(right, place(bar.value + bar.error)) + 6
        parts.append(f'<text x="{end:.1f}" y="{y + 13}">{safe(bar.words)}</text>')
    height = len(bars) * row + 6
    zero = place(0.0)
    parts.append(f'<line class="zero" x1="{zero:.1f}" x2="{zero:.1f}" y1="0" y2="{height - 4}"/>')
    return svg(label, "".join(parts), height)


def shortened(text: str, most: int = MOST_LETTERS) -> str:
    """A name that is never longer than its place; its end tells more than its beginning."""
    return text if len(text) <= most else f"\N{HORIZONTAL ELLIPSIS}{text[1 - most :]}"


# Heat maps as inline SVG, and tables: numbers by block and by layer. See `plot.py` for the classes.


def heat_plot(
    label: str,
    rows: Sequence[tuple[str, Sequence[float | None]]],
    columns: Sequence[str],
    shares: Sequence[Sequence[float]],
    words: Sequence[Sequence[str]],
) -> str:
    """A heat map: a row a block, each column on a scale of its own.

    Args:
        label: what it shows.
        rows: a name and its values; None where there is none.
        columns: their names.
        shares: from 0 to 1, how strongly each cell is coloured.
        words: written into each cell.
    """
    names, row, head = 182.0, 24, 22
    side = (WIDTH - names - 8) / max(1, len(columns))
    parts = [
        f'<text x="{names + 8 + (column + 0.5) * side:.1f}" y="14" text-anchor="middle">{safe(name)}</text>'
        for column, name in enumerate(columns)
    ]
    for index, (name, values) in enumerate(rows):
        y = head + index * row
        parts.append(f'<text x="{names}" y="{y + 15}" text-anchor="end">{safe(shortened(name))}</text>')
        for column in range(len(values)):
            x = names + 8 + column * side
            share = min(1.0, max(0.0, shares[index][column]))
            parts.append(
                f'<rect class="cell" x="{x + 1:.1f}" y="{y + 1}" width="{side - 2:.1f}" height="{row - 2}"'
                f' rx="3" fill-opacity="{0.06 + 0.5 * share:.2f}"/><text class="in" x="{x + side / 2:.1f}"'
                f' y="{y + 15}" text-anchor="middle">{safe(words[index][column])}</text>'
            )
    return svg(label, "".join(parts), head + len(rows) * row + 4)


def square_plot(label: str, table: Sequence[Sequence[float]], titles: tuple[str, str]) -> str:
    """A heat map of a table of shares from 0 to 1, ranks below and beside it.

    Args:
        label: what it shows.
        table: rows of equal length.
        titles: of the rows and of the columns.
    """
    count = max(len(table), 1)
    side = min(28.0, 320.0 / count)
    left, top = 60.0, 26.0
    parts = [f'<text x="{left}" y="12">{safe(titles[1])} (across), {safe(titles[0])} (down)</text>']
    for i, row in enumerate(table):
        y = top + i * side
        parts.append(f'<text x="{left - 6}" y="{y + side / 2 + 4:.1f}" text-anchor="end">{i + 1}</text>')
        for j, value in enumerate(row):
            share = min(1.0, max(0.0, value))
            parts.append(
                f'<rect class="cell" x="{left + j * side:.1f}" y="{y:.1f}" width="{side - 1:.1f}"'
                f' height="{side - 1:.1f}" fill-opacity="{0.05 + 0.95 * share:.3f}"/>'
            )
    for j in range(0, count, 1 if count <= 8 else 3):
        x = left + (j + 0.5) * side
        parts.append(
            f'<text x="{x:.1f}" y="{top + count * side + 14:.1f}" text-anchor="middle">{j + 1}</text>'
        )
    return svg(label, "".join(parts), top + count * side + 22)


def table_html(
    headers: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "", numbers: bool = True
) -> str:
    """A table with its first column as row headers; every cell is escaped.

    Args:
        headers: of the columns.
        rows: cells.
        caption: said of it.
        numbers: whether all but the first column are set as numbers.
    """
    kind = ' class="num"' if numbers else ""
    head = "".join(f'<th scope="col">{safe(name)}</th>' for name in headers)
    body = "".join(
        f'<tr><th scope="row">{safe(row[0])}</th>'
        + "".join(f"<td{kind}>{safe(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    said = f"<caption>{safe(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{safe(caption or headers[0])}"><table'
        f' class="numbers">{said}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )
