import math

import pytest
import torch

from lora_core.evaluate.validator import is_better, is_worse, paired_difference, reason_to_stop
from lora_core.runs.events import Validated


def validated(step: int, best: bool, against: float = math.nan, error: float = math.nan) -> Validated:
    return Validated(
        step=step, gain=0.1, standard_error=0.05, base_loss=0.3, adapted_loss=0.2, best=best,
        against_best=against, against_best_error=error,
    )  # fmt: skip


def test_the_error_of_a_difference_is_that_of_the_pairs():
    # Each look lost 1, 2 and 3 less, whatever it lost before: by hand, mean 2 and sqrt(1 / 3).
    before = torch.tensor([[10.0, 10.0], [500.0, 500.0], [3.0, 3.0]])
    now = before - torch.tensor([[1.0], [2.0], [3.0]])
    assert paired_difference(before, now) == pytest.approx((2.0, (1 / 3) ** 0.5))


def test_two_pictures_that_agree_by_chance_do_not_make_it_certain():
    before, now = torch.zeros(2, 4), torch.tensor([[1.0, -1.0, 3.0, -3.0]] * 2)
    # By hand: the means are equal, but eight looks have a deviation of sqrt(40 / 7).
    assert paired_difference(before, now) == pytest.approx((0.0, (40 / 7) ** 0.5 / 8**0.5))


def test_no_difference_where_the_looks_are_others():
    assert all(map(math.isnan, paired_difference(None, torch.zeros(2, 2))))
    assert all(map(math.isnan, paired_difference(torch.zeros(3, 2), torch.zeros(2, 2))))
    assert not is_better(math.nan, math.nan)
    assert not is_worse(math.nan, math.nan)


@pytest.mark.parametrize(
    ("gained", "error", "verdict"),
    [(0.2, 0.1, (True, False)), (0.05, 0.1, (False, False)), (-0.2, 0.1, (False, True))],
)
def test_better_and_worse_ask_for_more_than_the_error(gained, error, verdict):
    assert (is_better(gained, error), is_worse(gained, error)) == verdict


def test_a_run_ends_when_it_clearly_falls():
    seen = [validated(100, True), validated(200, False, -0.05, 0.02)]
    assert reason_to_stop(seen, 2) == ""
    seen.append(validated(300, False, -0.05, 0.02))
    assert "after step 100: 2 validations were no better" in reason_to_stop(seen, 2)
    assert "0.0500 below it (standard error 0.0200)" in reason_to_stop(seen, 2)
    assert reason_to_stop(seen, 3) == ""
    assert reason_to_stop(seen, 0) == ""


def test_a_run_that_only_stands_still_gets_twice_as_long():
    seen = [validated(100, True)]
    for step in (200, 300, 400):
        seen.append(validated(step, False, -0.01, 0.02))
        assert reason_to_stop(seen, 2) == ""
    seen.append(validated(500, False, 0.01, 0.02))
    assert "differs from it by +0.0100" in reason_to_stop(seen, 2)


def test_a_new_best_starts_the_count_anew():
    seen = [validated(100, True), validated(200, False, -0.1, 0.01), validated(300, True, 0.1, 0.01)]
    seen.append(validated(400, False, -0.1, 0.01))
    assert reason_to_stop(seen, 2) == ""
