"""Charts, tables and figures as HTML: values are prepared here, the markup is in `templates/plots.html.j2`.

The window and the report of a run show the same: curves are handed to `assets/charts.js` as JSON, with a
table for screen readers and for pages without scripts; bars and heat maps are tables themselves. Every text
is escaped.
"""

import base64
import functools
import hashlib
import html
import itertools
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from lora_core.model_files.families import is_text_encoder
from lora_core.runs import events
from lora_core.system.files import ASSETS

TEMPLATES = Path(__file__).parent / "templates"
SCRIPTS = ("vendor/uPlot.iife.min.js", "charts.js")
"""What draws the charts, in loading order; files in `assets/`."""
MOST_POINTS = 5000
MOST_ROWS = 40
MOST_LETTERS = 28

Points = Sequence[tuple[float, float]]


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


def with_own_scripts(page: str) -> str:
    """A report, which another version may have made, with this version's policy and scripts."""
    policy, (text, end, _) = html.escape(content_policy()), page.rpartition("</footer>")
    text = re.sub('(?<="Content-Security-Policy" content=")[^"]*', lambda _: policy, text, count=1)
    scripts = "".join(f"<script>{script}</script>" for script in load_scripts())
    return f"{text}{end}{scripts}" if end else page


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

    def cells(self, unit: str) -> dict[float, str]:
        """Its values in words by x, smoothed if it is noisy."""
        xs, ys = zip(*self.points, strict=True)
        errors = [f" \N{PLUS-MINUS SIGN} {error:.2g}" for error in self.errors] or [""] * len(xs)
        values = zip(xs, events.smooth(list(ys)) if self.noisy else ys, errors, strict=True)
        return {x: f"{y:.4g}{unit}{error}" for x, y, error in values}


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


@dataclass(frozen=True)
class Chart:
    """Curves over one axis.

    Attributes:
        title: of its button, where it shares its place with other charts.
        label: its description, a sentence.
        curves: at least one, each of a point or more; the table has the points of the first.
        mark: a point to mark: x, y and its label.
        x: what its x axis counts.
        unit: of y.
        between: two values of x; the range between them is shaded.
        log_x: whether x is drawn on a logarithmic axis.
    """

    title: str
    label: str
    curves: Sequence[Curve]
    mark: tuple[float, float, str] | None = None
    x: str = "Step"
    unit: str = ""
    between: tuple[float, float] | None = None
    log_x: bool = False

    def document(self) -> dict[str, Any]:
        """As `assets/charts.js` takes it."""
        return {
            "title": self.title, "label": self.label, "x": self.x, "unit": self.unit, "logX": self.log_x,
            "curves": [curve.document() for curve in self.curves], "between": self.between,
            "mark": self.mark and {"x": self.mark[0], "y": _short(self.mark[1]), "text": self.mark[2]},
        }  # fmt: skip

    def table(self) -> str:
        """Its values at the points of the first curve, or at some of many."""
        xs = [x for x, _ in self.curves[0].points]
        if len(xs) > MOST_ROWS:
            xs = [xs[i * (len(xs) - 1) // (MOST_ROWS - 1)] for i in range(MOST_ROWS)]
        known = [curve.cells(self.unit) for curve in self.curves]
        rows = [(f"{x:,.6g}", *(cells.get(x, "") for cells in known)) for x in xs]
        names = [f"{curve.name}, smoothed" if curve.noisy else curve.name for curve in self.curves]
        return table_html((self.x, *names), rows, self.title)


def charts_html(charts: Sequence[Chart]) -> str:
    """Charts that share one place, with their tables."""
    return str(_macros().charts([chart.document() for chart in charts], chart_tables(charts)))


def chart_tables(charts: Sequence[Chart]) -> str:
    """The tables of charts."""
    return "".join(chart.table() for chart in charts)


def run_charts(runs: Mapping[str, events.Progress]) -> list[Chart]:
    """Improvement and loss by step of a run, or of several, each named, without missing measurements."""
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
        best = events.best_of(first.validations)
        share = _percent(first.validations)
        mark = (float(best.step), share * best.gain, f"best, step {best.step:,}") if best else None
        words = f", best {best.gain:+.4f} at step {best.step}" if best else ""
        charts.append(Chart("Improvement", f"Gain over the base{words}", gains, mark, unit="%"))
    if losses:
        last = first.smoothed_loss()
        words = f", now {last:.4f} smoothed" if last is not None else ""
        charts.append(Chart("Loss", f"Training loss{words}", losses))
    return charts


def _percent(validations: Sequence[events.Validated]) -> float:
    """What turns a difference of losses into percent of the base's loss."""
    base = next((one.base_loss for one in events.with_gain(validations) if one.base_loss > 0), 1.0)
    return 100 / base


def gain_curves(
    validations: Sequence[events.Validated], name: str = "", style: str = "smooth"
) -> list[Curve]:
    """The gain in percent of the base's loss: on held-out images, with the error of the difference to the
    best step (of the gain itself at the first); with no name also on other images, and of the raw adapter.
    """
    found, scale = events.with_gain(validations), _percent(validations)

    def curve(
        name: str, style: str, key: str, error: Callable[[events.Validated], float] = lambda one: 0.0,
        hidden: bool = False,
    ) -> list[Curve]:  # fmt: skip
        known = [one for one in found if math.isfinite(getattr(one, key))]
        # Step 0 is the base, with a gain of 0 by definition.
        points = [(0.0, 0.0), *((float(one.step), scale * getattr(one, key)) for one in known)]
        errors = [0.0, *(events.SURE * scale * events.known_error(error(one)) for one in known)]
        return [Curve(name, points, errors if any(errors) else (), style, hidden=hidden)] if known else []

    def paired(one: events.Validated) -> float:
        return one.against_best_error if math.isfinite(one.against_best_error) else one.standard_error

    measured = "Wanted change" if found and found[-1].on == events.WANTED_CHANGE else "Held out"
    held = curve(name or measured, style, "gain", paired)
    if name:
        return held
    return [
        *held,
        *curve("Training", "second", "train_gain"),
        *curve(f"{measured}, raw", "raw", "raw_gain"),
        *curve("Base's own", "third", "prior", lambda one: one.prior_error, hidden=True),
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
    label: str, names: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[tuple[float, str]]]
) -> str:
    """A heat map of (value, text), a row for each name; each column has a colour scale of its own."""
    most = [max(value for value, _ in column) or 1 for column in zip(*values, strict=True)]
    shares = [[value / top for (value, _), top in zip(row, most, strict=True)] for row in values]
    words = [[text for _, text in row] for row in values]
    return str(_macros().heat(label, list(map(shorten, names)), columns, shares, words))


def square_plot(label: str, table: Sequence[Sequence[float]], titles: tuple[str, str]) -> str:
    """A heat map of a square table of shares from 0 to 1, by rank.

    Args:
        table: rows of equal length.
    """
    return str(_macros().square(label, titles, table))


# The analyses of an adapter, from the documents of the command line's `--json`: the window draws them without
# torch, and the report of a run has the same figures.

MOST_BLOCKS = 40
Row = Mapping[str, Any]


def left_out_html(rows: Sequence[Row]) -> str:
    """How many layers were left out, by reason."""
    if not rows:
        return ""
    reasons = Counter(str(row["reason"]) for row in rows)
    words = [f"{n} {'layer' if n == 1 else 'layers'}: {reason}" for reason, n in reasons.items()]
    return paragraph(f"Left out: {'; '.join(words)}.", small=True)


def spectrum_html(spectrum: Row) -> str:
    """Energy by rank, the ranks of the layers, energy by block, and the tables.

    Args:
        spectrum: of `tools.svd.file_spectrum`.
    """
    layers: list[Row] = spectrum["layers"]
    left_out = left_out_html(spectrum["left_out"])
    if not layers:
        return paragraph("No layer of this file can be decomposed.") + left_out
    blocks: list[Row] = spectrum["blocks"]
    ranks = sorted({row["rank"] for row in layers})
    text = (
        f"{len(layers):,} {'layer' if len(layers) == 1 else 'layers'} of rank"
        f" {' to '.join(f'{rank:g}' for rank in dict.fromkeys((ranks[0], ranks[-1])))}: half of them hold 99%"
        f" of their energy in {statistics.median(row['rank99'] for row in layers):g} or fewer directions; the"
        f" effective rank is {statistics.fmean(row['effective_rank'] for row in layers):.1f} on average."
    )
    held = "Of the median layer, by its leading directions; four of five layers are between the thin lines."
    plots = [
        figure("Energy held, in percent", _held(layers), held),
        figure("Ranks of all layers", _sorted_ranks(layers), "Each curve is sorted, largest first."),
        figure("Where the change is", _energy_by_block(blocks), "Share of the squared norm."),
    ]
    by_block = [
        (block_name(row), row["layers"], f"{row['norm']:.3g}", f"{row['effective_rank']:.1f}",
         f"{row['rank99']:.1f}")
        for row in blocks
    ]  # fmt: skip
    by_layer = [
        (f"{row['part']}.{row['module']}", row["rank"], f"{row['norm']:.3g}", f"{row['effective_rank']:.1f}",
         f"{row['stable_rank']:.1f}", row["rank90"], row["rank99"])
        for row in layers
    ]  # fmt: skip
    heads = ("Layer", "Rank", "Norm", "Effective rank", "Stable rank", "Rank of 90%", "Rank of 99%")
    tables = [
        ("Table by block", table_html(("Block", "Layers", *heads[2:4], heads[6]), by_block, "By block")),
        ("Table of all layers", table_html(heads, by_layer, "By layer")),
    ]
    return paragraph(text) + left_out + figures(plots) + "".join(folded(*table) for table in tables)


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
    curves = []
    lines = (("median layer", 5, "smooth"), ("lowest tenth", 1, "raw"), ("highest tenth", 9, "raw"))
    for name, tenths, style in lines:
        energies = [100 * column[len(column) * tenths // 10] for column in columns]
        curves.append(Curve(name, list(enumerate([0.0, *energies])), (), style))
    at, energy = next((k, y) for k, y in curves[0].points if y >= 99 * (1 - 1e-9))
    label = f"Share of energy held by the leading directions; the median layer holds 99% with {at} of"
    mark = (at, energy, f"99% by {at}")
    return charts_html([Chart("Energy held", f"{label} {longest}", curves, mark, "Directions", "%")])


def _sorted_ranks(layers: Sequence[Row]) -> str:
    if len(layers) == 1:
        return paragraph(f"rank99 {layers[0]['rank99']}, rank90 {layers[0]['rank90']}")
    kinds = (
        ("rank", "rank", "raw"), ("99% of energy", "rank99", "smooth"), ("90% of energy", "rank90", "third"),
        ("effective rank", "effective_rank", "second"),
    )  # fmt: skip
    curves = [
        Curve(name, list(enumerate(sorted((float(row[key]) for row in layers), reverse=True), 1)), (), style)
        for name, key, style in kinds
    ]
    label = "Rank, rank that holds 99% and 90% of the energy, and effective rank of the layers"
    return charts_html([Chart("Ranks", label, curves, x="Layer")])


def block_name(row: Row) -> str:
    """A block's name, with its part for a text encoder."""
    return f"{row['part']} {row['block']}" if is_text_encoder(row["part"]) else str(row["block"])


def _energy_by_block(blocks: Sequence[Row]) -> str:
    total = sum(row["norm"] ** 2 for row in blocks) or 1.0
    shares = [(block_name(row), row["norm"] ** 2 / total) for row in blocks]
    largest = sorted(shares, key=lambda one: -one[1])
    if len(shares) > MOST_BLOCKS:
        kept = largest[: MOST_BLOCKS - 1]
        shares = [one for one in shares if one in kept]
        shares.append(("all others", 1.0 - sum(share for _, share in kept)))
    bars = [Bar(name, 100 * share, 0.0, f"{share:.1%}") for name, share in shares]
    return bars_plot(f"Share of the change by block; the largest is {largest[0][0]}", bars)


def intrinsic_html(found: Row) -> str:
    """The measurements of the intrinsic rank, and their result.

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
        what: its part, "" for the full adapter.
    """
    points = [(float(row["strength"]), float(row["gain"])) for row in found["curve"]]
    errors = [2 * float(row["standard_error"]) for row in found["curve"]]
    best, low, high = (float(found[key]) for key in ("strength", "low", "high"))
    label = f"Gain over strength; highest at {best:.2f}, as good within noise from {low:.2f} to {high:.2f}"
    mark, curve = (best, float(found["gain"]), f"best, {best:.2f}"), Curve("gain", points, errors)
    plot = charts_html([Chart("Measured strengths", label, [curve], mark, "Strength", between=(low, high))])
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
    values = [
        [(row["amplification"] or 0.0,
          "-" if row["amplification"] is None else f"{row['amplification']:.2f}"),
         (row["norm"], f"{row['norm']:.3g}"),
         (row["intruders"] / max(1, row["layers"]), f"{row['intruders']} in {row['layers']}")]
        for row in blocks
    ]  # fmt: skip
    columns = ("Amplification", "Norm", "Intruders")
    names = [block_name(row) for row in blocks]
    plot = heat_plot("Amplification, norm and intruders by block", names, columns, values)
    return text + left_out_html(report["left_out"]) + figure("By block", plot)


def rate_html(found: events.RateFound) -> str:
    """The learning rate range test, its x axis in powers of ten."""
    points = list(zip(found.rates, found.shares, strict=True))
    share = min(points, key=lambda point: abs(math.log(point[0] / found.rate)))[1]
    label = f"Share of the base's loss taken away by learning rate; {found.rate:.2g} was taken"
    curve = Curve("share of the base's loss taken away", points)
    mark = (found.rate, share, f"taken: {found.rate:.2g}")
    plot = charts_html([Chart("Range test", label, [curve], mark, "Learning rate", log_x=True)])
    note = (
        "A short test before the first step, at rising rates. The chosen rate is twice the one that reaches"
        " half of the best: fast, and well below where training becomes unstable."
    )
    return figure("Learning rate", plot, note)
