"""HTML pieces: everything that a person or a file supplies is shown as text; charts hold few points."""

from pathlib import Path

import pytest

from app import words
from app.dataset import gallery
from app.train import charts
from lora_core.dataset.folder import Dataset, ImageRecord, Problem
from lora_core.spec import events

HOSTILE = '"><img src=x onerror=alert(1)>{{7*7}}${7*7}'


def test_what_is_wrong_is_said_as_text(tmp_path: Path) -> None:
    record = ImageRecord(tmp_path / "a.png", 200, 100, HOSTILE)
    problem = Problem(tmp_path / "a.png", "broken", f"{HOSTILE} is damaged.")
    shown = gallery.findings(Dataset([record], [problem]), [problem], False, [HOSTILE])
    assert "<img src=x" not in shown
    assert shown.count("&lt;img src=x") == 3


def test_the_crop_is_drawn_in_shares_of_the_picture(tmp_path: Path) -> None:
    cell = gallery.cell(ImageRecord(tmp_path / "a.png", 300, 200, ""), tmp_path, 128, 8)
    left, top, right, bottom = cell["crop"]
    assert left == pytest.approx(right, abs=0.02)
    assert top == pytest.approx(bottom, abs=0.02)
    assert min(left, top) == 0
    wide, high = (300 * (1 - (left + right) / 100)), (200 * (1 - (top + bottom) / 100))
    assert wide / high == pytest.approx(cell["bucket"][0] / cell["bucket"][1], rel=0.01)


def losses(count: int) -> list[events.StepDone]:
    return [
        events.StepDone(step=i, loss=0.2 + (i % 7) / 50, lr=1e-4, seconds=0.1) for i in range(1, count + 1)
    ]


def test_a_long_run_s_chart_is_as_small_as_a_short_one_s() -> None:
    assert len(charts.loss_chart(losses(20_000))) < 12_000
    assert charts.loss_chart(losses(2)).startswith("<svg")


def test_a_chart_needs_two_finite_losses() -> None:
    lost = [events.StepDone(step=i, loss=float("nan"), lr=1e-4, seconds=0.1) for i in range(5)]
    assert "<svg" not in charts.loss_chart(lost)
    assert "<svg" not in charts.gain_chart([])


def test_gain_marks_the_best() -> None:
    found = [
        events.Validated(step=s, gain=g, standard_error=0.001, base_loss=0.2, adapted_loss=0.2 - g, best=True)
        for s, g in ((10, 0.01), (20, 0.03), (30, 0.02))
    ]
    assert "best, step 20" in charts.gain_chart(found)


def test_numbers_as_people_read_them() -> None:
    assert words.clock(252) == "4:12"
    assert words.clock(3852) == "1:04:12"
    assert words.clock(None) == words.UNKNOWN
    assert words.about(840) == "14 min"
    assert words.file_size(6_400_000) == "6.4 MB"
    assert words.pace(0.4) == "2.5 it/s"
    assert words.pace(2.0) == "2.0 s/it"
    assert words.scientific(1e-4) == "1.0e-4"
