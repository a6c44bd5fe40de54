"""Problems before Start: looked up in the background, all at once when Start is pressed."""

import re
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.dataset import findings, gallery
from app.state import AppState, take_snapshot
from app.train import background
from app.train.start import facts, ready_config, start_problems
from lora_core.errors import LoraError
from lora_core.runs.preflight import RunProblem
from tests.app.runs import come_alive, make_run, started, step
from tests.waiting import PATIENCE, wait_for


def test_a_poll_does_not_wait_and_the_next_one_knows(
    app_state: AppState, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    go_on = threading.Event()

    def slow(config: object, *more: object) -> list[RunProblem]:
        asked.append(config)
        assert go_on.wait(PATIENCE)
        return [RunProblem("disk", "Make room, or lower save.keep_last.")]

    monkeypatch.setattr(background, "preflight", slow)
    assert start_problems(take_snapshot(app_state)) == []
    go_on.set()
    assert wait_for(lambda: start_problems(take_snapshot(app_state))) == ["Make room, or lower Keep last."]
    assert 'id="start-why"' in facts(take_snapshot(app_state))
    # Nothing changed: nothing is looked up again.
    assert len(asked) == 1
    app_state.project.update_draft(values={"train.steps": 9})
    # As the live stream does: asked while the look before is just ending, it begins none.
    wait_for(lambda: start_problems(take_snapshot(app_state)) and len(asked) == 2)


def test_start_says_everything_at_once(app_state: AppState, pictures: list[Path]) -> None:
    app_state.project.update_draft(
        values={"model.vae": "/no/vae", "adapter.init": "/no/lora.safetensors", "optimizer.lr": 9.0}
    )
    with pytest.raises(LoraError) as caught:
        ready_config(app_state, "a run")
    said = str(caught.value)
    assert "/no/vae" in said
    assert "/no/lora.safetensors" in said
    assert "Continue from LoRA" in said
    # A rate that is only unusual does not stand in the way: its field and the foot offer a usual one.
    assert "9" not in said
    foot = wait_for(lambda: [h for h in [facts(take_snapshot(app_state))] if "much for AdamW" in h])[0]
    assert re.search(
        r'id="start-watch".*data-field="optimizer.lr" data-group="group-learning"', foot, re.DOTALL
    )
    assert 'data-repair="0.003"' in foot
    assert not any("much" in text for text in _notes(app_state))


def _notes(app_state: AppState) -> list[str]:
    from app.train.start import notes

    return notes(take_snapshot(app_state))


def test_what_masks_and_reg_images_do_stands_beside_start(app_state: AppState, pictures: list[Path]) -> None:
    folder = app_state.project.image_folder
    for name in ("mask/picture-0.png", "picture-1-masklabel.png", "reg/1_field/a.png", "reg/1_field/b.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(pictures[1 if "-1-" in name else 0], folder / name)
    Image.new("RGBA", (160, 160), (0, 90, 160, 90)).save(folder / "clear.png")
    app_state.project.invalidate()
    assert len(app_state.project.dataset().records) == 4
    said = wait_for(lambda: [text for text in _notes(app_state) if "masks" in text])
    assert said == [
        "2 of 6 images have masks: the area outside counts 0.1 (Weight outside masks) beside 1 inside, in"
        " validation too."
    ]
    notes = _notes(app_state)
    assert sum("partly transparent" in text for text in notes) == 1
    (reg,) = [text for text in notes if "regularisation" in text]
    assert reg.endswith("show 2 images for regularisation, which count 1 (Weight of regularisation images).")
    assert start_problems(take_snapshot(app_state)) == []
    app_state.project.save_caption("picture-0.png", "new")
    shown = gallery.summarize(app_state.project.dataset(), [], False, [])
    assert {"2 for regularisation", "2 with a mask"} <= {text for text, _ in shown["chips"]}


def test_a_name_that_is_taken_is_said(app_state: AppState, pictures: list[Path]) -> None:
    make_run(app_state, "taken", started(), step(3))
    assert start_problems(take_snapshot(app_state)) == []
    with pytest.raises(LoraError, match="taken already exists"):
        ready_config(app_state, "taken")
    # It is that press's: the foot, which is about the form, would list it only until it looks again.
    assert start_problems(take_snapshot(app_state)) == []
    assert ready_config(app_state, "free").name == "free"


def test_a_run_in_the_way_stops_start_and_not_the_queue(app_state: AppState, pictures: list[Path]) -> None:
    come_alive(make_run(app_state, "live", started(), step(3)))
    with pytest.raises(LoraError, match="live is training"):
        ready_config(app_state, "")
    assert ready_config(app_state, "next", "queue").name == "next"


def test_a_check_that_breaks_is_a_note(
    app_state: AppState, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*more: object) -> list[RunProblem]:
        raise OSError("the drive is gone")

    monkeypatch.setattr(background, "preflight", broken)
    assert "the drive is gone" in wait_for(lambda: _notes(app_state))[0]
    assert start_problems(take_snapshot(app_state)) == []


@pytest.mark.parametrize("slow", ["Plan", "audit"])
def test_a_look_that_another_project_cuts_off_is_not_at_work_for_ever(
    app_state: AppState, pictures: list[Path], monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    go_on = threading.Event()
    original = getattr(findings, slow)

    def wait(*args: Any) -> Any:
        if threading.current_thread().name == "check":
            go_on.wait(PATIENCE)
        return original(*args)

    monkeypatch.setattr(findings, slow, wait)
    first = app_state.project.path.name
    app_state.checker.start()
    assert app_state.checker.state()["state"] == "working"
    app_state.projects.new("another")
    go_on.set()
    wait_for(lambda: app_state.checker.state()["state"] == "idle")
    app_state.projects.open(first)
    app_state.checker.start()
    wait_for(lambda: app_state.checker.state()["state"] == "done")
    # One that is over between two looks of the stream is told of too.
    told = app_state.checker.progress()
    app_state.project.save_caption(pictures[0].name, "another caption")
    app_state.checker.start()
    wait_for(lambda: app_state.checker.state()["fresh"] and app_state.checker.state()["state"] == "done")
    assert app_state.checker.progress() != told
