"""Plots as the window and the report show them: read as a document, compared with the data."""

import itertools
from xml.etree import ElementTree

from lora_core.report.plots import Bar, bars_plot, rate_html, square_plot, table_html
from lora_core.runs.events import RateFound

HOSTILE = '"><script>alert(1)</script>&'


def parse(html: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<body>{html}</body>")


def texts(body: ElementTree.Element) -> list[str]:
    return [text for text in body.itertext() if text.strip()]


def test_the_range_test_marks_the_rate_that_was_taken_on_a_logarithmic_axis() -> None:
    rates = [1e-5 * 2**octave for octave in range(10)]
    found = RateFound(rate=rates[6], rates=rates, shares=[0.04 * n for n in range(10)])
    body = parse(rate_html(found))
    assert "taken: 0.00064" in texts(body)
    ticks = [one.text for one in body.iter("text") if one.get("text-anchor") == "middle"]
    assert (ticks[0], ticks[-1]) == ("1e-05", "0.005")
    (curve,) = [line for line in body.iter("polyline") if line.get("class") == "smooth"]
    points = [tuple(map(float, point.split(","))) for point in curve.get("points", "").split()]
    (mark,) = [circle for circle in body.iter("circle") if circle.get("class") == "best"]
    assert (float(mark.get("cx", "")), float(mark.get("cy", ""))) == points[6]
    widths = [right[0] - left[0] for left, right in itertools.pairwise(points)]
    assert max(widths) - min(widths) <= 0.25, "an octave is as wide everywhere"


def test_every_text_is_escaped() -> None:
    bars = [Bar(HOSTILE, 1.0, 0.5, HOSTILE), Bar("b", -1.0)]
    pieces = [
        bars_plot(HOSTILE, bars),
        square_plot(HOSTILE, [[1.0, 0.5], [0.0, 1.0]], (HOSTILE, "b")),
        table_html((HOSTILE, "b"), [(HOSTILE, 1)], HOSTILE),
    ]
    for piece in pieces:
        body = parse(piece)
        assert not list(body.iter("script"))
        assert HOSTILE in "".join(body.itertext()) or HOSTILE[-20:] in "".join(body.itertext())
