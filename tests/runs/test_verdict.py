"""The verdict on a run's validations; each number is set by hand to one side of its error bar."""

import math
from typing import Any

import pytest

from lora_core.runs.events import Validated
from lora_core.runs.verdict import best_of, verdict


def at(step: int, gain: float, best: bool = False, **more: Any) -> Validated:
    return Validated(
        **{"step": step, "gain": gain, "standard_error": 0.001, "base_loss": 0.2, "adapted_loss": 0.2 - gain}
        | {"best": best}
        | more
    )


FIRST = at(100, 0.010, True)
LATER = at(200, 0.014, True, against_best=0.004, against_best_error=0.001)


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ([], ""),
        ([at(100, math.nan)], ""),
        ([at(100, 0.0015, True)], "No significant gain up to step 100."),
        ([at(1100, -0.004, True)], "At step 1,100 it predicts held-out pictures worse than the base does."),
        ([FIRST], "It gains on held-out pictures: +0.0100."),
        ([FIRST, LATER], "Still gaining."),
        # Within its error of the best, though higher: the best one stays.
        (
            [FIRST, at(200, 0.0103, against_best=0.0003, against_best_error=0.001)],
            "No further gain since step 100.",
        ),
        (
            [FIRST, LATER, at(300, 0.012, against_best=-0.0019, against_best_error=0.001)],
            "No further gain since step 200.",
        ),
        (
            [FIRST, LATER, at(300, 0.011, against_best=-0.0021, against_best_error=0.001)],
            "It has become worse since step 200; the file of that step is better.",
        ),
        ([FIRST, at(200, 0.009, against_best=math.nan)], "No further gain since step 100."),
    ],
)
def test_gain(events: list[Validated], said: str) -> None:
    assert verdict(events) == said


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"train_gain": 0.02, "gauge": 0.006, "gauge_error": 0.004}, ""),  # 1.5 errors
        ({"train_gain": 0.05, "gauge": 0.010, "gauge_error": 0.001}, ""),  # a fifth of the gain
        (
            {"train_gain": 0.02, "gauge": 0.012, "gauge_error": 0.004},
            "Memorization: 60% of its gain on training pictures does not carry over to others.",
        ),
        (
            {"train_gain": 0.02, "gauge": 0.03, "gauge_error": 0.004},
            "Memorization: its gain on training pictures does not carry over to others at all.",
        ),
        ({"prior": -0.001, "prior_error": 0.0006}, ""),
        (
            {"prior": -0.001, "prior_error": 0.0004},
            "Forgetting: it gets slightly worse on the base's own pictures.",
        ),
        (
            {"prior": -0.007, "prior_error": 0.001},
            "Forgetting: it loses 50% as much on the base's own pictures as it gains on new ones.",
        ),
        (
            {"prior": -0.02, "prior_error": 0.001},
            "Forgetting: it loses more on the base's own pictures than it gains on new ones.",
        ),
        ({"prior": 0.01, "prior_error": 0.001}, ""),
    ],
)
def test_memorization_and_forgetting(numbers: dict[str, float], said: str) -> None:
    last = at(200, 0.014, True, against_best=0.004, against_best_error=0.001, **numbers)
    assert verdict([FIRST, last]) == f"Still gaining. {said}".strip()


def test_the_newest_that_was_called_best_is_the_best() -> None:
    # The gains alone would name step 300, whose difference is within its error.
    third = at(300, 0.0143, against_best=0.0003, against_best_error=0.001)
    assert best_of([FIRST, LATER, third]) is LATER
    assert best_of([at(100, 0.01)]) is None


@pytest.mark.parametrize(
    ("against", "said"),
    [
        (-0.002, "The averaged adapter gains more than the raw one, by 0.0020 (standard error 0.0005)"),
        (0.002, "The raw adapter gains more than its average, by 0.0020 (standard error 0.0005)"),
        (0.0005, "gain the same within the error"),
    ],
)
def test_the_average_beside_the_raw_adapter(against: float, said: str) -> None:
    last = at(100, 0.01, True, raw_gain=0.01 + against, raw_against=against, raw_against_error=0.0005)
    assert said in verdict([last])
    assert "raw" not in verdict([at(100, 0.01, True)])
