"""Charts as the window and the report show them: read as a document, compared with the data."""

import json
import math
from xml.etree import ElementTree

from lora_core.report.plots import (
    MOST_POINTS,
    Bar,
    Chart,
    Curve,
    bars_plot,
    charts_html,
    heat_plot,
    rate_html,
    run_charts,
    square_plot,
    table_html,
)
from lora_core.runs import events
from lora_core.runs.events import Progress, RateFound

HOSTILE = '"><script>alert(1)</script>&'


def parse(html: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<body>{html}</body>")


def texts(body: ElementTree.Element) -> list[str]:
    return [text for text in body.itertext() if text.strip()]


def progress_of(*found: events.Event) -> Progress:
    progress = Progress()
    progress.update(found)
    return progress


def losses(count: int, loss: float = 0.2) -> list[events.StepDone]:
    return [events.StepDone(step=i, loss=loss, lr=1e-4, seconds=0.1) for i in range(1, count + 1)]


def validated(step: int, gain: float, best: bool, **more: float) -> events.Validated:
    numbers = {"standard_error": 0.001, "base_loss": 0.2, "adapted_loss": 0.2 - gain}
    return events.Validated(step=step, gain=gain, best=best, **numbers | more)


def test_the_range_test_marks_the_rate_that_was_taken_on_a_logarithmic_axis() -> None:
    rates = [1e-5 * 2**octave for octave in range(10)]
    found = RateFound(rate=rates[6], rates=rates, shares=[0.04 * n for n in range(10)])
    body = parse(rate_html(found))
    (place,) = [one for one in body.iter("div") if one.get("class") == "chart"]
    (chart,) = json.loads(place.get("data-chart", ""))
    assert chart["logX"]
    assert chart["mark"] == {"x": rates[6], "y": 0.24, "text": "taken: 0.00064"}
    assert (chart["curves"][0]["x"][0], chart["curves"][0]["x"][-1]) == (1e-5, 0.00512)
    rows = [[cell.text for cell in row] for row in body.iter("tr")]
    assert rows[0] == ["Learning rate", "share of the base's loss taken away"]
    assert rows[7] == ["0.00064", "0.24"]


def test_a_long_run_s_chart_and_table_are_small() -> None:
    (chart,) = run_charts({"a": progress_of(*losses(20_000))})
    assert chart.title == "Loss"
    assert 1000 < len(chart.curves[0].points) <= MOST_POINTS
    assert chart.table().count("<tr>") == 41
    assert len(run_charts({"a": progress_of(*losses(2))})) == 1


def test_a_chart_needs_two_finite_losses() -> None:
    assert run_charts({"a": progress_of(*losses(5, math.nan))}) == []
    assert run_charts({"a": Progress()}) == []


def test_improvement_marks_the_newest_that_was_called_best_and_not_the_highest() -> None:
    found = [validated(s, g, s < 30) for s, g in ((10, 0.01), (20, 0.03), (30, 0.0302))]
    (chart,) = run_charts({"a": progress_of(*found)})
    assert chart.mark is not None
    assert (chart.mark[0], chart.mark[2]) == (20.0, "best, step 20")
    assert math.isclose(chart.mark[1], 15.0)
    (held,) = chart.curves
    # The base itself is the first point; gains are in percent of its loss.
    assert [x for x, _ in held.points] == [0.0, 10.0, 20.0, 30.0]
    assert [round(y, 6) for _, y in held.points] == [0.0, 5.0, 15.0, 15.1]
    (chart,) = run_charts({"a": progress_of(validated(10, 0.01, False))})
    assert chart.mark is None


def test_the_band_is_the_paired_error_where_it_is_known() -> None:
    level = validated(20, 0.049, False, against_best=-0.001, against_best_error=0.002)
    (chart,) = run_charts({"a": progress_of(validated(10, 0.05, True), level)})
    assert [round(error, 6) for error in chart.curves[0].errors] == [0.0, 1.0, 2.0]
    assert "24.5% \N{PLUS-MINUS SIGN} 2" in chart.table()


def test_what_else_was_measured_has_curves_of_its_own() -> None:
    more = {"train_gain": 0.03, "prior": -0.0001, "prior_error": 0.001, "raw_gain": 0.02}
    found = progress_of(validated(10, 0.005, True), validated(20, 0.01, True, **more))
    (chart,) = run_charts({"a": found})
    shown = {curve.name: curve.hidden for curve in chart.curves}
    assert shown == {"Held out": False, "Training": False, "Held out, raw": False, "Base's own": True}
    # Beside another run each has one curve, named by the run.
    (chart,) = run_charts({"a": found, "b": progress_of(validated(10, 0.005, True))})
    assert [(curve.name, curve.style) for curve in chart.curves] == [("a", "smooth"), ("b", "second")]


def test_every_text_is_escaped() -> None:
    bars = [Bar(HOSTILE, 1.0, 0.5, HOSTILE), Bar("b", -1.0)]
    pieces = [
        bars_plot(HOSTILE, bars),
        heat_plot(HOSTILE, [HOSTILE], ["b"], [[(0.5, HOSTILE)]]),
        charts_html([Chart(HOSTILE, HOSTILE, [Curve(HOSTILE, [(0.0, 1.0), (1.0, math.inf)])])]),
        square_plot(HOSTILE, [[1.0, 0.5], [0.0, 1.0]], (HOSTILE, "b")),
        table_html((HOSTILE, "b"), [(HOSTILE, 1)], HOSTILE),
    ]
    for piece in pieces:
        body = parse(piece)
        assert not list(body.iter("script"))
        assert HOSTILE in "".join(body.itertext()) or HOSTILE[-20:] in "".join(body.itertext())
