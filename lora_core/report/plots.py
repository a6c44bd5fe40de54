"""Plots, tables and figures as HTML: the geometry is computed here, the markup is in
`templates/plots.html.j2`.

The window and the report of a run draw with the same functions; they return plain text to be put into a page.
Every text is escaped. What a plot shows is in its label, and a table stands beside it where its values
matter.
"""

import functools
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from lora_core.model_files.families import is_text_encoder
from lora_core.runs.events import RateFound

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
        table: rows of equal length.
    """
    cells = [[_opacity(share, 0.05, 0.95) for share in row] for row in table]
    return str(_macros().square(label, titles, cells, min(28.0, 320.0 / max(len(table), 1)), WIDTH))


# The analyses of an adapter as HTML: the spectrum, the intrinsic rank, the best strength, amplification.
#
# They are drawn from plain data, the documents of the command line's `--json`, so that the window draws
# them without torch and the report of a run has the same figures.


MOST_BLOCKS = 40
Row = Mapping[str, Any]


def left_out_html(rows: Sequence[Row]) -> str:
    """How many layers were left out, by reason."""
    if not rows:
        return ""
    reasons = Counter(str(row["reason"]) for row in rows)
    words = [f"{n} {'layer' if n == 1 else 'layers'}: {reason}" for reason, n in reasons.items()]
    return paragraph(f"Left out: {'; '.join(words)}.", small=True)


def span_of(values: Sequence[float]) -> str:
    """One number, or the two ends."""
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def spectrum_sentence(spectrum: Row) -> str:
    """The spectrum in words."""
    layers: list[Row] = spectrum["layers"]
    if not layers:
        return "No layer of this file can be decomposed."
    needs = statistics.median(row["rank99"] for row in layers)
    effective = statistics.fmean(row["effective_rank"] for row in layers)
    plural = "layer" if len(layers) == 1 else "layers"
    return (
        f"{len(layers):,} {plural} of rank {span_of([row['rank'] for row in layers])}: half of them hold 99%"
        f" of their energy in {needs:g} or fewer directions; the effective rank is {effective:.1f} on"
        " average."
    )


def spectrum_html(spectrum: Row) -> str:
    """Energy by rank, the ranks of the layers, energy by block, and the tables.

    Args:
        spectrum: of `tools.svd.file_spectrum`.
    """
    layers: list[Row] = spectrum["layers"]
    text = paragraph(spectrum_sentence(spectrum)) + left_out_html(spectrum["left_out"])
    if not layers:
        return text
    held = "Of the median layer, by its leading directions; four of five layers lie between the thin lines."
    plots = [
        figure("Energy held, in percent", _held(layers), held),
        figure(
            "Ranks of all layers", _sorted_ranks(layers), "Each curve is sorted on its own, largest first."
        ),
        figure("Where the change is", _energy_by_block(spectrum["blocks"]), "Share of the squared norm."),
    ]
    tables = [
        folded("Table by block", _block_table(spectrum["blocks"])),
        folded("Table of all layers", _layer_table(layers)),
    ]
    return text + figures(plots) + "".join(tables)


def _held(layers: Sequence[Row]) -> str:
    """Cumulative energy over the number of directions."""
    longest = max(len(row["singular_values"]) for row in layers)
    shares = []
    for row in layers:
        sums = list(itertools.accumulate(value**2 for value in row["singular_values"]))
        if sums and sums[-1] > 0:
            shares.append([value / sums[-1] for value in sums] + [1.0] * (longest - len(sums)))
    if not shares:
        return paragraph("All layers are zero.")
    columns = [sorted(column) for column in zip(*shares, strict=True)]

    def curve(tenths: int, style: str) -> Curve:
        values = [100 * column[len(column) * tenths // 10] for column in columns]
        return Curve("", [(0.0, 0.0), *((float(k), value) for k, value in enumerate(values, 1))], (), style)

    median = curve(5, "smooth")
    at, energy = next((k, y) for k, y in median.points if y >= 99 * (1 - 1e-9))
    label = "Share of energy held by the leading directions; the median layer holds 99% with"
    curves = [curve(1, "raw"), curve(9, "raw"), median]
    return curves_plot(f"{label} {at:.0f} of {longest}", curves, Mark(at, energy, f"99% by {at:.0f}"))


def _sorted_ranks(layers: Sequence[Row]) -> str:
    curves = []
    for name, key, style in (
        ("rank", "rank", "raw"),
        ("99% of energy", "rank99", "smooth"),
        ("90% of energy", "rank90", "third"),
        ("effective rank", "effective_rank", "second"),
    ):
        values = sorted((float(row[key]) for row in layers), reverse=True)
        curves.append(Curve(name, [(float(i), value) for i, value in enumerate(values, 1)], (), style))
    if len(layers) == 1:
        return paragraph(f"rank99 {layers[0]['rank99']}, rank90 {layers[0]['rank90']}")
    return curves_plot("Rank, rank that holds 99% and 90% of the energy, and effective rank of the layers", [
        Curve("", [(0.0, 0.0)], (), "raw"), *curves,
    ])  # fmt: skip


def block_name(row: Row) -> str:
    """A block's name, with its part for a text encoder."""
    return f"{row['part']} {row['block']}" if is_text_encoder(row["part"]) else str(row["block"])


def _energy_by_block(blocks: Sequence[Row]) -> str:
    total = sum(row["norm"] ** 2 for row in blocks) or 1.0
    shown = blocks
    rest = 0.0
    if len(blocks) > MOST_BLOCKS:
        kept = sorted(blocks, key=lambda row: -row["norm"])[: MOST_BLOCKS - 1]
        shown = [row for row in blocks if row in kept]
        rest = sum(row["norm"] ** 2 for row in blocks if row not in kept) / total
    bars = [_share_bar(block_name(row), row["norm"] ** 2 / total) for row in shown]
    if rest:
        bars.append(_share_bar("all others", rest))
    best = max(blocks, key=lambda row: row["norm"])
    return bars_plot(f"Share of the change by block; the largest is {block_name(best)}", bars)


def _share_bar(name: str, share: float) -> Bar:
    return Bar(name, 100 * share, 0.0, f"{share:.1%}")


def _block_table(blocks: Sequence[Row]) -> str:
    rows = [
        (block_name(row), row["layers"], f"{row['norm']:.3g}", f"{row['effective_rank']:.1f}",
         f"{row['rank99']:.1f}")
        for row in blocks
    ]  # fmt: skip
    return table_html(("Block", "Layers", "Norm", "Effective rank", "Rank of 99%"), rows, "By block")


def _layer_table(layers: Sequence[Row]) -> str:
    rows = [
        (f"{row['part']}.{row['module']}", row["rank"], f"{row['norm']:.3g}", f"{row['effective_rank']:.1f}",
         f"{row['stable_rank']:.1f}", row["rank90"], row["rank99"])
        for row in layers
    ]  # fmt: skip
    heads = ("Layer", "Rank", "Norm", "Effective rank", "Stable rank", "Rank of 90%", "Rank of 99%")
    return table_html(heads, rows, "By layer")


def intrinsic_html(found: Row) -> str:
    """The measurements of the intrinsic rank, and what they say.

    Args:
        found: the document of `shrink --intrinsic --json`, with `sentences`.
    """
    text = "".join(paragraph(sentence) for sentence in found.get("sentences", []))
    tried = sorted(found.get("tried", []), key=lambda row: row["columns"])
    if len(tried) < 2:
        return text
    points = [(float(row["columns"]), 100 * float(row["kept"])) for row in tried]
    errors = [200 * float(row["standard_error"]) for row in tried]
    label = "Share of the gain that is kept, over how many directions are kept in all layers together"
    plot = curves_plot(label, [Curve("", points, errors)])
    rows = [(f"{row['columns']:,}", f"{row['kept']:.1%}", f"{row['standard_error']:.1%}") for row in tried]
    table = table_html(("Directions kept", "Share of the gain", "Standard error"), rows, "Measured cuts")
    note = "In percent, over the directions kept in all layers together; the band is two standard errors."
    return text + figure("Gain that is kept", plot, note) + folded("As a table", table)


def strength_html(found: Row, what: str = "") -> str:
    """The curve of gain over strength, the best and the interval.

    Args:
        found: the document of `strength --json`.
        what: the part that it is of, "" for the whole adapter.
    """
    curve: Sequence[Row] = found["curve"]
    points = [(float(row["strength"]), float(row["gain"])) for row in curve]
    errors = [2 * float(row["standard_error"]) for row in curve]
    best, low, high = (float(found[key]) for key in ("strength", "low", "high"))
    label = f"Gain over strength; highest at {best:.2f}, as good within noise from {low:.2f} to {high:.2f}"
    mark = Mark(best, float(found["gain"]), f"best, {best:.2f}")
    plot = curves_plot(label, [Curve("", points, errors)], mark, whole=False, between=(low, high))
    rows = [
        (f"{row['strength']:.2f}", f"{row['gain']:+.4f}", f"{row['standard_error']:.4f}") for row in curve
    ]
    table = table_html(("Strength", "Gain", "Standard error"), rows, "Measured strengths")
    note = "Two standard errors around the gain; the shaded strengths are as good as the best within noise."
    title = f"Gain over strength{f', {what}' if what else ''}"
    return figure(title, plot, note) + folded("As a table", table)


def amplified_html(report: Row) -> str:
    """The heat map of amplification by block.

    Args:
        report: of `tools.analysis.file_amplification`.
    """
    blocks: Sequence[Row] = report["blocks"]
    overall = report["amplification"]
    factor = "beyond measure" if overall is None else f"{overall:.1f}"
    count = report["intruders"]
    text = paragraph(
        f"Where it acts it is {factor} times as strong as the base is there"
        f"{' in all' if overall is not None else ''}; {count:,} intruder"
        f" {'dimension' if count == 1 else 'dimensions'}: new leading directions that the base does not"
        " have; many of them are a sign of forgetting."
    )
    factors = [row["amplification"] or 0.0 for row in blocks]
    norms = [row["norm"] for row in blocks]
    counts = [row["intruders"] / max(1, row["layers"]) for row in blocks]
    shares = [
        [f / (max(factors) or 1), n / (max(norms) or 1), c / (max(counts) or 1)]
        for f, n, c in zip(factors, norms, counts, strict=True)
    ]
    words = [
        ["-" if row["amplification"] is None else f"{row['amplification']:.2f}", f"{row['norm']:.3g}",
         f"{row['intruders']} in {row['layers']}"]
        for row in blocks
    ]  # fmt: skip
    names = [block_name(row) for row in blocks]
    columns = ("Amplification", "Norm", "Intruders")
    plot = heat_plot("Amplification, norm and intruders by block", names, columns, shares, words)
    table = table_html(
        ("Block", *columns),
        [(name, *cells) for name, cells in zip(names, words, strict=True)],
        "By block",
    )
    return text + left_out_html(report["left_out"]) + figure("By block", plot) + folded("As a table", table)


def rate_html(found: RateFound) -> str:
    """The learning rate range test, its x axis in powers of ten."""
    points = [(math.log10(rate), share) for rate, share in zip(found.rates, found.shares, strict=True)]
    place = math.log10(found.rate)
    share = min(points, key=lambda point: abs(point[0] - place))[1]
    label = f"Share of the base's loss taken away by learning rate; {found.rate:.2g} was taken"
    curve = Curve("share of the base's loss taken away", points)
    mark = Mark(place, share, f"taken: {found.rate:.2g}")
    plot = curves_plot(label, [curve], mark, ticks=lambda x: f"{10**x:.1g}")
    note = (
        "A short test before the first step, at rising rates. The chosen rate is twice the one that reaches"
        " half of the best: fast, and well below where training becomes unstable."
    )
    return figure("Learning rate", plot, note)
