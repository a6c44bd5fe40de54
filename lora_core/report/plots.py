"""Plots, tables and figures as HTML: the geometry is computed here, the markup is in
`templates/plots.html.j2`.

The window and the report of a run draw with the same functions; they return plain text to be put into a page.
Every text is escaped. What a plot shows is in its label, and a table stands beside it where its values
matter.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

TEMPLATES = Path(__file__).parent / "templates"
WIDTH, HEIGHT = 576, 200
LEFT, RIGHT, TOP, BOTTOM = 52, 556, 20, 172
NAMES = 182
"""The width that the names of bars and rows take."""
MOST_POINTS = 300
MOST_DOTS = 40
"""Measurements are marked one by one where there are no more."""
MOST_LETTERS = 28

Points = list[tuple[float, float]]


@functools.cache
def templates() -> jinja2.Environment:
    """The templates of this folder, with escaping."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


@functools.cache
def _macros() -> Any:
    return templates().get_template("plots.html.j2").module


def paragraph(text: str, small: bool = False) -> str:
    """A sentence."""
    return str(_macros().paragraph(text, small))


def figure(title: str, inside: str, note: str = "") -> str:
    """A plot (HTML) under its heading, with a sentence on how to read it."""
    return str(_macros().figure(title, inside, note))


def figures(parts: Sequence[str]) -> str:
    """Figures (HTML) beside each other."""
    return str(_macros().figures(parts))


def folded(title: str, inside: str) -> str:
    """HTML that is folded at first."""
    return str(_macros().folded(title, inside))


def table_html(
    headers: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "", numbers: bool = True
) -> str:
    """A table with its first column as row headers; `numbers` sets the other columns as numbers."""
    return str(_macros().table(headers, rows, caption, numbers))


def round_step(rough: float) -> float:
    """The next larger number of 1, 2, 5 times a power of ten."""
    scale = 10.0 ** math.floor(math.log10(rough))
    return next(scale * nice for nice in (1, 2, 5, 10) if scale * nice >= rough * 0.999)


def downsample(points: Points, most: int = MOST_POINTS) -> Points:
    """At most `most` points, each the mean of a stretch."""
    stride = math.ceil(len(points) / most) or 1
    if stride == 1:
        return points
    parts = [points[i : i + stride] for i in range(0, len(points), stride)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


class Axes:
    """The map from data to the drawing; y ends at round numbers."""

    def __init__(
        self,
        xs: Sequence[float],
        lowest: float,
        highest: float,
        whole: bool = True,
        ticks: Callable[[float], str] | None = None,
    ) -> None:
        """Axes that contain `xs` and the values from `lowest` to `highest`.

        The x axis is labelled at round numbers, whole ones where it is `whole`; with `ticks` at its quarters.
        """
        self.ticks = ticks
        self.x0 = min(xs)
        self.x1 = max(max(xs), self.x0 + 1) if whole else max(max(xs), self.x0 + 1e-9)
        self.whole = whole
        step = round_step((highest - lowest) / 3 or abs(highest) / 3 or 1.0)
        self.y0 = math.floor(lowest / step + 1e-9) * step
        self.lines = max(2, math.ceil((highest - self.y0) / step - 1e-9)) + 1
        self.y1 = self.y0 + step * (self.lines - 1)
        self.digits = max(0, math.ceil(-math.log10(step) - 1e-9))

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The coordinates of a point of the data, to a tenth."""
        right = LEFT + (x - self.x0) / (self.x1 - self.x0) * (RIGHT - LEFT)
        down = BOTTOM - (y - self.y0) / (self.y1 - self.y0) * (BOTTOM - TOP)
        return round(right, 1), round(down, 1)

    def path(self, points: Points) -> str:
        """Points as an SVG attribute."""
        return " ".join(f"{x},{y}" for x, y in (self.at(*point) for point in points))

    def rows(self) -> list[tuple[float, str]]:
        """The y coordinates of the grid lines, and their labels."""
        values = [self.y0 + (self.y1 - self.y0) * row / (self.lines - 1) for row in range(self.lines)]
        return [(self.at(self.x0, value)[1], f"{value:.{self.digits}f}") for value in values]

    def columns(self) -> list[tuple[float, str]]:
        """The x coordinates of the ticks, and their labels."""
        if self.ticks is not None:
            ticks = [self.x0 + (self.x1 - self.x0) * column / 4 for column in range(5)]
            return [(self.at(tick, self.y0)[0], self.ticks(tick)) for tick in ticks]
        step = round_step((self.x1 - self.x0) / 5)
        if self.whole:
            step = max(1.0, step)
        digits = max(0, math.ceil(-math.log10(step) - 1e-9))
        first, last = math.ceil(self.x0 / step - 1e-9), math.floor(self.x1 / step + 1e-9)
        ticks = [number * step for number in range(first, last + 1)]
        return [(self.at(tick, self.y0)[0], f"{tick:,.{digits}f}") for tick in ticks]


@dataclass(frozen=True)
class Curve:
    """A line over x.

    Attributes:
        name: for the legend, "" for none.
        points: (x, y), x ascending.
        errors: half the height of its band at each point; () for none.
        style: "smooth", "second", "third" or "raw".
    """

    name: str
    points: Points
    errors: Sequence[float] = ()
    style: str = "smooth"

    def edge(self, sign: int) -> Points:
        """The upper (1) or the lower (-1) edge of its band, the line itself without errors."""
        errors = self.errors or [0.0] * len(self.points)
        return [(x, y + sign * error) for (x, y), error in zip(self.points, errors, strict=True)]


@dataclass(frozen=True)
class Mark:
    """A point that is marked, and its label."""

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
        mark: a point to mark.
        whole: whether x counts steps.
        between: two values of x; the range between them is shaded.
        highest: where the y axis ends; points above are drawn at the edge.
        ticks: the label of an x, where x counts no steps.
    """
    low = min(y for curve in curves for _, y in curve.edge(-1))
    high = max(y for curve in curves for _, y in curve.edge(1))
    axes = Axes(
        [x for curve in curves for x, _ in curve.points],
        low,
        high if highest is None else max(highest, low + 1e-12),
        whole and not ticks,
        ticks,
    )
    shaded = None
    if between is not None:
        left, right = (axes.at(x, axes.y0)[0] for x in between)
        shaded = left, max(2.0, round(right - left, 1))
    lines = []
    for curve in curves:
        inside = [(x, min(y, axes.y1)) for x, y in curve.points]
        dots = [axes.at(*p) for p in inside] if curve.errors and len(inside) <= MOST_DOTS else []
        lines.append((curve.style, axes.path(inside), dots))
    marked = None
    if mark is not None:
        x, y = axes.at(mark.x, min(mark.y, axes.y1))
        marked = {"x": x, "y": y, "anchor": "end" if x > (LEFT + RIGHT) / 2 else "start", "text": mark.words}
    plot = {
        "label": label, "width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP,
        "bottom": BOTTOM, "legend": [curve for curve in curves if curve.name], "rows": axes.rows(),
        "columns": axes.columns(), "zero": axes.at(axes.x0, 0.0)[1] if low < 0 < high else None,
        "shaded": shaded, "lines": lines, "mark": marked,
        "bands": [(c.style, axes.path([*c.edge(1), *reversed(c.edge(-1))])) for c in curves if c.errors],
    }  # fmt: skip
    return str(_macros().curves(plot))


@dataclass(frozen=True)
class Bar:
    """A bar of a bar chart: its name, value, half its error bar, and the text behind it."""

    name: str
    value: float
    error: float = 0.0
    words: str = ""
    weak: bool = False


def bars_plot(label: str, bars: Sequence[Bar], names: float = NAMES) -> str:
    """Horizontal bars, one a row, from zero to either side, with error bars.

    Args:
        label: what it shows.
        bars: one or more.
        names: the width of the names.
    """
    low = min(0.0, *(bar.value - bar.error for bar in bars))
    high = max(0.0, *(bar.value + bar.error for bar in bars))

    def at(value: float) -> float:
        return round(names + 8 + (value - low) / ((high - low) or 1.0) * (WIDTH - names - 96), 1)

    rows = []
    for bar in bars:
        left, right = sorted((at(0.0), at(bar.value)))
        error = (at(bar.value - bar.error), at(bar.value + bar.error)) if bar.error else None
        rows.append(
            {
                "name": shorten(bar.name), "left": left, "width": max(1.0, round(right - left, 1)),
                "error": error, "end": round(max(right, at(bar.value + bar.error)) + 6, 1),
                "text": bar.words, "weak": bar.weak,
            }
        )  # fmt: skip
    return str(_macros().bars(label, rows, names, at(0.0), WIDTH))


def shorten(text: str, most: int = MOST_LETTERS) -> str:
    """A name that fits its space; its end says more than its beginning."""
    return text if len(text) <= most else f"\N{HORIZONTAL ELLIPSIS}{text[1 - most :]}"


def _opacity(share: float, least: float, span: float) -> float:
    return round(least + span * min(1.0, max(0.0, share)), 3)


def heat_plot(
    label: str,
    names: Sequence[str],
    columns: Sequence[str],
    shares: Sequence[Sequence[float]],
    words: Sequence[Sequence[str]],
) -> str:
    """A heat map, each column on a scale of its own.

    Args:
        label: what it shows.
        names: of the rows.
        columns: names of the columns.
        shares: for each row, from 0 to 1, how strongly each cell is coloured.
        words: for each row, the text of each cell.
    """
    cells = [
        [(_opacity(share, 0.06, 0.5), text) for share, text in zip(row, texts, strict=True)]
        for row, texts in zip(shares, words, strict=True)
    ]
    return str(_macros().heat(label, [shorten(name) for name in names], columns, cells, NAMES, WIDTH))


def square_plot(label: str, table: Sequence[Sequence[float]], titles: tuple[str, str]) -> str:
    """A heat map of a square table of shares from 0 to 1, with ranks below and beside it.

    Args:
        label: what it shows.
        table: rows of equal length.
        titles: of the rows and of the columns.
    """
    cells = [[_opacity(share, 0.05, 0.95) for share in row] for row in table]
    return str(_macros().square(label, titles, cells, min(28.0, 320.0 / max(len(table), 1)), WIDTH))
