"""What the base says of pictures, as the window keeps it: asked, found, stale, refused, cancelled."""

import base64
import html
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from app.dataset import findings
from app.state import AppState
from lora_core.system.files import LARGEST_JSON
from tests.app.runs import come_alive, make_run, started, step
from tests.data.test_learned import subject
from tests.waiting import wait_for

FAKE = """
import json, sys, threading, queue
say = lambda **line: print(json.dumps(line), flush=True)
asks, dropped = queue.Queue(), set()
def read():
    for line in sys.stdin:
        asked = json.loads(line)
        dropped.add(asked["target"]) if asked["do"] == "cancel" else asks.put(asked)
    asks.put(None)
threading.Thread(target=read, daemon=True).start()
say(event="ready")
while (asked := asks.get()) is not None:
    name = asked["id"]
    if "slow" in (asked.get("trigger"), asked.get("model")):
        say(id=name, event="progress", done=1, total=9)
        while name not in dropped:
            threading.Event().wait(0.01)
    if name in dropped:
        say(id=name, event="error", message="Cancelled.")
    elif asked["do"] == "triggers" and asked["trigger"] == "bad":
        say(id=name, event="error", message="It is broken.")
    elif asked["do"] == "caption":
        say(id=name, event="done", found={"texts": {one: asked["prompt"] + one for one in asked["pictures"]}})
    elif asked["do"] == "mask":
        say(id=name, event="done", found={"texts": {one: asked["prompt"] for one in asked["pictures"]}})
    else:
        rows = [{"picture": asked["dataset"] + "/picture-0.png", "asked": asked,
                 "better": {"picture": asked["dataset"] + "/picture-1.png"}, "suspect": True,
                 "sentence": "<img src=x> fits better.", "caption": "", "fits": 0.1, "fits_error": 0.01,
                 "helped": 0.1, "helped_error": 0.01}]
        say(id=name, event="done", found={"rows": rows})
"""


@pytest.fixture
def app_state(tmp_path: Path):
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    workspace = tmp_path / "work space é"
    workspace.mkdir()
    made = AppState(workspace, worker_command=[sys.executable, str(script)])
    yield made
    made.worker.close()


def ask(client: TestClient, what: str, do: str = "begin") -> dict[str, Any]:
    return client.post("/easel/insights", json={"do": do, "what": what}).json()


def settled(client: TestClient, what: str) -> dict[str, Any]:
    def look() -> dict[str, Any]:
        state = client.get("/easel/insights").json()[what]
        return state if state["state"] != "working" else {}

    return wait_for(look)


def working(client: TestClient, what: str) -> None:
    wait_for(lambda: client.get("/easel/insights").json()[what].get("done") == 1)


def test_nothing_can_be_asked_without_pictures(client: TestClient) -> None:
    for what in ("captions", "triggers", "pictures"):
        state = client.get("/easel/insights").json()[what]
        assert state == {"state": "idle", "why": "There are no images yet; add some."}
        assert ask(client, what) == {"problem": "There are no images yet; add some."}
    assert "cannot be measured" in ask(client, "everything")["problem"]


def test_what_was_found_is_named_kept_and_goes_stale(
    client: TestClient, app_state: AppState, pictures: list[Path]
) -> None:
    ask(client, "captions")
    state = settled(client, "captions")
    assert (state["state"], state["fresh"]) == ("done", True)
    shown = client.get("/easel/insights").json()["html"]["captions"]["found"]
    assert "likely wrong" in shown
    assert "<img src=x" not in shown
    assert 'data-open-picture="picture-1.png"' in shown
    (row,) = state["found"]["rows"]
    assert (row["picture"], row["better"]["picture"]) == ("picture-0.png", "picture-1.png")
    assert row["asked"]["base"] == "demo"
    assert row["asked"]["dataset"] == str(app_state.project.image_folder)
    again = AppState(app_state.workspace, worker_command=["no-such-program"])
    assert again.insights.state()["captions"] == state
    app_state.project.save_caption("picture-0.png", "something else")
    assert client.get("/easel/insights").json()["captions"]["fresh"] is False


def test_large_findings_are_kept_and_none_that_cannot_be_read_is_replaced(
    client: TestClient, app_state: AppState, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = app_state.project.path / findings.KEPT_IN
    file.write_text(json.dumps({"caption": {"mark": "", "found": {"texts": {"a": "x" * LARGEST_JSON}}}}))
    ask(client, "captions")
    assert settled(client, "captions")["state"] == "done"
    assert set(json.loads(file.read_text())) == {"caption", "captions"}
    assert app_state.insights.state()["captions"]["fresh"]
    file.write_text(json.dumps({"caption": {"mark": "", "found": {"texts": {"a": "x" * 10**6}}}}))
    before = file.read_bytes()
    for most in (len(before) - 1, len(before) + 9):
        monkeypatch.setattr(findings, "LARGEST", most)
        ask(client, "triggers")
        assert "would be larger than 1 MB" in settled(client, "triggers")["message"]
        assert file.read_bytes() == before
    monkeypatch.undo()
    file.write_bytes(b"{broken")
    ask(client, "triggers")
    assert settled(client, "triggers")["state"] == "done"


def test_captions_that_are_all_the_same_are_not_asked_about(client: TestClient, pictures: list[Path]) -> None:
    for path in pictures:
        path.with_suffix(".txt").write_text("the same")
    assert "two images with different captions" in ask(client, "captions")["problem"]
    assert "problem" not in ask(client, "triggers")
    settled(client, "triggers")


def test_a_word_is_measured_with_the_trigger_and_can_be_cancelled(
    client: TestClient, app_state: AppState, pictures: list[Path]
) -> None:
    app_state.project.update_draft(trigger="slow")
    ask(client, "triggers")
    working(client, "triggers")
    ask(client, "triggers", "cancel")
    assert settled(client, "triggers")["state"] == "idle"
    app_state.project.update_draft(trigger="bad")
    ask(client, "triggers")
    assert settled(client, "triggers") == {"state": "failed", "message": "It is broken.", "why": ""}
    app_state.project.update_draft(trigger="sks")
    ask(client, "triggers")
    assert settled(client, "triggers")["found"]["rows"][0]["asked"]["trigger"] == "sks"


def test_a_run_comes_first(client: TestClient, app_state: AppState, pictures: list[Path]) -> None:
    app_state.project.update_draft(trigger="slow")
    ask(client, "triggers")
    working(client, "triggers")
    come_alive(make_run(app_state, "live", started(), step(1)))
    state = settled(client, "triggers")
    assert state["state"] == "failed"
    assert "run live is still running" in state["message"]
    assert "run live is still running" in ask(client, "captions")["problem"]


def test_a_run_s_pictures_are_read_from_its_folder(
    client: TestClient, app_state: AppState, pictures: list[Path]
) -> None:
    assert "No run on these images" in ask(client, "pictures")["problem"]
    other = make_run(app_state, "other", started(), dataset__path="demo")
    mine = make_run(app_state, "mine", started(), dataset__path=str(app_state.project.image_folder))
    for run in (other, mine):
        run.checkpoint(5).mkdir(parents=True)
        (run.checkpoint(5) / "adapter.safetensors").write_bytes(b"")
    state = client.get("/easel/insights").json()["pictures"]
    assert state == {"state": "idle", "why": "", "run": "mine"}
    rows = [{"picture": str(pictures[1]), "gain": 0.1}]
    (mine.path / "pictures.json").write_text(json.dumps({"step": 5, "rows": rows}))
    state = client.get("/easel/insights").json()["pictures"]
    assert (state["state"], state["fresh"], state["run"]) == ("done", True, "mine")
    assert state["found"]["rows"] == [{"picture": "picture-1.png", "gain": 0.1}]
    mine.checkpoint(9).mkdir()
    (mine.checkpoint(9) / "adapter.safetensors").write_bytes(b"")
    assert client.get("/easel/insights").json()["pictures"]["fresh"] is False
    (mine.path / "pictures.json").write_text("{broken")
    assert client.get("/easel/insights").json()["pictures"]["state"] == "idle"


def test_the_check_says_what_will_be_learned(
    client: TestClient, app_state: AppState, pictures: list[Path]
) -> None:
    app_state.project.save_caption(pictures[0].name, "a long caption " * 40)
    client.post("/easel/check", json={})
    wait_for(lambda: client.get("/easel/check").json()["state"] != "working")
    state = client.get("/easel/check").json()
    assert {row["picture"] for row in state["shares"]} == {path.name for path in pictures}
    assert sum(row["share"] for row in state["shares"]) == pytest.approx(1)
    assert all(set(row["pictures"]) <= {path.name for path in pictures} for row in state["learned"])
    assert "of the steps" in state["parts"]["learned-found"]
    shown = state["parts"]["check-found"]
    assert "Uncaptioned, 1" in shown
    assert "raise Caption tokens." in shown
    assert 'data-open-picture="picture-2.png"' in shown
    assert state["things"] == len(state["problems"])
    # Another batch size fills batches up in another way.
    app_state.project.update_draft(values={"train.batch_size": 4})
    assert client.get("/easel/check").json()["fresh"] is False


def test_a_word_of_another_meaning_is_an_issue_with_its_fix(client: TestClient, app_state: AppState) -> None:
    folder = app_state.project.image_folder
    for seed in range(6):
        subject(seed).save(folder / f"{seed}.png")
        (folder / f"{seed}.txt").write_text("a cat, Black background" if seed else "")
    app_state.project.invalidate()
    client.post("/easel/check", json={})
    wait_for(lambda: client.get("/easel/check").json()["state"] != "working")
    shown = client.get("/easel/check").json()["parts"]["issues"]
    # One of the five is for validation.
    assert "“black” is white in 4" in shown
    assert "1 uncaptioned" in shown
    (fix,) = re.findall('data-fix="([^"]*)"', shown)
    asked = {**json.loads(html.unescape(fix)), "apply": True}
    assert client.post("/easel/bulk", json=asked).json()["changed"] == 4
    texts = sorted((folder / f"{seed}.txt").read_text() for seed in range(1, 6))
    assert texts == ["a cat, Black background", *["a cat, white background"] * 4]


CAPTIONER = {
    "model": "owner/tagger", "prompt": "of ", "max_tokens": 9, "threshold": 0.5, "character_threshold": 1,
    "exclude": "", "underscores": False, "download": False,
}  # fmt: skip


def captioned(client: TestClient, how: str, **other: Any) -> dict[str, Any]:
    """What a captioner comes to that is asked so."""
    sent = {"do": "begin", "what": "caption", "how": how, **CAPTIONER, **other}
    problem = client.post("/easel/insights", json=sent).json().get("problem")
    return {"problem": problem} if problem else settled(client, "caption")


def test_a_captioner_is_asked_previewed_applied_and_taken_back(
    client: TestClient, app_state: AppState, pictures: list[Path]
) -> None:
    app_state.project.update_draft(trigger="a plain field")
    bulk = {"do": "caption"}
    assert "Press Preview first" in client.post("/easel/bulk", json=bulk).json()["problem"]
    state = captioned(client, "missing")
    assert (state["state"], state["fresh"], state["found"]) == ("done", True, 1)
    assert state["asked"] == {**CAPTIONER, "how": "missing"}
    # Another window finds the texts, and what was asked.
    seen = client.post("/easel/bulk", json=bulk).json()
    assert "1 caption of 3 would change." in seen["parts"]["bulk-preview"]
    assert captioned(client, "replace", pictures=["picture-0.png", "picture-2.png"])["found"] == 2
    assert client.post("/easel/bulk", json={**bulk, "pictures": ["picture-1.png"]}).json()["changed"] == 0
    texts = [path.with_suffix(".txt") for path in pictures]
    before = [text.read_bytes() if text.exists() else None for text in texts]
    answer = client.post("/easel/bulk", json={**bulk, "apply": True}).json()
    assert answer == {"changed": 2, "undo": "captions by tagger"}
    assert texts[0].read_text() == "a plain field, of picture-0.png"
    assert texts[1].read_bytes() == before[1]
    assert texts[2].read_text() == "of picture-2.png"
    assert client.post("/easel/bulk/undo").json()["undone"] == 2
    assert [text.read_bytes() if text.exists() else None for text in texts] == before


def masked(client: TestClient, prompt: str, how: str, **other: Any) -> dict[str, Any]:
    """What a mask model comes to that is asked so; the worker of these tests answers the prompt."""
    sent = {"do": "begin", "what": "mask", "model": "owner/clipseg", "prompt": prompt, "how": how, **other}
    problem = client.post("/easel/insights", json=sent).json().get("problem")
    return {"problem": problem} if problem else settled(client, "mask")


def test_a_mask_model_is_asked_previewed_applied_and_taken_back(
    client: TestClient, app_state: AppState, pictures: list[Path]
) -> None:
    for number, path in enumerate(pictures):
        Image.new("RGB", (96, 72), (80 * number, 0, 0)).save(path)
    buffer = io.BytesIO()
    Image.new("L", (96, 72), 51).save(buffer, "PNG")
    png, bulk = base64.b64encode(buffer.getvalue()).decode(), {"do": "mask"}
    assert "the mask model was not asked" in client.post("/easel/bulk", json=bulk).json()["problem"]
    for wrong, sentence in (
        ({"model": ""}, "Give the folder of a mask model"), ({"threshold": None}, "The threshold None is no"),
        ({"grow": "wide"}, "The grow 'wide' is not a number"), ({"how": "append"}, "'append' is not a way"),
    ):  # fmt: skip
        assert sentence in masked(client, png, **{"how": "missing", **wrong})["problem"]
    own = pictures[0].with_name("picture-0-masklabel.png")
    own.write_bytes(buffer.getvalue() + b"as it was")
    app_state.project.invalidate()
    state = masked(client, png, "missing")
    assert (state["state"], state["fresh"], state["found"]) == ("done", True, 2)
    seen = client.post("/easel/bulk", json=bulk).json()
    shown = seen["parts"]["bulk-preview"]
    assert (seen["changed"], "2 images of 3 would get a mask.</p>" in shown) == (2, True)
    assert f'picture-1.png</span><p class="changed"><img src="data:image/png;base64,{png}"' in shown
    assert client.post("/easel/bulk", json={**bulk, "apply": True}).json() == {
        "changed": 2, "undo": "masks by clipseg",
    }  # fmt: skip
    assert own.read_bytes().endswith(b"as it was")
    assert all(record.mask for record in app_state.project.images().values())
    assert "Every image has a mask" in masked(client, png, "missing")["problem"]
    assert masked(client, png, "replace")["found"] == 3
    assert client.post("/easel/bulk", json={**bulk, "apply": True}).json()["changed"] == 3
    assert not own.read_bytes().endswith(b"as it was")
    for undone in (3, 2):
        answer = client.post("/easel/bulk/undo").json()
        assert (answer["undone"], answer["kept"], answer["masks"]) == (undone, 0, True)
    assert [one.name for one in pictures[0].parent.glob("*-masklabel.png")] == [own.name]
    assert own.read_bytes().endswith(b"as it was")
    # Nothing found is said, and nothing written.
    assert masked(client, "", "replace")["found"] == 3
    seen = client.post("/easel/bulk", json=bulk).json()
    assert seen["changed"] == 0
    assert "Nothing was found in 3 images" in seen["parts"]["bulk-preview"]


def test_what_was_said_of_an_image_is_not_said_of_another_of_its_name(
    client: TestClient, app_state: AppState, pictures: list[Path]
) -> None:
    bulk = {"do": "caption", "apply": True}
    files = [path.with_suffix(".txt") for path in pictures]
    assert captioned(client, "replace", pictures=["picture-0.png", "picture-2.png"])["found"] == 2
    pictures[2].unlink()
    Image.new("RGB", (120, 120), "red").save(pictures[2])
    app_state.project.invalidate()
    assert client.post("/easel/bulk", json=bulk).json()["changed"] == 1
    assert files[0].read_text() == "of picture-0.png"
    assert not files[2].exists()
    app_state.project.crop("picture-0.png", (0, 0, 0.5, 1))
    assert "Press Preview first" in client.post("/easel/bulk", json=bulk).json()["problem"]
    # Asked again, it is said of the images that are there, also of the crop.
    files[0].write_text("by hand")
    app_state.project.invalidate()
    captioned(client, "replace", pictures=["picture-0.png", "picture-2.png"])
    assert client.post("/easel/bulk", json=bulk).json()["changed"] == 2
    assert (files[0].read_text(), files[2].read_text()) == ("of picture-0.png", "of picture-2.png")


def test_a_captioner_that_is_cancelled_or_cannot_be_asked_changes_nothing(
    client: TestClient, app_state: AppState, pictures: list[Path]
) -> None:
    for wrong, sentence in (
        ({"model": " "}, "Give the folder"), ({"model": 5}, "Give the folder"),
        ({"threshold": None}, "The threshold None is not a number"), ({"max_tokens": 2.5}, "not an integer"),
        ({"how": "over"}, "is not a way to caption"),
    ):  # fmt: skip
        assert sentence in captioned(client, **{"how": "append", **wrong})["problem"]
    client.post(
        "/easel/insights",
        json={"do": "begin", "what": "caption", "how": "append", **CAPTIONER, "model": "slow"},
    )
    working(client, "caption")
    assert ask(client, "caption", "cancel")
    assert settled(client, "caption")["state"] == "idle"
    assert (
        "Press Preview first"
        in client.post("/easel/bulk", json={"do": "caption", "apply": True}).json()["problem"]
    )
    pictures[2].with_suffix(".txt").write_text("now it has one")
    app_state.project.invalidate()
    assert "Every image has a caption" in captioned(client, "missing")["problem"]
    app_state.project.update_draft(dataset="demo")
    assert "The demo's images stay as they are" in captioned(client, "append")["problem"]
