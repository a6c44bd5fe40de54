"""What was measured while a run went on, as plots: loss, gain, noise levels, pictures."""

import math
from collections.abc import Callable, Sequence

from lora_core.report.story import Story
from lora_core.spec.events import Validated
from lora_core.spec.heat import table_html
from lora_core.spec.plot import Bar, Curve, Mark, bars_plot, curves_plot, safe, thinned
from lora_core.spec.progress import smoothed
from lora_core.spec.rank_plots import figure, folded, paragraph
from lora_core.spec.verdict import SURE, best_of, error_of, measured

MOST_PICTURES = 40


def loss_html(story: Story) -> str:
    """Training loss, raw and smoothed."""
    points = [(float(e.step), e.loss) for e in story.progress.losses if math.isfinite(e.loss)]
    if len(points) < 2:
        return paragraph("There is no curve of so few steps.")
    calm = thinned([(x, y) for (x, _), y in zip(points, smoothed([y for _, y in points]), strict=True)])
    raw = thinned(points)
    ys = sorted(y for _, y in raw)
    # A single wild step must not flatten the rest of the curve.
    top = max(ys[int(0.98 * (len(ys) - 1))], max(y for _, y in calm))
    curves = [Curve("each step", raw, (), "raw"), Curve("smoothed", calm)]
    plot = curves_plot(f"Training loss, at the end {calm[-1][1]:.4f} smoothed", curves, highest=top)
    note = "It says little by itself: noise and timesteps are drawn at random. The gain tells more."
    return figure("Training loss", plot, note)


def gain_html(story: Story) -> str:
    """Gain on held-out pictures with its error, on training pictures, and on what should stay."""
    found = measured(story.progress.validations)
    if not found:
        return paragraph("No picture was held out, so that no gain was measured.")
    best = best_of(story.progress.validations)
    curves = [
        _curve("held-out pictures", found, "smooth", lambda e: (e.gain, e.standard_error)),
        _curve("training pictures", found, "second", lambda e: (e.train_gain, math.nan)),
        _curve("the base's own pictures", found, "third", lambda e: (e.prior, e.prior_error)),
    ]
    shown = [curve for curve in curves if curve.points]
    mark = Mark(float(best.step), best.gain, f"best, step {best.step:,}") if best else None
    words = f", best {best.gain:+.4f} at step {best.step}" if best else ""
    start = Curve("", [(0.0, 0.0)], (), "raw")
    plot = curves_plot(f"Gain over the base{words}", [start, *shown], mark)
    note = (
        "The base's loss less the adapter's, on the same pictures, noise and timesteps; the bands are two"
        " standard errors. Above 0 is better than the base."
    )
    return figure("Gain", plot, note) + _gauge(found) + folded("As a table", _gain_table(found))


def _curve(
    name: str, found: Sequence[Validated], style: str, value: Callable[[Validated], tuple[float, float]]
) -> Curve:
    rows = [(float(e.step), *value(e)) for e in found]
    rows = [row for row in rows if math.isfinite(row[1])]
    errors = [SURE * error if math.isfinite(error) else 0.0 for _, _, error in rows]
    return Curve(name, [(x, y) for x, y, _ in rows], errors if any(errors) else (), style)


def _gauge(found: Sequence[Validated]) -> str:
    last = next((e for e in reversed(found) if math.isfinite(e.gauge)), None)
    if last is None:
        return ""
    return paragraph(
        f"Memorisation gauge at step {last.step:,}: training pictures gain {last.gauge:+.4f} (standard error"
        f" {error_of(last.gauge_error):.4f}) more than held-out ones."
    )


def _gain_table(found: Sequence[Validated]) -> str:
    gains = [(e.gain, e.train_gain, e.gauge, e.prior, e.raw_gain) for e in found]
    heads = ("Step", "Held out", "Training", "Gauge", "Base's own", "Held out, raw")
    width = len(heads) if any(math.isfinite(e.raw_gain) for e in found) else len(heads) - 1
    rows = [(f"{e.step:,}", *map(_signed, own))[:width] for e, own in zip(found, gains, strict=True)]
    return table_html(heads[:width], rows, "Gain by step")


def _signed(value: float) -> str:
    return f"{value:+.4f}" if math.isfinite(value) else "-"


def bands_html(story: Story) -> str:
    """The gain of the best step by noise level."""
    best = best_of(story.progress.validations)
    rows = best.bands if best is not None else []
    if not rows:
        return ""
    bars = [
        Bar(
            f"timesteps {row['from']:.0f} to {row['to'] - 1:.0f}", row["gain"],
            SURE * row.get("standard_error", 0.0), f"{row['gain']:+.4f}", row["gain"] < 0,
        )
        for row in rows
    ]  # fmt: skip
    assert best is not None
    note = (
        "Low timesteps are little noise, where detail is decided; high ones are much, where composition is."
    )
    plot = bars_plot(f"Gain by noise level at step {best.step}", bars)
    return figure("By noise level", plot, note)


def pictures_html(story: Story) -> str:
    """The gain of each picture; pictures are numbers here, as the page may be passed on."""
    rows = story.pictures
    if not rows:
        return ""
    half = MOST_PICTURES // 2
    shown = rows if len(rows) <= MOST_PICTURES else [*rows[:half], *rows[-half:]]
    places = {id(row): place for place, row in enumerate(rows, 1)}
    bars = [
        Bar(
            f"{'held out' if row.get('held_out') else 'trained on'}, {places[id(row)]}", row["gain"],
            SURE * row["standard_error"], f"{row['gain']:+.3f}", not row.get("held_out"),
        )
        for row in shown
    ]  # fmt: skip
    less = len(rows) - len(shown)
    more = f" {less} between them are left out." if less else ""
    note = f"Numbered by gain; names and pictures stay with their owner.{safe(more)}"
    return figure("Gain of each picture", bars_plot("Gain of each picture, the highest first", bars), note)
