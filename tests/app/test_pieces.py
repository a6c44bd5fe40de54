"""HTML pieces: everything that a person or a file supplies is shown as text."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app import templates
from app.dataset import gallery
from app.jobs import RunView
from app.state import ShownRun
from app.templates import render
from app.train import run_cards as cards
from lora_core.data.images import Dataset, FileProblem, ImageRecord
from lora_core.runs import events
from lora_core.runs.folder import RunFolder
from lora_core.settings.config import RunConfig

HOSTILE = '"><img src=x onerror=alert(1)>{{7*7}}${7*7}'


def test_what_is_wrong_is_said_as_text(tmp_path: Path) -> None:
    record = ImageRecord(tmp_path / "a.png", 200, 100, HOSTILE)
    problem = FileProblem(tmp_path / "a.png", "broken", f"{HOSTILE} is damaged.")
    values = gallery.summarize(Dataset([record], [problem]), [problem], False, [HOSTILE])
    marks = dict.fromkeys(("mark", "meter", "project", "trigger"), HOSTILE)
    shown = render("dataset/status.html", **values, **marks)
    assert "<img src=x" not in shown
    assert shown.count("&lt;img src=x") == 3 + len(marks)


def test_the_crop_is_drawn_in_shares_of_the_picture(tmp_path: Path) -> None:
    cell = gallery.image_facts(ImageRecord(tmp_path / "a.png", 300, 200, ""), tmp_path, (128,), 8)
    left, top, right, bottom = cell["crop"]
    assert left == pytest.approx(right, abs=0.02)
    assert top == pytest.approx(bottom, abs=0.02)
    assert min(left, top) == 0
    wide, high = (300 * (1 - (left + right) / 100)), (200 * (1 - (top + bottom) / 100))
    assert wide / high == pytest.approx(cell["buckets"][0][0] / cell["buckets"][0][1], rel=0.01)


def verdicts(found: list[events.Validated]) -> list[dict[str, Any]]:
    view = RunView(RunFolder(Path("a")))
    view.progress.update(found)
    return cards.verdicts(ShownRun(view, "done"))


def test_what_a_live_run_measures_later_has_its_place(tmp_path: Path) -> None:
    config = RunConfig().changed({"validation.every": 20, "sample.every": 40, "train.steps": 400})
    view = RunView(RunFolder.create(tmp_path / "a", config))
    live = ShownRun(view, "preparing")
    found = cards.verdicts(live)
    assert [(one["name"], one["grade"], one["act"]) for one in found] == [
        ("Improvement", 0, None), ("Overfitting", 0, None), ("Drift from the base", 0, None),
    ]  # fmt: skip
    assert {one["why"] for one in found} == {"First measured at step 20."}
    rendered = render("train/verdicts.html", verdicts=found)
    assert "<button" not in rendered
    assert cards.verdicts(ShownRun(view, "stopped")) == []
    unmeasured = RunView(RunFolder.create(tmp_path / "b", config.changed({"validation.every": 0})))
    assert cards.verdicts(ShownRun(unmeasured, "running")) == []

    snapshot: Any = SimpleNamespace(shown=live, app_state=SimpleNamespace(workspace=tmp_path))
    card = cards.samples_card(snapshot)
    # Seven columns of two prompts, though eleven rounds will come; fewer to come where some have.
    assert card.count('class="ghost"') == 2 * cards.MOST_GHOSTS
    rounds = [events.PreviewDone(step=step, files=["a.png"], prompts=["a"]) for step in (0, 40, 80)]
    view.progress.update(rounds)
    assert cards.samples_card(snapshot).count('class="ghost"') == cards.MOST_GHOSTS - len(rounds)
    ended: Any = SimpleNamespace(shown=ShownRun(view, "done"), app_state=snapshot.app_state)
    assert 'class="ghost"' not in cards.samples_card(ended)


def validated(step: int, gain: float, best: bool, **more: float) -> events.Validated:
    numbers = {"standard_error": 0.001, "base_loss": 0.2, "adapted_loss": 0.2 - gain}
    return events.Validated(step=step, gain=gain, best=best, **numbers | more)


def test_the_gauges_stand_beside_what_they_mean() -> None:
    last = validated(20, 0.01, True, train_gain=0.03, gauge=0.02, gauge_error=0.004, prior=-0.0001)
    gain, overfitting, drift = verdicts([validated(10, 0.005, True), last])
    assert (gain["grade"], gain["word"], gain["why"]) == (1, "5%", "Best so far: step 20.")
    assert (overfitting["grade"], overfitting["word"]) == (2, "Medium")
    assert overfitting["why"].startswith("Memorization: 67% of")
    assert overfitting["figures"] == "Gap +0.0200 ± 0.0040"
    assert (drift["grade"], drift["word"]) == (1, "Normal")
    assert drift["figures"].endswith("own images \N{MINUS SIGN}0.0001 ± 0.0000")
    assert verdicts([]) == []
    assert [one["name"] for one in verdicts([validated(10, 0.005, True)])] == ["Improvement"]


def test_verdicts_are_graded_and_a_clear_loss_has_its_paired_error() -> None:
    best = validated(10, 0.05, True)
    level = validated(20, 0.049, False, against_best=-0.001, against_best_error=0.002)
    worse = validated(
        30, 0.04, False, against_best=-0.01, against_best_error=0.003, prior=-0.2, prior_error=0.01
    )
    assert verdicts([best, level])[0]["why"] == "Best so far: step 10. No certain difference since."
    gain, drift = verdicts([best, level, worse])
    assert gain["grade"] == 2
    assert gain["why"] == "Best so far: step 10. It is better than step 30 by 0.0100 ± 0.0030."
    # The best of ten is the luckiest too.
    lucky = validated(100, 0.04, False, against_best=-0.0075, against_best_error=0.003)
    assert verdicts([best, lucky])[0]["grade"] == 2
    assert verdicts([best, *[level] * 8, lucky])[0]["why"].endswith("No certain difference since.")
    assert (drift["grade"], drift["word"]) == (2, "High")
    assert "lower the strength" in drift["why"]
    assert drift["act"]["text"] == "Try lower strengths"
    assert verdicts([validated(10, -0.05, False)])[0]["grade"] == 3


def test_the_raw_adapter_stands_beside_its_average() -> None:
    raw = {"raw_gain": 0.02, "raw_against": 0.01, "raw_against_error": 0.001}
    found = [validated(10, 0.005, True), validated(20, 0.01, True, **raw)]
    assert "The raw adapter gains more than its average" in verdicts(found)[-1]["why"]


def test_numbers_as_people_read_them() -> None:
    assert templates.format_clock(252) == "4:12"
    assert templates.format_clock(3852) == "1:04:12"
    assert templates.format_clock(None) == templates.UNKNOWN
    assert templates.format_duration(840) == "14 min"
    assert templates.format_bytes(6_400_000) == "6.4 MB"
    assert templates.format_speed(0.4) == "2.5\N{NO-BREAK SPACE}it/s"
    assert templates.format_speed(2.0) == "2.0\N{NO-BREAK SPACE}s/it"
    assert templates.format_scientific(1e-4) == "1.0e-4"
