"""Runs as the window sees them: written by hand here as a trainer would write them."""

import html
import sys
import threading
from pathlib import Path

import pytest

from app import top_bar
from app.jobs import LIVE, Jobs
from app.preview.request_form import checkpoint_choices, find_loras
from app.state import AppState, take_snapshot
from app.train import run_cards as cards
from app.train.run_cards import earlier
from app.train.start import blockers, details, facts
from lora_core.errors import RunError
from lora_core.model_files.sizes import DRAWN_CAPTIONS_BYTES
from lora_core.runs import events
from lora_core.runs.diagnosis import ExitRecord, ExitRecorder
from lora_core.runs.folder import RunFolder
from lora_core.runs.queue import QueuedRun
from lora_core.settings.config import RunConfig
from lora_core.system.files import format_bytes
from tests.app.runs import HOSTILE, come_alive, make_run, started, step
from tests.waiting import PATIENCE


def test_states_and_words(app_state: AppState) -> None:
    assert take_snapshot(app_state).shown.state == "none"
    run = make_run(app_state, "first", started(), step(1), step(34))
    assert take_snapshot(app_state).shown.state == "interrupted"
    come_alive(run)
    snapshot = take_snapshot(app_state)
    assert snapshot.shown.state == "running"
    # As long as few steps were done the time is a range.
    assert top_bar.describe_run(snapshot.shown) == "34%, step 34 of 100, 35 to 70 s left"
    assert 'aria-valuenow="34"' in top_bar.run_bar(snapshot)
    assert 'data-state="running" data-step="34" data-steps="100"' in cards.run_card(snapshot)
    run.request("pause")
    assert take_snapshot(app_state).shown.state == "pausing"
    run.request("stop")
    assert take_snapshot(app_state).shown.state == "stopping"


def test_preparing_is_not_step_0(app_state: AppState) -> None:
    run = make_run(app_state, "first", started(), events.Preparing(phase="Encoding images", done=3, total=12))
    come_alive(run)
    snapshot = take_snapshot(app_state)
    assert (snapshot.shown.state, top_bar.describe_run(snapshot.shown)) == (
        "preparing",
        "Preparing: Encoding images, 25%",
    )


def test_a_failure_says_why(app_state: AppState) -> None:
    make_run(
        app_state, "first", started(), step(3), events.Failed(step=3, reason=f"Out of memory {HOSTILE}.")
    )
    card = cards.run_card(take_snapshot(app_state))
    assert "Out of memory &lt;img" in card
    assert "<img" not in card


def test_a_process_that_ends_without_a_word_has_failed(app_state: AppState) -> None:
    jobs = Jobs(app_state.workspace, (sys.executable, "-c", "import sys; sys.exit('the disk is full')"))
    run = jobs.start(RunConfig().changed({"name": "broken"}))
    run_view = jobs.run_view(run)
    assert run_view.child is not None
    assert jobs.state(run_view) in ("preparing", "failed")
    run_view.child.wait(PATIENCE)
    assert run_view.recorder is not None
    run_view.recorder.join(PATIENCE)
    assert jobs.state(run_view) == "failed"
    assert "the disk is full" in run_view.reason()


def test_no_wrong_reason_is_told_while_it_is_written_down(
    app_state: AppState, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = threading.Event()
    record = ExitRecorder.record

    def late(self: ExitRecorder, code: int) -> ExitRecord:
        told.wait(PATIENCE)
        return record(self, code)

    monkeypatch.setattr(ExitRecorder, "record", late)
    jobs = Jobs(app_state.workspace, (sys.executable, "-c", "import time; time.sleep(600)"))
    run_view = jobs.run_view(jobs.start(RunConfig().changed({"name": "killed"})))
    assert run_view.child is not None
    assert run_view.recorder is not None
    run_view.child.kill()
    run_view.child.wait(PATIENCE)
    assert jobs.state(run_view) == "preparing"
    told.set()
    run_view.recorder.join(PATIENCE)
    assert jobs.state(run_view) not in LIVE


CHANGED = events.Failed(
    step=3,
    reason=(
        "Since the run asks began, this has changed: the image a.png. Put it back, or continue with"
        " --accept-changes; the result then differs from an uninterrupted run."
    ),
    changed=["config.toml", f"the picture {HOSTILE}.png", "the package torch", "a", "b", "c", "d"],
)


def test_a_run_whose_inputs_changed_says_what_and_asks(app_state: AppState) -> None:
    run = make_run(app_state, "asks", started(), step(3), CHANGED)
    app_state.queue.add(run)
    app_state.queue.update(QueuedRun("asks", "failed", CHANGED.reason))
    snapshot = take_snapshot(app_state)
    assert snapshot.shown.state == "failed"
    for shown in (cards.run_card(snapshot), earlier(snapshot)):
        assert "this has changed: its settings (config.toml), the image &lt;img" in shown
        assert ".png or its caption, the package torch, a, b and 2 more." in shown
        assert "<img" not in shown
        assert "--accept" not in shown
    yes = 'data-body="{"do": "accept", "run": "asks"}"'
    assert 'data-hint="changed"' in cards.run_card(snapshot)
    assert yes in html.unescape(cards.run_card(snapshot))
    # Who put it back goes on as always.
    assert 'id="train-resume"' in cards.run_card(snapshot)
    assert "it asks again" in top_bar.run_actions(snapshot)
    # Going on takes the question back.
    come_alive(run)
    snapshot = take_snapshot(app_state)
    assert not any("accept" in shown for shown in (cards.run_card(snapshot), earlier(snapshot)))


def test_another_failure_asks_nothing(app_state: AppState) -> None:
    make_run(
        app_state, "first", started(), CHANGED, started(), events.Failed(step=3, reason="The disk is full.")
    )
    snapshot = take_snapshot(app_state)
    assert "accept" not in cards.run_card(snapshot) + earlier(snapshot)
    assert "The disk is full." in cards.run_card(snapshot)


def test_a_question_waits_while_another_run_is_going_on(app_state: AppState) -> None:
    make_run(app_state, "asks", started(), step(3), CHANGED)
    come_alive(make_run(app_state, "other", started(), step(1)))
    app_state.jobs.show("asks")
    card = cards.run_card(take_snapshot(app_state))
    tag = card[: card.index("Continue with the changes")].rpartition("<button")[2]
    assert "other is training; pause or stop it first." in tag
    assert tag.endswith(" disabled>")


def test_one_run_at_a_time(app_state: AppState, pictures: list[Path]) -> None:
    assert blockers(take_snapshot(app_state)) == []
    come_alive(make_run(app_state, "first", started(), step(1)))
    assert "first is training" in blockers(take_snapshot(app_state))[0]
    with pytest.raises(RunError, match="first is still running"):
        app_state.jobs.start(RunConfig())
    with pytest.raises(RunError, match="first is still running"):
        app_state.jobs.resume("first")


def test_of_two_starts_at_once_one_is_refused(app_state: AppState, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Jobs(app_state.workspace, (sys.executable, "-c", "import time; time.sleep(600)"))
    create, refused = jobs.create, []

    def start() -> None:
        with pytest.raises(RunError) as caught:
            jobs.start(RunConfig().changed({"name": "second"}))
        refused.append(str(caught.value))

    second = threading.Thread(target=start)

    def slow_create(config: RunConfig) -> RunFolder:
        second.start()
        second.join(0.2)
        return create(config)

    monkeypatch.setattr(jobs, "create", slow_create)
    child = jobs.run_view(jobs.start(RunConfig().changed({"name": "first"}))).child
    second.join()
    assert child is not None
    child.kill()
    assert refused == ["The run first is still running; pause or stop it first."]


def test_names_count_up(app_state: AppState) -> None:
    config = RunConfig().changed({"dataset.path": str(app_state.project.image_folder)})
    first = app_state.jobs.free_name(config)
    make_run(app_state, first)
    assert app_state.jobs.free_name(config) == f"{first}-2"
    assert first == "my-images"
    named = config.changed({"dataset.path": "/work/<b>Hünd 犬"})
    assert app_state.jobs.free_name(named) == "b-hünd-犬"


@pytest.mark.parametrize("name", ["../out", "a/b", "", "..", "a\x00b"])
def test_names_that_are_no_folder_s_are_refused(app_state: AppState, name: str) -> None:
    with pytest.raises(RunError):
        app_state.jobs.resume(name)


def test_facts_before_start(app_state: AppState, pictures: list[Path]) -> None:
    snapshot = take_snapshot(app_state)
    assert "3 images, 1 without a caption;" in details(snapshot)
    assert "Captions vary" not in details(snapshot)
    assert "start-why" not in facts(snapshot)
    assert "Effective learning rate" not in details(snapshot)
    app_state.project.update_draft(values={"adapter.alpha": 2.0, "adapter.rank": 8})
    assert "Effective learning rate" in details(take_snapshot(app_state))


def test_facts_say_what_captions_that_vary_take(app_state: AppState, pictures: list[Path]) -> None:
    values = {"dataset.shuffle_tags": True, "optimizer.text_encoder_lr": 0.0, "train.steps": 10**6}
    app_state.project.update_draft(values=values)
    limit = format_bytes(DRAWN_CAPTIONS_BYTES)
    assert f"up to {limit} of them stay in memory, none on disk" in details(take_snapshot(app_state))


def test_without_pictures_start_says_why(app_state: AppState) -> None:
    assert 'id="start-why"' in facts(take_snapshot(app_state))


def test_what_a_run_left_can_be_looked_at(app_state: AppState) -> None:
    best = events.Validated(
        step=50, gain=0.01, standard_error=0.001, base_loss=0.2, adapted_loss=0.19, best=True
    )
    run = make_run(
        app_state,
        "first",
        started(),
        step(50),
        best,
        step(100),
        events.Finished(step=100, export="export/a.safetensors"),
    )
    (run.exports / "a.safetensors").write_bytes(b"")
    for number in (50, 100):
        run.checkpoint(number).mkdir()
        (run.checkpoint(number) / "adapter.safetensors").write_bytes(b"")
    snapshot = take_snapshot(app_state)
    assert [one.title for one in find_loras(snapshot)] == [
        "first, a",
        "first, step 100",
        "first, step 50, best",
    ]
    assert snapshot.shown.view is not None
    choices = checkpoint_choices(snapshot.shown.view)
    assert [key for _, key in choices] == ["best", "last", "100", "50"]


def test_earlier_runs_are_listed_with_what_can_be_done(app_state: AppState) -> None:
    make_run(app_state, "older", started(), step(5), events.Paused(step=5))
    make_run(app_state, "newer", started(), step(9), events.Finished(step=9, export=""))
    app_state.jobs.show("older")
    snapshot = take_snapshot(app_state)
    listed = earlier(snapshot)
    assert listed.index('data-run="newer"') < listed.index('data-run="older"')
    assert "Paused" in listed
    assert '"do": "resume"' in html.unescape(cards.run_card(snapshot))
