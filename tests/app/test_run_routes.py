"""The routes that steer runs, over a real app without its page."""

import sys
import threading
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.state import AppState, take_snapshot
from app.templates import WORDS
from app.train import view as run_routes
from app.train.form import current_values
from app.train.run_cards import run_card, sweep_card
from lora_core.runs import events
from lora_core.runs.folder import RunFolder, runs_folder
from tests.app.conftest import Say
from tests.app.runs import come_alive, make_run, started, step
from tests.model_files.test_starting_settings import KOHYA, lora
from tests.waiting import PATIENCE


def test_requests_reach_the_run(app_state: AppState, say: Say) -> None:
    assert say("run", do="pause", run="")["problem"] == "No run is active."
    run = make_run(app_state, "a", started(), step(1))
    come_alive(run)
    for do in ("preview", "save", "pause", "stop"):
        assert say("run", do=do, run="") == {"done": True}
    assert [request["action"] for request in run.requests()] == ["preview", "save", "pause", "stop"]
    assert "still running" in str(say("run", do="delete", run="a")["problem"])


def test_the_curves_of_a_run_come_alone_and_beside_another_s(app_state: AppState, client: TestClient) -> None:
    make_run(app_state, "a", started(), step(1), step(2), validation__every=20)
    make_run(app_state, "b", started(), step(1), step(2), step(3))
    answer = client.get("/easel/curves/a").json()
    (chart,) = answer["charts"]
    assert (chart["title"], chart["curves"][0]["x"]) == ("Loss", [1.0, 2.0])
    assert answer["note"] == "Improvement is first measured at step 20."
    assert "<td" in answer["tables"]
    (chart,) = client.get("/easel/curves/a?compare=b").json()["charts"]
    assert [(curve["name"], len(curve["x"])) for curve in chart["curves"]] == [("a", 2), ("b", 3)]
    gain = events.Validated(
        step=20, gain=0.1, standard_error=0.01, base_loss=0.4, adapted_loss=0.3, best=True
    )
    make_run(app_state, "c", started(), step(1), gain)
    WORDS.speak("ja")
    try:
        (chart,) = client.get("/easel/curves/c").json()["charts"]
    finally:
        WORDS.speak("en")
    assert chart["mark"]["text"] == "最良、ステップ 20"
    assert client.get("/easel/curves/none").status_code == 404
    assert client.get("/easel/curves/a?compare=none").status_code == 404


@pytest.mark.parametrize(("do", "options"), [("resume", ""), ("accept", "--accept-changes")])
def test_only_a_yes_to_the_changes_reaches_the_trainer(
    app_state: AppState, say: Say, do: str, options: str
) -> None:
    run = make_run(app_state, "a", started(), step(1))
    app_state.jobs.trainer = (sys.executable, "-c", "import sys; sys.stdout.write(str(sys.argv[1:]))")
    assert say("run", do=do, run="a") == {"done": True}
    child = app_state.jobs.run_view(run).child
    assert child is not None
    assert child.wait(PATIENCE) == 0
    assert run.log_file.read_text() == str([str(run.path), *options.split()])


def test_a_deleted_run_lies_in_the_trash_and_its_address_gives_it_back(app_state: AppState, say: Say) -> None:
    def shown(name: str) -> str:
        say("run", do="show", run=name)
        return run_card(take_snapshot(app_state))

    make_run(app_state, "c", started(), step(1))
    run = make_run(app_state, "a", started(), step(1))
    shown("a")
    place = say("run", do="delete", run="a")["place"]
    assert not run.path.exists()
    assert (app_state.workspace / ".trash" / str(place) / "content" / "events.jsonl").is_file()
    # Another is shown, but who follows its address learns where it is.
    assert take_snapshot(app_state).shown.name == "c"
    assert 'data-shown-run="a"' in shown("a")
    assert str(place) in shown("a")
    assert "There is no run of this name" in shown("never-made")
    assert take_snapshot(app_state).active.name == "c"
    say("projects", do="restore", project=place)
    assert str(place) not in shown("a")
    assert run.path.is_dir()
    app_state.queue.add(make_run(app_state, "b"))
    assert "place" in say("run", do="delete", run="b")
    assert app_state.queue.jobs() == []


def test_what_the_preview_is_to_draw_is_kept(app_state: AppState, say: Say) -> None:
    make_run(app_state, "a", started(), step(1))
    assert say("run", do="see", run="a") == {"done": True}
    assert app_state.project.draft()["preview_strip"] == "a"


@pytest.mark.parametrize("name", ["../../etc", "..", "a/b", "a\0b"])
def test_no_run_outside_the_workspace(client: TestClient, say: Say, name: str) -> None:
    for do in ("resume", "accept", "delete", "show", "see"):
        assert "problem" in say("run", do=do, run=name)
    for do in ("up", "remove"):
        assert "problem" in say("queue", do=do, run=name)
    assert client.get(f"/easel/debug/{name.replace(chr(0), '%00')}").status_code in (200, 404)


def test_no_such_action(client: TestClient, say: Say) -> None:
    assert client.post("/easel/run", json={"do": "burn"}).status_code == 404
    assert client.post("/easel/run", content=b"[1]").status_code == 404
    assert "problem" in say("queue", do="burn")


def test_the_zip_of_a_run(app_state: AppState, client: TestClient) -> None:
    make_run(app_state, "a", started(), step(1))
    answer = client.get("/easel/debug/a")
    assert answer.headers["content-type"] == "application/zip"
    assert answer.content[:2] == b"PK"
    assert client.get("/easel/debug/none").status_code == 404


def test_only_the_header_of_a_dropped_file_is_needed(
    app_state: AppState, client: TestClient, tmp_path: Path
) -> None:
    file = lora(tmp_path, KOHYA)
    data = file.read_bytes()
    head = data[: 8 + int.from_bytes(data[:8], "little")]
    answer = client.post(f"/easel/like?size={len(data)}&name=<b>x", content=head)
    assert answer.json() == {"taken": True}
    assert current_values(app_state.project)["adapter.rank"] == 32
    assert "&lt;b&gt;x" in app_state.like_note
    assert "<b>" not in app_state.like_note
    assert not list((app_state.workspace / "tmp").glob("like-*"))
    for size in ("", "5", "-1", "99999999999999999999"):
        assert "problem" in client.post(f"/easel/like?size={size}", content=head).json()
    assert "cut short" in client.post(f"/easel/like?size={len(head)}", content=head).json()["problem"]


def test_a_configuration_is_dropped(app_state: AppState, client: TestClient) -> None:
    text = b'network_dim = 24\nnetwork_module = "networks.lora"\nunheard_of = 1'
    answer = client.post(f"/easel/like?size={len(text)}&name=my kohya.toml", content=text)
    assert answer.json() == {"taken": True}
    assert current_values(app_state.project)["adapter.rank"] == 24
    assert "unheard_of = 1 is not known here" in app_state.like_note
    assert "trainer&#39;s defaults: " in app_state.like_note
    assert "Min-SNR 0" in app_state.like_note
    answer = client.post("/easel/like?size=1&name=my kohya.toml", content=b"[")
    assert answer.json()["problem"].startswith("The config my kohya.toml is not valid TOML")
    assert not list((app_state.workspace / "tmp").glob("like-*"))


def test_a_header_without_end_is_refused(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_routes, "MAX_HEADER", 1000)
    assert client.post("/easel/like?size=99999", content=b"x" * 2000).status_code == 404


def test_quitting_says_what_goes_on(app_state: AppState, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_routes, "QUIT_AFTER", 0.0)
    left = threading.Event()
    app_state.on_quit = left.set
    come_alive(make_run(app_state, "a", started(), step(1)))
    assert say("quit") == {"run": "a", "queue": False}
    assert left.wait(PATIENCE)


def test_the_settings_of_a_run_come_into_the_form_and_go_again(
    app_state: AppState, client: TestClient, say: Say
) -> None:
    make_run(app_state, "a", adapter__rank=24, dataset__trigger="ohwx")
    app_state.project.update_draft(values={"adapter.rank": 5, "train.steps": 77}, trigger="mine")
    before = app_state.project.draft()
    answer = say("settings/take", run="a")
    now = current_values(app_state.project)
    assert (now["adapter.rank"], app_state.project.draft()["trigger"]) == (24, "ohwx")
    assert answer["new"]
    assert say("settings/restore", **answer["before"]) == {"done": True}
    assert app_state.project.draft() == before
    assert client.post("/easel/settings/restore", json={"values": [1]}).status_code == 404
    assert "is not a run" in str(say("settings/take", run="none")["problem"])


def test_a_sweep_queues_a_run_for_each_value_or_none(app_state: AppState, say: Say) -> None:
    app_state.project.update_draft(dataset="demo", level="demo")
    wrong = say("settings/sweep", setting="adapter.rank", values="4, 0, x", name="")
    assert "Rank" in str(wrong["problem"])
    assert "at least one value" in str(say("settings/sweep", setting="adapter.rank", values=" ,")["problem"])
    assert app_state.queue.jobs() == []
    for name, expected in (("", ["rank-4", "rank-16"]), ("dog", ["dog-rank-4", "dog-rank-16"])):
        say("settings/sweep", setting="adapter.rank", values="4, 16, 4", name=name)
        assert [job.run for job in app_state.queue.jobs()][-2:] == expected
    say("run", do="show", run="dog-rank-4")
    shown = sweep_card(take_snapshot(app_state))
    assert 'data-runs="dog-rank-4 dog-rank-16"' in shown
    assert "nothing to compare yet" in shown
    wrong = say("settings/sweep", setting="adapter.rank", values="4", seeds="0")
    assert "Seeds is '0'" in str(wrong["problem"])
    say("settings/sweep", setting="adapter.rank", values="4", by="train.steps", by_values="5; 6", seeds="2")
    assert len(app_state.queue.jobs()) == 8
    for job in app_state.queue.jobs()[4:]:
        say("queue", do="remove", run=job.run)
        say("run", do="delete", run=job.run)
    say("settings/sweep", setting="adapter.rank", values="4", name="")
    assert [job.run for job in app_state.queue.jobs()][-1] == "rank-4-2"
    ranks = [
        RunFolder.open(runs_folder(app_state.workspace) / job.run).config().adapter.rank
        for job in app_state.queue.jobs()
    ]
    assert ranks == [4, 16, 4, 16, 4]
    # What is in the way of a single run is in the way of these.
    app_state.project.update_draft(values={"model.base": "/no/such/base"})
    assert "problem" in say("settings/sweep", setting="adapter.rank", values="4", name="")
