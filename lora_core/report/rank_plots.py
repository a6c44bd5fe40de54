"""The analyses of an adapter as HTML: the spectrum, the intrinsic rank, the best strength, amplification.

They are drawn from plain data, the documents of the command line's `--json`, so that the window draws them
without torch and the report of a run has the same figures.
"""

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lora_core.model_files.families import is_text_encoder
from lora_core.report.plots import (
    Bar,
    Curve,
    Mark,
    bars_plot,
    curves_plot,
    figure,
    figures,
    folded,
    heat_plot,
    paragraph,
    table_html,
)
from lora_core.runs.events import RateFound

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
        report: of `tools.amplification.file_amplification`.
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
