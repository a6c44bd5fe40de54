"""Charts, tables and figures as HTML: values are prepared here, the markup is in `templates/plots.html.j2`.

The window and the report of a run show the same: curves are handed to `assets/charts.js` as JSON, with a
table for screen readers and for pages without scripts; bars and heat maps are tables themselves. Every text
is escaped.
"""

import base64
import functools
import hashlib
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from lora_core.model_files.families import is_text_encoder
from lora_core.runs.events import RateFound, Validated
from lora_core.runs.progress import SURE, Progress, best_of, known_error, smooth, with_gain
from lora_core.system.files import ASSETS

TEMPLATES = Path(__file__).parent / "templates"
SCRIPTS = ("vendor/uPlot.iife.min.js", "charts.js")
"""What draws the charts, in loading order; files in `assets/`."""
MOST_POINTS = 5000
MOST_ROWS = 40
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


def downsample(points: Points, most: int = MOST_POINTS) -> Points:
    """At most `most` points, each the mean of a stretch."""
    stride = math.ceil(len(points) / most) or 1
    if stride == 1:
        return points
    parts = [points[i : i + stride] for i in range(0, len(points), stride)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


@functools.cache
def load_scripts() -> list[str]:
    """The text of `SCRIPTS`."""
    return [(ASSETS / name).read_text(encoding="utf-8").strip() for name in SCRIPTS]


@functools.cache
def content_policy() -> str:
    """The Content-Security-Policy of a report: nothing is fetched, and nothing runs but `SCRIPTS`."""
    digests = [hashlib.sha256(text.encode()).digest() for text in load_scripts()]
    hashes = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {hashes}"


@dataclass(frozen=True)
class Curve:
    """A line over x.

    Attributes:
        name: in the legend and the table.
        points: (x, y), x ascending.
        errors: half the height of its band at each point; () for none.
        style: "smooth", "second", "third" or "raw".
        noisy: drawn faintly, below its moving average.
        hidden: drawn only once its name is clicked.
    """

    name: str
    points: Points
    errors: Sequence[float] = ()
    style: str = "smooth"
    noisy: bool = False
    hidden: bool = False

    def document(self) -> dict[str, Any]:
        """As `assets/charts.js` takes it."""
        return {
            "name": self.name, "style": self.style, "noisy": self.noisy, "hidden": self.hidden,
            "x": [_short(x) for x, _ in self.points], "y": [_short(y) for _, y in self.points],
            "error": [_short(error) for error in self.errors],
        }  # fmt: skip


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


@dataclass(frozen=True)
class Mark:
    """A point that is marked, and its label."""

    x: float
    y: float
    words: str


@dataclass(frozen=True)
class Chart:
    """Curves over one axis.

    Attributes:
        title: of its button, where it shares its place with other charts.
        label: what it shows, in a sentence.
        curves: at least one, each of a point or more; the table has the points of the first.
        mark: a point to mark.
        x: what its x axis counts.
        unit: of y.
        between: two values of x; the range between them is shaded.
        log_x: whether x is drawn on a logarithmic axis.
    """

    title: str
    label: str
    curves: Sequence[Curve]
    mark: Mark | None = None
    x: str = "Step"
    unit: str = ""
    between: tuple[float, float] | None = None
    log_x: bool = False

    def document(self) -> dict[str, Any]:
        """As `assets/charts.js` takes it."""
        return {
            "title": self.title, "label": self.label, "x": self.x, "unit": self.unit, "logX": self.log_x,
            "curves": [curve.document() for curve in self.curves], "between": self.between,
            "mark": self.mark and {"x": self.mark.x, "y": _short(self.mark.y), "text": self.mark.words},
        }  # fmt: skip

    def table(self) -> str:
        """Its values at the points of the first curve, or at some of many."""
        points = self.curves[0].points
        shown = [points[i * (len(points) - 1) // max(1, MOST_ROWS - 1)] for i in range(MOST_ROWS)]
        known = [self._cells(curve) for curve in self.curves]
        xs = [x for x, _ in (points if len(points) <= MOST_ROWS else shown)]
        rows = [(f"{x:,.6g}", *(cells.get(x, "") for cells in known)) for x in xs]
        names = [f"{curve.name}, smoothed" if curve.noisy else curve.name for curve in self.curves]
        return table_html((self.x, *names), rows, self.title)

    def _cells(self, curve: Curve) -> dict[float, str]:
        errors = [f" \N{PLUS-MINUS SIGN} {error:.2g}" for error in curve.errors] or [""] * len(curve.points)
        ys = [y for _, y in curve.points]
        values = zip(curve.points, smooth(ys) if curve.noisy else ys, errors, strict=True)
        return {x: f"{y:.4g}{self.unit}{error}" for (x, _), y, error in values}


def charts_html(charts: Sequence[Chart]) -> str:
    """Charts that share one place, with their tables."""
    return str(_macros().charts([chart.document() for chart in charts], chart_tables(charts)))


def chart_tables(charts: Sequence[Chart]) -> str:
    """The tables of charts."""
    return "".join(chart.table() for chart in charts)


def run_charts(runs: Mapping[str, Progress]) -> list[Chart]:
    """Improvement and loss by step of a run, or of several, each named; what was not measured is left out."""
    alone = len(runs) == 1
    styles = itertools.cycle(("smooth", "second"))
    gains: list[Curve] = []
    losses: list[Curve] = []
    for (name, progress), style in zip(runs.items(), styles, strict=False):
        gains += gain_curves(progress.validations, "" if alone else name, style)
        points = [(float(e.step), e.loss) for e in progress.losses if math.isfinite(e.loss)]
        if len(points) > 1:
            losses.append(Curve("Loss" if alone else name, downsample(points), (), style, noisy=True))
    charts = []
    first = next(iter(runs.values()))
    if gains:
        best = best_of(first.validations)
        share = _percent(first.validations)
        mark = Mark(float(best.step), share * best.gain, f"best, step {best.step:,}") if best else None
        words = f", best {best.gain:+.4f} at step {best.step}" if best else ""
        charts.append(Chart("Improvement", f"Gain over the base{words}", gains, mark, unit="%"))
    if losses:
        last = first.smoothed_loss()
        words = f", now {last:.4f} smoothed" if last is not None else ""
        charts.append(Chart("Loss", f"Training loss{words}", losses))
    return charts


def _percent(validations: Sequence[Validated]) -> float:
    """What turns a difference of losses into percent of the base's loss."""
    base = next((one.base_loss for one in with_gain(validations) if one.base_loss > 0), 1.0)
    return 100 / base


def gain_curves(validations: Sequence[Validated], name: str = "", style: str = "smooth") -> list[Curve]:
    """The gain in percent of the base's loss: on held-out images, with the error of the difference to the
    best step (of the gain itself at the first); with no name also on other images, and of the raw adapter.
    """
    found, scale = with_gain(validations), _percent(validations)
    if not found:
        return []

    def curve(name: str, style: str, values: list[tuple[float, float]], hidden: bool = False) -> list[Curve]:
        rows = zip(found, values, strict=True)
        known = [
            (float(one.step), scale * value, error) for one, (value, error) in rows if math.isfinite(value)
        ]
        # Step 0 is the base, with a gain of 0 by definition.
        points = [(0.0, 0.0), *((x, y) for x, y, _ in known)]
        errors = [0.0, *(SURE * scale * known_error(error) for _, _, error in known)]
        return [Curve(name, points, errors if any(errors) else (), style, hidden=hidden)] if known else []

    paired = [
        e.against_best_error if math.isfinite(e.against_best_error) else e.standard_error for e in found
    ]
    held = list(zip((e.gain for e in found), paired, strict=True))
    if name:
        return curve(name, style, held)
    return [
        *curve("Held out", style, held),
        *curve("Training", "second", [(e.train_gain, math.nan) for e in found]),
        *curve("Held out, raw", "raw", [(e.raw_gain, math.nan) for e in found]),
        *curve("Base's own", "third", [(e.prior, e.prior_error) for e in found], hidden=True),
    ]


@dataclass(frozen=True)
class Bar:
    """A bar of a bar chart: its name, value, half its error bar, and the text behind it."""

    name: str
    value: float
    error: float = 0.0
    words: str = ""
    weak: bool = False


def bars_plot(label: str, bars: Sequence[Bar]) -> str:
    """Horizontal bars, one a row, from zero to either side, with error bars."""
    low = min(0.0, *(bar.value - bar.error for bar in bars))
    span = max(0.0, *(bar.value + bar.error for bar in bars)) - low or 1.0

    def stretch(start: float, end: float) -> tuple[float, float]:
        left, right = sorted((100 * (start - low) / span, 100 * (end - low) / span))
        return round(left, 1), round(right - left, 1)

    rows = [
        {
            "name": shorten(bar.name), "text": bar.words, "weak": bar.weak, "bar": stretch(0.0, bar.value),
            "error": stretch(bar.value - bar.error, bar.value + bar.error) if bar.error else None,
        }
        for bar in bars
    ]  # fmt: skip
    return str(_macros().bars(label, rows, stretch(0.0, 0.0)[0]))


def shorten(text: str, most: int = MOST_LETTERS) -> str:
    """A name that fits its space; its end says more than its beginning."""
    return text if len(text) <= most else f"\N{HORIZONTAL ELLIPSIS}{text[1 - most :]}"


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
    return str(_macros().heat(label, [shorten(name) for name in names], columns, shares, words))


def square_plot(label: str, table: Sequence[Sequence[float]], titles: tuple[str, str]) -> str:
    """A heat map of a square table of shares from 0 to 1, by rank.

    Args:
        table: rows of equal length.
    """
    return str(_macros().square(label, titles, table))


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

    def curve(name: str, tenths: int, style: str) -> Curve:
        values = [100 * column[len(column) * tenths // 10] for column in columns]
        return Curve(name, [(0.0, 0.0), *((float(k), value) for k, value in enumerate(values, 1))], (), style)

    median = curve("median layer", 5, "smooth")
    at, energy = next((k, y) for k, y in median.points if y >= 99 * (1 - 1e-9))
    label = f"Share of energy held by the leading directions; the median layer holds 99% with {at:.0f} of"
    curves = [median, curve("lowest tenth", 1, "raw"), curve("highest tenth", 9, "raw")]
    mark = Mark(at, energy, f"99% by {at:.0f}")
    return charts_html([Chart("Energy held", f"{label} {longest}", curves, mark, "Directions", "%")])


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
    label = "Rank, rank that holds 99% and 90% of the energy, and effective rank of the layers"
    return charts_html([Chart("Ranks", label, curves, x="Layer")])


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
    curve = Curve("share of the gain", points, errors)
    plot = charts_html([Chart("Measured cuts", label, [curve], x="Directions kept", unit="%")])
    note = "Over the directions kept in all layers together; the band is two standard errors."
    return text + figure("Gain that is kept", plot, note)


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
    curves = [Curve("gain", points, errors)]
    plot = charts_html([Chart("Measured strengths", label, curves, mark, "Strength", between=(low, high))])
    note = "Two standard errors around the gain; the shaded strengths are as good as the best within noise."
    title = f"Gain over strength{f', {what}' if what else ''}"
    return figure(title, plot, note)


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
    return text + left_out_html(report["left_out"]) + figure("By block", plot)


def rate_html(found: RateFound) -> str:
    """The learning rate range test, its x axis in powers of ten."""
    points = list(zip(found.rates, found.shares, strict=True))
    share = min(points, key=lambda point: abs(math.log(point[0] / found.rate)))[1]
    label = f"Share of the base's loss taken away by learning rate; {found.rate:.2g} was taken"
    curve = Curve("share of the base's loss taken away", points)
    mark = Mark(found.rate, share, f"taken: {found.rate:.2g}")
    plot = charts_html([Chart("Range test", label, [curve], mark, "Learning rate", log_x=True)])
    note = (
        "A short test before the first step, at rising rates. The chosen rate is twice the one that reaches"
        " half of the best: fast, and well below where training becomes unstable."
    )
    return figure("Learning rate", plot, note)
