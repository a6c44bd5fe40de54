"""Projects: new, open, rename, delete; which runs belong to one; what they hold."""

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from app.page import build_page
from app.state import AppState, take_snapshot
from app.train.run_cards import earlier
from lora_core.errors import DatasetError, RunError
from lora_core.generate.request import GenerationRequest
from lora_core.projects.project import Project
from lora_core.projects.workspace import Projects, belongs_to, list_trash, mark_project
from lora_core.runs.folder import RunFolder, all_runs, runs_folder
from lora_core.settings.config import RunConfig
from tests.app.conftest import Say


def run(app_state: AppState, name: str, dataset: str = "demo") -> RunFolder:
    config = RunConfig().changed({"name": name, "dataset.path": dataset})
    return RunFolder.create(runs_folder(app_state.workspace) / name, config)


def test_a_project_of_its_own(app_state: AppState, pictures: list[Path]) -> None:
    first = app_state.project.path
    app_state.project.update_draft(trigger="sks")
    key = app_state.projects.new("My <b>dog</b>: a / b")
    assert app_state.project.path.name == key
    assert key == "my-b-dog-b-a-b"
    assert (app_state.project.title, app_state.project.dataset().records) == ("My <b>dog</b>: a / b", [])
    assert app_state.project.draft() == {}
    app_state.projects.open("default")
    assert app_state.project.path == first
    assert (len(app_state.project.dataset().records), app_state.project.draft()["trigger"]) == (3, "sks")


def test_the_project_that_was_open_is_open_again(app_state: AppState) -> None:
    key = app_state.projects.new("Second")
    assert Projects(app_state.workspace).current.path.name == key
    app_state.projects.delete(key)
    assert Projects(app_state.workspace).current.path.name == "default"


@pytest.mark.parametrize(
    "text", ['{"open": "../../etc"}', '{"open": 3}', "{", '{"open": "gone"}', '{"open": ".."}']
)
def test_a_broken_note_opens_the_default(app_state: AppState, text: str) -> None:
    (app_state.workspace / "projects" / "open.json").write_text(text)
    assert Projects(app_state.workspace).current.path.name == "default"


def test_rename_keeps_the_folder(app_state: AppState) -> None:
    app_state.projects.rename("default", "Our dog 😀")
    assert app_state.project.title == "Our dog 😀"
    assert Projects(app_state.workspace).current.title == "Our dog 😀"
    assert app_state.project.path.name == "default"


@pytest.mark.parametrize(
    ("title", "said"),
    [("", "Type a name"), (" \n", "Type a name"), ("x" * 81, "longer"), ("my IMAGES", "already")],
)
def test_titles_that_will_not_do(app_state: AppState, title: str, said: str) -> None:
    with pytest.raises(RunError, match=said):
        app_state.projects.new(title)


def test_deleted_projects_are_in_the_trash_with_all_they_hold(
    app_state: AppState, pictures: list[Path]
) -> None:
    app_state.projects.new("Second")
    app_state.projects.delete("default")
    [found] = list_trash(app_state.workspace)
    assert len(list((found.content / "pictures").glob("*.png"))) == 3
    with pytest.raises(RunError, match="only project"):
        app_state.projects.delete("second")


@pytest.mark.parametrize("key", ["", ".", "..", "../runs", "gone", "default/pictures"])
def test_no_other_folder_is_a_project(app_state: AppState, key: str) -> None:
    app_state.projects.new("Second")
    for act in (app_state.projects.open, app_state.projects.delete):
        with pytest.raises(RunError, match="no longer exists"):
            act(key)


def names_of_runs(app_state: AppState) -> set[str]:
    """The runs of the open project."""
    runs = all_runs(app_state.workspace)
    return {one.name for one in runs if belongs_to(one, one.config, app_state.project.path)}


def test_runs_of_a_project(app_state: AppState) -> None:
    run(app_state, "from-the-command-line", "demo")
    run(app_state, "own-pictures", str(app_state.workspace / "projects" / "second" / "pictures"))
    of_demo = run(app_state, "demo-in-second")
    run(app_state, "of-one-that-is-gone", str(app_state.workspace / "projects" / "gone" / "pictures"))
    key = app_state.projects.new("Second")
    assert key == "second"
    mark_project(of_demo, app_state.project.path)
    assert names_of_runs(app_state) == {"own-pictures", "demo-in-second"}
    counts = {row.key: row.runs for row in app_state.projects.list_projects()}
    assert counts == {"default": 2, "second": 2}
    app_state.projects.open("default")
    assert names_of_runs(app_state) == {"from-the-command-line", "of-one-that-is-gone"}
    # With thousands of runs, reading the settings of each would take most of the window's start.
    asked: list[str] = []
    assert not belongs_to(of_demo, lambda: asked.append("config"), app_state.project.path)
    assert asked == []


def test_a_project_shows_its_own_runs_and_folds_the_others(app_state: AppState, client: TestClient) -> None:
    run(app_state, "in-the-first")
    for name in ("in-the-second", "in-the-second-too"):
        mark_project(run(app_state, name), app_state.workspace / "projects" / "second")
    app_state.jobs.show("in-the-first")
    assert client.post("/easel/projects", json={"do": "new", "title": "Second"}).json()["switched"]
    snapshot = take_snapshot(app_state)
    # What was chosen in the other project is not what this one shows.
    assert snapshot.shown.view is not None
    assert snapshot.shown.view.run.name.startswith("in-the-second")
    shown, folded = earlier(snapshot).split('<details id="other-runs">')
    assert [name for name in ("in-the-second", "in-the-second-too") if f'data-run="{name}"' in shown] == [
        "in-the-second", "in-the-second-too",
    ]  # fmt: skip
    assert "in-the-first" not in shown
    assert "1 run of other projects" in folded
    assert 'data-run="in-the-first"' in folded
    app_state.jobs.show("in-the-first")
    chosen = take_snapshot(app_state).shown.view
    assert chosen is not None
    assert chosen.run.name == "in-the-first"

    client.post("/easel/projects", json={"do": "new", "title": "Third"})
    snapshot = take_snapshot(app_state)
    assert snapshot.shown.view is None
    assert "No earlier run of this project yet." in earlier(snapshot)
    assert "3 runs of other projects" in earlier(snapshot)


def test_the_picker(client: TestClient, app_state: AppState, pictures: list[Path]) -> None:
    [listed] = client.get("/easel/projects").json()["projects"]
    assert (listed["title"], listed["pictures"], listed["is_open"]) == ("My images", 3, True)
    answer = client.post("/easel/projects", json={"do": "new", "title": "Dog"}).json()
    assert answer["switched"]
    assert [one["title"] for one in answer["projects"]] == ["Dog", "My images"]
    answer = client.post("/easel/projects", json={"do": "new", "title": "dog"}).json()
    assert "already" in answer["problem"]
    answer = client.post(
        "/easel/projects", json={"do": "rename", "project": "default", "title": "Cat"}
    ).json()
    assert not answer["switched"]
    client.post("/easel/projects", json={"do": "delete", "project": "dog"})
    assert client.get("/easel/projects").json()["trash"]
    assert client.post("/easel/projects", json={"do": "empty"}).json()["trash"] == ""
    app_state.project.update_draft(dataset="demo")
    assert client.get("/easel/projects").json()["projects"][0]["pictures"] == 24
    assert client.post("/easel/projects", json={"do": "fly"}).status_code == 404


def test_what_was_looked_at_stays_with_its_project(
    app_state: AppState, client: TestClient, tmp_path: Path
) -> None:
    shot = GenerationRequest(prompt="an owl")
    app_state.render_queue.refuse("It cannot be drawn.")
    app_state.render_queue.want(shot)
    app_state.like_note = "Filled in from a file."
    client.post("/easel/projects", json={"do": "new", "title": "Other"})
    view = app_state.render_queue.view()
    assert (view.state, view.message, view.shot) == ("idle", "", None)
    assert app_state.like_note == ""


def test_caches_are_cleaned_and_pictures_are_not(
    client: TestClient, app_state: AppState, pictures: list[Path]
) -> None:
    client.get("/easel/thumb/dataset/picture-0.png")
    assert client.get("/easel/projects").json()["caches"]
    answer = client.post("/easel/projects", json={"do": "clean"}).json()
    assert "freed" in answer["done"]
    assert answer["caches"] == ""
    assert len(app_state.project.dataset().records) == 3
    assert client.get("/easel/thumb/dataset/picture-0.png").status_code == 200


def test_a_thumbnail_that_was_cut_short_is_made_again(
    client: TestClient, app_state: AppState, tmp_path: Path
) -> None:
    Image.new("RGB", (40, 40)).save(app_state.project.image_folder / "a.png")
    whole = client.get("/easel/thumb/dataset/a.png").content
    [kept] = (app_state.workspace / "cache" / "thumbs").rglob("*.webp")
    kept.write_bytes(whole[:-3])
    assert client.get("/easel/thumb/dataset/a.png").content == whole


def test_a_run_made_in_the_window_is_the_open_project_s(app_state: AppState) -> None:
    app_state.projects.new("Second")
    app_state.jobs.create(RunConfig().changed({"name": "one", "dataset.path": "demo"}))
    assert names_of_runs(app_state) == {"one"}
    app_state.projects.open("default")
    assert names_of_runs(app_state) == set()


def test_the_trash_is_listed_and_given_back(app_state: AppState, client: TestClient, say: Say) -> None:
    made = run(app_state, "first")
    app_state.jobs.delete("first")
    key = app_state.projects.new("Gone")
    say("projects", do="delete", project=key)
    project, kept = client.get("/easel/projects").json()["trashed"]
    assert (project["kind"], project["name"], kept["kind"], kept["name"]) == (
        "project",
        key,
        "run",
        "first",
    )
    assert kept["came_from"] == str(made.path)
    assert kept["size"].endswith("kB")
    answer = say("projects", do="restore", project=project["id"])
    assert answer["done"] == f"{key} is restored."
    assert "Gone" in [one["title"] for one in answer["projects"]]
    again = run(app_state, "first")
    answer = say("projects", do="restore", project=kept["id"])
    assert answer["done"] == "first is restored as first-2, because its name is taken."
    assert sorted(run_view.run.name for run_view in app_state.jobs.all()) == [again.name, "first-2"]
    assert (answer["trashed"], answer["trash"]) == ([], "")
    assert "no longer in the trash" in say("projects", do="restore", project=kept["id"])["problem"]
    assert "no longer in the trash" in say("projects", do="restore", project="../../x")["problem"]


@pytest.mark.parametrize(
    "draft",
    [
        {"values": {"train.steps": "many", "optimizer.lr": [1]}},
        {"values": [1, 2]},
        {"values": {"train.steps": 10**30}, "trigger": {"a": 1}, "linked": 5},
        {"preview_loras": {"rows": [], "rev": "x"}, "preview": {"steps": "x"}},
    ],
)
def test_a_draft_that_cannot_be_shown_is_set_aside(app_state: AppState, draft: dict[str, Any]) -> None:
    project = app_state.project
    (project.path / "draft.json").write_text(json.dumps(draft))
    project.open(project.path)
    assert app_state.worker.wanted_device() == "auto"
    page = build_page(app_state)
    opened = next(event for event in page.fns.values() if event.name == "opened")
    for _ in range(2):
        shown = opened.fn()
        assert "run-bar" in app_state.live.look()[0]
        for component, value in zip(opened.outputs, shown, strict=True):
            if not isinstance(value, dict):
                component.postprocess(value)
    aside = project.path / "draft-set-aside.json"
    if "linked" in draft:  # odd values that every field takes for none
        assert (project.draft(), project.draft_problem, aside.exists()) == (draft, "", False)
    else:
        assert (project.draft(), json.loads(aside.read_text())) == ({}, draft)
        assert str(aside) in project.draft_problem


def test_a_look_without_the_draft_waits_for_no_list(
    app_state: AppState, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list needs the project's lock, which such a look holds: each would wait for the other for ever."""
    project, free = app_state.project, list[bool]()

    def ask() -> None:
        free.append(project._lock.acquire(timeout=30))
        if free[-1]:
            project._lock.release()

    class Listing:
        """The lock of a list that is being made."""

        def __enter__(self) -> None:
            other = threading.Thread(target=ask)
            other.start()
            other.join()

        def __exit__(self, *error: object) -> None:
            pass

    (project.path / "draft.json").write_text('{"values": [1, 2]}')
    project.open(project.path)
    build_page(app_state)
    monkeypatch.setattr(app_state, "listing", Listing())
    assert "run-bar" in app_state.live.look()[0]
    assert project.draft_problem
    assert free == [True]


@pytest.mark.skipif(os.name == "nt", reason="no pipes there")
def test_pipes_in_a_project_hold_up_nothing(app_state: AppState) -> None:
    project = app_state.project
    for name in ("draft.json", "project.json", "sizes.json", "moving.json", "insights.json"):
        (project.path / name).unlink(missing_ok=True)
        os.mkfifo(project.path / name)
    project.open(project.path)
    project.set_unreadable_draft_aside()
    assert "draft-set-aside.json" in project.draft_problem
    project.update_draft(trigger="new")
    assert Project(project.path).draft() == {"trigger": "new"}
    assert (project.dataset().records, project.title) == ([], "My images")


@pytest.mark.parametrize(
    "written",
    [b'{"trigger": "my wor', b"[1]", b"[" * 200_000, b'{"a": ' + b"1" * 5000 + b"}", b"\0" * 9, b"\xff", b""],
)
def test_a_draft_that_cannot_be_read_is_set_aside(app_state: AppState, written: bytes) -> None:
    project = app_state.project
    aside = project.path / "draft-set-aside.json"
    aside.write_text("an earlier one")
    (project.path / "draft.json").write_bytes(written)
    # A command that opens the project leaves it for the window.
    assert Project(project.path).draft() == {}
    assert (project.path / "draft.json").read_bytes() == written
    project.open(project.path)
    build_page(app_state)
    for _ in range(2):
        assert "draft-set-aside-2.json" in str(app_state.live.look()[0])
    assert aside.read_text() == "an earlier one"
    assert (project.path / "draft-set-aside-2.json").read_bytes() == written
    project.update_draft(trigger="new")
    assert Project(project.path).draft() == {"trigger": "new"}
    # A change before the page was shown does not write over it either.
    (project.path / "draft.json").write_bytes(written)
    project.open(project.path)
    project.update_draft(trigger="newer")
    assert (project.path / "draft-set-aside-3.json").read_bytes() == written
    assert "draft-set-aside-3.json" in project.draft_problem


def test_what_is_typed_on_a_full_disk_is_kept_and_said(
    app_state: AppState, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = app_state.project
    build_page(app_state)

    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lora_core.projects.project.write_atomically", full)
        project.update_draft(trigger="sks")
        assert "No space left on device. Free some space" in str(app_state.live.look()[0])
        with pytest.raises(DatasetError, match="Free some space"):
            app_state.projects.new("another")
        assert len(app_state.projects.list_projects()) == 1
    assert project.draft()["trigger"] == "sks"
    # The next look writes it.
    app_state.live.look()
    assert Project(project.path).draft()["trigger"] == "sks"
    assert project.draft_problem == ""


def test_a_project_whose_title_is_no_valid_text(app_state: AppState) -> None:
    key = app_state.projects.new("a\ud800b")
    assert app_state.project.title == "a\N{REPLACEMENT CHARACTER}b"
    assert [
        one.key for one in app_state.projects.list_projects() if one.title == app_state.project.title
    ] == [key]


def test_a_file_in_place_of_the_images_is_named(tmp_path: Path) -> None:
    """The project that was open stays open."""
    project = Project(tmp_path / "one")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "pictures").touch()
    with pytest.raises(DatasetError, match=r"The folder .*pictures cannot be made: File exists; move the"):
        project.open(tmp_path / "two")
    assert project.path == tmp_path / "one"
