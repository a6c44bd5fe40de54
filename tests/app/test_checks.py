"""Problems before Start: looked up in the background, all at once when Start is pressed."""

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.bindings import Parts
from app.dataset import checking, gallery
from app.snapshot import moment_of
from app.state import Desk
from app.train import checks
from app.train.facts import facts, unfit
from app.train.starting import ready_config
from lora_core.errors import LoraError
from lora_core.runs.preflight import RunProblem
from tests.app.runs import come_alive, make_run, started, step
from tests.waiting import PATIENCE, wait_for


def test_a_poll_does_not_wait_and_the_next_one_knows(
    desk: Desk, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    go_on = threading.Event()

    def slow(config: object, *more: object) -> list[RunProblem]:
        asked.append(config)
        assert go_on.wait(PATIENCE)
        return [RunProblem("disk", "Make room, or lower save.keep_last.")]

    monkeypatch.setattr(checks, "preflight", slow)
    assert unfit(moment_of(desk)) == []
    go_on.set()
    assert wait_for(lambda: unfit(moment_of(desk))) == ["Make room, or lower Keep last."]
    assert 'id="start-why"' in facts(moment_of(desk))
    # Nothing changed: nothing is looked up again.
    assert len(asked) == 1
    desk.project.keep(values={"train.steps": 9})
    unfit(moment_of(desk))
    wait_for(lambda: len(asked) == 2)


def test_start_says_everything_at_once(desk: Desk, pictures: list[Path]) -> None:
    desk.project.keep(
        values={"model.vae": "/no/vae", "adapter.init": "/no/lora.safetensors", "optim.lr": 9.0}
    )
    with pytest.raises(LoraError) as caught:
        ready_config(Parts(desk), "a run")
    said = str(caught.value)
    assert "/no/vae" in said
    assert "/no/lora.safetensors" in said
    assert "Start from" in said
    # A rate that is only unusual does not stand in the way; it is a note.
    assert "9" not in said
    assert "much for AdamW" in wait_for(lambda: [t for t in _notes(desk) if "much" in t])[0]


def _notes(desk: Desk) -> list[str]:
    from app.train.facts import notes

    return notes(moment_of(desk))


def test_what_is_not_used_stands_beside_start(desk: Desk, pictures: list[Path]) -> None:
    folder = desk.project.pictures
    for name in ("mask/picture-0.png", "picture-1-masklabel.png", "reg/1_field/a.png", "reg/1_field/b.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(pictures[0], folder / name)
    Image.new("RGBA", (160, 160), (0, 90, 160, 90)).save(folder / "clear.png")
    desk.project.forget()
    assert len(desk.project.dataset().records) == 4
    said = wait_for(lambda: [text for text in _notes(desk) if "masks are not used yet" in text])
    assert said == [
        "2 masks are not used yet: pictures are trained on whole, whatever a mask leaves out"
        " (picture-0.png, picture-1-masklabel.png)."
    ]
    assert sum("regularisation" in text or "white background" in text for text in _notes(desk)) == 2
    assert unfit(moment_of(desk)) == []
    desk.project.save_caption("picture-0.png", "new")
    shown = gallery.findings(desk.project.dataset(), [], False, [])
    assert "4 files not used" in shown
    assert "2 masks are not used yet" in shown


def test_a_name_that_is_taken_is_said(desk: Desk, pictures: list[Path]) -> None:
    make_run(desk, "taken", started(), step(3))
    with pytest.raises(LoraError, match="taken exists already"):
        ready_config(Parts(desk), "taken")
    assert ready_config(Parts(desk), "free").name == "free"


def test_a_run_in_the_way_stops_start_and_not_the_queue(desk: Desk, pictures: list[Path]) -> None:
    come_alive(make_run(desk, "live", started(), step(3)))
    with pytest.raises(LoraError, match="live is going on"):
        ready_config(Parts(desk), "")
    assert ready_config(Parts(desk), "next", "queue").name == "next"


def test_a_check_that_breaks_is_a_note(
    desk: Desk, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*more: object) -> list[RunProblem]:
        raise OSError("the drive is gone")

    monkeypatch.setattr(checks, "preflight", broken)
    assert "the drive is gone" in wait_for(lambda: _notes(desk))[0]
    assert unfit(moment_of(desk)) == []


def test_a_look_that_another_project_cuts_off_is_not_at_work_for_ever(
    desk: Desk, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    whole = checking.audit

    def slow(dataset: Any, training: Any, said: Any, looks: Any) -> Any:
        go_on.wait(PATIENCE)
        return whole(dataset, training, said, looks)

    monkeypatch.setattr(checking, "audit", slow)
    first = desk.project.path.name
    desk.checker.start()
    assert desk.checker.state()["state"] == "working"
    desk.projects.new("another")
    go_on.set()
    wait_for(lambda: desk.checker.state()["state"] == "idle")
    desk.projects.open(first)
    desk.checker.start()
    wait_for(lambda: desk.checker.state()["state"] == "done")
