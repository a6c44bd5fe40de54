"""Runs as the window sees them: written by hand here as a trainer would write them."""

import sys
import threading
import time
from pathlib import Path

import pytest

from app import header
from app.formatting import file_size
from app.jobs import LIVE, Jobs
from app.preview.loras import checkpoint_choices, found_loras
from app.snapshot import moment_of
from app.state import Desk
from app.train import cards
from app.train.facts import blockers, facts
from app.train.run_list import earlier, queue_card
from lora_core.errors import RunError
from lora_core.model_files.sizes import DRAWN_CAPTIONS_BYTES
from lora_core.runs import events
from lora_core.runs.diagnosis import ExitRecord, ExitRecorder
from lora_core.runs.queue import QueuedRun
from lora_core.settings.config import RunConfig
from tests.app.runs import HOSTILE, come_alive, make_run, started, step
from tests.waiting import PATIENCE


def test_states_and_words(desk: Desk) -> None:
    assert moment_of(desk).state == "none"
    run = make_run(desk, "first", started(), step(1), step(34))
    assert moment_of(desk).state == "interrupted"
    come_alive(run)
    moment = moment_of(desk)
    assert moment.state == "running"
    assert header.run_words(moment) == "34%, step 34 of 100, 0:33 left"
    assert 'aria-valuenow="34"' in header.run_bar(moment)
    assert 'data-state="running" data-step="34" data-steps="100"' in cards.run_card(moment)
    run.request("pause")
    assert moment_of(desk).state == "pausing"
    run.request("stop")
    assert moment_of(desk).state == "stopping"


def test_preparing_is_not_step_0(desk: Desk) -> None:
    run = make_run(desk, "first", started(), events.Preparing(phase="Encoding pictures", done=3, total=12))
    come_alive(run)
    moment = moment_of(desk)
    assert (moment.state, header.run_words(moment)) == ("preparing", "Preparing: Encoding pictures, 3 of 12")


def test_a_failure_says_why(desk: Desk) -> None:
    make_run(desk, "first", started(), step(3), events.Failed(step=3, reason=f"Out of memory {HOSTILE}."))
    card = cards.run_card(moment_of(desk))
    assert "Out of memory &lt;img" in card
    assert "<img" not in card


def test_a_process_that_ends_without_a_word_has_failed(desk: Desk) -> None:
    jobs = Jobs(desk.workspace, (sys.executable, "-c", "import sys; sys.exit('the disk is full')"))
    run = jobs.start(RunConfig().changed({"name": "broken"}))
    watch = jobs.watch(run)
    assert watch.child is not None
    assert jobs.state(watch) in ("preparing", "failed")
    watch.child.wait(PATIENCE)
    assert watch.recorder is not None
    watch.recorder.join(PATIENCE)
    assert jobs.state(watch) == "failed"
    assert "the disk is full" in watch.reason()


def test_no_wrong_reason_is_told_while_it_is_written_down(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = threading.Event()
    record = ExitRecorder.record

    def late(self: ExitRecorder, code: int) -> ExitRecord:
        told.wait(PATIENCE)
        return record(self, code)

    monkeypatch.setattr(ExitRecorder, "record", late)
    jobs = Jobs(desk.workspace, (sys.executable, "-c", "import time; time.sleep(60)"))
    watch = jobs.watch(jobs.start(RunConfig().changed({"name": "killed"})))
    assert watch.child is not None
    assert watch.recorder is not None
    watch.child.kill()
    watch.child.wait(PATIENCE)
    assert jobs.state(watch) == "preparing"
    told.set()
    watch.recorder.join(PATIENCE)
    assert jobs.state(watch) not in LIVE


CHANGED = events.Failed(
    step=3,
    reason=(
        "Since the run asks began, this has changed: the picture a.png. Put it back, or go on with"
        " --accept-changes; the result is then not that of an unbroken run."
    ),
    changed=["config.toml", f"the picture {HOSTILE}.png", "the package torch", "a", "b", "c", "d"],
)


def test_a_run_whose_inputs_changed_says_what_and_asks(desk: Desk) -> None:
    run = make_run(desk, "asks", started(), step(3), CHANGED)
    desk.queue.queue.add(run)
    desk.queue.queue.update(QueuedRun("asks", "failed", CHANGED.reason))
    moment = moment_of(desk)
    assert moment.state == "failed"
    for html in (cards.run_card(moment), earlier(moment), queue_card(moment)):
        assert "this has changed: its settings (config.toml), the picture &lt;img" in html
        assert ".png or its caption, the package torch, a, b and 2 more." in html
        assert "<img" not in html
        assert "--accept" not in html
    yes = 'data-body="{&quot;do&quot;: &quot;accept&quot;, &quot;run&quot;: &quot;asks&quot;}"'
    assert 'data-hint="changed"' in cards.run_card(moment)
    assert yes in cards.run_card(moment)
    assert yes in earlier(moment)
    # Who put it back goes on as always.
    assert 'id="train-resume"' in cards.run_card(moment)
    assert "it asks again" in header.run_actions(moment)
    # Going on takes the question back.
    come_alive(run)
    moment = moment_of(desk)
    assert not any("accept" in html for html in (cards.run_card(moment), earlier(moment)))


def test_another_failure_asks_nothing(desk: Desk) -> None:
    make_run(desk, "first", started(), CHANGED, started(), events.Failed(step=3, reason="The disk is full."))
    moment = moment_of(desk)
    assert "accept" not in cards.run_card(moment) + earlier(moment)
    assert "The disk is full." in cards.run_card(moment)


def test_a_question_waits_while_another_run_is_going_on(desk: Desk) -> None:
    make_run(desk, "asks", started(), step(3), CHANGED)
    come_alive(make_run(desk, "other", started(), step(1)))
    row = earlier(moment_of(desk))
    tag = row[: row.index("Go on with the changes")].rpartition("<button")[2]
    assert "A run is going on; pause or stop it first." in tag
    assert tag.endswith(" disabled>")


def test_one_run_at_a_time(desk: Desk, pictures: list[Path]) -> None:
    assert blockers(moment_of(desk)) == []
    come_alive(make_run(desk, "first", started(), step(1)))
    assert "first is going on" in blockers(moment_of(desk))[0]
    with pytest.raises(RunError, match="first is going on"):
        desk.jobs.start(RunConfig())
    with pytest.raises(RunError, match="first is going on"):
        desk.jobs.resume("first")


def test_names_count_up(desk: Desk) -> None:
    config = RunConfig().changed({"dataset.path": str(desk.project.pictures)})
    first = desk.jobs.free_name(config)
    make_run(desk, first)
    assert desk.jobs.free_name(config) == f"{first}-2"
    assert first == f"{time.strftime('%Y-%m-%d')}-pictures"


@pytest.mark.parametrize("name", ["../out", "a/b", "", "..", "a\x00b"])
def test_names_that_are_no_folder_s_are_refused(desk: Desk, name: str) -> None:
    with pytest.raises(RunError):
        desk.jobs.resume(name)


def test_facts_before_start(desk: Desk, pictures: list[Path]) -> None:
    said = facts(moment_of(desk))
    assert "3 pictures, 1 without a caption." in said
    assert "Effective learning rate" in said
    assert "start-why" not in said
    assert "Captions vary" not in said


def test_facts_say_what_captions_that_vary_take(desk: Desk, pictures: list[Path]) -> None:
    values = {"dataset.shuffle_tags": True, "optim.text_encoder_lr": 0.0, "train.steps": 10**6}
    desk.project.keep(values=values)
    limit = file_size(DRAWN_CAPTIONS_BYTES)
    assert f"up to {limit} of them stay in memory, none on disk" in facts(moment_of(desk))


def test_without_pictures_start_says_why(desk: Desk) -> None:
    assert 'id="start-why"' in facts(moment_of(desk))


def test_what_a_run_left_can_be_looked_at(desk: Desk) -> None:
    best = events.Validated(
        step=50, gain=0.01, standard_error=0.001, base_loss=0.2, adapted_loss=0.19, best=True
    )
    run = make_run(
        desk,
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
    moment = moment_of(desk)
    assert [one.title for one in found_loras(moment)] == [
        "first, a",
        "first, step 100",
        "first, step 50, best",
    ]
    assert moment.watch is not None
    choices = checkpoint_choices(moment.watch)
    assert [key for _, key in choices] == ["best", "last", "100", "50"]


def test_earlier_runs_are_listed_with_what_can_be_done(desk: Desk) -> None:
    make_run(desk, "older", started(), step(5), events.Paused(step=5))
    make_run(desk, "newer", started(), step(9), events.Finished(step=9, export=""))
    desk.jobs.show("newer")
    listed = earlier(moment_of(desk))
    assert 'data-run="older"' in listed
    assert "&quot;do&quot;: &quot;resume&quot;" in listed
    assert "Paused" in listed
