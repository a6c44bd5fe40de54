"""The short form of `tests/slow/kill_many.py`: ten kills, two in each phase."""

import os
import sys

import pytest

from tests.faults import Nursery
from tests.slow.kill_many import PHASES, killed_many
from tests.train.runs import Toy


@pytest.mark.skipif(sys.platform == "win32", reason="a nursery forks")
def test_ten_kills_cost_no_bit(own_toy: Toy, nursery: Nursery) -> None:
    report = killed_many(own_toy, nursery, 2, int.from_bytes(os.urandom(4)))
    assert report.inside == dict.fromkeys(PHASES, 2)


@pytest.mark.slow
def test_a_hundred_kills_cost_no_bit(own_toy: Toy, nursery: Nursery) -> None:
    report = killed_many(own_toy, nursery, 20, 0)
    assert report.inside == dict.fromkeys(PHASES, 20), report.table()
