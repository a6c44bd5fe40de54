"""The range test's curve: what was learned at which learning rate, and the rate that was taken."""

import math

from lora_core.spec.events import RateFound
from lora_core.spec.plot import Curve, Mark, curves_plot
from lora_core.spec.rank_plots import figure


def rate_html(found: RateFound) -> str:
    """The curve, its x axis in powers of ten."""
    points = [(math.log10(rate), share) for rate, share in zip(found.rates, found.shares, strict=True)]
    place = math.log10(found.rate)
    share = min(points, key=lambda point: abs(point[0] - place))[1]
    label = f"Share of the base's loss taken away by learning rate; {found.rate:.2g} was taken"
    curve = Curve("share of the base's loss taken away", points)
    mark = Mark(place, share, f"taken: {found.rate:.2g}")
    plot = curves_plot(label, [curve], mark, ticks=lambda x: f"{10**x:.1g}")
    note = (
        "A short training before the first step, at rates that rise. Taken is twice the rate at which half of"
        " the best is reached: high enough to be quick, and well below where it gets rough."
    )
    return figure("Learning rate", plot, note)
