"""HTML pieces: everything that a person or a file supplies is shown as text; charts hold few points."""

import re
from pathlib import Path

import pytest

from app import formatting
from app.dataset import gallery
from app.train import cards
from lora_core.data.scan import Dataset, FileProblem, ImageRecord
from lora_core.runs import events

HOSTILE = '"><img src=x onerror=alert(1)>{{7*7}}${7*7}'


def test_what_is_wrong_is_said_as_text(tmp_path: Path) -> None:
    record = ImageRecord(tmp_path / "a.png", 200, 100, HOSTILE)
    problem = FileProblem(tmp_path / "a.png", "broken", f"{HOSTILE} is damaged.")
    shown = gallery.findings_html(Dataset([record], [problem]), [problem], False, [HOSTILE])
    assert "<img src=x" not in shown
    assert shown.count("&lt;img src=x") == 3


def test_the_crop_is_drawn_in_shares_of_the_picture(tmp_path: Path) -> None:
    cell = gallery.image_facts(ImageRecord(tmp_path / "a.png", 300, 200, ""), tmp_path, 128, 8)
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
    assert len(cards.loss_chart(losses(20_000))) < 12_000
    assert cards.loss_chart(losses(2)).count("<polyline") == 2


def test_a_loss_that_does_not_move_has_numbers_that_can_be_read() -> None:
    still = [events.StepDone(step=i, loss=0.1, lr=1e-4, seconds=0.1) for i in range(1, 9)]
    drawn = cards.loss_chart(still)
    assert max(len(text) for text in re.findall(r">([0-9.]+)</text>", drawn)) <= 4


def test_a_chart_needs_two_finite_losses() -> None:
    lost = [events.StepDone(step=i, loss=float("nan"), lr=1e-4, seconds=0.1) for i in range(5)]
    assert "<svg" not in cards.loss_chart(lost)
    assert "<svg" not in cards.gain_chart([])


def validated(step: int, gain: float, best: bool, **more: float) -> events.Validated:
    numbers = {"standard_error": 0.001, "base_loss": 0.2, "adapted_loss": 0.2 - gain}
    return events.Validated(step=step, gain=gain, best=best, **numbers | more)


def test_gain_marks_the_newest_that_was_called_best_and_not_the_highest() -> None:
    found = [validated(s, g, s < 30) for s, g in ((10, 0.01), (20, 0.03), (30, 0.0302))]
    drawn = cards.gain_chart(found)
    assert "best, step 20" in drawn
    assert "training pictures" not in drawn
    # The base itself is the first point: five lines of the axis lie at 0, 0.01, 0.02, 0.03 and 0.04.
    line = drawn.split('<polyline class="smooth" points="')[1].split('"')[0]
    assert line.split()[0] == "52.0,172.0"
    assert "best, step" not in cards.gain_chart([validated(10, 0.01, False)])


def test_the_gauges_stand_beside_what_they_mean() -> None:
    last = validated(20, 0.01, True, train_gain=0.03, gauge=0.02, gauge_error=0.004, prior=-0.0001)
    drawn = cards.gain_chart([validated(10, 0.005, True), last])
    assert drawn.count("<polyline") == 2
    assert "training pictures" in drawn
    said = cards.describe_gain([validated(10, 0.005, True), last])
    assert "Still gaining. Memorization: 67% of" in said
    assert "Learning by heart +0.0200 ± 0.0040" in said
    assert "The base&#x27;s own pictures \N{MINUS SIGN}0.0001 ± 0.0000" in said
    assert cards.describe_gain([]) == ""
    assert "Learning by heart" not in cards.describe_gain([validated(10, 0.005, True)])


def test_the_raw_adapter_stands_beside_its_average() -> None:
    raw = {"raw_gain": 0.02, "raw_against": 0.01, "raw_against_error": 0.001}
    found = [validated(10, 0.005, True), validated(20, 0.01, True, **raw)]
    assert "raw adapter" in cards.gain_chart(found)
    assert "The raw adapter gains more than its average" in cards.describe_gain(found)


def test_numbers_as_people_read_them() -> None:
    assert formatting.format_clock(252) == "4:12"
    assert formatting.format_clock(3852) == "1:04:12"
    assert formatting.format_clock(None) == formatting.UNKNOWN
    assert formatting.format_duration(840) == "14 min"
    assert formatting.format_bytes(6_400_000) == "6.4 MB"
    assert formatting.format_speed(0.4) == "2.5\N{NO-BREAK SPACE}it/s"
    assert formatting.format_speed(2.0) == "2.0\N{NO-BREAK SPACE}s/it"
    assert formatting.format_scientific(1e-4) == "1.0e-4"
