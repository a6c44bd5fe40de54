"""The range test's curve, as window and report draw it."""

import itertools
import re

from lora_core.report.rank_plots import rate_html
from lora_core.runs.events import RateFound


def test_the_curve_says_what_was_taken_and_where_it_lies() -> None:
    rates = [1e-5 * 2**octave for octave in range(10)]
    page = rate_html(RateFound(rate=rates[6], rates=rates, shares=[0.04 * n for n in range(10)]))
    assert "taken: 0.00064" in page
    ticks = re.findall(r'text-anchor="middle">([^<]+)<', page)
    assert (ticks[0], ticks[-1]) == ("1e-05", "0.005")
    (points,) = re.findall(r'<polyline class="smooth" points="([^"]+)"', page)
    places = [tuple(map(float, point.split(","))) for point in points.split()]
    (mark,) = re.findall(r'<circle class="best" cx="([^"]+)" cy="([^"]+)"', page)
    assert tuple(map(float, mark)) == places[6]
    steps = [right[0] - left[0] for left, right in itertools.pairwise(places)]
    assert max(steps) - min(steps) <= 0.2, "an octave is as wide everywhere"
